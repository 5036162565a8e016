"""What [`NextFlowPipeline`] returns. `images` comes first, so that `pipe(...)[0]` is the pictures."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


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
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | list[np.ndarray] | list[torch.Tensor] | None = None
    image_codes: torch.LongTensor | None = None
    image_grids: torch.LongTensor | None = None


__all__ = ["NextFlowPipelineOutput"]
