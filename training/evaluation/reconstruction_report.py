"""How near a vision tokenizer's reconstructions are: PSNR, SSIM and GMSD of every image of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..vision_tokenizer.losses import image_sizes
from .reconstruction import fidelity, peak_signal_to_noise


@dataclass
class BatchMeasurement:
    """Numbers of every image of a batch, each (n,), with the codes and the images that they are of."""

    values: dict[str, torch.Tensor]
    image_codes: torch.Tensor
    decoded: torch.Tensor


@torch.no_grad()
def measure_batch(
    tokenizer: NextFlowVisionTokenizer,
    pixel_values: torch.Tensor,
    image_grids: torch.Tensor,
    *,
    num_scales: int = 0,
) -> BatchMeasurement:
    """
    `psnr`, `ssim` and `gmsd` of every image, and `psnr_scale_k` of what its first k scales decode to, for k up to
    `num_scales` (§2.1). SSIM is not a number for images smaller than its window.
    """
    sizes = image_sizes(tokenizer, image_grids)
    true = _as_images(pixel_values, sizes)
    image_codes = tokenizer.encode(pixel_values, image_grids).image_codes
    values = {}
    for scales in range(1, num_scales + 1):
        previews = _as_images(tokenizer.decode(image_codes, image_grids, num_scales=scales), sizes)
        values[f"psnr_scale_{scales}"] = torch.cat(list(map(peak_signal_to_noise, previews, true)))
    decoded = tokenizer.decode(image_codes, image_grids)
    images = _as_images(decoded, sizes)
    each = [fidelity(fake, real) for fake, real in zip(images, true, strict=True)]
    values |= {name: torch.cat([one[name] for one in each]) for name in each[0]}
    return BatchMeasurement(values, image_codes, decoded)


def _as_images(pixels: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Padded pixels in [-1, 1] as images (1, 3, height, width) in [0, 1]."""
    return [
        pixels[index : index + 1, :, :height, :width].float() / 2 + 0.5 for index, (height, width) in enumerate(sizes)
    ]
