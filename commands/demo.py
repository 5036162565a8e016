"""Images from words, the same images edited, and stories, by each model that ships with the package:

    nextflow-hf demo --output-dir demo_output

What a model is shown with stands in `demo.json` in its folder: `prompts`; `edits`, pairs of the number of a prompt,
whose image is edited, and an instruction; `stories`, answered by several images; and `conversations`, which the app
offers. A kind that is not there is one that the model was not trained for. All that is generated is shown.

Same seed, same images. Writes single PNGs and `contact_sheet.png` into a folder for each model; under a minute on one
CPU core.
"""

import argparse
import json
import re
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import write_file
from ..hub_cards import installed_models
from .console import one_line_mistakes
from .loading import choose_device, find_model, silence_loading
from .options import SHIPPED_MODEL, new_parser, whole


if TYPE_CHECKING:
    from PIL import Image

    from .. import NextFlowPipeline

DEMO_FILE = "demo.json"
TILE = 192  # pixels of an image on the contact sheet
MARGIN = 12
LINE_HEIGHT, LEAST_LINES = 17, 2  # of the text under an image
LINE_LENGTH = 27  # letters under an image
NAME_LENGTH = 80  # letters of the name of a file

Tile = tuple[list["Image.Image"], str]  # images and the text under them


def read_demo(model: str) -> dict[str, list]:
    """
    What a model is shown with, see above; nothing where it does not say.

    Args:
        model (`str`): Folder or Hub id of a pipeline.
    """
    from ..conversion.assemble import find_file

    file = find_file(model, DEMO_FILE)
    demo = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    if not isinstance(demo, dict) or not all(isinstance(value, list) for value in demo.values()):
        raise ValueError(f"{file} is no object of lists, which `{__name__}` describes")
    numbers = range(len(demo.get("prompts", [])))
    if wrong := [edit for edit in demo.get("edits", []) if len(edit) != 2 or edit[0] not in numbers]:
        raise ValueError(
            f"{file} has the edit {wrong[0]}, expected the number of one of {len(numbers)} prompts and a text"
        )
    return demo


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("demo", "Make and edit images with the installed models, in under a minute on one CPU core.")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("demo_output"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--model", help=f"name of an installed model, or folder or Hub id of another pipeline with a {DEMO_FILE}"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="default: %(default)s")
    return parser


@one_line_mistakes("demo")
def main(argv: Sequence[str] | None = None) -> int:
    """The demo; returns the exit status."""
    args = make_parser().parse_args(argv)
    device = choose_device(args.device)
    for name in [args.model] if args.model else installed_models() or [SHIPPED_MODEL]:
        model = find_model(name)
        demo = read_demo(model)
        if not demo:
            raise ValueError(
                f"{name} has no {DEMO_FILE}, which says what a model is shown with: `{__name__}` describes it"
            )
        show(model, demo, args.output_dir / Path(name).name, seed=args.seed, device=device)
    return 0


def show(model: str, demo: dict[str, list], folder: Path, *, seed: int, device: str) -> None:
    """Generate all of a demo, and write it into `folder`."""
    import torch
    from PIL import Image

    from .. import NextFlowPipeline

    silence_loading()
    start = time.perf_counter()
    # float32: half precision is slow on most CPUs
    pipe = NextFlowPipeline.from_pretrained(model, dtype=torch.float32).to(device)
    folder.mkdir(parents=True, exist_ok=True)
    tiles = generate(pipe, demo, seed)
    for number, (images, text) in enumerate(tiles, start=1):
        name = re.sub(r"\W+", "-", text)[:NAME_LENGTH].strip("-")
        for image in images[-1:]:
            large = image.resize((4 * image.width, 4 * image.height), Image.Resampling.BICUBIC)
            write_file(folder / f"{number:02d}-{name}.png", large.save)
    sheet = folder / "contact_sheet.png"
    write_file(sheet, contact_sheet(tiles).save)
    counts = ", ".join(f"{len(demo[kind])} {kind}" for kind in ("prompts", "edits", "stories") if demo.get(kind))
    print(f"{Path(model).name}: {counts} in {time.perf_counter() - start:.1f} s: {sheet.resolve()}")


def generate(pipe: "NextFlowPipeline", demo: dict[str, list], seed: int) -> list[Tile]:
    """The images of all prompts, edits (with the image that each changes) and stories of a demo."""
    import torch

    def generators(count: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed * 1000 + index) for index in range(count)]

    def call(texts: list[str], what: str, **options: Any) -> list["Image.Image"]:
        pipe.set_progress_bar_config(desc=f"{len(texts)} {what}, scale")
        return pipe(texts, generator=generators(len(texts)), **options).images if texts else []

    prompts, edits, stories = (demo.get(kind, []) for kind in ("prompts", "edits", "stories"))
    generated = call(prompts, "images")
    tiles = [([image], text) for image, text in zip(generated, prompts, strict=True)]
    sources = [generated[index] for index, _ in edits]
    edited = call([text for _, text in edits], "edits", image=sources)
    tiles += [([before, after], text) for before, after, (_, text) in zip(sources, edited, edits, strict=True)]
    pipe.set_progress_bar_config(desc="story, scale")
    for generator, text in zip(generators(len(stories)), stories, strict=True):
        answer = pipe.interleave([{"role": "user", "content": text}], generator=generator)
        tiles.append(([part["image"] for part in answer if part["type"] == "image"], text))
    return tiles


def contact_sheet(tiles: list[Tile], columns: int = 4) -> "Image.Image":
    """
    All tiles, left to right, each one image, or an image and its edit with an arrow between them, or those of a story,
    over its text.
    """
    from PIL import Image, ImageDraw, ImageOps

    cell = TILE + MARGIN
    widths = [max(1, len(images)) for images, _ in tiles]
    texts = [textwrap.wrap(text, LINE_LENGTH * width) for width, (_, text) in zip(widths, tiles, strict=True)]
    places, x, y = [], 0, 0
    for width in widths:
        if x + width > columns:
            x, y = 0, y + 1
        places.append((x, y))
        x += width
    heights = [0] * (y + 1)  # of each row
    for lines, (_, y) in zip(texts, places, strict=True):
        heights[y] = max(heights[y], cell + LINE_HEIGHT * max(LEAST_LINES, len(lines)) + 6)
    sheet = Image.new("RGB", (columns * cell + MARGIN, sum(heights) + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for (images, _), lines, (x, y) in zip(tiles, texts, places, strict=True):
        left, top = MARGIN + x * cell, MARGIN + sum(heights[:y])
        for index, image in enumerate(images):
            fitted = ImageOps.pad(image, (TILE, TILE), Image.Resampling.BICUBIC, color="white")
            sheet.paste(fitted, (left + index * cell, top))
            pen.rectangle((left + index * cell, top, left + index * cell + TILE - 1, top + TILE - 1), outline="gray")
        middle = top + TILE // 2
        for tip in (left + index * cell for index in range(1, len(images))):
            pen.polygon([(tip - MARGIN + 1, middle - 7), (tip - MARGIN + 1, middle + 7), (tip, middle)], fill="black")
        pen.multiline_text((left, top + TILE + 4), "\n".join(lines), fill="black", font_size=14)
    return sheet
