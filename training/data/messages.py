"""Operations on rows of the one training format: `messages` (content parts of text and images) and `images`."""

import numpy as np


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
    for message in row["messages"]:
        parts = []
        for part in _parts(message):
            image = next(remaining) if part["type"] == "image" else None
            if message["role"] == "user" and (part["type"] == "text" or drop_images):
                continue
            parts.append(part)
            images += [image] if part["type"] == "image" else []
        messages.append({**message, "content": parts})
    return messages, images


def _parts(message: dict) -> list[dict]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _parts_of(messages: list[dict], role: str) -> list[dict]:
    return [part for message in messages if message["role"] == role for part in _parts(message)]
