"""Shapes as training data: rows of the one `messages` format, drawn on the fly, each a function of (seed, index).

Rows are the same whatever the number of workers, the order or the size of the batch. Text-to-image rows are captions
of `sample_prompt` or full descriptions of edit targets; edit rows are pairs in either direction.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from .captions import describe, in_split, sample_prompt, sample_scene
from .edits import Edit, sample_edit
from .scene import Scene, render


def prompt_messages(text: str) -> list[dict]:
    """A text-to-image conversation; its one image is the assistant's."""
    return [
        {"role": "user", "content": [{"type": "text", "text": text}]},
        {"role": "assistant", "content": [{"type": "image"}]},
    ]


def edit_messages(instruction: str) -> list[dict]:
    """An editing conversation; its images are the user's and then the assistant's."""
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]},
        {"role": "assistant", "content": [{"type": "image"}]},
    ]


def shapes_sample(
    seed: int,
    index: int,
    *,
    split: str = "train",
    edit_fraction: float = 0.5,
    description_fraction: float = 0.25,
    sizes: tuple[tuple[int, int], ...] = ((64, 64),),
) -> dict:
    """Row `index` of the data set `seed`.

    Args:
        seed (`int`): Names the data set.
        index (`int`): Names the row; rows do not depend on each other.
        split (`str`, *optional*, defaults to `"train"`): Which captions and instructions may occur.
        edit_fraction (`float`, *optional*, defaults to 0.5): Share of edits among the rows; the rest is text-to-image.
        description_fraction (`float`, *optional*, defaults to 0.25): Share of the text-to-image rows that show the
            scene of an edit with a full description (up to four objects that differ), rather than a GenEval prompt.
        sizes (`tuple[tuple[int, int], ...]`, *optional*): The (height, width) to draw from.

    Returns:
        `dict`: "messages", "images" (PIL, in the order of the conversation), "task" ("text_to_image" or "edit") and
        "category" (of the prompt, "description", or the task of the edit).
    """
    rng = np.random.default_rng((seed, index))
    height, width = sizes[int(rng.integers(len(sizes)))]
    if rng.random() < edit_fraction:
        edit = _either_direction(rng, sample_edit(rng, split=split), split)
        scenes, task, category = (edit.source, edit.target), "edit", edit.task
        messages = edit_messages(edit.instruction)
    else:
        scene, text, category = _captioned_scene(rng, split, description_fraction)
        scenes, task = (scene,), "text_to_image"
        messages = prompt_messages(text)
    images = [Image.fromarray(render(scene, height, width)) for scene in scenes]
    return {"messages": messages, "images": images, "task": task, "category": category}


def shapes_samples(split: str, seed: int, num_samples: int, *, start: int = 0, **options) -> Iterator[dict]:
    """Rows `start` to `start + num_samples` of the data set `seed`, one by one; `options` as in `shapes_sample`."""
    for index in range(start, start + num_samples):
        yield shapes_sample(seed, index, split=split, **options)


def _either_direction(rng: np.random.Generator, edit: Edit, split: str) -> Edit:
    """The edit or, every second time, its inverse. Removals get sources of four objects this way."""
    inverse = edit.inverse(rng, split=split) if rng.random() < 0.5 else None
    return inverse if inverse is not None else edit


def _captioned_scene(rng: np.random.Generator, split: str, description_fraction: float) -> tuple[Scene, str, str]:
    """A scene, a caption of `split` for it, and the caption's category."""
    if rng.random() >= description_fraction:
        prompt = sample_prompt(rng, split=split)
        return sample_scene(rng, prompt), prompt.text, prompt.category
    while True:
        scene = sample_edit(rng, split=split).target
        text = describe(scene, rng)
        if in_split(text, split):
            return scene, text, "description"
