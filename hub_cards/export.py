"""One repository for two libraries: what transformers and diffusers load by the same name.

The transformer and the processor's files lie at the root, where transformers looks; the vision tokenizer, and what a
diffusion decoder has where there is one, in sub-folders. diffusers takes a component without a folder from the root. A
process that loads it imports `nextflow_hf`.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from nextflow_hf.pipelines.pipeline_nextflow import NextFlowPipeline


SHAPES_CARD = Path(__file__).with_name("shapes_card.md")
ROOT_COMPONENTS = ("transformer", "processor")
# What the card needs from outside, and what it may get.
REQUIRED_CONTEXT = {"judge", "reconstruction_psnr"}
OPTIONAL_CONTEXT = {"pictures", "training", "repo_id"}


def export_pipeline(
    pipeline: NextFlowPipeline,
    output_dir: str | Path,
    card_context: Mapping[str, Any],
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """
    Writes `pipeline` as one Hub repository, for `NextFlowPipeline`, `DiffusionPipeline`, `AutoModelForCausalLM` and
    `AutoProcessor` alike.

    Args:
        pipeline ([`NextFlowPipeline`]): It is left as it is.
        output_dir (`str` or `Path`): Created where missing; files of the same name are overwritten.
        card_context (`Mapping`): Numbers of the model card, see [`create_card`].
        dtype (`torch.dtype` or `dict[str, torch.dtype]`, *optional*):
            Of the weights in the files, or one for each component and `"default"`, as diffusers writes it. Modules
            that their class keeps in float32 stay so. By default weights are saved as they are.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Of one file of weights.

    Returns:
        `Path`: `output_dir`.
    """
    output_dir = Path(output_dir)
    if output_dir.is_file():
        raise NotADirectoryError(f"output_dir is the file {output_dir}, expected a folder")
    card = create_card(pipeline, card_context)  # first: a context that lacks something leaves no files
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, component in present_components(pipeline).items():
        folder = output_dir if name in ROOT_COMPONENTS else output_dir / name
        if isinstance(component, (PreTrainedModel, ModelMixin)):
            component_dtype = dtype.get(name, dtype.get("default")) if isinstance(dtype, Mapping) else dtype
            component = component if component_dtype is None else cast_copy(component, component_dtype)
            component.save_pretrained(folder, max_shard_size=max_shard_size)
        else:
            component.save_pretrained(folder)
    # What is marked as derived from the model's config is derived again on loading, without our `image_*` settings.
    generation_config = copy.deepcopy(pipeline.transformer.generation_config)
    generation_config._from_model_config = None
    generation_config.save_pretrained(output_dir)
    (output_dir / "model_index.json").write_text(model_index(pipeline), encoding="utf-8")
    card.save(output_dir / "README.md")
    return output_dir


def present_components(pipeline: NextFlowPipeline) -> dict[str, Any]:
    """All but the optional ones that are None."""
    return {name: component for name, component in pipeline.components.items() if component is not None}


def model_index(pipeline: NextFlowPipeline) -> str:
    """`model_index.json`: diffusers' own, with our classes under the package's name and no trace of the source."""
    index = json.loads(pipeline.to_json_string())
    index.pop("_name_or_path", None)
    for name, component in pipeline.components.items():
        if component is None:
            index.pop(name)
        elif type(component).__module__.startswith("nextflow_hf."):
            index[name] = ["nextflow_hf", type(component).__name__]
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def cast_copy(model: PreTrainedModel | ModelMixin, dtype: torch.dtype) -> PreTrainedModel | ModelMixin:
    """A copy of `model` in `dtype`, but for the modules that its class keeps in float32 whatever it is loaded in."""
    model = copy.deepcopy(model)
    is_ours = isinstance(model, PreTrainedModel)  # or one of diffusers
    kept = set((model._keep_in_fp32_modules_strict if is_ours else model._keep_in_fp32_modules) or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def create_card(pipeline: NextFlowPipeline, context: Mapping[str, Any]) -> ModelCard:
    """
    The model card: `shapes_card.md` with the model's numbers and those of `context`.

    Args:
        context (`Mapping`):
            `judge` (`dict`): `ShapesReport.to_dict()` of the evaluation. `reconstruction_psnr` (`float`): in dB, of
            held-out pictures through the vision tokenizer. Optional: `pictures` (`dict` of captions by file names
            relative to the repository), `training` (`str`, Markdown: how it was trained), `repo_id` (`str`).

    Raises:
        `ValueError`: where an entry is missing or unknown.
    """
    missing = sorted(REQUIRED_CONTEXT - set(context))
    unknown = sorted(set(context) - REQUIRED_CONTEXT - OPTIONAL_CONTEXT)
    if missing or unknown:
        raise ValueError(
            f"card_context lacks {missing} and has unknown {unknown}, expected {sorted(REQUIRED_CONTEXT)} and perhaps "
            f"{sorted(OPTIONAL_CONTEXT)}"
        )
    metadata = ModelCardData(
        license="apache-2.0",
        language="en",
        library_name="diffusers",
        pipeline_tag="any-to-any",
        tags=[
            "nextflow",
            "transformers",
            "text-to-image",
            "image-to-image",
            "next-scale-prediction",
            "autoregressive",
            "arxiv:2601.02204",
        ],
    )
    image_processor = pipeline.processor.image_processor
    schedule = image_processor.schedule
    square = schedule.grids(schedule.nearest_bucket(1, 1), schedule.num_scales(image_processor.resolution))
    return ModelCard.from_template(
        metadata,
        template_path=str(SHAPES_CARD),
        transformer=pipeline.transformer.config,
        codebook_size=pipeline.vision_tokenizer.config.codebook_size,
        resolution=image_processor.resolution,
        sides=[height for height, _ in square],
        num_codes=sum(height * width for height, width in square),
        transformer_parameters=pipeline.transformer.num_parameters(),
        tokenizer_parameters=pipeline.vision_tokenizer.num_parameters(),
        **{"pictures": {}, "training": None, "repo_id": None, **context},
    )


__all__ = ["cast_copy", "create_card", "export_pipeline", "model_index"]
