"""Token ids, grids and tensors in; logits, codes and pixels out. Knows no messages, no PIL images, no pipeline."""

# First, before any of our modules: importing transformers registers them with its auto classes (registration.py).
import transformers  # noqa: F401

from .configuration_nextflow import NextFlowConfig, NextFlowVisionTokenizerConfig
from .modeling_nextflow import NextFlowForCausalLM, NextFlowModel, NextFlowPreTrainedModel
from .modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer


__all__ = [
    "NextFlowConfig",
    "NextFlowForCausalLM",
    "NextFlowModel",
    "NextFlowPreTrainedModel",
    "NextFlowVisionTokenizer",
    "NextFlowVisionTokenizerConfig",
]
