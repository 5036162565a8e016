"""Prompts of images: from messages to the rows that the transformer samples from, and from its codes to pixels.

The components meet here through data alone: tokens, `image_grids`, `image_codes`, pixels. Knows nothing of the
lifecycle of a call.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from .helpers_nextflow import SharedComponentsMixin, call_component, check_numbers, given, one_per_prompt, warn_once


Image = PIL.Image.Image | str | Path | np.ndarray | torch.Tensor
PerScale = float | int | Sequence[float | int | None]


@dataclass
class NextFlowImagePrompt:
    """
    One image to sample, ready for the transformer.

    Args:
        input_ids (`torch.Tensor` of shape `(length,)`): The prompt, ending in `<boi>`.
        image_grids (`torch.Tensor` of shape `(sources + 1, max_scales, 2)`):
            Schedules of the source images, then of the image to sample.
        image_codes (`torch.Tensor` of shape `(total_codes,)`): Codes of the source images.
        negative_input_ids (`torch.Tensor` of shape `(length,)`, *optional*): The unconditional prompt.
        imageless ([`NextFlowImagePrompt`], *optional*): The unconditional prompt without the user's images.
        prefix_codes (`torch.Tensor` of shape `(codes,)`, *optional*): Given codes of the first scales.
        prefix_mask (`torch.Tensor` of shape `(codes,)`, *optional*): Which of them are kept, all by default.
        num_scales (`int`, *optional*): Scales to sample, all by default.
    """

    input_ids: torch.Tensor
    image_grids: torch.Tensor
    image_codes: torch.Tensor
    negative_input_ids: torch.Tensor | None = None
    imageless: "NextFlowImagePrompt | None" = None
    prefix_codes: torch.Tensor | None = None
    prefix_mask: torch.Tensor | None = None
    num_scales: int | None = None

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The schedule of the image to sample."""
        return schedule_of(self.image_grids[-1])

    @property
    def is_given(self) -> bool:
        """Whether all codes are given, so that nothing is left to sample."""
        if self.prefix_codes is None or self.prefix_mask is not None:
            return False
        return len(self.prefix_codes) >= num_cells(self.grids[: self.num_scales])

    def count_scales(self, codes: torch.Tensor) -> int:
        """Scales that `codes` (codes,) of the image make up."""
        cells = np.cumsum([height * width for height, width in self.grids])
        return int(np.searchsorted(cells, len(codes))) + 1


def group_prompts(prompts: Sequence[NextFlowImagePrompt]) -> list[list[int]]:
    """Indices of the images that are sampled together: those of one schedule, and with as much given."""
    groups: dict[tuple, list[int]] = {}
    for index, prompt in enumerate(prompts):
        given = 0 if prompt.prefix_codes is None else len(prompt.prefix_codes)
        groups.setdefault((tuple(prompt.grids), given), []).append(index)
    return list(groups.values())


