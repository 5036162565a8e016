"""Watching an image grow: what a scale adds to it, and the strip of all scales."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
import PIL.Image
import torch
from diffusers.utils import make_image_grid


@dataclass
class NextFlowPreview:
    """
    Images after one more scale, as [`~NextFlowPipeline.preview`] yields them.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            At full size, as in [`NextFlowPipelineOutput`]: those images of the call that are drawn together.
        indices (`list[int]`): Which images of the call these are.
        scale (`int`): Scales drawn so far, from 1.
        num_scales (`int`): Scales of the whole images.
        grid (`tuple[int, int]`): (height, width) of this scale.
        image_codes (`torch.LongTensor` of shape `(total_codes,)`): Codes so far, scale-major.
        image_grids (`torch.LongTensor` of shape `(images, max_scales, 2)`):
            The scales drawn so far: with these as `image_grids` and the codes as `image_codes` another call goes on.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    indices: list[int]
    scale: int
    num_scales: int
    grid: tuple[int, int]
    image_codes: torch.LongTensor
    image_grids: torch.LongTensor


def save_strip(
    previews: Sequence[NextFlowPreview | PIL.Image.Image], path: str | PathLike | None = None
) -> PIL.Image.Image:
    """
    The previews side by side, coarse to fine, an image of the call in each row.

    Args:
        previews (`list[NextFlowPreview]` or `list[PIL.Image.Image]`): Of one schedule, or images of one size.
        path (`str`, *optional*): Where to save the strip.
    """
    columns = [preview.images if isinstance(preview, NextFlowPreview) else [preview] for preview in previews]
    if not columns or not all(isinstance(image, PIL.Image.Image) for column in columns for image in column):
        raise ValueError("a strip needs at least one preview, of PIL images (`output_type='pil'`)")
    sizes = {(len(column), image.size) for column in columns for image in column}
    if len(sizes) > 1:
        raise ValueError(f"a strip has images of one size, got (images, size) {sorted(sizes)}")
    rows = [image for row in zip(*columns, strict=True) for image in row]
    strip = make_image_grid(rows, rows=len(columns[0]), cols=len(columns))
    if path is not None:
        strip.save(path)
    return strip


__all__ = ["NextFlowPreview", "save_strip"]
