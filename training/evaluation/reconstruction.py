"""How near a decoded image is to the true one, and how sharp: functions of pixels, no network.

Images are float (n, 3, height, width) in [0, 1]; every function gives one number for each, (n,).
"""

import math

import torch
import torch.nn.functional as F


LUMA = (0.299, 0.587, 0.114)
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # of Wang et al., as the two constants
SSIM_CONSTANTS = (0.01**2, 0.03**2)
GMSD_CONSTANT = 170 / 255**2  # of Xue et al., for pixels from 0 to 255


def fidelity(decoded: torch.Tensor, true: torch.Tensor) -> dict[str, torch.Tensor]:
    """`psnr`, `ssim` and `gmsd`; SSIM is not a number for images smaller than its window."""
    too_small = min(true.shape[2:]) < SSIM_WINDOW
    none = torch.full((len(true),), math.nan, device=true.device)
    return {
        "psnr": peak_signal_to_noise(decoded, true),
        "ssim": none if too_small else structural_similarity(decoded, true),
        "gmsd": gradient_similarity_deviation(decoded, true),
    }


def peak_signal_to_noise(decoded: torch.Tensor, true: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """PSNR in decibel, over all pixels or those of `mask` (n, height, width); a perfect copy is capped at 100."""
    squared = (decoded - true).square().mean(1)
    mask = torch.ones_like(squared, dtype=torch.bool) if mask is None else mask
    if not mask.flatten(1).any(1).all():
        raise ValueError("an image's mask is empty, expected at least one pixel in each")
    error = (squared * mask).sum((1, 2)) / mask.sum((1, 2))
    return -10 * error.clamp(min=1e-10).log10()


def structural_similarity(decoded: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """
    SSIM (Wang et al., 2004): Gaussian windows of 11 x 11 pixels, those that lie inside the image, of each colour
    channel by itself; 1 is a perfect copy.
    """
    if min(true.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"images are {tuple(true.shape[2:])} pixels, expected at least {SSIM_WINDOW} along each axis")
    offsets = torch.arange(SSIM_WINDOW, device=true.device, dtype=true.dtype) - SSIM_WINDOW // 2
    weights = (-(offsets**2) / (2 * SSIM_SIGMA**2)).exp()
    weights = weights / weights.sum()

    def windows(images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(0, 1).unsqueeze(1)  # every channel an image of its own
        flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
        return flat.view(*images.shape[:2], *flat.shape[2:])

    mean_decoded, mean_true = windows(decoded), windows(true)
    variances = windows(decoded**2) - mean_decoded**2 + windows(true**2) - mean_true**2
    covariance = windows(decoded * true) - mean_decoded * mean_true
    luminance = (2 * mean_decoded * mean_true + SSIM_CONSTANTS[0]) / (
        mean_decoded**2 + mean_true**2 + SSIM_CONSTANTS[0]
    )
    structure = (2 * covariance + SSIM_CONSTANTS[1]) / (variances + SSIM_CONSTANTS[1])
    return (luminance * structure).mean((1, 2, 3))


def gradient_similarity_deviation(decoded: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """
    GMSD (Xue et al., 2014): the deviation of the similarity of the two images' gradient magnitudes. It follows what
    people see of blur and of artefacts better than PSNR does; 0 is a perfect copy, and higher is worse.
    """
    kernel = torch.tensor([[1.0, 0.0, -1.0]] * 3).div(3)
    kernels = torch.stack([kernel, kernel.T])[:, None].to(true)
    magnitudes = []
    for images in (decoded, true):
        halved = F.avg_pool2d(_luminance(images), 2)
        magnitudes.append(F.conv2d(halved, kernels, padding=1).square().sum(1).sqrt())
    product, squares = magnitudes[0] * magnitudes[1], magnitudes[0].square() + magnitudes[1].square()
    similarity = (2 * product + GMSD_CONSTANT) / (squares + GMSD_CONSTANT)
    return similarity.flatten(1).std(1, correction=0)


def edge_steepness(images: torch.Tensor) -> torch.Tensor:
    """
    How steep the edges are: the mean step from pixel to pixel, weighted by the steps themselves. An edge that is
    spread over twice as many pixels counts half, wherever it lies; flat areas do not count.
    """
    luminance = _luminance(images)[:, 0]
    steps = torch.cat([luminance.diff(dim=axis).abs().flatten(1) for axis in (1, 2)], dim=1)
    return steps.square().sum(1) / steps.sum(1).clamp(min=1e-8)


def _luminance(images: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(LUMA, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)
