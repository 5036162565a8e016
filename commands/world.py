"""`nextflow-hf world`: data sets that code composes, such as scenes of emoji, and the judge of their images."""

import argparse
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from .console import one_line_mistakes
from .options import new_parser, whole


EXAMPLES = """\
  nextflow-hf world emoji --output-dir data/emoji
  nextflow-hf world emoji --output-dir data/emoji --resolution 96 --rows 200000 --concepts 400
  nextflow-hf world emoji --output-dir data/emoji --dataset single --tasks text_to_image --categories single
  nextflow-hf world emoji --output-dir data/emoji --judge data/emoji/judge
  nextflow-hf world emoji --output-dir data/emoji --concepts 400 --demo my-model --tasks text_to_image edit
"""


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(whole(), text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, expected HEIGHTxWIDTH such as 64x96") from None
    return height, width


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "world", "Write the data sets of a world, or train its judge. An interrupted run goes on.", EXAMPLES
    )
    parser.add_argument("name", help="emoji or shapes: a module of nextflow_hf.worlds")
    parser.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="folder to write, with one for each data set"
    )
    parser.add_argument("--dataset", metavar="NAME", help="folder in --output-dir to write; default: the resolution")
    parser.add_argument("--artwork", type=Path, metavar="DIR", help="archives of artwork; default: in --output-dir")
    parser.add_argument("--concepts", type=whole(), metavar="N", help="use the first N concepts; default: all")
    parser.add_argument(
        "--resolution", type=whole(), default=64, metavar="PIXELS", help="side of a square image; default: %(default)s"
    )
    parser.add_argument(
        "--sizes", type=_size, nargs="+", metavar="HxW", help="sizes of the images; default: ratios from 1:2 to 2:1"
    )
    for name, least, default, text in (
        ("rows", 1, 100_000, "training rows of all tasks together"),
        ("test-rows", 0, 200, "rows of each task and test split"),
        ("images", 0, 20_000, "images for the vision tokenizer"),
        ("seed", 0, 0, "seed of everything random"),
    ):
        parser.add_argument(
            f"--{name}", type=whole(least), default=default, metavar="N", help=f"{text}; default: %(default)s"
        )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="write only these tasks")
    parser.add_argument(
        "--categories", nargs="+", metavar="CATEGORY", help='write only rows of these, such as "single"'
    )
    parser.add_argument("--judge", type=Path, metavar="DIR", help="train the judge into this folder instead")
    parser.add_argument(
        "--demo",
        type=Path,
        metavar="MODEL",
        help="write what a trained model is shown with into its folder instead: held-out requests of --tasks",
    )
    parser.add_argument(
        "--steps", type=whole(), default=8000, metavar="N", help="steps of the judge's training; default: %(default)s"
    )
    return parser


@one_line_mistakes("world")
def main(argv: Sequence[str] | None = None) -> int:
    """Write or train; returns the exit status."""
    args = make_parser().parse_args(argv)
    if not args.name.isidentifier() or importlib.util.find_spec(f"nextflow_hf.worlds.{args.name}") is None:
        raise ValueError(f"there is no world {args.name!r}, expected emoji or shapes")
    from ..worlds.dataset import TASKS, write_dataset
    from ..worlds.scene import canvases

    if unknown := sorted(set(args.tasks or ()) - set(TASKS)):
        raise ValueError(f"--tasks has {unknown}, expected some of {list(TASKS)}")
    world = importlib.import_module(f"nextflow_hf.worlds.{args.name}")
    sprites = world.load(args.output_dir, artwork=args.artwork, concepts=args.concepts)
    if args.judge is not None:
        from ..worlds.judge import train_judge

        report = train_judge(sprites, args.judge, seed=args.seed, steps=args.steps)
        for side, rates in report.items():
            print(f"{side} px: {rates['things']:.1%} of the sprites, {rates['passed']:.1%} of the true scenes whole")
        print(args.judge / "report.json")
        return 0
    if args.demo is not None:
        from ..worlds.demo import write_demo

        kinds = {"tasks": args.tasks, "categories": args.categories}
        for path in write_demo(sprites, args.demo, args.resolution, **kinds, seed=args.seed):
            print(path)
        return 0
    write_dataset(
        sprites,
        args.output_dir / (args.dataset or str(args.resolution)),
        args.sizes or canvases(args.resolution, ratios=sprites.dialect.ratios),
        seed=args.seed,
        rows=args.rows,
        test_rows=args.test_rows,
        images=args.images,
        tasks=args.tasks,
        categories=args.categories,
    )
    return 0
