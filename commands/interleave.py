"""Answers of text and images, in which the model begins the images itself; as they come, and as a folder:

    nextflow-hf interleave "a story: a red circle on a white background turns blue and then green" --output story

The folder has the images, `answer.md` to read, and `messages.json` to go on with.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_text
from . import loading, options, records
from .console import Console, run
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
    parser = new_parser("interleave", "Answer in text and images.", EXAMPLES)
    parser.add_argument("prompt", nargs="*", help="what to tell or to show, in quotes")
    options.add_conversation_options(parser)
    parser.add_argument("--max-images", type=int, metavar="N", help="that the answer may have; default: 5")
    parser.add_argument("--seed", type=int, help="default: a random one")
    parser.add_argument("--output", "-o", type=Path, metavar="DIR", help="default: named by the prompt, here")
    options.add_size_options(parser)
    options.add_sampling_options(parser)
    options.add_writing_options(parser, prefix="text-")
    options.add_model_options(parser)
    options.add_recall_options(parser)
    options.add_console_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Answer; returns the exit status."""
    args = make_parser().parse_args(argv)
    args.prompt = one_text(args.prompt, "interleave")
    return run("interleave", args, interleave)


def interleave(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    # 1. What is asked
    if args.messages is not None:
        args.messages = read_messages(args.messages)
    recalled = records.recall(args, "interleave", RECORDED)
    messages = conversation(args.prompt, args.image, args.messages)
    args.seed = options.choose_seed(args.seed)
    folder = folder_for(args.output, slug(args.prompt))

    # 2. The model
    import torch

    pipe = loading.load_pipeline(args)
    recorder = records.Recorder("interleave", args, RECORDED, loading.drawing_modules(pipe), recalled)
    settings = records.call_settings(args, SETTINGS, pipe)

    # 3. The answer, as it comes
    start = time.perf_counter()
    parts, described, drawn = [], [], {}
    generator = torch.Generator().manual_seed(args.seed)
    for part in pipe.interleave(copy.deepcopy(messages), generator=generator, stream=True, **settings):
        if part["type"] == "text":
            console.show(part["text"], end="")
            if parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += part["text"]
                described[-1]["text"] += part["text"]
                continue
            parts.append(dict(part))
            described.append(dict(part))
            continue
        number = len(drawn) + 1
        drawn[number] = part["image"]
        path = folder / f"{number}.png"
        recorder.save(part["image"], path, results={"number": number}, **settings)
        console.show(f"[{path}]")
        parts.append({"type": "image", "image": path})
        described.append(
            {"type": "image", "path": str(path), "width": part["image"].width, "height": part["image"].height}
        )
    console.show("")

    # 4. As a folder
    write_messages([*messages, {"role": "assistant", "content": parts}], folder / "messages.json")
    write_text(folder / "answer.md", _markdown(parts))
    console.say(f"written: {folder / 'answer.md'}")
    result = {
        "model": args.model,
        "device": args.device,
        "dtype": args.loaded_dtype,
        "seed": args.seed,
        "seconds": round(time.perf_counter() - start, 3),
        "output": str(folder),
        "parts": described,
    }
    if recalled is not None:
        result["identical"] = recalled.compare(drawn.get(recalled.record.results.get("number")), console)
    return result


def _markdown(parts: list[dict[str, Any]]) -> str:
    pieces = [one["text"].strip() if one["type"] == "text" else f"![]({one['image'].name})" for one in parts]
    return "\n\n".join(pieces) + "\n"


if __name__ == "__main__":
    sys.exit(main())
