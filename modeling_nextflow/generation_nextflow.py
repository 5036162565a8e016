"""Drawing by next-scale prediction: `embed_scale -> forward -> guide -> sample`, a pass a scale, on one cache (§2.2).

The loop reads a list of [`ScaleStep`] and nothing else; state (cache, positions, codes) is passed, never stored on the
model. It knows codes, not pixels. Text comes from transformers' own `generate`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.utils import ModelOutput

from .rope_nextflow import cell_coordinates


PerScale = float | int | None | Sequence[float | int | None]


@dataclass(frozen=True)
class ScaleStep:
    """How one scale is drawn. `guidance_scale` 1 needs no unconditional pass; `temperature` 0 takes the best code;
    `top_k` 0 and `top_p` 1 leave all codes."""

    grid: tuple[int, int]
    guidance_scale: float
    temperature: float
    top_k: int
    top_p: float


@dataclass
class NextFlowImageGenerationOutput(ModelOutput):
    r"""
    Images drawn by [`NextFlowGenerationMixin.generate_images`].

    Args:
        image_codes (`torch.LongTensor` of shape `(total_codes,)`): Codes of all images, in order, scale-major.
        image_grids (`torch.LongTensor` of shape `(batch, max_scales, 2)`): Their schedules.
    """

    image_codes: torch.LongTensor | None = None
    image_grids: torch.LongTensor | None = None


@dataclass
class _PromptRows:
    """Prompts as rows of one batch, left-padded: (rows, length), with the images of all rows in reading order."""

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    image_codes: torch.LongTensor | None = None
    image_grids: torch.LongTensor | None = field(default=None)


def scale_plan(
    grids: Sequence[tuple[int, int]],
    *,
    guidance_scale: PerScale = 1.0,
    guidance_schedule: str = "constant",
    temperature: PerScale = 1.0,
    top_k: PerScale = 0,
    top_p: PerScale = 1.0,
) -> list[ScaleStep]:
    """Fan scalars or per-scale lists out to one [`ScaleStep`] a scale.

    `guidance_schedule="linear"` is VAR's ramp: a scalar guidance grows from 1 at the first scale to its value at the
    last (VAR's own `cfg` is this value minus 1).
    """
    num_scales = len(grids)

    def per_scale(name: str, value: PerScale, default: float, low: float, high: float) -> list[float]:
        values = list(value) if isinstance(value, Sequence) else [value] * num_scales
        if len(values) != num_scales:
            raise ValueError(f"{name} has {len(values)} entries, expected one for each of the {num_scales} scales")
        values = [default if entry is None else entry for entry in values]
        for entry in values:
            if not low <= entry <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], got {entry}")
        return values

    guidance = per_scale("guidance_scale", guidance_scale, 1.0, 0.0, float("inf"))
    if guidance_schedule == "linear":
        if not isinstance(guidance_scale, Sequence):
            guidance = [1 + (g - 1) * k / max(num_scales - 1, 1) for k, g in enumerate(guidance)]
    elif guidance_schedule != "constant":
        raise ValueError(f"guidance_schedule must be 'constant' or 'linear', got {guidance_schedule!r}")
    columns = (
        guidance,
        per_scale("temperature", temperature, 1.0, 0.0, float("inf")),
        per_scale("top_k", top_k, 0, 0, float("inf")),
        per_scale("top_p", top_p, 1.0, 0.0, 1.0),
    )
    return [ScaleStep(tuple(grid), *settings) for grid, *settings in zip(grids, *columns)]


def guide(logits: torch.FloatTensor, unconditional: torch.FloatTensor | None, scale: float) -> torch.FloatTensor:
    """Classifier-free guidance: `unconditional + scale * (logits - unconditional)`."""
    return logits if unconditional is None else unconditional.lerp(logits, scale)


def sample_codes(
    logits: torch.FloatTensor, step: ScaleStep, generators: Sequence[torch.Generator | None]
) -> torch.LongTensor:
    """Draw one code per cell from logits (batch, cells, codebook_size), in fp32.

    By inverse transform with one uniform number a cell from the row's own generator: a row's codes do not depend on
    the rows beside it, and a CPU generator works for any device.
    """
    if step.temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / step.temperature
    vocabulary = None
    if 0 < step.top_k < scores.shape[-1]:
        scores, vocabulary = scores.topk(step.top_k, dim=-1)
    elif step.top_p < 1:
        scores, vocabulary = scores.sort(dim=-1, descending=True)
    probabilities = scores.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if step.top_p < 1:  # keep the codes before which less than top_p of the mass lies, always the first
        probabilities = probabilities.masked_fill(cumulative - probabilities > step.top_p, 0)
        cumulative = probabilities.cumsum(-1)
    batch, cells = scores.shape[:2]
    uniform = torch.stack(
        [
            torch.rand(cells, 1, generator=generator, device=generator.device if generator else scores.device).to(
                scores.device
            )
            for generator in (generators if len(generators) else [None] * batch)
        ]
    )
    total = cumulative[..., -1:]
    choice = torch.searchsorted(cumulative, uniform * total, right=True)
    # Rounding can put the number on the total itself; the last code with mass is then meant.
    last = (probabilities > 0).long().cumsum(-1).argmax(-1, keepdim=True)
    choice = torch.minimum(choice, last)
    return (choice if vocabulary is None else vocabulary.gather(-1, choice))[..., 0]


class TextOnlyLogitsProcessor(LogitsProcessor):
    """Text mode: no image code, `<boi>`, `<eoi>` or placeholder can be drawn."""

    def __init__(self, text_vocab_size: int, image_token_id: int):
        self.text_vocab_size = text_vocab_size
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[:, self.text_vocab_size :] = -float("inf")
        scores[:, self.image_token_id] = -float("inf")
        return scores


class NextFlowGenerationMixin(GenerationMixin):
    """`generate(generation_mode="text" | "image")` and [`~NextFlowGenerationMixin.generate_images`]."""

    @torch.no_grad()
    def generate(self, inputs: torch.LongTensor | None = None, *, generation_mode: str = "text", **kwargs):
        """transformers' `generate` for text; [`generate_images`] for `generation_mode="image"`.

        The image settings default to `image_guidance_scale`, `image_guidance_schedule`, `image_temperature`,
        `image_top_k` and `image_top_p` of the generation config, where it has them.
        """
        if generation_mode == "image":
            return self.generate_images(kwargs.pop("input_ids", inputs), **kwargs)
        if generation_mode != "text":
            raise ValueError(f"generation_mode must be 'text' or 'image', got {generation_mode!r}")
        text_only = TextOnlyLogitsProcessor(self.config.text_vocab_size, self.config.image_token_id)
        processors = LogitsProcessorList([text_only, *(kwargs.pop("logits_processor", None) or [])])
        return super().generate(inputs, logits_processor=processors, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # Overwritten: images take one step of the rotary text axis per scale, so the axes run apart.
        input_ids = model_kwargs.get("input_ids", inputs_tensor)
        if input_ids.is_floating_point() or model_kwargs.get("image_grids") is None:
            positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
            batch = len(inputs_tensor)
            return positions.float().expand(4, batch, -1) if positions.ndim == 2 else positions
        return self.model.get_position_ids(
            input_ids,
            image_grids=model_kwargs["image_grids"],
            attention_mask=model_kwargs.get("attention_mask"),
        )

    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration=False, use_cache=True, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        if not is_first_iteration and use_cache:  # the images are in the cache
            inputs["image_codes"] = inputs["image_grids"] = None
        return inputs

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        image_grids: torch.LongTensor,
        image_codes: torch.LongTensor | None = None,
        negative_input_ids: torch.LongTensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        negative_image_codes: torch.LongTensor | None = None,
        negative_image_grids: torch.LongTensor | None = None,
        prefix_codes: torch.LongTensor | None = None,
        guidance_scale: PerScale = None,
        guidance_schedule: str | None = None,
        temperature: PerScale = None,
        top_k: PerScale = None,
        top_p: PerScale = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback: Callable[[int, ScaleStep, torch.LongTensor], Sequence[ScaleStep] | None] | None = None,
    ) -> NextFlowImageGenerationOutput:
        r"""
        Draw one image per row. All rows share one schedule.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): Prompts that end in `<boi>`, left-padded.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 at padding.
            image_grids (`torch.LongTensor` of shape `(n_images, max_scales, 2)`):
                One row per `<boi>`, in reading order, that of the image to draw included.
            image_codes (`torch.LongTensor` of shape `(total_codes,)`, *optional*): Codes of the images in the prompts.
            negative_input_ids, negative_attention_mask, negative_image_codes, negative_image_grids (*optional*):
                The unconditional prompts, in the same form, one row or `batch` rows. Needed where guidance is not 1.
            prefix_codes (`torch.LongTensor` of shape `(batch, codes)`, *optional*):
                Codes of the first scales, which are then taken as they are; the others are drawn after them.
            guidance_scale, temperature, top_k, top_p (`float`, `int` or a list with one entry per scale, *optional*):
                See [`ScaleStep`]. Default to the generation config's `image_*` entries.
            guidance_schedule (`str`, *optional*): `"constant"` or `"linear"`; see [`scale_plan`].
            generator (`torch.Generator` or list of them, *optional*): One, or one per row.
            callback (`Callable`, *optional*):
                Called after every scale with (index, step, codes (batch, codes so far)). May return the steps of the
                scales still to come, to change how they are drawn.
        """
        batch = len(input_ids)
        grids, target_grids = self._target_schedule(input_ids, image_grids)
        plan = scale_plan(
            grids,
            guidance_scale=self._image_setting("guidance_scale", guidance_scale, 1.0),
            guidance_schedule=self._image_setting("guidance_schedule", guidance_schedule, "constant"),
            temperature=self._image_setting("temperature", temperature, 1.0),
            top_k=self._image_setting("top_k", top_k, 0),
            top_p=self._image_setting("top_p", top_p, 1.0),
        )
        if isinstance(generator, Sequence) and len(generator) != batch:
            raise ValueError(f"got {len(generator)} generators for a batch of {batch}: pass one, or one per image")
        generators = list(generator) if isinstance(generator, Sequence) else [generator] * batch

        rows = self._prompt_rows(input_ids, attention_mask, image_codes, image_grids)
        if any(step.guidance_scale != 1 for step in plan):
            if negative_input_ids is None:
                raise ValueError("guidance_scale is not 1, which needs negative_input_ids: the unconditional prompt")
            if negative_image_grids is None:
                negative_image_grids = target_grids[: len(negative_input_ids)]
            negative = self._prompt_rows(
                negative_input_ids, negative_attention_mask, negative_image_codes, negative_image_grids
            )
            rows = _stack_rows(rows, _repeat_rows(negative, batch), pad_token_id=self.config.pad_token_id or 0)

        given = [] if prefix_codes is None else _split_scales(prefix_codes, grids, batch)
        cache = DynamicCache(config=self.config)
        hidden_states, mask, position = self._prefill_rows(rows, cache)
        drawn: list[torch.LongTensor] = []
        for index in range(len(plan)):
            step = plan[index]
            guided = len(hidden_states) > batch
            if index < len(given):
                drawn.append(given[index])
            else:
                logits = self.image_logits(hidden_states).float()
                logits = guide(logits[:batch], logits[batch:] if guided else None, step.guidance_scale)
                drawn.append(sample_codes(logits, step, generators))
            if callback is not None:
                changed = callback(index, step, torch.cat(drawn, dim=1))
                if changed is not None:
                    plan = [*plan[: index + 1], *changed]
            if index + 1 == len(plan):
                break
            if guided and all(later.guidance_scale == 1 for later in plan[index + 1 :]):
                cache.batch_select_indices(torch.arange(batch, device=input_ids.device))
                mask = None if mask is None else mask[:batch]
                position, guided = position[:batch], False
            embeds = self.model.embed_scale(drawn[-1], target_grids, scale=index + 2, grids=grids)
            hidden_states, mask = self._append_block(
                torch.cat([embeds, embeds]) if guided else embeds, cache, mask, position + index + 1, grids[index + 1]
            )
        if len(plan) < len(grids):  # stopped early: a preview
            target_grids = target_grids.clone()
            target_grids[:, len(plan) :] = 0
        return NextFlowImageGenerationOutput(image_codes=torch.cat(drawn, dim=1).flatten(), image_grids=target_grids)

    def _image_setting(self, name: str, value, default):
        if value is not None:
            return value
        configured = getattr(self.generation_config, f"image_{name}", None)
        return default if configured is None else configured

    def _target_schedule(
        self, input_ids: torch.LongTensor, image_grids: torch.LongTensor
    ) -> tuple[list[tuple[int, int]], torch.LongTensor]:
        """The schedule all rows share, as a list and as (batch, max_scales, 2)."""
        is_boi = input_ids == self.config.boi_token_id
        if not is_boi[:, -1].all():
            raise ValueError("every row of input_ids must end in <boi> to draw an image (pad on the left)")
        if int(is_boi.sum()) != len(image_grids):
            count = int(is_boi.sum())
            raise ValueError(f"input_ids hold {count} <boi> tokens, image_grids has {len(image_grids)} rows")
        target_grids = image_grids[is_boi.sum(1).cumsum(0) - 1]
        if not (target_grids == target_grids[:1]).all():
            raise ValueError("the images of one batch must share one schedule: draw other sizes in another call")
        return [tuple(grid) for grid in target_grids[0].tolist() if grid[0] > 0], target_grids

    def _prompt_rows(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        image_codes: torch.LongTensor | None,
        image_grids: torch.LongTensor,
    ) -> _PromptRows:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not mask[:, -1].all():
            raise ValueError("prompts must be padded on the left: the last token of a row is padding")
        codes = input_ids.new_zeros(0) if image_codes is None else image_codes
        return _PromptRows(input_ids, mask.long(), codes, image_grids)

    def _prefill_rows(
        self, rows: _PromptRows, cache: DynamicCache
    ) -> tuple[torch.FloatTensor, torch.LongTensor | None, torch.FloatTensor]:
        """Hidden state (rows, 1, hidden) of `<boi>`, the mask if a row is padded, and `<boi>`'s position (rows, 1)."""
        mask = None if rows.attention_mask.all() else rows.attention_mask
        position_ids = self.model.get_position_ids(
            rows.input_ids, image_grids=rows.image_grids, attention_mask=rows.attention_mask
        )
        outputs = self.model(
            input_ids=rows.input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            image_codes=rows.image_codes,
            image_grids=rows.image_grids,
            past_key_values=cache,
            use_cache=True,
        )
        return outputs.last_hidden_state[:, -1:], mask, position_ids[1, :, -1:]

    def _append_block(
        self,
        embeds: torch.FloatTensor,
        cache: DynamicCache,
        mask: torch.LongTensor | None,
        axis: torch.FloatTensor,
        grid: tuple[int, int],
    ) -> tuple[torch.FloatTensor, torch.LongTensor | None]:
        """Run one block (rows, cells, hidden) on top of the cache. Its cells see everything: no mask but padding."""
        height, width = (torch.tensor(side, device=embeds.device) for side in grid)
        cell = torch.arange(grid[0] * grid[1], device=embeds.device)
        row, column = cell_coordinates(
            cell // width, cell % width, height, width, extent=self.config.spatial_rope_extent
        )
        axis = axis.expand(-1, len(cell))
        position_ids = torch.stack([axis, row.expand_as(axis), column.expand_as(axis)])
        if mask is not None:
            mask = F.pad(mask, (0, len(cell)), value=1)
        outputs = self.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            is_causal=False,
        )
        return outputs.last_hidden_state, mask


