"""The prompts of images: rows that end in `<boi>`, those without text or images beside them, and the images' sizes.

Knows tokens, codes and grids; no weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from .configuration_nextflow import NextFlowConfig
from .grids_nextflow import check_codes


@dataclass
class PromptRows:
    """Prompts as rows of one batch, left-padded: (rows, length), with the images of all rows in reading order."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    image_codes: torch.Tensor
    image_grids: torch.Tensor

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_codes: torch.Tensor | None,
        image_grids: torch.Tensor,
    ) -> "PromptRows":
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not mask[:, -1].all():
            raise ValueError("prompts must be padded on the left: the last token of a row is padding")
        codes = input_ids.new_zeros(0) if image_codes is None else image_codes
        return cls(input_ids, mask.long(), codes, image_grids)


def negative_rows(
    rows: PromptRows,
    boi: int,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    image_codes: torch.Tensor | None,
    image_grids: torch.Tensor | None,
    *,
    missing: str = "guidance_scale is not 1, which needs negative_input_ids: the unconditional prompt",
) -> PromptRows:
    """The unconditional prompts of `rows`, one for all or one each, ending in `<boi>` as they do. Without images of
    their own they have those of `rows`, if they hold as many. Raises `ValueError` where they are `missing`."""
    if input_ids is None:
        raise ValueError(missing)
    counts, expected = ((ids == boi).sum(1) for ids in (input_ids, rows.input_ids))
    if image_grids is None and torch.equal(counts, expected):  # the same images
        image_codes = rows.image_codes if image_codes is None else image_codes
        image_grids = rows.image_grids
    elif image_grids is None:  # only the one to sample
        image_grids = rows.image_grids[expected.cumsum(0) - 1][: len(input_ids)]
    negative, batch = PromptRows.of(input_ids, attention_mask, image_codes, image_grids), len(rows.input_ids)
    if len(input_ids) == batch:
        return negative
    if len(input_ids) != 1:
        raise ValueError(f"got {len(input_ids)} unconditional prompts, expected 1 or {batch}")
    return PromptRows(
        negative.input_ids.expand(batch, -1),
        negative.attention_mask.expand(batch, -1),
        negative.image_codes.repeat(batch),
        negative.image_grids.repeat(batch, 1, 1),
    )


def stack_rows(parts: Sequence[PromptRows], *, pad_token_id: int, multiple: int = 1) -> PromptRows:
    """The rows of all parts, one part after the other, left-padded to one length, a `multiple` of this."""
    lengths = [rows.input_ids.shape[1] for rows in parts]
    missing = [math.ceil(max(lengths) / multiple) * multiple - length for length in lengths]
    return PromptRows(
        torch.cat([F.pad(rows.input_ids, (more, 0), value=pad_token_id) for rows, more in zip(parts, missing)]),
        torch.cat([F.pad(rows.attention_mask, (more, 0)) for rows, more in zip(parts, missing)]),
        torch.cat([rows.image_codes for rows in parts]),
        torch.cat([rows.image_grids for rows in parts]),
    )


