"""Rows as people have them -> `messages` and `images`, one function per task.

An adapter gets the values of its columns by their part in the task and knows neither files nor data sets. What a row
lacks is a [`BadRowError`]. A document (plain or interleaved) becomes one turn of the assistant without a question:
all of it is trained on, as in pretraining.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...processing.messages_nextflow import as_conversations
from .messages import BadRowError, check_messages, is_missing, message, text_part


Row = tuple[list[dict], list]  # messages and images

_IMAGE = {"type": "image"}
_IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp")
_TEXT_NAMES = ("text", "caption", "txt", "prompt")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}


def text_to_image(image: Any, text: Any) -> Row:
    """The caption asks, the image answers."""
    return [message("user", text_part(text)), message("assistant", _IMAGE)], [image]


def image_to_text(image: Any, text: Any, prompt: Any) -> Row:
    """The image and `prompt` ask, the caption (or the answer) answers."""
    return [message("user", _IMAGE, text_part(prompt)), message("assistant", text_part(text))], [image]


def edit(source: Any, instruction: Any, target: Any) -> Row:
    """One image or several and an instruction ask, the edited image answers."""
    sources = source if isinstance(source, list) else [source]
    if not sources:
        raise BadRowError("there is no image to edit")
    parts = [_IMAGE] * len(sources)
    return [message("user", *parts, text_part(instruction)), message("assistant", _IMAGE)], [*sources, target]


def conversation(conversations: Any, images: Any = None) -> Row:
    """LLaVA's turns `{"from": "human" | "gpt", "value": ...}`: every `<image>` in a value is the next image."""
    if not isinstance(conversations, list) or not conversations:
        raise BadRowError(f"conversations is {conversations!r:.80}, expected a list of turns")
    messages = []
    for turn in conversations:
        _check_dict(turn, "a turn")
        name, value = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content")
        if name not in _ROLES:
            raise BadRowError(f"a turn is from {name!r}, expected one of {list(_ROLES)}")
        if not isinstance(value, str) or not value.strip():
            raise BadRowError(f"a turn from {name!r} has no text")
        first, *rest = value.split("<image>")
        parts = _text_parts(first)
        for text in rest:
            parts += [_IMAGE, *_text_parts(text)]
        messages.append(message(_ROLES[name], *parts))
    return messages, _as_list(images)


def interleaved(texts: Any, images: Any) -> Row:
    """
    A document of texts and images. Either two lists of one length of which every place fills one (OBELICS), or a list
    of texts and images with the `matched_text_index` of the text they stand before (MMC4).
    """
    texts, images = _as_list(texts), _as_list(images)
    content = []  # (text or None, image or None)
    if any(isinstance(image, dict) and "matched_text_index" in image for image in images):
        places = [_place(image, len(texts)) for image in images]
        for index, text in enumerate(texts):
            content += [(None, image) for image, place in zip(images, places) if place == index]
            content.append((text, None))
    else:
        if len(texts) != len(images):
            raise BadRowError(f"got {len(texts)} texts and {len(images)} images, expected lists of one length")
        content = list(zip(texts, images))
    parts, found = [], []
    for index, (text, image) in enumerate(content):
        image, has_text = _image_file(image), text is not None and text != ""
        if has_text and not is_missing(image):
            raise BadRowError(f"place {index} has both a text and an image, expected one of them")
        if not is_missing(image):
            parts.append(_IMAGE)
            found.append(image)
        elif has_text and not str(text).isspace():
            parts.append(text_part(text))
    return [message("assistant", *parts)], found


def plain_text(text: Any) -> Row:
    """A document."""
    return [message("assistant", text_part(text))], []


def image_alone(image: Any) -> Row:
    """An image without a word, for the vision tokenizer."""
    return [message("user", _IMAGE)], [image]


def prompt_alone(prompt: Any, images: Any = None) -> Row:
    """What is asked for, a text or messages, after its images: for a policy that samples the answer itself."""
    images = _as_list(images)
    if isinstance(prompt, str):
        return [message("user", *[_IMAGE] * len(images), text_part(prompt))], images
    return ready_messages(prompt, images)


