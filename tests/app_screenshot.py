"""An image of the app, taken while it samples with the shipped model:

    python tests/app_screenshot.py --output hub_cards/app.png

Needs the extra `test`, and chromium. Same model, same images.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from app_browser import MISSING, Page, find_chromium, open_browser
from PIL import Image

from nextflow_hf import NextFlowPipeline
from nextflow_hf.app.interface import App
from nextflow_hf.app.server import serve
from nextflow_hf.app.studio import Studio
from nextflow_hf.commands.demo import read_demo
from nextflow_hf.hub_cards import shapes_model_path


MAX_BYTES = 300_000
PROMPTS, EDITS, CONVERSATIONS = read_demo(str(shapes_model_path())).values()
EDIT = 2  # which of the demo's edits
BEFORE = (7, 6, 5, 3, 1)  # prompts of the demo, for the history


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw in the app, and take a picture of it.")
    parser.add_argument("--model", help="default: the shipped Shapes model")
    parser.add_argument("--output", type=Path, default=Path("app.png"), help="default: %(default)s")
    parser.add_argument("--edit", action="store_true", help="edit what was drawn last")
    parser.add_argument("--tab", choices=("draw", "chat"), default="draw", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    if find_chromium() is None:
        print(MISSING, file=sys.stderr)
        return 1

    model = args.model or shapes_model_path()
    pipe = NextFlowPipeline.from_pretrained(model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        app = App(
            Studio(pipe), folder, name=f"{Path(model).name} on cpu", prompts=PROMPTS[:4], conversations=CONVERSATIONS
        )
        blocks = app.build()
        address = serve(blocks)
        with open_browser() as page:
            page.open(address)
            show_drawing(page, args.seed, edits=args.edit) if args.tab == "draw" else show_conversation(page)
            page.fit()
            page.save(args.output)
        blocks.close(verbose=False)
    # Flat colours: a palette of 256 loses nothing that one sees.
    Image.open(args.output).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(args.output, optimize=True)
    size = args.output.stat().st_size
    print(f"{args.output}: {size:,} bytes")
    if size > MAX_BYTES:
        print(f"{args.output} has {size:,} bytes, expected at most {MAX_BYTES:,}", file=sys.stderr)
        return 1
    return 0


def show_drawing(page: Page, seed: int, *, edits: bool) -> None:
    """Some pictures in the history, then one drawn and, perhaps, edited."""
    index, instruction = EDITS[EDIT]
    page.click("#random input")
    page.type("#seed input", str(seed))
    for prompt in (*(PROMPTS[one] for one in BEFORE), PROMPTS[index]):
        page.draw(prompt)
    if edits:
        page.click("#edit-button")
        page.wait(lambda: page.image("#references"))
        page.draw(instruction)
    page.wait(lambda: page.image("#result"))


def show_conversation(page: Page) -> None:
    page.tab("Chat")
    for text in CONVERSATIONS[1::-1]:
        answers = len(page.find("#chat .bot-row"))
        page.type("#chat-box textarea", f"{text}\n")
        page.wait(lambda count=answers: len(page.find("#chat .bot-row")) > count)
        page.settle()


if __name__ == "__main__":
    sys.exit(main())
