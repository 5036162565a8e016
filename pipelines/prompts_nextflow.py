"""Prompts of images: from messages to the rows that the transformer samples from, and from its codes to pixels.

The components meet here through data alone: tokens, `image_grids`, `image_codes`, pixels. Knows nothing of the order
of a call's steps.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.nn.utils.rnn import pad_sequence

from .helpers_nextflow import (
    NextFlowBasePipeline,
    check_components,
    check_numbers,
    given,
    loaded,
    warn_once,
)


Image = PIL.Image.Image | str | Path | np.ndarray | torch.Tensor
PerScale = float | int | Sequence[float | int | None]
Grids = list[tuple[int, int]]
Conversation = list[dict[str, Any]]


@dataclass
class NextFlowImagePrompt:
    """
    One image to sample, ready for the transformer, and what is sampled of it.

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
        codes (`torch.Tensor` of shape `(codes,)`, *optional*): Codes of the image so far.
        num_sampled (`int`, *optional*, defaults to 0): Scales that these are.
    """

    input_ids: torch.Tensor
    image_grids: torch.Tensor
    image_codes: torch.Tensor
    negative_input_ids: torch.Tensor | None = None
    imageless: "NextFlowImagePrompt | None" = None
    prefix_codes: torch.Tensor | None = None
    prefix_mask: torch.Tensor | None = None
    num_scales: int | None = None
    codes: torch.Tensor | None = None
    num_sampled: int = 0

    @property
    def grids(self) -> Grids:
        """The schedule of the image to sample."""
        return schedule_of(self.image_grids[-1])


def one_per_prompt(name: str, value: Any, num_prompts: int) -> list:
    """A list with an entry for each prompt; anything but a list counts for all prompts."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * num_prompts
    if len(values) != num_prompts:
        raise ValueError(f"`{name}` has {len(values)} entries for {num_prompts} prompts, expected one for each")
    return values


def generator_per_image(
    generator: torch.Generator | list[torch.Generator] | None, num_images: int
) -> list[torch.Generator] | None:
    """Each image gets a generator of its own, seeded with one number of the given one or of its entry in a list."""
    if generator is None:
        return None
    sources = list(generator) if isinstance(generator, (list, tuple)) else [generator] * num_images
    if not all(isinstance(source, torch.Generator) for source in sources):
        raise ValueError(f"`generator` is {generator!r:.80}, expected a torch.Generator or a list of them")
    if len(sources) != num_images:
        raise ValueError(f"`generator` has {len(sources)} entries for {num_images} images, expected one or as many")
    # So an image depends on its own seed alone, not on how many numbers its neighbours use.
    seeds = [int(torch.randint(2**63 - 1, (), generator=source, device=source.device)) for source in sources]
    return [torch.Generator(source.device).manual_seed(seed) for source, seed in zip(sources, seeds, strict=True)]


