"""`NextFlowTrainer`: transformers' Trainer for the transformer, on rows of tokens and codes.

Only the difference is here: tokens are counted as the loss supervises them, and the loss is logged apart for text, for
images and for every scale.
"""

import torch
from transformers import Trainer

from ..modeling_nextflow.loss_nextflow import get_targets
from ..modeling_nextflow.rope_nextflow import get_image_layout
from .data.collator import NextFlowDataCollator


class NextFlowTrainer(Trainer):
    """
    Trains [`NextFlowForCausalLM`] (§3.2).

    Takes what `Trainer` takes. The default collator is [`NextFlowDataCollator`]. The loss is the sum of weighted token
    losses over the number of supervised tokens of the whole optimisation step, so accumulating gradients equals one
    larger batch.
    """

    def __init__(self, model=None, args=None, data_collator=None, **kwargs):
        if data_collator is None:
            if model is None:
                raise ValueError("with model_init, pass data_collator=NextFlowDataCollator(pad_token_id)")
            data_collator = NextFlowDataCollator(pad_token_id=model.config.pad_token_id)
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        self._scale_loss_sums = None
        self._scale_loss_counts = None

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        # transformers would count labels; codes are supervised without one, and placeholders' labels are not read.
        counted = [{"labels": batch["labels"], "shift_labels": self._targets(batch)} for batch in batch_samples]
        return super()._get_num_items_in_batch(counted, device)

    def _targets(self, batch: dict) -> torch.LongTensor:
        config = self.accelerator.unwrap_model(self.model).config
        layout = None
        if batch.get("image_grids") is not None:
            layout = get_image_layout(
                batch["input_ids"],
                batch["image_grids"],
                boi_token_id=config.boi_token_id,
                image_token_id=config.image_token_id,
            )
        targets, _ = get_targets(
            batch["input_ids"],
            batch["labels"],
            layout,
            batch.get("image_codes"),
            batch.get("image_grids"),
            text_vocab_size=config.text_vocab_size,
            alpha=config.scale_loss_alpha,
        )
        return targets

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training and outputs.get("scale_losses") is not None:
            counts = outputs["scale_counts"]
            sums = outputs["scale_losses"] * counts
            started = self._scale_loss_sums is not None
            self._scale_loss_sums = self._scale_loss_sums + sums if started else sums
            self._scale_loss_counts = self._scale_loss_counts + counts if started else counts
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._scale_loss_sums is not None and "loss" in logs:
            sums = self.accelerator.reduce(self._scale_loss_sums).cpu()
            counts = self.accelerator.reduce(self._scale_loss_counts).cpu()
            logs.update(_loss_parts(sums, counts))
            self._scale_loss_sums = self._scale_loss_counts = None
        super().log(logs, start_time)


def _loss_parts(sums: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
    """`text_loss`, `image_loss` and `loss_scale_k`: unweighted mean cross-entropies in nats."""
    parts = {}
    if counts[0] > 0:
        parts["text_loss"] = round((sums[0] / counts[0]).item(), 4)
    if counts[1:].sum() > 0:
        parts["image_loss"] = round((sums[1:].sum() / counts[1:].sum()).item(), 4)
    for scale, (total, count) in enumerate(zip(sums[1:], counts[1:]), start=1):
        if count > 0:
            parts[f"loss_scale_{scale}"] = round((total / count).item(), 4)
    return parts


__all__ = ["NextFlowTrainer"]
