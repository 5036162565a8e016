"""A conversation that keeps its cache: every turn runs what is new, whether it is talk or a picture."""

from typing import Any

import torch

from .helpers_nextflow import check_number, exclusive, generator_per_image


class NextFlowConversation:
    r"""
    Talk and drawing in turn, on one cache: no token of the conversation goes through the transformer twice, and no
    image is encoded again, those that were drawn included. Only the unconditional prompt of guidance, a sequence of
    its own, is run anew for every guided image.

    Images that the model draws stay in the sequence as they were drawn; those that are given may have their last grid
    once more (the processor's `append_last_scale`). Conversations are trained in the same layout.

    Args:
        pipe ([`NextFlowPipeline`]): Used, not copied: its settings and adapters are those of the moment. Changing its
            weights in between makes the cache wrong.
        system (`str`, *optional*): A system message.
        think (`bool`, *optional*, defaults to `False`):
            Ask for thinking: `draw` then lets the model write before it draws.

    Attributes:
        messages (`list[dict]`): What was said so far, as [`~NextFlowPipeline.__call__`] and `chat` take it.

    Examples:
        ```py
        >>> conversation = pipe.start_conversation()
        >>> image = conversation.generate_image("a red circle left of a blue square")
        >>> conversation.chat("what color is the circle?")
        >>> image = conversation.generate_image("make the circle yellow")
        >>> conversation.ask(other_image, "is there a circle in this one, too?")
        ```
    """

    def __init__(self, pipe: Any, system: str | None = None, *, think: bool = False):
        self.pipe = pipe
        self.think = think
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._sequence: dict[str, torch.Tensor] = {}  # `input_ids`, `image_codes` and `image_grids` of all turns
        self._negative_ids: torch.Tensor | None = None  # the same without the user's text
        self._cache: Any = None

    def chat(
        self,
        text: str | list[dict[str, Any]],
        image: Any = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        resolution: int | None = None,
        generator: torch.Generator | None = None,
        streamer: Any = None,
    ) -> str:
        """
        The answer to `text`, or to a list of parts, with `image` (one or a list) in front. Settings as in
        [`~NextFlowPipeline.chat`].
        """
        settings = self.pipe.get_text_settings(max_new_tokens, do_sample, temperature, top_k, top_p)
        parts = self._answer(
            _message(text, image),
            {"resolution": resolution},
            generator=generator,
            max_images=0,
            streamer=streamer,
            **settings,
        )
        return "".join(part["text"] for part in parts)

    def ask(self, image: Any, text: str, **settings: Any) -> str:
        """The answer to a question about an image, or several: `chat(text, image)`."""
        return self.chat(text, image, **settings)

    def generate_image(
        self,
        text: str | list[dict[str, Any]],
        image: Any = None,
        *,
        max_new_tokens: int | None = None,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        resolution: int | None = None,
        guidance_scale: Any = None,
        guidance_schedule: str | None = None,
        temperature: Any = None,
        top_k: Any = None,
        top_p: Any = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """
        The image that `text` asks for, at the size of the conversation's last image unless told otherwise. Settings as
        in [`~NextFlowPipeline.__call__`]; `max_new_tokens` is for a conversation that thinks, whose thoughts are in
        `messages[-1]`. `None` where `pipe._interrupt` ended the thinking.
        """
        pipe = self.pipe
        pipe.check_thinking(self.think, max_new_tokens)
        writing = pipe.get_text_settings(max_new_tokens) if self.think else {"max_new_tokens": 1, "do_sample": False}
        parts = self._answer(
            _message(text, image),
            {"height": height, "width": width, "aspect_ratio": aspect_ratio, "resolution": resolution},
            negative_prompt=negative_prompt,
            generator=generator,
            min_images=1,
            max_images=1,
            **writing,
            **pipe.get_interleaved_settings(
                guidance_scale=guidance_scale,
                guidance_schedule=guidance_schedule,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            ),
        )
        return next((part["image"] for part in parts if part["type"] == "image"), None)

    def interleave(
        self,
        text: str | list[dict[str, Any]],
        max_images: int = 4,
        *,
        image: Any = None,
        min_images: int = 0,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        text_temperature: float | None = None,
        text_top_k: int | None = None,
        text_top_p: float | None = None,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        resolution: int | None = None,
        guidance_scale: Any = None,
        guidance_schedule: str | None = None,
        temperature: Any = None,
        top_k: Any = None,
        top_p: Any = None,
        generator: torch.Generator | None = None,
    ) -> list[dict[str, Any]]:
        """An answer of text and `min_images` to `max_images` images, as in [`~NextFlowPipeline.interleave`]."""
        for name, count in (("min_images", min_images), ("max_images", max_images)):
            check_number(name, count, is_whole=True)
        if not min_images <= max_images:
            raise ValueError(f"`min_images` is {min_images} and `max_images` {max_images}, expected 0 <= min <= max")
        pipe = self.pipe
        return self._answer(
            _message(text, image),
            {"height": height, "width": width, "aspect_ratio": aspect_ratio, "resolution": resolution},
            negative_prompt=negative_prompt,
            generator=generator,
            min_images=min_images,
            max_images=max_images,
            **pipe.get_text_settings(max_new_tokens, do_sample, text_temperature, text_top_k, text_top_p, "text_"),
            **pipe.get_interleaved_settings(
                guidance_scale=guidance_scale,
                guidance_schedule=guidance_schedule,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            ),
        )

    # ---- a turn

    @torch.no_grad()
    def _answer(self, message: dict[str, Any], size: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        """The content of the next assistant's message; it and `message` are then part of the conversation."""
        with exclusive(self.pipe):
            return self._generate(message, size, **options)

    def _generate(
        self,
        message: dict[str, Any],
        size: dict[str, Any],
        *,
        max_images: int,
        negative_prompt: str = "",
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        pipe = self.pipe
        pipe.processor.as_conversations([message])
        pipe._begin()
        # 1. The turn, and what is known from those before
        mode = "interleaved" if max_images else "text"
        turn = self._encode_turn(message, mode, **size)
        inputs = self._joined(turn)
        options = {"resolution": size.get("resolution")}  # of the given images
        wishes = any(size.get(name) is not None for name in ("height", "width", "aspect_ratio"))
        if max_images and (wishes or "image_grids" not in inputs):
            inputs["target_grids"] = turn["target_grids"]  # else the transformer draws at the size of the last image
        if max_images and pipe.do_classifier_free_guidance:
            inputs["negative_input_ids"] = self._negative(message, negative_prompt, **options)

        # 2. The answer. A cache that an error leaves half written is of no use
        cache, self._cache = self._cache, None
        output = pipe.generate_answers(
            inputs,
            max_images=max_images,
            generators=generator_per_image(generator, 1),
            past_key_values=cache,
            return_dict_in_generate=True,
            **settings,
        )
        (parts,) = pipe.decode_answers(output)
        pipe.maybe_free_model_hooks()

        # 3. What the next turn goes on from
        answer_ids = output.sequences[:, output.prompt_length :]
        self._negative_ids = torch.cat([self._negative(message, "", **options), answer_ids], dim=1)
        self._sequence = {"input_ids": output.sequences}
        if len(output.image_grids):
            self._sequence |= {"image_codes": output.image_codes, "image_grids": output.image_grids}
        self._cache = output.past_key_values
        self.messages += [message, {"role": "assistant", "content": parts}]
        return parts

    def _joined(self, turn: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The whole sequence, the turn's behind that of the turns before."""
        inputs = {}
        for name, dim in (("input_ids", 1), ("image_codes", 0), ("image_grids", 0)):
            tensors = [part[name] for part in (self._sequence, turn) if name in part]
            if tensors:
                inputs[name] = torch.cat(tensors, dim=dim)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs

    def _negative(self, message: dict[str, Any], text: str, **options: Any) -> torch.Tensor:
        """The unconditional prompt: the conversation without the user's text, then `text`."""
        parts = [part for part in message["content"] if part["type"] != "text"]
        if text:
            parts.append({"type": "text", "text": text})
        message = {**message, "content": parts}
        ids = self._encode_turn(message, "text", ask_to_think=False, encode_images=False, **options)["input_ids"]
        return ids if self._negative_ids is None else torch.cat([self._negative_ids, ids], dim=1)

    def _encode_turn(
        self, message: dict[str, Any], generation_mode: str, *, ask_to_think: bool = True, **options: Any
    ) -> dict[str, torch.Tensor]:
        """The message and the header of its answer, as they stand behind the sequence so far."""
        encode = self.pipe.encode_conversations
        if not self._sequence:
            think = (self.think and ask_to_think) or None
            return encode(
                [[*self.messages, message]], generation_mode=generation_mode, enable_thinking=think, **options
            )
        # What a turn looks like in the middle of a conversation is the template's to say.
        eos = self.pipe.processor.tokenizer.eos_token_id
        before = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        rendered = self.pipe.processor.apply_chat_template(before, tokenize=True, return_dict=True)["input_ids"]
        count = int((rendered == eos).sum())
        if not count:
            raise ValueError(f"the chat template ends no turn with {self.pipe.processor.tokenizer.eos_token!r}")
        turn = encode([[*before, message]], generation_mode=generation_mode, **options)
        start = int((turn["input_ids"][0] == eos).nonzero()[count - 1, 0])
        # The answer before ends in it, unless it was cut off or ends in an image.
        start += int(self._sequence["input_ids"][0, -1] == eos)
        return {**turn, "input_ids": turn["input_ids"][:, start:]}


def _message(text: str | list[dict[str, Any]], image: Any) -> dict[str, Any]:
    """A user's message: the images, then the text."""
    images = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
    parts = list(text) if isinstance(text, (list, tuple)) else [{"type": "text", "text": text}]
    return {"role": "user", "content": [*({"type": "image", "image": one} for one in images), *parts]}


__all__ = ["NextFlowConversation"]
