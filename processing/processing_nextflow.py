"""Messages with images <-> the sequence the model reads (§2.2; chat format not specified by the paper).

Only the template writes control tokens: the same characters in somebody's message stay text. The layout of the
sequence is sequence_nextflow.py's. Knows nothing of codes, and nothing of the model.
"""

import functools
import re
import threading
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import (
    AudioKwargs,
    MultiModalData,
    ProcessingKwargs,
    TextKwargs,
    VideosKwargs,
)
from transformers.utils.chat_template_utils import render_jinja_template

from .image_processing_nextflow import NextFlowImageProcessorKwargs
from .messages_nextflow import (
    ControlTokens,
    as_conversations,
    check_text,
    split_reasoning,
    take_images,
    unconditional_messages,
    with_thinking_prompt,
)
from .scale_schedule_nextflow import num_cells
from .sequence_nextflow import NextFlowSequenceProcessor


# Compiled templates are cached in transformers, and each has one tracker of the assistant's tokens.
_RENDERING = threading.Lock()
_GENERATION_MODES = (None, "text", "image", "interleaved")
_TEXT_OPTIONS = {
    "padding",
    "padding_side",
    "pad_to_multiple_of",
    "max_length",
    "return_tensors",
    "return_attention_mask",
    "return_mm_token_type_ids",
    "return_text_replacement_offsets",
    "truncation",
}


class NextFlowProcessorKwargs(ProcessingKwargs, total=False):
    r"""
    generation_mode (`str`, *optional*):
        `"image"` ends every row in `<boi>` and adds the schedule of the image to sample to `image_grids`; `"text"` and
        `"interleaved"` end in the assistant's header. `"interleaved"` adds `target_grids`, the schedules of the
        images that the answer may have.
    height (`int`, *optional*): Height in pixels of the image to sample, snapped to the nearest bucket. Needs `width`.
    width (`int`, *optional*): Width in pixels of the image to sample. Needs `height`.
    aspect_ratio (`str`, *optional*): `"width:height"` of the image to sample, such as `"16:9"`, instead of its size.
    target_grids (`list[tuple[int, int]]`, *optional*): The schedule of the image to sample itself, coarse to fine.
    """

    images_kwargs: NextFlowImageProcessorKwargs

    generation_mode: str | None
    height: int | None
    width: int | None
    aspect_ratio: str | None
    target_grids: list | tuple | None


# Every option of `NextFlowProcessor.__call__`, flat or in its group. Those of sounds and videos mean nothing here;
# transformers lets callers pass them to any processor.
_OPTIONS = {
    option
    for group in (NextFlowProcessorKwargs, NextFlowImageProcessorKwargs, TextKwargs, VideosKwargs, AudioKwargs)
    for option in group.__annotations__
} | {"common_kwargs"}


