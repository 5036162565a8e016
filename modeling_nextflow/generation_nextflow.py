"""`generate` in three modes: text by transformers' own machinery, an image, or text with images in between (§2.2).

What a call means is decided here, and what makes no sense is refused. The work is done in
generation_image_nextflow.py and generation_interleaved_nextflow.py. Knows codes, not pixels.
"""

import copy
import functools
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

from .attention_nextflow import CachePlace, get_attention_mask, reserve
from .configuration_nextflow import NextFlowConfig
from .generation_configuration_nextflow import (
    NextFlowGenerationConfig,
    refuse_config,
    refuse_options,
    refuse_text_settings,
)
from .generation_image_nextflow import (
    NextFlowImageGeneration,
    NextFlowImageGenerationOutput,
    PromptRows,
    check_context,
    negative_rows,
)
from .generation_interleaved_nextflow import (
    ImagePlan,
    NextFlowInterleavedGenerationOutput,
    TextStreamer,
    generate_interleaved,
    keep_text,
)
from .grids_nextflow import Schedule, check_image_count, get_image_layout, schedules_from_grids
from .image_settings_nextflow import CONFIG_NAMES, DEFAULT_MAX_IMAGES, IMAGE_DEFAULTS
from .prompt_rows_nextflow import append_boi, find_target_grids, split_images
from .sampling_nextflow import ScaleStep, one_per_row, scale_plan


logger = logging.get_logger(__name__)

GENERATION_MODES = ("text", "image", "interleaved")


class TextOnlyLogitsProcessor(LogitsProcessor):
    """Text mode: no image code, `<boi>`, `<eoi>` or placeholder can be sampled."""

    def __init__(self, config: NextFlowConfig):
        self.config = config

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return keep_text(scores, self.config)


