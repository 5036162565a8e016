"""Messages and images in, `BatchFeature` out, and back to text and PIL images. Owns the scale schedule."""

# First, before any of our modules: importing transformers registers them with its auto classes (registration.py).
import transformers  # noqa: F401

from .image_processing_nextflow import NextFlowImageProcessor, NextFlowImageProcessorPil
from .processing_nextflow import NextFlowProcessor, extend_tokenizer
from .scale_schedule import ScaleSchedule
from .thinking import THINK_PROMPT, format_thinking, parse_thinking, with_think_prompt


__all__ = [
    "NextFlowImageProcessor",
    "NextFlowImageProcessorPil",
    "NextFlowProcessor",
    "ScaleSchedule",
    "THINK_PROMPT",
    "extend_tokenizer",
    "format_thinking",
    "parse_thinking",
    "with_think_prompt",
]
