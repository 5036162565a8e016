"""The images in the prompts of `generate`: codes and grids row by row, and the sizes of images to sample.

Knows tokens, codes and grids; no weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from .configuration_nextflow import NextFlowConfig
from .grids_nextflow import check_image_count


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
            "nothing says how large an image to sample is: pass target_grids, or set image_target_grids in the "
            "generation config"
        )
    return torch.stack([row for row in rows if row is not None])


def _without_repeat(image_grids: torch.Tensor) -> torch.Tensor:
    """A schedule (max_scales, 2) without the repeat of its last grid, which shows the codes of the last scale."""
    count = int((image_grids[:, 0] > 0).sum())
    if count > 1 and torch.equal(image_grids[count - 1], image_grids[count - 2]):
        image_grids = image_grids.clone()
        image_grids[count - 1] = 0
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
        # Images lie flat over the batch, so each target goes behind the images of its own row.
        both = [grids for row, own in zip(by_row, target_grids) for grids in (row, own[None])]
        appended[names[3]] = torch.cat(both)
    return {**prompts, **appended}
