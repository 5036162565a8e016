"""Sampling images: prompts as rows of one cache, then a pass a scale, `embed -> forward -> guide -> sample` (§2.2).

All that does not depend on codes is prepared before the first scale. Knows nothing of `generate` and its settings of
text.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache

from .attention_nextflow import PLACE, RowRuns, part_of, reserve, reserved_cache
from .configuration_nextflow import NextFlowConfig
from .graphs_nextflow import PROMPT_LENGTHS, Workspace
from .grids_nextflow import (
    check_codes,
    count_codes,
    get_image_layout,
    shared_schedule,
)
from .image_settings_nextflow import IMAGE_DEFAULTS
from .sampling_nextflow import (
    NextFlowSamplingInterface,
    SampledScale,
    ScaleInput,
    ScaleStep,
    check_finite,
    one_per_row,
    prepare_scales,
    scale_plan,
    split_prefix,
)


ScaleCallback = Callable[[int, ScaleStep, torch.Tensor], Sequence[ScaleStep] | None]

# Block size from which on a pass is compute-bound: splitting the batch then costs nothing and avoids a mask.
ARITHMETIC_BOUND = 1024
# Runs of rows that attend one after the other, without a mask: each costs an operator more a layer.
MAX_RUNS = 8
# Devices where a look at a tensor's values costs nothing: an accelerator would have to finish its work first.
SYNCHRONOUS = {"cpu"}


@dataclass
class NextFlowImageGenerationOutput:
    r"""
    Images sampled by [`~NextFlowGenerationMixin.generate_images`]. No `ModelOutput`: `pipeline("any-to-any")` would
    make a plain one of it, and asks for `to`.

    Args:
        image_codes (`torch.Tensor` of shape `(total_codes,)`): Codes of all images, in order, scale-major.
        image_grids (`torch.Tensor` of shape `(batch, max_scales, 2)`): Their schedules.
    """

    image_codes: torch.Tensor
    image_grids: torch.Tensor

    def to(self, device: torch.device | str) -> "NextFlowImageGenerationOutput":
        """The same output on another device."""
        return NextFlowImageGenerationOutput(self.image_codes.to(device), self.image_grids.to(device))


# ---- prompts


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
        *,
        batch: int | None = None,
    ) -> "PromptRows":
        """Fill in the defaults, and repeat a single prompt to `batch` rows. Raises `ValueError` for another number."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if not mask[:, -1].all():
            raise ValueError("prompts must be padded on the left: the last token of a row is padding")
        codes = input_ids.new_zeros(0) if image_codes is None else image_codes
        if batch is None or len(input_ids) == batch:
            return cls(input_ids, mask, codes, image_grids)
        if len(input_ids) != 1:
            raise ValueError(f"got {len(input_ids)} unconditional prompts, expected 1 or {batch}")
        ids, mask = input_ids.expand(batch, -1), mask.expand(batch, -1)
        return cls(ids, mask, codes.repeat(batch), image_grids.repeat(batch, 1, 1))


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
    if image_grids is None:
        counts, expected = ((ids == boi).sum(1) for ids in (input_ids, rows.input_ids))
        # Tokens do not say which images they are, so the count decides: as many as the prompts' are the prompts' own.
        if torch.equal(counts, expected):  # the same images
            image_codes = rows.image_codes if image_codes is None else image_codes
            image_grids = rows.image_grids
        else:  # only the one to sample
            image_grids = rows.image_grids[expected.cumsum(0) - 1][: len(input_ids)]  # each row's last
    return PromptRows.of(input_ids, attention_mask, image_codes, image_grids, batch=len(rows.input_ids))


def check_context(config: NextFlowConfig, tokens: int, needed: int) -> None:
    """Raises `ValueError` where the model's context, with `tokens` in it, has no room for `needed` more."""
    limit = config.max_position_embeddings
    if tokens + needed > limit:
        raise ValueError(
            f"the sequence has {tokens} tokens and needs at least {needed} more, but the model's context is {limit} "
            "(`max_position_embeddings`): shorten it, ask for fewer or smaller images, or begin a new conversation"
        )


