"""Prompts and images in, images out: the lifecycle of a call. The work is done by the components it is given."""

# First, before any of our modules: importing diffusers registers them with its loader (registration.py).
import diffusers  # noqa: F401

from .conversation_nextflow import NextFlowConversation
from .diffusion_decoder_nextflow import NextFlowDiffusionDecoder
from .outputs_nextflow import NextFlowFramesOutput, NextFlowPipelineOutput, NextFlowPreview, save_strip
from .pipeline_nextflow import NextFlowPipeline
from .pipeline_nextflow_diffusion_decoder import NextFlowDiffusionDecoderPipeline


__all__ = [
    "NextFlowConversation",
    "NextFlowDiffusionDecoder",
    "NextFlowDiffusionDecoderPipeline",
    "NextFlowFramesOutput",
    "NextFlowPipeline",
    "NextFlowPipelineOutput",
    "NextFlowPreview",
    "save_strip",
]
