"""How near a vision tokenizer's reconstructions are: PSNR, SSIM and GMSD of every image of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..vision_tokenizer.losses import image_sizes
from .reconstruction import SSIM_WINDOW, gradient_similarity_deviation, peak_signal_to_noise, structural_similarity


@dataclass
class BatchMeasurement:
    """Numbers of every picture of a batch, each (n,), with the codes and the pictures that they are of."""

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
    `psnr`, `ssim` and `gmsd` of every picture, and `psnr_scale_k` of what its first k scales decode to, for k up to
    `num_scales` (§2.1). SSIM is not a number for pictures smaller than its window.
    """
    sizes = image_sizes(tokenizer, image_grids)
    true = _pictures(pixel_values, sizes)
    image_codes = tokenizer.encode(pixel_values, image_grids).image_codes
    values = {}
    for scales in range(1, num_scales + 1):
        previews = _pictures(tokenizer.decode(image_codes, image_grids, num_scales=scales), sizes)
        values[f"psnr_scale_{scales}"] = _each(peak_signal_to_noise, previews, true)
    decoded = tokenizer.decode(image_codes, image_grids)
    pictures = _pictures(decoded, sizes)
    values["psnr"] = _each(peak_signal_to_noise, pictures, true)
    values["ssim"] = _each(
        lambda fake, real: (
            structural_similarity(fake, real)
            if min(real.shape[2:]) >= SSIM_WINDOW
            else torch.full((len(real),), torch.nan, device=real.device)
        ),
        pictures,
        true,
    )
    values["gmsd"] = _each(gradient_similarity_deviation, pictures, true)
    return BatchMeasurement(values, image_codes, decoded)


def _pictures(pixels: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Padded pixels in [-1, 1] as pictures (1, 3, height, width) in [0, 1]."""
    return [
        pixels[index : index + 1, :, :height, :width].float() / 2 + 0.5 for index, (height, width) in enumerate(sizes)
    ]


def _each(metric, decoded: Sequence[torch.Tensor], true: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([metric(fake, real) for fake, real in zip(decoded, true, strict=True)])


__all__ = ["BatchMeasurement", "measure_batch"]
