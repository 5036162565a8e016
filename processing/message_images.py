"""The images of messages: taken out of the parts that carry them, in reading order, whatever they are given as."""

from typing import Any

from .image_processing_nextflow import flatten_images


IMAGE_KEYS = ("image", "path", "url", "base64")


def take_images(
    conversations: list[list[dict[str, Any]]], images: Any | None
) -> tuple[list[list[Any]], list[list[bool]]]:
    """
    Images of every conversation, in reading order, and which of them are the assistant's. Checks the parts, and
    strips them of the images in place.
    """
    spare = [] if images is None else flatten_images(images)
    rows, is_drawn, num_empty = [], [], 0
    for conversation in conversations:
        row, by_assistant = [], []
        for index, message in enumerate(conversation):
            if "role" not in message or "content" not in message:
                raise ValueError(f"message {index} has the keys {sorted(message)}, expected role and content")
            content = message["content"]
            if isinstance(content, str):
                continue
            parts = []
            for part in content:
                if part.get("type") == "text" and not isinstance(part.get("text"), str):
                    raise ValueError(
                        f"message {index} has a text part with text={part.get('text')!r}, expected a string"
                    )
                if part.get("type") == "image":
                    data = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
                    if len(data) > 1:
                        raise ValueError(f"message {index} has an image part with {len(data)} sources, expected 1")
                    if data and part.get("base64") is not None:
                        data = [f"data:image/any;base64,{data[0].rpartition(',')[2]}"]
                    if not data:
                        data = spare[num_empty : num_empty + 1]
                        num_empty += 1
                    row.extend(data)
                    by_assistant.append(message["role"] == "assistant")
                    part = {"type": "image"}
                parts.append(part)
            message["content"] = parts
        rows.append(row)
        is_drawn.append(by_assistant)
    if num_empty != len(spare):
        raise ValueError(f"the messages have {num_empty} image parts without data, but images= holds {len(spare)}")
    return rows, is_drawn


__all__ = ["take_images"]
