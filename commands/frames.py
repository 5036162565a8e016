"""A short sequence of images from a storyline, as one file:

nextflow-hf frames "a story: a red circle on a white background moves from left to right" --num-frames 3
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_file
from . import loading, options, records
from .console import Console, run
from .options import new_parser
from .output import slug


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
    parser = new_parser("frames", "Draw a storyline as a sequence of images.", EXAMPLES)
    parser.add_argument(
        "storyline",
        nargs="*",
        help="one text that tells it, with --num-frames; or a text for each frame, each in quotes",
    )
    parser.add_argument("--num-frames", type=int, metavar="N", help="of a storyline in one text")
    parser.add_argument("--seed", type=int, help="default: a random one")
    parser.add_argument(
        "--output", "-o", type=Path, metavar="FILE", help=".gif, .mp4, or .png: a contact sheet; default: a .gif, here"
    )
    parser.add_argument("--frames-dir", type=Path, metavar="DIR", help="also each frame as a .png")
    parser.add_argument("--fps", type=int, default=2, metavar="N", help="frames a second; default: %(default)s")
    parser.add_argument("--columns", type=int, metavar="N", help="of a contact sheet; default: 4")
    options.add_size_options(parser)
    options.add_sampling_options(parser)
    options.add_writing_options(parser, prefix="text-")
    options.add_model_options(parser)
    options.add_recall_options(parser)
    options.add_console_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the frames; returns the exit status."""
    return run("frames", make_parser().parse_args(argv), frames)


def frames(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    # 1. What to draw
    args.storyline = args.storyline or None
    recalled = records.recall(args, "frames", RECORDED)
    if not args.storyline:
        raise ValueError("got no storyline: tell one with --num-frames, or what is to be seen in each frame")
    if len(args.storyline) == 1 and args.num_frames is None:
        raise ValueError(
            "a storyline in one text needs --num-frames; for a text for each frame give several, each in quotes"
        )
    for name in ("fps", "columns"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected at least 1")
    args.seed = options.choose_seed(args.seed)
    output = args.output or Path(f"{slug(args.storyline[0])}-{args.seed}.gif")
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--output is {output}, expected one of {', '.join(SUFFIXES)}")

    # 2. The model
    import torch

    pipe = loading.load_pipeline(args)
    recorder = records.Recorder("frames", args, RECORDED, loading.drawing_modules(pipe), recalled)
    settings = records.call_settings(args, SETTINGS, pipe)

    # 3. The frames
    start = time.perf_counter()
    storyline = args.storyline[0] if len(args.storyline) == 1 else args.storyline
    drawn = pipe.frames(storyline, generator=torch.Generator().manual_seed(args.seed), **settings)
    seconds = time.perf_counter() - start

    # 4. On disk
    columns = {} if args.columns is None else {"columns": args.columns}
    if output.suffix.lower() == ".png":
        recorder.save(drawn.contact_sheet(**columns), output, results={"number": None}, **settings)
    else:
        write_file(output, lambda temporary: drawn.save(temporary, fps=args.fps))
    paths = []
    for number, image in enumerate(drawn.frames if args.frames_dir is not None else (), start=1):
        paths.append(args.frames_dir / f"{number}.png")
        recorder.save(image, paths[-1], results={"number": number}, **settings)
    console.show(str(output))
    for text, path in zip(drawn.texts, paths or [None] * len(drawn.texts), strict=True):
        console.show(f"  {text}" + ("" if path is None else f"  {path}"))
    result = {
        "model": args.model,
        "device": args.device,
        "dtype": args.loaded_dtype,
        "seed": args.seed,
        "seconds": round(seconds, 3),
        "output": str(output),
        "texts": drawn.texts,
        "frames": list(map(str, paths)),
    }
    if recalled is not None:
        images = {None: drawn.contact_sheet(**columns), **dict(enumerate(drawn.frames, start=1))}
        result["identical"] = recalled.compare(images.get(recalled.record.results.get("number")), console)
    return result


if __name__ == "__main__":
    sys.exit(main())
