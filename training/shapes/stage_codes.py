"""Shapes as codes for the stages of table 2: every task at every level, for the recipes `shapes/*`.

    python -m nextflow_hf.training.shapes.stage_codes --shapes runs/shapes --output-dir runs/shapes_stages

`--shapes` is the folder of `train_shapes`, whose text tokenizer and vision tokenizer it takes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...atomic import replaced_folder
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..data.extraction import extract_codes
from .captions import describe
from .dataset import edit_messages, prompt_messages, shapes_sample
from .edits import sample_edit
from .scene import Scene, render


TASKS = ("text_to_image", "image_to_text", "edit", "interleaved", "text")
LEVELS = (24, 64)  # 24 in the place of 256, 64 in that of 512 and 1024: all that three scales leave


def stage_row(task: str, seed: int, index: int, size: int) -> dict:
    """Row `index` of a task: "messages" and "images"."""
    if task == "text_to_image":
        return shapes_sample(seed, index, tasks={"text_to_image": 1.0}, sizes=((size, size),))
    rng = np.random.default_rng((seed, 2, index))
    edit = sample_edit(rng)
    source, target = describe(edit.source, rng), describe(edit.target, rng)
    if task == "image_to_text":
        question = {"role": "user", "content": [{"type": "image"}, _text("What is in the picture?")]}
        return {"messages": [question, _answer(_text(source))], "images": [_picture(edit.source, size)]}
    pictures = [_picture(edit.source, size), _picture(edit.target, size)]
    if task == "edit":
        return {"messages": edit_messages(edit.instruction), "images": pictures}
    if task == "interleaved":  # two frames and what happens between them
        question = prompt_messages(source)[0]
        answer = _answer({"type": "image"}, _text(edit.instruction), {"type": "image"})
        return {"messages": [question, answer], "images": pictures}
    if task == "text":
        question = {"role": "user", "content": [_text(f"{source}. {edit.instruction}")]}
        return {"messages": [question, _answer(_text(target))], "images": []}
    raise ValueError(f"task is {task!r}, expected one of {TASKS}")


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _answer(*parts: dict) -> dict:
    return {"role": "assistant", "content": list(parts)}


def _picture(scene: Scene, size: int) -> Image.Image:
    return Image.fromarray(render(scene, size, size))


def main(argv: Sequence[str] | None = None) -> None:
    from ..train_shapes import make_processor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=Path, required=True, help="Folder of `train_shapes`, trained so far.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=512, help="Rows of a task at a level.")
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args(argv)
    processor = make_processor(args.shapes)
    with replaced_folder(args.output_dir / "processor") as staging:
        processor.save_pretrained(staging)
    vision_tokenizer = NextFlowVisionTokenizer.from_pretrained(args.shapes / "vision_tokenizer").eval()
    for level in LEVELS:
        processor.image_processor.resolution = level
        for task in TASKS:
            extract_codes(
                lambda index, task=task, level=level: stage_row(task, args.seed, index, level),
                args.rows,
                args.output_dir / f"codes_{level}" / task,
                processor=processor,
                vision_tokenizer=vision_tokenizer,
                self_correction=False,  # as in the recipe of the Shapes transformer
            )


if __name__ == "__main__":
    main()
