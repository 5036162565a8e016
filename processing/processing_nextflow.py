"""Messages with images <-> the sequence the model reads (§2.2; chat format not specified by the paper).

Owns the layout: an image is `<boi>`, one `<|image_pad|>` per cell of scales 2..K, `<eoi>`, and one row of
`image_grids` per `<boi>`. Only the template writes control tokens: the same characters in somebody's message stay
text. Knows nothing of codes beyond their token names, and nothing of the model.
"""

import math
import re
import threading
from collections.abc import Iterator
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import (
    AudioKwargs,
    MultiModalData,
    ProcessingKwargs,
    ProcessorMixin,
    TextKwargs,
    VideosKwargs,
)
from transformers.utils.chat_template_utils import render_jinja_template

from .control_tokens_nextflow import CUT, ControlTokens
from .image_processing_nextflow import NextFlowImageProcessorKwargs, flatten_images
from .messages_nextflow import (
    THINKING_PROMPT,
    as_conversations,
    check_text,
    split_reasoning,
    take_images,
    unconditional_messages,
    with_thinking_prompt,
    without_thinking_prompt,
)
from .scale_schedule_nextflow import num_cells, requested_grids, size_options
from .tokenizer_extension_nextflow import code_token


IGNORE_INDEX = -100
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
        `"image"` ends every row in `<boi>` and adds the schedule of the image to draw to `image_grids`; `"text"` and
        `"interleaved"` end in the assistant's header. `"interleaved"` adds `target_grids`, the schedules of the
        images that the answer may have.
    height (`int`, *optional*): Height in pixels of the image to draw, snapped to the nearest bucket. Needs `width`.
    width (`int`, *optional*): Width in pixels of the image to draw. Needs `height`.
    aspect_ratio (`str`, *optional*): `"width:height"` of the image to draw, such as `"16:9"`, instead of its size.
    target_grids (`list[tuple[int, int]]`, *optional*): The schedule of the image to draw itself, coarse to fine.
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


