"""`nextflow-hf edit`: images changed as told, made after others, varied, or inpainted."""

import argparse
from collections.abc import Sequence
from typing import Any

from .console import Console, run
from .images import add_image_options, generate_images
from .options import add_options, new_parser, one_text


EXAMPLES = """\
  nextflow-hf edit "make the circle yellow" --image circle.png --output yellow.png
  nextflow-hf edit "put both on one background" --image one.png --image two.png --aspect-ratio 1:1
  nextflow-hf edit "a red circle" --image circle.png --keep-scales 3 --num-images 4   # variations of one layout
  nextflow-hf edit "a green square" --image circle.png --mask-image left_half.png     # the white part anew
  nextflow-hf edit --from-image yellow.png                                            # the same edit again
"""


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("edit", "Change images as told. The result has the shape of the first image.", EXAMPLES)
    parser.add_argument("prompt", nargs="*", help="how to change the images, in quotes")
    add_options(parser, None, "image")
    add_options(parser, "editing", "image_guidance_scale", "keep_scales", "mask_image", "mask_coverage")
    add_image_options(parser)
    parser.set_defaults(messages=None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Edit; returns the exit status."""
    args = (parser := make_parser()).parse_args(argv)
    args.prompt = one_text(args.prompt, parser)
    return run("edit", args, edit)


def edit(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Change the images; returns what `--json` prints."""
    if not args.image and args.from_image is None:
        raise ValueError("got no image: name what to change with --image, or use `nextflow-hf generate`")
    return generate_images(args, console)
