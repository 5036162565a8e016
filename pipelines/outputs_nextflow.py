"""What [`NextFlowPipeline`] returns. Images come first, so that `pipe(...)[0]` is the images."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils.export_utils import export_to_gif, export_to_video
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.pil_utils import make_image_grid

from .helpers_nextflow import stack_equal
from .prompts_nextflow import NextFlowImagePrompt, join_codes


@dataclass
class NextFlowPipelineOutput(BaseOutput):
    """
    Output of [`NextFlowPipeline`]. Entries are in the order of the prompts, images of one prompt beside each other.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`, *optional*):
            `"pil"`: a list; `"np"`: float32 (images, height, width, 3) in [0, 1]; `"pt"`: float32
            (images, 3, height, width) in [0, 1]. Arrays of images that differ in size come as a list. `None` for
            `output_type="codes"`, where `image_codes` then is entry 0.
        image_codes (`torch.Tensor` of shape `(total_codes,)`):
            Codes of all images, scale-major: what the vision tokenizer decodes.
        image_grids (`torch.Tensor` of shape `(images, max_scales, 2)`):
            Their schedules; of an interrupted image those scales that were sampled.
        thoughts (`list[str]`, *optional*): With `think=True`, the reasoning before each image.
        final_prompts (`list[str]`, *optional*): With `think=True`, the prompt that the reasoning arrived at.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | list[np.ndarray] | list[torch.Tensor] | None = None
    image_codes: torch.Tensor | None = None
    image_grids: torch.Tensor | None = None
    thoughts: list[str] | None = None
    final_prompts: list[str] | None = None


def check_video_writer() -> None:
    """Raises `ImportError` where what writes an .mp4 is not installed: better before frames are sampled than after."""
    if not all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg")):
        raise ImportError('an .mp4 needs imageio and imageio-ffmpeg: pip install "nextflow-hf[video]"')


@dataclass
class NextFlowFramesOutput(BaseOutput):
    """
    Output of [`~NextFlowPipeline.frames`].

    Args:
        frames (`list[PIL.Image.Image]`): In order, of one size.
        texts (`list[str]`): What was said in front of each.
    """

    frames: list[PIL.Image.Image] | None = None
    texts: list[str] | None = None

    def save(self, path: str | Path, *, fps: int = 2, columns: int = 4) -> Path:
        """
        All frames in one file: `.gif` or `.mp4` show them one after the other, `fps` a second; `.png`, `.jpg` and
        `.webp` side by side, `columns` a row. Raises `ValueError` for another suffix or without frames, and
        `ImportError` where an `.mp4` lacks the extra `video`.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if not self.frames:
            raise ValueError("there are no frames to save")
        if suffix == ".gif":
            export_to_gif(self.frames, str(path), fps=fps)
        elif suffix == ".mp4":
            check_video_writer()
            export_to_video(self.frames, str(path), fps=fps)
        elif suffix in (".png", ".jpg", ".jpeg", ".webp"):
            self.contact_sheet(columns).save(path)
        else:
            raise ValueError(f"got the suffix {path.suffix!r}, expected .gif, .mp4, .png, .jpg or .webp")
        return path

    def contact_sheet(self, columns: int = 4) -> PIL.Image.Image:
        """All frames side by side on white, `columns` a row. Raises `ValueError` without frames or columns."""
        if not self.frames or columns < 1:
            raise ValueError(f"got {len(self.frames or ())} frames and {columns} columns, expected at least 1 of each")
        columns = min(columns, len(self.frames))
        rows = -(-len(self.frames) // columns)
        blank = PIL.Image.new("RGB", self.frames[0].size, "white")
        fillers = [blank] * (rows * columns - len(self.frames))
        return make_image_grid([*self.frames, *fillers], rows=rows, cols=columns)


@dataclass
class NextFlowPreview:
    """
    Images after one more scale, as [`~NextFlowPipeline.preview`] yields them.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            At full size, as in [`NextFlowPipelineOutput`]: those images of the call that are sampled together.
        indices (`list[int]`): Which images of the call these are.
        scale (`int`): Scales sampled so far, from 1.
        num_scales (`int`): Scales of the whole images.
        grid (`tuple[int, int]`): (height, width) of this scale.
        image_codes (`torch.Tensor` of shape `(total_codes,)`): Codes so far, scale-major.
        image_grids (`torch.Tensor` of shape `(images, max_scales, 2)`):
            The scales sampled so far: with these as `image_grids` and the codes as `image_codes` another call resumes.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    indices: list[int]
    scale: int
    num_scales: int
    grid: tuple[int, int]
    image_codes: torch.Tensor
    image_grids: torch.Tensor


def save_strip(
    previews: Sequence[NextFlowPreview | PIL.Image.Image], path: str | PathLike | None = None
) -> PIL.Image.Image:
    """
    The previews side by side, coarse to fine, an image of the call in each row.

    Args:
        previews (`list[NextFlowPreview]` or `list[PIL.Image.Image]`): Previews of one schedule, or images of one size.
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


def make_preview(prompts: Sequence[NextFlowImagePrompt], members: list[int], images: Any) -> NextFlowPreview:
    """The preview of the images `members` of a call, which share a schedule and are sampled equally far."""
    group = [prompts[index] for index in members]
    image_codes, image_grids = join_codes(group)
    scale, grids = group[0].num_sampled, group[0].grids
    return NextFlowPreview(
        images=stack_equal(list(images)),
        indices=members,
        scale=scale,
        num_scales=len(grids),
        grid=grids[scale - 1],
        image_codes=image_codes,
        image_grids=image_grids,
    )