# ---- scales


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
        runs: Neighbouring rows with equal left padding: (first row, end, padding). `None` where it is not known.
        embeddings: Cosine and sine (rows, cells, head_dim) of the blocks to come.
        workspace: Owner of the cache's memory, where passes are recorded.
    """

    cache: DynamicCache
    mask: torch.Tensor | None
    boi_position: torch.Tensor
    hidden_states: torch.Tensor
    sampling: torch.Tensor | None = None
    runs: list[tuple[int, int, int]] | None = None
    embeddings: Sequence[torch.Tensor] = ()
    workspace: Workspace | None = None

    def part(self, rows: slice, padding: int = 0) -> "ImageRows":
        """Some rows that need no mask once their first `padding` tokens are left out, in the same memory."""
        cache, embeddings = part_of(self.cache, rows, padding), [part[rows] for part in self.embeddings]
        return ImageRows(cache, None, self.boi_position[rows], self.hidden_states[rows], embeddings=embeddings)

    def first(self, count: int) -> "ImageRows":
        """The first `count` rows, in the same memory."""
        mask = None if self.mask is None else self.mask[:count]
        # The conditional rows come first: dropping guidance cuts rows off the end.
        runs = [(start, min(end, count), padding) for start, end, padding in self.runs or [] if start < count]
        return replace(self.part(slice(count)), mask=mask, runs=runs, workspace=self.workspace)

    def append(self, model: NextFlowSamplingInterface, embeds: torch.Tensor) -> None:
        """
        Run the next block (rows with an image, cells, hidden) on top of the cache, at the positions of the next
        `embeddings`. Its cells see everything but padding.
        """
        cells, mask, graphs = embeds.shape[1], self.mask, None
        embeddings = [part[:, :cells] for part in self.embeddings]
        self.embeddings = [part[:, cells:] for part in self.embeddings]
        own = None if self.workspace is None else self.workspace.graphs
        if own is not None and own is model.graphs and cells <= own.max_cells:  # the model's is another once it moved
            graphs = own
        layer_mask: Any = mask
        if mask is not None and graphs is None and self.runs and len(self.runs) <= MAX_RUNS and model.is_fused:
            layer_mask = {"full_attention": RowRuns(tuple(self.runs))}
        elif mask is not None:
            # New columns count as seen by all rows, but for rows without an image, which get padding.
            self.mask = layer_mask = mask = F.pad(mask, (0, cells), value=1)
            if self.sampling is not None:
                embeds = embeds.new_zeros(len(mask), *embeds.shape[1:]).index_copy(0, self.sampling, embeds)
                mask[:, -cells:] *= torch.zeros_like(mask[:, :1]).index_fill(0, self.sampling, 1)
        # One block after the cache: every cell sees all before it and its whole scale, so there is no causal mask.
        inputs: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True, "is_causal": False}
        if graphs is None or mask is None or self.workspace is None:
            inputs |= {"inputs_embeds": embeds, "attention_mask": layer_mask, "position_embeddings": embeddings}
            self.hidden_states = model.model(**inputs).last_hidden_state
            return

        def run(mask: torch.Tensor, embeds: torch.Tensor, *embeddings: torch.Tensor) -> torch.Tensor:
            block = {"inputs_embeds": embeds, "position_embeddings": embeddings}
            return model.model(attention_mask={"full_attention": mask}, **block, **inputs).last_hidden_state

        mask = mask[:, None, None].bool()  # (rows, 1, 1, cached), as sdpa broadcasts it
        self.hidden_states = graphs.run(self.workspace, self.cache, run, mask, embeds, *embeddings)


def prefill_rows(
    model: NextFlowSamplingInterface, parts: Sequence[PromptRows], cells: int, *, multiple: int = 1
) -> ImageRows:
    """
    Prompts that end in `<boi>`, one part after the other, in a cache of their own with room for `cells` of each image:
    left-padded to one length, a `multiple` of this. Raises `ValueError` where the context has no room for them.
    """
    lengths, pad = [rows.input_ids.shape[1] for rows in parts], model.config.pad_token_id or 0
    length = math.ceil(max(lengths) / multiple) * multiple
    # Left padding keeps every `<boi>` in the last column, which the first scale is read from.
    ids = torch.cat([F.pad(rows.input_ids, (length - own, 0), value=pad) for rows, own in zip(parts, lengths)])
    seen = torch.cat([F.pad(rows.attention_mask, (length - own, 0)) for rows, own in zip(parts, lengths)])
    # The host has to know the runs before the first scale, and waits for them here.
    padding, workspace = (seen == 0).sum(1).tolist(), None
    check_context(model.config, length - min(padding), cells)
    if model.graphs is not None and model.is_fused and model.config._attn_implementation == "sdpa":
        workspace = model.graphs.take(model.config, len(ids), length + cells)
    cache = reserved_cache(model.config, length + cells) if workspace is None else workspace.cache
    # A recorded pass always takes a mask: the next prompts may need one.
    mask = seen if any(padding) or workspace is not None else None
    states = model.model(
        input_ids=ids,
        attention_mask=mask,
        image_codes=torch.cat([rows.image_codes for rows in parts]),
        image_grids=torch.cat([rows.image_grids for rows in parts]),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    runs, start = [], 0
    for count, group in groupby(padding):
        runs.append((start, start + len(list(group)), count))
        start = runs[-1][1]
    boi_position = vars(cache)[PLACE].position[1, :, None]  # the forward pass left it there
    return ImageRows(cache, mask, boi_position, states[:, -1:], runs=runs, workspace=workspace)


def begin_images(
    model: NextFlowSamplingInterface,
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
    layout = get_image_layout(model.config, tokens, image_grids)
    embeds = model.model.embed_inputs(tokens, image_grids=image_grids, layout=layout)
    reserve(cache, 1 + cells)  # once for `<boi>` and all scales
    # A text token has three equal coordinates.
    embeddings = model.model.rotary_emb(embeds, boi_position.expand(3, -1, -1))
    rows = ImageRows(cache, mask, boi_position, embeds, sampling, embeddings=embeddings)
    rows.append(model, embeds)
    return rows


@torch.no_grad()
def sample_scales(
    model: NextFlowSamplingInterface,
    row_sets: Sequence[ImageRows],
    plan: Sequence[ScaleStep],
    image_grids: torch.Tensor,
    inputs: Sequence[ScaleInput],
) -> Iterator[SampledScale]:
    """
    Sample images that share one schedule, `image_grids` (images, max_scales, 2), scale by scale, from the `inputs` of
    all scales, which [`prepare_scales`] has prepared. `row_sets` hold the rows that have an image, one an image in
    order, then those of the same prompts without their text and those without text and source images, if any: in the
    same cache or in another.

    All that does not depend on codes is prepared before the first scale: from there to the last one the host does not
    wait for an accelerator.

    Raises:
        `ValueError`: on guidance that begins after the first scale; on logits that are not finite. On a CPU at their
        scale, elsewhere before the last one is yielded: looking earlier would make the host wait at every scale.
    """
    batch, plan, workspaces = len(image_grids), list(plan), [rows.workspace for rows in row_sets]
    grids, is_synchronous = [step.grid for step in plan], image_grids.device.type in SYNCHRONOUS
    terms, is_fused = model.get_scale_terms(image_grids), model.is_fused  # (images, max_scales, hidden)
    for rows in row_sets if len(grids) > 1 else ():
        positions = model.get_block_positions(rows.boi_position + 1, grids[1:])  # (3, rows, cells)
        rows.embeddings = model.model.rotary_emb(rows.hidden_states, positions)
    codes, unchecked = image_grids.new_zeros(batch, 0), {}
    conditions = sum(len(rows.boi_position if rows.sampling is None else rows.sampling) for rows in row_sets) // batch
    try:
        for index, own in enumerate(inputs):
            if index:
                kept, conditions = conditions, max(later.num_conditions for later in plan[index:])  # for their keys
                if conditions > kept:
                    raise ValueError(
                        f"guidance of scale {index + 1} compares {conditions} prompts, but only {kept} went through "
                        "the scales before: guidance may change while it is on, but not begin after the first scale"
                    )
                embeds = model.embed_next_scale(codes, grids[index - 1], grids[index], terms[:, index])
                row_sets = _append_scale(model, row_sets, embeds.repeat(conditions, 1, 1))  # conditions share codes
            step = plan[index]
            if own.given is not None and own.is_given is None:
                sampled = own.given  # no logits are needed
            else:
                every = slice(None)
                states = [rows.hidden_states[every if rows.sampling is None else rows.sampling] for rows in row_sets]
                logits = model.guided_logits(states, step, batch, is_fused)
                low, high = logits.aminmax()  # a CPU takes 20 times as long for `vector_norm`
                unchecked[index] = torch.maximum(-low, high) / (step.temperature or 1)  # NaN where any score is
                sampled = model.sample_scale(logits, step, own.numbers, own.given, own.is_given)
            codes = torch.cat([codes, sampled], dim=1)  # (images, codes so far)
            if unchecked and (is_synchronous or index + 1 == len(plan)):
                check_finite(unchecked, plan)
            scale = SampledScale(index, step, codes, plan, image_grids)
            yield scale
            if scale.image_codes is not codes:  # the caller replaced them
                codes = _replaced(codes, scale.image_codes.to(codes.device), model.config.codebook_size)
            if index + 1 == len(plan):
                if unchecked:  # the plan was cut short
                    check_finite(unchecked, plan)
                return
            prepare_scales(inputs[index + 1 :], plan[index + 1 :], codes.device)  # of steps that were changed
    finally:  # also where the caller asks for no more scales
        for workspace in workspaces:
            if workspace is not None:
                workspace.graphs.give_back(workspace)


def _append_scale(
    model: NextFlowSamplingInterface, row_sets: Sequence[ImageRows], embeds: torch.Tensor
) -> list[ImageRows]:
    """
    Run a block (rows, cells, hidden) on the first rows; those that guidance needs no more are left out. Rows go run by
    run, without a mask, where layers are not fused and blocks are worth a pass each.
    """
    kept, start, cells = [], 0, embeds.shape[1]
    for rows in row_sets:
        if start == len(embeds):
            break  # guidance needs no more conditions
        count = len(rows.boi_position if rows.sampling is None else rows.sampling)
        if rows.sampling is None and count > len(embeds) - start:
            rows = rows.first(len(embeds) - start)
        parts = [rows]
        if rows.mask is not None and rows.runs:
            # Every run has to be compute-bound by itself, or splitting would only add launches.
            smallest = cells * min(end - first for first, end, _ in rows.runs)
            if smallest >= ARITHMETIC_BOUND and not model.is_fused:
                parts = [rows.part(slice(first, end), padding) for first, end, padding in rows.runs]
        for part in parts:
            count = len(part.boi_position if part.sampling is None else part.sampling)
            part.append(model, embeds[start : start + count])
            start += count
        kept += parts
    return kept


def _replaced(codes: torch.Tensor, others: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """Check `others`, which replace `codes`."""
    if others.shape != codes.shape:
        raise ValueError(f"image_codes were replaced by {tuple(others.shape)}, expected {tuple(codes.shape)}")
    return check_codes(others, codebook_size)


# ---- the model's part


class NextFlowImageGeneration(NextFlowSamplingInterface):
    """The methods of [`NextFlowForCausalLM`] that sample images."""

    @torch.no_grad()
    def generate_images(
        self, *args: Any, callback: ScaleCallback | None = None, **kwargs: Any
    ) -> NextFlowImageGenerationOutput:
        r"""
        Sample one image a row. All rows share one schedule.

        Args:
            args, kwargs: As in [`~NextFlowGenerationMixin.stream_images`].
            callback (`Callable`, *optional*):
                Called after every scale with (index, step, codes (batch, codes so far)). May return the steps of the
                scales still to come, to change how they are sampled; without any, the images are previews.
        """
        for scale in self.stream_images(*args, **kwargs):
            if callback is not None:
                changed = callback(scale.index, scale.step, scale.image_codes)
                if changed is not None:
                    scale.plan[scale.index + 1 :] = changed
        target_grids = scale.image_grids.clone()
        target_grids[:, scale.index + 1 :] = 0  # where it stopped early
        return NextFlowImageGenerationOutput(image_codes=scale.image_codes.flatten(), image_grids=target_grids)

    @torch.no_grad()
    def stream_images(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        image_grids: torch.Tensor,
        image_codes: torch.Tensor | None = None,
        negative_input_ids: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        negative_image_codes: torch.Tensor | None = None,
        negative_image_grids: torch.Tensor | None = None,
        imageless_input_ids: torch.Tensor | None = None,
        imageless_attention_mask: torch.Tensor | None = None,
        imageless_image_codes: torch.Tensor | None = None,
        imageless_image_grids: torch.Tensor | None = None,
        prefix_codes: torch.Tensor | None = None,
        prefix_mask: torch.Tensor | None = None,
        num_scales: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **settings: Any,
    ) -> Iterator[SampledScale]:
        r"""
        [`~NextFlowGenerationMixin.generate_images`] step by step: an iterator over the scales, each sampled when it
        is asked for. To stop, ask for no more.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, length)`): Prompts that end in `<boi>`, left-padded.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 at padding.
            image_grids (`torch.Tensor` of shape `(n_images, max_scales, 2)`):
                One row per `<boi>`, in reading order, that of the image to sample included.
            image_codes (`torch.Tensor` of shape `(total_codes,)`, *optional*): Codes of the images in the prompts.
            negative_input_ids, negative_attention_mask, negative_image_codes, negative_image_grids (*optional*):
                The unconditional prompts, in the same form, one row or `batch` rows. Needed where guidance is not 1.
                With as many images as the prompts, these are the prompts' unless said otherwise.
            imageless_input_ids, imageless_attention_mask, imageless_image_codes, imageless_image_grids (*optional*):
                The unconditional prompts without their source images. Needed where `image_guidance_scale` is not 1.
            prefix_codes (`torch.Tensor` of shape `(batch, codes)`, *optional*):
                Codes of the first scales, which are then taken as they are; the others are sampled after them.
            prefix_mask (`torch.Tensor` of shape `(batch, codes)`, *optional*):
                Which of `prefix_codes` are taken, all by default. The other cells of these scales are sampled.
            num_scales (`int`, *optional*): Sample only so many scales of the schedule: a preview.
            generator (`torch.Generator` or list of them, *optional*):
                One, or one per row. With one per row, a row's codes do not depend on the other rows in float32; in
                lower precision they change where rounding, which does, turns the two best codes of a cell.
            settings:
                Those of [`~NextFlowForCausalLM.get_image_settings`], such as `guidance_scale`: a number, or a list
                with one entry per scale. By default the generation config's.

        Raises:
            `ValueError`: on what does not fit together, codes out of range, and logits that are not finite.
        """
        # 1. Settings
        batch, boi = len(input_ids), self.config.boi_token_id
        grids, target_grids = shared_schedule(input_ids, image_grids, boi)
        cells = count_codes(grids[1:num_scales])  # to run: `<boi>` is scale 1
        if any(settings.get(name) is None for name in IMAGE_DEFAULTS):
            is_guided = negative_input_ids is not None, imageless_input_ids is not None
            settings = self.get_image_settings(None, *is_guided, **settings)
        plan = scale_plan(grids, **settings)
        if num_scales is not None and not 1 <= num_scales <= len(plan):
            raise ValueError(f"num_scales is {num_scales}, expected 1 to {len(plan)}, the scales of the schedule")
        plan = plan[:num_scales]
        conditions = max(step.num_conditions for step in plan)

        # 2. What is given of each scale, and its randomness
        given: list[tuple] = [()] * len(plan)
        if prefix_codes is not None or prefix_mask is not None:
            prefix = split_prefix(prefix_codes, prefix_mask, grids, batch, self.config.codebook_size)
            given[: len(prefix)] = prefix[: len(plan)]
        generators = one_per_row(generator, batch)
        inputs = [ScaleInput(generators, *own) for own in given]
        prepare_scales(inputs, plan, input_ids.device)

        # 3. The prompts and those that guide them, in one batch
        rows = PromptRows.of(input_ids, attention_mask, image_codes, image_grids)
        parts = [rows]
        if conditions > 1:
            negative = negative_input_ids, negative_attention_mask, negative_image_codes, negative_image_grids
            parts.append(negative_rows(rows, boi, *negative))
        if conditions > 2:
            imageless = imageless_input_ids, imageless_attention_mask, imageless_image_codes, imageless_image_grids
            missing = (
                "image_guidance_scale is not 1, which needs imageless_input_ids: the unconditional prompt, without "
                "its source images"
            )
            parts.append(negative_rows(rows, boi, *imageless, missing=missing))
        multiple = 1 if self.graphs is None else PROMPT_LENGTHS  # few lengths find recorded passes
        rows = prefill_rows(self, parts, cells, multiple=multiple)
        return sample_scales(self, [rows], plan, target_grids, inputs)
