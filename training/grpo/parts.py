"""What a training by rewards starts from: the pipeline's parts, the reference, and numbers that TRL is not told."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging
from trl import GRPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...pipelines.pipeline_nextflow import NextFlowPipeline
from ...processing.processing_nextflow import NextFlowProcessor
from .config import NextFlowGRPOConfig


logger = logging.get_logger(__name__)

REFERENCE_FILE = "reference.pt"


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


class FollowingReference(SyncRefModelCallback):
    """TRL's, for a reference in shards, too."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # After a forward alone FSDP2 leaves what is outside of the layers whole, where the policy has shards.
        for module in self.ref_model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        super().on_step_end(args, state, control, **kwargs)


def save_reference(trainer: GRPOTrainer, folder: str) -> None:
    """The reference's weights, which no other file has once it has followed the policy. Every process must call it."""
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    with _gathered(reference):
        state = get_model_state_dict(reference, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.args.should_save:
            torch.save(state, os.path.join(folder, REFERENCE_FILE))


def load_reference(trainer: GRPOTrainer, folder: str) -> None:
    """Give the reference the weights that it had. Every process must call it."""
    path = os.path.join(folder, REFERENCE_FILE)
    if not os.path.exists(path):
        if trainer.args.sync_ref_model:
            logger.warning(f"{path} is missing: the reference is again the model that the run was begun with")
        return
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with _gathered(reference):
        set_model_state_dict(reference, state, options=StateDictOptions(full_state_dict=True))


def _gathered(model: torch.nn.Module) -> AbstractContextManager:
    """Under ZeRO-3 the whole weights for the time being; what the first process changes is changed everywhere."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)


@contextmanager
def replaced(args: NextFlowGRPOConfig, **values: Any) -> Iterator[None]:
    """`args` with other values for the time being."""
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)