class NextFlowGenerationMixin(NextFlowImageGeneration, GenerationMixin):
    """`generate` in three modes."""

    def adjust_generation_fn(self, generation_config: GenerationConfig | None = None, *args, **kwargs) -> None:
        """transformers' method, which leaves a [`NextFlowGenerationConfig`] on the model."""
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
        Write text, sample images, or both.

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
                Schedules of the images to sample, where no row of `image_grids` says so. Defaults to that of the last
                image of the prompt, then to `image_target_grids` of the generation config.
            negative_input_ids (`torch.Tensor` of shape `(batch or 1, length)`, *optional*):
                Unconditional prompts, where `guidance_scale` is not 1. Without them, guidance of the generation
                config is left out with a warning, and guidance of the call is an error.
            generator (`torch.Generator` or list of them, *optional*):
                One, or one a row. In interleaved mode it also samples the text.
            stop_at_image (`bool`, *optional*, defaults to `False`):
                In interleaved mode a row ends with its first `<boi>`, and no image is sampled. The sequences, with a
                row of `image_grids` for each `<boi>`, are prompts for `"image"` mode.

        Returns:
            In `"image"` mode [`NextFlowImageGenerationOutput`], in `"interleaved"` mode
            [`NextFlowInterleavedGenerationOutput`]: token ids alone would lose the images.

        Raises:
            `ValueError`: for an unknown `generation_mode`, for options that the mode does not take, and where prompts
            end in `<boi>` in another mode than `"image"`.
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
        input_ids = kwargs.get("input_ids", inputs)
        self._check_no_images(input_ids, kwargs)
        self._check_room(input_ids, kwargs)
        if input_ids is not None and input_ids.ndim == 2 and (input_ids[:, -1:] == self.config.boi_token_id).any():
            raise ValueError('prompts end in <boi>, which an image follows: pass generation_mode="image"')
        if options.get("guidance_scale") is None:  # transformers would guide text by that of images
            options = self._without_image_guidance(options)
        options["logits_processor"] = LogitsProcessorList(
            [TextOnlyLogitsProcessor(self.config), *(logits_processor or [])]
        )
        return super().generate(inputs, **options)

    def _without_image_guidance(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a call in which transformers guides no text by the generation config's `guidance_scale`."""
        if options["generation_config"] is None:
            return {**options, "guidance_scale": None}
        # None would be filled in from the model's own configuration.
        return self._configured(options, "guidance_scale", 1.0)

    # ---- images

    def _generate_image(self, input_ids: torch.Tensor, options: dict[str, Any]) -> NextFlowImageGenerationOutput:
        options.pop("input_ids", None)
        if input_ids is None or input_ids.ndim != 2:
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"input_ids have the shape {shape}, expected (batch, length): the prompts of the images")
        names = ("logits_processor", "stopping_criteria", "streamer", "past_key_values", "inputs_embeds")
        refuse_options(options, "image", names)
        count = options.pop("num_return_sequences", None)
        # Names that transformers would take for the text's: here they are the image's, as in `generate_images`.
        settings = {name: options.pop(name, None) for name in IMAGE_DEFAULTS}
        # Greedy decoding of an image takes the best code of each cell.
        if options.get("do_sample") is False and settings["temperature"] is None:
            settings["temperature"] = 0.0
        refuse_text_settings(options)
        config, arguments = self._prepare_generation_config(options.pop("generation_config"), **options)
        refuse_config(config, "image")
        is_guided = (arguments.get(f"{name}_input_ids") is not None for name in ("negative", "imageless"))
        settings = self.get_image_settings(config, *is_guided, **settings)
        arguments = {name: value for name, value in arguments.items() if value is not None}
        arguments = self._end_in_boi({**arguments, "input_ids": input_ids}, config)
        count = config.num_return_sequences if count is None else count
        # Copies are rows like any other: a list of generators has one for each.
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
        # Rows share one batch, in which the image to sample has its place at the end of each.
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
                'generation_mode="image" to sample one right away)'
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
            arguments |= {f"negative_{name}": value for name, value in negative.items()}
            input_ids, arguments, target_grids, options = self._repeat_prompts(
                input_ids, arguments, target_grids, options, config.num_return_sequences
            )
            negative = {name: arguments.pop(f"negative_{name}", None) for name in negative}
        max_images = getattr(config, "max_images", None)  # a plain `GenerationConfig` has none
        max_images = DEFAULT_MAX_IMAGES if max_images is None else max_images
        if max_images < 0:
            raise ValueError(f"max_images is {max_images}, expected at least 0")
        if max_images == 0 and target_grids is None:  # nothing needs a size
            target_grids = input_ids.new_zeros(1, self.config.max_scales, 2)
        images = arguments.get("image_codes"), arguments.get("image_grids")
        target_grids = find_target_grids(self.config, config, input_ids, *images, target_grids)
        has_images = max_images and not stop_at_image
        given = {"guidance_scale": options.get("guidance_scale")} if has_images else IMAGE_DEFAULTS
        image_settings = self.get_image_settings(config, negative["input_ids"] is not None, False, **given)
        options = self._without_image_guidance({**options, "guidance_scale": None})  # text is unguided

        def plan_for(grids: Schedule) -> list[ScaleStep]:
            return scale_plan(grids, CONFIG_NAMES, **image_settings)

        plans = [plan_for(grids) for grids in schedules_from_grids(target_grids)] if has_images else []
        image_plan = ImagePlan(
            target_grids,
            plan_for,
            one_per_row(generator, len(input_ids)),
            max_images,
            stop_at_image=bool(stop_at_image),
        )
        if any(step.guidance_scale != 1 for plan in plans for step in plan):
            image_plan.negative = self._negative_context(input_ids, *images, target_grids, negative)
        if streamer is not None:
            streamer = TextStreamer(streamer, self._is_text)
        decode = functools.partial(generate_interleaved, image_plan=image_plan, streamer=streamer)
        output = super().generate(input_ids, custom_generate=decode, streamer=streamer, **options)
        return output  # pyright: ignore[reportReturnType]  # what `decode` returns

    def _repeat_prompts(self, input_ids, arguments, target_grids, options, count):
        """The same call with `count` rows for each prompt, which transformers then need not expand."""
        if target_grids is not None and len(target_grids) > 1:
            target_grids = target_grids.repeat_interleave(count, dim=0)
        input_ids, arguments = self._expand_inputs_for_generation(count, input_ids=input_ids, **arguments)
        # Only what the caller passed: `generate` prepares everything else again.
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
        # A mask longer than the tokens says that these are only the new ones.
        is_whole = mask is None or mask.shape[1] == input_ids.shape[1]
        cached = 0 if cache is None or not is_whole else int(cache.get_seq_length())
        self.model.check_no_images(input_ids[:, cached:])

    def _check_room(self, input_ids: torch.Tensor | None, options: dict[str, Any]) -> None:
        """Raise where a prompt leaves no room for a token. Of text that gets too long transformers warns."""
        prompts = options.get("attention_mask")
        prompts = next((one for one in (prompts, input_ids, options.get("inputs_embeds")) if one is not None), None)
        if prompts is None or prompts.ndim < 2:
            return
        # A 2D mask tells tokens from padding; of anything else the length counts.
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
        """transformers' method; images that the cache does not hold yet come with their tokens."""
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
                    get_image_layout(self.config, prompt_ids, kwargs["image_grids"]),
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
        # The image of a `<boi>` that ends its row has grids, but no codes yet.
        sizes = [int(row[: len(row) - opens].prod(-1).sum()) for row, opens in zip(rows, is_open)]
        if image_codes is None or len(image_codes) != sum(sizes):
            codes, _ = split_images(input_ids, image_codes, image_grids, boi_token_id=self.config.boi_token_id)
            image_codes = torch.cat([row[len(row) - size :] for row, size in zip(codes, sizes)])
        return image_codes, torch.cat(rows)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # Overwritten: images lie flat over the batch, those of a row are repeated together.
        repeated = {}
        prompts = model_kwargs.get("inputs_embeds") if input_ids is None else input_ids
        for prefix in ("", "negative_", "imageless_"):
            own_ids = model_kwargs.get(f"{prefix}input_ids")
            if prefix and own_ids is not None and prompts is not None and len(own_ids) == 1 < len(prompts):
                # One for all stays one.
                names = [name for name in model_kwargs if name.startswith(prefix)]
                repeated |= {name: model_kwargs.pop(name) for name in names}
                continue
            image_codes, image_grids = (
                model_kwargs.pop(f"{prefix}{name}", None) for name in ("image_codes", "image_grids")
            )
            if image_grids is not None and expand_size > 1:
                if not prefix:
                    own_ids = self._prompt_ids(input_ids, model_kwargs.get("inputs_embeds"))
                assert own_ids is not None  # images come with tokens
                # transformers would repeat each code and each grid by itself, not the images of a row together.
                rows = split_images(own_ids, image_codes, image_grids, boi_token_id=self.config.boi_token_id)
                image_codes, image_grids = (
                    torch.cat([row for row in by_row for _ in range(expand_size)]) for by_row in rows
                )
            repeated |= {f"{prefix}image_codes": image_codes, f"{prefix}image_grids": image_grids}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        given = {name: value for name, value in repeated.items() if value is not None}
        return input_ids, {**model_kwargs, **given}
