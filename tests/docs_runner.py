"""Runs the command and Python blocks of a Markdown page in order, in one folder, as a reader would."""

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextflow_hf import cli


_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w./-]+\.(?:yaml|py|txt))\n")


@dataclass
class Block:
    """
    Args:
        language (`str`): Of the fence: bash, python, yaml, text.
        text (`str`): What stands in it.
        line (`int`): Where it begins in the page.
    """

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The name of the file that the block is, by its first line."""
        match = _FILE.match(self.text)
        return match[1] if match else None


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        yield Block(match[1], match[2], text[: match.start()].count("\n") + 2)


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a bash block; comments are gone, lines that end in a backslash joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


class PageRunner:
    """
    Args:
        substitute (`Callable`): Replaces the placeholders of a text.
        exempt (`Callable`): The reason why a command is not run, or `None`.
    """

    def __init__(self, substitute: Callable[[str], str], exempt: Callable[[str], str | None]):
        self.substitute, self.exempt = substitute, exempt
        self.names: dict[str, Any] = {"__name__": "__docs__"}

    def run(self, page: Path) -> None:
        for block in blocks(page):
            block.text = self.substitute(block.text)
            if block.file is not None:
                path = Path(block.file)
                path.write_text(block.text.partition("\n")[2] if path.suffix == ".txt" else block.text)
            elif block.language == "python":
                code = compile("\n" * (block.line - 1) + block.text, page.name, "exec")
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(code, self.names)
            elif block.language == "bash":
                for words in commands(block):
                    self._command(words, f"{page.name}:{block.line}")

    def _command(self, words: list[str], where: str) -> None:
        if self.exempt(shlex.join(words)) is not None:
            return
        assert words[0] == "nextflow-hf", f"{where}: {shlex.join(words)} is neither run nor exempt"
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                status = cli.main(words[1:])
            except SystemExit as stop:  # argparse's
                status = stop.code or 0
        assert status == 0, f"{where}: {shlex.join(words)}\n{output.getvalue()}\n{errors.getvalue()}"
