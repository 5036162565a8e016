"""Images from words:

nextflow-hf generate "a red circle left of a blue square" --seed 7 --output circle.png
nextflow-hf generate --from-image circle.png                 # the same again, pixel for pixel
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .console import run
from .images import add_image_options, generate_images
from .options import new_parser, one_text


EXAMPLES = """\
  nextflow-hf generate "a red circle left of a blue square" --seed 7 --output circle.png
  nextflow-hf generate "a blue ring" --num-images 4 --guidance-scale 3 --preview growing.gif
  nextflow-hf generate "twice two squares in the color of grass" --think
  nextflow-hf generate --from-image circle.png --seed 8 --aspect-ratio 16:9
  nextflow-hf generate --messages conversation.json --json
"""


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("generate", "Draw images from words. Each says in its metadata how it was made.", EXAMPLES)
    parser.add_argument("prompt", nargs="*", help="what to draw, in quotes")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts to draw one after the other, one a line")
    parser.add_argument(
        "--messages",
        type=Path,
        metavar="FILE",
        help="a conversation as JSON (-: standard input), whose next answer is the image: shows it examples",
    )
    add_image_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; returns the exit status."""
    args = make_parser().parse_args(argv)
    args.image = None
    args.prompt = one_text(args.prompt, "generate")
    return run("generate", args, generate_images)


if __name__ == "__main__":
    sys.exit(main())
