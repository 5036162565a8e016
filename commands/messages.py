"""Conversations as files: the JSON of the pipeline's `messages`, whose images are paths beside the file.

[{"role": "user", "content": [{"type": "image", "path": "before.png"}, {"type": "text", "text": "is to"}, ...]}]
"""

import json
import sys
from pathlib import Path
from typing import Any

from ..atomic import write_text


def read_messages(path: Path) -> list[dict[str, Any]]:
    """The conversation in a JSON file (`-`: standard input), with a `Path` for every image."""
    text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    folder = Path() if str(path) == "-" else path.parent
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    from ..processing.messages_nextflow import as_conversations

    try:
        conversations, _ = as_conversations(messages)
    except ValueError as error:
        raise ValueError(f"{path} holds no conversation: {error}") from error
    if len(conversations) > 1:
        raise ValueError(f"{path} holds {len(conversations)} conversations, expected 1")
    return [{**message, "content": _with_paths(message["content"], folder)} for message in conversations[0]]


def _with_paths(content: str | list[dict[str, Any]], folder: Path) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part.get("type") == "image":
            if not isinstance(part.get("path"), str):
                raise ValueError(f'an image part is {part}, expected {{"type": "image", "path": "a.png"}}')
            part = {"type": "image", "image": existing_file(folder / part["path"])}
        parts.append(part)
    return parts


def existing_file(path: Path) -> Path:
    """The absolute path of an image; raises `FileNotFoundError` where there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"the image {path} " + ("is a folder" if path.is_dir() else "does not exist"))
    return path.resolve()


def user_message(text: str, images: list[Path] | None) -> dict[str, Any]:
    """The user's message of a text and the images before it, as the pipeline takes it."""
    parts = [{"type": "image", "image": existing_file(image)} for image in images or ()]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def conversation(text: str | None, images: list[Path] | None, history: list[dict[str, Any]] | None) -> list:
    """The history, and the user's text behind it; either may be missing."""
    if text is None and images:
        raise ValueError("got images without a text: say what is wanted of them")
    turn = [] if text is None else [user_message(text, images)]
    if not [*(history or ()), *turn]:
        raise ValueError("got no text: say what is wanted, or name a conversation with --messages")
    return [*(history or ()), *turn]


def write_messages(messages: list[dict[str, Any]], path: Path) -> None:
    """The inverse of [`read_messages`], in which images are `Path`s."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") == "image":
            image = value["image"]
            is_beside = image.resolve().is_relative_to(path.parent.resolve())
            return {
                "type": "image",
                "path": str(image.resolve().relative_to(path.parent.resolve()) if is_beside else image.resolve()),
            }
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list) else value

    write_text(path, json.dumps(plain(messages), indent=2, ensure_ascii=False) + "\n")
