"""From a recipe to a pipeline to train: the base denoiser with its own parts, around the tokenizer of the codes.

A recipe names a checkpoint of diffusers (`base_model`: its pipeline gives scheduler, VAE and text encoders), or has
the configuration of a denoiser that starts from nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import ImageProcessingMixin

from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...pipelines.diffusion_decoder_nextflow import NextFlowDiffusionDecoder
from ...pipelines.pipeline_nextflow_diffusion_decoder import NextFlowDiffusionDecoderPipeline
from ..common.folders import COMMANDS, check_source, kind_of
from ..common.recipe import call_with


@dataclass
class DecoderArguments:
    r"""
    What is trained.

    Args:
        base_model (`str`, *optional*):
            Pipeline of diffusers that the decoder starts from, by folder or Hub id: it gives the denoiser, and the
            scheduler, VAE and text encoders around it.
        denoiser (`str`, *optional*): Component of `base_model` that becomes the decoder: `"unet"` or `"transformer"`.
        denoiser_config (`dict`, *optional*):
            Without `base_model`: `class`, a class of diffusers, and the configuration of a denoiser from nothing.
        scheduler (`dict`, *optional*):
            `class`, a class of diffusers, and what differs from the configuration of the base model's scheduler.
        projection_dim (`int`, *optional*): Width of the condition; defaults to that of the denoiser's input layer.
        embedded_guidance (`float`, *optional*, defaults to 1.0): What a denoiser that embeds its guidance is told.
        decoder_name_or_path (`str`, *optional*): Run of an earlier stage, whose decoder or LoRA is trained on.
        upscale_factor (`int`, *optional*, defaults to 1):
            Side of the images in units of what the codes decode to: 1 in the base stage, 2 in the upsampling stage
            (§3.3).
        frozen_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Of what is not trained, and of the base of a LoRA. A denoiser that trains whole does so in float32.
    """

    base_model: str | None = None
    denoiser: str | None = None
    denoiser_config: dict | None = None
    scheduler: dict | None = None
    projection_dim: int | None = None
    embedded_guidance: float = 1.0
    decoder_name_or_path: str | None = None
    upscale_factor: int = 1
    frozen_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if (self.base_model is None) == (self.denoiser_config is None):
            raise ValueError(
                "name a base_model, or give the denoiser_config of a denoiser from nothing: one of the two"
            )
        if self.base_model is not None and self.denoiser is None:
            raise ValueError("denoiser is missing, expected the component of base_model that becomes the decoder")
        if self.upscale_factor not in (1, 2):
            raise ValueError(f"upscale_factor is {self.upscale_factor}, expected 1 or 2")
        if self.frozen_dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"frozen_dtype is {self.frozen_dtype!r}, expected bfloat16, float16 or float32")


def build_decoder_pipeline(
    args: DecoderArguments,
    vision_tokenizer: NextFlowVisionTokenizer,
    image_processor: ImageProcessingMixin,
    *,
    dtype: torch.dtype | None = None,
) -> NextFlowDiffusionDecoderPipeline:
    """The pipeline before the first step: a decoder that so far ignores the codes, or that of an earlier stage."""
    parts: dict[str, Any] = {}
    if args.base_model is not None:
        if Path(args.base_model).is_dir() and kind_of(Path(args.base_model)) in COMMANDS:
            check_source("base_model", args.base_model, "pipeline of diffusers")
        stock = DiffusionPipeline.from_pretrained(args.base_model, **({} if dtype is None else {"dtype": dtype}))
        kinds = ("scheduler", "vae", "text_encoder", "tokenizer")
        parts = {name: part for name, part in stock.components.items() if name.rstrip("_23") in kinds}
        if args.denoiser not in stock.components:
            raise ValueError(f"denoiser is {args.denoiser!r}, expected one of {list(stock.components)}")
        denoiser = stock.components[args.denoiser]
    else:
        denoiser = make_denoiser(args.denoiser_config)
        denoiser = denoiser if dtype is None else denoiser.to(dtype)
    if args.scheduler is not None:
        parts["scheduler"] = make_scheduler(args.scheduler, parts.get("scheduler"))
    decoder = NextFlowDiffusionDecoder.from_denoiser(
        denoiser,
        condition_channels=vision_tokenizer.config.condition_channels,
        projection_dim=args.projection_dim,
        embedded_guidance=args.embedded_guidance,
    )
    decoder.register_to_config(vision_tokenizer_fingerprint=vision_tokenizer.get_codes_fingerprint())
    pipeline = NextFlowDiffusionDecoderPipeline(
        decoder, vision_tokenizer=vision_tokenizer, image_processor=image_processor, **parts
    )
    if args.decoder_name_or_path is not None:
        load_decoder(pipeline, args.decoder_name_or_path)
    pipeline.diffusion_decoder.register_to_config(upscale_factor=args.upscale_factor)
    return pipeline


def load_decoder(pipeline: NextFlowDiffusionDecoderPipeline, folder: str) -> None:
    """Put what an earlier stage saved, a decoder or a LoRA, into the pipeline."""
    check_source("decoder_name_or_path", folder, "diffusion decoder", "run of a diffusion decoder")
    if (Path(folder) / "config.json").is_file():
        pipeline.register_modules(diffusion_decoder=NextFlowDiffusionDecoder.from_pretrained(folder))
    else:
        pipeline.load_lora_weights(folder, adapter_name="default")


def make_denoiser(options: dict[str, Any]) -> ModelMixin:
    """A random one: `options` name the class and give its configuration."""
    options = dict(options)
    denoiser_class = class_of_diffusers(options.pop("class", None))
    return call_with(denoiser_class, options, "denoiser_config")


def class_of_diffusers(name: str | None) -> type:
    """diffusers' class of this name; raises `ValueError` where there is none."""
    if name is None or not hasattr(diffusers, name):
        raise ValueError(f"class is {name!r}, expected the name of a class of diffusers")
    return getattr(diffusers, name)


def make_scheduler(options: dict[str, Any], base: SchedulerMixin | None) -> SchedulerMixin:
    """`options` name the class and what differs from the configuration of `base`."""
    options = dict(options)
    scheduler_class = class_of_diffusers(options.pop("class", None))
    return scheduler_class.from_config({**({} if base is None else base.config), **options})
