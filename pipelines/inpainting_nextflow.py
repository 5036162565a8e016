"""Inpainting: what is kept of an image that is sampled again, its first scales and the cells outside of a mask.

The scales of an image add up, each enlarged to the last grid, so a coarse cell reaches far beyond itself. A cell is
sampled again where enough of what it reaches lies in the mask. How far a cell reaches is the vision tokenizer's to
say.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F

from .helpers_nextflow import check_numbers
from .prompts_nextflow import Image, NextFlowImagePrompt, NextFlowImageSteps, num_cells, one_per_prompt, schedule_of


Grids = Sequence[tuple[int, int]]
# Codes (cells, channels) of a grid, one channel a cell, enlarged to the last grid: (channels, height, width).
Footprint = Callable[[tuple[int, int], tuple[int, int]], torch.Tensor]


def keep_codes(
    pipe: NextFlowImageSteps,
    prompts: list[NextFlowImagePrompt],
    num_prompts: int,
    source: int,
    mask_coverage: float,
    *,
    size_is_given: bool,
    image_codes: torch.Tensor | None = None,
    image_grids: torch.Tensor | None = None,
    keep_scales: int | None = None,
    mask_image: Any = None,
) -> None:
    """
    Give the prompts of each image, of which there are as many for each of `num_prompts`, the codes to keep: those of
    the given images, else of the prompt's own image number `source`.
    """
    check_numbers(0, keep_scales=keep_scales)
    check_numbers(0, is_whole=False, mask_coverage=mask_coverage)
    if not 0 < mask_coverage <= 1:
        raise ValueError(f"`mask_coverage` is {mask_coverage}, expected more than 0 and at most 1")
    repeats = len(prompts) // num_prompts
    if image_codes is None or image_grids is None:
        images = [source_image(prompt, source) for prompt in prompts]
    else:
        images = given_images(image_codes, image_grids, num_prompts, repeats, pipe.transformer.config.codebook_size)
    masks: list[Any] = [None] * len(prompts)
    if mask_image is not None:
        is_batch = isinstance(mask_image, (np.ndarray, torch.Tensor)) and mask_image.ndim == 4
        masks = one_per_prompt("mask_image", list(mask_image) if is_batch else mask_image, num_prompts)
        masks = [_load_mask(pipe, mask) for mask in masks for _ in range(repeats)]
    footprint = functools.partial(cell_footprint, pipe.vision_tokenizer)
    options = {"size_is_given": size_is_given, "keep_scales": keep_scales, "coverage": mask_coverage}
    for index, (prompt, kept, mask) in enumerate(zip(prompts, images, masks, strict=True)):
        prompts[index] = with_prefix(prompt, kept, mask=mask, footprint=footprint, **options)
        if mask is not None:
            _check_mask(pipe.processor.image_processor.schedule, mask, prompts[index].grids)


def _load_mask(pipe: NextFlowImageSteps, mask: Image) -> PIL.Image.Image:
    pixels = pipe.processor.image_processor.process_image(mask, do_convert_rgb=True)  # (3, height, width), 8 bits
    # An array or an address has no transparency that is known here.
    opened: Any = PIL.Image.open(mask) if isinstance(mask, (str, Path)) and os.path.isfile(mask) else mask
    # On the white that images get, strokes of white on nothing would be white all over.
    if isinstance(opened, PIL.Image.Image) and opened.has_transparency_data:
        alpha: Any = opened.convert("RGBA").getchannel("A").getextrema()
        if alpha[0] < 255:
            raise ValueError(
                "`mask_image` is transparent in part, expected white where the image changes, black elsewhere"
            )
    return PIL.Image.fromarray(np.asarray(pixels).transpose(1, 2, 0)).convert("L")


def _check_mask(schedule: Any, mask: PIL.Image.Image, grids: list[tuple[int, int]]) -> None:
    if schedule.grids(schedule.nearest_bucket(mask.height, mask.width), len(grids)) != grids:
        raise ValueError(
            f"`mask_image` is {mask.height} x {mask.width} pixels (height x width), expected the shape of the image, "
            f"whose last grid is {grids[-1]}"
        )


def cell_footprint(vision_tokenizer: Any, grid: tuple[int, int], last_grid: tuple[int, int]) -> torch.Tensor:
    """What each cell of a grid reaches on the last one: (cells, height, width), weights of the enlargement."""
    # One channel a cell: what a unit vector becomes are the weights of its cell.
    cells = torch.eye(grid[0] * grid[1])[None]
    return vision_tokenizer.quantizer.upsample(cells, grid, last_grid)[0]


def given_images(
    image_codes: torch.Tensor,
    image_grids: torch.Tensor,
    num_prompts: int,
    num_images_per_prompt: int,
    codebook_size: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Codes (codes,) and schedule (max_scales, 2) for each image to sample, from one, one a prompt, or one each."""
    for name, tensor in (("image_codes", image_codes), ("image_grids", image_grids)):
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"`{name}` is {tensor.dtype}, expected integers")
    sizes = image_grids.prod(-1).sum(-1).tolist()
    if image_codes.ndim != 1 or len(image_codes) != sum(sizes):
        raise ValueError(
            f"`image_codes` has the shape {tuple(image_codes.shape)}, expected ({sum(sizes)},): the cells of the "
            f"{len(sizes)} schedules in `image_grids`"
        )
    low, high = map(int, image_codes.aminmax())
    if low < 0 or high >= codebook_size:
        raise ValueError(f"`image_codes` must lie in [0, {codebook_size}), got {low} to {high}")
    images = list(zip(image_codes.cpu().split(sizes), image_grids.cpu(), strict=True))
    num_images = num_prompts * num_images_per_prompt
    if len(images) == num_images:
        return images
    if len(images) == 1:
        return images * num_images
    if len(images) != num_prompts:
        raise ValueError(
            f"`image_grids` has {len(images)} images, expected 1, one for each of {num_prompts} prompts, or one for "
            f"each of {num_images} images"
        )
    return [image for image in images for _ in range(num_images_per_prompt)]