def group_equal(keys: Iterable[Hashable]) -> list[list[int]]:
    """Indices of equal keys together, in the order of the first of each."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def group_prompts(prompts: Sequence[NextFlowImagePrompt]) -> list[list[int]]:
    """Indices of the images that are sampled together: those of one schedule, and with as much given."""
    # A pass of the transformer has one grid, and one boundary between given and sampled scales, for all its rows.
    given = [0 if prompt.prefix_codes is None else len(prompt.prefix_codes) for prompt in prompts]
    return group_equal((count, tuple(prompt.grids)) for count, prompt in zip(given, prompts))


def collate_prompts(
    prompts: Sequence[NextFlowImagePrompt], pad_token_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Inputs of the transformer for images of one schedule: the prompts and what guides them, padded on the left."""
    conditions = {"": [(prompt, prompt.input_ids) for prompt in prompts]}
    # The unconditional prompts have the images of the prompts; only the tokens differ.
    negative = [(one, one.negative_input_ids) for one in prompts if one.negative_input_ids is not None]
    imageless = [(one.imageless, one.imageless.input_ids) for one in prompts if one.imageless is not None]
    conditions |= {name: rows for name, rows in (("negative_", negative), ("imageless_", imageless)) if rows}
    # Padded together, so that the cache has one length and no mask where the prompts are equally long.
    ids = [row for rows in conditions.values() for _, row in rows]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad_token_id, padding_side="left")
    masks = [torch.ones_like(row) for row in ids]
    mask = pad_sequence(masks, batch_first=True, padding_side="left")
    inputs = {}
    for index, (name, rows) in enumerate(conditions.items()):
        members = slice(index * len(prompts), (index + 1) * len(prompts))
        targets = [prompt.image_grids[-1:] for prompt in prompts]
        # What guides a prompt may hold fewer sources, but it samples the same image: the target is the prompt's.
        grids = [part for (one, _), target in zip(rows, targets) for part in (one.image_grids[:-1], target)]
        inputs[f"{name}input_ids"], inputs[f"{name}attention_mask"] = padded[members], mask[members]
        inputs[f"{name}image_grids"] = torch.cat(grids)
        inputs[f"{name}image_codes"] = torch.cat([one.image_codes for one, _ in rows])
    for name in ("prefix_codes", "prefix_mask"):
        if getattr(prompts[0], name) is not None:
            inputs[name] = torch.stack([getattr(prompt, name) for prompt in prompts])
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def join_codes(prompts: Sequence[NextFlowImagePrompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (total_codes,) so far of all images, and the schedules (images, max_scales, 2) of the scales they are."""
    codes = torch.cat([prompt.codes for prompt in prompts if prompt.codes is not None])
    grids = torch.stack([prompt.image_grids[-1] for prompt in prompts])
    # `stack` has copied them: the prompts keep their whole schedules.
    for row, prompt in zip(grids, prompts, strict=True):
        row[prompt.num_sampled :] = 0
    return codes, grids.to(codes.device)


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
    for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        texts = [value] if isinstance(value, str) else value
        is_text = isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts)
        if not (value is None or is_text):
            raise TypeError(f"`{name}` is {value!r}, expected a string or a non-empty list of strings")
    if (image_codes is None) != (image_grids is None):
        missing = "image_codes" if image_codes is None else "image_grids"
        raise ValueError(f"`image_codes` and `image_grids` go together, got no `{missing}`")


def guides(scale: PerScale) -> bool:
    """Whether a guidance scale asks for an unconditional pass at any scale."""
    return any(value not in (None, 1) for value in (scale if isinstance(scale, (list, tuple)) else [scale]))


def build_messages(prompt: str | list[str], image: Any = None) -> list[Conversation]:
    """One conversation for every prompt: a user's message with the prompt's source images, then its text."""
    images = list(image) if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4 else image
    prompts = list(prompt)
    if isinstance(prompt, str):
        prompts = [prompt]
        is_nested = isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images)
        images = images if is_nested else [images]  # all are the sources of the one prompt
    sources = one_per_prompt("image", images, len(prompts))
    return [[user_message(text, own)] for text, own in zip(prompts, sources, strict=True)]


def user_message(text: str | list[dict[str, Any]], image: Any = None) -> dict[str, Any]:
    """A user's message: the image or images, then the text or the list of parts."""
    images = list(image) if isinstance(image, (list, tuple)) else [] if image is None else [image]
    parts = list(text) if isinstance(text, (list, tuple)) else [{"type": "text", "text": text}]
    return {"role": "user", "content": [*({"type": "image", "image": one} for one in images), *parts]}


def has_user_image(conversation: Conversation) -> bool:
    """Whether the user shows an image in the conversation."""
    return any(
        part["type"] in ("image", "image_url")
        for message in conversation
        if message["role"] == "user" and not isinstance(message["content"], str)
        for part in message["content"]
    )


def schedule_of(image_grids: torch.Tensor) -> Grids:
    """A row (max_scales, 2) of `image_grids` as a list, without the zero rows past its last scale."""
    return [(height, width) for height, width in image_grids.tolist() if height > 0]


def num_cells(grids: Sequence[tuple[int, int]]) -> int:
    """Codes of an image of this schedule."""
    return sum(height * width for height, width in grids)


def call_back(
    callback: Callable,
    pipe: Any,
    step: int,
    scale: Any,
    group: Sequence[NextFlowImagePrompt],
    tensor_inputs: Sequence[str],
) -> None:
    """Let the callback see the codes so far, and replace them by those that it returns."""
    codes = scale.image_codes
    grids = torch.stack([prompt.image_grids[-1] for prompt in group])
    # Copies, so that a change counts only where it is returned.
    tensors = {"latents": codes.clone(), "image_codes": codes.clone(), "image_grids": grids}
    returned = callback(pipe, step, scale.index, {name: tensors[name] for name in tensor_inputs}) or {}
    # Two names of one tensor, of which a callback may return both: the one that differs was changed.
    for name in ("latents", "image_codes"):
        changed = returned.get(name)
        if changed is not None and not torch.equal(changed.to(codes.device), codes):
            scale.image_codes = changed.to(codes.device)


class NextFlowImageSteps(NextFlowBasePipeline):
    """
    The steps of sampling images, each a method of the pipeline that users may call on their own, and what callbacks
    see and may change meanwhile.
    """

    transformer: Any
    processor: Any
    diffusion_decoder: Any

    build_messages = staticmethod(build_messages)

    _guidance_scale: PerScale = 1.0
    _image_guidance_scale: PerScale = 1.0
    _current: Any = None  # the prompts of the newest call: previews of an older one are refused

    @property
    def guidance_scale(self) -> PerScale:
        """Guidance towards the text, in the current call or the last one."""
        return self._guidance_scale

    @property
    def image_guidance_scale(self) -> PerScale:
        """Guidance towards the source images, in the current call or the last one."""
        return self._image_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether there is guidance at any scale."""
        return guides(self._guidance_scale) or guides(self._image_guidance_scale)

    def register_modules(self, **components: Any) -> None:
        """diffusers' method, which also checks the components, see [`~NextFlowImageSteps.check_components`]."""
        super().register_modules(**components)
        self.check_components()

    def check_components(self) -> None:
        """Raises `ValueError` where the components do not know the same codes and tokens. What is None is left out."""
        components = self.transformer, self.vision_tokenizer, self.processor, self.diffusion_decoder
        check_components(*components)
        self._checked = components  # what was refused is refused again

    def _begin(self, work: Any = None) -> None:
        """Start `work`: clear an earlier interruption, and let previews of earlier work raise when resumed."""
        components = self.transformer, self.vision_tokenizer, self.processor, self.diffusion_decoder
        # A component may have been assigned since (`pipe.transformer = ...`), which registers nothing.
        if any(one is not other for one, other in zip(components, self._checked, strict=True)):
            self.check_components()
        if work is None or work is not self._current:  # what interrupts the thinking interrupts its images, too
            self._interrupt = False
        self._current = work

    def get_image_settings(self, **settings: Any) -> dict[str, Any]:
        """How images are sampled: as `settings` say, else as the transformer's generation config and defaults do."""
        return self.transformer.get_image_settings(**settings)

    def encode_images(self, images: Any, *, resolution: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Codes (total_codes,) and schedules (images, max_scales, 2) of one or several images, each of its own shape:
        what the call takes as `image_codes` and `image_grids`.
        """
        inputs = self.processor.image_processor(images, return_tensors="pt", **given(resolution=resolution))
        return self._encode_pixels(inputs["pixel_values"], inputs["image_grids"]), inputs["image_grids"]

    def _encode_pixels(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> torch.Tensor:
        device = self._execution_device
        pixel_values = pixel_values.to(device, self.vision_tokenizer.dtype)
        return loaded(self.vision_tokenizer).encode(pixel_values, image_grids.to(device)).image_codes

    def encode_messages(
        self,
        conversations: list[Conversation],
        negative_conversations: list[Conversation] | None = None,
        *,
        imageless_conversations: list[Conversation] | None = None,
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
                Without a size sample at that of a conversation's first image. Else the processor decides: `size`, the
                conversation's last image, or a square.
            size: `height` and `width`, or `aspect_ratio`, and `resolution` of the image to sample.
        """
        options = {"tokenize": True, "return_dict": True, "generation_mode": "image", "negative_prompt": None}
        count, negative = len(conversations), negative_conversations or []
        rows = [*conversations, *negative, *(imageless_conversations or [])]
        inputs = self.processor.apply_chat_template(rows, **options, padding=False, return_tensors=None, **size)
        ids = [torch.tensor(row) for row in inputs["input_ids"]]
        counts = [row.count(self.processor.boi_token_id) for row in inputs["input_ids"]]  # with the one to sample
        grids = torch.tensor(inputs["image_grids"]).split(counts)
        if counts[count:][: len(negative)] != counts[: len(negative)]:
            raise ValueError("the unconditional prompts have other images than the prompts, expected the same")

        # The images of unconditional prompts are those of the prompts, or some of them.
        encoded = [*range(count), *range(count + len(negative), len(rows))]
        sources = torch.cat([grids[row][:-1] for row in encoded])  # without it: it has no codes yet
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
            if keep_first_size and len(prompt.image_grids) > 1 and not size.keys() - {"resolution"}:
                first = self.processor.target_image_grids(prompt.image_grids[:1])  # without a repeated last grid
                prompt.image_grids = torch.cat([prompt.image_grids[:-1], first])
        return prompts

    def encode_prompts(
        self,
        conversations: list[Conversation],
        negative_prompt: str | list[str] | None,
        settings: dict[str, Any],
        *,
        think: bool,
        keep_first_size: bool,
        **size: Any,
    ) -> list[NextFlowImagePrompt]:
        """Each prompt's tokens, the codes of its images, and the unconditional prompts that `settings` need."""
        processor, count = self.processor, len(conversations)
        rows = list(zip(conversations, one_per_prompt("negative_prompt", negative_prompt or "", count)))
        guides_images = guides(settings["image_guidance_scale"])
        unconditional = {}
        # Guidance towards images compares three prompts, so it also needs the one without text.
        if guides_images or guides(settings["guidance_scale"]):
            negative = [processor.unconditional_messages(row, text) for row, text in rows]
            unconditional["negative_conversations"] = negative
        if guides_images:
            imageless = [processor.unconditional_messages(row, text, keep_images=False) for row, text in rows]
            unconditional["imageless_conversations"] = imageless
        if think:
            conversations = list(map(processor.with_thinking_prompt, conversations))
        return self.encode_messages(conversations, **unconditional, keep_first_size=keep_first_size, **size)

    def prepare_settings(self, conversations: list[Conversation], settings: dict[str, Any]) -> dict[str, Any]:
        """
        Settings of sampling, as in [`~NextFlowPipeline.get_image_settings`]. Guidance towards images that a prompt
        does not have is a `ValueError` where the call asks for it, and left out where only the model does.
        """
        if self.transformer is None:
            raise ValueError("`transformer` is None: without it `image_codes` are decoded, and nothing is sampled")
        asked = settings["image_guidance_scale"]
        settings = self.transformer.get_image_settings(**settings)
        missing = 0
        if guides(settings["image_guidance_scale"]):
            missing = sum(not has_user_image(conversation) for conversation in conversations)
        if missing and asked is not None:
            raise ValueError(
                f"`image_guidance_scale` is {asked}, which guides towards the user's images, but {missing} of "
                f"{len(conversations)} prompts have none"
            )
        if missing:
            settings["image_guidance_scale"] = 1.0
        return settings

    def prepare_images(
        self, prompts: list[NextFlowImagePrompt], num_scales: int | None, *, is_limit: bool
    ) -> list[list[int]]:
        """
        Say of each prompt how many scales are sampled, and which codes are given in full. More scales than an image
        has are an error or, where `is_limit`, all of them. Returns the indices of images that are sampled together.
        """
        self._begin(prompts)
        groups, self._num_timesteps = group_prompts(prompts), 0
        for members in groups:
            first = prompts[members[0]]
            grids = first.grids
            if num_scales is not None and num_scales > len(grids):
                if not is_limit:
                    raise ValueError(
                        f"`num_scales` is {num_scales}, expected at most {len(grids)}, those of the image"
                    )
                warn_once(f"`num_inference_steps` is {num_scales}, more than the scales of an image: all are sampled")
            grids = grids[:num_scales]
            for prompt in (prompts[index] for index in members):
                prompt.num_scales = len(grids)
                given = None if prompt.prefix_mask is not None else prompt.prefix_codes  # cells of it are sampled
                if given is not None and len(given) >= num_cells(grids):  # nothing is left to sample
                    prompt.codes, prompt.num_sampled = given[: num_cells(grids)].to(self._execution_device), len(grids)
            self._num_timesteps += 0 if first.codes is not None else len(grids)
        return groups

    def known_resolution(self, resolution: int, height: int | None) -> int | None:
        """`resolution`, or the nearest that the model has: engines send a default of their own."""
        check_numbers(resolution=resolution)
        known = self.processor.image_processor.schedule.resolutions
        if resolution in known:
            return resolution
        if height is not None:
            warn_once(f"`resolution` is {resolution}, which is none of {known}: `height` and `width` say the size")
            return None
        # By ratio, as resolutions double: 384 is nearer to 512 than to 256.
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
        return loaded(self.transformer).generate_images(**inputs).image_codes.view(len(prompts), -1)

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
        pixel_values = loaded(self.vision_tokenizer).decode(image_codes, image_grids, num_scales=num_scales)
        return self.processor.image_processor.post_process_images(
            pixel_values.float().cpu(), image_grids.cpu(), output_type=output_type
        )
