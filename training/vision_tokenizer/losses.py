"""Losses on the pixels of the vision tokenizer's reconstruction (§3.1): plain errors, edges, and what a network sees.

Images come as stacks, float (n, 3, height, width) in [-1, 1], one for each size in the batch. Every loss is a mean
over the images of a batch, whatever their sizes: the mean over two processes is that of one with both batches.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor

from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer, schedules_from_grids


LPIPS_NETWORKS = ("alex", "squeeze", "vgg")


def image_sizes(tokenizer: NextFlowVisionTokenizer, image_grids: torch.Tensor) -> list[tuple[int, int]]:
    """(height, width) in pixels of every image of a batch."""
    return [tokenizer.pixel_size(schedule[-1]) for schedule in schedules_from_grids(image_grids)]


def stack_by_size(pixels: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Padded images (n, 3, max_height, max_width) as one stack without padding for each size that occurs."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        members.setdefault(size, []).append(index)
    if len(members) == 1:
        return [pixels]
    return [pixels[indices, :, :height, :width] for (height, width), indices in members.items()]


def pixel_losses(
    reconstruction: Sequence[torch.Tensor], true: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean absolute error of the pixels, and of their two image gradients: sharp outlines."""
    absolute, edges = [], []
    for fake, real in zip(reconstruction, true, strict=True):
        error = fake.float() - real.float()
        absolute.append(error.abs().mean((1, 2, 3)))
        # Differences of the error are errors of the differences: one pass compares the edges of both.
        steps = error.diff(dim=-1).abs().sum((1, 2, 3)) + error.diff(dim=-2).abs().sum((1, 2, 3))
        edges.append(steps / error[0].numel())  # per pixel, so that images of all sizes weigh alike
    return torch.cat(absolute).mean(), torch.cat(edges).mean()


class BackboneDistance(nn.Module):
    """
    Perceptual distance of images (n,): the squared distance of a frozen vision network's features, each of length
    one, averaged over the positions of a layer and over the layers. What LPIPS is before it weighs the channels.

    Args:
        backbone (`PreTrainedModel`): Its `feature_maps` are compared.
        image_mean (`list[float]`): What the network expects to be subtracted from its pixels, which are from 0 to 1.
        image_std (`list[float]`): What it expects them to be divided by then.
    """

    def __init__(self, backbone: nn.Module, image_mean: Sequence[float], image_std: Sequence[float]):
        super().__init__()
        self.backbone = backbone
        # From [-1, 1] to what the network expects, in one step.
        self.register_buffer("mean", torch.tensor(image_mean).mul(2).sub(1).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(image_std).mul(2).view(3, 1, 1))

    @classmethod
    def from_pretrained(cls, source: str, *, layers: Sequence[int] | None = None) -> "BackboneDistance":
        """
        Any model that `AutoBackbone` knows (ConvNeXt, DINOv2, ResNet, ...), by Hub id or folder. `layers` are indices
        of its stages; by default four, evenly spread, the last one included.
        """
        config = AutoConfig.from_pretrained(source)
        last = len(config.stage_names) - 1
        layers = sorted({round(last * part / 4) for part in (1, 2, 3, 4)}) if layers is None else list(layers)
        if not layers or min(layers) < 0 or max(layers) > last:
            raise ValueError(
                f"perceptual_layers is {layers}, expected indices from 0 to {last} into {source}'s stages"
            )
        config.out_indices = layers
        with torch.device("meta"):  # `AutoBackbone.from_pretrained` takes no folder
            backbone_class = type(AutoBackbone.from_config(config))
        processor = AutoImageProcessor.from_pretrained(source)
        return cls(backbone_class.from_pretrained(source, config=config), processor.image_mean, processor.image_std)

    def forward(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            expected = self.backbone((real - self.mean) / self.std).feature_maps
        features = self.backbone((fake - self.mean) / self.std).feature_maps
        distances = [
            (_unit(one) - _unit(other)).square().sum(1).mean((1, 2))
            for one, other in zip(features, expected, strict=True)
        ]
        return torch.stack(distances).mean(0)


def load_perceptual_loss(
    source: str, *, layers: Sequence[int] | None = None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """
    A frozen module: (reconstruction, image) -> distance of every image.

    Args:
        source (`str`): `"lpips-vgg"`, `"lpips-alex"` or `"lpips-squeeze"`: LPIPS, from the package of that name. Else
            the Hub id or the folder of a vision model, see [`BackboneDistance`].
        layers (`Sequence[int]`, *optional*): Layers of the vision model.
    """
    if source.startswith("lpips-"):
        network = source.removeprefix("lpips-")
        if network not in LPIPS_NETWORKS:
            raise ValueError(f"perceptual_model is {source!r}, expected lpips- and one of {LPIPS_NETWORKS}")
        if layers is not None:
            raise ValueError(f"perceptual_layers is {list(layers)}, expected none: LPIPS has its own")
        try:
            import lpips
        except ImportError as error:
            raise ImportError(
                f"perceptual_model={source!r} needs the package lpips: pip install 'nextflow-hf[perceptual]', or name "
                "a vision model of transformers instead"
            ) from error
        distance = lpips.LPIPS(net=network, verbose=False)
    else:
        distance = BackboneDistance.from_pretrained(source, layers=layers)
    return distance.requires_grad_(False).eval()


def perceptual_loss(
    distance: Callable, reconstruction: Sequence[torch.Tensor], true: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Mean over the images of what [`load_perceptual_loss`] gives."""
    distances = [distance(fake, real).flatten() for fake, real in zip(reconstruction, true, strict=True)]
    return torch.cat(distances).float().mean()


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Features (n, channels, height, width) to length one, in float32."""
    return nn.functional.normalize(features.float(), dim=1)
