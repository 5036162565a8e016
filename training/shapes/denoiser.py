"""A denoiser of Shapes pictures that knows no codes: what the diffusion decoder starts from, as its large siblings do
from a model that draws. Pictures in, the scheduler's loss out, nothing else."""

import numpy as np
import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import nn
from transformers import Trainer

from ..common.checkpoints import StagedCheckpointsMixin, last_checkpoint
from ..data.images import pixels_from_uint8
from ..diffusion_decoder.trainer import (
    NextFlowDiffusionDecoderTrainingArguments,
    add_training_noise,
    training_scheduler,
)


class DenoisingLoss(nn.Module):
    """A UNet's loss on pixels, as `Trainer` takes it. The text branch gets what one without captions gets."""

    def __init__(
        self, unet: UNet2DConditionModel, scheduler: SchedulerMixin, args: NextFlowDiffusionDecoderTrainingArguments
    ):
        super().__init__()
        self.unet, self.scheduler, self.args = unet, training_scheduler(scheduler), args

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        noisy, timesteps, target, weights = add_training_noise(self.scheduler, pixel_values, self.args)
        nothing = pixel_values.new_zeros(len(noisy), 1, self.unet.config.cross_attention_dim)
        predicted = self.unet(noisy, timesteps, nothing).sample.float()
        return {"loss": (weights * (predicted - target).square().flatten(1).mean(1)).mean()}


class _DenoiserTrainer(StagedCheckpointsMixin, Trainer):
    """Its checkpoints are whole, and it trains nothing after the last step."""


def train_denoiser(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    pictures: np.ndarray,
    args: NextFlowDiffusionDecoderTrainingArguments,
) -> UNet2DConditionModel:
    """Trains on pictures uint8 (n, size, size, 3), from the last checkpoint of `args.output_dir` if there is one."""
    model = DenoisingLoss(unet, scheduler, args)
    trainer = _DenoiserTrainer(
        model,
        args,
        train_dataset=pictures,
        data_collator=lambda rows: {"pixel_values": torch.stack([pixels_from_uint8(row) for row in rows])},
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    return unet


__all__ = ["DenoisingLoss", "train_denoiser"]
