"""`nextflow-hf train KIND RECIPE [key=value ...]`: one grammar for all trainings.

    nextflow-hf train --list                                         # the shipped recipes, and what they need
    nextflow-hf train transformer --help                             # every key of a kind
    nextflow-hf train transformer pretrain_512 --dry-run             # what it would read and take
    nextflow-hf train transformer recipe.yaml max_steps=100 output_dir=runs/try
    torchrun --nproc-per-node 8 -m nextflow_hf.cli train transformer pretrain_512
    accelerate launch --config_file fsdp2.yaml -m nextflow_hf.cli train transformer pretrain_512

A recipe is a YAML file, or the name of a shipped one. The same command goes on where an earlier one stopped.
"""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .console import OneLineParser, one_line_mistakes


# KIND -> the module of the training, which training/common/run.py describes, and what it makes.
KINDS = {
    "tokenizer": ("vision_tokenizer.train", "the vision tokenizer, one of the paper's three stages"),
    "transformer": ("transformer.train", "the transformer, on codes that `nextflow-hf extract` wrote"),
    "decoder": ("diffusion_decoder.train", "the optional diffusion decoder"),
    "grpo": ("grpo.train", "the transformer, by rewards"),
    "teacher": ("vision_tokenizer.teacher", "a small SigLIP2 for the vision tokenizer, on captioned images"),
    "text_tokenizer": ("data.text_tokenizer", "a byte-level text tokenizer, or the processor of a model from nothing"),
}


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="nextflow-hf train",
        usage="nextflow-hf train KIND RECIPE [key=value ...] [--resume | --fresh | --dry-run] [--debug]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("kind", nargs="?", metavar="KIND", help="; ".join(f"{k}: {v[1]}" for k, v in KINDS.items()))
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "assignments", nargs="*", metavar="key=value", help="replaces a key of the recipe; the value is YAML"
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--resume", action="store_true", help="fail where there is no checkpoint to go on from")
    modes.add_argument("--fresh", action="store_true", help="begin anew; an earlier run is renamed, not deleted")
    modes.add_argument("--dry-run", action="store_true", help="say what would be trained, and stop")
    parser.add_argument("--list", action="store_true", help="list the shipped recipes, and what they need")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this text; after KIND: all keys of its recipes"
    )
    return parser


@one_line_mistakes("train")
def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    if args.kind is not None and args.kind not in KINDS:
        raise ValueError(f"KIND is {args.kind!r}, expected one of {', '.join(KINDS)}")
    if args.list:
        return list_recipes([args.kind] if args.kind else list(KINDS))
    if args.kind is None:
        parser.print_help()
        return 0 if args.help else 2
    silence_libraries()
    module = importlib.import_module(f"..training.{KINDS[args.kind][0]}", __package__)
    if args.help:
        return print_keys(args.kind, module)
    if args.recipe is None:
        raise ValueError(
            f"name a recipe of {args.kind}: a YAML file, or one of `nextflow-hf train {args.kind} --list`"
        )
    return train(module, args, argv)


def train(module: ModuleType, args: argparse.Namespace, argv: list[str]) -> int:
    """Run the training that the arguments name, or say what it would do."""
    from transformers import TrainingArguments

    from ..training.common.recipe import load_recipe
    from ..training.common.run import begin, resolve, write_run

    recipe, groups, fallbacks = resolve(load_recipe(args.kind, args.recipe, args.assignments), module.GROUPS)
    training, is_main = groups[-1], True
    if isinstance(training, TrainingArguments):
        is_main = training.process_index == 0
    if is_main:
        for sentence in fallbacks:
            print(f"nextflow-hf train: {sentence}", file=sys.stderr)
    if args.dry_run:
        return print_plan(module, recipe, groups) if is_main else 0
    options = {"model": module.MODEL and recipe.get(module.MODEL), "command": ["nextflow-hf", "train", *argv]}
    if not isinstance(training, TrainingArguments):  # made in seconds, and always the same
        write_run(Path(training.output_dir), args.kind, recipe, **options)
        module.train(*groups)
        return 0
    mode = "fresh" if args.fresh else "resume" if args.resume else "auto"
    is_to_do, checkpoint = begin(args.kind, recipe, training, mode=mode, **options)
    if is_to_do:
        module.train(*groups, checkpoint=checkpoint)
    leave_processes()
    return 0


def leave_processes() -> None:
    """Destroy the process group, if there is one: its threads may abort a process that ends while they still run."""
    import torch.distributed
    from accelerate import PartialState

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        PartialState().destroy_process_group()


def list_recipes(kinds: Sequence[str]) -> int:
    """Print the shipped recipes of each kind, and what they start from."""
    from ..training.common.recipe import load_recipe, shipped_recipes

    for kind in kinds:
        for name, path in shipped_recipes(kind).items():
            comments = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line[:1] == "#"]
            print(f"{kind} {name}\n    {comments[0]}")
            recipe = load_recipe(kind, name)
            needs = [f"{key}={value}" for key, value in recipe.items() if str(value).startswith(("runs/", "['runs/"))]
            needs = [need for need in needs if not need.startswith("output_dir=")]
            needs += [comment for comment in comments[1:] if comment.startswith(("nextflow-hf train", "Memory:"))]
            print("".join(f"    {need}\n" for need in needs), end="")
    return 0


def print_keys(kind: str, module: ModuleType) -> int:
    """Print every key of a recipe of this kind, with its type and default."""
    from ..training.common.keys import document_keys

    print(
        f"Keys of a recipe of `nextflow-hf train {kind} RECIPE [key=value ...]`; `a.b=value` sets b in the mapping a."
    )
    for group in module.GROUPS:
        print(f"\n{group.__name__}\n")
        print("\n".join(map(str, document_keys(group))))
    return 0


def print_plan(module: ModuleType, recipe: dict, groups: Sequence) -> int:
    """`--dry-run`: print the resolved recipe, the steps, the data and the memory."""
    import yaml
    from transformers import TrainingArguments

    from ..training.common.run import BatchArguments, describe_batch

    print(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True))
    if isinstance(training := groups[-1], TrainingArguments):
        batch = next((group for group in groups if isinstance(group, BatchArguments)), None)
        steps = f"{training.max_steps:,}" if training.max_steps > 0 else f"of {training.num_train_epochs:g} epochs"
        print(f"steps   {steps}\nbatch   {describe_batch(training, batch)}")
    print("\n".join(module.plan(*groups)))
    return 0


def silence_libraries() -> None:
    """One progress bar, that of the training, and no remarks of libraries about themselves."""
    # TRL's own default has the old name of `activation_checkpointing`.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

    import datasets
    import diffusers.utils.logging
    import torch
    import transformers.utils.logging

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, if installed, would look and report

    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
