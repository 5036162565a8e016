"""What happens when a loss or a gradient is not finite: the batch is saved, and every process stops.

`Trainer`'s `logging_nan_inf_filter` only hides such a loss from the logs; the weights would be lost all the same.
"""

import json
import os
from typing import TYPE_CHECKING, NoReturn

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file


if TYPE_CHECKING:
    from .trainer import NextFlowTrainer


class NotFiniteError(FloatingPointError):
    """A loss or a gradient of the training is NaN or infinite."""


def stop_training(
    trainer: "NextFlowTrainer", batches: list[tuple[dict, torch.Tensor]], grad_norm: torch.Tensor | float | None
) -> NoReturn:
    """
    Save the batches whose loss is not finite, and raise. All processes come here.

    Where all losses are finite (the gradient is not), every batch of the step is saved: it may have been any.

    Args:
        batches (`list[tuple[dict, torch.Tensor]]`): This process's batches of the step, each with its loss.
        grad_norm (`torch.Tensor` or `float`, *optional*): Of the whole step, where it is known.
    """
    step, rank = trainer.state.global_step + 1, trainer.accelerator.process_index
    bad = [(index, *batch) for index, batch in enumerate(batches) if not torch.isfinite(batch[1])]
    any_loss_is_bad = sum(gather_object([len(bad)])) > 0
    if not any_loss_is_bad:
        bad = [(index, *batch) for index, batch in enumerate(batches)]
    os.makedirs(trainer.args.output_dir, exist_ok=True)
    files = []
    for index, batch, loss in bad:
        path = os.path.join(trainer.args.output_dir, f"bad-batch-step{step}-rank{rank}-{index}")
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in batch.items() if name not in tensors}
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, f"{path}.safetensors")
        notes = {"step": step, "rank": rank, "loss": str(loss.item()), "grad_norm": str(grad_norm), **others}
        with open(f"{path}.json", "w") as file:
            json.dump(notes, file, indent=2, default=str)
        files.append(f"{path}.safetensors")
    what = "the loss" if any_loss_is_bad else f"the gradient (norm {float(grad_norm)})"
    raise NotFiniteError(
        f"{what} of step {step} is not finite; the weights are those of step {step - 1}. The batch is in "
        f"{', '.join(gather_object(files))}, what it was made of in the .json beside it. Remove its rows, or lower "
        "the learning rate, and go on from the last checkpoint"
    )


__all__ = ["NotFiniteError", "stop_training"]
