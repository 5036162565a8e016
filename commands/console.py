"""How a command speaks: results on standard output, progress on standard error, mistakes in one line and status 2."""

import argparse
import functools
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

from safetensors import SafetensorError


MISTAKE = 2  # exit status, as argparse's
DEBUG = "--debug"
# What users can put right is said in one line; all else is a bug, and keeps its traceback.
MISTAKES = (ValueError, OSError, ImportError, SafetensorError)  # the last is of weights that were cut short


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing else waits for it: ends a command as Ctrl-C does."""


class OneLineParser(argparse.ArgumentParser):
    """Raises a mistake in place of printing the usage and ending the process: for [`one_line_mistakes`]."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


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
    The exit status of `work(args, console)`, whose result is printed as JSON where that is asked for, and a mistake
    in one line.
    """
    console = Console(name, is_json=args.json, is_quiet=args.quiet)
    try:
        with _terminable(), redirect_stdout(sys.stderr):  # whatever a library prints
            if args.quiet:
                _silence_progress_bars()
            result = work(args, console)
    except KeyboardInterrupt as stop:
        return _interrupted(console, stop)
    except MISTAKES as error:
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


def one_line_mistakes(name: str) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """
    Makes of a function of the arguments of `nextflow-hf <name>` one that returns an exit status, and says in one line
    what users can put right. With `--debug` it raises that instead.
    """

    def decorate(main: Callable[..., int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def run_main(argv: Sequence[str] | None = None) -> int:
            argv = list(sys.argv[1:] if argv is None else argv)
            console = Console(name, is_json=False, is_quiet=False)
            try:
                with _terminable():
                    return main([word for word in argv if word != DEBUG]) or 0
            except KeyboardInterrupt as stop:
                return _interrupted(console, stop)
            except MISTAKES as error:
                if DEBUG in argv:
                    raise
                console.warn(f"{_one_line(error)} ({DEBUG} shows the traceback)")
                return MISTAKE

        return run_main

    return decorate


def _one_line(error: Exception) -> str:
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


def _interrupted(console: Console, stop: KeyboardInterrupt) -> int:
    """The exit status that a shell gives."""
    is_term = isinstance(stop, Terminated)
    console.warn("terminated" if is_term else "interrupted")
    return 128 + (signal.SIGTERM if is_term else signal.SIGINT)


def _fail(console: Console, error: Exception, message: str) -> int:
    console.warn(message)
    console.write_json({"command": console.name, "error": {"type": type(error).__name__, "message": message}})
    return MISTAKE


def _silence_progress_bars() -> None:
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
