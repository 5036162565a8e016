"""For any `Trainer`: when a loss or a gradient is not finite, the batch is saved and every process stops.

`Trainer`'s `logging_nan_inf_filter` only hides such a loss from the logs; the weights would be lost all the same.
"""

import functools
import json
import math
import os
from typing import NoReturn

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from transformers import Trainer

from ...atomic import write_file, write_text


class NotFiniteError(FloatingPointError):
    """A loss or a gradient of the training is NaN or infinite."""


class FiniteStepsMixin:
    """
    Before `Trainer` among the bases of a trainer, which calls [`watch`] with every loss that it trains on: a step with
    a loss or a gradient that is not finite raises [`NotFiniteError`] on every process before the weights change.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._step_batches: list[tuple[dict, torch.Tensor]] = []  # of this optimisation step, with their losses

    def watch(self, inputs: dict, loss: torch.Tensor) -> None:
        """A batch and its loss, of every process at the same time."""
        self._step_batches.append((inputs, loss.detach()))
        # Before the last backward pass of a step: DeepSpeed changes the weights in there.
        if self.accelerator.sync_gradients:
            is_bad = ~torch.isfinite(torch.stack([loss for _, loss in self._step_batches])).all()
            if self.accelerator.reduce(is_bad.float()) > 0:
                stop_training(self, self._step_batches, None)

    def _get_grad_norm(self, model, grad_norm=None):
        # After all backward passes of a step and before the weights change; the norm is the same on every process.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        batches, self._step_batches = self._step_batches, []
        is_known = grad_norm is not None and self.accelerator.scaler is None  # fp16's scaler skips such steps itself
        if is_known and not math.isfinite(grad_norm):
            stop_training(self, batches, grad_norm)
        return grad_norm


def stop_training(
    trainer: Trainer, batches: list[tuple[dict, torch.Tensor]], grad_norm: torch.Tensor | float | None
) -> NoReturn:
    """
    Save the batches whose loss is not finite, and raise. All processes come here.

    Where all losses are finite (the gradient is not), every batch of the step is saved: it may have been any.

    Args:
        batches (`list[tuple[dict, torch.Tensor]]`): This process's batches of the step, each with its loss.
        grad_norm (`torch.Tensor` or `float`, *optional*): Gradient norm of the whole step, where it is known.
    """
    step, rank = trainer.state.global_step + 1, trainer.accelerator.process_index
    bad = [(index, *batch) for index, batch in enumerate(batches) if not torch.isfinite(batch[1])]
    any_loss_is_bad = sum(gather_object([len(bad)])) > 0
    if not any_loss_is_bad:
        bad = [(index, *batch) for index, batch in enumerate(batches)]
    files = []
    for index, batch, loss in bad:
        path = os.path.join(trainer.args.output_dir, f"bad-batch-step{step}-rank{rank}-{index}")
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in batch.items() if name not in tensors}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_file(f"{path}.safetensors", functools.partial(save_file, tensors))
        notes = {"step": step, "rank": rank, "loss": str(loss.item()), "grad_norm": str(grad_norm), **others}
        write_text(f"{path}.json", json.dumps(notes, indent=2, default=str))
        files.append(f"{path}.safetensors")
    what = "the loss" if any_loss_is_bad else f"the gradient (norm {float(grad_norm)})"
    raise NotFiniteError(
        f"{what} of step {step} is not finite; the weights are those of step {step - 1}. The batch is in "
        f"{', '.join(gather_object(files))}, what it was made of in the .json beside it. Remove its rows, or lower "
        "the learning rate, and go on from the last checkpoint"
    )


__all__ = ["FiniteStepsMixin", "NotFiniteError", "stop_training"]
