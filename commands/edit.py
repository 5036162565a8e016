"""Images changed as told, drawn after one or several others, varied, or drawn again in part:

nextflow-hf edit "make the circle yellow" --image circle.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import Console, run
from .images import add_image_options, generate_images
from .options import new_parser, one_text, per_scale


EXAMPLES = """\
  nextflow-hf edit "make the circle yellow" --image circle.png --output yellow.png
  nextflow-hf edit "put both on one background" --image one.png --image two.png --aspect-ratio 1:1
  nextflow-hf edit "a red circle" --image circle.png --keep-scales 3 --num-images 4   # variations of one layout
  nextflow-hf edit "a green square" --image circle.png --mask-image left_half.png     # the white part anew
  nextflow-hf edit --from-image yellow.png                                            # the same edit again
"""


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("edit", "Change images as told. The result keeps the first one's shape.", EXAMPLES)
    parser.add_argument("prompt", nargs="*", help="how to change them, in quotes")
    parser.add_argument(
        "--image", type=Path, action="append", metavar="FILE", help="to change or refer to; repeat for several"
    )
    parser.add_argument(
        "--image-guidance-scale", type=per_scale(float), metavar="X", help="the more, the closer to the images"
    )
    parser.add_argument(
        "--keep-scales", type=int, metavar="N", help="keep the first N scales of the first image, draw the others anew"
    )
    parser.add_argument("--mask-image", type=Path, metavar="FILE", help="draw the first image anew where it is white")
    parser.add_argument("--mask-coverage", type=float, metavar="X", help="share of a coarse cell that is to be white")
    add_image_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Edit; returns the exit status."""
    args = make_parser().parse_args(argv)
    args.messages = None
    args.prompt = one_text(args.prompt, "edit")
    return run("edit", args, edit)


def edit(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    if not args.image and args.from_image is None:
        raise ValueError("got no image: name what to change with --image (or draw with `nextflow-hf generate`)")
    return generate_images(args, console)


if __name__ == "__main__":
    sys.exit(main())
