"""Latents of the diffusion decoder, as functions of tensors: pixels to latents and back, 2x2 packing, tiles.

Latents are (batch, channels, height, width) everywhere else, whatever their VAE and their denoiser make of them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage


# `AutoencoderKL` or `AutoencoderKLQwenImage`. No more is said, as diffusers types `config` as a plain dict.
DecoderVAE = Any


def vae_scale_factor(vae: DecoderVAE) -> int:
    """Pixels per latent along each axis. Without a VAE the pixels are the latents."""
    if vae is None:
        return 1
    if _is_qwen(vae):
        return 2 ** len(vae.config.temperal_downsample)
    return 2 ** (len(vae.config.block_out_channels) - 1)


def vae_latent_channels(vae: DecoderVAE) -> int:
    """Channels of the latents; without a VAE those of pixels."""
    if vae is None:
        return 3
    return vae.config.z_dim if _is_qwen(vae) else vae.config.latent_channels


def encode_latents(
    vae: DecoderVAE, pixels: torch.Tensor, *, sample: bool = False, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Pixels (n, 3, height, width) in [-1, 1] to float32 latents: the VAE's mode, with `sample` a sample."""
    if vae is None:
        return pixels.float()
    # A video VAE takes a frame axis: (n, 3, 1, height, width).
    is_video = _is_qwen(vae)
    pixels = pixels.to(vae.dtype)  # where the VAE computes the caller knows: offloaded, it does not say
    distribution = vae.encode(pixels.unsqueeze(2) if is_video else pixels).latent_dist
    latents = (distribution.sample(generator) if sample else distribution.mode()).float()
    shift, scale = _shift_and_scale(vae, latents)
    return (latents.squeeze(2) if is_video else latents).sub(shift).mul(scale)


def decode_latents(vae: DecoderVAE, latents: torch.Tensor) -> torch.Tensor:
    """Latents back to float32 pixels (n, 3, height, width), unclamped."""
    if vae is None:
        return latents.float()
    shift, scale = _shift_and_scale(vae, latents)
    latents = latents.float().div(scale).add(shift).to(vae.dtype)
    if _is_qwen(vae):
        return vae.decode(latents.unsqueeze(2)).sample.squeeze(2).float()
    return vae.decode(latents).sample.float()


def _is_qwen(vae: DecoderVAE) -> bool:
    """Whether the VAE is Qwen-Image's, one for videos, of which an image is a frame."""
    return isinstance(vae, AutoencoderKLQwenImage)


def _shift_and_scale(vae: DecoderVAE, latents: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    # What denoisers are trained on: latents of about unit variance.
    if _is_qwen(vae):
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return mean, 1 / std
    return vae.config.shift_factor or 0.0, vae.config.scaling_factor


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """(n, channels, height, width) to (n, height / 2 * width / 2, channels * 4): 2x2 patches, row-major."""
    batch, channels, height, width = latents.shape
    # In the order that FLUX and Qwen-Image were trained with: channels, then rows and columns of the patch.
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack_latents(patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Inverse of [`pack_latents`]; the size is that of the latents."""
    batch, _, channels = patches.shape
    latents = patches.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(batch, channels // 4, height, width)


def predict_in_tiles(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    condition: torch.Tensor,
    *,
    tile: int,
) -> torch.Tensor:
    """
    `predict(latents, condition)` on overlapping squares of `tile` cells, blended where they meet.

    The condition says at every cell what is there, so tiles agree without seeing each other. Along an axis that is no
    longer than a tile nothing is cut.
    """
    rows, columns = condition.shape[2:]
    ratio = latents.shape[2] // rows  # latents that a cell spans
    total, weights = torch.zeros_like(latents), latents.new_zeros(latents.shape[2:])
    for top in _tile_starts(rows, tile):
        for left in _tile_starts(columns, tile):
            cells = (..., slice(top, top + tile), slice(left, left + tile))
            place = (..., slice(top * ratio, (top + tile) * ratio), slice(left * ratio, (left + tile) * ratio))
            part = predict(latents[place], condition[cells])
            ramps = [_ramp(side, tile // 4 * ratio, latents) for side in part.shape[2:]]
            weight = ramps[0][:, None] * ramps[1]
            total[place] += weight * part
            weights[place] += weight
    # Ramps begin at 1, so no weight is 0.
    return total / weights


def _tile_starts(length: int, tile: int) -> list[int]:
    if length <= tile:
        return [0]
    # A quarter of a tile overlaps with the next; the last tile ends at the border.
    return [*range(0, length - tile, tile - tile // 4), length - tile]


def _ramp(length: int, overlap: int, like: torch.Tensor) -> torch.Tensor:
    """1, 2, ... up to `overlap` from either end."""
    distance = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(distance, distance.flip(0)).clamp(max=max(overlap, 1))


def spread(cells: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps on the token grid (n, channels, rows, columns) repeated onto a finer grid of `size`, a whole multiple."""
    rows, columns = cells.shape[2:]
    ratio = size[0] // rows
    if ratio < 1 or size != (rows * ratio, columns * ratio):
        raise ValueError(
            f"the latents' grid is {tuple(size)}, expected a multiple of the condition's {(rows, columns)}"
        )
    return F.interpolate(cells, size, mode="nearest")
