"""What [`NextFlowPipeline`] returns. Pictures come first, so that `pipe(...)[0]` is the pictures."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput, export_to_gif, export_to_video, make_image_grid


@dataclass
class NextFlowPipelineOutput(BaseOutput):
    """
    Output of [`NextFlowPipeline`]. Entries are in the order of the prompts, images of one prompt beside each other.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`, *optional*):
            `"pil"`: a list; `"np"`: float32 (images, height, width, 3) in [0, 1]; `"pt"`: float32
            (images, 3, height, width) in [0, 1]. Arrays of images that differ in size come as a list. `None` for
            `output_type="codes"`, where `image_codes` then is entry 0.
        image_codes (`torch.LongTensor` of shape `(total_codes,)`):
            Codes of all images, scale-major: what the vision tokenizer decodes.
        image_grids (`torch.LongTensor` of shape `(images, max_scales, 2)`):
            Their schedules; of an interrupted image those scales that were drawn.
        thoughts (`list[str]`, *optional*): With `think=True`, the reasoning before each image.
        final_prompts (`list[str]`, *optional*): With `think=True`, the prompt that the reasoning arrived at.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | list[np.ndarray] | list[torch.Tensor] | None = None
    image_codes: torch.LongTensor | None = None
    image_grids: torch.LongTensor | None = None
    thoughts: list[str] | None = None
    final_prompts: list[str] | None = None


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
        `.webp` side by side, `columns` a row.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if not self.frames:
            raise ValueError("there are no frames to save")
        if suffix == ".gif":
            export_to_gif(self.frames, str(path), fps=fps)
        elif suffix == ".mp4":
            if not all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg")):
                raise ImportError('an .mp4 needs imageio and imageio-ffmpeg: pip install "nextflow-hf[video]"')
            export_to_video(self.frames, str(path), fps=fps)
        elif suffix in (".png", ".jpg", ".jpeg", ".webp"):
            self.contact_sheet(columns).save(path)
        else:
            raise ValueError(f"got the suffix {path.suffix!r}, expected .gif, .mp4, .png, .jpg or .webp")
        return path

    def contact_sheet(self, columns: int = 4) -> PIL.Image.Image:
        """All frames side by side on white, `columns` a row."""
        if not self.frames or columns < 1:
            raise ValueError(f"got {len(self.frames or ())} frames and {columns} columns, expected at least 1 of each")
        columns = min(columns, len(self.frames))
        rows = -(-len(self.frames) // columns)
        blank = PIL.Image.new("RGB", self.frames[0].size, "white")
        fillers = [blank] * (rows * columns - len(self.frames))
        return make_image_grid([*self.frames, *fillers], rows=rows, cols=columns)


__all__ = ["NextFlowFramesOutput", "NextFlowPipelineOutput"]
