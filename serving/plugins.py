"""What engines and harnesses call through the entry points of pyproject.toml.

That an entry point of this package is loaded is what they need most: `import nextflow_hf` lets diffusers and
transformers load our models. The rest says what their own tables cannot know. May run several times in a process.
"""

from typing import Any


PIPELINE = "NextFlowPipeline"  # `_class_name` of a model's `model_index.json`
MANIFEST = {"model_id": "nextflow", "simple_class_path": "nextflow_hf.serving.lmms_eval_model.NextFlow"}


def register_with_vllm_omni() -> None:
    """For `vllm serve MODEL --omni --diffusion-load-format diffusers`, with vLLM-Omni 0.30."""
    from vllm_omni.diffusion.models.diffusers_adapter import pipeline_utils

    class NextFlowPipelineUtils(pipeline_utils.BasePipelineUtils):
        def update_call_kwargs(self, req: Any, sampling: Any, accepted_call_kwargs: Any, call_kwargs: dict) -> None:
            # What the client did not ask for is the model's own: vLLM-Omni fills in 640 pixels and no guidance.
            if call_kwargs.get("resolution") == type(sampling).resolution:
                del call_kwargs["resolution"]
            if not sampling.guidance_scale_provided:
                call_kwargs.pop("guidance_scale", None)

    pipeline_utils.PIPELINE_UTILS_REGISTRY[PIPELINE] = NextFlowPipelineUtils


def register_with_sglang() -> None:
    """For `sglang serve --model-path MODEL --backend diffusers`, with SGLang 0.5.23: lets it accept source images."""
    from sglang.multimodal_gen import registry
    from sglang.multimodal_gen.configs.pipeline_configs.diffusers_generic import DiffusersTI2IPipelineConfig
    from sglang.multimodal_gen.configs.sample.diffusers_generic import DiffusersGenericSamplingParams

    registry.register_configs(
        sampling_param_cls=DiffusersGenericSamplingParams,
        pipeline_config_cls=DiffusersTI2IPipelineConfig,
        model_detectors=[lambda probe: probe == PIPELINE.lower()],
    )


def lmms_eval_manifest() -> Any:
    """The model `nextflow` of lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(**MANIFEST)
