"""How a command speaks: results on standard output, progress on standard error, mistakes in one line and status 2."""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any


MISTAKE = 2  # exit status, as argparse's
INTERRUPTED = 130  # as a shell's


class Console:
    """
    Where a running command speaks to.

    Args:
        name (`str`): Of the command.
        is_json (`bool`): Whether standard output is for one JSON object alone.
        is_quiet (`bool`): Whether progress is left out.

    Attributes:
        status (`int`): Exit status of the command, unless it fails.
    """

    def __init__(self, name: str, *, is_json: bool, is_quiet: bool):
        self.name = name
        self.is_json = is_json
        self.is_quiet = is_quiet
        self.status = 0
        self._output = sys.stdout  # `run` puts another in its place

    def show(self, text: str, end: str = "\n") -> None:
        """A piece of the result, at once; with `--json` the whole comes at the end."""
        if not self.is_json:
            print(text, end=end, file=self._output, flush=True)

    def say(self, text: str) -> None:
        """Progress."""
        if not self.is_quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        print(f"nextflow-hf {self.name}: {text}", file=sys.stderr, flush=True)

    def write_json(self, value: Any) -> None:
        if self.is_json:
            print(json.dumps(value), file=self._output, flush=True)


def run(name: str, args: argparse.Namespace, work: Callable[[argparse.Namespace, Console], dict[str, Any]]) -> int:
    """
    The exit status of `work(args, console)`, whose result is printed as JSON where that is asked for. What users can
    put right is said in one line; all else is a bug, and keeps its traceback.
    """
    console = Console(name, is_json=args.json, is_quiet=args.quiet)
    try:
        with redirect_stdout(sys.stderr):  # whatever a library prints
            if args.quiet:
                _silence_progress_bars()
            result = work(args, console)
    except KeyboardInterrupt:
        console.warn("interrupted")
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        return _fail(console, error, str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be imported here
            raise
        return _fail(
            console,
            error,
            f"{error}\nThe device has too little memory: try --offload, --quantize 4bit, --dtype bfloat16, fewer "
            "images at once, or a lower --resolution.",
        )
    console.write_json({"command": name, **result})
    return console.status


def _fail(console: Console, error: Exception, message: str) -> int:
    console.warn(message)
    console.write_json({"command": console.name, "error": {"type": type(error).__name__, "message": message}})
    return MISTAKE


def _silence_progress_bars() -> None:
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
