"""Where every token of an interleaved sequence stands: image layout, attention blocks, multiscale 3D positions (§2.2).

Pure functions of `input_ids` and `image_grids`; nothing here knows weights, codes or pixels. The layout they read is
the processor's: `<boi>`, one placeholder for every cell of scales 2..K, `<eoi>`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from .configuration_nextflow import default_mrope_section
from .unrounded_nextflow import UnroundedModule


@dataclass
class ImageLayout:
    """Per-token description of the images in `input_ids`; every tensor is (batch, length).

    Attributes:
        image_index: row of `image_grids` of the image a token belongs to (the last `<boi>` at or before it).
        scale: the scale that the token's output predicts: 1 at `<boi>`, 2..K at cells, 0 elsewhere.
        row, column: place of a cell in its grid; 0 elsewhere.
        block_ids: one id for all cells of one scale of one image, increasing along the row; -1 for every other token.
    """

    image_index: torch.Tensor
    scale: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    block_ids: torch.Tensor

    @property
    def is_cell(self) -> torch.Tensor:
        return self.block_ids >= 0

    @property
    def is_slot(self) -> torch.Tensor:
        """Tokens whose output predicts an image code."""
        return self.scale > 0


def get_image_layout(
    input_ids: torch.Tensor, image_grids: torch.Tensor, *, boi_token_id: int, image_token_id: int
) -> ImageLayout:
    """Read the image layout off `input_ids` (batch, length) and `image_grids` (n_images, max_scales, 2).

    Vectorised and free of device synchronisation; that the two fit is checked where codes are embedded.
    """
    is_boi = input_ids == boi_token_id
    is_cell = input_ids == image_token_id
    image_index = is_boi.flatten().cumsum(0).view_as(input_ids) - 1
    grids = image_grids[image_index.clamp(min=0, max=len(image_grids) - 1)]  # (batch, length, max_scales, 2)
    if grids.shape[2] == 1:
        grids = torch.nn.functional.pad(grids, (0, 0, 0, 1))

    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    boi_position = torch.where(is_boi, positions, -1).cummax(dim=1).values
    offset = positions - boi_position - 1  # of a cell among the cells of its image
    block_end = grids[:, :, 1:].prod(-1).cumsum(-1)  # cells up to and with scale k: (batch, length, max_scales - 1)
    block = (offset[..., None] >= block_end).sum(-1).clamp(max=block_end.shape[-1] - 1)  # 0 is scale 2

    height_width = grids[:, :, 1:].gather(2, block[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    block_start = block_end.gather(2, block[..., None])[..., 0] - height_width.prod(-1)
    cell = offset - block_start
    width = height_width[..., 1].clamp(min=1)
    block_ids = (is_cell & (cell == 0)).long().cumsum(1) - 1

    zero = torch.zeros_like(input_ids)
    return ImageLayout(
        image_index=image_index,
        scale=torch.where(is_cell, block + 2, is_boi.long()),
        row=torch.where(is_cell, cell // width, zero),
        column=torch.where(is_cell, cell % width, zero),
        block_ids=torch.where(is_cell, block_ids, zero - 1),
    )


def cell_coordinates(
    row: torch.Tensor, column: torch.Tensor, height: torch.Tensor, width: torch.Tensor, *, extent: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 1: centre of a cell in a frame of constant area `extent ** 2`, whatever the grid."""
    unit = extent / (height * width).float().clamp(min=1).sqrt()
    return unit * (row + 0.5), unit * (column + 0.5)


