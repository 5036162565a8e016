"""NextFlow (arXiv:2601.02204) for Hugging Face: one autoregressive model that reads and writes text and images.

Importing the package costs milliseconds: every public name loads its module on first use. It also lets transformers'
auto classes and diffusers' loader find NextFlow (registration.py).
"""

import importlib
from typing import Any


__version__ = "0.2.0"

_MODULE_OF_NAME = {
    "NextFlowConfig": "modeling_nextflow.configuration_nextflow",
    "NextFlowVisionTokenizerConfig": "modeling_nextflow.configuration_nextflow",
    "NextFlowPreTrainedModel": "modeling_nextflow.modeling_nextflow",
    "NextFlowModel": "modeling_nextflow.modeling_nextflow",
    "NextFlowForCausalLM": "modeling_nextflow.modeling_nextflow",
    "NextFlowForConditionalGeneration": "modeling_nextflow.modeling_nextflow_conditional_generation",
    "NextFlowGenerationConfig": "modeling_nextflow.generation_configuration_nextflow",
    "NextFlowVisionTokenizer": "modeling_nextflow.modeling_nextflow_vision_tokenizer",
    "load_image": "processing.image_loading_nextflow",
    "NextFlowImageProcessor": "processing.image_processing_nextflow",
    "NextFlowImageProcessorPil": "processing.image_processing_nextflow",
    "NextFlowProcessor": "processing.processing_nextflow",
    "NextFlowPipeline": "pipelines.pipeline_nextflow",
    "NextFlowPipelineOutput": "pipelines.outputs_nextflow",
    "NextFlowFramesOutput": "pipelines.outputs_nextflow",
    "NextFlowConversation": "pipelines.conversation_nextflow",
    "NextFlowDiffusionDecoder": "pipelines.diffusion_decoder_nextflow",
    "NextFlowDiffusionDecoderPipeline": "pipelines.pipeline_nextflow_diffusion_decoder",
    "NextFlowTrainer": "training.transformer.trainer",
    "NextFlowVisionTokenizerTrainer": "training.vision_tokenizer.trainer",
    "NextFlowDiffusionDecoderTrainer": "training.diffusion_decoder.trainer",
    "NextFlowGRPOConfig": "training.grpo.config",
    "NextFlowGRPOTrainer": "training.grpo.trainer",
}

__all__ = ["__version__", *_MODULE_OF_NAME]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF_NAME})


# pytest imports this file a second time under the name of the folder it lies in. That copy stays inert.
if __name__ == "nextflow_hf":
    from . import registration

    registration.install()
