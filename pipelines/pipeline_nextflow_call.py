"""The arguments of one call of the pipeline, and what makes no sense in them; `NextFlowPipeline.__call__` says what
they mean.

Knows neither components nor the contents of tensors: what depends on these is checked where it shows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .helpers_nextflow import check_number, check_per_scale, one_per_prompt


Image = PIL.Image.Image | str | Path | np.ndarray | torch.Tensor
PerScale = float | int | Sequence[float | int | None]

OUTPUT_TYPES = ("pil", "np", "pt", "codes", "latent")
# diffusers' names for what has names of its own here, which its tools and suites use.
SYNONYMS = {"num_inference_steps": "num_scales", "latents": "image_codes"}
DECODERS = ("vq", "diffusion")
# The least of each setting that is a whole number.
WHOLE_NUMBERS = {
    "height": 1,
    "width": 1,
    "resolution": 1,
    "num_images_per_prompt": 1,
    "num_scales": 1,
    "keep_scales": 0,
    "max_new_tokens": 1,
    "decoder_num_inference_steps": 1,
    "decoder_tile_size": 1,
}


@dataclass(kw_only=True)
class NextFlowCall:
    """What one call of the pipeline says."""

    prompt: str | list[str] | None
    image: Image | list[Image] | list[list[Image]] | None
    messages: list[dict[str, Any]] | list[list[dict[str, Any]]] | None
    height: int | None
    width: int | None
    aspect_ratio: str | None
    resolution: int | None
    num_images_per_prompt: int
    negative_prompt: str | list[str] | None
    guidance_scale: PerScale | None
    guidance_schedule: str | None
    image_guidance_scale: PerScale | None
    temperature: PerScale | None
    top_k: PerScale | None
    top_p: PerScale | None
    num_scales: int | None
    num_inference_steps: int | None
    image_codes: torch.LongTensor | None
    latents: torch.LongTensor | None
    image_grids: torch.LongTensor | None
    keep_scales: int | None
    mask_image: Image | list[Image] | None
    mask_coverage: float
    generator: torch.Generator | list[torch.Generator] | None
    decoder: str
    decoder_prompt: str | list[str] | None
    decoder_num_inference_steps: int | None
    decoder_guidance_scale: float | None
    decoder_strength: float | None
    decoder_tile_size: int | None
    decoder_generator: torch.Generator | list[torch.Generator] | None
    output_type: str
    return_dict: bool
    callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    think: bool
    max_new_tokens: int | None

    def __post_init__(self):
        for name, own in SYNONYMS.items():
            if getattr(self, name) is None:
                continue
            if getattr(self, own) is not None:
                raise ValueError(f"got `{own}` and `{name}`, which is another name for it: pass one")
            setattr(self, own, getattr(self, name))
        if self.output_type == "latent":
            self.output_type = "codes"
        if isinstance(self.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            self.callback_on_step_end_tensor_inputs = self.callback_on_step_end.tensor_inputs

    @property
    def only_decodes(self) -> bool:
        """Whether there is nothing to draw from: the codes that are given are all there is."""
        return self.prompt is None and self.messages is None

    @property
    def size(self) -> dict[str, Any]:
        """What the call says of the size of the image to draw."""
        size = {"height": self.height, "width": self.width, "aspect_ratio": self.aspect_ratio}
        return {name: value for name, value in size.items() if value is not None}

    @property
    def decoder_settings(self) -> dict[str, Any]:
        """What the call says of the diffusion decoder, under the decoder's names."""
        settings = {
            "prompt": self.decoder_prompt,
            "num_inference_steps": self.decoder_num_inference_steps,
            "guidance_scale": self.decoder_guidance_scale,
            "strength": self.decoder_strength,
            "tile_size": self.decoder_tile_size,
            "generator": self.decoder_generator,
        }
        return {name: value for name, value in settings.items() if value is not None}

    def check(self, callback_tensor_inputs: Sequence[str]) -> None:
        for name, least in WHOLE_NUMBERS.items():
            check_number(name, getattr(self, name), least=least, is_whole=True)
        for name in ("mask_coverage", "decoder_guidance_scale", "decoder_strength"):
            check_number(name, getattr(self, name))
        check_per_scale("image_guidance_scale", self.image_guidance_scale)
        self._check_prompt()
        self._check_inpainting()
        if (self.height is None) != (self.width is None):
            raise ValueError(f"`height` is {self.height} and `width` is {self.width}, expected both or neither")
        if self.height is not None and self.aspect_ratio is not None:
            raise ValueError(
                f"got `height`, `width` and `aspect_ratio` ({self.aspect_ratio!r}): pass one of the two forms"
            )
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {self.output_type!r}, expected one of {list(OUTPUT_TYPES)}")
        unknown = [name for name in self.callback_on_step_end_tensor_inputs if name not in callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}, expected some of {list(callback_tensor_inputs)}"
            )
        if self.decoder not in DECODERS:
            raise ValueError(f"`decoder` is {self.decoder!r}, expected one of {list(DECODERS)}")
        if self.decoder == "vq" and self.decoder_settings:
            names = [f"decoder_{name}" for name in self.decoder_settings]
            raise ValueError(f"got {names} with `decoder='vq'`: they go with `decoder='diffusion'`")
        if self.decoder == "diffusion" and self.output_type == "codes":
            raise ValueError("`decoder='diffusion'` and `output_type='codes'`: codes are not decoded")

    def _check_prompt(self) -> None:
        if self.prompt is not None and self.messages is not None:
            raise ValueError("pass exactly one of `prompt` and `messages`, got both")
        if self.only_decodes and self.image_codes is None:
            raise ValueError(
                "pass exactly one of `prompt` and `messages`, got neither (only `image_codes` are decoded without)"
            )
        if self.messages is not None and self.image is not None:
            raise ValueError('`image` goes with `prompt`: in `messages` an image is {"type": "image", "image": ...}')
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            texts = [value] if isinstance(value, str) else value
            if texts is not None and not (
                isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts)
            ):
                raise TypeError(f"`{name}` is {value!r}, expected a string or a non-empty list of strings")

    def _check_inpainting(self) -> None:
        if (self.image_codes is None) != (self.image_grids is None):
            missing = "image_codes" if self.image_codes is None else "image_grids"
            raise ValueError(f"`image_codes` and `image_grids` go together, got no `{missing}`")
        if not 0 < self.mask_coverage <= 1:
            raise ValueError(f"`mask_coverage` is {self.mask_coverage}, expected more than 0 and at most 1")
        if self.only_decodes:
            names = ("image", "height", "width", "aspect_ratio", "resolution", "keep_scales", "mask_image", "think")
            given = [name for name in names if getattr(self, name) not in (None, False)]
            if given or self.num_images_per_prompt != 1:
                given = given or ["num_images_per_prompt"]
                raise ValueError(
                    f"got {given} with `image_codes` and neither `prompt` nor `messages`: without them codes are only "
                    "decoded"
                )


