"""The models: token ids, grids and tensors in; logits, codes and pixels out. No messages, PIL images or pipelines."""

# Import transformers before our modules: that registers them with its auto classes (registration.py).
import transformers  # noqa: F401

from .configuration_nextflow import NextFlowConfig, NextFlowVisionTokenizerConfig
from .generation_configuration_nextflow import NextFlowGenerationConfig
from .modeling_nextflow import NextFlowForCausalLM, NextFlowModel, NextFlowPreTrainedModel
from .modeling_nextflow_conditional_generation import NextFlowForConditionalGeneration
from .modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer


__all__ = [
    "NextFlowConfig",
    "NextFlowForCausalLM",
    "NextFlowForConditionalGeneration",
    "NextFlowGenerationConfig",
    "NextFlowModel",
    "NextFlowPreTrainedModel",
    "NextFlowVisionTokenizer",
    "NextFlowVisionTokenizerConfig",
]
