"""Messages and images in, `BatchFeature` out, and back to text and PIL images. Owns the scale schedule."""

# First, before any of our modules: importing transformers registers them with its auto classes (registration.py).
import transformers  # noqa: F401

from .image_loading_nextflow import load_image
from .image_processing_nextflow import NextFlowImageProcessor, NextFlowImageProcessorPil
from .messages_nextflow import THINKING_PROMPT, join_reasoning, split_reasoning
from .processing_nextflow import NextFlowProcessor
from .scale_schedule_nextflow import ScaleSchedule
from .tokenizer_extension_nextflow import extend_tokenizer


__all__ = [
    "NextFlowImageProcessor",
    "NextFlowImageProcessorPil",
    "NextFlowProcessor",
    "ScaleSchedule",
    "THINKING_PROMPT",
    "extend_tokenizer",
    "join_reasoning",
    "load_image",
    "split_reasoning",
]
