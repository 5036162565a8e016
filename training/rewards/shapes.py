"""The Shapes world as a reward: prompts as a data set, and the judge in code that knows what each of them means."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from ..shapes import CATEGORIES, EDIT_TASKS, Edit, Prompt, render, sample_edit, sample_prompt
from ..shapes.judge import judge_edit, judge_prompt, parse_image
from .ocr import boxes_mask


def shapes_task(seed: int, index: int, split: str, edit_fraction: float) -> Prompt | Edit:
    """Task `index` of the data set `seed`: a function of its arguments. Categories take turns."""
    rng = np.random.default_rng((seed, 2, index))
    if rng.random() < edit_fraction:
        return sample_edit(rng, EDIT_TASKS[index % len(EDIT_TASKS)], split=split)
    return sample_prompt(rng, CATEGORIES[index % len(CATEGORIES)], split=split)


def shapes_prompts(
    num_rows: int,
    *,
    seed: int = 0,
    split: str = "train",
    edit_fraction: float = 0.0,
    categories: Sequence[str] | None = None,
    size: int = 64,
) -> Dataset:
    """Rows of `prompt`, `images` (the source of an edit, `size` pixels wide), `category`, and `world`: the arguments
    of [`shapes_task`], from which the rewards know what was asked.

    `categories` keeps the tasks of some categories (of prompts and of edits): a group of which all pictures pass
    teaches nothing, so what a model can do already is best left out.
    """
    possible = (CATEGORIES if edit_fraction < 1 else ()) + (EDIT_TASKS if edit_fraction > 0 else ())
    if categories is not None and not (categories and set(categories) <= set(possible)):
        raise ValueError(f"categories must be some of {possible} at edit_fraction {edit_fraction}, got {categories}")
    rows, indices = [], itertools.count()
    while len(rows) < num_rows:
        world = {"seed": seed, "index": next(indices), "split": split, "edit_fraction": edit_fraction}
        task = shapes_task(**world)
        is_edit = isinstance(task, Edit)
        category = task.task if is_edit else task.category
        if categories is not None and category not in categories:
            continue
        rows.append(
            {
                "prompt": task.instruction if is_edit else task.text,
                "images": [PILImage.fromarray(render(task.source, size, size))] if is_edit else [],
                "category": category,
                "world": world,
            }
        )
    text, number = Value("string"), Value("int64")
    world = {"seed": number, "index": number, "split": text, "edit_fraction": Value("float64")}
    features = Features({"prompt": text, "images": List(Image()), "category": text, "world": world})
    return Dataset.from_list(rows, features=features)


def shapes_judge(images: Sequence[PILImage.Image], world: Sequence[dict], **columns: Any) -> list[float]:
    """1 where the judge passes the picture, else 0: what the evaluation counts."""
    return [float(_verdict(image, task)[0]) for image, task in zip(images, _tasks(images, world, columns))]


def shapes_checks(images: Sequence[PILImage.Image], world: Sequence[dict], **columns: Any) -> list[float]:
    """Share of the judge's checks that hold: the number of objects, their shapes, colours, places, the background."""
    checks = [_verdict(image, task)[1] for image, task in zip(images, _tasks(images, world, columns))]
    return [sum(values) / len(values) for values in checks]


def clean_shapes(images: Sequence[PILImage.Image], **columns: Any) -> list[float]:
    """How much the objects look like objects: mean overlap (0 to 1) with the nearest true shape; 0 without objects."""
    scores = []
    for image in images:
        objects = parse_image(image).objects
        scores.append(sum(item.confidence for item in objects) / len(objects) if objects else 0.0)
    return scores


def _tasks(images: Sequence[PILImage.Image], world: Sequence[dict], columns: dict) -> list[Prompt | Edit]:
    """What was asked for each picture; hands in the boxes of the objects seen, half as large again, as masks."""
    report_masks: Callable | None = columns.get("report_masks")
    if report_masks is not None:
        report_masks([_objects_mask(image) for image in images])
    return [shapes_task(**arguments) for arguments in world]


def _verdict(image: PILImage.Image, task: Prompt | Edit) -> tuple[bool, list[bool]]:
    if isinstance(task, Edit):
        verdict = judge_edit(image, task)
        return verdict.passed, [verdict.changed, verdict.preserved]
    verdict = judge_prompt(image, task)
    return verdict.passed, list(verdict.checks.values())


def _objects_mask(image: PILImage.Image) -> np.ndarray | None:
    width, height = image.size
    boxes = []
    for item in parse_image(image).objects:
        reach = 1.5 * item.radius * min(width, height)
        x, y = item.x * width, item.y * height
        boxes.append((x - reach, y - reach, x + reach, y + reach))
    return boxes_mask(boxes, image.size)
