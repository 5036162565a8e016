"""What [`NextFlowPipeline`] does beside drawing one image a prompt: it talks, tells in text and images, thinks.

All of it is one call of the transformer's `generate(generation_mode="interleaved")`; `max_images=0` is a talk.
"""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils import logging
from transformers.generation.streamers import BaseStreamer

from .conversation_generation_nextflow import ImagesBeforeEnding, PartStreamer, StopWhen, iterate
from .conversation_nextflow import NextFlowConversation
from .helpers_nextflow import call_component, check_number, exclusive, exclusively, generator_per_image
from .outputs_nextflow import NextFlowFramesOutput
from .prompts_nextflow import NextFlowImagePrompt, NextFlowSteps, PerScale


logger = logging.get_logger(__name__)

Messages = list[dict[str, Any]] | list[list[dict[str, Any]]]
Generators = torch.Generator | list[torch.Generator]

DEFAULT_MAX_IMAGES = 4
DEFAULT_MAX_NEW_TOKENS = 512  # where neither the call nor the generation config says anything
TEXT_SETTINGS = ("temperature", "top_k", "top_p")


class NextFlowConversationMixin(NextFlowSteps):
    """
    `chat`, `interleave`, `frames` and `start_conversation`. Where a method draws, `temperature`, `top_k` and `top_p`
    are the images', as in `__call__`, and those of the text have `text_` in front. What is left out comes from the
    transformer's generation config.
    """

    @torch.no_grad()
    @exclusively
    def chat(
        self,
        messages: Messages,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generators | None = None,
        resolution: int | None = None,
        streamer: BaseStreamer | None = None,
    ) -> str | list[str]:
        r"""
        The text that comes next: captions, answers to questions about images, talk. Nothing is drawn.

        Args:
            messages (`list[dict]` or `list[list[dict]]`): One or several conversations.
            max_new_tokens (`int`, *optional*): Longest answer; 512 where the generation config has none.
            do_sample (`bool`, *optional*): Implied by a `temperature`, `top_k` or `top_p`; a temperature of 0 is none.
            temperature, top_k, top_p (*optional*): As in transformers' `generate`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One, or one for each conversation, which then gets the same answer in any batch.
            resolution (`int`, *optional*): Side in pixels of a square image with as many scales as given images get.
            streamer (`BaseStreamer`, *optional*): Gets the tokens as they come, of a single conversation.

        Examples:
            ```py
            >>> content = [{"type": "image", "image": "shapes.png"}, {"type": "text", "text": "what color is it?"}]
            >>> messages = [{"role": "user", "content": content}]
            >>> answer = pipe.chat(messages)

            >>> messages.append({"role": "assistant", "content": answer})
            >>> pipe.chat([*messages, {"role": "user", "content": "and the background?"}], max_new_tokens=16)
            ```

        Returns:
            `str`, or `list[str]` for a list of conversations.
        """
        conversations, is_batched = self.processor.as_conversations(messages)
        text = self.get_text_settings(max_new_tokens, do_sample, temperature, top_k, top_p)
        self._begin()
        inputs = self.encode_conversations(conversations, generation_mode="text", resolution=resolution)
        output = self.generate_answers(
            inputs,
            max_images=0,
            generators=generator_per_image(generator, len(conversations)),
            streamer=streamer,
            **text,
        )
        answers = self.processor.post_process_multimodal_output(output.answer().sequences, generation_mode="text")
        self.maybe_free_model_hooks()
        return answers if is_batched else answers[0]

    @torch.no_grad()
    @exclusively
    def interleave(
        self,
        messages: Messages,
        max_images: int = DEFAULT_MAX_IMAGES,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        text_temperature: float | None = None,
        text_top_k: int | None = None,
        text_top_p: float | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        resolution: int | None = None,
        negative_prompt: str = "",
        guidance_scale: PerScale | None = None,
        guidance_schedule: str | None = None,
        temperature: PerScale | None = None,
        top_k: PerScale | None = None,
        top_p: PerScale | None = None,
        generator: Generators | None = None,
        stream: bool = False,
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]] | Iterator[dict[str, Any]]:
        r"""
        An answer of text and images, in which the model begins images itself.

        `pipe._interrupt = True`, set elsewhere, ends it after the next token, or after the image that is being drawn.

        Args:
            messages (`list[dict]` or `list[list[dict]]`): One or several conversations.
            max_images (`int`, *optional*, defaults to 4): Images that an answer may have.
            max_new_tokens (`int`, *optional*):
                Longest answer, where an image counts as one token; 512 where the generation config has none.
            do_sample, text_temperature, text_top_k, text_top_p (*optional*): How text is sampled, as in `chat`.
            height, width, aspect_ratio, resolution, guidance_scale, guidance_schedule, temperature, top_k, top_p
            (*optional*): How images are drawn, as in [`~NextFlowPipeline.__call__`]; all have one size.
            negative_prompt (`str`, *optional*, defaults to `""`):
                What guidance leads away from. The unconditional prompt is the conversation without the user's text,
                then this; it has nothing of the answer.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One, or one for each conversation, for text and images alike.
            stream (`bool`, *optional*, defaults to `False`):
                Give an iterator of parts as they come, text word by word, of a single conversation. Leaving the loop
                ends the answer.

        Examples:
            ```py
            >>> story = "a story: a red circle on a white background turns blue and then green"
            >>> messages = [{"role": "user", "content": story}]
            >>> parts = pipe.interleave(messages, max_images=3)
            >>> images = [part["image"] for part in parts if part["type"] == "image"]

            >>> messages.append({"role": "assistant", "content": parts})
            >>> pipe.chat([*messages, {"role": "user", "content": "what color was it first?"}])

            >>> for part in pipe.interleave(messages[:1], stream=True):
            ...     print(part["text"], end="") if part["type"] == "text" else part["image"].show()
            ```

        Returns:
            `list[dict]`, parts `{"type": "text", "text": ...}` and `{"type": "image", "image": PIL image}`: content of
            an assistant's message. A list of those for a list of conversations, an iterator with `stream=True`.
        """
        conversations, is_batched = self.processor.as_conversations(messages)
        check_number("max_images", max_images, is_whole=True)
        if stream and is_batched:
            raise ValueError(f"`stream=True` takes a single conversation, got a list of {len(conversations)}")
        text = self.get_text_settings(max_new_tokens, do_sample, text_temperature, text_top_k, text_top_p, "text_")
        drawing = self.get_interleaved_settings(
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        self._begin()
        inputs = self.encode_conversations(
            conversations,
            generation_mode="interleaved",
            negative_prompt=negative_prompt if max_images and self.do_classifier_free_guidance else None,
            height=height,
            width=width,
            aspect_ratio=aspect_ratio,
            resolution=resolution,
        )
        settings = {
            "max_images": max_images,
            "generators": generator_per_image(generator, len(conversations)),
            **text,
            **drawing,
        }
        if stream:
            return self._stream_parts(inputs, settings)
        answers = self.decode_answers(self.generate_answers(inputs, **settings))
        self.maybe_free_model_hooks()
        return answers if is_batched else answers[0]

    @torch.no_grad()
    @exclusively
    def frames(
        self,
        storyline: str | list[str],
        num_frames: int | None = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        text_temperature: float | None = None,
        text_top_k: int | None = None,
        text_top_p: float | None = None,
        negative_prompt: str = "",
        generator: torch.Generator | None = None,
        **drawing: Any,
    ) -> NextFlowFramesOutput:
        r"""
        A short sequence of images, each drawn with those before it in view.

        Args:
            storyline (`str` or `list[str]`):
                What happens, told as one answer of text and images; or what is to be seen in each frame, a turn of one
                conversation each.
            num_frames (`int`, *optional*):
                How many frames. Needed with a `str`: where the model would end before, it begins the next image.
            max_new_tokens, do_sample, text_temperature, text_top_k, text_top_p (*optional*):
                For the text between the frames of a `str`, as in [`interleave`].
            negative_prompt (`str`, *optional*, defaults to `""`): As in [`interleave`].
            generator (`torch.Generator`, *optional*): For all frames.
            drawing: `height`, `width`, `aspect_ratio`, `resolution`, `guidance_scale`, `guidance_schedule`,
                `temperature`, `top_k`, `top_p`, as in [`~NextFlowPipeline.__call__`].

        Examples:
            ```py
            >>> story = pipe.frames("a story: a red circle moves from left to right", num_frames=3)
            >>> story.save("story.gif", fps=2)  # or story.mp4, or story.png: a contact sheet

            >>> story = pipe.frames(["a red circle", "make the circle blue", "add a green square"])
            ```

        Returns:
            [`NextFlowFramesOutput`]: the frames, and the text in front of each.
        """
        is_told = isinstance(storyline, str)
        if not is_told and not (storyline and all(isinstance(text, str) for text in storyline)):
            raise TypeError(f"`storyline` is {storyline!r}, expected a string or a non-empty list of strings")
        if is_told and num_frames is None:
            raise ValueError("`num_frames` is missing: a storyline in one string does not say how many there are")
        if not is_told and num_frames not in (None, len(storyline)):
            raise ValueError(f"`num_frames` is {num_frames} for a storyline of {len(storyline)}: leave it out")
        check_number("num_frames", num_frames, least=1, is_whole=True)
        writing = {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "text_temperature": text_temperature,
            "text_top_k": text_top_k,
            "text_top_p": text_top_p,
        }
        conversation = self.start_conversation()
        common = {"negative_prompt": negative_prompt, "generator": generator, **drawing}
        if is_told:
            parts = conversation.interleave(storyline, num_frames, min_images=num_frames, **writing, **common)
            return NextFlowFramesOutput(*_frames_of(parts))
        if given := sorted(name for name, value in writing.items() if value is not None):
            raise ValueError(f"got {given} with a storyline in parts: nothing is written between its frames")
        images = [conversation.generate_image(text, **common) for text in storyline]
        return NextFlowFramesOutput(images, list(storyline))

    def start_conversation(self, system: str | None = None, *, think: bool = False) -> NextFlowConversation:
        """See [`NextFlowConversation`]."""
        return NextFlowConversation(self, system, think=think)

    # ---- thinking

    def check_thinking(self, think: bool, max_new_tokens: int | None) -> None:
        if max_new_tokens is not None and not think:
            raise ValueError(f"`max_new_tokens` is {max_new_tokens} without `think=True`: nothing is written")
        check_number("max_new_tokens", max_new_tokens, least=1, is_whole=True)

    def think_first(
        self,
        prompts: list[NextFlowImagePrompt],
        max_new_tokens: int | None = None,
        generators: list[torch.Generator] | None = None,
    ) -> tuple[list, list[str], list[str]]:
        """
        The prompts of images to draw, with what the model writes before each; the reasoning and the final prompt that
        this says. It is for the model to begin the image; after `max_new_tokens` it is begun for it.
        """
        self._begin()
        text = self.get_text_settings(max_new_tokens)
        rows = {"input_ids": [prompt.input_ids[:-1].tolist() for prompt in prompts]}  # without `<boi>`
        inputs = dict(self.processor.tokenizer.pad(rows, padding_side="left", return_tensors="pt"))
        inputs["target_grids"] = torch.stack([prompt.image_grids[-1] for prompt in prompts])
        if any(len(prompt.image_grids) > 1 for prompt in prompts):
            inputs["image_grids"] = torch.cat([prompt.image_grids[:-1] for prompt in prompts])
            inputs["image_codes"] = torch.cat([prompt.image_codes for prompt in prompts])
        inputs = {name: tensor.to(self._execution_device) for name, tensor in inputs.items()}
        answer = self.generate_answers(
            inputs, min_images=1, max_images=1, stop_at_image=True, generators=generators, **text
        ).answer()
        thought, reasonings, final_prompts = [], [], []
        for prompt, ids, mask in zip(prompts, answer.sequences.cpu(), answer.attention_mask.cpu(), strict=True):
            written = ids[mask.bool()]
            written = written[written != self.processor.boi_token_id]
            said = self.processor.tokenizer.decode(written, skip_special_tokens=True)
            reasoning, final_prompt = self.processor.split_reasoning(said)
            before, boi = prompt.input_ids[:-1], prompt.input_ids[-1:]
            thought.append(replace(prompt, input_ids=torch.cat([before, written.to(before.device), boi])))
            reasonings.append(reasoning or "")
            final_prompts.append(final_prompt)
        return thought, reasonings, final_prompts

    # ---- steps

    def get_text_settings(
        self,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        prefix: str = "",
    ) -> dict[str, Any]:
        """How to write, in `generate`'s words; `prefix` stands before the names of the call."""
        if max_new_tokens is None:
            max_new_tokens = self.transformer.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        check_number("max_new_tokens", max_new_tokens, least=1, is_whole=True)
        given = dict(zip(TEXT_SETTINGS, (temperature, top_k, top_p)))
        for name, value in given.items():
            check_number(prefix + name, value, is_whole=name == "top_k")
        given = {
            name: int(value) if name == "top_k" else float(value) for name, value in given.items() if value is not None
        }
        if do_sample is None and given:
            do_sample = given.get("temperature") != 0
        if do_sample and given.get("temperature") == 0:
            raise ValueError(
                f"`do_sample=True` with `{prefix}temperature=0`, which takes the best token: pass one of the two"
            )
        if do_sample is False and (unused := [prefix + name for name, value in given.items() if value != 0]):
            raise ValueError(f"got {unused} without sampling: leave them out, or pass `do_sample=True`")
        if not do_sample:
            given = {}
        return {"max_new_tokens": max_new_tokens, **({} if do_sample is None else {"do_sample": do_sample}), **given}

    def get_interleaved_settings(self, **settings: Any) -> dict[str, Any]:
        """How to draw, in `generate`'s words; sets the guidance that `do_classifier_free_guidance` is about."""
        resolved = self.get_image_settings(**settings)
        self._guidance_scale, self._image_guidance_scale = resolved["guidance_scale"], 1.0
        # `generate` guides towards source images in "image" mode alone.
        resolved.pop("image_guidance_scale")
        return {f"image_{name}" if name in TEXT_SETTINGS else name: value for name, value in resolved.items()}

    def encode_conversations(
        self,
        conversations: list[list[dict[str, Any]]],
        *,
        generation_mode: str,
        encode_images: bool = True,
        **options: Any,
    ) -> dict[str, torch.Tensor]:
        """
        Inputs of `generate`: tokens, and schedules and codes of the images. `options` of
        [`~NextFlowProcessor.apply_chat_template`]; `None` is left out.
        """
        device = self._execution_device
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            generation_mode=generation_mode,
            **{"negative_prompt": None, **{name: value for name, value in options.items() if value is not None}},
        )
        encoded = {name: tensor.to(device) for name, tensor in inputs.items() if name != "pixel_values"}
        if "pixel_values" in inputs and encode_images:
            pixel_values = inputs["pixel_values"].to(device, self.vision_tokenizer.dtype)
            image_grids = encoded["image_grids"]
            encoded["image_codes"] = call_component(
                self.vision_tokenizer, "encode", pixel_values, image_grids
            ).image_codes
        return encoded

    def generate_answers(
        self,
        inputs: dict[str, Any],
        *,
        max_images: int,
        max_new_tokens: int,
        min_images: int = 0,
        generators: list[torch.Generator] | None = None,
        stop: threading.Event | None = None,
        **options: Any,
    ) -> Any:
        """
        The transformer's [`NextFlowInterleavedGenerationOutput`]. Answers have at least `min_images` images, unless
        they are interrupted.
        """
        input_ids = inputs["input_ids"]
        forcing = None
        if min_images:
            if max_new_tokens < min_images:
                raise ValueError(f"`max_new_tokens` is {max_new_tokens}, expected at least {min_images}: one an image")
            config = self.transformer.config
            eos = self.transformer.generation_config.eos_token_id
            eos = self.processor.tokenizer.eos_token_id if eos is None else eos
            forcing = ImagesBeforeEnding(
                input_ids,
                num_images=min_images,
                max_new_tokens=max_new_tokens,
                boi_token_id=config.boi_token_id,
                eoi_token_id=config.eoi_token_id,
                image_token_id=config.image_token_id,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                eos_token_ids=[eos] if isinstance(eos, int) else eos,
            )
        output = call_component(
            self.transformer,
            "generate",
            **inputs,
            generation_mode="interleaved",
            generator=generators,
            max_images=max_images,
            max_new_tokens=max_new_tokens,
            stopping_criteria=[StopWhen(lambda: self.interrupt or (stop is not None and stop.is_set()))],
            logits_processor=None if forcing is None else [forcing],
            **options,
        )
        if forcing is not None and max_new_tokens > min_images and forcing.was_forced.any():
            logger.warning(
                f"{int(forcing.was_forced.sum())} of {len(input_ids)} answers had not begun their images after "
                f"`max_new_tokens` ({max_new_tokens}) tokens: they were begun there"
            )
        return output

    def decode_answers(self, output: Any) -> list[list[dict[str, Any]]]:
        """What was generated, as parts of text and images, a list for each row."""
        answer = output.answer()
        images = {}
        if len(answer.image_grids):
            pixel_values = call_component(self.vision_tokenizer, "decode", answer.image_codes, answer.image_grids)
            images = {"pixel_values": pixel_values.float().cpu(), "image_grids": answer.image_grids.cpu()}
        return self.processor.post_process_multimodal_output(answer.sequences, generation_mode="interleaved", **images)

    def _stream_parts(self, inputs: dict[str, Any], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        stop = threading.Event()

        def decode_image(image_codes: torch.Tensor, image_grids: torch.Tensor) -> Any:
            return self.decode_codes(image_codes, image_grids[None])[0]

        def work(emit: Any) -> None:
            streamer = PartStreamer(self.processor.tokenizer, emit, decode_image)
            with exclusive(self):  # a thread of its own
                self.generate_answers(inputs, streamer=streamer, stop=stop, **settings)
                self.maybe_free_model_hooks()

        return iterate(work, stop.set)


def _frames_of(parts: list[dict[str, Any]]) -> tuple[list, list[str]]:
    """The images, and the text in front of each."""
    images, texts, text = [], [], ""
    for part in parts:
        if part["type"] == "text":
            text += part["text"]
        else:
            images.append(part["image"])
            texts.append(text.strip())
            text = ""
    return images, texts


__all__ = ["NextFlowConversationMixin"]
