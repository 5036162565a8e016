"""`nextflow-hf chat`: an answer about images, or a conversation line by line, with images in between."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import loading, options, records
from .console import Console, run
from .messages import conversation, existing_file, read_messages
from .options import new_parser, one_text
from .output import Output


if TYPE_CHECKING:
    from transformers import TextStreamer

    from .. import NextFlowPipeline

EXAMPLES = """\
  nextflow-hf chat "what color is the circle" --image circle.png
  nextflow-hf chat --image circle.png                  # a conversation about it
  printf 'how many circles\\nwhat color are they\\n' | nextflow-hf chat --image circle.png --json
  nextflow-hf chat "and before that?" --messages story/messages.json
"""
RECORDED = (*options.MODEL, "messages", "seed")
HELP = """\
a line of text    says it
/image FILE       shows an image with the next line
/generate TEXT    asks for an image as the answer
/quit             ends (so does the end of input)"""


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "chat", "Ask about images. Without a text: a conversation line by line, in which /help says more.", EXAMPLES
    )
    parser.add_argument("prompt", nargs="*", help="what to say, in quotes")
    options.add_options(parser, None, "image", "messages", "seed")
    parser.add_argument("--system", metavar="TEXT", help="system message at the start of the conversation")
    parser.add_argument("--output", "-o", type=Path, metavar="DIR", help="where /generate saves images; default: here")
    options.add_no_metadata(parser)
    options.add_options(parser, "text", *options.WRITING, prefix="text_")
    options.add_model_options(parser)
    options.add_console_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Chat; returns the exit status."""
    args = (parser := make_parser()).parse_args(argv)
    args.prompt = one_text(args.prompt, parser)
    return run("chat", args, chat)


def chat(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Answer one question or hold a conversation; returns what `--json` prints."""
    history = None if args.messages is None else read_messages(args.messages)
    if args.system is not None:
        if history is not None:
            raise ValueError("--system goes with a new conversation: in --messages it is the first message")
        history = [{"role": "system", "content": args.system}]
    args.image = [existing_file(path) for path in args.image or ()]
    args.seed = options.choose_seed(args.seed)
    if args.prompt is None and args.messages is None:
        turns = _converse(args, console)
    else:
        messages = conversation(args.prompt, args.image, history)
        pipe = loading.load_pipeline(args)
        answer = pipe.chat(messages, **_settings(args), streamer=_streamer(pipe, console), generator=_generator(args))
        console.show("")
        turns = [{"prompt": args.prompt, "answer": answer, "images": [str(path) for path in args.image]}]
    said = [turn["answer"] for turn in turns if "answer" in turn]
    return {**loading.loaded(args), "seed": args.seed, "answer": said[-1] if said else None, "turns": turns}


class Dialogue:
    """A conversation on one cache, line by line; `turns` is what was said, in JSON."""

    def __init__(self, args: argparse.Namespace, console: Console):
        self.args = args
        self.console = console
        self.output = Output(args.output, count=1)
        if self.output.file is not None:
            raise ValueError(f"--output is {args.output}, expected a folder")
        self.pipe = loading.load_pipeline(args)
        self.recorder = records.Recorder("chat", args, RECORDED, loading.image_modules(self.pipe))
        self.conversation = self.pipe.start_conversation(args.system)
        self.generator = _generator(args)
        self.shown = list(args.image)  # with the next line
        self.turns: list[dict[str, Any]] = []

    def take(self, line: str) -> None:
        """Do what a line says: chat, show an image, or ask for one."""
        command, _, text = line.partition(" ")
        text = text.strip()
        if command == "/image" and text:
            self.shown.append(existing_file(Path(text)))
        elif command == "/generate" and text:
            self._generate(text)
        elif command.startswith("/"):
            self.console.warn(HELP)
        else:
            streamer = _streamer(self.pipe, self.console)
            answer = self.conversation.chat(
                line, self.shown, streamer=streamer, generator=self.generator, **_settings(self.args)
            )
            self.console.show("")
            self._note({"prompt": line, "answer": answer})

    def _generate(self, text: str) -> None:
        image = self.conversation.generate_image(text, self.shown, generator=self.generator)
        path = self.output.path(text, self.args.seed)
        self.recorder.save(image, path, messages=_without_sampled(self.conversation.messages))
        self.console.show(str(path))
        self._note({"prompt": text, "path": str(path)})

    def _note(self, turn: dict[str, Any]) -> None:
        self.turns.append({**turn, "images": [str(path) for path in self.shown]})
        self.shown = []


def _converse(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """The turns of a conversation in the lines of standard input. A mistake does not end it."""
    dialogue = Dialogue(args, console)
    if sys.stdin.isatty():
        console.say("/help says what there is, /quit ends")
    for line in _lines():
        if line == "/quit":
            break
        try:
            dialogue.take(line)
        except (ValueError, OSError) as error:
            console.warn(str(error))
            console.status = 1
    return dialogue.turns


def _lines() -> Iterator[str]:
    """Lines of standard input that say something."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}


def _generator(args: argparse.Namespace) -> Any:
    import torch

    return torch.Generator().manual_seed(args.seed)


def _streamer(pipe: "NextFlowPipeline", console: Console) -> "TextStreamer":
    """Shows words as they come."""
    from transformers import TextStreamer

    class Words(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            console.show(text, end="")

    return Words(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _without_sampled(value: Any) -> Any:
    """Messages with the images that are files; those that were sampled have files of their own."""
    if isinstance(value, dict):
        if value.get("type") == "image" and not isinstance(value["image"], Path):
            return {"type": "image"}
        return {key: _without_sampled(one) for key, one in value.items()}
    return [_without_sampled(one) for one in value] if isinstance(value, list) else value
