"""The adversary of the vision tokenizer's training (VQGAN): a PatchGAN discriminator and all that makes it learn.

It has its own optimizer beside `Trainer`'s, and learns from the same forward that the tokenizer learns from. Every
loss is a mean over the images, and nothing in the network sees more than one image (GroupNorm, not BatchNorm):
micro-batches and processes add up to one large batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from .arguments import NextFlowVisionTokenizerTrainingArguments


class PatchDiscriminator(nn.Module):
    """
    PatchGAN: images (n, 3, height, width) to one logit for each patch (n, 1, rows, columns), high where it looks
    real. Each of the `num_layers` first convolutions halves both axes.

    Args:
        channels (`int`, *optional*, defaults to 64): Width of the first layer; doubles with each, at most eightfold.
        num_layers (`int`, *optional*, defaults to 3): Strided convolutions.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3):
        super().__init__()
        self.num_layers = num_layers
        widths = [channels * min(2**index, 8) for index in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index in range(1, num_layers + 1):
            strided = index < num_layers
            layers += [
                nn.Conv2d(
                    widths[index - 1], widths[index], 4 if strided else 3, stride=1 + strided, padding=1, bias=False
                ),
                nn.GroupNorm(max(1, min(32, widths[index] // 4)), widths[index]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)  # DCGAN's, as in pix2pix and VQGAN

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        smallest = 2**self.num_layers
        if min(pixels.shape[2:]) < smallest:
            raise ValueError(
                f"images are {tuple(pixels.shape[2:])} pixels, expected at least {smallest} along each axis for "
                f"discriminator_layers {self.num_layers}"
            )
        return self.layers(pixels)


class Adversary:
    """
    A discriminator with its optimizer, the same in all processes.

    Args:
        args ([`NextFlowVisionTokenizerTrainingArguments`]): Sizes, learning rate and seed.
        accelerator (`Accelerator`): Averages gradients over the processes.
    """

    def __init__(self, args: NextFlowVisionTokenizerTrainingArguments, accelerator: Accelerator):
        with torch.random.fork_rng():  # the rest of the run stays what it is without a discriminator
            torch.manual_seed(args.seed)
            discriminator = PatchDiscriminator(args.discriminator_channels, args.discriminator_layers)
        rate = args.discriminator_learning_rate
        self.discriminator = discriminator.to(args.device)
        self.learning_rate = args.learning_rate if rate is None else rate
        self.accelerator = accelerator
        betas = (args.adam_beta1, args.adam_beta2)
        self.optimizer = torch.optim.Adam(discriminator.parameters(), lr=self.learning_rate, betas=betas)

    def generator_loss(self, reconstruction: Sequence[torch.Tensor]) -> torch.Tensor:
        """Low where the reconstruction passes for real. Gives gradients to it, and none to the discriminator."""
        self.discriminator.requires_grad_(False)
        loss = -image_mean(self._logits(reconstruction))
        self.discriminator.requires_grad_(True)
        return loss

    def learn(
        self, reconstruction: Sequence[torch.Tensor], true: Sequence[torch.Tensor], *, share: float
    ) -> torch.Tensor:
        """Adds the gradients of the discriminator's hinge loss, times `share` of the step; returns the loss."""
        # Detached: the tokenizer must not learn from what improves the discriminator.
        fake = self._logits([stack.detach() for stack in reconstruction])
        loss = hinge_loss(self._logits(true), fake)
        # The backward pass runs outside of autocast, as PyTorch asks.
        with torch.autocast(loss.device.type, enabled=False):
            (loss * share).backward()
        return loss.detach()

    @torch.no_grad()
    def step(self, *, learning_rate_factor: float, max_grad_norm: float) -> None:
        """One step with the gradients of all processes, if there are any yet."""
        gradients = [parameter.grad for parameter in self.discriminator.parameters()]
        if gradients[0] is None:
            return
        # The discriminator is in no wrapper: its gradients are averaged over the processes here, in one call.
        mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        if max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.discriminator.parameters(), max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * learning_rate_factor
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict:
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _logits(self, stacks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Logits (n, patches) of every stack of images."""
        return [self.discriminator(stack).float().flatten(1) for stack in stacks]


def hinge_loss(real: Sequence[torch.Tensor], fake: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of the discriminator: zero where every real patch has more than 1 and every other less than -1."""
    return (image_mean([F.relu(1 - one) for one in real]) + image_mean([F.relu(1 + one) for one in fake])) / 2


def image_mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over the images of stacks (n, patches), however many patches each has."""
    return torch.cat([stack.mean(1) for stack in values]).mean()


def adaptive_weight(
    pixel_loss: torch.Tensor, adversarial_loss: torch.Tensor, last_layer: nn.Parameter, accelerator: Accelerator
) -> torch.Tensor:
    """
    VQGAN's weight of the adversarial loss: the length of the pixel losses' gradient over that of the adversarial
    loss's, at the decoder's last layer. The gradients are those of the batch of all processes.
    """
    gradients = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float() for loss in (pixel_loss, adversarial_loss)
    ]
    pixel, adversarial = accelerator.reduce(torch.stack(gradients), "mean")
    return (pixel.norm() / (adversarial.norm() + 1e-4)).clamp(0, 1e4)
