"""Stories in two or three pictures: the request settles every one of them, the answer is text and pictures in turn."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .captions import USUAL_CELLS, in_split, is_held_out, noun_phrase, pick, pick_two
from .scene import BACKGROUNDS, CELLS, COLORS, SHAPES, Scene, place_object
from .understanding import caption


STORY_KINDS = ("move", "recolor", "reshape", "appear", "vanish", "background")
MAX_PICTURES = 3
CENTER = (1, 1)
# What "from left to right" and its like pass through.
PATHS = {
    ("left", "right"): ((1, 0), (1, 1), (1, 2)),
    ("right", "left"): ((1, 2), (1, 1), (1, 0)),
    ("top", "bottom"): ((0, 1), (1, 1), (2, 1)),
    ("bottom", "top"): ((2, 1), (1, 1), (0, 1)),
}


@dataclass(frozen=True)
class Story:
    """A request of one of `STORY_KINDS`, and the scenes that it asks for, in order."""

    kind: str
    text: str
    scenes: tuple[Scene, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the answer says before each picture."""
        return tuple(f"{'then' if index else 'first'}, {caption(scene)}" for index, scene in enumerate(self.scenes))


def sample_story(rng: np.random.Generator, kind: str | None = None, *, split: str = "train") -> Story:
    """
    A random story of `kind` (any when None) whose text belongs to `split`. In training no picture of it has a held-out
    caption either.
    """
    if kind is None:
        kind = pick(rng, STORY_KINDS)
    if kind not in STORY_KINDS:
        raise ValueError(f"unknown kind {kind!r}, expected one of {STORY_KINDS}")
    while True:
        text, scenes = _BUILDERS[kind](rng)
        text = f"a story: {text}"
        if in_split(text, split) and (split == "test" or not any(is_held_out(caption(scene)) for scene in scenes)):
            return Story(kind, text, scenes)


def _hero(rng: np.random.Generator) -> tuple[str, str, str, str]:
    """A shape, a colour, a background, and the words for them."""
    shape, color, background = pick(rng, SHAPES), pick(rng, COLORS), pick(rng, BACKGROUNDS)
    return shape, color, background, f"{noun_phrase(shape, color)} on a {background} background"


def _series(rng: np.random.Generator, options: tuple[str, ...] | dict, first: str) -> tuple[str, ...]:
    """`first` and one or two others, all different."""
    second, third = pick_two(rng, tuple(option for option in options if option != first))
    return (first, second, third)[: int(rng.integers(2, MAX_PICTURES + 1))]


def _move(rng: np.random.Generator) -> tuple[str, tuple[Scene, ...]]:
    shape, color, background, hero = _hero(rng)
    if rng.random() < 0.5:
        (start, end), cells = list(PATHS.items())[int(rng.integers(len(PATHS)))]
        text = f"{hero} moves from {start} to {end}"
    else:
        start, end = pick_two(rng, CELLS)
        cells = (CELLS[start], CELLS[end])
        text = f"{hero} moves from the {start} to the {end}"
    return text, tuple(Scene(background, (place_object(shape, color, cell),)) for cell in cells)


def _recolor(rng: np.random.Generator) -> tuple[str, tuple[Scene, ...]]:
    shape, first, background, hero = _hero(rng)
    colors = _series(rng, COLORS, first)
    text = f"{hero} turns {' and then '.join(colors[1:])}"
    return text, tuple(Scene(background, (place_object(shape, color, CENTER),)) for color in colors)


def _reshape(rng: np.random.Generator) -> tuple[str, tuple[Scene, ...]]:
    first, color, background, hero = _hero(rng)
    shapes = _series(rng, SHAPES, first)
    text = f"{hero} turns into {' and then '.join(noun_phrase(shape) for shape in shapes[1:])}"
    return text, tuple(Scene(background, (place_object(shape, color, CENTER),)) for shape in shapes)


def _row(rng: np.random.Generator, verb: str) -> tuple[str, Scene]:
    """Two or three objects of one look that come or go from left to right, and the scene that shows them all."""
    count = int(rng.integers(2, MAX_PICTURES + 1))
    shape, color, background, _ = _hero(rng)
    text = f"{noun_phrase(shape, color, count)} on a {background} background {verb} one by one"
    return text, Scene(background, tuple(place_object(shape, color, cell) for cell in USUAL_CELLS[count]))


def _appear(rng: np.random.Generator) -> tuple[str, tuple[Scene, ...]]:
    text, full = _row(rng, "appear")
    counts = range(1, len(full.objects) + 1)
    return text, tuple(Scene(full.background, full.objects[:count]) for count in counts)


def _vanish(rng: np.random.Generator) -> tuple[str, tuple[Scene, ...]]:
    """The last one stays."""
    text, full = _row(rng, "vanish")
    return text, tuple(Scene(full.background, full.objects[gone:]) for gone in range(len(full.objects)))


def _background(rng: np.random.Generator) -> tuple[str, tuple[Scene, ...]]:
    shape, color, first, _ = _hero(rng)
    backgrounds = _series(rng, BACKGROUNDS, first)
    text = f"the background of {noun_phrase(shape, color)} turns {first} and then {' and then '.join(backgrounds[1:])}"
    return text, tuple(Scene(background, (place_object(shape, color, CENTER),)) for background in backgrounds)


_BUILDERS: dict[str, Callable] = dict(
    zip(STORY_KINDS, (_move, _recolor, _reshape, _appear, _vanish, _background), strict=True)
)
