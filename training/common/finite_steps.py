"""Stops a `Trainer` on every process when a loss or gradient is not finite, and saves the batch. For any `Trainer`.

`Trainer`'s `logging_nan_inf_filter` keeps such a loss out of the logs alone, not out of the weights.
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
    Checks every step. List it before `Trainer` among the bases, and call [`watch`] in `compute_loss`. A loss or
    gradient that is not finite raises [`NotFiniteError`] on every process before the weights change.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._step_batches: list[tuple[dict, torch.Tensor]] = []  # of this optimisation step, with their losses

    def watch(self, inputs: dict, loss: torch.Tensor) -> None:
        """Note a batch and its loss, and check the losses of a step at its last batch. Every process must call it."""
        self._step_batches.append((inputs, loss.detach()))
        # Checked before the last backward pass of a step, in which DeepSpeed changes the weights.
        if self.accelerator.sync_gradients:
            is_bad = ~torch.isfinite(torch.stack([loss for _, loss in self._step_batches])).all()
            if self.accelerator.reduce(is_bad.float()) > 0:
                stop_training(self, self._step_batches, None)

    def _get_grad_norm(self, model, grad_norm=None):
        # Called between the last backward pass and the optimizer; the norm is the same on every process.
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
    Save the batches whose loss is not finite, and raise [`NotFiniteError`]. Every process must call it.

    If all losses are finite and only the gradient is not, any batch may be the cause: all of the step are saved.

    Args:
        batches (`list[tuple[dict, torch.Tensor]]`): Batches of this process in the step, each with its loss.
        grad_norm (`torch.Tensor` or `float`, *optional*): Gradient norm of the step; unknown before its last batch.
    """
    step, rank = trainer.state.global_step + 1, trainer.accelerator.process_index
    bad = [(index, *batch) for index, batch in enumerate(batches) if not torch.isfinite(batch[1])]
    # A collective call: every process comes here, also those whose own batches are fine.
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
        f"{', '.join(gather_object(files))}; the .json beside it names its rows. Remove them, or lower "
        "the learning rate, and go on from the last checkpoint"
    )
