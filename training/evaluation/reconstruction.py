"""How near a decoded picture is to the true one, and how sharp: functions of pixels, no network.

Pictures are float (n, 3, height, width) in [0, 1]; every function gives one number a picture, (n,).
"""

import torch
import torch.nn.functional as F


LUMA = (0.299, 0.587, 0.114)
GMSD_CONSTANT = 170 / 255**2  # of Xue et al., for pixels from 0 to 255


def peak_signal_to_noise(
    decoded: torch.FloatTensor, true: torch.FloatTensor, mask: torch.BoolTensor | None = None
) -> torch.FloatTensor:
    """PSNR in decibel, over all pixels or those of `mask` (n, height, width); a perfect copy is capped at 100."""
    squared = (decoded - true).square().mean(1)
    mask = torch.ones_like(squared, dtype=torch.bool) if mask is None else mask
    if not mask.flatten(1).any(1).all():
        raise ValueError("a picture's mask is empty, expected at least one pixel in each")
    error = (squared * mask).sum((1, 2)) / mask.sum((1, 2))
    return -10 * error.clamp(min=1e-10).log10()


def gradient_similarity_deviation(decoded: torch.FloatTensor, true: torch.FloatTensor) -> torch.FloatTensor:
    """
    GMSD (Xue et al., 2014): the deviation of the similarity of the two pictures' gradient magnitudes. It follows what
    people see of blur and of artefacts better than PSNR does; 0 is a perfect copy, and higher is worse.
    """
    kernel = torch.tensor([[1.0, 0.0, -1.0]] * 3).div(3)
    kernels = torch.stack([kernel, kernel.T])[:, None].to(true)
    magnitudes = []
    for pictures in (decoded, true):
        halved = F.avg_pool2d(_luminance(pictures), 2)
        magnitudes.append(F.conv2d(halved, kernels, padding=1).square().sum(1).sqrt())
    product, squares = magnitudes[0] * magnitudes[1], magnitudes[0].square() + magnitudes[1].square()
    similarity = (2 * product + GMSD_CONSTANT) / (squares + GMSD_CONSTANT)
    return similarity.flatten(1).std(1, correction=0)


def edge_steepness(pictures: torch.FloatTensor) -> torch.FloatTensor:
    """
    How steep the edges are: the mean step from pixel to pixel, weighted by the steps themselves. An edge that is
    spread over twice as many pixels counts half, wherever it lies; flat areas do not count.
    """
    luminance = _luminance(pictures)[:, 0]
    steps = torch.cat([luminance.diff(dim=axis).abs().flatten(1) for axis in (1, 2)], dim=1)
    return steps.square().sum(1) / steps.sum(1).clamp(min=1e-8)


def _luminance(pictures: torch.FloatTensor) -> torch.FloatTensor:
    weights = torch.tensor(LUMA, device=pictures.device, dtype=pictures.dtype).view(1, 3, 1, 1)
    return (pictures * weights).sum(1, keepdim=True)


__all__ = ["edge_steepness", "gradient_similarity_deviation", "peak_signal_to_noise"]
