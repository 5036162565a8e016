"""Conversations in, codes out, pixels out: what the components do for the pipeline, one method for each.

They meet through data alone: tokens, `image_grids`, `image_codes`, pixels. Knows nothing of the lifecycle of a call.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import PIL.Image
import torch

from .helpers_nextflow import call_component, check_per_scale
from .pipeline_nextflow_call import build_messages


# Where neither the call nor the transformer's generation config says anything.
DEFAULT_SETTINGS = {
    "guidance_scale": 1.0,
    "guidance_schedule": "constant",
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "image_guidance_scale": 1.0,
}


@dataclass
class NextFlowImagePrompt:
    """
    One image to draw, ready for the transformer.

    Args:
        input_ids (`torch.LongTensor` of shape `(length,)`): The prompt, ending in `<boi>`.
        image_grids (`torch.LongTensor` of shape `(sources + 1, max_scales, 2)`):
            Schedules of the source images, then of the image to draw.
        image_codes (`torch.LongTensor` of shape `(total_codes,)`): Codes of the source images.
        negative_input_ids (`torch.LongTensor` of shape `(length,)`, *optional*): The unconditional prompt.
        imageless ([`NextFlowImagePrompt`], *optional*): The unconditional prompt without the user's images.
        prefix_codes (`torch.LongTensor` of shape `(codes,)`, *optional*): Given codes of the first scales.
        prefix_mask (`torch.BoolTensor` of shape `(codes,)`, *optional*): Which of them are kept, all by default.
    """

    input_ids: torch.LongTensor
    image_grids: torch.LongTensor
    image_codes: torch.LongTensor
    negative_input_ids: torch.LongTensor | None = None
    imageless: "NextFlowImagePrompt | None" = None
    prefix_codes: torch.LongTensor | None = None
    prefix_mask: torch.BoolTensor | None = None

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The schedule of the image to draw."""
        return schedule_of(self.image_grids[-1])


@dataclass
class NextFlowImageBatch:
    """
    Images that are being drawn. Lists have an entry for each.

    Args:
        prompts (`list[NextFlowImagePrompt]`): What they are drawn from.
        settings (`dict`): How, as in [`~NextFlowPipeline.get_image_settings`].
        num_scales (`int`, *optional*): Scales that are wanted, all by default.
        generators (`list[torch.Generator]`, *optional*): For the codes.
        captions (`list[str]`, *optional*): For the diffusion decoder.
        noise_generators (`list[torch.Generator]`, *optional*): For the diffusion decoder.
        thoughts, final_prompts (`list[str]`, *optional*): What the model wrote before.
        image_codes (`list[torch.LongTensor]`): Codes (codes,) so far.
    """

    prompts: list[NextFlowImagePrompt]
    settings: dict[str, Any]
    num_scales: int | None = None
    generators: list[torch.Generator] | None = None
    captions: list[str] | None = None
    noise_generators: list[torch.Generator] | None = None
    thoughts: list[str] | None = None
    final_prompts: list[str] | None = None
    image_codes: list[torch.LongTensor] = field(default_factory=list)

    def __post_init__(self):
        self.image_codes = [prompt.input_ids.new_zeros(0) for prompt in self.prompts]

    @property
    def groups(self) -> list[list[int]]:
        """Images that are drawn together: those of one schedule, and with as much given."""
        groups: dict[tuple, list[int]] = {}
        for index, prompt in enumerate(self.prompts):
            given = 0 if prompt.prefix_codes is None else len(prompt.prefix_codes)
            groups.setdefault((tuple(prompt.grids), given), []).append(index)
        return list(groups.values())

    def count_scales(self, index: int) -> int:
        """Scales of an image that the call wants."""
        grids = self.prompts[index].grids
        if self.num_scales is not None and self.num_scales > len(grids):
            raise ValueError(f"`num_scales` is {self.num_scales}, expected at most {len(grids)}, those of the image")
        return len(grids) if self.num_scales is None else self.num_scales

    def are_given(self, members: Sequence[int]) -> bool:
        """Whether nothing of images that are drawn together is left to draw."""
        prompts = [self.prompts[index] for index in members]
        if any(prompt.prefix_codes is None or prompt.prefix_mask is not None for prompt in prompts):
            return False
        return len(prompts[0].prefix_codes) >= num_cells(prompts[0].grids[: self.count_scales(members[0])])

    def count_drawn(self, index: int) -> int:
        """Scales of an image whose codes are there."""
        cells = np.cumsum([height * width for height, width in self.prompts[index].grids])
        return int(np.searchsorted(cells, len(self.image_codes[index]))) + 1

    def image_grids(self, members: Sequence[int], num_scales: int | None = None) -> torch.LongTensor:
        """Schedules of some of the images, or the first scales of them."""
        grids = torch.stack([self.prompts[index].image_grids[-1] for index in members])
        if num_scales is not None:
            grids[:, num_scales:] = 0
        return grids


