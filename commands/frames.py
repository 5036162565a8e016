"""`nextflow-hf frames`: a short sequence of images from a storyline, as one file."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_file
from . import options, records
from .console import Console, run
from .loading import loaded
from .options import new_parser
from .output import check_video, slug, unused


EXAMPLES = """\
  nextflow-hf frames "a story: a red circle on a white background moves from left to right" --num-frames 3 \\
      --output story.gif
  nextflow-hf frames "a red circle" "make the circle blue" "add a green square" --output sheet.png
  nextflow-hf frames --from-image sheet.png --seed 5 --output other.mp4
"""
SETTINGS = ("num_frames", "negative_prompt", *options.SIZE, *options.SAMPLING, *options.WRITING)
RECORDED = (*options.MODEL, "storyline", "seed", "columns", *SETTINGS)
SUFFIXES = (".gif", ".mp4", ".png")


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("frames", "Make a sequence of images from a storyline, as one file.", EXAMPLES)
    parser.add_argument(
        "storyline",
        nargs="*",
        help="one text that tells the story, with --num-frames; or one text for each frame, each in quotes",
    )
    options.add_options(parser, None, "num_frames", "seed")
    parser.add_argument(
        "--output",
        "-o",
        type=Path,
        metavar="FILE",
        help="a .gif, a .mp4, or a .png with all frames beside each other; default: a .gif here",
    )
    parser.add_argument("--frames-dir", type=Path, metavar="DIR", help="also save each frame as a .png")
    parser.add_argument(
        "--fps", type=options.whole(), default=2, metavar="N", help="frames per second; default: %(default)s"
    )
    options.add_options(parser, None, "columns")
    options.add_image_settings(parser)
    options.add_options(parser, "text", *options.WRITING)
    options.add_model_options(parser)
    options.add_recall_options(parser)
    options.add_console_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make the frames; returns the exit status."""
    return run("frames", make_parser().parse_args(argv), frames)


def frames(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Sample a sequence of images; returns what `--json` prints."""
    # 1. What to sample
    args.storyline = args.storyline or None
    recalled = records.recall(args, "frames", RECORDED)
    if not args.storyline:
        raise ValueError("got no storyline: tell one with --num-frames, or say what each frame shows")
    if len(args.storyline) == 1 and args.num_frames is None:
        raise ValueError(
            "a storyline in one text needs --num-frames; for a text for each frame give several, each in quotes"
        )
    if args.columns == 0:
        raise ValueError("--columns is 0, expected at least 1")
    args.seed = options.choose_seed(args.seed)
    output = args.output or unused(Path(f"{slug(args.storyline[0])}-{args.seed}.gif"))
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--output is {output}, expected one of {', '.join(SUFFIXES)}")
    check_video(output)

    # 2. The model
    import torch

    pipe, recorder, settings = records.begin("frames", args, RECORDED, SETTINGS, recalled)

    # 3. The frames
    start = time.perf_counter()
    storyline = args.storyline[0] if len(args.storyline) == 1 else args.storyline
    story = pipe.frames(storyline, generator=torch.Generator().manual_seed(args.seed), **settings)
    seconds = round(time.perf_counter() - start, 3)

    # 4. On disk; in records the sheet has no number
    sheet = story.contact_sheet(**({} if args.columns is None else {"columns": args.columns}))
    if output.suffix.lower() == ".png":
        recorder.save(sheet, output, results={"number": None}, **settings)
    else:
        write_file(output, lambda temporary: story.save(temporary, fps=args.fps))
    images = dict(enumerate(story.frames, start=1))
    paths = {number: args.frames_dir / f"{number}.png" for number in images} if args.frames_dir else {}
    for number, path in paths.items():
        recorder.save(images[number], path, results={"number": number}, **settings)
    console.show(str(output))
    for number, text in enumerate(story.texts, start=1):
        console.show(f"  {text}" + (f"  {paths[number]}" if number in paths else ""))
    saved = {"output": str(output), "texts": story.texts, "frames": list(map(str, paths.values()))}
    result = {**loaded(args), "seed": args.seed, "seconds": seconds, **saved}
    if recalled is not None:
        again = {None: sheet, **images}.get(recalled.record.results.get("number"))
        result["identical"] = recalled.compare(again, console)
    return result
