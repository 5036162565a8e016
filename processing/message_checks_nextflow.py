"""What callers give as messages -> conversations that are well-formed, or one line that says where they are not.

The one place where that is checked, for prompts, chats and data sets alike. Knows the form, not what a template does
with it.
"""

from os import PathLike
from typing import Any


ROLES = ("system", "user", "assistant")
TYPES = ("text", "image", "image_url")
IMAGE_KEYS = ("image", "path", "url", "base64")


def as_conversations(messages: Any, template: str = "") -> tuple[list[list[dict[str, Any]]], bool]:
    """
    One conversation or several as a list, and whether it was a list of them.

    Args:
        messages (`list[dict]` or `list[list[dict]]`): The messages.
        template (`str`, *optional*): A chat template: roles and types of parts that it names are allowed, too.

    Raises:
        `ValueError`: naming the conversation, the message and the part, what was found and what is expected.
    """
    if not isinstance(messages, (list, tuple)):
        raise ValueError(
            f'messages are {_shown(messages)}, expected a list such as [{{"role": "user", "content": "a"}}]'
        )
    if not messages:
        raise ValueError("got 0 messages, expected at least 1")
    is_batched = isinstance(messages[0], (list, tuple))
    rows = messages if is_batched else [messages]
    for index, row in enumerate(rows):
        where = f"conversation {index}, " if is_batched else ""
        if not isinstance(row, (list, tuple)) or not row:
            raise ValueError(f"{where.removesuffix(', ')} is {_shown(row)}, expected a non-empty list of messages")
        for number, message in enumerate(row):
            _check_message(message, f"{where}message {number}", template)
    return [list(row) for row in rows], is_batched


def check_text(text: str, where: str) -> None:
    """Raise where a string is no Unicode text, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"the lone surrogate {text[error.start]!r} at character {error.start}"
        raise ValueError(f"{where} has {found}, expected Unicode text") from None


def _check_message(message: Any, where: str, template: str) -> None:
    if not isinstance(message, dict):
        raise ValueError(f'{where} is {_shown(message)}, expected {{"role": ..., "content": ...}}')
    if message.get("role") is None or message.get("content") is None:
        keys = sorted(str(key) for key, value in message.items() if value is not None)
        raise ValueError(f"{where} has the keys {keys}, expected role and content")
    role, content = message["role"], message["content"]
    if not _is_known(role, ROLES, template):
        raise ValueError(f"{where} has the role {role!r}, expected 'system', 'user' or 'assistant'")
    if isinstance(content, str):
        check_text(content, where)
    elif isinstance(content, (list, tuple)):
        for number, part in enumerate(content):
            _check_part(part, f"{where}, part {number}", role, template)
    else:
        raise ValueError(f"{where} has the content {_shown(content)}, expected a string or a list of parts")


def _check_part(part: Any, where: str, role: str, template: str) -> None:
    if not isinstance(part, dict):
        raise ValueError(f'{where} is {_shown(part)}, expected a part such as {{"type": "text", "text": "a"}}')
    kind = part.get("type")
    if not _is_known(kind, TYPES, template) or (role == "system" and kind in TYPES[1:]):
        expected = "'text'" if role == "system" else "'text' or 'image'"
        raise ValueError(f"{where} of the {role} has the type {kind!r}, expected {expected}")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where} has the text {_shown(part.get('text'))}, expected a string")
        check_text(part["text"], where)
    elif kind == "image":
        given = [key for key in IMAGE_KEYS if part.get(key) is not None]
        if len(given) > 1:
            raise ValueError(f"{where} has {given}, that is {len(given)} sources, expected 1")
        if given != ["image"]:
            _check_address(part, *given, where=where)
    elif kind == "image_url":
        inner = part.get("image_url")
        inner = inner if isinstance(inner, dict) else {"url": inner}
        _check_address({"url": "", **inner}, "url", where=where)


def _check_address(part: dict[str, Any], *keys: str, where: str) -> None:
    for key in keys:
        if not isinstance(part[key], (str, PathLike)) or not str(part[key]):
            raise ValueError(f"{where} has the {key} {_shown(part[key])}, expected a non-empty string")


def _is_known(word: Any, own: tuple[str, ...], template: str) -> bool:
    """Whether a role or type is one of ours, or one that a template of the user's names."""
    if not isinstance(word, str) or word in {*ROLES, *TYPES}:
        return word in own
    return f"'{word}'" in template or f'"{word}"' in template


def _shown(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


__all__ = ["IMAGE_KEYS", "as_conversations", "check_text"]