def source_image(prompt: NextFlowImagePrompt, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and schedule of an image in the prompt; without its last grid, where that stands there a second time."""
    sources = prompt.image_grids[:-1]
    if not len(sources):
        raise ValueError(
            "`keep_scales` and `mask_image` keep parts of an image, and there is none: pass `image`, or the "
            "`image_codes` and `image_grids` of an earlier result"
        )
    codes = prompt.image_codes.cpu().split(sources.prod(-1).sum(-1).tolist())[index]
    grids = schedule_of(sources[index])
    grids = grids[:-1] if grids[-1:] == grids[-2:-1] else grids  # as it is for images that are given, not sampled
    row = torch.zeros_like(sources[index])
    row[: len(grids)] = torch.tensor(grids)
    return codes[: num_cells(grids)], row


def with_prefix(
    prompt: NextFlowImagePrompt,
    image: tuple[torch.Tensor, torch.Tensor],
    *,
    size_is_given: bool,
    keep_scales: int | None,
    mask: PIL.Image.Image | None,
    coverage: float,
    footprint: Footprint,
) -> NextFlowImagePrompt:
    """The prompt of an image that begins as `image` does: with its first scales, and its cells outside of `mask`."""
    codes, image_grids = image
    given, grids = schedule_of(image_grids), prompt.grids
    if not size_is_given and len(given) >= len(grids):  # a whole image, which says its size itself
        grids = given
        row = F.pad(image_grids, (0, 0, 0, prompt.image_grids.shape[1] - len(image_grids)))
        prompt = replace(prompt, image_grids=torch.cat([prompt.image_grids[:-1], row[None]]))
    if given != grids[: len(given)]:
        raise ValueError(
            f"the given image has the grids {given}, but the image to sample has {grids}: leave the size out, or "
            "pass the `height` and `width`, or `aspect_ratio` and `resolution`, that it was sampled with"
        )
    if keep_scales is not None and keep_scales > len(given):
        raise ValueError(f"`keep_scales` is {keep_scales}, expected at most {len(given)}, the scales of the image")
    if mask is None:
        kept = len(given) if keep_scales is None else keep_scales
        return replace(prompt, prefix_codes=codes[: num_cells(given[:kept])]) if kept else prompt
    if len(given) < len(grids):
        raise ValueError(f"`mask_image` needs a whole image, got {len(given)} of its {len(grids)} scales")
    sampled = inpainted_cells(mask_pixels(mask, grids), grids, coverage=coverage, footprint=footprint)
    # Scales to keep are kept everywhere, also inside the mask.
    for scale in range(keep_scales or 0):
        sampled[scale][:] = False
    return replace(prompt, prefix_codes=codes, prefix_mask=~torch.cat(sampled))


def inpainted_cells(mask: torch.Tensor, grids: Grids, *, coverage: float, footprint: Footprint) -> list[torch.Tensor]:
    """
    Which cells (cells,) of each scale a mask (height, width) of the pixels has sampled again.

    On the last grid those with any pixel in the mask. On a coarser grid those of whose weights in the enlargement to
    the last grid a share of at least `coverage` falls on cells of the mask; at 1 nothing outside of these changes.
    """
    last = F.adaptive_max_pool2d(mask[None].float(), grids[-1])[0]
    sampled = []
    for grid in grids:
        if grid == grids[-1]:
            sampled.append(last.flatten() > 0)
            continue
        # Bicubic weights are partly negative, and change pixels just as much.
        weights = footprint(grid, grids[-1]).abs().double()
        outside = (weights * (1 - last)).sum((1, 2)) / weights.sum((1, 2))
        sampled.append(outside <= 1 - coverage + 1e-6)  # sums of weights round
    return sampled


def mask_pixels(mask: PIL.Image.Image, grids: Grids) -> torch.Tensor:
    """Which pixels (height, width) a mask has sampled again, where it is white: cropped as the image was."""
    # Fine enough that no cell of the last grid loses a thin stroke.
    height, width = (16 * cells for cells in grids[-1])
    fitted = PIL.ImageOps.fit(mask, (width, height), method=PIL.Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(fitted)) > 127
    if not pixels.any():
        raise ValueError("`mask_image` has no white pixel, so nothing would be sampled again: white is what changes")
    return pixels