def ready_messages(messages: Any, images: Any = None) -> Row:
    """
    Rows in the format already. Strings become text parts; where no part is an image, the images stand before the first
    user's text, as TRL reads it. An image part may carry its image.
    """
    try:
        (messages, *others), _ = as_conversations(messages)
    except ValueError as error:
        raise BadRowError(str(error)) from error
    if others:
        raise BadRowError(f"a row has {1 + len(others)} conversations, expected 1")
    images, found, turns = _as_list(images), [], []
    implied = len(images) if all(isinstance(turn.get("content"), str) for turn in messages) else 0
    spare = iter(images)
    for turn in messages:
        role, content = turn["role"], turn["content"]
        parts = []
        if role == "user" and implied:
            parts, implied = [_IMAGE] * implied, 0
            found += spare
        for part in [text_part(content)] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append(text_part(part["text"]))
            elif part["type"] == "image":
                data = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
                found.append(data[0] if data else next(spare, None))
                parts.append(_IMAGE)
            else:
                raise BadRowError(f"a message has a part of type {part.get('type')!r}, expected text or image")
        turns.append(message(role, *parts))
    if left := list(spare):
        raise BadRowError(f"got {len(images)} images for {len(images) - len(left)} image parts")
    return turns, found


def first_images(row: Row, max_images: int) -> Row:
    """The document up to, and without, its image number `max_images + 1` (§5.4 caps the frames of a document)."""
    (turn,), images = row
    parts, seen = [], 0
    for part in turn["content"]:
        seen += part["type"] == "image"
        if seen > max_images:
            break
        parts.append(part)
    return [{**turn, "content": parts}], images[:max_images]


@dataclass(frozen=True)
class Task:
    """
    What a row is for.

    Args:
        adapt (`Callable`): The values of the columns, as keyword arguments, to messages and images.
        columns (`dict[str, tuple[str, ...]]`): Part in the task -> names under which its column is looked for.
        optional (`tuple[str, ...]`, *optional*): Parts that a data set may lack.
        has_response (`bool`, *optional*, defaults to `True`): Whether its rows are examples for the transformer.
    """

    adapt: Callable[..., Row]
    columns: dict[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    has_response: bool = True

    def __call__(self, values: dict[str, Any], *, max_images: int | None = None) -> Row:
        """`values`, by part, as checked messages and images."""
        row = self.adapt(**values)
        if max_images is not None and self.adapt is interleaved:
            row = first_images(row, max_images)
        check_messages(*row, has_response=self.has_response)
        return row


TASKS = {
    "text_to_image": Task(text_to_image, {"image": _IMAGE_NAMES, "text": _TEXT_NAMES}),
    "image_to_text": Task(
        image_to_text,
        {"prompt": ("question",), "image": _IMAGE_NAMES, "text": (*_TEXT_NAMES, "answer")},
        optional=("prompt",),
    ),
    "edit": Task(
        edit,
        {
            "source": ("source", "input_image", "original_image", "image"),
            "instruction": ("instruction", "edit_prompt", "edit", "prompt"),
            "target": ("target", "edited_image", "output_image"),
        },
    ),
    "conversation": Task(
        conversation, {"conversations": ("conversations",), "images": ("images", "image")}, optional=("images",)
    ),
    "interleaved": Task(interleaved, {"texts": ("texts", "text_list"), "images": ("images", "image_info")}),
    "text": Task(plain_text, {"text": ("text", "content")}),
    "messages": Task(ready_messages, {"messages": ("messages",), "images": ("images", "image")}, optional=("images",)),
    "image": Task(image_alone, {"image": _IMAGE_NAMES}, has_response=False),
    "prompt": Task(
        prompt_alone,
        {"prompt": ("prompt", *_TEXT_NAMES), "images": ("images", "image")},
        optional=("images",),
        has_response=False,
    ),
}


def _check_dict(value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise BadRowError(f"{name} is {value!r:.80}, expected a dictionary")


def _place(image: Any, num_texts: int) -> int:
    """MMC4's number of the text that an image stands before. An image without one would be lost without a word."""
    _check_dict(image, "an image among those with matched_text_index")
    place = image.get("matched_text_index")
    if not isinstance(place, int) or not 0 <= place < num_texts:
        raise BadRowError(f"an image stands before the text {place!r}, but there are {num_texts}, counted from 0")
    if is_missing(_image_file(image)):
        raise BadRowError(f"the image before the text {place} has none of image, image_name and raw_url")
    return place


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _text_parts(text: str) -> list[dict]:
    # LLaVA sets its placeholder on a line of its own: the line break belongs to the placeholder.
    text = text.strip("\n")
    return [text_part(text)] if text.strip() else []


def _image_file(image: Any) -> Any:
    """MMC4 names the file of an image beside its place."""
    if isinstance(image, dict) and "matched_text_index" in image:
        return image.get("image") or image.get("image_name") or image.get("raw_url")
    return image