class NextFlowStepsMixin:
    """The steps of drawing, each a method of the pipeline that users may call on their own."""

    def get_image_settings(self, **settings: Any) -> dict[str, Any]:
        """How to draw: what the call says, else the transformer's generation config, else [`DEFAULT_SETTINGS`]."""
        for name in ("guidance_scale", "image_guidance_scale", "temperature", "top_k", "top_p"):
            check_per_scale(name, settings.get(name), is_whole=name == "top_k")
        configured = self.transformer.generation_config.to_dict()
        resolved = {}
        for name, default in DEFAULT_SETTINGS.items():
            own = f"image_{name}" if name in ("temperature", "top_k", "top_p") else name
            candidates = (settings.get(name), configured.get(own))
            resolved[name] = next((value for value in candidates if value is not None), default)
        return resolved

    @staticmethod
    def build_messages(prompt: str | list[str], image: Any = None) -> list[list[dict[str, Any]]]:
        """One conversation for every prompt: a user's message with the prompt's source images, then its text."""
        return build_messages(prompt, image)

    def encode_images(
        self, images: Any, *, resolution: int | None = None
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        Codes (total_codes,) and schedules (images, max_scales, 2) of one or several images, each of its own shape:
        what the call takes as `image_codes` and `image_grids`.
        """
        options = {} if resolution is None else {"resolution": resolution}
        inputs = self.processor.image_processor(images, return_tensors="pt", **options)
        return self._encode_pixels(inputs["pixel_values"], inputs["image_grids"]), inputs["image_grids"]

    def _encode_pixels(self, pixel_values: torch.Tensor, image_grids: torch.LongTensor) -> torch.LongTensor:
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
            conversations (`list[list[dict]]`): Messages, each conversation ending where the image is to be drawn.
            negative_conversations (`list[list[dict]]`, *optional*): The unconditional ones, with the same images.
            imageless_conversations (`list[list[dict]]`, *optional*): Those without the user's images, too.
            keep_first_size (`bool`, *optional*, defaults to `False`):
                Draw at the size of a conversation's first image. Else the processor decides: `size`, the
                conversation's last image, or a square.
            size: `height` and `width`, or `aspect_ratio`, and `resolution` of the image to draw.
        """
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "generation_mode": "image"}
        options["negative_prompt"] = None  # they come as conversations of their own
        resolution = {name: value for name, value in size.items() if name == "resolution"}
        inputs = self.processor.apply_chat_template(conversations, **options, **size)
        image_grids = list(inputs["image_grids"].split(self._count_images(inputs)))
        sources = torch.cat([grids[:-1] for grids in image_grids])
        counts = [int(grids[:-1].prod(-1).sum()) for grids in image_grids]
        codes = self._encode_pixels(inputs["pixel_values"], sources) if len(sources) else sources.new_zeros(0)
        negative_ids = [None] * len(conversations)
        if negative_conversations is not None:
            # Only the tokens differ: these conversations have the same images.
            negative = self.processor.apply_chat_template(negative_conversations, **options, **resolution)
            if self._count_images(negative) != [len(grids) for grids in image_grids]:
                raise ValueError(
                    f"the unconditional prompts have {self._count_images(negative)} images, expected as many as the "
                    f"prompts: {[len(grids) for grids in image_grids]}"
                )
            negative_ids = _unpad(negative)
        imageless = [None] * len(conversations)
        if imageless_conversations is not None:
            imageless = self.encode_messages(imageless_conversations, **resolution)
        prompts = []
        for ids, grids, part, *others in zip(
            _unpad(inputs), image_grids, codes.split(counts), negative_ids, imageless, strict=True
        ):
            if keep_first_size and len(grids) > 1:
                grids = torch.cat([grids[:-1], self.processor.target_image_grids(grids[:1])])
            prompts.append(NextFlowImagePrompt(ids, grids, part, *others))
        return prompts

    def _count_images(self, inputs: Any) -> list[int]:
        return (inputs["input_ids"] == self.processor.boi_token_id).sum(1).tolist()

    def generate_codes(
        self,
        prompts: list[NextFlowImagePrompt],
        *,
        generators: list[torch.Generator] | None = None,
        callback: Callable | None = None,
        **settings: Any,
    ) -> torch.LongTensor:
        """
        Codes (images, codes) of images that share one schedule. Fewer than the schedule has where `callback`, the
        transformer's, stopped early. `settings` as in [`~NextFlowPipeline.get_image_settings`].
        """
        inputs = {**self._image_inputs(prompts), **settings, "generator": generators, "callback": callback}
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
        inputs = {**self._image_inputs(prompts), **settings, "generator": generators}
        return call_component(self.transformer, "stream_images", **inputs)

    def _image_inputs(self, prompts: list[NextFlowImagePrompt]) -> dict[str, torch.Tensor]:
        inputs = self._prompt_inputs(prompts)
        if prompts[0].negative_input_ids is not None:
            # The same images; only the tokens differ.
            negative = [replace(prompt, input_ids=prompt.negative_input_ids) for prompt in prompts]
            inputs |= self._prompt_inputs(negative, prefix="negative_")
        if prompts[0].imageless is not None:
            imageless = [
                replace(
                    prompt.imageless,
                    image_grids=torch.cat([prompt.imageless.image_grids[:-1], prompt.image_grids[-1:]]),
                )
                for prompt in prompts
            ]
            inputs |= self._prompt_inputs(imageless, prefix="imageless_")
        for name in ("prefix_codes", "prefix_mask"):
            if getattr(prompts[0], name) is not None:
                inputs[name] = torch.stack([getattr(prompt, name) for prompt in prompts])
        return {name: tensor.to(self._execution_device) for name, tensor in inputs.items()}

    def _prompt_inputs(self, prompts: list[NextFlowImagePrompt], prefix: str = "") -> dict[str, torch.Tensor]:
        """Prompts as one batch, padded on the left."""
        length = max(len(prompt.input_ids) for prompt in prompts)
        input_ids = torch.full((len(prompts), length), self.processor.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            start = length - len(prompt.input_ids)
            input_ids[row, start:] = prompt.input_ids
            attention_mask[row, start:] = 1
        return {
            f"{prefix}input_ids": input_ids,
            f"{prefix}attention_mask": attention_mask,
            f"{prefix}image_grids": torch.cat([prompt.image_grids for prompt in prompts]),
            f"{prefix}image_codes": torch.cat([prompt.image_codes for prompt in prompts]),
        }

    def decode_codes(
        self,
        image_codes: torch.LongTensor,
        image_grids: torch.LongTensor,
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


def schedule_of(image_grids: torch.LongTensor) -> list[tuple[int, int]]:
    """A row (max_scales, 2) of `image_grids` as a list, without the zero rows past its last scale."""
    return [(height, width) for height, width in image_grids.tolist() if height > 0]


def num_cells(grids: Sequence[tuple[int, int]]) -> int:
    return sum(height * width for height, width in grids)


def _unpad(inputs: Any) -> list[torch.LongTensor]:
    """The rows of `input_ids`, each without its padding."""
    return [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


__all__ = [
    "DEFAULT_SETTINGS",
    "NextFlowImageBatch",
    "NextFlowStepsMixin",
    "NextFlowImagePrompt",
    "num_cells",
    "schedule_of",
]
