"""What [`NextFlowPipeline`] does beside one image a prompt: it chats, answers in text and images, and thinks.

All of it is one call of the transformer's `generate(generation_mode="interleaved")`; a chat has `max_images=0`.
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
from .helpers_nextflow import check_numbers, exclusive, exclusively, given, loaded
from .outputs_nextflow import NextFlowFramesOutput
from .prompts_nextflow import Conversation, NextFlowImagePrompt, NextFlowImageSteps, PerScale, generator_per_image


logger = logging.get_logger(__name__)

Messages = Conversation | list[Conversation]
Generators = torch.Generator | list[torch.Generator]

DEFAULT_MAX_IMAGES = 4
DEFAULT_MAX_NEW_TOKENS = 512  # where neither the call nor the generation config says anything
SAMPLING = ("temperature", "top_k", "top_p")
SIZE = ("height", "width", "aspect_ratio", "resolution")


class NextFlowConversationMixin(NextFlowImageSteps):
    """
    `chat`, `interleave`, `frames` and `start_conversation`. Where a method samples images, `temperature`, `top_k` and
    `top_p` are the images', as in `__call__`, and those of the text have `text_` in front. What is left out comes from
    the transformer's generation config.
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
        The text that comes next: captions, answers to questions about images, conversation. No image is sampled.

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
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        text = self.get_text_settings(max_new_tokens, do_sample, **sampling)
        self._begin()
        inputs = self.encode_conversations(conversations, generation_mode="text", resolution=resolution)
        generators = generator_per_image(generator, len(conversations))
        output = self.generate_answers(inputs, max_images=0, generators=generators, streamer=streamer, **text)
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

        `pipe._interrupt = True`, set elsewhere, ends it after the next token, or after the image that has begun.

        Args:
            messages (`list[dict]` or `list[list[dict]]`): One or several conversations.
            max_images (`int`, *optional*, defaults to 4): Images that an answer may have.
            max_new_tokens (`int`, *optional*):
                Longest answer, where an image counts as one token; 512 where the generation config has none.
            do_sample, text_temperature, text_top_k, text_top_p (*optional*): How text is sampled, as in `chat`.
            height, width, aspect_ratio, resolution, guidance_scale, guidance_schedule, temperature, top_k, top_p
            (*optional*): How images are sampled, as in [`~NextFlowPipeline.__call__`]; all have one size.
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

        Raises:
            `ValueError`: for several conversations with `stream=True`, and for settings that do not fit together.
        """
        conversations, is_batched = self.processor.as_conversations(messages)
        check_numbers(0, max_images=max_images)
        if stream and is_batched:
            raise ValueError(f"`stream=True` takes a single conversation, got a list of {len(conversations)}")
        text = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "text_temperature": text_temperature}
        text |= {"text_top_k": text_top_k, "text_top_p": text_top_p}
        size = {"height": height, "width": width, "aspect_ratio": aspect_ratio, "resolution": resolution}
        images = {"guidance_scale": guidance_scale, "guidance_schedule": guidance_schedule}
        images |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        size, sampling = self.get_interleaved_settings(**text, **size, **images)
        self._begin()
        negative = negative_prompt if max_images and self.do_classifier_free_guidance else None
        inputs = self.encode_conversations(
            conversations, generation_mode="interleaved", negative_prompt=negative, **size
        )
        sampling |= {"max_images": max_images, "generators": generator_per_image(generator, len(conversations))}
        if stream:
            return self._stream_parts(inputs, sampling)
        answers = self.decode_answers(self.generate_answers(inputs, **sampling))
        self.maybe_free_model_hooks()
        return answers if is_batched else answers[0]

    @torch.no_grad()
    @exclusively
    def frames(
        self,
        storyline: str | list[str],
        num_frames: int | None = None,
        **settings: Any,
    ) -> NextFlowFramesOutput:
        r"""
        A short sequence of images, each sampled with those before it in view.

        Args:
            storyline (`str` or `list[str]`):
                What happens, told as one answer of text and images; or what is to be seen in each frame, a turn of one
                conversation each.
            num_frames (`int`, *optional*):
                How many frames. Needed with a `str`: where the model would end before, it begins the next image.
            settings: As in [`~NextFlowPipeline.interleave`], with one `generator` for all frames. Those of the text
                (`max_new_tokens`, `do_sample`, `text_temperature`, ...) go with a storyline in one `str`.

        Examples:
            ```py
            >>> story = pipe.frames("a story: a red circle moves from left to right", num_frames=3)
            >>> story.save("story.gif", fps=2)  # or story.mp4, or story.png: a contact sheet

            >>> story = pipe.frames(["a red circle", "make the circle blue", "add a green square"])
            ```

        Returns:
            [`NextFlowFramesOutput`]: the frames, and the text in front of each.

        Raises:
            `TypeError`: where `storyline` is neither text nor a list of texts.
            `ValueError`: one text without `num_frames`, or a list with another number or with settings of text.
        """
        is_told = isinstance(storyline, str)
        if not is_told and not (storyline and all(isinstance(text, str) for text in storyline)):
            raise TypeError(f"`storyline` is {storyline!r}, expected a string or a non-empty list of strings")
        if is_told and num_frames is None:
            raise ValueError("`num_frames` is missing: a storyline in one string does not say how many there are")
        if not is_told and num_frames not in (None, len(storyline)):
            raise ValueError(f"`num_frames` is {num_frames} for a storyline of {len(storyline)}: leave it out")
        check_numbers(num_frames=num_frames)
        conversation = self.start_conversation()
        if isinstance(storyline, str):
            assert num_frames is not None
            parts = conversation.interleave(storyline, num_frames, min_images=num_frames, **settings)
            return NextFlowFramesOutput(*_frames_of(parts))
        written = ("max_new_tokens", "do_sample", *(f"text_{name}" for name in SAMPLING))
        if found := sorted(name for name in written if settings.pop(name, None) is not None):
            raise ValueError(f"got {found} with a storyline in parts: nothing is written between its frames")
        images = [conversation.generate_image(text, **settings) for text in storyline]
        return NextFlowFramesOutput(images, list(storyline))

    def start_conversation(self, system: str | None = None, *, think: bool = False) -> NextFlowConversation:
        """Begin a conversation that keeps its cache from turn to turn, see [`NextFlowConversation`]."""
        return NextFlowConversation(self, system, think=think)

    # ---- thinking

    def check_thinking(self, think: bool, max_new_tokens: int | None) -> None:
        """Raises `ValueError` where `max_new_tokens` is below 1, or given without `think`."""
        if max_new_tokens is not None and not think:
            raise ValueError(f"`max_new_tokens` is {max_new_tokens} without `think=True`: nothing is written")
        check_numbers(max_new_tokens=max_new_tokens)

    def think_first(
        self,
        prompts: list[NextFlowImagePrompt],
        max_new_tokens: int | None = None,
        generators: list[torch.Generator] | None = None,
    ) -> tuple[list, list[str], list[str]]:
        """
        The prompts of images to sample, each with what the model writes before it; the reasoning and the final prompt
        in that text. The model begins the image itself; after `max_new_tokens`, or where it is interrupted, the image
        is begun for it.
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
        # Text alone: the image is then sampled like any other, with guidance and previews.
        answer = self.generate_answers(
            inputs, min_images=1, max_images=1, stop_at_image=True, generators=generators, **text
        ).answer()
        thought, reasonings, final_prompts = [], [], []
        for prompt, ids, mask in zip(prompts, answer.sequences.cpu(), answer.attention_mask.cpu(), strict=True):
            written = ids[mask.bool()]
            # The `<boi>` that ended the text comes back as the end of the prompt.
            written = written[written != self.processor.boi_token_id]
            said = self.processor.tokenizer.decode(written, skip_special_tokens=True)
            reasoning, final_prompt = self.processor.split_reasoning(said)
            before, boi = prompt.input_ids[:-1], prompt.input_ids[-1:]
            thought.append(replace(prompt, input_ids=torch.cat([before, written.to(before.device), boi])))
            reasonings.append(reasoning or "")
            final_prompts.append(final_prompt)
        self._current = thought  # their images belong to the same work
        return thought, reasonings, final_prompts

    # ---- steps

    def get_text_settings(
        self, max_new_tokens: int | None = None, do_sample: bool | None = None, *, prefix: str = "", **sampling: Any
    ) -> dict[str, Any]:
        """
        How text is sampled, in `generate`'s words. `sampling` has `temperature`, `top_k` and `top_p`; `prefix` stands
        before their names in the call.
        """
        if self.transformer is None:
            raise ValueError("`transformer` is None: without it images are decoded, and no text is written")
        if max_new_tokens is None:
            max_new_tokens = self.transformer.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        check_numbers(max_new_tokens=max_new_tokens)
        found = given(**sampling)
        for name, value in found.items():
            check_numbers(0, is_whole=name == "top_k", **{prefix + name: value})
            found[name] = int(value) if name == "top_k" else float(value)
        if do_sample is None and found:
            do_sample = found.get("temperature") != 0
        if do_sample and found.get("temperature") == 0:
            raise ValueError(
                f"`do_sample=True` with `{prefix}temperature=0`, which takes the best token: pass one of the two"
            )
        if do_sample is False and (unused := [prefix + name for name, value in found.items() if value != 0]):
            raise ValueError(f"got {unused} without sampling: leave them out, or pass `do_sample=True`")
        return {"max_new_tokens": max_new_tokens, **given(do_sample=do_sample), **(found if do_sample else {})}

    @exclusively  # before a conversation changes the guidance of another thread's call
    def get_interleaved_settings(self, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Settings of [`~NextFlowPipeline.interleave`] as the size of images, and as `generate` takes the others. Sets
        the guidance that `do_classifier_free_guidance` is about.
        """
        size = {name: settings.pop(name, None) for name in SIZE}
        text = {name: settings.pop(name, None) for name in ("max_new_tokens", "do_sample")}
        sampling = {name: settings.pop(f"text_{name}", None) for name in SAMPLING}
        text = self.get_text_settings(**text, prefix="text_", **sampling)
        if (asked := settings.get("image_guidance_scale")) is not None:
            raise ValueError(f"`image_guidance_scale` is {asked}, which guides images of `pipe(...)` alone")
        images = self.get_image_settings(**settings)
        self._guidance_scale, self._image_guidance_scale = images["guidance_scale"], 1.0
        # `generate` guides towards source images in "image" mode alone.
        images.pop("image_guidance_scale")
        return size, text | {f"image_{name}" if name in SAMPLING else name: value for name, value in images.items()}

    def encode_conversations(
        self,
        conversations: list[Conversation],
        *,
        generation_mode: str,
        encode_images: bool = True,
        **options: Any,
    ) -> dict[str, torch.Tensor]:
        """
        Inputs of `generate`: tokens, and schedules and codes of the images. `options` of
        [`~NextFlowProcessor.apply_chat_template`]; `None` is left out.
        """
        options = {"negative_prompt": None, **given(**options), "return_dict": True, "return_tensors": "pt"}
        inputs = self.processor.apply_chat_template(
            conversations, tokenize=True, generation_mode=generation_mode, **options
        )
        encoded = {name: value.to(self._execution_device) for name, value in inputs.items() if name != "pixel_values"}
        if "pixel_values" in inputs and encode_images:
            encoded["image_codes"] = self._encode_pixels(inputs["pixel_values"], encoded["image_grids"])
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
            eos = self.transformer.generation_config.eos_token_id
            eos = self.processor.tokenizer.eos_token_id if eos is None else eos
            forcing = ImagesBeforeEnding(
                input_ids,
                num_images=min_images,
                max_new_tokens=max_new_tokens,
                config=self.transformer.config,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                eos_token_ids=[eos] if isinstance(eos, int) else eos,
            )
        output = loaded(self.transformer).generate(
            **inputs,
            generation_mode="interleaved",
            generator=generators,
            max_images=max_images,
            max_new_tokens=max_new_tokens,
            stopping_criteria=[StopWhen(lambda: self._interrupt or (stop is not None and stop.is_set()))],
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
            pixel_values = loaded(self.vision_tokenizer).decode(answer.image_codes, answer.image_grids)
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
