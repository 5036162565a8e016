"""GenEval for Shapes, and more: held-out conversations of all kinds, counted by the judge in code (no neural judge).

    python -m nextflow_hf.training.evaluation.shapes --model DIR --num-prompts 200 --num-edits 120 --out DIR

`evaluate_shapes` knows no model: it takes functions from conversations to answers.
"""

import argparse
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...atomic import write_json, write_text
from ...processing.messages_nextflow import join_reasoning
from ..shapes.storylines import MAX_PICTURES
from .shapes_report import ShapesReport, ShapesResult
from .shapes_trials import KINDS, Conversation, Part, pictures_of, text_of


logger = logging.getLogger(__name__)

DEFAULT_COUNTS = {
    "prompt": 200,
    "edit": 120,
    "caption": 100,
    "question": 140,
    "thinking": 100,
    "direct": 100,
    "storyline": 60,
    "example": 120,
}
MAX_ANSWER_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class ShapesFunctions:
    """How a model is asked: each function takes a batch of conversations.

    Args:
        draw (`Callable`, *optional*): Conversations to the next picture of each.
        chat (`Callable`, *optional*): Conversations to the text of the next answer.
        think (`Callable`, *optional*): Conversations, whose system message asks to think first, to answers of thoughts
            and a picture.
        interleave (`Callable`, *optional*): Conversations to answers of text and pictures, the parts of a message.
    """

    draw: Callable[[list[Conversation]], list[Image.Image]] | None = None
    chat: Callable[[list[Conversation]], list[str]] | None = None
    think: Callable[[list[Conversation]], list[list[Part]]] | None = None
    interleave: Callable[[list[Conversation]], list[list[Part]]] | None = None

    def answer(self, ability: str, conversations: list[Conversation]) -> list[list[Part]]:
        """The parts of every answer."""
        answers = getattr(self, ability)(conversations)
        if len(answers) != len(conversations):
            raise ValueError(
                f"expected one answer per conversation, got {len(answers)} answers of {ability!r} for "
                f"{len(conversations)} conversations"
            )
        if ability == "draw":
            return [[{"type": "image", "image": image}] for image in answers]
        if ability == "chat":
            return [[{"type": "text", "text": text}] for text in answers]
        return answers


def evaluate_shapes(
    functions: ShapesFunctions,
    counts: Mapping[str, int] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 16,
    split: str = "test",
    size: tuple[int, int] = (64, 64),
) -> ShapesReport:
    """Judges a model on conversations that no training row contains.

    Args:
        functions ([`ShapesFunctions`]): The model. A function that is None leaves out the kinds that need it.
        counts (`Mapping[str, int]`, *optional*, defaults to `DEFAULT_COUNTS`):
            Trials of each of `KINDS`, spread evenly over its categories; none of a kind that is not named.
        seed (`int`, *optional*, defaults to 0): Fixes the trials, not the model's own randomness.
        batch_size (`int`, *optional*, defaults to 16): Largest list that a function is given.
        split (`str`, *optional*, defaults to `"test"`): "train" measures what was seen in training instead.
        size (`tuple[int, int]`, *optional*): (height, width) of the pictures that are given.

    Returns:
        `ShapesReport`
    """
    counts = DEFAULT_COUNTS if counts is None else counts
    if unknown := sorted(set(counts) - set(KINDS)):
        raise ValueError(f"unknown kinds {unknown} in counts, expected some of {tuple(KINDS)}")
    results: list[ShapesResult] = []
    for name, kind in KINDS.items():
        if getattr(functions, kind.ability) is None:
            continue
        count = counts.get(name, 0)
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            trials = [kind.trial(seed, index, split=split, size=size) for index in indices]
            answers = functions.answer(kind.ability, [trial.messages for trial in trials])
            for index, trial, parts in zip(indices, trials, answers, strict=True):
                passed, checks = trial.judge(parts)
                category, pictures = kind.categories[index % len(kind.categories)], tuple(pictures_of(parts))
                results.append(
                    ShapesResult(name, category, trial.text, passed, checks, text_of(parts), trial.sources, pictures)
                )
            logger.info("%s: %d of %d", kind.plural, indices.stop, count)
    return ShapesReport(tuple(results), seed)


def pipeline_functions(pipe: Any, seed: int, **options: Any) -> ShapesFunctions:
    """The functions of a [`NextFlowPipeline`], which draws with `options`."""
    import torch

    answered = 0

    def generators(count: int) -> list[torch.Generator]:
        """One per answer: the size of a batch does not change the result."""
        nonlocal answered
        answered += count
        first = seed * 1_000_003 + answered - count
        return [torch.Generator().manual_seed(first + index) for index in range(count)]

    def draw(conversations: list[Conversation]) -> list[Image.Image]:
        return pipe(messages=conversations, generator=generators(len(conversations)), **options).images

    def chat(conversations: list[Conversation]) -> list[str]:
        return pipe.chat(conversations, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)

    def think(conversations: list[Conversation]) -> list[list[Part]]:
        output = pipe(messages=conversations, think=True, generator=generators(len(conversations)), **options)
        thinking = zip(output.thoughts, output.final_prompts, output.images, strict=True)
        return [
            [{"type": "text", "text": join_reasoning(thought, prompt)}, {"type": "image", "image": image}]
            for thought, prompt, image in thinking
        ]

    def interleave(conversations: list[Conversation]) -> list[list[Part]]:
        generator = generators(len(conversations))
        return pipe.interleave(conversations, max_images=MAX_PICTURES, generator=generator, **options)

    return ShapesFunctions(draw=draw, chat=chat, think=think, interleave=interleave)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Judge a Shapes model on held-out conversations of all kinds.")
    parser.add_argument("--model", required=True, help="folder or Hub id of a NextFlowPipeline")
    parser.add_argument("--transformer", help="a transformer for it in place of its own: a checkpoint of a training")
    for name, kind in KINDS.items():
        help = f"trials of {kind.title.lower()}, default {DEFAULT_COUNTS[name]}"
        parser.add_argument(f"--num-{kind.plural}", dest=name, type=int, default=DEFAULT_COUNTS[name], help=help)
    parser.add_argument("--split", default="test", choices=("train", "test"))
    parser.add_argument("--seed", type=int, default=0, help="of the trials and of the model's sampling")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures that are given, in pixels")
    parser.add_argument("--guidance-scale", type=float, help="the pipeline's own default when left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for report.md and a contact sheet of every kind")
    parser.add_argument("--json", type=Path, help="file for the report as JSON")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from ...modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
    from ...pipelines import NextFlowPipeline

    pipe = NextFlowPipeline.from_pretrained(args.model)
    if args.transformer is not None:
        transformer = NextFlowForCausalLM.from_pretrained(args.transformer, dtype=pipe.transformer.dtype)
        transformer.generation_config = pipe.transformer.generation_config  # export sets how it samples
        pipe.register_modules(transformer=transformer)
    pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    options = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    report = evaluate_shapes(
        pipeline_functions(pipe, args.seed, **options),
        {name: getattr(args, name) for name in KINDS},
        seed=args.seed,
        batch_size=args.batch_size,
        split=args.split,
        size=(args.size, args.size),
    )
    markdown = report.to_markdown()
    logger.info("\n%s", markdown)
    if args.out is not None:
        write_text(args.out / "report.md", markdown)
        report.save_contact_sheets(args.out)
    if args.json is not None:
        write_json(args.json, report.to_dict())


if __name__ == "__main__":
    main()