class NextFlowProcessor(NextFlowSequenceProcessor):
    r"""
    A tokenizer and a [`NextFlowImageProcessor`] behind one `messages` format, for prompts, data sets and outputs.

    Args:
        image_processor ([`NextFlowImageProcessor`]): Pixels and schedules.
        tokenizer ([`PreTrainedTokenizerBase`]): One that went through [`extend_tokenizer`].
        chat_template (`str`, *optional*): Defaults to ChatML without a default system prompt (`chat_template.jinja`).
        image_token (`str`, *optional*, defaults to `"<|image_pad|>"`): Placeholder of one cell of scales 2..K.
        boi_token (`str`, *optional*, defaults to `"<boi>"`): Begin of image.
        eoi_token (`str`, *optional*, defaults to `"<eoi>"`): End of image.
        append_last_scale (`bool`, *optional*, defaults to `False`):
            Whether an image that is given gets one scale more: its last grid again. A scale's input is the codes of
            the one before, so the codes of the last scale are seen only then (not specified by the paper; costs the
            cells of the last grid). Images of assistant messages, and all that are trained on, stand in the sequence
            as they are sampled, without it: a conversation goes on from what the model has sampled. The model's
            `max_scales` must be [`max_scales`].
    """

    valid_processor_kwargs = NextFlowProcessorKwargs
    text_kwargs = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    # For the pipeline, which has the processor but cannot import this package
    split_reasoning = staticmethod(split_reasoning)
    unconditional_messages = staticmethod(unconditional_messages)
    with_thinking_prompt = staticmethod(with_thinking_prompt)

    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<|image_pad|>",
        boi_token: str = "<boi>",
        eoi_token: str = "<eoi>",
        append_last_scale: bool = False,
        **kwargs,
    ):
        self.append_last_scale = append_last_scale
        self.image_token = image_token
        self.boi_token = boi_token
        self.eoi_token = eoi_token
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (image_token, boi_token, eoi_token) if token not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}: prepare it with `extend_tokenizer`")
        self.image_token_id = vocabulary[image_token]
        self.boi_token_id = vocabulary[boi_token]
        self.eoi_token_id = vocabulary[eoi_token]
        if chat_template is None:
            chat_template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """As [`~transformers.ProcessorMixin.save_pretrained`], which leaves an `auto_map` behind in this object."""
        files = super().save_pretrained(save_directory, push_to_hub, **kwargs)
        vars(self).pop("auto_map", None)  # a processor that was loaded has none
        return files

    # ---- text and images in

    def __call__(
        self,
        images: Any | None = None,
        text: str | list[str] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Rendered prompts and their images to model inputs; [`~NextFlowProcessor.apply_chat_template`] does both steps.

        Args:
            images (image or (nested) list of images, *optional*):
                One for every `<|image_pad|>` of the text, alone or as `<boi><|image_pad|><eoi>`, in reading order. A
                list per prompt is checked per prompt.
            text (`str` or `list[str]`, *optional*):
                Trusted text: control tokens in it are control tokens. A `<boi>` at the very end is an image to sample.
                Its images count as given: who showed them is known to `apply_chat_template` alone.
            kwargs: See [`NextFlowProcessorKwargs`] and the options of tokenizer and image processor (`padding`,
                `padding_side`, `max_length`, `return_tensors`, `resolution`, `return_mm_token_type_ids`, ...).

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` (batch, length), padded on the left; `image_grids`
            (number of `<boi>`, max_scales, 2), in reading order; `pixel_values` (images, 3, height, width).

        Raises:
            `ValueError` where images and placeholders differ in number, where an image is not laid out as above, and
            where a row with all its image cells is longer than `max_length` or the tokenizer's `model_max_length`:
            `truncation` cuts rows of text alone.
        """
        for name in ("videos", "audio"):  # transformers' pipelines name them to every processor
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"got {name}: NextFlow reads text and images")
        if text is None:
            if images is None:
                raise ValueError("got neither text nor images")
            options = self._options(kwargs)
            return self.image_processor(images, **options["images_kwargs"])
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(row, str) for row in texts):
            raise ValueError("text must be a string or a non-empty list of strings")
        for index, row in enumerate(texts):
            check_text(row, f"text {index}")
        return self._model_inputs(texts, images, self._options(kwargs))

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tools: list[dict] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        images: Any | None = None,
        return_labels: bool = False,
        train_on: str = "responses",
        negative_prompt: str | None = "",
        enable_thinking: bool = False,
        **kwargs,
    ) -> BatchFeature | str | list[str] | list[list[int]] | torch.Tensor:
        r"""
        One conversation, or a list of them, to model inputs.

        A message is `{"role": "system" | "user" | "assistant", "content": ...}`, its content a string or a list of
        parts `{"type": "text", "text": ...}` and `{"type": "image", "image": PIL image | path | array}` (`"path"`,
        `"url"` and `"base64"` work as keys too). An image part without data takes the next one of `images`.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): The messages.
            add_generation_prompt (`bool`, *optional*): End in the assistant's header. Implied by `generation_mode`.
            continue_final_message (`bool` or `str`, *optional*): Leave the final message open instead; with
                `generation_mode="image"` the image comes after it.
            tokenize, return_dict, return_tensors: As in transformers: a string, the ids, or a `BatchFeature`.
            processor_kwargs (`dict`, *optional*): Options of `__call__`; they may also be given directly.
            sanitize_control_tokens (`bool`, *optional*, defaults to `True`):
                Control tokens spelled out in messages are tokenized as the plain text they are. Without `tokenize`
                that cannot be expressed, and they are refused.
            images (image or (nested) list of images, *optional*): Data for the image parts that carry none.
            return_labels (`bool`, *optional*): Add `labels` (batch, length), Hugging Face convention: not shifted,
                -100 where nothing is learned. `<|image_pad|>`, `<eoi>` and padding always have -100; `<boi>` stands
                for its image.
            train_on (`str`, *optional*, defaults to `"responses"`):
                `"responses"`: what follows an assistant's header, through `<|im_end|>`; `"all"`: every token.
            return_assistant_tokens_mask (`bool`, *optional*): Add `assistant_masks`, 1 in assistant responses.
            negative_prompt (`str`, *optional*, defaults to `""`):
                With a `generation_mode` with images, `tokenize` and `return_dict`: add `negative_input_ids` and
                `negative_attention_mask`, the unconditional prompts of guidance: the same conversations with the same
                images, without the user's text, and with this at the end of the last user message (as training drops
                text: `""`). `None` leaves them out, where guidance is 1.
            enable_thinking (`bool`, *optional*, defaults to `False`):
                Ask the model to think before an image: `THINKING_PROMPT` becomes the system message, or the beginning
                of the one that is there. The unconditional prompts are those without thinking.
            kwargs: Options of `__call__`, such as `generation_mode`, `height`, `width`, `resolution`; variables of a
                custom template.

        Returns:
            `str` without `tokenize`, `list` of ids without `return_dict`, else `BatchFeature`: `input_ids` and
            `attention_mask` (batch, length), with images also `pixel_values` and `image_grids` in reading order.

        Raises:
            `ValueError`: where messages, images, size and options do not fit together.
        """
        template = self._resolve_chat_template(chat_template)
        kwargs |= processor_kwargs or {}
        images, negative_prompt = kwargs.pop("images", images), kwargs.pop("negative_prompt", negative_prompt)
        given = dict(kwargs)  # the unconditional prompts take the same
        if not kwargs.get("load_audio_from_video", True):  # `transformers serve` says it to all processors
            del kwargs["load_audio_from_video"]
        variables = {name: kwargs.pop(name) for name in [*kwargs] if name not in _OPTIONS}
        if return_tensors != "auto":
            kwargs["return_tensors"] = return_tensors
        options = self._options(kwargs)
        mode = options.get("generation_mode")
        rendering = {"tools": tools, "documents": documents, "continue_final_message": continue_final_message}
        rendering["add_generation_prompt"] = add_generation_prompt or (mode is not None and not continue_final_message)
        samples = mode in ("image", "interleaved") and tokenize and return_dict
        if negative_prompt and not samples:
            raise ValueError(
                "negative_prompt needs tokenize=True, return_dict=True and a generation_mode that samples images, got "
                f"generation_mode={mode!r}"
            )
        mark_responses = return_labels or return_assistant_tokens_mask
        if mark_responses:
            is_finished = not (rendering["add_generation_prompt"] or continue_final_message)
            self._check_labels(template, mode, as_features=tokenize and return_dict, is_finished=is_finished)

        # 1. Check the messages, and take their images out
        conversations, is_batched = as_conversations(conversation, template)
        chats, _ = self._normalize_conversations(conversations)
        chats = list(map(with_thinking_prompt, chats)) if enable_thinking else chats
        row_images, by_assistant = take_images(chats, images)

        # 2. Render
        cutting = {"sanitize": sanitize_control_tokens, "refuse": not tokenize}
        texts, responses = self._render(chats, template, mark_responses, variables, rendering, **cutting)
        if not tokenize:
            texts = [text + self.boi_token for text in texts] if mode == "image" else texts
            return texts if is_batched else texts[0]

        # 3. Tokenize
        inputs = self._model_inputs(
            texts,
            row_images if any(row_images) else None,
            options,
            by_assistant=by_assistant,
            responses=responses if mark_responses else None,
            train_on=train_on if return_labels else None,
            return_mask=return_assistant_tokens_mask,
        )
        if not return_dict:
            return inputs["input_ids"]
        if samples and negative_prompt is not None:
            unconditional = [unconditional_messages(row, negative_prompt) for row in conversations]
            given |= {"tools": tools, "documents": documents, "continue_final_message": continue_final_message}
            given |= {"images": images, "return_tensors": return_tensors, "negative_prompt": None}
            given |= {"tokenize": True, "return_dict": True, "sanitize_control_tokens": sanitize_control_tokens}
            negative: Any = self.apply_chat_template(unconditional, chat_template, **given)
            inputs.update({f"negative_{name}": negative[name] for name in ("input_ids", "attention_mask")})
        return inputs

    def _render(
        self,
        chats: list[list[dict[str, Any]]],
        template: str,
        mark_responses: bool,
        variables: dict[str, Any],
        rendering: dict[str, Any],
        *,
        sanitize: bool,
        refuse: bool,
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """
        Rendered conversations, and the character spans of assistant responses in them. `sanitize`: control tokens that
        are spelled out in what the caller gives are cut or, with `refuse`, an error.
        """
        # A template ignores what it does not know, and a misspelled option with it.
        if unknown := sorted(name for name in variables if not re.search(rf"\b{re.escape(name)}\b", template)):
            raise TypeError(f"got unexpected options {unknown}, which the chat template does not use either")
        if rendering["tools"] and "tool" not in template:
            raise ValueError(f"this chat template knows no tools, got {len(rendering['tools'])}")
        # Tokens under the names that templates know; the caller may replace them.
        tokens = {"image_token": self.image_token, "boi_token": self.boi_token, "eoi_token": self.eoi_token}
        tokens = {**self.tokenizer.special_tokens_map, **tokens}
        tokens |= {name: variables.pop(name) for name in tokens if name in variables}
        rendering = {**rendering, **variables}
        if sanitize:
            # All that the caller gives is cut, also a template's variables: only the template itself is trusted.
            cut = self._control_tokens
            chats = [[cut.as_text(message, refuse=refuse) for message in row] for row in chats]
            rendering = {name: value and cut.cut(value, refuse=refuse) for name, value in rendering.items()}
        with _RENDERING:
            rendered: Any = render_jinja_template(
                conversations=chats,
                chat_template=template,
                return_assistant_tokens_mask=mark_responses,
                **tokens,
                **rendering,
            )
        return rendered

    def as_conversations(self, messages: Any) -> tuple[list[list[dict[str, Any]]], bool]:
        """One conversation or several as a list, and whether it was a list; `ValueError` where they are malformed."""
        return as_conversations(messages, self._resolve_chat_template(None))

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs` sorted into ours, the tokenizer's and the image processor's. Raises `TypeError` for any other."""
        if unknown := sorted(set(kwargs) - _OPTIONS):
            raise TypeError(f"got unexpected options {unknown}")
        # Of the tokenizer's own settings, its `padding_side` must not undo ours.
        names = _TEXT_OPTIONS - {"padding_side"}
        kwargs = {name: value.item() if isinstance(value, np.generic) else value for name, value in kwargs.items()}
        own = {name: value for name, value in self.tokenizer.init_kwargs.items() if name in names}
        options = self._merge_kwargs(tokenizer_init_kwargs=own, **kwargs)
        text_options = options["text_kwargs"]
        text_options.pop("add_special_tokens", None)  # the template writes them all
        if unknown := sorted(name for name, value in text_options.items() if value and name not in _TEXT_OPTIONS):
            raise TypeError(f"got unsupported tokenizer options {unknown}")
        # Pixels come in the form that tokens do.
        options["images_kwargs"]["return_tensors"] = text_options.get("return_tensors")
        mode = options.get("generation_mode")
        if mode not in _GENERATION_MODES:
            raise ValueError(f"generation_mode is {mode!r}, expected one of {list(_GENERATION_MODES)}")
        return options

    @staticmethod
    def _check_labels(template: str, mode: str | None, *, as_features: bool, is_finished: bool) -> None:
        if not as_features:
            raise ValueError("labels and masks come with tokenize=True and return_dict=True")
        if mode is not None:
            raise ValueError(f"labels and masks exclude a generation_mode, got {mode!r}")
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            raise ValueError("labels and masks need a chat template with {% generation %} around assistant responses")
        if not is_finished:
            raise ValueError("labels and masks need finished conversations: without generation prompt or open message")

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        # Made once: its pattern covers tens of thousands of tokens.
        return ControlTokens(self.tokenizer, (self.image_token, self.boi_token, self.eoi_token))

    # ---- back again

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        output_type: str = "pil",
        **kwargs,
    ) -> list[str] | list[Any] | list[list[dict[str, Any]]]:
        """
        Text and images from what a model generated.

        Args:
            generated_outputs (`torch.Tensor`, `np.ndarray` or `list`):
                Token ids (batch, length); for `generation_mode="image"` the pixels (images, 3, height, width).
            skip_special_tokens (`bool`, *optional*, defaults to `True`): Leave control tokens out of the text.
            generation_mode (`str`, *optional*):
                `"text"` (default): a string per row. `"image"`: a flat list of images. `"interleaved"`: per row the
                content of a message, `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}` parts in
                order.
            pixel_values (`torch.Tensor` of shape `(images, 3, height, width)`, *optional*):
                For `"interleaved"`: one for each finished image in `generated_outputs`, in reading order.
            image_grids (`torch.Tensor` of shape `(images, max_scales, 2)`, *optional*):
                Schedules of the images, to crop the padding. Without it nothing is cropped.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"` images.

        Returns:
            `list`: one entry for each row, or for `"image"` one for each image.

        Raises:
            `ValueError`: for another `generation_mode`, and where the number of images is not that of the tokens.
        """
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(
                generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
            )
        show = functools.partial(self.image_processor.post_process_images, output_type=output_type)
        if generation_mode == "image":
            return show(generated_outputs, image_grids)
        if generation_mode == "interleaved":
            images = [] if pixel_values is None else show(pixel_values, image_grids)
            rows = generated_outputs if isinstance(generated_outputs, list) else generated_outputs.tolist()
            rows = [rows] if isinstance(rows[0], int) else rows
            rows = [row if isinstance(row, list) else row.tolist() for row in rows]
            segments = [split_at_images(row, self.boi_token_id, self.eoi_token_id) for row in rows]
            finished = sum(row.count(None) for row in segments)
            if finished != len(images):
                raise ValueError(f"got {len(images)} images for {finished} finished images in the generated tokens")
            remaining, options = iter(images), {"skip_special_tokens": skip_special_tokens, **kwargs}
            parts = [
                [
                    {"type": "image", "image": next(remaining)}
                    if ids is None
                    else {"type": "text", "text": self.tokenizer.decode(ids, **options)}
                    for ids in row
                ]
                for row in segments
            ]
            return [[part for part in row if part.get("text") != ""] for row in parts]
        raise ValueError(f"generation_mode is {generation_mode!r}, expected one of {list(_GENERATION_MODES)}")

    # ---- transformers' hooks

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs) -> str:
        """The text that one `<|image_pad|>` stands for: as many as the image has cells in scales 2..K."""
        return self.image_token * (num_cells(self._as_context(image_inputs["image_grids"][image_idx])) - 1)

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """Number of `<|image_pad|>` for images of the given (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = {
            name: value for name, value in kwargs.items() if name in NextFlowImageProcessorKwargs.__annotations__
        }
        return MultiModalData(
            num_image_tokens=[
                num_cells(self._as_context(self.image_processor.get_image_grids(*size, images_kwargs))) - 1
                for size in image_sizes
            ],
            num_image_patches=[1] * len(image_sizes),
        )

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs, which transformers asks for."""
        return ["input_ids", "attention_mask", "pixel_values", "image_grids"]


def split_at_images(ids: list[int], boi_token_id: int, eoi_token_id: int) -> list[list[int] | None]:
    """Runs of text ids, and `None` for each finished image. What follows an unfinished `<boi>` is dropped."""
    segments: list[list[int] | None] = []
    while ids:
        start = ids.index(boi_token_id) if boi_token_id in ids else len(ids)
        segments += [ids[:start]] if start else []
        if eoi_token_id not in ids[start:]:
            break
        segments.append(None)
        ids = ids[ids.index(eoi_token_id, start) + 1 :]
    return segments


__all__ = ["NextFlowProcessor", "NextFlowProcessorKwargs"]