def collate_prompts(
    prompts: Sequence[NextFlowImagePrompt], pad_token_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Inputs of the transformer for images of one schedule: the prompts and what guides them, padded on the left."""
    rows = {"": prompts}
    if prompts[0].negative_input_ids is not None:  # the same images; only the tokens differ
        rows["negative_"] = prompts
    if prompts[0].imageless is not None:
        rows["imageless_"] = [prompt.imageless for prompt in prompts]
    ids = [one.negative_input_ids if name == "negative_" else one.input_ids for name in rows for one in rows[name]]
    # All prompts at once, so that they have one length.
    padded, mask = (
        pad_sequence(values, batch_first=True, padding_value=filler, padding_side="left").split(len(prompts))
        for values, filler in ((ids, pad_token_id), ([torch.ones_like(row) for row in ids], 0))
    )
    inputs = {}
    for index, (name, members) in enumerate(rows.items()):
        target_grids = [prompt.image_grids[-1:] for prompt in prompts]
        grids = [part for one, own in zip(members, target_grids) for part in (one.image_grids[:-1], own)]
        inputs[f"{name}input_ids"], inputs[f"{name}attention_mask"] = padded[index], mask[index]
        inputs[f"{name}image_grids"] = torch.cat(grids)
        inputs[f"{name}image_codes"] = torch.cat([one.image_codes for one in members])
    for name in ("prefix_codes", "prefix_mask"):
        if getattr(prompts[0], name) is not None:
            inputs[name] = torch.stack([getattr(prompt, name) for prompt in prompts])
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def check_prompts(
    prompt: Any, image: Any, messages: Any, negative_prompt: Any, image_codes: Any, image_grids: Any
) -> None:
    """Raises `ValueError` or `TypeError` where the inputs of a call do not fit together."""
    if prompt is not None and messages is not None:
        raise ValueError("pass exactly one of `prompt` and `messages`, got both")
    if prompt is None and messages is None and image_codes is None:
        raise ValueError(
            "pass exactly one of `prompt` and `messages`, got neither (only `image_codes` are decoded without)"
        )
    if messages is not None and image is not None:
        raise ValueError('`image` goes with `prompt`: in `messages` an image is {"type": "image", "image": ...}')
    for name, value in given(prompt=prompt, negative_prompt=negative_prompt).items():
        texts = [value] if isinstance(value, str) else value
        if not (isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts)):
            raise TypeError(f"`{name}` is {value!r}, expected a string or a non-empty list of strings")
    if (image_codes is None) != (image_grids is None):
        missing = "image_codes" if image_codes is None else "image_grids"
        raise ValueError(f"`image_codes` and `image_grids` go together, got no `{missing}`")


def check_size(
    height: int | None = None, width: int | None = None, aspect_ratio: str | None = None, resolution: int | None = None
) -> None:
    """Raises `ValueError` where a size is half given or given twice."""
    check_numbers(height=height, width=width, resolution=resolution)
    if (height is None) != (width is None):
        raise ValueError(f"`height` is {height} and `width` is {width}, expected both or neither")
    if height is not None and aspect_ratio is not None:
        raise ValueError(f"got `height`, `width` and `aspect_ratio` ({aspect_ratio!r}): pass one of the two forms")


def check_only_decodes(num_images_per_prompt: int, others: dict[str, Any]) -> None:
    """Raises `ValueError` where a call without a prompt says more than which codes to decode."""
    names = [*others, *(["num_images_per_prompt"] if num_images_per_prompt != 1 else [])]
    if names:
        raise ValueError(
            f"got {names} with `image_codes` and neither `prompt` nor `messages`: without them codes are only decoded"
        )


def guides(scale: PerScale) -> bool:
    """Whether a guidance scale asks for an unconditional pass at any scale."""
    return any(value not in (None, 1) for value in (scale if isinstance(scale, (list, tuple)) else [scale]))


def build_messages(prompt: str | list[str], image: Any = None) -> list[list[dict[str, Any]]]:
    """One conversation for every prompt: a user's message with the prompt's source images, then its text."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    images = list(image) if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4 else image
    if not isinstance(images, (list, tuple)):
        images = [images] * len(prompts)
    elif isinstance(prompt, str) and not any(isinstance(entry, (list, tuple)) for entry in images):
        images = [images]  # all are the sources of a single prompt; a list of prompts has one entry for each
    conversations = []
    for text, sources in zip(prompts, one_per_prompt("image", list(images), len(prompts)), strict=True):
        sources = [] if sources is None else sources if isinstance(sources, (list, tuple)) else [sources]
        parts = [{"type": "image", "image": source} for source in sources]
        conversations.append([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])
    return conversations


def has_user_image(conversation: list[dict[str, Any]]) -> bool:
    return any(
        part["type"] == "image"
        for message in conversation
        if message["role"] == "user" and not isinstance(message["content"], str)
        for part in message["content"]
    )


def schedule_of(image_grids: torch.Tensor) -> list[tuple[int, int]]:
    """A row (max_scales, 2) of `image_grids` as a list, without the zero rows past its last scale."""
    return [(height, width) for height, width in image_grids.tolist() if height > 0]


def num_cells(grids: Sequence[tuple[int, int]]) -> int:
    return sum(height * width for height, width in grids)


class NextFlowSteps(SharedComponentsMixin):
    """The steps of sampling images, each a method of the pipeline that users may call on their own."""

    transformer: PreTrainedModel
    vision_tokenizer: PreTrainedModel
    processor: ProcessorMixin
    do_classifier_free_guidance: bool
    _image_guidance_scale: PerScale

    def get_image_settings(self, **settings: Any) -> dict[str, Any]:
        """How images are sampled: as `settings` say, else as the transformer's generation config and defaults do."""
        return self.transformer.get_image_settings(**settings)

    @staticmethod
    def build_messages(prompt: str | list[str], image: Any = None) -> list[list[dict[str, Any]]]:
        """One conversation for every prompt: a user's message with the prompt's source images, then its text."""
        return build_messages(prompt, image)

    def encode_images(self, images: Any, *, resolution: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Codes (total_codes,) and schedules (images, max_scales, 2) of one or several images, each of its own shape:
        what the call takes as `image_codes` and `image_grids`.
        """
        options = {} if resolution is None else {"resolution": resolution}
        inputs = self.processor.image_processor(images, return_tensors="pt", **options)
        return self._encode_pixels(inputs["pixel_values"], inputs["image_grids"]), inputs["image_grids"]

    def _encode_pixels(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> torch.Tensor:
        device = self._execution_device
        pixel_values = pixel_values.to(device, self.vision_tokenizer.dtype)
        return call_component(self.vision_tokenizer, "encode", pixel_values, image_grids.to(device)).image_codes

    def encode_messages(
        self,
        conversations: list[list[dict[str, Any]]],
        negative_conversations: list[list[dict[str, Any]]] | None = None,
        *,
        imageless_conversations: list[list[dict[str, Any]]] | None = None,
        keep_first_size: bool = False,
        **size: Any,
    ) -> list[NextFlowImagePrompt]:
        """
        Tokens of every conversation, and codes of its images.

        Args:
            conversations (`list[list[dict]]`): Messages, each conversation ending where the image is to be sampled.
            negative_conversations (`list[list[dict]]`, *optional*): The unconditional ones, with the same images.
            imageless_conversations (`list[list[dict]]`, *optional*): Those without the user's images, too.
            keep_first_size (`bool`, *optional*, defaults to `False`):
                Sample at the size of a conversation's first image. Else the processor decides: `size`, the
                conversation's last image, or a square.
            size: `height` and `width`, or `aspect_ratio`, and `resolution` of the image to sample.
        """
        options = {"tokenize": True, "return_dict": True, "generation_mode": "image", "negative_prompt": None}
        count, negative = len(conversations), negative_conversations or []
        rows = [*conversations, *negative, *(imageless_conversations or [])]
        inputs = self.processor.apply_chat_template(rows, **options, padding=False, return_tensors=None, **size)
        ids = [torch.tensor(row) for row in inputs["input_ids"]]
        counts = [row.count(self.processor.boi_token_id) for row in inputs["input_ids"]]
        grids = torch.tensor(inputs["image_grids"]).split(counts)
        if counts[count:][: len(negative)] != counts[: len(negative)]:
            raise ValueError("the unconditional prompts have other images than the prompts, expected the same")

        # The images of unconditional prompts are those of the prompts, or some of them.
        encoded = [*range(count), *range(count + len(negative), len(rows))]
        sources = torch.cat([grids[row][:-1] for row in encoded])
        codes = sources.new_zeros(0)
        if len(sources):
            row_of_image = [row for row, part in enumerate(grids) for _ in part[:-1]]
            pixels = zip(row_of_image, inputs["pixel_values"], strict=True)
            pixels = torch.stack([torch.as_tensor(one) for row, one in pixels if row in encoded])
            codes = self._encode_pixels(pixels, sources)
        codes = codes.split([int(grids[row][:-1].prod(-1).sum()) for row in encoded])
        prompts = [NextFlowImagePrompt(ids[row], grids[row], own) for row, own in zip(encoded, codes, strict=True)]
        prompts, imageless = prompts[:count], prompts[count:]
        for index, prompt in enumerate(prompts):
            prompt.negative_input_ids = ids[count + index] if negative else None
            prompt.imageless = imageless[index] if imageless else None
            if keep_first_size and len(prompt.image_grids) > 1:
                first = self.processor.target_image_grids(prompt.image_grids[:1])
                prompt.image_grids = torch.cat([prompt.image_grids[:-1], first])
        return prompts

    def encode_prompts(
        self,
        prompt: str | list[str] | None,
        image: Any,
        messages: list | None,
        negative_prompt: str | list[str] | None,
        image_guidance_scale: PerScale | None,
        think: bool,
        size: dict[str, Any],
    ) -> list[NextFlowImagePrompt]:
        """Each prompt's tokens, the codes of its images, and the unconditional prompts that guidance needs."""
        processor = self.processor
        conversations = build_messages(prompt, image) if messages is None else processor.as_conversations(messages)[0]
        texts = one_per_prompt("negative_prompt", negative_prompt or "", len(conversations))
        if guides(self._image_guidance_scale):
            self._check_user_images(conversations, image_guidance_scale)
        unconditional = {}
        if self.do_classifier_free_guidance:
            unconditional["negative_conversations"] = list(map(processor.unconditional_messages, conversations, texts))
        if guides(self._image_guidance_scale):
            imageless = functools.partial(processor.unconditional_messages, keep_images=False)
            unconditional["imageless_conversations"] = list(map(imageless, conversations, texts))
        if think:
            conversations = list(map(processor.with_thinking_prompt, conversations))
        keep_first_size = messages is None and not size.keys() - {"resolution"}
        return self.encode_messages(conversations, **unconditional, keep_first_size=keep_first_size, **size)

    def _check_user_images(self, conversations: list[list[dict[str, Any]]], image_guidance_scale: Any) -> None:
        """Guidance towards images that a prompt does not have: an error, or left out where the model's own says it."""
        missing = sum(not has_user_image(one) for one in conversations)
        if missing and image_guidance_scale is None:
            self._image_guidance_scale = 1.0
        elif missing:
            raise ValueError(
                f"`image_guidance_scale` is {self._image_guidance_scale}, which guides towards the user's images, but "
                f"{missing} of {len(conversations)} prompts have none"
            )

    def known_resolution(self, resolution: int, height: int | None) -> int | None:
        """`resolution`, or the nearest that the model has: engines send a default of their own."""
        check_numbers(resolution=resolution)
        known = self.processor.image_processor.schedule.resolutions
        if resolution in known:
            return resolution
        if height is not None:
            warn_once(f"`resolution` is {resolution}, which is none of {known}: `height` and `width` say the size")
            return None
        nearest = min(known, key=lambda one: abs(math.log(one / resolution)))
        warn_once(f"`resolution` is {resolution}, which is none of {known}: the nearest is taken, {nearest}")
        return nearest

    def generate_codes(
        self,
        prompts: list[NextFlowImagePrompt],
        *,
        generators: list[torch.Generator] | None = None,
        callback: Callable | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        """
        Codes (images, codes) of images that share one schedule. Fewer than the schedule has where `callback`, the
        transformer's, stopped early. `settings` as in [`~NextFlowPipeline.get_image_settings`].
        """
        inputs = collate_prompts(prompts, self.processor.tokenizer.pad_token_id, self._execution_device)
        inputs |= {**settings, "generator": generators, "callback": callback}
        output = call_component(self.transformer, "generate_images", **inputs)
        return output.image_codes.view(len(prompts), -1)

    def stream_codes(
        self,
        prompts: list[NextFlowImagePrompt],
        *,
        generators: list[torch.Generator] | None = None,
        **settings: Any,
    ) -> Iterator[Any]:
        """[`~NextFlowPipeline.generate_codes`] step by step: the transformer's iterator over the scales."""
        inputs = collate_prompts(prompts, self.processor.tokenizer.pad_token_id, self._execution_device)
        inputs |= {**settings, "generator": generators}
        return call_component(self.transformer, "stream_images", **inputs)

    def decode_codes(
        self,
        image_codes: torch.Tensor,
        image_grids: torch.Tensor,
        *,
        num_scales: int | None = None,
        output_type: str = "pil",
    ) -> list[PIL.Image.Image] | list[np.ndarray] | list[torch.Tensor]:
        """
        Images of codes (total_codes,) under their whole schedules (images, max_scales, 2). With `num_scales` the codes
        of the first scales are enough: a preview at full size.
        """
        device = self._execution_device
        image_codes, image_grids = image_codes.to(device), image_grids.to(device)
        pixel_values = call_component(self.vision_tokenizer, "decode", image_codes, image_grids, num_scales=num_scales)
        return self.processor.image_processor.post_process_images(
            pixel_values.float().cpu(), image_grids.cpu(), output_type=output_type
        )


__all__ = [
    "Image",
    "NextFlowImagePrompt",
    "NextFlowSteps",
    "PerScale",
    "build_messages",
    "check_only_decodes",
    "check_prompts",
    "check_size",
    "group_prompts",
    "guides",
    "has_user_image",
    "num_cells",
    "schedule_of",
]
