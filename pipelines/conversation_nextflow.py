"""A conversation that keeps its cache: every turn runs only what is new, be it text or an image."""

from typing import Any

import torch

from .helpers_nextflow import check_numbers, exclusive, given
from .prompts_nextflow import generator_per_image, guides, has_user_image, schedule_of, user_message


class NextFlowConversation:
    r"""
    Text and images in turn, on one cache: no token of the conversation goes through the transformer twice, and no
    image is encoded again, sampled ones included. Only the unconditional prompt of guidance, a sequence of its own, is
    run again for every guided image.

    Images of the model stay in the sequence as they were sampled; those that are given may have their last grid once
    more (the processor's `append_last_scale`). Conversations are trained in the same layout.

    Args:
        pipe ([`NextFlowPipeline`]): Used, not copied: its settings and adapters are those of the moment. Changing its
            weights in between makes the cache wrong.
        system (`str`, *optional*): A system message.
        think (`bool`, *optional*, defaults to `False`):
            Ask for thinking: in `generate_image` the model then writes before it samples the image.

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
        resolution: int | None = None,
        generator: torch.Generator | None = None,
        streamer: Any = None,
        **sampling: float | None,
    ) -> str:
        """
        The answer to `text`, or to a list of parts, with `image` (one or a list) in front. Settings as in
        [`~NextFlowPipeline.chat`], which says what `sampling` (`temperature`, `top_k`, `top_p`) means.
        """
        settings = self.pipe.get_text_settings(max_new_tokens, do_sample, **sampling)
        settings |= {"max_images": 0, "streamer": streamer}
        parts = self._answer(user_message(text, image), {"resolution": resolution}, "", generator, settings)
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
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> Any:
        """
        The image that `text` asks for, at the size of the conversation's last image unless `height` and `width`,
        `aspect_ratio` or `resolution` say otherwise. `settings` as in [`~NextFlowPipeline.interleave`];
        `max_new_tokens` is for a conversation that thinks, whose thoughts are in `messages[-1]`. `None` where
        `pipe._interrupt` ended the thinking.
        """
        self.pipe.check_thinking(self.think, max_new_tokens)
        size, settings = self.pipe.get_interleaved_settings(max_new_tokens=max_new_tokens, **settings)
        settings |= {"min_images": 1, "max_images": 1}
        if not self.think:  # the image is the only token
            settings |= {"max_new_tokens": 1, "do_sample": False}
        parts = self._answer(user_message(text, image), size, negative_prompt, generator, settings)
        return next((part["image"] for part in parts if part["type"] == "image"), None)

    def interleave(
        self,
        text: str | list[dict[str, Any]],
        max_images: int = 4,
        *,
        image: Any = None,
        min_images: int = 0,
        negative_prompt: str = "",
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """
        An answer of text and `min_images` to `max_images` images. `settings` as in [`~NextFlowPipeline.interleave`].
        Raises `ValueError` unless 0 <= `min_images` <= `max_images`.
        """
        check_numbers(0, min_images=min_images, max_images=max_images)
        if not min_images <= max_images:
            raise ValueError(f"`min_images` is {min_images} and `max_images` {max_images}, expected 0 <= min <= max")
        size, settings = self.pipe.get_interleaved_settings(**settings)
        settings |= {"min_images": min_images, "max_images": max_images}
        return self._answer(user_message(text, image), size, negative_prompt, generator, settings)

    # ---- a turn

    @torch.inference_mode(False)  # in it the cache could not grow outside of it, in a later turn
    @torch.no_grad()
    def _answer(
        self,
        message: dict[str, Any],
        size: dict[str, Any],
        negative_prompt: str,
        generator: torch.Generator | None,
        settings: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """The content of the next assistant's message; it and `message` are then part of the conversation."""
        with exclusive(self.pipe):
            pipe, max_images = self.pipe, settings["max_images"]
            pipe.processor.as_conversations([message])
            pipe._begin()
            # 1. The turn, and what is known from those before
            if max_images and not has_user_image([message]):
                size = self._with_last_shape(size)
            turn = self._encode_turn(message, "interleaved" if max_images else "text", **size)
            inputs = self._joined(turn)
            options = {"resolution": size.get("resolution")}  # of the given images
            if max_images and (given(**size).keys() - {"resolution"} or "image_grids" not in inputs):
                inputs["target_grids"] = turn["target_grids"]  # else the image gets the size of the last one
            # As settings say: the pipeline's own guidance may be that of another thread's call by now.
            if max_images and guides(settings["guidance_scale"]):
                inputs["negative_input_ids"] = self._negative(message, negative_prompt, **options)

            # 2. The answer. A cache that an error leaves half written is of no use
            cache, self._cache = self._cache, None
            settings |= {"past_key_values": cache, "return_dict_in_generate": True}
            output = pipe.generate_answers(inputs, generators=generator_per_image(generator, 1), **settings)
            (parts,) = pipe.decode_answers(output)
            pipe.maybe_free_model_hooks()

            # 3. What the next turn continues
            answer_ids = output.sequences[:, output.prompt_length :]
            # This turn without the user's text, and the answer as it is: the unconditional prompt of images to come.
            self._negative_ids = torch.cat([self._negative(message, "", **options), answer_ids], dim=1)
            self._sequence = {"input_ids": output.sequences}
            if len(output.image_grids):
                self._sequence |= {"image_codes": output.image_codes, "image_grids": output.image_grids}
            self._cache = output.past_key_values
            self.messages += [message, {"role": "assistant", "content": parts}]
            return parts

    def _with_last_shape(self, size: dict[str, Any]) -> dict[str, Any]:
        """A `resolution` alone is that of the next image, in the shape of the last one."""
        if given(**size).keys() != {"resolution"} or "image_grids" not in self._sequence:
            return size
        height, width = schedule_of(self._sequence["image_grids"][-1])[-1]
        return {**size, "aspect_ratio": f"{width}:{height}"}

    def _joined(self, turn: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The whole sequence, the turn's behind that of the turns before."""
        inputs = {}
        for name, dim in (("input_ids", 1), ("image_codes", 0), ("image_grids", 0)):
            tensors = [part[name] for part in (self._sequence, turn) if name in part]
            if tensors:
                inputs[name] = torch.cat(tensors, dim=dim)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])  # one row, never padded
        return inputs

    def _negative(self, message: dict[str, Any], text: str, **options: Any) -> torch.Tensor:
        """The unconditional prompt: the conversation without the user's text, then `text`."""
        (message,) = self.pipe.processor.unconditional_messages([message], text)
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
