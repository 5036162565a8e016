"""Thinking before drawing: how it is asked for and how it is written (not specified by the paper).

A short system message asks for it. The assistant's turn is then `<think>`, the reasoning, `</think>`, the final prompt
and the image, all one sequence: the image sees what was thought. `<think>` and `</think>` are plain text, so any
tokenizer has them. For guidance all of that is condition: the unconditional prompt has neither the system message nor
the thinking, and is that of the same conversation without thinking.
"""

from typing import Any


THINK_PROMPT = "Think before you draw."
THINK_START = "<think>"
THINK_END = "</think>"


def format_thinking(reasoning: str, prompt: str) -> str:
    """The text in front of the image: what was thought, and the prompt that came of it."""
    return f"{THINK_START}{reasoning}{THINK_END}{prompt}"


def parse_thinking(text: str) -> tuple[str, str]:
    """
    `text` of an answer -> (reasoning, final prompt), without the marks and white space around them. Text that was cut
    off before `</think>` is all reasoning, text that never began to think all prompt.
    """
    before, start, after = text.partition(THINK_START)
    if not start:
        return "", text.strip()
    reasoning, _, prompt = after.partition(THINK_END)
    return reasoning.strip(), (before + prompt).strip()


def with_think_prompt(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with [`THINK_PROMPT`] as their system message, in front of what theirs says, once."""
    if not conversation or conversation[0].get("role") != "system":
        return [{"role": "system", "content": THINK_PROMPT}, *conversation]
    first, *others = conversation
    content = first["content"]
    text = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
    if text.startswith(THINK_PROMPT):
        return conversation
    if isinstance(content, str):
        content = f"{THINK_PROMPT}\n{content}" if content else THINK_PROMPT
    else:
        content = [{"type": "text", "text": f"{THINK_PROMPT}\n" if text else THINK_PROMPT}, *content]
    return [{**first, "content": content}, *others]


__all__ = ["THINK_END", "THINK_PROMPT", "THINK_START", "format_thinking", "parse_thinking", "with_think_prompt"]
