"""How the decoder's layers compute in a training: compiled, and with what is kept for their backward pass."""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import TrainerCallback

from ...modeling_nextflow.modeling_nextflow import NextFlowModel
from ..common.processes import seed_process


if TYPE_CHECKING:
    from .trainer import NextFlowTrainer


_PRODUCTS = {torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2}  # the place of the weight among arguments


class LayersCallback(TrainerCallback):
    """
    Applies `torch_compile` and `selective_recomputation` to the layers of the decoder when a training begins, gives
    each process dropout of its own, and starts the clock.

    Layer by layer, since around the layers a batch decides shapes and branches: there a compiled model would be
    compiled again and again.
    """

    def __init__(self, trainer: "NextFlowTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.start_clock()
        seed_process(args)  # for dropout
        for layer in find_decoder(self.trainer.model).layers:
            if getattr(args, "selective_recomputation", False):  # `args` may be transformers' own
                layer._gradient_checkpointing_func = functools.partial(
                    layer._gradient_checkpointing_func, context_fn=selective_contexts
                )
            if args.torch_compile:
                layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def find_decoder(model: torch.nn.Module) -> NextFlowModel:
    """The decoder inside whatever is around it."""
    return next(module for module in model.modules() if isinstance(module, NextFlowModel))


def selective_contexts() -> tuple[Any, Any]:
    """For `torch.utils.checkpoint.checkpoint(context_fn=...)`."""
    return create_selective_checkpoint_contexts(keep_narrow_results)


def keep_narrow_results(context: Any, operator: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
    """What takes long for its memory is kept: attention, and products whose result is no wider than their input."""
    is_kept = "attention" in str(operator) or "attn" in str(operator)
    if (place := _PRODUCTS.get(operator)) is not None:
        width, result_width = arguments[place].shape
        is_kept = result_width <= width
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
