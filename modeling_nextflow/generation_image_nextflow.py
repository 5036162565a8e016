"""Drawing on a cache: a pass a scale, `embed_scale -> forward -> guide -> sample` (§2.2).

Reads a list of [`ScaleStep`] and rows whose `<boi>` the cache holds; knows neither prompts nor `generate`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .configuration_nextflow import NextFlowConfig
from .grids_nextflow import check_codes
from .sampling_nextflow import PerScale, ScaleStep, largest_score


ScaleCallback = Callable[[int, ScaleStep, torch.Tensor], Sequence[ScaleStep] | None]

# Tokens from which on a pass is bound by arithmetic, and no longer by starting its kernels: two such passes cost no
# more than one of both, and save the mask.
ARITHMETIC_BOUND = 1024


def check_context(config: NextFlowConfig, tokens: int, needed: int) -> None:
    """Raises `ValueError` where the model's context, with `tokens` in it, has no room for `needed` more."""
    limit = config.max_position_embeddings
    if tokens + needed > limit:
        raise ValueError(
            f"the sequence has {tokens} tokens and needs at least {needed} more, but the model's context is {limit} "
            "(`max_position_embeddings`): shorten it, ask for fewer or smaller images, or begin a new conversation"
        )


@dataclass
class PromptRows:
    """Prompts as rows of one batch, left-padded: (rows, length), with the images of all rows in reading order."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    image_codes: torch.Tensor
    image_grids: torch.Tensor


@dataclass
class SampledScale:
    """
    What is there after a scale was drawn.

    Attributes:
        index: Of the scale, from 0.
        image_codes:
            (images, codes so far), scale-major. May be replaced by others: the next scale is drawn from the codes of
            this one. What was drawn from those before it stays.
        plan:
            The steps of all scales that are drawn. Those after `index` may be replaced, to change how they are drawn,
            or removed, to stop.
    """

    index: int
    image_codes: torch.Tensor
    plan: list[ScaleStep]

    @property
    def step(self) -> ScaleStep:
        return self.plan[self.index]

    def change_guidance(self, guidance_scale: PerScale, image_guidance_scale: PerScale) -> None:
        """Sample the scales to come with other guidance: a number, or a list with an entry for each scale."""
        for index in range(self.index + 1, len(self.plan)):
            scales = [
                value[index] if isinstance(value, (list, tuple)) else value
                for value in (guidance_scale, image_guidance_scale)
            ]
            text, image = (1.0 if scale is None else scale for scale in scales)
            self.plan[index] = replace(self.plan[index], guidance_scale=text, image_guidance_scale=image)


@dataclass
class ImageRows:
    """
    Rows of one cache while images are drawn on them.

    Attributes:
        cache: What the rows hold so far, their `<boi>` included once `hidden_states` are there.
        mask: (rows, cached), 0 at padding; `None` where no row has any.
        boi_position: (rows, 1), place of `<boi>` on the first rotary axis.
        hidden_states: (rows, cells, hidden) of the last block; its scale's codes are read off them.
        drawing: Indices of the rows that have an image, `None` for all. The others get padding.
        padding: Tokens of padding before each row; `None` where the cache is not for the drawing alone.
    """

    cache: DynamicCache
    mask: torch.Tensor | None
    boi_position: torch.Tensor
    hidden_states: torch.Tensor | None = None
    drawing: torch.Tensor | None = None
    padding: list[int] | None = None

    @property
    def image_states(self) -> torch.Tensor:
        return self.hidden_states if self.drawing is None else self.hidden_states[self.drawing]

    @property
    def num_images(self) -> int:
        return len(self.boi_position if self.drawing is None else self.drawing)

    def first(self, count: int) -> "ImageRows":
        """Only the first `count` rows that draw; the cache is cut in place."""
        if self.num_images <= count:
            return self
        self.cache.batch_select_indices(torch.arange(count, device=self.boi_position.device))
        mask = None if self.mask is None else self.mask[:count]
        padding = None if self.padding is None else self.padding[:count]
        return ImageRows(self.cache, mask, self.boi_position[:count], self.hidden_states[:count], padding=padding)

    def split(self, cells: int) -> list["ImageRows"]:
        """The same rows in caches without padding, which need no mask, where blocks of `cells` are worth it."""
        if self.mask is None or self.padding is None:
            return [self]
        runs = [(padding, len(list(rows))) for padding, rows in groupby(self.padding)]
        if cells * min(count for _, count in runs) < ARITHMETIC_BOUND:
            return [self]
        parts, start = [], 0
        for padding, count in runs:
            rows = slice(start, start + count)
            data = [(layer.keys[rows, :, padding:], layer.values[rows, :, padding:]) for layer in self.cache.layers]
            parts.append(ImageRows(DynamicCache(data), None, self.boi_position[rows]))
            start += count
        return parts

    def append(self, model: PreTrainedModel, embeds: torch.Tensor, position_ids: torch.Tensor) -> None:
        """Run one block (rows that draw, cells, hidden) on top of the cache. Its cells see all that is no padding."""
        rows, cells = len(self.boi_position), embeds.shape[1]
        real = torch.ones(rows, cells, dtype=torch.long, device=embeds.device)
        if self.drawing is not None:
            embeds = embeds.new_zeros(rows, *embeds.shape[1:]).index_copy(0, self.drawing, embeds)
            real = torch.zeros_like(real).index_fill(0, self.drawing, 1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, real], dim=1)
        self.hidden_states = model.model(
            inputs_embeds=embeds,
            attention_mask=self.mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            is_causal=False,
        ).last_hidden_state


def prefill_rows(model: PreTrainedModel, rows: PromptRows) -> ImageRows:
    """Prompts that end in `<boi>`, in a cache of their own."""
    padding = (rows.attention_mask == 0).sum(1).tolist()
    mask = rows.attention_mask if any(padding) else None
    position_ids = model.model.get_position_ids(
        rows.input_ids, image_grids=rows.image_grids, attention_mask=rows.attention_mask
    )
    cache = DynamicCache(config=model.config)
    outputs = model.model(
        input_ids=rows.input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        image_codes=rows.image_codes,
        image_grids=rows.image_grids,
        past_key_values=cache,
        use_cache=True,
    )
    return ImageRows(cache, mask, position_ids[1, :, -1:], outputs.last_hidden_state[:, -1:], padding=padding)


def begin_images(model: PreTrainedModel, rows: ImageRows, image_grids: torch.Tensor) -> None:
    """Run the `<boi>` of every image (images, max_scales, 2) on top of the rows that draw it."""
    tokens = torch.full((len(image_grids), 1), model.config.boi_token_id, device=image_grids.device)
    layout = model.model.get_image_layout(tokens, image_grids)
    embeds = model.model.embed_inputs(tokens, image_grids=image_grids, layout=layout)
    rows.append(model, embeds, rows.boi_position.expand(3, -1, -1))


@torch.no_grad()
def sample_scales(
    model: PreTrainedModel,
    row_sets: list[ImageRows],
    plan: Sequence[ScaleStep],
    image_grids: torch.Tensor,
    generators: Sequence[torch.Generator | None],
    prefix: Sequence[tuple[torch.Tensor, torch.Tensor | None]] = (),
) -> Iterator[SampledScale]:
    """
    Draw images that share one schedule, `image_grids` (images, max_scales, 2), scale by scale.

    `row_sets` hold the rows that draw, one an image in order, then those of the same prompts without their text and
    those without text and source images, if any: in the same cache or in another. `prefix` has codes (images, cells)
    of the first scales, and which of them are taken as they are (`None`: all, and no number is drawn for them).

    Raises:
        `ValueError`: on logits that are not finite. On a CPU at their scale, elsewhere before the last one is yielded:
        looking at them earlier would make the host wait at every scale.
    """
    batch = len(image_grids)
    grids = schedule_of(image_grids[0])
    plan = list(plan)
    codes = image_grids.new_zeros(batch, 0)
    unchecked = {}
    for index in range(len(grids)):
        step = plan[index]
        states = [rows.image_states for rows in row_sets]
        given, is_given = prefix[index] if index < len(prefix) else (None, None)
        if given is not None and is_given is None:
            sampled = given
        else:
            logits = model.guided_logits(states, step, batch)
            unchecked[index] = largest_score(logits, step)
            sampled = model.sample_scale(logits, step, generators, given, is_given)
        codes = torch.cat([codes, sampled], dim=1)
        if _is_synchronous(codes.device) or index + 1 == len(plan):
            _check_finite(unchecked, plan)
        scale = SampledScale(index, codes, plan)
        yield scale
        if scale.image_codes is not codes:
            codes = _replaced(codes, scale.image_codes.to(codes.device), model.config.codebook_size)
        if index + 1 == len(plan):
            _check_finite(unchecked, plan)  # where the plan was cut short
            return
        needed = batch * max(later.num_conditions for later in plan[index + 1 :])
        embeds = model.embed_next_scale(codes, image_grids, grids)
        row_sets = [part for rows in first_rows(row_sets, needed) for part in rows.split(embeds.shape[1])]
        image_of_row = torch.arange(needed, device=codes.device) % batch
        for rows, images in zip(row_sets, image_of_row.split([rows.num_images for rows in row_sets])):
            position_ids = model.get_block_position_ids(rows.boi_position + index + 1, grids[index + 1])
            rows.append(model, embeds[images], position_ids)


def first_rows(row_sets: list[ImageRows], count: int) -> list[ImageRows]:
    """Those of `row_sets` that hold the first `count` rows that draw."""
    kept = []
    for rows in row_sets:
        if count > 0:
            kept.append(rows.first(count))
            count -= kept[-1].num_images
    return kept


def _is_synchronous(device: torch.device) -> bool:
    """Whether a look at a tensor's values costs nothing: an accelerator would have to finish its work first."""
    return device.type == "cpu"


