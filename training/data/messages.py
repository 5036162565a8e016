"""Operations on rows of the one training format: `messages` (content parts of text and images) and `images`.

A row is what TRL's trainers take, too: messages of content parts `{"type": "text", "text": ...}` and
`{"type": "image"}`, and the images in reading order. Images stay undecoded until [`open_image`].
"""

from http.client import HTTPException
from typing import Any
from urllib.request import urlopen

import fsspec
import numpy as np
from PIL import Image

from ...processing.image_processing_nextflow import load_rgb


class BadRowError(ValueError):
    """A row that cannot be trained on: its message says what it has and what was expected."""


def text_part(text: Any) -> dict:
    """A content part of `text`, which must be a string that says something."""
    if not isinstance(text, str):
        raise BadRowError(f"a text is {type(text).__name__}, expected a string")
    if not text.strip():
        raise BadRowError("a text is empty")
    return {"type": "text", "text": text}


def message(role: str, *parts: dict) -> dict:
    """A message of content parts."""
    return {"role": role, "content": list(parts)}


def check_messages(messages: list[dict], images: list) -> None:
    """`BadRowError` unless there is a response to train on and every image part has its image."""
    if not any(turn["role"] == "assistant" for turn in messages):
        raise BadRowError(f"the roles are {[turn['role'] for turn in messages]}, expected an assistant among them")
    for turn in messages:
        if not turn["content"]:
            raise BadRowError(f"a message of the {turn['role']} is empty")
    expected = sum(part["type"] == "image" for turn in messages for part in turn["content"])
    if len(images) != expected:
        raise BadRowError(f"got {len(images)} images for {expected} image parts")
    if missing := [index for index, image in enumerate(images) if is_missing(image)]:
        raise BadRowError(f"images {missing} of {len(images)} are missing")


def is_missing(image: Any) -> bool:
    """Whether the value of an image column holds no image."""
    if isinstance(image, dict):
        return image.get("bytes") is None and not image.get("path")
    return image is None or isinstance(image, str | bytes) and not image


def open_image(image: Any, max_pixels: int) -> Image.Image:
    """
    The upright RGB picture of a value of `images`: a PIL image, an array, a path or address, the bytes of a file, or
    the `{"bytes": ..., "path": ...}` of an undecoded column of `datasets`.

    Raises:
        `FileNotFoundError` and `ValueError`: on what is missing, corrupt, or larger than `max_pixels` (see
        [`load_rgb`]).
    """
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        try:
            with urlopen(image, timeout=30) as response:
                image = response.read()
        except (OSError, HTTPException) as error:
            raise ValueError(f"the image {image} cannot be fetched: {error}") from error
    elif isinstance(image, str) and "://" in image:  # hf://, s3://, zip:// as streamed data sets name their files
        with fsspec.open(image, "rb") as file:
            image = file.read()
    return load_rgb(image, max_pixels)


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
    draw = rng.random()
    drop_images = draw < image_rate and any(part["type"] == "image" for part in _parts_of(row["messages"], "user"))
    if not drop_images and draw >= image_rate + text_rate:
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