class NextFlowProcessor(ProcessorMixin):
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
            as they are drawn, without it: a conversation goes on from what the model has drawn. The model's
            `max_scales` must be [`max_scales`].
    """

    valid_processor_kwargs = NextFlowProcessorKwargs
    text_kwargs = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    # For the pipeline, which has the processor and not this island's code
    thinking_prompt = THINKING_PROMPT
    split_reasoning = staticmethod(split_reasoning)
    without_thinking_prompt = staticmethod(without_thinking_prompt)
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
        files = super().save_pretrained(save_directory, push_to_hub, **kwargs)
        vars(self).pop("auto_map", None)  # left there by saving; a processor that was loaded has none
        return files

    @property
    def max_scales(self) -> int:
        """Scales of the longest image: the number of rows of an image in `image_grids`."""
        return self.image_processor.schedule.max_scales + self.append_last_scale

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
                Trusted text: control tokens in it are control tokens. A `<boi>` at the very end is an image to draw.
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
                `generation_mode="image"` the image is drawn after it.
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
                With a `generation_mode` that draws, `tokenize` and `return_dict`: add `negative_input_ids` and
                `negative_attention_mask`, the unconditional prompts of guidance: the same conversations with the same
                images, without the user's text, and with this at the end of the last user message (as training drops
                text: `""`). `None` leaves them out, where guidance is 1.
            enable_thinking (`bool`, *optional*, defaults to `False`):
                Ask the model to think before it draws: `THINKING_PROMPT` becomes the system message, or the beginning
                of the one that is there. The unconditional prompts are those without thinking.
            kwargs: Options of `__call__`, such as `generation_mode`, `height`, `width`, `resolution`; variables of a
                custom template.
        """
        template = self._resolve_chat_template(chat_template)
        conversations, is_batched = as_conversations(conversation, template)
        kwargs = {**kwargs, **(processor_kwargs or {})}
        images = kwargs.pop("images", images)
        negative_prompt = kwargs.pop("negative_prompt", negative_prompt)
        given = dict(kwargs)
        if not kwargs.get("load_audio_from_video", True):  # `transformers serve` says it to all processors
            del kwargs["load_audio_from_video"]
        variables = {name: kwargs.pop(name) for name in [*kwargs] if name not in _OPTIONS}
        if return_tensors != "auto":
            kwargs["return_tensors"] = return_tensors
        options = self._options(kwargs)
        mode = options.get("generation_mode")
        draws = mode in ("image", "interleaved") and tokenize and return_dict
        mark_responses = return_labels or return_assistant_tokens_mask
        add_generation_prompt = add_generation_prompt or (mode is not None and not continue_final_message)
        self._check_template(template, variables, tools)
        self._check_options(negative_prompt, train_on, mode, draws=draws)
        if mark_responses:
            is_finished = not (add_generation_prompt or continue_final_message)
            self._check_labels(template, mode, as_features=tokenize and return_dict, is_finished=is_finished)

        # 1. Take the images out, and mark the control tokens that the messages spell out
        chats, _ = self._normalize_conversations(conversations)
        chats = list(map(with_thinking_prompt, chats)) if enable_thinking else chats
        row_images, by_assistant = take_images(chats, images)
        tokens = self._template_tokens(variables)
        if sanitize_control_tokens:
            chats, tools, documents, variables = self._without_control_tokens(
                chats, tools, documents, variables, refuse=not tokenize
            )

        # 2. Render
        with _RENDERING:
            texts, responses = render_jinja_template(
                conversations=chats,
                tools=tools,
                documents=documents,
                chat_template=template,
                return_assistant_tokens_mask=mark_responses,
                continue_final_message=continue_final_message,
                add_generation_prompt=add_generation_prompt,
                **{**tokens, **variables},
            )
        if not tokenize:
            texts = [text + self.boi_token for text in texts] if mode == "image" else texts
            return texts if is_batched else texts[0]

        # 3. Tokenize
        inputs = self._model_inputs(
            texts,
            row_images,
            options,
            by_assistant=by_assistant,
            responses=responses if mark_responses else None,
            train_on=train_on if return_labels else None,
            return_mask=return_assistant_tokens_mask,
        )
        if not return_dict:
            return inputs["input_ids"]
        if draws and negative_prompt is not None:
            common = {"tools": tools, "documents": documents, "continue_final_message": continue_final_message}
            common |= {"return_tensors": return_tensors, "sanitize_control_tokens": sanitize_control_tokens}
            unconditional = [self.unconditional_messages(row, negative_prompt) for row in conversations]
            inputs.update(self._negative_inputs(unconditional, chat_template, images=images, **common, **given))
        return inputs

    def _negative_inputs(self, unconditional: list, chat_template: str | None, **options: Any) -> dict[str, Any]:
        options |= {"tokenize": True, "return_dict": True, "negative_prompt": None}
        negative = self.apply_chat_template(unconditional, chat_template, **options)
        return {f"negative_{name}": negative[name] for name in ("input_ids", "attention_mask")}

    def as_conversations(self, messages: Any) -> tuple[list[list[dict[str, Any]]], bool]:
        """One conversation or several as a list, and whether it was a list; `ValueError` where they are malformed."""
        return as_conversations(messages, self._resolve_chat_template(None))

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs` sorted into ours, the tokenizer's and the image processor's; one nobody knows is an error."""
        if unknown := sorted(set(kwargs) - _OPTIONS):
            raise TypeError(f"got unexpected options {unknown}")
        # Of the tokenizer's own settings, its `padding_side` must not undo ours.
        names = _TEXT_OPTIONS - {"padding_side"}
        own = {name: value for name, value in self.tokenizer.init_kwargs.items() if name in names}
        options = self._merge_kwargs(tokenizer_init_kwargs=own, **kwargs)
        text_options = options["text_kwargs"]
        text_options.pop("add_special_tokens", None)  # the template writes them all
        if unknown := sorted(name for name, value in text_options.items() if value and name not in _TEXT_OPTIONS):
            raise TypeError(f"got unsupported tokenizer options {unknown}")
        options["images_kwargs"]["return_tensors"] = text_options.get("return_tensors")
        mode = options.get("generation_mode")
        if mode not in _GENERATION_MODES:
            raise ValueError(f"generation_mode is {mode!r}, expected one of {list(_GENERATION_MODES)}")
        return options

    @staticmethod
    def _check_template(template: str, variables: dict[str, Any], tools: list[dict] | None) -> None:
        if unknown := sorted(name for name in variables if not re.search(rf"\b{re.escape(name)}\b", template)):
            raise TypeError(f"got unexpected options {unknown}, which the chat template does not use either")
        if tools and "tool" not in template:
            raise ValueError(f"this chat template knows no tools, got {len(tools)}")

    @staticmethod
    def _check_options(negative_prompt: str | None, train_on: str, mode: str | None, *, draws: bool) -> None:
        if negative_prompt and not draws:
            raise ValueError(
                "negative_prompt needs tokenize=True, return_dict=True and a generation_mode that samples images, got "
                f"generation_mode={mode!r}"
            )
        if train_on not in ("responses", "all"):
            raise ValueError(f'train_on is {train_on!r}, expected "responses" or "all"')

    def _template_tokens(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Tokens under the names that templates know; `variables` may replace them, as they are the caller's."""
        tokens = {"image_token": self.image_token, "boi_token": self.boi_token, "eoi_token": self.eoi_token}
        tokens = {**self.tokenizer.special_tokens_map, **tokens}
        return tokens | {name: variables.pop(name) for name in tokens if name in variables}

    def _without_control_tokens(self, chats: list, *others: Any, refuse: bool) -> tuple[Any, ...]:
        """Everything that is rendered, with control tokens cut where messages spell them."""
        control_tokens = self._control_tokens
        chats = [[control_tokens.as_text(message, refuse=refuse) for message in row] for row in chats]
        return chats, *(one and control_tokens.cut(one, refuse=refuse) for one in others)

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

    # ---- messages

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, (self.image_token, self.boi_token, self.eoi_token))

    # ---- the sequence

    def _model_inputs(
        self,
        texts: list[str],
        images: Any | None,
        options: dict[str, Any],
        *,
        by_assistant: list[list[bool]] | None = None,
        responses: list[list[tuple[int, int]]] | None = None,
        train_on: str | None = None,
        return_mask: bool = False,
    ) -> BatchFeature:
        text_options = options["text_kwargs"]
        return_tensors = text_options.pop("return_tensors", None)
        return_types, return_replacements = (
            text_options.pop(name, None) or options.get(name)
            for name in ("return_mm_token_type_ids", "return_text_replacement_offsets")
        )

        # 1. Tokens, with one placeholder per image
        rows, in_response = self._tokenize(texts, responses, ends_in_boi=options.get("generation_mode") == "image")
        if train_on is not None:
            self._check_responses(in_response, train_on)

        # 2. Pixels and schedules
        flat_images = self._check_images(rows, images)
        data = dict(self.image_processor(flat_images, **options["images_kwargs"])) if flat_images else {}
        image_grids, target_grids = self._schedules(rows, data, options, by_assistant, in_full=train_on == "all")

        # 3. Every placeholder becomes the cells of its image
        counts = self._expand(rows, in_response, image_grids, text_options)
        blank = [[0, 0]] * self.max_scales
        schedules = {"image_grids": [grids for row in image_grids for grids in row], "target_grids": target_grids}
        data |= {name: [(own + blank)[: len(blank)] for own in grids] for name, grids in schedules.items() if grids}

        # 4. Labels and padding
        columns = self._columns(rows, in_response, train_on, return_mask)
        data |= self._pad(rows, columns, text_options)
        if return_types:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if return_replacements:
            data["text_replacement_offsets"] = list(map(self._replacements, texts, counts))
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def _expand(
        self,
        rows: list[list[int]],
        in_response: list[list[bool]],
        image_grids: list[list[list[list[int]]]],
        text_options: dict[str, Any],
    ) -> list[list[int]]:
        """Repeat each placeholder, in place, for every cell of its image past the first; returns how often."""
        counts = []
        for index, (ids, schedules) in enumerate(zip(rows, image_grids, strict=True)):
            cells = [num_cells(grids) for grids in schedules]
            to_sample = cells[-1] if ids[-1:] == [self.boi_token_id] else 0
            remaining = iter(cells)
            repeats = [next(remaining) - 1 if token == self.image_token_id else 1 for token in ids]
            kept = self._kept_tokens(index, sum(repeats), to_sample, text_options, has_images=bool(schedules))
            counts.append([count for token, count in zip(ids, repeats) if token == self.image_token_id])
            for values in (rows, in_response):
                values[index] = [one for one, count in zip(values[index], repeats) for _ in range(count)][kept]
        return counts

    def _tokenize(
        self, texts: list[str], responses: list[list[tuple[int, int]]] | None, *, ends_in_boi: bool
    ) -> tuple[list[list[int]], list[list[bool]]]:
        """
        Token ids of rendered chats, and which of them lie in `responses` (character spans). Text is tokenized in
        pieces that end at the spans and at the cuts, so that no token is half inside.
        """
        rows, in_response = [], []
        for index, text in enumerate(texts):
            ids, mask, position = [], [], 0
            for start, end in [*(responses[index] if responses else ()), (len(text), len(text))]:
                for piece, inside in ((text[position:start], False), (text[start:end], True)):
                    for part in filter(None, piece.split(CUT)):
                        ids += self.tokenizer.encode(part, add_special_tokens=False)
                        mask += [inside] * (len(ids) - len(mask))
                position = end
            ids, mask = self._framed(index, ids, mask)
            if ends_in_boi and ids[-1:] != [self.boi_token_id]:
                ids, mask = [*ids, self.boi_token_id], [*mask, False]
            rows.append(ids)
            in_response.append(mask)
        return rows, in_response

    def _framed(self, row: int, ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
        """
        With `<boi>` and `<eoi>` around every placeholder that stands without. Then every image is
        `<boi><|image_pad|><eoi>`, or the `<boi>` that ends its row; no code is written by name.
        """
        frame = [self.boi_token_id, self.image_token_id, self.eoi_token_id]
        framed, inside, position = [], [], 0
        while position < len(ids):
            token, length = ids[position], 1
            if token == self.image_token_id:
                framed += frame
            elif ids[position : position + 3] == frame:
                framed += frame
                length = 3
            elif token in (self.boi_token_id, self.eoi_token_id) or self._first_code_id <= token < self.boi_token_id:
                if token != self.boi_token_id or position < len(ids) - 1:
                    found = self.tokenizer.convert_ids_to_tokens(token)
                    raise ValueError(
                        f"row {row} has {found} at token {len(framed)}, expected "
                        f"images as {self.boi_token}{self.image_token}{self.eoi_token}, or {self.boi_token} as the "
                        "last token"
                    )
                framed.append(token)
            else:
                framed.append(token)
            inside += [mask[position]] * (len(framed) - len(inside))
            position += length
        return framed, inside

    def _schedules(
        self,
        rows: list[list[int]],
        data: dict[str, Any],
        options: dict[str, Any],
        by_assistant: list[list[bool]] | None,
        *,
        in_full: bool,
    ) -> tuple[list[list[list[list[int]]]], list[list[list[int]]]]:
        """
        Of every row the schedules of its images, with that of the image to sample where it ends in `<boi>`; and
        those of images that answers in interleaved mode may have. `in_full`: as they are sampled, none as it is given.
        """
        closed = iter(data["image_grids"].tolist() if data else [])
        is_interleaved = options.get("generation_mode") == "interleaved"
        asked = size_options(options)
        image_grids, target_grids = [], []
        for index, ids in enumerate(rows):
            shown = [next(closed) for token in ids if token == self.image_token_id]
            schedules = shown
            if not in_full:
                authors = [False] * len(shown) if by_assistant is None else by_assistant[index]
                schedules = [own if is_own else self._as_context(own) for is_own, own in zip(authors, shown)]
            image_grids.append(list(schedules))
            samples = ids[-1:] == [self.boi_token_id]
            if samples or is_interleaved:  # as asked for, else as the last image before it, else square
                target = self._requested(options) if asked or not shown else shown[-1]
                (image_grids[-1] if samples else target_grids).append(target)
        if asked and not target_grids and not any(ids[-1:] == [self.boi_token_id] for ids in rows):
            raise ValueError(f"{asked} describe an image to sample, but no row ends in {self.boi_token}")
        return image_grids, target_grids

    def _requested(self, options: dict[str, Any]) -> list[list[int]]:
        """The schedule that the options of a call ask for, else a square's."""
        if "requested_grids" not in options:  # once a call: it may warn
            processor, resolution = self.image_processor, options["images_kwargs"].get("resolution")
            options["requested_grids"] = requested_grids(
                processor.schedule, options, resolution=resolution, default=processor.resolution
            )
        return options["requested_grids"]

    def _kept_tokens(
        self, row: int, length: int, to_sample: int, text_options: dict[str, Any], *, has_images: bool
    ) -> slice:
        """
        What truncation leaves of a row of text. `ValueError` where a row that is not cut is too long. `to_sample`
        counts the cells of scales 2..K and the `<eoi>` that will follow.
        """
        limit = min(self.tokenizer.model_max_length, text_options.get("max_length") or math.inf)
        if length + to_sample <= limit:
            return slice(None)
        if not has_images and text_options.get("truncation") not in (None, False, "do_not_truncate"):
            return slice(limit) if self.tokenizer.truncation_side == "right" else slice(length - limit, None)
        more = f" and the image to sample {to_sample} more" if to_sample else ""
        raise ValueError(
            f"row {row} has {length} tokens, image cells included{more}, expected at most {limit}: shorten the "
            "text or lower the resolution, as nothing is cut from a row with images"
        )

    @staticmethod
    def _check_responses(in_response: list[list[bool]], train_on: str) -> None:
        empty = [index for index, mask in enumerate(in_response) if not any(mask)]
        if empty and train_on == "responses":
            raise ValueError(f"conversations {empty} have no assistant response to train on")

    def _columns(
        self, rows: list[list[int]], in_response: list[list[bool]], train_on: str | None, return_mask: bool
    ) -> dict[str, tuple[list[list[int]], int]]:
        """Labels and masks of the rows, as asked for, each with what fills it at padding."""
        columns = {}
        if train_on is not None:
            silent = (self.image_token_id, self.eoi_token_id)  # never predicted: `<boi>` stands for the whole image
            labels = [
                [
                    token if token not in silent and (inside or train_on == "all") else IGNORE_INDEX
                    for token, inside in zip(ids, mask, strict=True)
                ]
                for ids, mask in zip(rows, in_response, strict=True)
            ]
            columns["labels"] = labels, IGNORE_INDEX
        if return_mask:
            columns["assistant_masks"] = [list(map(int, mask)) for mask in in_response], 0
        return columns

    def _pad(
        self, rows: list[list[int]], columns: dict[str, tuple[list[list[int]], int]], text_options: dict[str, Any]
    ) -> dict[str, list[list[int]]]:
        """The rows with their mask, and further columns with what fills them, padded as the tokenizer does."""
        names = ["truncation"] if text_options.get("padding") == "max_length" else ["truncation", "max_length"]
        text_options = {name: value for name, value in text_options.items() if name not in names}
        padded = self.tokenizer.pad({"input_ids": rows}, **text_options)
        data = {name: padded[name] for name in ("input_ids", "attention_mask") if name in padded}
        on_left = text_options.get("padding_side", self.tokenizer.padding_side) == "left"
        for name, (values, filler) in columns.items():
            data[name] = []
            for ids, row in zip(padded["input_ids"], values, strict=True):
                fill = [filler] * (len(ids) - len(row))
                data[name].append([*fill, *row] if on_left else [*row, *fill])
        return data

    @cached_property
    def _first_code_id(self) -> int:
        return self.tokenizer.get_vocab().get(code_token(0), self.boi_token_id)

    def _check_images(self, rows: list[list[int]], images: Any | None) -> list[Any]:
        """`images` as a flat list, as many as there are placeholders, per row where they are given per row."""
        expected = [ids.count(self.image_token_id) for ids in rows]
        flat = flatten_images(images) if images is not None else []
        if len(flat) != sum(expected):
            raise ValueError(
                f"got {len(flat)} images for {sum(expected)} image placeholders (by row: {expected}): the number of "
                f"{self.image_token} tokens in the prompts should be the same as the number of images"
            )
        if isinstance(images, (list, tuple)) and images and all(isinstance(row, (list, tuple)) for row in images):
            given = [len(flatten_images(row)) for row in images]
            if len(given) != len(expected) or given != expected:
                raise ValueError(f"got images by row {given} for image placeholders by row {expected}")
        return flat

    def _as_context(self, grids: list[list[int]]) -> list[list[int]]:
        """The schedule (a row of `image_grids`) in the sequence of an image that is given."""
        grids = [[int(height), int(width)] for height, width in grids if height > 0]
        return [*grids, grids[-1]] if self.append_last_scale else grids

    def target_image_grids(self, image_grids: torch.Tensor) -> torch.Tensor:
        """Rows of `image_grids` (images, max_scales, 2) of given images, as those of images to draw at their size."""
        if not self.append_last_scale:
            return image_grids
        is_last = (image_grids[..., 0] > 0).sum(-1, keepdim=True) - 1 == torch.arange(image_grids.shape[1])
        return image_grids.masked_fill(is_last[..., None], 0)

    def _replacements(self, text: str, counts: list[int]) -> list[dict[str, Any]]:
        """Where the placeholders of a text stand, and what becomes of them, as transformers describes it."""
        found, gained = [], 0
        for match, count in zip(re.finditer(re.escape(self.image_token), text), counts):
            cells = self.image_token * count
            framed = text.endswith(self.boi_token, 0, match.start())
            replacement = cells if framed else f"{self.boi_token}{cells}{self.eoi_token}"
            start, length = match.start() - text.count(CUT, 0, match.start()), len(self.image_token)
            found.append(
                {
                    "type": "image",
                    "text": self.image_token,
                    "replacement": replacement,
                    "span": (start, start + length),
                    "new_span": (start + gained, start + gained + len(replacement)),
                }
            )
            gained += len(replacement) - length
        return found

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
        What a model generated, for people.

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
        """
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(
                generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
            )
        if generation_mode == "image":
            return self._images_from(generated_outputs, image_grids, output_type)
        if generation_mode == "interleaved":
            images = [] if pixel_values is None else self._images_from(pixel_values, image_grids, output_type)
            rows = generated_outputs if isinstance(generated_outputs, list) else generated_outputs.tolist()
            rows = [
                row if isinstance(row, list) else row.tolist()
                for row in ([rows] if isinstance(rows[0], int) else rows)
            ]
            drawn = sum(isinstance(segment, tuple) for row in rows for segment in self._segments(row))
            if drawn != len(images):
                raise ValueError(f"got {len(images)} images for {drawn} finished images in the generated tokens")
            remaining = iter(images)
            return [self._content_of(row, remaining, skip_special_tokens, **kwargs) for row in rows]
        raise ValueError(f"generation_mode is {generation_mode!r}, expected one of {list(_GENERATION_MODES)}")

    def _images_from(
        self, pixel_values: torch.Tensor, image_grids: torch.Tensor | None, output_type: str
    ) -> list[Any]:
        pixel_values = torch.as_tensor(pixel_values)
        if image_grids is None:
            patch_size = self.image_processor.patch_size
            grid = [round(side / patch_size) for side in pixel_values.shape[-2:]]
            image_grids = torch.tensor([[grid]] * len(pixel_values)).view(-1, 1, 2)
        return self.image_processor.post_process_images(pixel_values, image_grids, output_type=output_type)

    def _segments(self, ids: list[int]) -> Iterator[list[int] | tuple[int, int]]:
        """
        Runs of text ids (lists), and a tuple for each finished image. What follows an unfinished `<boi>` is dropped.
        """
        position = 0
        while position < len(ids):
            start = ids.index(self.boi_token_id, position) if self.boi_token_id in ids[position:] else len(ids)
            if start > position:
                yield ids[position:start]
            if self.eoi_token_id not in ids[start:]:
                return
            position = ids.index(self.eoi_token_id, start) + 1
            yield start, position

    def _content_of(
        self, ids: list[int], images: Iterator[Any], skip_special_tokens: bool, **kwargs
    ) -> list[dict[str, Any]]:
        parts = []
        for segment in self._segments(ids):
            if isinstance(segment, tuple):
                parts.append({"type": "image", "image": next(images)})
            elif text := self.tokenizer.decode(segment, skip_special_tokens=skip_special_tokens, **kwargs):
                parts.append({"type": "text", "text": text})
        return parts

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
        return ["input_ids", "attention_mask", "pixel_values", "image_grids"]


__all__ = ["NextFlowProcessor", "NextFlowProcessorKwargs"]
