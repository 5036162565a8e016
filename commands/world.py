"""`nextflow-hf world`: the data sets of a world that is drawn by code, and its judge."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from .options import new_parser


EXAMPLES = """
  nextflow-hf world emoji --output-dir data/emoji
  nextflow-hf world emoji --output-dir data/emoji --resolution 96 --rows 200000 --concepts 400
  nextflow-hf world emoji --output-dir data/emoji --judge data/emoji/judge
"""


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "world", "Write a world's data sets, or train its judge; an interrupted run goes on.", EXAMPLES
    )
    parser.add_argument("name", help="a module of nextflow_hf.worlds: emoji, shapes")
    parser.add_argument("--output-dir", type=Path, required=True, help="rasters, and a folder for each resolution")
    parser.add_argument("--artwork", type=Path, help="folder of the archives; by default one in --output-dir")
    parser.add_argument("--concepts", type=int, metavar="N", help="the first N of the world's list; default: all")
    parser.add_argument("--resolution", type=int, default=64, metavar="PIXELS", help="side of a square image (64)")
    parser.add_argument(
        "--sizes", type=_size, nargs="+", metavar="HxW", help="sizes of the images; default: ratios from 1:2 to 2:1"
    )
    parser.add_argument("--rows", type=int, default=100_000, metavar="N", help="of all training tasks (100000)")
    parser.add_argument("--test-rows", type=int, default=200, metavar="N", help="of each task and test split (200)")
    parser.add_argument("--images", type=int, default=20_000, metavar="N", help="for the vision tokenizer (20000)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", type=Path, metavar="DIR", help="train the judge into this folder instead")
    parser.add_argument("--steps", type=int, default=8000, metavar="N", help="of the judge's training (8000)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write or train; returns the exit status."""
    args = make_parser().parse_args(argv)
    if not args.name.isidentifier() or importlib.util.find_spec(f"nextflow_hf.worlds.{args.name}") is None:
        print(f"nextflow-hf world: there is no world {args.name!r}, expected emoji or shapes", file=sys.stderr)
        return 2
    from ..worlds.dataset import TASKS, write_dataset
    from ..worlds.scene import canvases

    if unknown := sorted(set(args.tasks or ()) - set(TASKS)):
        print(f"nextflow-hf world: --tasks has {unknown}, expected some of {list(TASKS)}", file=sys.stderr)
        return 2
    world = importlib.import_module(f"nextflow_hf.worlds.{args.name}")
    sprites = world.load(args.output_dir, artwork=args.artwork, concepts=args.concepts)
    if args.judge is not None:
        from ..worlds.judge import train_judge

        report = train_judge(sprites, args.judge, seed=args.seed, steps=args.steps)
        for side, rates in report.items():
            print(f"{side} px: {rates['things']:.1%} of the sprites, {rates['passed']:.1%} of the true scenes whole")
        print(args.judge / "report.json")
        return 0
    write_dataset(
        sprites,
        args.output_dir / str(args.resolution),
        args.sizes or canvases(args.resolution, ratios=sprites.dialect.ratios),
        seed=args.seed,
        rows=args.rows,
        test_rows=args.test_rows,
        images=args.images,
        tasks=args.tasks,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
