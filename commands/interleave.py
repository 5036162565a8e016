"""`nextflow-hf interleave`: answers of text and images, in which the model begins the images itself.

The folder of an answer has the images, `answer.md` to read, and `messages.json` to go on with.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_text
from . import options, records
from .console import Console, run
from .loading import loaded
from .messages import conversation, read_messages, write_messages
from .options import new_parser, one_text
from .output import folder_for, slug


EXAMPLES = """\
  nextflow-hf interleave "a story: a red circle on a white background turns blue and then green" --output story
  nextflow-hf interleave "go on" --messages story/messages.json --max-images 2 --output more
  nextflow-hf interleave --from-image story/1.png --output again
"""
# Options that go to the pipeline as they are.
SETTINGS = ("max_images", "negative_prompt", *options.SIZE, *options.SAMPLING, *options.WRITING)
RECORDED = (*options.MODEL, "prompt", "messages", "image", "seed", *SETTINGS)


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("interleave", "Answer in text and images, as they come and as a folder with both.", EXAMPLES)
    parser.add_argument("prompt", nargs="*", help="what to answer, in quotes")
    options.add_options(parser, None, "image", "messages", "max_images", "seed")
    parser.add_argument(
        "--output",
        "-o",
        type=Path,
        metavar="DIR",
        help="folder of the answer; default: a new one, named by the prompt",
    )
    options.add_image_settings(parser)
    options.add_options(parser, "text", *options.WRITING)
    options.add_model_options(parser)
    options.add_recall_options(parser)
    options.add_console_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Answer; returns the exit status."""
    args = (parser := make_parser()).parse_args(argv)
    args.prompt = one_text(args.prompt, parser)
    return run("interleave", args, interleave)


def interleave(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Answer in text and images; returns what `--json` prints."""
    # 1. What is asked
    if args.messages is not None:
        args.messages = read_messages(args.messages)
    recalled = records.recall(args, "interleave", RECORDED)
    messages = conversation(args.prompt, args.image, args.messages)
    args.seed = options.choose_seed(args.seed)
    folder = folder_for(args.output, slug(args.prompt))
    _refuse_to_overwrite(messages, folder)

    # 2. The model
    import torch

    pipe, recorder, settings = records.begin("interleave", args, RECORDED, SETTINGS, recalled)

    # 3. The answer, as it comes; what there is of one that is interrupted is kept
    start = time.perf_counter()
    parts: list[dict[str, Any]] = []
    images = []
    generator = torch.Generator().manual_seed(args.seed)
    try:
        for part in pipe.interleave(copy.deepcopy(messages), generator=generator, stream=True, **settings):
            if part["type"] == "image":
                images.append(part["image"])
                path = folder / f"{len(images)}.png"
                recorder.save(part["image"], path, results={"number": len(images)}, **settings)
                console.show(f"[{path}]")
                parts.append({"type": "image", "image": path})
                continue
            console.show(part["text"], end="")
            if not parts or parts[-1]["type"] == "image":
                parts.append({"type": "text", "text": ""})
            parts[-1]["text"] += part["text"]
    except BaseException:
        if parts:
            _write(parts, messages, folder, console)
        raise
    _write(parts, messages, folder, console)
    seconds = round(time.perf_counter() - start, 3)
    result = {**loaded(args), "seed": args.seed, "seconds": seconds, "output": str(folder)}
    result["parts"] = _described(parts, images)
    if recalled is not None:
        again = dict(enumerate(images, start=1)).get(recalled.record.results.get("number"))
        result["identical"] = recalled.compare(again, console)
    return result


def _write(parts: list[dict[str, Any]], messages: list[dict[str, Any]], folder: Path, console: Console) -> None:
    """Write the answer for readers, and the conversation with it for the next command."""
    console.show("")
    write_messages([*messages, {"role": "assistant", "content": parts}], folder / "messages.json")
    pieces = [one["text"].strip() if one["type"] == "text" else f"![]({one['image'].name})" for one in parts]
    write_text(folder / "answer.md", "\n\n".join(pieces) + "\n")
    console.say(f"written: {folder / 'answer.md'}")


def _refuse_to_overwrite(messages: list[dict[str, Any]], folder: Path) -> None:
    """An answer's images have numbers as names, and so have those of the answer that a conversation goes on from."""
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] != "image" or part["image"].parent != folder.resolve():
                continue
            if part["image"].suffix == ".png" and part["image"].stem.isdigit():
                raise ValueError(
                    f"--output is {folder}, where {part['image'].name} is an image of the conversation, which the "
                    "answer may overwrite: name another folder"
                )


def _described(parts: list[dict[str, Any]], images: list) -> list[dict[str, Any]]:
    """The parts of an answer in JSON."""
    sizes = iter(images)
    return [
        {"type": "image", "path": str(part["image"]), "width": (image := next(sizes)).width, "height": image.height}
        if part["type"] == "image"
        else part
        for part in parts
    ]
