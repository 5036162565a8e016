"""Images in a sequence, as numbers: their scale schedules, their layout among the tokens, and positions (§2.2).

`image_grids` (n_images, max_scales, 2) is zero past an image's last scale; which grids there are is the processor's.
Its layout is read here: `<boi>`, one placeholder for every cell of scales 2..K, `<eoi>`. Pure functions of tokens,
grids and the configuration's numbers; nothing here knows weights or pixels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .configuration_nextflow import NextFlowConfig


Schedule = tuple[tuple[int, int], ...]  # (height, width) of every scale, coarse to fine


def schedules_from_grids(image_grids: torch.Tensor) -> list[Schedule]:
    """Scale schedules, one tuple of (height, width) an image, from `image_grids` (n, max_scales, 2), zero-padded."""
    check_shape(image_grids)
    schedules = []
    # One copy to the host. Tuples can be compared, and are keys of groups.
    for index, rows in enumerate(image_grids.tolist()):
        grids = tuple((height, width) for height, width in rows if height or width)
        if not grids or min(min(grid) for grid in grids) < 1 or any(any(row) for row in rows[len(grids) :]):
            raise ValueError(f"image_grids[{index}] is {rows}, expected positive grids and then zero rows only")
        schedules.append(grids)
    return schedules


def check_shape(image_grids: torch.Tensor) -> None:
    """Check shape and dtype alone: reading values would make the host wait for the device."""
    if image_grids.ndim != 3 or image_grids.shape[-1] != 2:
        raise ValueError(f"image_grids has shape {tuple(image_grids.shape)}, expected (n_images, max_scales, 2)")
    if image_grids.is_floating_point():
        raise ValueError(f"image_grids is {image_grids.dtype}, expected integers")


def check_image_count(is_boi: torch.Tensor, image_grids: torch.Tensor) -> None:
    """Raise `ValueError` where there are not as many rows of `image_grids` as `<boi>` tokens."""
    if int(is_boi.sum()) != len(image_grids):
        raise ValueError(f"input_ids hold {int(is_boi.sum())} <boi> tokens, image_grids has {len(image_grids)} rows")


def shared_schedule(input_ids: torch.Tensor, image_grids: torch.Tensor, boi: int) -> tuple[Schedule, torch.Tensor]:
    """The schedule that the images of all rows share, as numbers and as (batch, max_scales, 2)."""
    is_boi = input_ids == boi
    if not is_boi[:, -1].all():
        raise ValueError("every row of input_ids must end in <boi> to sample an image (pad on the left)")
    check_image_count(is_boi, image_grids)
    # The last image of each row, of images that lie flat over the batch.
    target_grids = image_grids[is_boi.sum(1).cumsum(0) - 1]
    if not (target_grids == target_grids[:1]).all():
        raise ValueError("the images of one batch must share one schedule: sample other sizes in another call")
    return schedules_from_grids(target_grids[:1])[0], target_grids


def count_codes(schedule: Schedule) -> int:
    """Codes of an image: the cells of all its scales."""
    return sum(height * width for height, width in schedule)


def group_by_schedule(schedules: Iterable[Schedule]) -> dict[Schedule, list[int]]:
    """Indices of the images of each schedule, which are processed as one stack."""
    groups: dict[Schedule, list[int]] = {}
    for index, schedule in enumerate(schedules):
        groups.setdefault(schedule, []).append(index)
    return groups


def check_codes(codes: torch.Tensor, codebook_size: int, name: str = "image_codes") -> torch.Tensor:
    """`codes`; raises `ValueError` where one is outside the codebook. Reads the values, so the host waits."""
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise ValueError(f"{name} are {codes.dtype}, expected integers")
    # An index out of range would abort a CUDA process, or read another row of the joint vocabulary.
    low, high = (int(bound) for bound in codes.aminmax()) if codes.numel() else (0, 0)
    if low < 0 or high >= codebook_size:
        raise ValueError(f"{name} must lie in [0, {codebook_size}), got {low} to {high}")
    return codes


# ---- layout and positions


@dataclass
class ImageLayout:
    """Per-token description of the images in `input_ids`; every tensor is (batch, length).

    Attributes:
        image_index: row of `image_grids` of the image a token belongs to (the last `<boi>` at or before it).
        scale: the scale that the token's output predicts: 1 at `<boi>`, 2..K at cells, 0 elsewhere.
        row, column: place of a cell in its grid; 0 elsewhere.
        block_ids: one id for all cells of one scale of one image, increasing along the row; -1 for every other token.
        is_cell: whether a token is one of them.
    """

    image_index: torch.Tensor
    scale: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    block_ids: torch.Tensor
    is_cell: torch.Tensor

    @property
    def is_slot(self) -> torch.Tensor:
        """Tokens whose output predicts an image code."""
        return self.scale > 0


def get_image_layout(config: NextFlowConfig, input_ids: torch.Tensor, image_grids: torch.Tensor) -> ImageLayout | None:
    """Read the image layout off `input_ids` (batch, length) and `image_grids` (n_images, max_scales, 2), if any.

    Vectorised and free of device synchronisation; that the two fit is checked where codes are embedded.
    """
    if len(image_grids) == 0:
        return None
    check_shape(image_grids)
    is_boi = input_ids == config.boi_token_id
    is_cell = input_ids == config.image_token_id
    image_index = is_boi.flatten().cumsum(0).view_as(input_ids) - 1
    grids = image_grids[image_index.clamp(min=0, max=len(image_grids) - 1)]  # (batch, length, max_scales, 2)
    # An image of one scale has no block; the gathers below still want one to choose.
    if grids.shape[2] == 1:
        grids = F.pad(grids, (0, 0, 0, 1))

    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    # The nearest `<boi>` at or before each token.
    boi_position = torch.where(is_boi, positions, -1).cummax(dim=1).values
    offset = positions - boi_position - 1  # of a cell among the cells of its image
    block_end = grids[:, :, 1:].prod(-1).cumsum(-1)  # cells up to and with scale k: (batch, length, max_scales - 1)
    block = (offset[..., None] >= block_end).sum(-1).clamp(max=block_end.shape[-1] - 1)  # 0 is scale 2

    # (batch, length, 2), the grid of the block that a token falls into
    height_width = grids[:, :, 1:].gather(2, block[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    block_start = block_end.gather(2, block[..., None])[..., 0] - height_width.prod(-1)
    cell = offset - block_start
    width = height_width[..., 1].clamp(min=1)  # tokens of no image may gather a zero row

    zero = torch.zeros_like(input_ids)
    # Counted at the first cell of each block, so ids also differ between the images of a row.
    block_ids = torch.where(is_cell, (is_cell & (cell == 0)).long().cumsum(1), zero) - 1
    return ImageLayout(
        image_index=image_index,
        scale=torch.where(is_cell, block + 2, is_boi.long()),
        row=torch.where(is_cell, cell // width, zero),
        column=torch.where(is_cell, cell % width, zero),
        block_ids=block_ids,
        is_cell=block_ids >= 0,
    )


def present_scales(
    config: NextFlowConfig,
    input_ids: torch.Tensor,
    image_codes: torch.Tensor,
    schedules: Sequence[Schedule],
    layout: ImageLayout,
) -> list[tuple[Schedule, int]]:
    """Per image: the grids of the scales that are present in `input_ids`, and how many codes it brings.

    A closed image (its `<eoi>` is there) has all its scales and the codes of all; an open one, still being
    sampled, the scales up to its last block and the codes that are inputs: those of the scales before.
    """
    num_images = int((layout.scale == 1).sum())
    if num_images != len(schedules):
        raise ValueError(f"input_ids hold {num_images} <boi> tokens, but image_grids has {len(schedules)} rows")
    is_first = layout.is_cell & ~F.pad(layout.scale[:, :-1] > 0, (1, 0))
    if is_first.any():
        raise ValueError(
            f"input_ids hold {int(is_first.sum())} image placeholder tokens that follow neither <boi> nor another "
            "placeholder: the cells of an image stand together, right after its <boi>"
        )
    cells = torch.bincount(layout.image_index[layout.is_cell], minlength=num_images).tolist()
    after_eoi = layout.image_index[input_ids == config.eoi_token_id]
    closed = torch.bincount(after_eoi.clamp(min=0), minlength=num_images).tolist()
    images = []
    for index, grids in enumerate(schedules):
        if grids[0] != (1, 1):
            raise ValueError(f"the schedule of image {index} must start with the grid (1, 1), got {grids[0]}")
        if len(grids) > config.max_scales:
            raise ValueError(
                f"image {index} has {len(grids)} scales, expected at most config.max_scales = "
                f"{config.max_scales}; an image whose last grid stands there twice has one more"
            )
        present, count = 1, 0  # scale 1 has no cell, `<boi>` predicts it
        while present < len(grids) and count < cells[index]:
            count += grids[present][0] * grids[present][1]
            present += 1
        whole = count_codes(grids[1:])
        if count != cells[index] or (closed[index] and count != whole):
            raise ValueError(
                f"image {index} has {cells[index]} placeholder tokens, which do not fill its scales: its grids "
                f"{list(grids)} need {whole}"
            )
        last = grids[present - 1][0] * grids[present - 1][1]  # codes that an open image has yet to sample
        images.append((grids[:present], 1 + count if closed[index] else 1 + count - last))
    expected = sum(count for _, count in images)
    if len(image_codes) != expected:
        raise ValueError(
            f"the images in input_ids need {expected} codes, got image_codes of length {len(image_codes)}"
        )
    check_codes(image_codes, config.codebook_size)
    return images


def cell_coordinates(
    row: torch.Tensor, column: torch.Tensor, height: torch.Tensor, width: torch.Tensor, *, extent: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 1: centre of a cell in a frame of constant area `extent ** 2`, whatever the grid."""
    # Both axes by the area, not each by its own side: a cell is as high as wide at any aspect ratio.
    unit = extent / (height * width).float().clamp(min=1).sqrt()
    return unit * (row + 0.5), unit * (column + 0.5)