def block_coordinates(grid: tuple[int, int], step: int, *, extent: float) -> torch.Tensor:
    """Rotary coordinates (3, cells) of a block: `step` on the text axis, then the rows and columns of its cells."""
    height, width = (torch.tensor(side) for side in grid)
    cell = torch.arange(grid[0] * grid[1])
    row, column = cell_coordinates(cell // width, cell % width, height, width, extent=extent)
    return torch.stack([torch.full_like(row, step), row, column])


def get_position_ids(
    input_ids: torch.Tensor,
    image_grids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    token_positions: torch.Tensor | None = None,
    *,
    boi_token_id: int,
    image_token_id: int,
    extent: float,
    past_tokens: torch.Tensor | int = 0,
    past_steps: torch.Tensor | int = 0,
) -> torch.Tensor:
    """Positions (4, batch, length), float32: the plain token position, then the rotary axes (scale, row, column).

    Text at position t is (t, t, t). A whole block of cells takes ONE step of the first axis, counted on from its
    `<boi>`, so an image of K scales takes K + 1 steps in all; rows and columns follow [`cell_coordinates`] and do not
    depend on t. Padding (`attention_mask == 0`) takes no step.

    Args:
        token_positions: plain positions (batch, length), where they are given: a document begins wherever they do not
            go up by one, and its rotary axes start from its first. Of packed documents, and instead of a mask.
        past_tokens, past_steps: how far the sequence has come before `input_ids`, on the plain position and on the
            rotary text axis; one for all rows or (batch, 1).
    """
    is_packed = token_positions is not None
    real = torch.ones_like(input_ids) if attention_mask is None or is_packed else attention_mask.long()
    token_position = token_positions.long() if is_packed else (real.cumsum(1) - 1).clamp(min=0)
    if image_grids is None or len(image_grids) == 0:
        step_position = token_position + past_steps
        return torch.stack([token_position + past_tokens, *[step_position] * 3]).float()

    layout = get_image_layout(input_ids, image_grids, boi_token_id=boi_token_id, image_token_id=image_token_id)
    first_of_block = layout.is_cell & (layout.row == 0) & (layout.column == 0)
    steps = torch.where(layout.is_cell, first_of_block.long(), real).cumsum(1)
    axis = steps + _ahead(token_position, steps) if is_packed else (steps - 1).clamp(min=0)
    axis = (axis + past_steps).float()

    index = layout.image_index.clamp(min=0)
    grid = image_grids[index, (layout.scale - 1).clamp(min=0)]
    row, column = cell_coordinates(layout.row, layout.column, grid[..., 0], grid[..., 1], extent=extent)
    return torch.stack(
        [
            (token_position + past_tokens).float(),
            axis,
            torch.where(layout.is_cell, row, axis),
            torch.where(layout.is_cell, column, axis),
        ]
    )


def _ahead(token_positions: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """What the position of the first token of every token's document is ahead of its step, (batch, length)."""
    is_first = torch.ones_like(steps, dtype=torch.bool)
    is_first[:, 1:] = token_positions.diff(dim=1) != 1
    index = torch.arange(steps.shape[1], device=steps.device)
    return (token_positions - steps).gather(1, torch.where(is_first, index, 0).cummax(1).values)


class NextFlowRotaryEmbedding(UnroundedModule, Qwen2RotaryEmbedding):
    """Qwen2's rotary embedding with its frequencies dealt out in turn to (scale, row, column).

    Equal coordinates, as text has them, give plain RoPE for any split, so the language model is kept exactly. The
    frequencies stay float32 however the model is cast: rounded to bfloat16 they are radians off at position 8,000.
    """

    def __init__(self, config):
        super().__init__(config)
        # The config fills it in; not so in `rope_parameters` that were assigned later, to scale RoPE.
        default = default_mrope_section(2 * len(self.inv_freq))
        parameters: dict[str, Any] = dict(config.rope_parameters or {})
        self.mrope_section = list(parameters.get("mrope_section", default))
        if sum(self.mrope_section) != len(self.inv_freq):
            raise ValueError(
                f"mrope_section {self.mrope_section} sums to {sum(self.mrope_section)}, expected half the head "
                f"dimension = {len(self.inv_freq)}"
            )
        if max(self.mrope_section[1:]) * 3 > len(self.inv_freq) + 2:
            raise ValueError(f"mrope_section {self.mrope_section} cannot be interleaved: its first entry is too small")

    @staticmethod
    def compute_default_rope_parameters(config, **kwargs) -> tuple[torch.Tensor, float]:
        # Overwritten to count in integers: while DeepSpeed shards what is made, `torch.arange` rounds floats.
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        parameters: dict[str, Any] = dict(config.rope_parameters or {})
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` (3, batch, length) -> cos, sin (batch, length, head_dim) in the dtype of `x`."""
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = freqs[0].clone()
        for axis, first in ((1, 1), (2, 2)):
            own = slice(first, self.mrope_section[axis] * 3, 3)
            angles[..., own] = freqs[axis][..., own]
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)
