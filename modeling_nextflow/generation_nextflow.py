"""`generate` in three modes: text by transformers' own machinery, an image, or text with images in between (§2.2).

What a call means is decided here, and what makes no sense is refused. The work is done in
generation_image_nextflow.py and generation_interleaved_nextflow.py. Knows codes, not pixels.
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicCache
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from .attention_nextflow import get_attention_mask
from .cache_nextflow import CachePlace, reserve
from .generation_configuration_nextflow import (
    CONFIG_NAMES,
    DEFAULT_MAX_IMAGES,
    IMAGE_DEFAULTS,
    NextFlowGenerationConfig,
    image_settings,
    refuse_config,
    refuse_options,
    refuse_text_settings,
)
from .generation_image_nextflow import (
    SampledScale,
    ScaleCallback,
    check_context,
    prefill_rows,
    prepare_scales,
    sample_scales,
)
from .generation_interleaved_nextflow import (
    ImagePlan,
    NextFlowInterleavedGenerationOutput,
    TextStreamer,
    generate_interleaved,
)
from .graphs_nextflow import PROMPT_LENGTHS
from .interface_nextflow import NextFlowSamplingInterface
from .prompt_rows_nextflow import (
    PromptRows,
    append_boi,
    check_image_count,
    find_target_grids,
    negative_rows,
    schedule_of,
    shared_schedule,
    split_images,
    split_prefix,
    stack_rows,
)
from .sampling_nextflow import PerScale, ScaleStep, guide, guides, sample_codes, scale_plan


logger = logging.get_logger(__name__)

GENERATION_MODES = ("text", "image", "interleaved")


@dataclass
class NextFlowImageGenerationOutput:
    r"""
    Images drawn by [`NextFlowGenerationMixin.generate_images`]. No `ModelOutput`: `pipeline("any-to-any")` would make
    a plain one of it, and asks for `to`.

    Args:
        image_codes (`torch.Tensor` of shape `(total_codes,)`): Codes of all images, in order, scale-major.
        image_grids (`torch.Tensor` of shape `(batch, max_scales, 2)`): Their schedules.
    """

    image_codes: torch.Tensor
    image_grids: torch.Tensor

    def to(self, device: torch.device | str) -> "NextFlowImageGenerationOutput":
        return NextFlowImageGenerationOutput(self.image_codes.to(device), self.image_grids.to(device))


class TextOnlyLogitsProcessor(LogitsProcessor):
    """Text mode: no image code, `<boi>`, `<eoi>` or placeholder can be drawn."""

    def __init__(self, image_vocabulary: slice, image_token_id: int):
        self.image_vocabulary = image_vocabulary
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.image_vocabulary] = -float("inf")
        scores[:, self.image_token_id] = -float("inf")
        return scores


class NextFlowGenerationMixin(NextFlowSamplingInterface, GenerationMixin):
    """`generate` in three modes, and [`~NextFlowGenerationMixin.generate_images`]."""

    def adjust_generation_fn(self, generation_config: GenerationConfig | None = None, *args, **kwargs) -> None:
        # Overwritten: what transformers loads is a plain `GenerationConfig`, with the names that its file has.
        if generation_config is not None:
            generation_config = NextFlowGenerationConfig.from_plain(generation_config)
        super().adjust_generation_fn(generation_config, *args, **kwargs)
        found = {**self.generation_config.to_dict(), "_from_model_config": None}
        self.generation_config = NextFlowGenerationConfig.from_dict(found)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        generation_mode: str = "text",
        **kwargs,
    ) -> torch.Tensor | ModelOutput | NextFlowImageGenerationOutput:
        r"""
        Write, draw, or both.

        Args:
            inputs, generation_config, logits_processor, stopping_criteria, kwargs:
                As in transformers' `generate`, in text mode all of it. `guidance_scale`, `image_temperature`, ... and
                `max_images` are settings like any other, see [`NextFlowGenerationConfig`]. In text mode the
                generation config's `guidance_scale`, that of images, is not used: only the call's guides text.
            generation_mode (`str`, *optional*, defaults to `"text"`):
                - `"text"`: tokens, or transformers' output class.
                - `"image"`: one image a prompt, see [`~NextFlowGenerationMixin.generate_images`] for the arguments.
                  Where prompts do not end in `<boi>`, it is put there.
                - `"interleaved"`: text in which the model begins images itself, up to `max_images` a row. Lengths
                  (`max_new_tokens`) count text; an image is one token, its `<boi>`. `return_dict_in_generate` asks
                  for the cache. A `streamer` gets the text and, if it has a `put_image`, codes and grids of images.
            image_codes, image_grids (`torch.Tensor`, *optional*): The images in the prompts, as in `forward`.
            target_grids (`torch.Tensor` of shape `(batch or 1, max_scales, 2)`, *optional*):
                Schedules of the images to draw, where no row of `image_grids` says so. Defaults to that of the last
                image of the prompt, then to `image_target_grids` of the generation config.
            negative_input_ids (`torch.Tensor` of shape `(batch or 1, length)`, *optional*):
                Unconditional prompts, where `guidance_scale` is not 1. Without them, guidance of the generation
                config is left out with a warning, and guidance of the call is an error.
            generator (`torch.Generator` or list of them, *optional*):
                One, or one a row. In interleaved mode it also samples the text.
            stop_at_image (`bool`, *optional*, defaults to `False`):
                In interleaved mode a row ends with its first `<boi>`, and nothing is drawn: the sequences, with a row
                of `image_grids` for each `<boi>`, are prompts for `"image"` mode.

        Returns:
            In `"image"` mode [`NextFlowImageGenerationOutput`], in `"interleaved"` mode
            [`NextFlowInterleavedGenerationOutput`]: token ids alone would lose the images.
        """
        if generation_mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode must be 'text', 'image' or 'interleaved', got {generation_mode!r}")
        # One that was assigned may be transformers' own, which would not know our settings among the arguments.
        if not isinstance(self.generation_config, NextFlowGenerationConfig):
            self.generation_config = NextFlowGenerationConfig.from_plain(self.generation_config)
        options = {
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            **kwargs,
        }
        if generation_mode == "image":
            return self._generate_image(kwargs.pop("input_ids", inputs), options)
        if generation_mode == "interleaved":
            return self._generate_interleaved(kwargs.pop("input_ids", inputs), options)
        self._check_no_images(kwargs.get("input_ids", inputs), kwargs)
        self._check_room(kwargs.get("input_ids", inputs), kwargs)
        if options.get("guidance_scale") is None:
            options = self._without_image_guidance(options)
        text_only = TextOnlyLogitsProcessor(self.config.image_vocabulary, self.config.image_token_id)
        options["logits_processor"] = LogitsProcessorList([text_only, *(logits_processor or [])])
        return super().generate(inputs, **options)

    def _without_image_guidance(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a call in which transformers guides no text by the generation config's `guidance_scale`."""
        if options["generation_config"] is None:
            return {**options, "guidance_scale": None}
        # None would be filled in from the model's own configuration.
        return self._configured(options, "guidance_scale", 1.0)

    # ---- images

    def get_image_settings(self, config: GenerationConfig | None = None, **given: Any) -> dict[str, Any]:
        """
        How images are sampled.

        Args:
            config ([`GenerationConfig`], *optional*): Defaults to the model's.
            given: `guidance_scale`, `guidance_schedule`, `image_guidance_scale`, `temperature`, `top_k`, `top_p`. What
                is missing or `None` comes from the config, else from [`IMAGE_DEFAULTS`].

        Raises:
            `ValueError`: on a setting that is no number in its range.
        """
        settings = image_settings(self.generation_config if config is None else config, given)
        lengths = [len(value) for value in settings.values() if isinstance(value, (list, tuple))]
        scale_plan([(1, 1)] * max(lengths, default=1), **settings)
        return settings

    def _supported_settings(
        self,
        config: GenerationConfig,
        given: dict[str, Any],
        negative_input_ids: torch.Tensor | None,
        imageless_input_ids: torch.Tensor | None,
    ) -> dict[str, Any]:
        """
        [`image_settings`], where guidance that only the config asks for is left out without an unconditional
        prompt. Guidance that the call asks for is an error then.
        """
        settings = image_settings(config, given)
        if given.get("image_guidance_scale") is None and imageless_input_ids is None:
            settings["image_guidance_scale"] = 1.0
        if given.get("guidance_scale") is None and negative_input_ids is None and guides(settings["guidance_scale"]):
            logger.warning_once(
                f"the generation config has guidance_scale={settings['guidance_scale']}, but without "
                "negative_input_ids the image is sampled without guidance: pass the unconditional prompt, which the "
                "processor makes (`apply_chat_template(..., generation_mode=...)`), or set the guidance to 1"
            )
            settings["guidance_scale"] = 1.0
        return settings

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        image_grids: torch.Tensor,
        callback: ScaleCallback | None = None,
        **kwargs,
    ) -> NextFlowImageGenerationOutput:
        r"""
        Draw one image per row. All rows share one schedule.

        Args:
            input_ids, attention_mask, image_grids, kwargs: As in [`~NextFlowGenerationMixin.stream_images`].
            callback (`Callable`, *optional*):
                Called after every scale with (index, step, codes (batch, codes so far)). May return the steps of the
                scales still to come, to change how they are drawn; without any, the images are previews.
        """
        for scale in self.stream_images(input_ids, attention_mask, image_grids=image_grids, **kwargs):
            if callback is not None:
                changed = callback(scale.index, scale.step, scale.image_codes)
                if changed is not None:
                    scale.plan[scale.index + 1 :] = changed
        _, target_grids = shared_schedule(input_ids, image_grids, self.config.boi_token_id)
        target_grids = target_grids.clone()
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
        guidance_scale: PerScale = None,
        guidance_schedule: str | None = None,
        image_guidance_scale: PerScale = None,
        temperature: PerScale = None,
        top_k: PerScale = None,
        top_p: PerScale = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Iterator[SampledScale]:
        r"""
        [`~NextFlowGenerationMixin.generate_images`] step by step: an iterator over the scales, each drawn when it is
        asked for. To stop, ask for no more.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, length)`): Prompts that end in `<boi>`, left-padded.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 at padding.
            image_grids (`torch.Tensor` of shape `(n_images, max_scales, 2)`):
                One row per `<boi>`, in reading order, that of the image to draw included.
            image_codes (`torch.Tensor` of shape `(total_codes,)`, *optional*): Codes of the images in the prompts.
            negative_input_ids, negative_attention_mask, negative_image_codes, negative_image_grids (*optional*):
                The unconditional prompts, in the same form, one row or `batch` rows. Needed where guidance is not 1.
                With as many images as the prompts, these are the prompts' unless said otherwise.
            imageless_input_ids, imageless_attention_mask, imageless_image_codes, imageless_image_grids (*optional*):
                The unconditional prompts without their source images. Needed where `image_guidance_scale` is not 1.
            prefix_codes (`torch.Tensor` of shape `(batch, codes)`, *optional*):
                Codes of the first scales, which are then taken as they are; the others are drawn after them.
            prefix_mask (`torch.Tensor` of shape `(batch, codes)`, *optional*):
                Which of `prefix_codes` are taken, all by default. The other cells of these scales are drawn.
            num_scales (`int`, *optional*): Draw only so many scales of the schedule: a preview.
            guidance_scale, temperature, top_k, top_p (`float`, `int` or a list with one entry per scale, *optional*):
                See [`ScaleStep`]. Default to the generation config's `guidance_scale`, `image_temperature`, ...
            guidance_schedule (`str`, *optional*): `"constant"`, `"linear"` or `"early"`; see [`scale_plan`].
            image_guidance_scale (`float` or list with one entry per scale, *optional*, defaults to 1.0):
                Guidance towards the source images, see [`guide`]. With it, `guidance_scale` is that of the text.
            generator (`torch.Generator` or list of them, *optional*):
                One, or one per row. With one per row, a row's codes do not depend on the other rows in float32; in
                lower precision they change where rounding, which does, turns the two best codes of a cell.

        Raises:
            `ValueError`: on what does not fit together, codes out of range, and logits that are not finite.
        """
        batch = len(input_ids)
        grids, target_grids = shared_schedule(input_ids, image_grids, self.config.boi_token_id)
        given = {
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "image_guidance_scale": image_guidance_scale,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        settings = self._supported_settings(self.generation_config, given, negative_input_ids, imageless_input_ids)
        plan = scale_plan(grids, **settings)
        if num_scales is not None and not 1 <= num_scales <= len(plan):
            raise ValueError(f"num_scales is {num_scales}, expected 1 to {len(plan)}, the scales of the schedule")
        plan = plan[:num_scales]
        generators = _one_per_row(generator, batch)
        prefix = split_prefix(prefix_codes, prefix_mask, grids, batch, self.config.codebook_size)
        conditions, boi = max(step.num_conditions for step in plan), self.config.boi_token_id
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
        multiple = 1 if self.graphs is None else PROMPT_LENGTHS
        rows = stack_rows(parts, pad_token_id=self.config.pad_token_id or 0, multiple=multiple)
        cells = sum(height * width for height, width in grids[1 : len(plan)])
        check_context(self.config, int(rows.attention_mask.sum(1).max()), cells)
        inputs = prepare_scales(plan, generators, prefix, input_ids.device)
        row_sets = [prefill_rows(self, rows, cells)]  # pyright: ignore[reportArgumentType]  # NextFlowForCausalLM's mixin
        return sample_scales(self, row_sets, plan, target_grids, inputs)  # pyright: ignore[reportArgumentType]  # as above

    def _generate_image(self, input_ids: torch.Tensor, options: dict[str, Any]) -> NextFlowImageGenerationOutput:
        options.pop("input_ids", None)
        names = ("logits_processor", "stopping_criteria", "streamer", "past_key_values", "inputs_embeds")
        refuse_options(options, "image", names)
        count = options.pop("num_return_sequences", None)
        # Names that transformers would take for the text's: here they are the image's, as in `generate_images`.
        settings = {name: options.pop(name, None) for name in IMAGE_DEFAULTS}
        if options.get("do_sample") is False and settings["temperature"] is None:
            settings["temperature"] = 0.0
        refuse_text_settings(options)
        config, arguments = self._prepare_generation_config(options.pop("generation_config"), **options)
        refuse_config(config, "image")
        prompts = (arguments.get(name) for name in ("negative_input_ids", "imageless_input_ids"))
        settings = self._supported_settings(config, settings, *prompts)
        arguments = {name: value for name, value in arguments.items() if value is not None}
        arguments = self._end_in_boi({**arguments, "input_ids": input_ids}, config)
        count = config.num_return_sequences if count is None else count
        if count > 1:
            input_ids, arguments = self._expand_inputs_for_generation(count, **arguments)
            arguments["input_ids"] = input_ids
        return self.generate_images(**settings, **arguments)

    def _end_in_boi(self, prompts: dict[str, Any], config: GenerationConfig) -> dict[str, Any]:
        """The arguments of `generate_images`: with a `<boi>` and its grids at the end of prompts that lack them."""
        boi = self.config.boi_token_id
        ends = prompts["input_ids"][:, -1] == boi
        target_grids = prompts.pop("target_grids", None)
        if ends.all():
            if target_grids is not None:
                raise ValueError("got target_grids, but the prompts end in <boi>: image_grids has their schedules")
            return prompts
        if ends.any():
            raise ValueError(f"{int(ends.sum())} of {len(ends)} prompts end in <boi>, expected all or none")
        images = prompts.get("image_codes"), prompts.get("image_grids")
        target_grids = find_target_grids(self.config, config, prompts["input_ids"], *images, target_grids)
        for prefix in ("", "negative_", "imageless_"):
            prompts = append_boi(prompts, target_grids, boi, prefix)
        return {"image_grids": target_grids, **prompts}

    # ---- text and images

    def _generate_interleaved(
        self, input_ids: torch.Tensor, options: dict[str, Any]
    ) -> NextFlowInterleavedGenerationOutput:
        options.pop("input_ids", None)
        refuse_options(options, "interleaved", ("inputs_embeds", "image_guidance_scale"))
        names = ("target_grids", "generator", "streamer", "stop_at_image", "tokenizer")
        target_grids, generator, streamer, stop_at_image, tokenizer = (options.pop(name, None) for name in names)
        negative = {
            name: options.pop(f"negative_{name}", None)
            for name in ("input_ids", "attention_mask", "image_codes", "image_grids")
        }
        if input_ids is None or (input_ids[:, -1] == self.config.boi_token_id).any():
            raise ValueError(
                "interleaved generation begins images itself: it needs input_ids that do not end in <boi> (use "
                'generation_mode="image" to draw one right away)'
            )
        self._check_no_images(input_ids, options)
        settings = {name: value for name, value in options.items() if name != "generation_config"}
        config, arguments = self._prepare_generation_config(options["generation_config"], **settings)
        refuse_config(config, "interleaved")
        if config.stop_strings is not None:
            if tokenizer is None:
                raise ValueError(f"stop_strings are text, got {config.stop_strings!r}: pass the tokenizer, too")
            criteria = [*(options["stopping_criteria"] or []), StopStringCriteria(tokenizer, config.stop_strings)]
            options = self._configured(options, "stop_strings")
            options["stopping_criteria"] = StoppingCriteriaList(criteria)
        if config.num_return_sequences > 1:
            input_ids, arguments, target_grids, options = self._repeat_prompts(
                input_ids, arguments, target_grids, options, config.num_return_sequences
            )
        max_images = getattr(config, "max_images", None)  # a plain `GenerationConfig` has none
        max_images = DEFAULT_MAX_IMAGES if max_images is None else max_images
        if max_images < 0:
            raise ValueError(f"max_images is {max_images}, expected at least 0")
        if max_images == 0 and target_grids is None:
            target_grids = input_ids.new_zeros(1, self.config.max_scales, 2)
        images = arguments.get("image_codes"), arguments.get("image_grids")
        target_grids = find_target_grids(self.config, config, input_ids, *images, target_grids)
        has_images = max_images and not stop_at_image
        given = {"guidance_scale": options.get("guidance_scale")} if has_images else IMAGE_DEFAULTS
        image_settings = self._supported_settings(config, given, negative["input_ids"], None)
        options = self._without_image_guidance({**options, "guidance_scale": None})

        def plan_for(grids: list[tuple[int, int]]) -> list[ScaleStep]:
            return scale_plan(grids, names=CONFIG_NAMES, **image_settings)

        plans = [plan_for(schedule_of(row)) for row in target_grids] if has_images else []
        drawing = ImagePlan(
            target_grids,
            plan_for,
            _one_per_row(generator, len(input_ids)),
            max_images,
            stop_at_image=bool(stop_at_image),
        )
        if any(step.guidance_scale != 1 for plan in plans for step in plan):
            drawing.negative = self._negative_context(input_ids, *images, target_grids, negative)
        if streamer is not None:
            streamer = TextStreamer(streamer, self._is_text)
        decode = functools.partial(generate_interleaved, drawing=drawing, streamer=streamer)
        output = super().generate(input_ids, custom_generate=decode, streamer=streamer, **options)
        return output  # pyright: ignore[reportReturnType]  # what `decode` returns

    def _repeat_prompts(self, input_ids, arguments, target_grids, options, count):
        """The same call with `count` rows for each prompt, which transformers then need not expand."""
        if target_grids is not None and len(target_grids) > 1:
            target_grids = target_grids.repeat_interleave(count, dim=0)
        input_ids, arguments = self._expand_inputs_for_generation(count, input_ids=input_ids, **arguments)
        options = {**options, **{name: value for name, value in arguments.items() if name in options}}
        return input_ids, arguments, target_grids, self._configured(options, "num_return_sequences", 1)

    def _configured(self, options: dict[str, Any], name: str, value: Any = None) -> dict[str, Any]:
        """The options of a call with one setting of its generation config changed."""
        base = self.generation_config if options["generation_config"] is None else options["generation_config"]
        config = copy.deepcopy(base)
        setattr(config, name, value)
        return {key: given for key, given in options.items() if key != name} | {"generation_config": config}

    def _negative_context(
        self,
        input_ids: torch.Tensor,
        image_codes: torch.Tensor | None,
        image_grids: torch.Tensor | None,
        target_grids: torch.Tensor,
        negative: dict[str, torch.Tensor | None],
    ) -> PromptRows:
        """The unconditional prompts with a `<boi>` at their end, one for each prompt."""
        boi = self.config.boi_token_id
        if negative["input_ids"] is not None and (negative["input_ids"][:, -1] == boi).any():
            raise ValueError("in interleaved mode negative_input_ids must not end in <boi>: it is put there")
        prompts = {"input_ids": input_ids, "image_codes": image_codes, "image_grids": image_grids}
        prompts = append_boi(prompts, target_grids, boi)
        grids = target_grids if image_grids is None else prompts["image_grids"]
        rows = PromptRows.of(prompts["input_ids"], None, image_codes, grids)
        return negative_rows(rows, boi, **append_boi(negative, target_grids, boi))

    def _is_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        images = self.config.image_vocabulary
        is_image = (token_ids >= images.start) & (token_ids < images.stop) | (token_ids == self.config.image_token_id)
        return ~is_image

    def _check_no_images(self, input_ids: torch.Tensor | None, options: dict[str, Any]) -> None:
        """Raise where tokens that are not in the cache yet are an image's, and nothing says whose."""
        if options.get("image_grids") is not None or options.get("inputs_embeds") is not None:
            return
        if input_ids is None or input_ids.ndim != 2:  # transformers says what is wrong
            return
        cache, mask = options.get("past_key_values"), options.get("attention_mask")
        is_whole = mask is None or mask.shape[1] == input_ids.shape[1]
        cached = 0 if cache is None or not is_whole else int(cache.get_seq_length())
        self.model.check_no_images(input_ids[:, cached:])

    def _check_room(self, input_ids: torch.Tensor | None, options: dict[str, Any]) -> None:
        """Raise where a prompt leaves no room for a token. Of text that gets too long transformers warns."""
        prompts = options.get("attention_mask")
        prompts = next((one for one in (prompts, input_ids, options.get("inputs_embeds")) if one is not None), None)
        if prompts is None or prompts.ndim < 2:
            return
        is_mask = prompts is options.get("attention_mask") and prompts.ndim == 2
        check_context(self.config, int(prompts.sum(1).max()) if is_mask else prompts.shape[1], 1)

    # ---- transformers' hooks

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # Overwritten: images take one step of the rotary text axis per scale, so the axes run apart.
        if model_kwargs.get("image_grids") is None:
            positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
            cache = model_kwargs.get("past_key_values")
            place = CachePlace.of(cache)
            if positions.ndim != 2 or place is None or not cache.get_seq_length():
                return positions
            # On top of images that the cache holds: only the new tokens' places are read.
            positions = positions.float().expand(4, len(inputs_tensor), -1)
            ahead = place.steps_ahead(cache, len(inputs_tensor))
            return torch.cat([positions[:1], positions[1:] + ahead])
        input_ids = self._prompt_ids(model_kwargs.get("input_ids", inputs_tensor), model_kwargs.get("inputs_embeds"))
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, expected that of input_ids, {tuple(input_ids.shape)}: "
                "with images, a call that goes on from past_key_values takes the whole input_ids"
            )
        return self.model.get_position_ids(input_ids, image_grids=model_kwargs["image_grids"], attention_mask=mask)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        # Overwritten: a dynamic cache grows in place, not by a copy of itself at every token.
        is_given = model_kwargs.get("past_key_values") is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if type(cache) is DynamicCache and not is_given:
            reserve(cache, 0)

    def _prompt_ids(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """The prompt's tokens or, where there are only embeddings, those of its images among zeros."""
        if inputs_embeds is not None and (input_ids is None or input_ids.shape[1] < inputs_embeds.shape[1]):
            return self.model.get_placeholder_ids(inputs_embeds)
        assert input_ids is not None  # one of the two is there
        return input_ids

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        use_cache=True,
        **kwargs,
    ):
        image_grids = kwargs.get("image_grids")
        if image_grids is not None and not is_first_iteration and use_cache:
            # An assistant model's first iteration does not count as one: then nothing is in its cache.
            if past_key_values is not None and past_key_values.get_seq_length():
                image_grids = kwargs["image_codes"] = kwargs["image_grids"] = None
        if image_grids is not None:
            prompt_ids = self._prompt_ids(input_ids, inputs_embeds if is_first_iteration else None)
            if next_sequence_length is not None:  # some images are in the cache
                kwargs["image_codes"], kwargs["image_grids"] = self._images_after(
                    prompt_ids, next_sequence_length, kwargs.get("image_codes"), image_grids
                )
                prompt_ids = prompt_ids[:, -next_sequence_length:]
            if past_key_values is not None and past_key_values.is_compileable and kwargs["image_grids"] is not None:
                # For such a cache transformers builds the mask itself, and knows nothing of blocks.
                attention_mask = get_attention_mask(
                    self.config,
                    torch.empty(*prompt_ids.shape, 0, dtype=self.dtype, device=prompt_ids.device),
                    attention_mask,
                    kwargs["position_ids"][..., -prompt_ids.shape[1] :],
                    past_key_values,
                    self.model.get_image_layout(prompt_ids, kwargs["image_grids"]),
                )
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            past_key_values,
            attention_mask,  # pyright: ignore[reportArgumentType]  # what `forward` takes, and here passes through
            inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        image_grids = kwargs.get("image_grids")
        if image_grids is not None:  # transformers drops them where the iteration is not the first
            assert isinstance(inputs, dict)
            inputs.setdefault("image_grids", image_grids.to(input_ids.device))
        return inputs

    def _images_after(
        self,
        input_ids: torch.Tensor,
        length: int,
        image_codes: torch.Tensor | None,
        image_grids: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Codes and grids of the images in the last `length` tokens. The others are in the cache: their grids are needed,
        but their codes need not be given.
        """
        is_boi = input_ids == self.config.boi_token_id
        counts = is_boi[:, -length:].sum(1).tolist()
        if not any(counts):
            return None, None
        check_image_count(is_boi, image_grids)
        rows = image_grids.split(is_boi.sum(1).tolist())
        rows = [row[len(row) - count :] for row, count in zip(rows, counts)]
        is_open = is_boi[:, -1].tolist()
        sizes = [int(row[: len(row) - opens].prod(-1).sum()) for row, opens in zip(rows, is_open)]
        if image_codes is None or len(image_codes) != sum(sizes):
            codes, _ = split_images(input_ids, image_codes, image_grids, boi_token_id=self.config.boi_token_id)
            image_codes = torch.cat([row[len(row) - size :] for row, size in zip(codes, sizes)])
        return image_codes, torch.cat(rows)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # Overwritten: images lie flat over the batch, those of a row are repeated together.
        repeated = {}
        for prefix in ("", "negative_", "imageless_"):
            image_codes, image_grids = (
                model_kwargs.pop(f"{prefix}{name}", None) for name in ("image_codes", "image_grids")
            )
            if image_grids is not None and expand_size > 1:
                ids = model_kwargs.get(f"{prefix}input_ids")
                if not prefix:
                    ids = self._prompt_ids(input_ids, model_kwargs.get("inputs_embeds"))
                assert ids is not None  # images come with tokens
                rows = split_images(ids, image_codes, image_grids, boi_token_id=self.config.boi_token_id)
                image_codes, image_grids = (
                    torch.cat([row for row in by_row for _ in range(expand_size)]) for by_row in rows
                )
            repeated |= {f"{prefix}image_codes": image_codes, f"{prefix}image_grids": image_grids}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        given = {name: value for name, value in repeated.items() if value is not None}
        return input_ids, {**model_kwargs, **given}


def _one_per_row(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> list[torch.Generator | None]:
    generators: list[torch.Generator | None] = (
        [generator] * batch if not isinstance(generator, Sequence) else [*generator]
    )
    if len(generators) != batch:
        raise ValueError(f"got {len(generators)} generators for a batch of {batch}: pass one, or one per image")
    return generators


__all__ = [
    "NextFlowGenerationConfig",
    "NextFlowGenerationMixin",
    "NextFlowImageGenerationOutput",
    "NextFlowInterleavedGenerationOutput",
    "ScaleStep",
    "guide",
    "sample_codes",
    "scale_plan",
]
