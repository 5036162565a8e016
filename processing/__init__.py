"""Messages and images in, `BatchFeature` out, and back to text and PIL images. Owns the scale schedule."""

# First, before any of our modules: importing transformers registers them with its auto classes (registration.py).
import transformers  # noqa: F401

from .image_processing_nextflow import NextFlowImageProcessor, NextFlowImageProcessorPil
from .processing_nextflow import NextFlowProcessor, extend_tokenizer
from .scale_schedule import ScaleSchedule


__all__ = [
    "NextFlowImageProcessor",
    "NextFlowImageProcessorPil",
    "NextFlowProcessor",
    "ScaleSchedule",
    "extend_tokenizer",
]
