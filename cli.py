"""`nextflow-hf`: one sub-command per task. Knows only where each is; what it needs is imported when it runs."""

import argparse
import atexit
import functools
import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from packaging.requirements import Requirement

from . import __version__
from .commands.console import OneLineParser


# Sub-command -> (module with `main(argv)`, what `--help` says).
COMMANDS = {
    "generate": ("nextflow_hf.commands.generate", "make images from words"),
    "edit": ("nextflow_hf.commands.edit", "change images as told, vary them, or inpaint them"),
    "chat": ("nextflow_hf.commands.chat", "ask about images, or hold a conversation with images in between"),
    "interleave": ("nextflow_hf.commands.interleave", "answer in text and images"),
    "frames": ("nextflow_hf.commands.frames", "make a sequence of images from a storyline"),
    "app": ("nextflow_hf.app.command", "do all of this in the browser"),
    "serve": ("nextflow_hf.commands.serve", "serve a model by OpenAI's API"),
    "reconstruct": ("nextflow_hf.commands.reconstruct", "encode and decode images by the vision tokenizer"),
    "info": ("nextflow_hf.commands.info", "describe a model, or say how an image was made"),
    "demo": ("nextflow_hf.commands.demo", "make and edit images with the installed models"),
    "diffusers": ("nextflow_hf.commands.diffusers_cli", "run diffusers-cli with NextFlow registered"),
    "transformers": ("nextflow_hf.commands.transformers_cli", "run transformers' command line, likewise"),
    "convert": ("nextflow_hf.commands.convert", "convert a Qwen or a TokenFlow to what training starts from"),
    "export": ("nextflow_hf.commands.export", "write a training run as a pipeline that everything loads"),
    "push": ("nextflow_hf.commands.push", "upload a pipeline to the Hub"),
    "evaluate": ("nextflow_hf.commands.evaluate", "judge a model by a suite, with tables and contact sheets"),
    "world": ("nextflow_hf.commands.world", "write data sets that code composes, or train their judge"),
    "extract": ("nextflow_hf.commands.extract", "encode data sets as shards of tokens and codes"),
    "train": ("nextflow_hf.commands.train", "train any part of a model by a recipe"),
    "memory": ("nextflow_hf.commands.memory", "estimate the GPU memory that a training takes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command named by the first of `argv` (`sys.argv[1:]` by default), with the others as its own."""
    parser = OneLineParser(
        prog="nextflow-hf",
        description="NextFlow for Hugging Face: images and text by one model.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=16),
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, summary) in COMMANDS.items():
        # Its own parser answers `nextflow-hf <name> --help`.
        commands.add_parser(name, help=summary, add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    module, _ = COMMANDS[arguments.command]
    # diffusers imports it, and it would warn on every start of a kernel for CPUs that it did not find.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module(module).main(rest) or 0
    except ModuleNotFoundError as error:
        extra = extra_with(error.name)
        if extra is None:
            raise
        print(f"nextflow-hf {arguments.command} needs {error.name}: {extra}", file=sys.stderr)
        return 2


def run() -> NoReturn:
    """
    Run [`main`] as this process, and end it with the status.

    One process of several ends without the interpreter's teardown: there the threads of its process group, which DDP
    and DeepSpeed keep alive, may abort it, and a launcher would report a finished run as failed.
    """
    status = None

    def leave() -> None:
        if status is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    atexit.register(leave)  # the first, so it runs after the handlers of all that is imported later
    status = main()
    sys.exit(status)


def extra_with(package: str | None) -> str | None:
    """How to install a package that an extra of this one brings; `None` where none does."""
    for line in importlib.metadata.requires("nextflow-hf") or []:
        requirement = Requirement(line)
        if requirement.name.replace("-", "_") == package and requirement.marker is not None:
            for extra in importlib.metadata.metadata("nextflow-hf").get_all("Provides-Extra"):
                if requirement.marker.evaluate({"extra": extra}):
                    return f'pip install "nextflow-hf[{extra}]"'
    return None


if __name__ == "__main__":
    run()
