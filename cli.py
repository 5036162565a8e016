"""`nextflow-hf`: one sub-command per task. Knows only where each is; what it needs is imported when it runs."""

import argparse
import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Sequence

from packaging.requirements import Requirement

from . import __version__


# Sub-command -> (module with `main(argv)`, what `--help` says).
COMMANDS = {
    "generate": ("nextflow_hf.commands.generate", "images from words"),
    "edit": ("nextflow_hf.commands.edit", "images changed as told, varied, or drawn again in part"),
    "chat": ("nextflow_hf.commands.chat", "talk about images, and draw in between"),
    "interleave": ("nextflow_hf.commands.interleave", "an answer of text and images"),
    "frames": ("nextflow_hf.commands.frames", "a storyline as a GIF, a film or a contact sheet"),
    "app": ("nextflow_hf.app.command", "draw, edit and talk in the browser, and watch images grow"),
    "reconstruct": ("nextflow_hf.commands.reconstruct", "images through the vision tokenizer and back"),
    "info": ("nextflow_hf.commands.info", "what a model is, and needs; how an image was made"),
    "demo": ("nextflow_hf.hub_cards.demo", "draw and edit pictures with the shipped Shapes model, on any machine"),
    "diffusers": ("nextflow_hf.commands.diffusers_cli", "diffusers-cli, with NextFlow known to it"),
    "convert": (
        "nextflow_hf.commands.convert",
        "a pipeline to train, of a Qwen language model and a vision tokenizer",
    ),
    "export": ("nextflow_hf.commands.export", "a run of training as a repository that everything loads"),
    "push": ("nextflow_hf.commands.push", "such a repository to the Hub"),
    "evaluate": ("nextflow_hf.commands.evaluate", "a model judged by a suite, with tables and contact sheets"),
    "world": (
        "nextflow_hf.commands.world",
        "data sets that are drawn by code, such as scenes of emoji, and their judge",
    ),
    "extract": (
        "nextflow_hf.commands.extract",
        "data sets as shards of tokens and codes",
    ),
    "train": ("nextflow_hf.commands.train", "train any part of a model, by a recipe"),
    "memory": ("nextflow_hf.commands.memory", "what a training takes of a GPU's memory"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command named by the first of `argv` (`sys.argv[1:]` by default), with the others as its own."""
    parser = argparse.ArgumentParser(prog="nextflow-hf", description="NextFlow for Hugging Face.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (_, summary) in COMMANDS.items():
        # Its own parser answers `nextflow-hf <name> --help`.
        commands.add_parser(name, help=summary, add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    module, _ = COMMANDS[arguments.command]
    # On every start it would tell of a kernel for CPUs that it did not find.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module(module).main(rest) or 0
    except ModuleNotFoundError as error:
        extra = extra_with(error.name)
        if extra is None:
            raise
        print(f"nextflow-hf {arguments.command} needs {error.name}: {extra}", file=sys.stderr)
        return 2


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
    sys.exit(main())
