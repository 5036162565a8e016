"""The language of the Shapes world: captions with what exactly they demand of a picture, and scenes that meet it.

A `Prompt` is the text together with its meaning, so nothing ever has to parse English. Categories follow GenEval.
Captions are split into train and test by a hash of the text: no held-out wording is ever trained on.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .scene import BACKGROUNDS, CELLS, COLORS, SHAPES, Scene, ShapeObject, place_object


CATEGORIES = ("single_object", "colors", "two_objects", "color_attribution", "counting", "position")
# Relation -> the step in rows and columns that it means.
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("train", "test")
HELD_OUT_PERCENT = 5

# What is drawn where a caption does not say it.
USUAL_COLORS = {"circle": "red", "square": "blue", "triangle": "green", "diamond": "yellow", "ring": "purple"}
USUAL_CELLS = {
    1: ((1, 1),),
    2: ((1, 0), (1, 2)),
    3: ((1, 0), (1, 1), (1, 2)),
    4: ((0, 0), (0, 2), (2, 0), (2, 2)),
}

COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
PHRASINGS = ("{}", "{}", "a picture of {}", "an image of {}", "draw {}", "show {}")
BACKGROUND_PHRASINGS = ("{} on a {} background", "{} in front of a {} background")
RELATION_PHRASINGS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}


@dataclass(frozen=True)
class ObjectSpec:
    """`count` objects of a shape that the picture must hold; `color` and `place` are free when None."""

    shape: str
    color: str | None = None
    count: int = 1
    place: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A caption and what it demands.

    Args:
        text (`str`): The caption.
        category (`str`): One of `CATEGORIES`.
        objects (`tuple[ObjectSpec, ...]`): All objects of the picture: nothing else may be in it.
        relation (`str`, *optional*): One of `RELATIONS`: the first object is `relation` the second.
        background (`str`, *optional*): One of `BACKGROUNDS`; free when None.
    """

    text: str
    category: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None
    background: str | None = None


def is_held_out(text: str) -> bool:
    """Whether a caption or an instruction belongs to the test split (about one in twenty, by a stable hash)."""
    return zlib.crc32(text.encode()) % 100 < HELD_OUT_PERCENT