def get_position_ids(
    config: NextFlowConfig,
    input_ids: torch.Tensor,
    image_grids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    token_positions: torch.Tensor | None = None,
    layout: ImageLayout | None = None,
    *,
    past_tokens: torch.Tensor | int = 0,
    past_steps: torch.Tensor | int = 0,
) -> torch.Tensor:
    """Positions (4, batch, length), float32: the plain token position, then the rotary axes (scale, row, column).

    Text at position t is (t, t, t). A whole block of cells takes ONE step of the first axis, counted on from its
    `<boi>`, so an image of K scales takes K + 1 steps in all; rows and columns follow [`cell_coordinates`] and do not
    depend on t. Padding (`attention_mask == 0`) takes no step.

    Args:
        token_positions: plain positions (batch, length) of packed documents, instead of a mask: a document begins
            wherever they do not go up by one, and its rotary axes start from its first position.
        layout: what [`get_image_layout`] gives for the same arguments, if it has been called.
        past_tokens, past_steps: how far the sequence has come before `input_ids`, on the plain position and on the
            rotary text axis; one for all rows or (batch, 1).
    """
    is_packed = token_positions is not None
    real = torch.ones_like(input_ids) if attention_mask is None or is_packed else attention_mask.long()
    token_position = token_positions.long() if is_packed else (real.cumsum(1) - 1).clamp(min=0)
    if layout is None and image_grids is not None:
        layout = get_image_layout(config, input_ids, image_grids)
    if layout is None or image_grids is None:
        step_position = token_position + past_steps
        return torch.stack([token_position + past_tokens, *[step_position] * 3]).float()

    first_of_block = layout.is_cell & (layout.row == 0) & (layout.column == 0)  # a block takes its one step here
    steps = torch.where(layout.is_cell, first_of_block.long(), real).cumsum(1)
    axis = steps + _ahead(token_position, steps) if is_packed else (steps - 1).clamp(min=0)
    axis = (axis + past_steps).float()

    index = layout.image_index.clamp(min=0)  # -1 before the first image, where no grid is used
    grid = image_grids[index, (layout.scale - 1).clamp(min=0)]  # (batch, length, 2)
    height, width = grid.unbind(-1)
    row, column = cell_coordinates(layout.row, layout.column, height, width, extent=config.spatial_rope_extent)
    return torch.stack(
        [
            (token_position + past_tokens).float(),
            axis,
            torch.where(layout.is_cell, row, axis),
            torch.where(layout.is_cell, column, axis),
        ]
    )


def _ahead(token_positions: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Position less steps at the first token of each token's document, (batch, length)."""
    is_first = torch.ones_like(steps, dtype=torch.bool)
    is_first[:, 1:] = token_positions.diff(dim=1) != 1
    # Documents are found by a break in the positions, so the last break holds until the next.
    index = torch.arange(steps.shape[1], device=steps.device)
    return (token_positions - steps).gather(1, torch.where(is_first, index, 0).cummax(1).values)