def split_images(
    input_ids: torch.Tensor, image_codes: torch.Tensor | None, image_grids: torch.Tensor, *, boi_token_id: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Codes and grids row by row. A `<boi>` that ends its row has grids, but no codes yet."""
    is_boi = input_ids == boi_token_id
    check_image_count(is_boi, image_grids)
    grids = list(image_grids.split(is_boi.sum(1).tolist()))
    sizes = [int(row[: len(row) - int(opens)].prod(-1).sum()) for row, opens in zip(grids, is_boi[:, -1])]
    codes = input_ids.new_zeros(0) if image_codes is None else image_codes
    if len(codes) != sum(sizes):
        raise ValueError(f"the images in input_ids need {sum(sizes)} codes, got image_codes of length {len(codes)}")
    return list(codes.split(sizes)), grids


def check_image_count(is_boi: torch.Tensor, image_grids: torch.Tensor) -> None:
    if int(is_boi.sum()) != len(image_grids):
        raise ValueError(f"input_ids hold {int(is_boi.sum())} <boi> tokens, image_grids has {len(image_grids)} rows")


# ---- images to sample


def schedule_of(image_grids: torch.Tensor) -> list[tuple[int, int]]:
    """A row (max_scales, 2) of `image_grids` as a list, without the zero rows past its last scale."""
    return [(height, width) for height, width in image_grids.tolist() if height > 0]


def shared_schedule(
    input_ids: torch.Tensor, image_grids: torch.Tensor, boi: int
) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """The schedule that the images of all rows share, as a list and as (batch, max_scales, 2)."""
    is_boi = input_ids == boi
    if not is_boi[:, -1].all():
        raise ValueError("every row of input_ids must end in <boi> to sample an image (pad on the left)")
    check_image_count(is_boi, image_grids)
    target_grids = image_grids[is_boi.sum(1).cumsum(0) - 1]
    if not (target_grids == target_grids[:1]).all():
        raise ValueError("the images of one batch must share one schedule: sample other sizes in another call")
    return schedule_of(target_grids[0]), target_grids


def find_target_grids(
    config: NextFlowConfig,
    generation_config: GenerationConfig,
    input_ids: torch.Tensor,
    image_codes: torch.Tensor | None,
    image_grids: torch.Tensor | None,
    target_grids: torch.Tensor | None,
) -> torch.Tensor:
    """Schedules (batch, max_scales, 2) of the images to sample: as given, as the row's last image, as configured."""
    batch = len(input_ids)
    if target_grids is not None:
        if len(target_grids) not in (1, batch):
            raise ValueError(f"target_grids has {len(target_grids)} rows, expected 1 or {batch}")
        return target_grids.expand(batch, -1, -1)
    default = getattr(generation_config, "image_target_grids", None)
    if default is not None:
        default = torch.tensor(default, device=input_ids.device)
        default = F.pad(default, (0, 0, 0, config.max_scales - len(default)))
    by_row: list[Any] = [()] * batch
    if image_grids is not None:
        _, by_row = split_images(input_ids, image_codes, image_grids, boi_token_id=config.boi_token_id)
    rows = [_without_repeat(row[-1]) if len(row) else default for row in by_row]
    if any(row is None for row in rows):
        raise ValueError(
            "nothing says how large an image to draw is: pass target_grids, or set image_target_grids in the "
            "generation config"
        )
    return torch.stack([row for row in rows if row is not None])


def _without_repeat(image_grids: torch.Tensor) -> torch.Tensor:
    """A schedule (max_scales, 2) whose last grid may stand there twice, to show the codes of its last scale, once."""
    grids = schedule_of(image_grids)
    if grids[-1:] == grids[-2:-1]:
        image_grids = image_grids.clone()
        image_grids[len(grids) - 1] = 0
    return image_grids


def append_boi(prompts: dict[str, Any], target_grids: torch.Tensor, boi: int, prefix: str = "") -> dict[str, Any]:
    """Prompts with a `<boi>` at their end and, where they have images, its grids behind those of the row."""
    names = [f"{prefix}{name}" for name in ("input_ids", "attention_mask", "image_codes", "image_grids")]
    input_ids, attention_mask, image_codes, image_grids = (prompts.get(name) for name in names)
    if input_ids is None:
        return prompts
    appended = {names[0]: F.pad(input_ids, (0, 1), value=boi)}
    if attention_mask is not None:
        appended[names[1]] = F.pad(attention_mask, (0, 1), value=1)
    if image_grids is not None:
        _, by_row = split_images(input_ids, image_codes, image_grids, boi_token_id=boi)
        both = [grids for row, own in zip(by_row, target_grids) for grids in (row, own[None])]
        appended[names[3]] = torch.cat(both)
    return {**prompts, **appended}


def split_prefix(
    codes: torch.Tensor | None,
    mask: torch.Tensor | None,
    grids: Sequence[tuple[int, int]],
    batch: int,
    codebook_size: int,
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Codes (batch, codes) of the first scales, and which are taken as they are, scale by scale."""
    if codes is None and mask is None:
        return []
    if codes is None:
        raise ValueError("prefix_mask is given without prefix_codes, expected both or prefix_codes alone")
    ends = torch.tensor([height * width for height, width in grids]).cumsum(0).tolist()
    if codes.ndim != 2 or len(codes) != batch or codes.shape[1] not in ends:
        raise ValueError(f"prefix_codes are {tuple(codes.shape)}, expected {batch} rows of one of {ends} codes")
    if mask is not None and (mask.shape != codes.shape or mask.dtype != torch.bool):
        raise ValueError(f"prefix_mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool {tuple(codes.shape)}")
    check_codes(codes if mask is None else codes[mask], codebook_size, "prefix_codes")
    ends = ends[: ends.index(codes.shape[1])]
    scales = codes.tensor_split(ends, dim=1)
    if mask is None:
        return [(scale, None) for scale in scales]
    masks = [None if part.all() else part for part in mask.tensor_split(ends, dim=1)]
    return list(zip(scales, masks))


__all__ = [
    "PromptRows",
    "append_boi",
    "check_image_count",
    "find_target_grids",
    "negative_rows",
    "schedule_of",
    "shared_schedule",
    "split_images",
    "split_prefix",
    "stack_rows",
]
