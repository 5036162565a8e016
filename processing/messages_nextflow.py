"""The images of messages: taken out of the parts that carry them, in reading order, whatever they are given as."""

from typing import Any

from .image_processing_nextflow import flatten_images
from .message_checks_nextflow import IMAGE_KEYS


def take_images(
    conversations: list[list[dict[str, Any]]], images: Any | None
) -> tuple[list[list[Any]], list[list[bool]]]:
    """
    Images of every conversation, in reading order, and which of them are the assistant's. Strips the parts of the
    images in place.
    """
    spare = [] if images is None else flatten_images(images)
    rows, is_drawn, empty = [], [], []
    for conversation in conversations:
        row, by_assistant = [], []
        for index, message in enumerate(conversation):
            content = message["content"]
            if isinstance(content, str):
                continue
            parts = []
            for number, part in enumerate(content):
                if part["type"] == "image":
                    data = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
                    if data and part.get("base64") is not None:
                        data = [f"data:image/any;base64,{data[0].rpartition(',')[2]}"]
                    if not data:
                        data = spare[len(empty) : len(empty) + 1]
                        empty.append(f"message {index}, part {number}")
                    row.extend(data)
                    by_assistant.append(message["role"] == "assistant")
                    part = {"type": "image"}
                parts.append(part)
            message["content"] = parts
        rows.append(row)
        is_drawn.append(by_assistant)
    if len(empty) != len(spare):
        where = f" ({'; '.join(empty[:3])})" if empty else ""
        raise ValueError(
            f"the messages have {len(empty)} image parts without data{where}, but images= holds {len(spare)}"
        )
    return rows, is_drawn


__all__ = ["take_images"]
