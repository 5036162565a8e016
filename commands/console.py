"""How a command speaks: results on standard output, progress on standard error, mistakes in one line and status 2."""

import argparse
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

from safetensors import SafetensorError


MISTAKE = 2  # exit status, as argparse's
DEBUG = "--debug"
# What users can put right is said in one line; all else is a bug, and keeps its traceback. The last is of weights
# that were cut short.
MISTAKES = (ValueError, OSError, ImportError, MemoryError, SafetensorError)
# By name, as its library need not be imported here: a field of a configuration has a value of another type.
MISTAKES_OF_LIBRARIES = ("StrictDataclassFieldValidationError",)
LESS_MEMORY = (
    "The device has too little memory: try --offload, --quantize 4bit, --dtype bfloat16, fewer images at once, or a "
    "lower --resolution"
)


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing else waits for it: ends a command as Ctrl-C does."""


class OneLineParser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message in one line, without the usage."""
        self.exit(MISTAKE, f"{self.prog}: {message}\n")


class Console:
    """
    Where a running command speaks to.

    Args:
        name (`str`): Name of the command.
        is_json (`bool`): Whether standard output is for one JSON object alone.
        is_quiet (`bool`): Whether progress is left out.

    Attributes:
        status (`int`): Exit status of the command, unless it fails.
    """

    def __init__(self, name: str, *, is_json: bool = False, is_quiet: bool = False):
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
        """Print a line to standard error, whatever `--quiet` says."""
        print(f"nextflow-hf {self.name}: {text}", file=sys.stderr, flush=True)

    def write_json(self, value: Any) -> None:
        """Print `value` as one line of JSON where `--json` asks for it."""
        if self.is_json:
            print(json.dumps(value), file=self._output, flush=True)


def run(name: str, args: argparse.Namespace, work: Callable[[argparse.Namespace, Console], dict[str, Any]]) -> int:
    """
    The exit status of `work(args, console)`, whose result is printed as JSON where that is asked for, and a mistake
    in one line.
    """
    console = Console(name, is_json=args.json, is_quiet=args.quiet)

    def whole() -> int:
        try:
            with redirect_stdout(sys.stderr):  # whatever a library prints
                result = work(args, console)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be imported here
                raise
            raise MemoryError(f"{error} {LESS_MEMORY}") from error
        console.write_json({"command": name, **result})
        return console.status

    return _status(console, whole, is_debug=args.debug)


def one_line_mistakes(name: str) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """
    Makes of a function of the arguments of `nextflow-hf <name>` one that returns an exit status, and says in one line
    what users can put right. With `--debug` it raises that instead.
    """

    def decorate(main: Callable[..., int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def run_main(argv: Sequence[str] | None = None) -> int:
            argv = list(sys.argv[1:] if argv is None else argv)
            words = [word for word in argv if word != DEBUG]
            return _status(Console(name), lambda: main(words) or 0, is_debug=DEBUG in argv)

        return run_main

    return decorate


def _status(console: Console, work: Callable[[], int], *, is_debug: bool) -> int:
    """The exit status of `work`, which says what users can put right in one line, or raises it for `--debug`."""
    try:
        with _terminable():
            return work()
    except KeyboardInterrupt as stop:
        is_term = isinstance(stop, Terminated)
        console.warn("terminated" if is_term else "interrupted")
        return 128 + (signal.SIGTERM if is_term else signal.SIGINT)  # as a shell has it
    except BrokenPipeError:  # as in `nextflow-hf train --list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if is_debug or not (isinstance(error, MISTAKES) or type(error).__name__ in MISTAKES_OF_LIBRARIES):
            raise
        message = _one_line(error)
        console.warn(f"{message} ({DEBUG} shows the traceback)")
        console.write_json({"command": console.name, "error": {"type": type(error).__name__, "message": message}})
        return MISTAKE


def _one_line(error: BaseException) -> str:
    from ..cli import extra_with

    extra = extra_with(error.name) if isinstance(error, ModuleNotFoundError) else None
    parts = [str(error) or type(error).__name__, *getattr(error, "__notes__", ()), *([extra] if extra else ())]
    return " ".join(" ".join(parts).split())


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
