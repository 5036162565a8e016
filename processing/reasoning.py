"""Thinking before drawing: how a conversation asks for it, and how an answer is laid out (§6; format not specified by
the paper).

The system message asks: with it the model writes `<think>why</think>what to draw` and then draws, without it it draws
at once. All of it is plain text, so any tokenizer can write it.
"""

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
