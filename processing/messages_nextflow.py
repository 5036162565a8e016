"""Messages: well-formed conversations, the images in them, how thinking is asked for, and text that stays text.

The one place where messages are checked, for prompts, chats and data sets alike. Knows the form, not what a template
does with it. Thinking before an image (§6.4; format not specified by the paper) is asked for by the system message:
with it the model writes `<think>why</think>what the image shows`. All of it is plain text. Messages cannot write
control tokens: what spells one is cut, and tokenized in pieces as the text that it is.
"""

import re
from collections.abc import Sequence
from os import PathLike
from typing import Any

from transformers import PreTrainedTokenizerBase

from .image_processing_nextflow import flatten_images


ROLES = ("system", "user", "assistant")
IMAGE_TYPES = ("image", "image_url")  # the second as OpenAI's clients write it
TYPES = ("text", *IMAGE_TYPES)
IMAGE_KEYS = ("image", "path", "url", "base64")
# Cuts the rendered chat into pieces that are tokenized on their own. A Unicode noncharacter: no text may contain it.
CUT = "\ufdd0"
THINKING_PROMPT = "think first"
THINK_START = "<think>"
THINK_END = "</think>"


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
    is_ours = isinstance(role, str) and role in ROLES
    if not (is_ours or _is_known(role, ROLES, template)):
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
    is_ours = isinstance(kind, str) and kind in TYPES
    if not (is_ours or _is_known(kind, TYPES, template)) or (role == "system" and kind in IMAGE_TYPES):
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


def take_images(
    conversations: list[list[dict[str, Any]]], images: Any | None
) -> tuple[list[list[Any]], list[list[bool]]]:
    """
    Images of every conversation, in reading order, and which of them are the assistant's. Strips the image parts in
    place. A part without data takes the next one of `images`.
    """
    spare = [] if images is None else flatten_images(images)
    rows, by_assistant, empty = [], [], []
    for conversation in conversations:
        rows.append([])
        by_assistant.append([])
        for index, message in enumerate(conversation):
            if isinstance(message["content"], str):
                continue
            message["content"] = list(message["content"])
            for number, part in enumerate(message["content"]):
                if part["type"] != "image":
                    continue
                data = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
                if data and part.get("base64") is not None:
                    # The value may be a whole data URI already.
                    data = [f"data:image/any;base64,{data[0].rpartition(',')[2]}"]
                if not data:
                    data = spare[len(empty) : len(empty) + 1]
                    empty.append(f"message {index}, part {number}")
                # A part that finds no image is counted, and refused below.
                rows[-1].extend(data)
                by_assistant[-1].append(message["role"] == "assistant")
                message["content"][number] = {"type": "image"}
    if len(empty) != len(spare):
        where = f" ({'; '.join(empty[:3])})" if empty else ""
        raise ValueError(
            f"the messages have {len(empty)} image parts without data{where}, but images= holds {len(spare)}"
        )
    return rows, by_assistant


def join_reasoning(reasoning: str, prompt: str) -> str:
    """The text before the image of an answer that thinks: the reasoning, then the prompt that it arrives at."""
    return f"{THINK_START}{reasoning}{THINK_END}{prompt}"


def split_reasoning(text: str) -> tuple[str | None, str]:
    """
    (reasoning, prompt) of the text before the image. The reasoning is None where the text has no `<think>`; the
    prompt is empty where the thinking was not finished.
    """
    head, start, rest = text.partition(THINK_START)
    if not start:
        return None, text.strip()
    reasoning, _, prompt = rest.partition(THINK_END)
    return reasoning.strip(), f"{head}{prompt}".strip()


