"""From a recipe to a pipeline to train: the base denoiser with its own parts, around the tokenizer of the codes.

A recipe names a checkpoint of diffusers (`base_model`: its pipeline gives scheduler, VAE and text encoders), or has
the configuration of a denoiser that starts from nothing.
"""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import ImageProcessingMixin

from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...pipelines.diffusion_decoder_nextflow import NextFlowDiffusionDecoder
from ...pipelines.pipeline_nextflow_diffusion_decoder import NextFlowDiffusionDecoderPipeline
from ..common.checkpoints import last_checkpoint, train_to_the_end
from ..common.recipe import RECIPES, Recipe, call_with, check_parts, parse_recipe, read_recipe
from .trainer import NextFlowDiffusionDecoderTrainer, NextFlowDiffusionDecoderTrainingArguments


STAGES = ("base", "upscale")
UPSCALE_FACTOR = {"base": 1, "upscale": 2}


def load_decoder_recipe(name: str | Path) -> dict[str, Any]:
    """A recipe by its file, or by the name of one of ours."""
    path = Path(name) if str(name).endswith(".yaml") else RECIPES / f"{name}.yaml"
    if not path.is_file():
        ours = sorted(file.stem for file in RECIPES.glob("*diffusion_decoder*.yaml"))
        raise FileNotFoundError(f"there is no recipe {path}, expected a file or one of {ours}")
    recipe = read_recipe(path)
    check_parts(
        recipe,
        path,
        {"denoiser": str if "base_model" in recipe else dict, "training": dict, "stages": dict},
        {"base_model": str, "scheduler": dict, "decoder": dict, "pretraining": dict, "sampling": dict},
    )
    check_parts(recipe["stages"], f"stages of {path}", dict.fromkeys(STAGES, dict))
    return recipe


def condition_channels(vision_tokenizer: NextFlowVisionTokenizer) -> int:
    """Of the maps that `decode_features` gives."""
    config = vision_tokenizer.config
    return config.semantic_code_dim + config.pixel_code_dim + config.semantic_config.hidden_size


def build_decoder_pipeline(
    recipe: dict[str, Any],
    vision_tokenizer: NextFlowVisionTokenizer,
    image_processor: ImageProcessingMixin,
    *,
    dtype: torch.dtype | None = None,
    denoiser: ModelMixin | None = None,
) -> NextFlowDiffusionDecoderPipeline:
    """
    The pipeline before the first step: its decoder is the base denoiser, and ignores the codes. `denoiser`, if given,
    is that base, and the recipe's says only what it once was.
    """
    parts: dict[str, Any] = {}
    if "base_model" in recipe:
        stock = DiffusionPipeline.from_pretrained(recipe["base_model"], **({} if dtype is None else {"dtype": dtype}))
        kinds = ("scheduler", "vae", "text_encoder", "tokenizer")
        parts = {name: part for name, part in stock.components.items() if name.rstrip("_23") in kinds}
        if recipe["denoiser"] not in stock.components:
            raise ValueError(f"denoiser is {recipe['denoiser']!r}, expected one of {list(stock.components)}")
        denoiser = denoiser or stock.components[recipe["denoiser"]]
    elif denoiser is None:
        denoiser = make_denoiser(recipe["denoiser"])
        denoiser = denoiser if dtype is None else denoiser.to(dtype)
    if "scheduler" in recipe:
        parts["scheduler"] = make_scheduler(recipe["scheduler"], parts.get("scheduler"))
    options = {"condition_channels": condition_channels(vision_tokenizer), **recipe.get("decoder", {})}
    decoder = call_with(NextFlowDiffusionDecoder.from_denoiser, {"denoiser": denoiser, **options}, "decoder")
    decoder.register_to_config(vision_tokenizer_fingerprint=vision_tokenizer.get_codes_fingerprint())
    return NextFlowDiffusionDecoderPipeline(
        decoder, vision_tokenizer=vision_tokenizer, image_processor=image_processor, **parts
    )


def make_denoiser(options: dict[str, Any]) -> ModelMixin:
    """A random one: `options` name the class and give its configuration."""
    options = dict(options)
    return class_of_diffusers(options.pop("class", None)).from_config(options)


def class_of_diffusers(name: str | None) -> type:
    if name is None or not hasattr(diffusers, name):
        raise ValueError(f"class is {name!r}, expected the name of a class of diffusers")
    return getattr(diffusers, name)


def make_scheduler(options: dict[str, Any], base: SchedulerMixin | None) -> SchedulerMixin:
    """`options` name the class and what differs from the configuration of `base`."""
    options = dict(options)
    scheduler_class = class_of_diffusers(options.pop("class", None))
    return scheduler_class.from_config({**({} if base is None else base.config), **options})


def stage_arguments(
    recipe: dict[str, Any], stage: str, output_dir: Path, **device_arguments: Any
) -> NextFlowDiffusionDecoderTrainingArguments:
    """The numbers of one stage, whose checkpoints go to `output_dir/<stage>_run`."""
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}, expected one of {STAGES}")
    options = {**recipe["training"], **(recipe["stages"][stage] or {}), **device_arguments}
    options["output_dir"] = str(output_dir / f"{stage}_run")
    options = Recipe.section(recipe, options)
    (args,) = parse_recipe(options, [NextFlowDiffusionDecoderTrainingArguments], prog="nextflow-hf train-decoder")
    return args


def load_stage(pipeline: NextFlowDiffusionDecoderPipeline, folder: Path) -> None:
    """Puts what a finished stage saved, a decoder or a LoRA, into the pipeline."""
    if (folder / "config.json").is_file():
        pipeline.register_modules(diffusion_decoder=NextFlowDiffusionDecoder.from_pretrained(folder))
    else:
        pipeline.load_lora_weights(folder, adapter_name="default")


def train_stage(
    pipeline: NextFlowDiffusionDecoderPipeline,
    args: NextFlowDiffusionDecoderTrainingArguments,
    stage: str,
    output_dir: Path,
    **trainer_options: Any,
) -> NextFlowDiffusionDecoderTrainer:
    """Trains one stage (§3.3), from its last checkpoint on, and saves its result as `output_dir/stage`."""
    if stage == "upscale":
        load_stage(pipeline, output_dir / "base")
    pipeline.diffusion_decoder.register_to_config(upscale_factor=UPSCALE_FACTOR[stage])
    trainer = NextFlowDiffusionDecoderTrainer(pipeline, args, **trainer_options)
    train_to_the_end(trainer, last_checkpoint(args.output_dir), lambda: trainer.save_model(str(output_dir / stage)))
    return trainer


__all__ = [
    "STAGES",
    "build_decoder_pipeline",
    "condition_channels",
    "load_decoder_recipe",
    "load_stage",
    "make_denoiser",
    "make_scheduler",
    "stage_arguments",
    "train_stage",
]
