"""GenEval for Shapes: held-out prompts and held-out edits, counted by the judge in code (no neural judge).

    python -m nextflow_hf.training.evaluation.shapes --model DIR --num-prompts 200 --num-edits 120 --out DIR

`evaluate_shapes` knows no model: it takes two functions from texts (and pictures) to pictures.
"""

import argparse
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from nextflow_hf.training.shapes import CATEGORIES, EDIT_TASKS, render, sample_edit, sample_prompt
from nextflow_hf.training.shapes.judge import judge_edit, judge_prompt


logger = logging.getLogger(__name__)

PASS_COLOR, FAIL_COLOR = (40, 170, 70), (215, 40, 40)


@dataclass(frozen=True)
class ShapesResult:
    """One judged picture. `kind` is "prompt" or "edit", `category` the prompt's category or the edit's task."""

    kind: str
    category: str
    text: str
    passed: bool
    checks: dict[str, bool]
    image: Image.Image = field(repr=False)
    source: Image.Image | None = field(default=None, repr=False)


def wilson_interval(passed: int, total: int) -> tuple[float, float]:
    """95% interval of a rate (Wilson score); (0, 1) without samples."""
    if total == 0:
        return 0.0, 1.0
    z, rate = 1.96, passed / total
    center = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True)
class ShapesReport:
    """All results of one evaluation, and their summaries."""

    results: tuple[ShapesResult, ...]
    seed: int

    def select(self, kind: str, category: str | None = None) -> list[ShapesResult]:
        """The results of a kind, and of a category if given."""
        return [item for item in self.results if item.kind == kind and category in (None, item.category)]

    def to_dict(self) -> dict:
        """Rates by kind and category, as plain data. "overall" is the mean of the categories, as in GenEval."""
        summary: dict = {"seed": self.seed}
        for kind, categories in (("prompt", CATEGORIES), ("edit", EDIT_TASKS)):
            rows = {name: _summarize(self.select(kind, name)) for name in categories if self.select(kind, name)}
            if rows:
                overall = sum(row["passed"] / row["total"] for row in rows.values()) / len(rows)
                summary[kind] = {"overall": overall, "all": _summarize(self.select(kind)), "categories": rows}
        return summary

    def to_markdown(self) -> str:
        """Two tables: prompts by category, edits by task."""
        lines: list[str] = []
        for kind, title in (("prompt", "Text to image"), ("edit", "Editing")):
            summary = self.to_dict().get(kind)
            if summary is None:
                continue
            checks = sorted({name for row in summary["categories"].values() for name in row["checks"]})
            lines += [
                f"| {title} | passed | of | rate | 95% interval | {' | '.join(checks)} |",
                "|---|" + "---:|" * (4 + len(checks)),
            ]
            for name, row in (*summary["categories"].items(), ("all", summary["all"])):
                low, high = row["interval"]
                cells = [f"{row['checks'][check]:.3f}" if check in row["checks"] else "" for check in checks]
                lines.append(
                    f"| {name} | {row['passed']} | {row['total']} | {row['rate']:.3f} | {low:.3f} to {high:.3f} | "
                    f"{' | '.join(cells)} |"
                )
            lines += [f"| **mean of categories** | | | **{summary['overall']:.3f}** | |{' |' * len(checks)}", ""]
        return "\n".join(lines)

    def save_contact_sheet(self, path: str | Path, *, kind: str = "prompt", limit: int = 60, columns: int = 6) -> None:
        """Saves the first `limit` pictures of a kind, in a green (passed) or red frame over the text asked."""
        tiles = [_draw_tile(item) for item in self.select(kind)[:limit]]
        if not tiles:
            raise ValueError(f"no results of kind {kind!r} to show, got {len(self.results)} results of other kinds")
        width, height = tiles[0].size
        sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height), "white")
        for index, tile in enumerate(tiles):
            sheet.paste(tile, (index % columns * width, index // columns * height))
        sheet.save(path)


def _summarize(results: list[ShapesResult]) -> dict:
    """Counts, rate, interval, and the rate of every check over the results that have it."""
    passed, total = sum(item.passed for item in results), len(results)
    checks: dict[str, list[bool]] = {}
    for item in results:
        for name, holds in item.checks.items():
            checks.setdefault(name, []).append(holds)
    return {
        "passed": passed,
        "total": total,
        "rate": passed / total,
        "interval": wilson_interval(passed, total),
        "checks": {name: sum(values) / len(values) for name, values in checks.items()},
    }


def _draw_tile(item: ShapesResult, size: int = 128, frame: int = 4, text_height: int = 40) -> Image.Image:
    pictures = [picture for picture in (item.source, item.image) if picture is not None]
    tile = Image.new("RGB", (len(pictures) * (size + 2 * frame) + frame, size + 3 * frame + text_height), "white")
    for index, picture in enumerate(pictures):
        is_result = index == len(pictures) - 1
        color = (PASS_COLOR if item.passed else FAIL_COLOR) if is_result else (200, 200, 200)
        fitted = ImageOps.pad(picture.convert("RGB"), (size, size), Image.Resampling.NEAREST, color="white")
        tile.paste(ImageOps.expand(fitted, frame, color), (index * (size + 2 * frame), frame))
    lines, line_length = [""], 22 * len(pictures)
    for word in item.text.split():
        if len(lines[-1]) + len(word) + 1 > line_length and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    ImageDraw.Draw(tile).multiline_text((frame, size + 3 * frame), "\n".join(lines[:3]), fill="black", spacing=2)
    return tile


def evaluate_shapes(
    generate: Callable[[list[str]], list[Image.Image]] | None,
    edit: Callable[[list[Image.Image], list[str]], list[Image.Image]] | None,
    *,
    num_prompts: int = 200,
    num_edits: int = 120,
    seed: int = 0,
    batch_size: int = 16,
    split: str = "test",
    size: tuple[int, int] = (64, 64),
) -> ShapesReport:
    """Judges a model on prompts and edits that no training row contains.

    Args:
        generate (`Callable`, *optional*): Texts to pictures. None leaves the prompts out.
        edit (`Callable`, *optional*): Pictures and instructions to pictures. None leaves the edits out.
        num_prompts (`int`, *optional*, defaults to 200): Spread evenly over the categories; texts may repeat.
        num_edits (`int`, *optional*, defaults to 120): Spread evenly over the tasks.
        seed (`int`, *optional*, defaults to 0): Fixes prompts and edits, not the model's own randomness.
        batch_size (`int`, *optional*, defaults to 16): Largest list that the two functions are given.
        split (`str`, *optional*, defaults to `"test"`): "train" measures what was seen in training instead.
        size (`tuple[int, int]`, *optional*): (height, width) of the pictures to edit.

    Returns:
        `ShapesReport`
    """
    # Item i depends on (seed, i) alone: a longer evaluation begins with the shorter one.
    prompts = [
        sample_prompt(np.random.default_rng((seed, 0, i)), CATEGORIES[i % len(CATEGORIES)], split=split)
        for i in range(num_prompts if generate is not None else 0)
    ]
    edits = [
        sample_edit(np.random.default_rng((seed, 1, i)), EDIT_TASKS[i % len(EDIT_TASKS)], split=split)
        for i in range(num_edits if edit is not None else 0)
    ]
    results: list[ShapesResult] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        images = generate([prompt.text for prompt in batch])
        _check_length(images, batch)
        for prompt, image in zip(batch, images, strict=True):
            verdict = judge_prompt(image, prompt)
            results.append(ShapesResult("prompt", prompt.category, prompt.text, verdict.passed, verdict.checks, image))
        logger.info("%d of %d prompts", start + len(batch), len(prompts))
    for start in range(0, len(edits), batch_size):
        batch = edits[start : start + batch_size]
        sources = [Image.fromarray(render(item.source, *size)) for item in batch]
        images = edit(sources, [item.instruction for item in batch])
        _check_length(images, batch)
        for item, source, image in zip(batch, sources, images, strict=True):
            verdict = judge_edit(image, item)
            checks = {"changed": verdict.changed, "preserved": verdict.preserved}
            results.append(ShapesResult("edit", item.task, item.instruction, verdict.passed, checks, image, source))
        logger.info("%d of %d edits", start + len(batch), len(edits))
    return ShapesReport(tuple(results), seed)


def _check_length(images: list, batch: list) -> None:
    if len(images) != len(batch):
        raise ValueError(f"expected one image per text, got {len(images)} images for {len(batch)} texts")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Judge a Shapes model on held-out prompts and edits.")
    parser.add_argument("--model", required=True, help="folder or Hub id of a NextFlowPipeline")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--num-edits", type=int, default=120)
    parser.add_argument("--split", default="test", choices=("train", "test"))
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of the model's sampling")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures to edit, in pixels")
    parser.add_argument("--guidance-scale", type=float, help="the pipeline's own default when left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for report.md, prompts.png, edits.png")
    parser.add_argument("--json", type=Path, help="file for the report as JSON")
    return parser


def pipeline_functions(pipe, seed: int, **options) -> tuple[Callable, Callable]:
    """The two functions that `evaluate_shapes` takes, of a [`NextFlowPipeline`] called with `options`."""
    import torch

    drawn = 0

    def draw(texts: list[str], **inputs) -> list[Image.Image]:
        nonlocal drawn
        # One generator per picture: the batch size does not change the result.
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + drawn + i) for i in range(len(texts))]
        drawn += len(texts)
        return pipe(prompt=texts, generator=generators, **inputs, **options).images

    return draw, lambda images, texts: draw(texts, image=images)


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from nextflow_hf.pipelines import NextFlowPipeline

    pipe = NextFlowPipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    options = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    generate, edit = pipeline_functions(pipe, args.seed, **options)
    report = evaluate_shapes(
        generate if args.num_prompts else None,
        edit if args.num_edits else None,
        num_prompts=args.num_prompts,
        num_edits=args.num_edits,
        seed=args.seed,
        batch_size=args.batch_size,
        split=args.split,
        size=(args.size, args.size),
    )
    markdown = report.to_markdown()
    logger.info("\n%s", markdown)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "report.md").write_text(markdown)
        for kind in ("prompt", "edit"):
            if report.select(kind):
                report.save_contact_sheet(args.out / f"{kind}s.png", kind=kind)
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_dict(), indent=2))


if __name__ == "__main__":
    main()