def with_thinking_prompt(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with `THINKING_PROMPT` as their system message, in front of what theirs says, once."""
    if not conversation or conversation[0].get("role") != "system":
        return [{"role": "system", "content": THINKING_PROMPT}, *conversation]
    if without_thinking_prompt(conversation) is not conversation:  # it asks already
        return conversation
    first, *others = conversation
    content = first.get("content") or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    asked = {"type": "text", "text": f"{THINKING_PROMPT}\n" if content else THINKING_PROMPT}
    return [{**first, "content": [asked, *parts]}, *others]


def without_thinking_prompt(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of one conversation as they would be without `enable_thinking`."""
    if not conversation or conversation[0].get("role") != "system":
        return conversation
    first, *others = conversation
    content = first.get("content") or ""
    text = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
    if text == THINKING_PROMPT:
        return others
    if text.startswith(f"{THINKING_PROMPT}\n"):
        return [{**first, "content": text.removeprefix(f"{THINKING_PROMPT}\n")}, *others]
    return conversation


def unconditional_messages(
    conversation: list[dict[str, Any]], text: str = "", *, keep_images: bool = True
) -> list[dict[str, Any]]:
    """
    The unconditional prompt of guidance: the same messages without the user's text, as training drops it, and
    without the request to think.

    Args:
        conversation (`list[dict]`): The messages, which are left as they are.
        text (`str`, *optional*, defaults to `""`): A negative prompt, at the end of the last user message.
        keep_images (`bool`, *optional*, defaults to `True`): Otherwise without the user's images, too.
    """
    messages = []
    if conversation and conversation[0]["role"] == "system":
        conversation = without_thinking_prompt(conversation)
    for message in conversation:
        # As training drops text: the words of the system and of the assistant stay.
        if message["role"] == "user":
            parts = [] if isinstance(message["content"], str) else message["content"]
            dropped = ("text",) if keep_images else ("text", *IMAGE_TYPES)
            kept = [part for part in parts if part["type"] not in dropped]
            message = {**message, "content": kept}
        messages.append(message)
    users = [message for message in messages if message["role"] == "user"]
    if text and not users:
        raise ValueError("negative_prompt needs a user message to stand in, and the conversation has none")
    if text:
        users[-1]["content"].append({"type": "text", "text": text})
    return messages


class ControlTokens:
    """
    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): Its special tokens are control tokens.
        others (`Sequence[str]`): And so are these.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, others: Sequence[str]):
        tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {*others}
        # Numbered families (image codes) are one alternative.
        families = {r"\d+".join(map(re.escape, re.split(r"\d+", token))) for token in tokens}
        # Matches the empty string in front of every one.
        self.pattern = re.compile(f"(?={'|'.join(sorted(families, key=len, reverse=True))})")

    def cut(self, given: Any, *, refuse: bool) -> Any:
        """Strings in `given` with a cut inside every control token, so that the tokenizer never sees it whole."""
        if isinstance(given, str):
            # Our mark is no text: inside a control token it would hide that from the search.
            given = given.replace(CUT, "")
            found = self.pattern.search(given)
            if found is None:
                return given
            if refuse:
                raise ValueError(
                    f"a message contains the control token {given[found.start() : found.start() + 24]!r}: as text it "
                    "is safe only with tokenize=True; if it is meant, pass sanitize_control_tokens=False"
                )
            # Behind the first character: the rest is no token any more, wherever the text is split.
            starts = {match.start() for match in self.pattern.finditer(given)}
            return "".join(letter + CUT if index in starts else letter for index, letter in enumerate(given))
        if isinstance(given, dict):
            return {name: self.cut(value, refuse=refuse) for name, value in given.items()}
        if isinstance(given, (list, tuple)):
            return [self.cut(value, refuse=refuse) for value in given]
        return given

    def as_text(self, message: dict[str, Any], *, refuse: bool) -> dict[str, Any]:
        """
        A message whose text cannot become control tokens: none inside a string, none across the seam of two parts, and
        every text starts on a token of its own (so a response's first token never merges with the header's line
        break).
        """
        seam = "" if refuse else CUT  # with `refuse` the rendered string is what the caller gets
        cut = {name: self.cut(value, refuse=refuse) for name, value in message.items() if name != "content"}
        content = message.get("content")
        if isinstance(content, str):
            return {**cut, "content": seam + self.cut(content, refuse=refuse) + seam}
        parts = []
        for part in content or []:
            part = {name: self.cut(value, refuse=refuse) for name, value in part.items()}
            parts.append({**part, "text": seam + part["text"] + seam} if part.get("type") == "text" else part)
        # A token may also be spelled across two parts, which templates join.
        if refuse:
            self.cut("".join(part.get("text") or "" for part in parts), refuse=True)
        return {**cut, "content": parts}
