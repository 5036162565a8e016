"""Drawing on a cache: a pass a scale, `embed_scale -> forward -> guide -> sample` (§2.2).

Reads a list of [`ScaleStep`] and rows whose `<boi>` the cache holds; knows neither prompts nor `generate`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache

from .attention_nextflow import RowRuns
from .cache_nextflow import part_of, reserve, reserved_cache
from .configuration_nextflow import NextFlowConfig
from .graphs_nextflow import Workspace
from .grids_nextflow import check_codes
from .prompt_rows_nextflow import PromptRows
from .sampling_nextflow import PerScale, ScaleStep, largest_score, random_numbers


if TYPE_CHECKING:
    from . import modeling_nextflow  # not `from .file import`, which diffusers' loader would follow in a circle

    NextFlowForCausalLM = modeling_nextflow.NextFlowForCausalLM


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
class SampledScale:
    """
    What is there after a scale was drawn.

    Attributes:
        index: Number of the scale, from 0.
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
        runs: Neighbours with as much padding before them: (first row, end, padding). `None` where it is not known.
        embeddings: Cosine and sine (rows, cells, head_dim) of the blocks to come.
        workspace: Whose memory the cache is, where passes are recorded.
    """

    cache: DynamicCache
    mask: torch.Tensor | None
    boi_position: torch.Tensor
    hidden_states: torch.Tensor
    sampling: torch.Tensor | None = None
    runs: list[tuple[int, int, int]] | None = None
    embeddings: Sequence[torch.Tensor] = ()
    workspace: Workspace | None = None

    def first(self, count: int) -> "ImageRows":
        """The first `count` rows, in the same memory."""
        if count == len(self.boi_position):
            return self
        mask = None if self.mask is None else self.mask[:count]
        runs = [(start, min(end, count), padding) for start, end, padding in self.runs or [] if start < count]
        return replace(self._part(slice(count)), mask=mask, runs=runs, workspace=self.workspace)

    def split(self, cells: int) -> list["ImageRows"]:
        """The same rows by runs, which need no mask, where blocks of `cells` are worth a pass of each."""
        if self.mask is None or self.runs is None:
            return [self]
        if cells * min(end - start for start, end, _ in self.runs) < ARITHMETIC_BOUND:
            return [self]
        return [self._part(slice(start, end), padding) for start, end, padding in self.runs]

    def _part(self, rows: slice, padding: int = 0) -> "ImageRows":
        return ImageRows(
            part_of(self.cache, rows, padding),
            None,
            self.boi_position[rows],
            self.hidden_states[rows],
            embeddings=[part[rows] for part in self.embeddings],
        )

    def append(self, model: "NextFlowForCausalLM", embeds: torch.Tensor) -> None:
        """
        Run one block (rows with an image, cells, hidden), the next that `embeddings` are there for, on top of the
        cache. Its cells see all but padding.
        """
        cells = embeds.shape[1]
        embeddings = [part[:, :cells] for part in self.embeddings]
        self.embeddings = [part[:, cells:] for part in self.embeddings]
        workspace, graphs = self.workspace, model.graphs
        is_recorded = graphs is not None and workspace is not None and cells <= graphs.max_cells
        if self.mask is None:
            self.hidden_states = self._run(model, None, embeds, *embeddings)
            return
        if self.runs is not None and model.is_fused and not is_recorded and len(self.runs) <= MAX_RUNS:
            self.hidden_states = self._run(model, {"full_attention": RowRuns(tuple(self.runs))}, embeds, *embeddings)
            return
        missing = self.cache.get_seq_length() + cells - self.mask.shape[1]
        self.mask = F.pad(self.mask, (0, missing), value=1)
        if self.sampling is not None:
            embeds = embeds.new_zeros(len(self.mask), *embeds.shape[1:]).index_copy(0, self.sampling, embeds)
            self.mask[:, -cells:] *= torch.zeros_like(self.mask[:, :1]).index_fill(0, self.sampling, 1)
        if graphs is None or workspace is None or not is_recorded:
            self.hidden_states = self._run(model, self.mask, embeds, *embeddings)
            return

        def run(mask: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
            return self._run(model, {"full_attention": mask}, *inputs)

        mask = self.mask[:, None, None].bool()
        self.hidden_states = graphs.run(workspace, self.cache, run, mask, embeds, *embeddings)

    def _run(
        self,
        model: "NextFlowForCausalLM",
        mask: torch.Tensor | dict[str, Any] | None,
        embeds: torch.Tensor,
        *embeddings: torch.Tensor,
    ) -> torch.Tensor:
        return model.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_embeddings=embeddings,
            past_key_values=self.cache,
            use_cache=True,
            is_causal=False,
        ).last_hidden_state


def prefill_rows(model: "NextFlowForCausalLM", rows: PromptRows, cells: int) -> ImageRows:
    """Prompts that end in `<boi>`, in a cache of their own with room for `cells` of each image."""
    length, workspace = rows.input_ids.shape[1] + cells, None
    if model.graphs is not None and model.is_fused and model.config._attn_implementation == "sdpa":
        workspace = model.graphs.take(model.config, len(rows.input_ids), length)
    cache = reserved_cache(model.config, length) if workspace is None else workspace.cache
    padding = (rows.attention_mask == 0).sum(1).tolist()
    mask = rows.attention_mask if any(padding) or workspace is not None else None
    states = model.model(
        input_ids=rows.input_ids,
        attention_mask=mask,
        image_codes=rows.image_codes,
        image_grids=rows.image_grids,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    runs, start = [], 0
    for count, group in groupby(padding):
        runs.append((start, start + len(list(group)), count))
        start = runs[-1][1]
    boi_position = vars(cache)["nextflow_place"].position[1, :, None]
    return ImageRows(cache, mask, boi_position, states[:, -1:], runs=runs, workspace=workspace)


def begin_images(
    model: "NextFlowForCausalLM",
    cache: DynamicCache,
    mask: torch.Tensor | None,
    boi_position: torch.Tensor,
    sampling: torch.Tensor | None,
    image_grids: torch.Tensor,
    cells: int,
) -> ImageRows:
    """
    Run the `<boi>` of every image (images, max_scales, 2) on top of the rows of a cache that have one; `cells` follow.
    Arguments as in [`ImageRows`].
    """
    tokens = torch.full((len(image_grids), 1), model.config.boi_token_id, device=image_grids.device)
    layout = model.model.get_image_layout(tokens, image_grids)
    embeds = model.model.embed_inputs(tokens, image_grids=image_grids, layout=layout)
    reserve(cache, 1 + cells)
    embeddings = model.model.get_position_embeddings(embeds, boi_position.expand(3, -1, -1))
    rows = ImageRows(cache, mask, boi_position, embeds, sampling, embeddings=embeddings)
    rows.append(model, embeds)
    return rows


@torch.no_grad()
def sample_scales(
    model: "NextFlowForCausalLM",
    row_sets: Sequence[ImageRows],
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
    batch, plan, workspaces = len(image_grids), list(plan), [rows.workspace for rows in row_sets]
    grids = [step.grid for step in plan]
    terms = model.get_scale_terms(image_grids)
    for rows in row_sets if len(grids) > 1 else ():
        positions = model.get_block_positions(rows.boi_position + 1, grids[1:])
        rows.embeddings = model.model.get_position_embeddings(rows.hidden_states, positions)
    codes, unchecked = image_grids.new_zeros(batch, 0), {}
    try:
        for index, own in enumerate(inputs):
            if index:
                conditions = max(later.num_conditions for later in plan[index:])
                embeds = model.embed_next_scale(codes, grids[index - 1], grids[index], terms[:, index])
                row_sets = _append_scale(model, row_sets, embeds.repeat(conditions, 1, 1))
            step = plan[index]
            if own.given is not None and own.is_given is None:
                sampled = own.given
            else:
                states = [
                    rows.hidden_states if rows.sampling is None else rows.hidden_states[rows.sampling]
                    for rows in row_sets
                ]
                logits = model.guided_logits(states, step, batch)
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
    finally:
        for workspace in workspaces:
            if workspace is not None and model.graphs is not None:
                model.graphs.give_back(workspace)


def _append_scale(
    model: "NextFlowForCausalLM", row_sets: Sequence[ImageRows], embeds: torch.Tensor
) -> list[ImageRows]:
    """Run a block (rows, cells, hidden) on the first rows; those that guidance needs no more are left out."""
    kept, start = [], 0
    for rows in row_sets:
        if start < len(embeds):
            count = len(rows.boi_position if rows.sampling is None else rows.sampling)
            rows = rows if rows.sampling is not None else rows.first(min(count, len(embeds) - start))
            for part in [rows] if model.is_fused else rows.split(embeds.shape[1]):
                count = len(part.boi_position if part.sampling is None else part.sampling)
                part.append(model, embeds[start : start + count])
                kept.append(part)
                start += count
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


__all__ = [
    "ImageRows",
    "SampledScale",
    "ScaleCallback",
    "begin_images",
    "check_context",
    "prefill_rows",
    "prepare_scales",
    "sample_images",
    "sample_scales",
]