def build_messages(prompt: str | list[str], image: Any = None) -> list[list[dict[str, Any]]]:
    """One conversation for every prompt: a user's message with the prompt's source images, then its text."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    sources = _images_by_prompt(image, len(prompts), is_single=isinstance(prompt, str))
    return [
        [{"role": "user", "content": [*({"type": "image", "image": one} for one in images), _text_part(text)]}]
        for text, images in zip(prompts, sources, strict=True)
    ]


def has_user_image(conversation: list[dict[str, Any]]) -> bool:
    return any(
        part["type"] == "image"
        for message in conversation
        if message["role"] == "user" and not isinstance(message["content"], str)
        for part in message["content"]
    )


def _images_by_prompt(image: Any, num_prompts: int, *, is_single: bool) -> list[list[Image]]:
    if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4:
        image = list(image)
    if image is None or not isinstance(image, (list, tuple)):
        return [[] if image is None else [image]] * num_prompts
    # All images are the sources of a single prompt; a list of prompts has one entry for each.
    entries = [image] if is_single and not any(isinstance(entry, (list, tuple)) for entry in image) else image
    entries = one_per_prompt("image", list(entries), num_prompts)
    entries = [[] if entry is None else entry for entry in entries]
    return [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in entries]


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


__all__ = ["Image", "NextFlowCall", "PerScale", "build_messages", "has_user_image"]