def _check_finite(scores: dict[int, torch.Tensor], plan: Sequence[ScaleStep]) -> None:
    """Raise where the largest score of a scale is not finite; empties `scores`."""
    found = torch.stack(list(scores.values())).isfinite().tolist() if scores else []
    for (index, _), is_finite in zip(scores.items(), found, strict=True):
        if not is_finite:
            step = plan[index]
            raise ValueError(
                f"the logits of scale {index + 1} ({step.grid[0]}x{step.grid[1]}) are not finite with guidance_scale "
                f"{step.guidance_scale:g} and temperature {step.temperature:g}: expected a lower guidance, a higher "
                "temperature, or weights without NaN"
            )
    scores.clear()


def _replaced(codes: torch.Tensor, others: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """`others` in the place of `codes`."""
    if others.shape != codes.shape:
        raise ValueError(f"image_codes were replaced by {tuple(others.shape)}, expected {tuple(codes.shape)}")
    return check_codes(others, codebook_size)


def sample_images(*args, **kwargs) -> torch.Tensor:
    """Codes (images, codes) of whole images; arguments as [`sample_scales`]."""
    for scale in sample_scales(*args, **kwargs):
        codes = scale.image_codes
    return codes


def schedule_of(image_grids: torch.Tensor) -> list[tuple[int, int]]:
    """A row (max_scales, 2) of `image_grids` as a list, without the zero rows past its last scale."""
    return [(height, width) for height, width in image_grids.tolist() if height > 0]


def split_prefix(
    codes: torch.Tensor | None,
    mask: torch.Tensor | None,
    grids: Sequence[tuple[int, int]],
    batch: int,
    codebook_size: int,
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Codes (batch, codes) of the first scales, and which are taken as they are, scale by scale."""
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


def target_schedule(image_grids: torch.Tensor) -> torch.Tensor:
    """The row (max_scales, 2) for an image to draw like a given one, whose last grid may stand there twice to show the
    codes of its last scale."""
    grids = schedule_of(image_grids)
    if grids[-1:] == grids[-2:-1]:
        image_grids = image_grids.clone()
        image_grids[len(grids) - 1] = 0
    return image_grids


def repeat_rows(rows: PromptRows, batch: int) -> PromptRows:
    """One unconditional prompt for all rows, or one each."""
    if len(rows.input_ids) == batch:
        return rows
    if len(rows.input_ids) != 1:
        raise ValueError(f"got {len(rows.input_ids)} unconditional prompts, expected 1 or {batch}")
    return PromptRows(
        rows.input_ids.expand(batch, -1),
        rows.attention_mask.expand(batch, -1),
        rows.image_codes.repeat(batch),
        rows.image_grids.repeat(batch, 1, 1),
    )


def stack_rows(parts: Sequence[PromptRows], *, pad_token_id: int) -> PromptRows:
    """The rows of all parts, one part after the other, left-padded to one length."""
    missing = [max(rows.input_ids.shape[1] for rows in parts) - rows.input_ids.shape[1] for rows in parts]
    return PromptRows(
        torch.cat([F.pad(rows.input_ids, (more, 0), value=pad_token_id) for rows, more in zip(parts, missing)]),
        torch.cat([F.pad(rows.attention_mask, (more, 0)) for rows, more in zip(parts, missing)]),
        torch.cat([rows.image_codes for rows in parts]),
        torch.cat([rows.image_grids for rows in parts]),
    )


def split_images(
    input_ids: torch.Tensor,
    image_codes: torch.Tensor | None,
    image_grids: torch.Tensor,
    *,
    boi_token_id: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Codes and grids row by row. A `<boi>` that ends its row has grids, but no codes yet."""
    is_boi = input_ids == boi_token_id
    counts = is_boi.sum(1).tolist()
    if sum(counts) != len(image_grids):
        raise ValueError(f"input_ids hold {sum(counts)} <boi> tokens, image_grids has {len(image_grids)} rows")
    grids = list(image_grids.split(counts))
    sizes = [int(row[: count - int(opens)].prod(-1).sum()) for row, count, opens in zip(grids, counts, is_boi[:, -1])]
    codes = input_ids.new_zeros(0) if image_codes is None else image_codes
    if len(codes) != sum(sizes):
        raise ValueError(f"the images in input_ids need {sum(sizes)} codes, got image_codes of length {len(codes)}")
    return list(codes.split(sizes)), grids


__all__ = [
    "ScaleCallback",
    "ImageRows",
    "SampledScale",
    "PromptRows",
    "begin_images",
    "sample_images",
    "sample_scales",
    "prefill_rows",
    "repeat_rows",
    "schedule_of",
    "split_images",
    "split_prefix",
    "stack_rows",
]
