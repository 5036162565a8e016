"""Images from words, then the same images edited, by the shipped Shapes model:

    nextflow-hf demo --output-dir demo_output

Same seed, same images. Writes single PNGs and `contact_sheet.png`; under a minute on one CPU core.
"""

import argparse
import re
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from ..atomic import write_file
from ..commands.console import one_line_mistakes
from ..commands.loading import find_model, silence_loading
from ..commands.options import new_parser


PROMPTS = (
    "a red circle",
    "a green triangle on a black background",
    "a blue ring and an orange diamond",
    "a purple triangle above a green circle",
    "a cyan diamond left of a red square",
    "three yellow squares on a black background",
    "two purple circles in front of a pink background",
    "an orange circle in the top left corner",
)
# (index of the prompt whose image is edited, instruction)
EDITS = (
    (2, "make the ring red"),
    (1, "change the background to white"),
    (4, "remove the red square"),
    (7, "add a blue square in the bottom right corner"),
)
TILE = 192  # pixels of an image on the contact sheet
MARGIN = 12
TEXT_HEIGHT = 40
LINE_LENGTH = 27  # letters under an image


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "demo", "Make and edit images with the installed Shapes model, in under a minute on one CPU core."
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("demo_output"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--model", help="folder or Hub id of another pipeline that knows the same shapes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="default: %(default)s")
    return parser


@one_line_mistakes("demo")
def main(argv: Sequence[str] | None = None) -> int:
    """The demo; returns the exit status."""
    args = make_parser().parse_args(argv)
    model = find_model(args.model)

    import torch
    from PIL import Image

    from .. import NextFlowPipeline

    silence_loading()
    start = time.perf_counter()
    # float32: half precision is slow on most CPUs
    pipe = NextFlowPipeline.from_pretrained(model, dtype=torch.float32).to(args.device)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    def generators(count: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(args.seed * 1000 + index) for index in range(count)]

    pipe.set_progress_bar_config(desc=f"{len(PROMPTS)} images, scale")
    generated = pipe(list(PROMPTS), generator=generators(len(PROMPTS))).images
    pipe.set_progress_bar_config(desc=f"{len(EDITS)} edits, scale")
    sources = [generated[index] for index, _ in EDITS]
    edited = pipe([text for _, text in EDITS], image=sources, generator=generators(len(EDITS))).images

    tiles = [([image], text) for image, text in zip(generated, PROMPTS, strict=True)]
    tiles += [([before, after], text) for before, after, (_, text) in zip(sources, edited, EDITS, strict=True)]
    files = []
    for number, (images, text) in enumerate(tiles, start=1):
        name = re.sub(r"\W+", "-", text)
        file = args.output_dir / f"{number:02d}-{name}.png"
        large = images[-1].resize((4 * images[-1].width, 4 * images[-1].height), Image.Resampling.BICUBIC)
        write_file(file, large.save)
        files.append(file)
    sheet = args.output_dir / "contact_sheet.png"
    write_file(sheet, contact_sheet(tiles).save)
    print(
        f"{len(generated)} images and {len(edited)} edits in {time.perf_counter() - start:.1f} s: "
        f"{sheet.resolve()} (and {len(files)} single files beside it)"
    )
    return 0


def contact_sheet(tiles: list[tuple[list, str]], columns: int = 4):
    """
    All tiles on one `PIL.Image.Image`, left to right, each one image, or an image and its edit with an arrow
    between them, over its text.
    """
    from PIL import Image, ImageDraw

    cell = TILE + MARGIN
    places, x, y = [], 0, 0
    for images, _ in tiles:
        if x + len(images) > columns:
            x, y = 0, y + 1
        places.append((x, y))
        x += len(images)
    sheet = Image.new("RGB", (columns * cell + MARGIN, (y + 1) * (cell + TEXT_HEIGHT) + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for (images, text), (x, y) in zip(tiles, places, strict=True):
        left, top = MARGIN + x * cell, MARGIN + y * (cell + TEXT_HEIGHT)
        for index, image in enumerate(images):
            fitted = image.resize((TILE, TILE), Image.Resampling.BICUBIC)
            sheet.paste(fitted, (left + index * cell, top))
            pen.rectangle((left + index * cell, top, left + index * cell + TILE - 1, top + TILE - 1), outline="gray")
        if len(images) > 1:
            middle, tip = top + TILE // 2, left + cell
            pen.polygon([(tip - MARGIN + 1, middle - 7), (tip - MARGIN + 1, middle + 7), (tip, middle)], fill="black")
        lines = textwrap.wrap(text, LINE_LENGTH * len(images))
        pen.multiline_text((left, top + TILE + 4), "\n".join(lines), fill="black", font_size=14)
    return sheet
