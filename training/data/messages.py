"""Operations on rows of the one training format: `messages` (content parts of text and images) and `images`.

A row is what TRL's trainers take, too: messages of content parts `{"type": "text", "text": ...}` and
`{"type": "image"}`, and the images in reading order. Images stay undecoded until [`open_image`].
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import fsspec
import numpy as np
from PIL import Image
from transformers.utils import logging

from ...processing.image_loading_nextflow import MAX_BYTES, load_image


logger = logging.get_logger(__name__)

MEND = 'Mend or remove it, or leave such rows out with on_bad_row="skip"'

# Where a row may name an image that is not beside it: on this disk, in an archive, or in a store whose host is not for
# the row to choose.
_FILE_SYSTEMS = {"file", "local", "memory", "zip", "tar", "hf", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}


_IMAGE_TYPES = (str, bytes, np.ndarray, Image.Image)


class BadRowError(ValueError):
    """A row that cannot be trained on: its message says what it has and what was expected."""


def check_on_bad_row(value: str) -> str:
    """`value`, if it says what becomes of a bad row."""
    if value not in ("raise", "skip"):
        raise ValueError(f'on_bad_row is {value!r}, expected "raise" or "skip"')
    return value


def bad_row_reason(error: Exception) -> str:
    """What to say of a row that raised `error`."""
    says_all = type(error) in (BadRowError, ValueError, FileNotFoundError)
    return str(error) if says_all else f"{type(error).__name__}: {error}"


def log_causes(reasons: Iterable[str]) -> None:
    """How many bad rows there are of each cause: the reasons without names, addresses and numbers of single rows."""
    kinds = Counter(re.sub(r"'[^']*'|\S*(://|\d)\S*", "...", reason)[:120] for reason in reasons)
    for kind, count in kinds.most_common():
        logger.warning(f"{count} bad rows: {kind}")


def text_part(text: Any) -> dict:
    """A content part of `text`, which must be a string that says something."""
    if not isinstance(text, str):
        raise BadRowError(f"a text is {type(text).__name__}, expected a string")
    if not text.strip():
        raise BadRowError("a text is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape halves of characters
        raise BadRowError(f"a text is not Unicode: {error}") from error
    return {"type": "text", "text": text}


def message(role: str, *parts: dict) -> dict:
    """A message of content parts."""
    return {"role": role, "content": list(parts)}


def check_messages(messages: list[dict], images: list, *, has_response: bool = True) -> None:
    """`BadRowError` unless every image part has its image and, where it must, the row has a response to train on."""
    if has_response and not any(turn["role"] == "assistant" for turn in messages):
        raise BadRowError(f"the roles are {[turn['role'] for turn in messages]}, expected an assistant among them")
    for turn in messages:
        if not turn["content"]:
            raise BadRowError(f"a message of the {turn['role']} is empty")
    expected = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    if len(images) != expected:
        raise BadRowError(f"got {len(images)} images for {expected} image parts")
    if missing := [index for index, image in enumerate(images) if is_missing(image)]:
        raise BadRowError(f"images {missing} of {len(images)} are missing")
    if foreign := [type(image).__name__ for image in images if not _may_be_image(image)]:
        raise BadRowError(f"images are {foreign}, expected paths, bytes, arrays or PIL images")


def _may_be_image(image: Any) -> bool:
    if isinstance(image, dict):
        return isinstance(image.get("bytes"), bytes | None) and isinstance(image.get("path"), str | None)
    return isinstance(image, _IMAGE_TYPES)


def is_missing(image: Any) -> bool:
    """Whether the value of an image column holds no image."""
    if isinstance(image, dict):
        return image.get("bytes") is None and not image.get("path")
    return image is None or isinstance(image, str | bytes) and not image


def open_image(image: Any, max_pixels: int, *, allow_private_addresses: bool = False) -> Image.Image:
    """
    The upright RGB image of a value of `images`: whatever [`load_image`] takes, and a file of another file system, as
    streamed data sets name them.

    Raises:
        `FileNotFoundError` and `ValueError`: on what is missing, corrupt, or larger than `max_pixels`.
    """
    path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else image
    if isinstance(path, str) and "://" in path and not path.lower().startswith(("http://", "https://")):
        image = {"path": path, "bytes": _read_file(path, allow_private_addresses)}
    return load_image(image, max_pixels, allow_private_addresses=allow_private_addresses)


def _read_file(path: str, allow_private_addresses: bool) -> bytes:
    """A file by its fsspec address: hf://, s3://, zip://a.png::file.zip."""
    protocols = {part.partition("://")[0] for part in path.split("::") if "://" in part}
    if not allow_private_addresses and (refused := sorted(protocols - _FILE_SYSTEMS)):
        raise ValueError(
            f"the image {path} is read by {refused}, which may lead to a private address, expected some of "
            f"{sorted(_FILE_SYSTEMS)}; set allow_private_addresses if you trust the rows"
        )
    with fsspec.open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"the image {path} has more than {MAX_BYTES} bytes, expected at most that")
    return data


def caption_of(messages: list[dict]) -> str:
    """The text that asks for the one image. With more images it is an instruction, to a given one a question."""
    roles = [message["role"] for message in messages for part in _parts(message) if part["type"] == "image"]
    if roles != ["assistant"]:
        return ""
    texts = [part["text"] for message in messages if message["role"] == "user" for part in _parts(message)]
    return " ".join(texts)


def drop_condition(
    row: dict, rng: np.random.Generator, *, text_rate: float = 0.1, image_rate: float = 0.05
) -> tuple[list[dict], list]:
    """The row's messages and images, some without their condition, for classifier-free guidance.

    With probability `text_rate` the user's text goes; with probability `image_rate` the user's images go as well
    (rates as in TokenFlow, VAR and Infinity; not specified by the paper). What is left is what the pipeline's
    unconditional prompt looks like: there an image follows at once, so an answer with text in it keeps its condition.
    """
    if any(part["type"] == "text" for part in _parts_of(row["messages"], "assistant")):
        return row["messages"], row["images"]
    if not any(part["type"] == "image" for part in _parts_of(row["messages"], "user")):
        image_rate = 0.0  # or rows without images would lose their text at both rates
    # One number decides both: images go only where the text goes, too.
    number = rng.random()
    drop_images = number < image_rate
    if number >= image_rate + text_rate:
        return row["messages"], row["images"]
    messages, images, remaining = [], [], iter(row["images"])
    for turn in row["messages"]:
        parts = []
        for part in _parts(turn):
            image = next(remaining) if part["type"] == "image" else None
            if turn["role"] == "user" and (part["type"] == "text" or drop_images):
                continue
            parts.append(part)
            images += [image] if part["type"] == "image" else []
        messages.append({**turn, "content": parts})
    return messages, images


def _parts(turn: dict) -> list[dict]:
    content = turn["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _parts_of(messages: list[dict], role: str) -> list[dict]:
    return [part for message in messages if message["role"] == role for part in _parts(message)]