def in_split(text: str, split: str) -> bool:
    """Whether `text` may be used in `split` ("train" or "test")."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {SPLITS}")
    return is_held_out(text) == (split == "test")


def pick(rng: np.random.Generator, options: tuple[str, ...] | dict) -> str:
    """A uniformly random element (`rng.choice` would give numpy strings, and is slow)."""
    options = tuple(options)
    return options[int(rng.integers(len(options)))]


def pick_two(rng: np.random.Generator, options: tuple[str, ...] | dict) -> tuple[str, str]:
    """Two different random elements."""
    first = pick(rng, options)
    return first, pick(rng, tuple(option for option in options if option != first))


def noun_phrase(shape: str, color: str | None = None, count: int = 1) -> str:
    """`a circle`, `an orange circle`, `three green triangles`."""
    noun = shape if count == 1 else f"{shape}s"
    words = f"{color} {noun}" if color is not None else noun
    if count > 1:
        return f"{COUNT_WORDS[count]} {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def place_phrase(place: str) -> str:
    """`in the top left corner`, `at the top center`."""
    return f"{'in' if 'corner' in place or place == 'center' else 'at'} the {place}"


def _single_object(rng: np.random.Generator) -> tuple[str, tuple[ObjectSpec, ...], str | None]:
    shape = pick(rng, SHAPES)
    return noun_phrase(shape), (ObjectSpec(shape),), None


def _colors(rng: np.random.Generator) -> tuple[str, tuple[ObjectSpec, ...], str | None]:
    shape, color = pick(rng, SHAPES), pick(rng, COLORS)
    return noun_phrase(shape, color), (ObjectSpec(shape, color),), None


def _two_objects(rng: np.random.Generator) -> tuple[str, tuple[ObjectSpec, ...], str | None]:
    first, second = pick_two(rng, SHAPES)
    return f"{noun_phrase(first)} and {noun_phrase(second)}", (ObjectSpec(first), ObjectSpec(second)), None


def _two_colored(rng: np.random.Generator) -> tuple[ObjectSpec, ObjectSpec]:
    """Two objects of different colours, usually of different shapes too."""
    colors = pick_two(rng, COLORS)
    shapes = pick_two(rng, SHAPES) if rng.random() < 0.85 else (pick(rng, SHAPES),) * 2
    return ObjectSpec(shapes[0], colors[0]), ObjectSpec(shapes[1], colors[1])


def _color_attribution(rng: np.random.Generator) -> tuple[str, tuple[ObjectSpec, ...], str | None]:
    first, second = _two_colored(rng)
    text = f"{noun_phrase(first.shape, first.color)} and {noun_phrase(second.shape, second.color)}"
    return text, (first, second), None


def _counting(rng: np.random.Generator) -> tuple[str, tuple[ObjectSpec, ...], str | None]:
    count = int(rng.integers(2, 5))
    shape = pick(rng, SHAPES)
    color = pick(rng, COLORS) if rng.random() < 0.7 else None
    return noun_phrase(shape, color, count), (ObjectSpec(shape, color, count),), None


def _position(rng: np.random.Generator) -> tuple[str, tuple[ObjectSpec, ...], str | None]:
    if rng.random() < 0.4:
        shape, place = pick(rng, SHAPES), pick(rng, CELLS)
        color = pick(rng, COLORS) if rng.random() < 0.75 else None
        return f"{noun_phrase(shape, color)} {place_phrase(place)}", (ObjectSpec(shape, color, place=place),), None
    if rng.random() < 0.75:
        first, second = _two_colored(rng)
    else:
        first, second = (ObjectSpec(shape) for shape in pick_two(rng, SHAPES))
    relation = pick(rng, RELATIONS)
    words = pick(rng, RELATION_PHRASINGS[relation])
    text = f"{noun_phrase(first.shape, first.color)} {words} {noun_phrase(second.shape, second.color)}"
    return text, (first, second), relation


_BUILDERS: dict[str, Callable] = dict(
    zip(CATEGORIES, (_single_object, _colors, _two_objects, _color_attribution, _counting, _position), strict=True)
)


def sample_prompt(rng: np.random.Generator, category: str | None = None, *, split: str = "train") -> Prompt:
    """A random caption of `category` (any when None) whose text belongs to `split`."""
    if category is None:
        category = pick(rng, CATEGORIES)
    if category not in _BUILDERS:
        raise ValueError(f"unknown category {category!r}, expected one of {CATEGORIES}")
    while True:
        text, objects, relation = _BUILDERS[category](rng)
        background = pick(rng, BACKGROUNDS) if rng.random() < 0.5 else None
        if background is not None:
            text = pick(rng, BACKGROUND_PHRASINGS).format(text, background)
        text = pick(rng, PHRASINGS).format(text)
        if in_split(text, split):
            return Prompt(text, category, objects, relation, background)


def neighbour(cell: tuple[int, int], relation: str) -> tuple[int, int] | None:
    """The (row, column) cell next to `cell` that is `relation` it, None outside of the lattice."""
    if relation not in RELATIONS:
        raise ValueError(f"unknown relation {relation!r}, expected one of {tuple(RELATIONS)}")
    row, column = (index + step for index, step in zip(cell, RELATIONS[relation], strict=True))
    return (row, column) if row in range(3) and column in range(3) else None


def sample_scene(rng: np.random.Generator, prompt: Prompt) -> Scene:
    """
    A scene that meets every demand of `prompt`. Colours and places that it leaves open are the usual ones; only the
    background is random. All cells of a scale are drawn at once, so what no text says must be settled by the single
    cell of the first scale, or two cells would choose differently.
    """
    looks = [
        (spec.shape, spec.color or USUAL_COLORS[spec.shape]) for spec in prompt.objects for _ in range(spec.count)
    ]
    if prompt.relation is not None:
        cells = [neighbour((1, 1), prompt.relation), neighbour((1, 1), OPPOSITES[prompt.relation])]
    elif prompt.objects[0].place is not None:
        cells = [CELLS[prompt.objects[0].place]]
    else:
        cells = USUAL_CELLS[len(looks)]
    background = prompt.background if prompt.background is not None else pick(rng, BACKGROUNDS)
    return Scene(background, tuple(place_object(*look, cell) for look, cell in zip(looks, cells, strict=True)))


def random_cells(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """`count` different (row, column) cells of the lattice."""
    return [divmod(int(index), 3) for index in rng.permutation(9)[:count]]


def enumerate_objects(objects: Sequence[ShapeObject]) -> str:
    """`a red circle in the center, a blue ring at the middle left and ...`; `nothing` without objects."""
    phrases = [f"{noun_phrase(item.shape, item.color)} {place_phrase(item.place)}" for item in objects]
    return " and ".join(filter(None, (", ".join(phrases[:-1]), *phrases[-1:]))) or "nothing"


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A full caption of any scene: each object with its colour and place, and the background. Not bound to a split."""
    order = [scene.objects[index] for index in rng.permutation(len(scene.objects))]
    text = pick(rng, BACKGROUND_PHRASINGS).format(enumerate_objects(order), scene.background)
    return pick(rng, PHRASINGS).format(text)
