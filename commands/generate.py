"""`nextflow-hf generate`: images from words."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .console import run
from .images import add_image_options, generate_images
from .options import new_parser, one_text


EXAMPLES = """\
  nextflow-hf generate "a red circle left of a blue square" --seed 7 --output circle.png
  nextflow-hf generate "a blue ring" --num-images 4 --guidance-scale 3 --preview growing.gif
  nextflow-hf generate "twice two squares in the color of grass" --think
  nextflow-hf generate --from-image circle.png                      # the same again, pixel for pixel
  nextflow-hf generate --from-image circle.png --seed 8 --aspect-ratio 16:9
  nextflow-hf generate --messages conversation.json --json
"""


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "generate", "Make images from words. Each says in its metadata how it was made, and can be repeated.", EXAMPLES
    )
    parser.add_argument("prompt", nargs="*", help="what the image shows, in quotes")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file with a prompt on each line")
    parser.add_argument(
        "--messages",
        type=Path,
        metavar="FILE",
        help="JSON file with a conversation, such as examples; the image is its next answer; - reads standard input",
    )
    add_image_options(parser)
    parser.set_defaults(image=None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make images; returns the exit status."""
    args = (parser := make_parser()).parse_args(argv)
    args.prompt = one_text(args.prompt, parser)
    return run("generate", args, generate_images)
