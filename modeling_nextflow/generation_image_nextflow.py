"""Drawing on a cache: a pass a scale, `embed_scale -> forward -> guide -> sample` (§2.2).

Reads a list of [`ScaleStep`] and rows whose `<boi>` the cache holds; knows neither prompts nor `generate`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .attention_nextflow import RowRuns
from .cache_nextflow import part_of, reserve
from .configuration_nextflow import NextFlowConfig
from .graphs_nextflow import Workspace
from .grids_nextflow import check_codes
from .sampling_nextflow import PerScale, ScaleStep, largest_score, random_numbers


ScaleCallback = Callable[[int, ScaleStep, torch.Tensor], Sequence[ScaleStep] | None]

# Block size from which on a pass is compute-bound: splitting the batch then costs nothing and avoids a mask.
ARITHMETIC_BOUND = 1024
# Runs of rows that attend one after the other, without a mask: each costs an operator more a layer.
MAX_RUNS = 8


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
class ScaleInput:
    """
    What is known of a scale before the first is sampled.

    Attributes:
        generators: One an image.
        given: Codes (images, cells) that are taken as they are; `None` where there are none.
        is_given: (images, cells), which of them are; `None` for all.
        numbers: The randomness (images, cells, 1) of the others, see [`pick`]; `None` until it is drawn.
    """

    generators: Sequence[torch.Generator | None]
    given: torch.Tensor | None = None
    is_given: torch.Tensor | None = None
    numbers: torch.Tensor | None = None

    def draw(self, step: ScaleStep, device: torch.device) -> None:
        """Draw `numbers` where they are needed: none for the best code, nor for a row that has all codes."""
        rows = list(range(len(self.generators)))
        if self.given is not None:
            rows = [] if self.is_given is None else (~self.is_given.all(dim=1)).nonzero()[:, 0].tolist()
        if self.numbers is None and step.temperature and rows:
            cells = math.prod(step.grid)
            numbers = random_numbers([self.generators[row] for row in rows], len(rows), cells, device)
            self.numbers = numbers
            if len(rows) < len(self.generators):
                self.numbers = numbers.new_zeros(len(self.generators), cells, 1)
                self.numbers[rows] = numbers


def prepare_scales(
    plan: Sequence[ScaleStep],
    generators: Sequence[torch.Generator | None],
    prefix: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    device: torch.device,
) -> list[ScaleInput]:
    """The inputs of all scales. `prefix` has codes (images, cells) of the first, and which of them are taken."""
    inputs = [ScaleInput(generators, *given) for given in [*prefix, *[()] * len(plan)][: len(plan)]]
    for own, step in zip(inputs, plan):
        own.draw(step, device)
    return inputs


@dataclass
class ImageRows:
    """
    Rows of one cache while images are sampled on them.

    Attributes:
        cache: What the rows hold so far, their `<boi>` included once `hidden_states` are there.
        mask: (rows, cached), 0 at padding; `None` where no row has any.
        boi_position: (rows, 1), place of `<boi>` on the first rotary axis.
        hidden_states: (rows, cells, hidden) of the last block; its scale's codes are read off them.
        sampling: Indices of the rows that have an image, `None` for all. The others get padding.
        padding: Tokens of padding before each row; `None` where other tokens follow in the cache.
        embeddings: Cosine and sine (rows, cells, head_dim) of the blocks to come.
        workspace: Whose memory the cache is, where passes are recorded.
    """

    cache: DynamicCache
    mask: torch.Tensor | None
    boi_position: torch.Tensor
    hidden_states: torch.Tensor | None = None
    sampling: torch.Tensor | None = None
    padding: list[int] | None = None
    embeddings: tuple[torch.Tensor, torch.Tensor] | None = None
    workspace: Workspace | None = None

    @property
    def image_states(self) -> torch.Tensor:
        return self.hidden_states if self.sampling is None else self.hidden_states[self.sampling]

    @property
    def num_images(self) -> int:
        return len(self.boi_position if self.sampling is None else self.sampling)

    def prepare(self, model: PreTrainedModel, grids: Sequence[tuple[int, int]]) -> None:
        """Room for the keys and values of blocks of `grids`, and the rotary embeddings of their cells."""
        if grids:
            reserve(self.cache, sum(map(math.prod, grids)))
            positions = model.get_block_positions(self.boi_position + 1, grids)
            self.embeddings = model.model.get_position_embeddings(self.hidden_states, positions)

    def part(self, rows: slice, padding: int = 0) -> "ImageRows":
        """Some of the rows, without their first `padding` tokens, in the same memory."""
        return ImageRows(
            part_of(self.cache, rows, padding),
            None if self.mask is None or padding else self.mask[rows],
            self.boi_position[rows],
            self.hidden_states[rows],
            padding=None if self.padding is None else [count - padding for count in self.padding[rows]],
            embeddings=tuple(part[rows] for part in self.embeddings),
            workspace=self.workspace,
        )

    def runs(self) -> list[tuple[int, int, int]]:
        """Neighbours with as much padding: (first row, end, padding)."""
        runs, start = [], 0
        for padding, rows in groupby(self.padding):
            end = start + len(list(rows))
            runs.append((start, end, padding))
            start = end
        return runs

    def mask_with(self, cells: int) -> torch.Tensor:
        """(rows, cached + cells), 0 at padding, where another block of `cells` follows."""
        return F.pad(self.mask, (0, self.cache.get_seq_length() + cells - self.mask.shape[1]), value=1)

    def attends_by_runs(self, model: PreTrainedModel) -> bool:
        """Whether the layers attend without a mask: fused ones can, where there are not many runs."""
        return model.is_fused and self.padding is not None and len(self.runs()) <= MAX_RUNS

    def split(self, cells: int) -> list["ImageRows"]:
        """The same rows by runs, which need no mask, where blocks of `cells` are worth a pass of each."""
        if self.mask is None or self.padding is None:
            return [self]
        runs = self.runs()
        if cells * min(end - start for start, end, _ in runs) < ARITHMETIC_BOUND:
            return [self]
        return [replace(self.part(slice(start, end), padding), mask=None) for start, end, padding in runs]

    def append(
        self, model: PreTrainedModel, embeds: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Run one block (rows with an image, cells, hidden) on top of the cache. Its cells see all but padding."""
        mask = None
        if self.mask is not None and self.attends_by_runs(model):
            mask = {"full_attention": RowRuns(tuple(self.runs()))}
        elif self.mask is not None:
            mask = self.mask = self.mask_with(embeds.shape[1])
            if self.sampling is not None:
                embeds = embeds.new_zeros(len(mask), *embeds.shape[1:]).index_copy(0, self.sampling, embeds)
                is_real = torch.zeros_like(mask[:, :1]).index_fill(0, self.sampling, 1)
                mask[:, -embeds.shape[1] :] *= is_real
        self.hidden_states = model.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_embeddings=embeddings,
            past_key_values=self.cache,
            use_cache=True,
            is_causal=False,
        ).last_hidden_state

    def append_scale(self, model: PreTrainedModel, embeds: torch.Tensor) -> None:
        """[`ImageRows.append`] of the next block that was prepared for."""
        cells = embeds.shape[1]
        embeddings = tuple(part[:, :cells] for part in self.embeddings)
        self.embeddings = tuple(part[:, cells:] for part in self.embeddings)
        if self.workspace is None or cells > model.graphs.max_cells:
            return self.append(model, embeds, embeddings)

        def run(embeds: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return model.model(
                inputs_embeds=embeds,
                attention_mask={"full_attention": mask},
                position_embeddings=(cos, sin),
                past_key_values=self.cache,
                use_cache=True,
                is_causal=False,
            ).last_hidden_state

        mask = self.mask_with(cells)[:, None, None].bool()
        self.hidden_states = model.graphs.run(self.workspace, self.cache, run, embeds, *embeddings, mask)


def prefill_rows(model: PreTrainedModel, rows: PromptRows, cells: int) -> ImageRows:
    """Prompts that end in `<boi>`, in a cache of their own with room for `cells` of each image."""
    length = rows.input_ids.shape[1] + cells
    workspace = None

    def make_cache() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        reserve(cache, length)
        return cache

    if model.graphs is not None and model.is_fused and model.config._attn_implementation == "sdpa":
        workspace = model.graphs.take((len(rows.input_ids), length), make_cache)
    cache = make_cache() if workspace is None else workspace.cache
    padding = (rows.attention_mask == 0).sum(1).tolist()
    mask = rows.attention_mask if any(padding) or workspace is not None else None
    position_ids = model.model.get_position_ids(
        rows.input_ids, image_grids=rows.image_grids, attention_mask=rows.attention_mask
    )
    states = model.model(
        input_ids=rows.input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        image_codes=rows.image_codes,
        image_grids=rows.image_grids,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return ImageRows(cache, mask, position_ids[1, :, -1:], states[:, -1:], padding=padding, workspace=workspace)


def begin_images(model: PreTrainedModel, rows: ImageRows, image_grids: torch.Tensor) -> None:
    """Run the `<boi>` of every image (images, max_scales, 2) on top of the rows that have it."""
    tokens = torch.full((len(image_grids), 1), model.config.boi_token_id, device=image_grids.device)
    layout = model.model.get_image_layout(tokens, image_grids)
    embeds = model.model.embed_inputs(tokens, image_grids=image_grids, layout=layout)
    positions = rows.boi_position.expand(3, -1, -1)
    rows.append(model, embeds, model.model.get_position_embeddings(embeds, positions))


@torch.no_grad()
def sample_scales(
    model: PreTrainedModel,
    row_sets: list[ImageRows],
    plan: Sequence[ScaleStep],
    image_grids: torch.Tensor,
    inputs: Sequence[ScaleInput],
) -> Iterator[SampledScale]:
    """
    Sample images that share one schedule, `image_grids` (images, max_scales, 2), scale by scale, from `inputs` of all
    scales. `row_sets` hold the rows that have an image, one an image in order, then those of the same prompts without
    their text and those without text and source images, if any: in the same cache or in another.

    All that does not depend on codes is prepared before the first scale: from there to the last one the host does not
    wait for an accelerator.

    Raises:
        `ValueError`: on logits that are not finite. On a CPU at their scale, elsewhere before the last one is yielded:
        looking at them earlier would make the host wait at every scale.
    """
    batch, plan = len(image_grids), list(plan)
    grids = [step.grid for step in plan]
    terms = model.get_scale_terms(image_grids)
    for rows in row_sets:
        rows.prepare(model, grids[1:])
    codes = image_grids.new_zeros(batch, 0)
    unchecked = {}
    for index, own in enumerate(inputs):
        step = plan[index]
        if own.given is not None and own.is_given is None:
            sampled = own.given
        else:
            logits = model.guided_logits([rows.image_states for rows in row_sets], step, batch)
            unchecked[index] = largest_score(logits, step)
            own.draw(step, logits.device)  # where a callback has changed the step
            sampled = model.sample_scale(logits, step, own.numbers, own.given, own.is_given)
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
        conditions = max(later.num_conditions for later in plan[index + 1 :])
        embeds = model.embed_next_scale(codes, grids[index], grids[index + 1], terms[:, index + 1])
        row_sets = first_rows(row_sets, batch * conditions)
        if not model.is_fused:
            row_sets = [part for rows in row_sets for part in rows.split(embeds.shape[1])]
        embeds = embeds.repeat(conditions, 1, 1).split([rows.num_images for rows in row_sets])
        for rows, own_embeds in zip(row_sets, embeds):
            rows.append_scale(model, own_embeds)


def sample_and_give_back(model: PreTrainedModel, rows: ImageRows, *args) -> Iterator[SampledScale]:
    """[`sample_scales`] on rows that may be in a workspace, which is free again afterwards."""
    try:
        yield from sample_scales(model, [rows], *args)
    finally:
        if rows.workspace is not None:
            model.graphs.give_back(rows.workspace)


def first_rows(row_sets: list[ImageRows], count: int) -> list[ImageRows]:
    """Those of `row_sets` that hold the first `count` rows that have an image."""
    kept = []
    for rows in row_sets:
        if count > 0:
            kept.append(rows if rows.num_images <= count else rows.part(slice(count)))
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
