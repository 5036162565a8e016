"""Thinking before drawing: how a conversation asks for it, and how an answer is laid out (§6.4; format not specified
by the paper).

The system message asks: with it the model writes `<think>why</think>what to draw` and then draws, without it it draws
at once. All of it is plain text, so any tokenizer can write it.
"""

from typing import Any


THINKING_PROMPT = "think first"
THINK_START = "<think>"
THINK_END = "</think>"


def join_reasoning(reasoning: str, prompt: str) -> str:
    """The text before the picture of an answer that thinks: the reasoning, then the prompt that it arrives at."""
    return f"{THINK_START}{reasoning}{THINK_END}{prompt}"


def split_reasoning(text: str) -> tuple[str | None, str]:
    """
    (reasoning, prompt) of the text before the picture. The reasoning is None where the text has no `<think>`; the
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
    if without_thinking_prompt(conversation) is not conversation:
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
    for message in without_thinking_prompt(conversation):
        if message["role"] == "user":
            parts = [] if isinstance(message["content"], str) else message["content"]
            kept = [part for part in parts if part["type"] != "text" and (keep_images or part["type"] != "image")]
            message = {**message, "content": kept}
        messages.append(message)
    users = [message for message in messages if message["role"] == "user"]
    if text and not users:
        raise ValueError("negative_prompt needs a user message to stand in, and the conversation has none")
    if text:
        users[-1]["content"].append({"type": "text", "text": text})
    return messages