def _split_scales(
    codes: torch.LongTensor, grids: Sequence[tuple[int, int]], batch: int
) -> tuple[torch.LongTensor, ...]:
    """Codes (batch, codes) of the first scales, scale by scale."""
    ends = torch.tensor([height * width for height, width in grids]).cumsum(0).tolist()
    if codes.ndim != 2 or len(codes) != batch or codes.shape[1] not in ends:
        raise ValueError(f"prefix_codes are {tuple(codes.shape)}, expected {batch} rows of one of {ends} codes")
    return codes.tensor_split(ends[: ends.index(codes.shape[1])], dim=1)


def _repeat_rows(rows: _PromptRows, batch: int) -> _PromptRows:
    """One unconditional prompt for all rows, or one each."""
    if len(rows.input_ids) == batch:
        return rows
    if len(rows.input_ids) != 1:
        raise ValueError(f"got {len(rows.input_ids)} unconditional prompts, expected 1 or {batch}")
    return _PromptRows(
        rows.input_ids.expand(batch, -1),
        rows.attention_mask.expand(batch, -1),
        rows.image_codes.repeat(batch),
        rows.image_grids.repeat(batch, 1, 1),
    )


def _stack_rows(first: _PromptRows, second: _PromptRows, *, pad_token_id: int) -> _PromptRows:
    """The rows of `first`, then those of `second`, left-padded to one length."""
    length = max(first.input_ids.shape[1], second.input_ids.shape[1])

    def stack(name: str, value: int) -> torch.LongTensor:
        tensors = [getattr(rows, name) for rows in (first, second)]
        return torch.cat([F.pad(tensor, (length - tensor.shape[1], 0), value=value) for tensor in tensors])

    return _PromptRows(
        stack("input_ids", pad_token_id),
        stack("attention_mask", 0),
        torch.cat([first.image_codes, second.image_codes]),
        torch.cat([first.image_grids, second.image_grids]),
    )


__all__ = ["NextFlowGenerationMixin", "NextFlowImageGenerationOutput", "ScaleStep", "scale_plan"]
