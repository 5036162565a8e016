"""What a training by rewards starts from: the parts of the pipeline, and numbers that TRL is not told."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer

from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...pipelines.pipeline_nextflow import NextFlowPipeline
from ...processing.processing_nextflow import NextFlowProcessor
from .config import NextFlowGRPOConfig


def load_parts(
    model: str | PreTrainedModel,
    args: NextFlowGRPOConfig | None,
    vision_tokenizer: NextFlowVisionTokenizer | None,
    processor: NextFlowProcessor | None,
) -> tuple[PreTrainedModel, NextFlowVisionTokenizer, NextFlowProcessor]:
    """The parts given, and those of the repository `model` where it is one."""
    options = None if args is None else args.model_init_kwargs
    if isinstance(model, str):
        # In float32: an update of 1e-5 is lost in half precision, which `bf16` computes in anyway.
        options = {"dtype": torch.float32, **(options or {})}
        if isinstance(options["dtype"], str):
            options["dtype"] = getattr(torch, options["dtype"])
        parts = NextFlowPipeline.from_pretrained(model, **options)
        model = parts.transformer
        vision_tokenizer = vision_tokenizer or parts.vision_tokenizer
        processor = processor or parts.processor
    elif options is not None:
        raise ValueError("`model_init_kwargs` are for a model given by its name, but the model is here already")
    for name, value, kind in (
        ("processing_class", processor, NextFlowProcessor),
        ("vision_tokenizer", vision_tokenizer, NextFlowVisionTokenizer),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"`{name}` is {type(value).__name__}, expected {kind.__name__}")
    return model, vision_tokenizer, processor


def check_sharding(trainer: GRPOTrainer) -> None:
    """Refuse shards that rollouts cannot work with: they call parts of the policy."""
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError("`fsdp` is version 1, expected 2: set `fsdp_version: 2` in `fsdp_config`")
    if trainer.is_deepspeed_enabled and not trainer.args.ds3_gather_for_generation:
        raise ValueError("`ds3_gather_for_generation` is False, expected True: rollouts call parts of the policy")


@contextmanager
def replaced(args: NextFlowGRPOConfig, **values: Any) -> Iterator[None]:
    """`args` with other values for the time being."""
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)
