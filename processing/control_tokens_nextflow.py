"""Messages cannot write control tokens: what spells one is cut, and tokenized in pieces as the text that it is."""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


# Cuts the rendered chat into pieces that are tokenized on their own. A Unicode noncharacter: no text may contain it.
CUT = "\ufdd0"


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
            given = given.replace(CUT, "")
            found = self.pattern.search(given)
            if found is None:
                return given
            if refuse:
                raise ValueError(
                    f"a message contains the control token {given[found.start() : found.start() + 24]!r}: as text it "
                    "is safe only with tokenize=True; if it is meant, pass sanitize_control_tokens=False"
                )
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
        message = self.cut(message, refuse=refuse)
        if refuse:  # the plain rendered string: no cuts, but the seams of its parts still count
            joined = message.get("content")
            if isinstance(joined, list):
                self.cut("".join(part.get("text") or "" for part in joined), refuse=True)
            return message
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": CUT + content + CUT}
        parts = [
            {**part, "text": CUT + part["text"] + CUT} if part.get("type") == "text" else part
            for part in content or []
        ]
        return {**message, "content": parts}


__all__ = ["CUT", "ControlTokens"]
