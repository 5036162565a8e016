"""The shapes world: five shapes in seven colours, of one size, on three backgrounds. A colour is a style.

So the grammar of all worlds applies; no files are needed, and the judge compares each place with every true shape.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from .captions import COUNT_WORDS, with_article
from .dialect import Dialect
from .sampling import Context
from .scene import Scene, Thing, default_places
from .sprites import Concept, Sprite, Sprites


_COLORS = {
    "red": (214, 32, 44),
    "green": (28, 158, 60),
    "blue": (36, 64, 214),
    "yellow": (250, 222, 40),
    "purple": (138, 36, 164),
    "orange": (250, 130, 16),
    "cyan": (32, 204, 222),
}
_SYNONYMS = {"circle": ("disc",), "square": ("box",), "triangle": (), "diamond": ("rhombus",), "ring": ("donut",)}
_USUAL_COLORS = {"circle": "red", "square": "blue", "triangle": "green", "diamond": "yellow", "ring": "purple"}
_HINTS = {
    "red": ("blood", "a cherry"),
    "green": ("grass", "a frog"),
    "blue": ("the sea", "the sky"),
    "yellow": ("the sun", "a lemon"),
    "purple": ("a plum", "a grape"),
    "orange": ("a carrot", "a pumpkin"),
    "cyan": ("ice", "a swimming pool"),
}
_RADIUS = 7 / 16  # of the box: two patches of 8 pixels, which a shape fills alike wherever it is


# ---- stories that are told in another way than of emoji


def _moves(context: Context):
    path = list(context.rng.choice((("left", "middle", "right"), ("top", "middle", "bottom"))))
    path = path[:: context.rng.choice((1, -1))]
    sprite, background = context.sprite(), context.background()
    scenes = tuple(Scene(background, (Thing(sprite, place, "tile"),)) for place in path)
    text = f"{_hero(context, sprite, background)} moves from {path[0]} to {path[-1]}"
    return text, scenes, [f"it is {context.say.place(place)}" for place in path]


def _becomes(context: Context):
    sprites, background = context.different(context.rng.choice((2, 3))), context.background()
    sprites = [Sprite(sprite.concept, sprites[0].style) for sprite in sprites]
    names = [with_article(sprite.concept) for sprite in sprites]
    text = f"{_hero(context, sprites[0], background)} turns into {' and then '.join(names[1:])}"
    return text, _alone(sprites, [background] * len(sprites)), [f"it is {name}" for name in names]


def _changes_background(context: Context):
    sprite = context.sprite()
    names = context.rng.sample(context.dialect.backgrounds, context.rng.choice((2, 3)))
    text = f"the background of {context.say.indefinite(sprite)} turns {' and then '.join(names)}"
    return text, _alone([sprite] * len(names), names), [f"the background is {name}" for name in names]


def _one_by_one(context: Context, verb: str, shown):
    count, sprite, background = context.rng.choice((2, 3)), context.sprite(), context.background()
    full = context.arrange([sprite] * count, background, default_places(count, context.canvas))
    text = f"{_hero(context, sprite, background, count=count)} {verb} one by one"
    scenes = tuple(Scene(background, shown(full.things, index)) for index in range(count))
    return text, scenes, [f"there is {COUNT_WORDS[len(scene.things)]}" for scene in scenes]


def _hero(context: Context, sprite: Sprite, background: str, **parts) -> str:
    return f"{context.say.indefinite(sprite, **parts)} on {context.say.background(background)}"


def _alone(sprites: Sequence[Sprite], backgrounds: Sequence[str]) -> tuple[Scene, ...]:
    pairs = zip(sprites, backgrounds, strict=True)
    return tuple(Scene(background, (Thing(sprite, "middle", "tile"),)) for sprite, background in pairs)


DIALECT = Dialect(
    backgrounds=("white", "black", "pink"),
    default_background=None,
    ratios=((1, 1),),
    sizes=("tile",),
    most_different=2,
    edits=("style", "background", "add", "remove", "move", "swap"),
    # Reading and edits are learnt last, so they are most of the rows.
    shares={
        **{"text_to_image": 0.1, "edit": 0.4, "subject": 0, "caption": 0.13, "questions": 0.13, "thinking": 0.05},
        **{"story": 0.06, "examples": 0.06, "conversation": 0.06, "text": 0.01},
    },
    places={
        "top left corner": ("in the top left corner", "top left", "at the top left"),
        "top": ("at the top center", "at the top", "on top"),
        "top right corner": ("in the top right corner", "top right", "at the top right"),
        "left": ("at the middle left", "on the left", "at the left"),
        "middle": ("in the center", "in the middle"),
        "right": ("at the middle right", "on the right", "at the right"),
        "bottom left corner": ("in the bottom left corner", "bottom left", "at the bottom left"),
        "bottom": ("at the bottom center", "at the bottom"),
        "bottom right corner": ("in the bottom right corner", "bottom right", "at the bottom right"),
    },
    instructions={
        "style": ("make {thing} {style}", "paint {thing} {style}", "turn {thing} {style}"),
        "background": ("change the background to {name}", "make the background {name}", "use {background}"),
    },
    caption_requests=("describe the picture", "what is in the picture", "what do you see"),
    caption_joints=(" and ", " on "),
    question_end="",
    what_is="what shape is {place}",
    style_is="what color is {thing}",
    how_many=("how many objects are there",),
    names_styles=True,
    implied=("number", "background", "style"),
    implied_number="{number} {things}",
    style_hint="in the color of {}",
    style_thought="the color of {hint} is {style}",
    count_hints={
        2: ("half of four", "one less than three"),
        3: ("one more than two", "one less than four"),
        4: ("twice two", "one more than three"),
    },
    color_things={"white": ("snow", "milk"), "black": ("coal", "the night"), "pink": ("a pig", "a rose")},
    stories={
        "move": _moves,
        "become": _becomes,
        "appear": partial(_one_by_one, verb="appear", shown=lambda things, index: things[: index + 1]),
        "vanish": partial(_one_by_one, verb="vanish", shown=lambda things, index: things[index:]),
        "background": _changes_background,
    },
)


class _Shapes:
    """Draws shapes, equally sharp at any size."""

    def __init__(self):
        self.numbers = {Sprite(shape, color): 0 for shape in _SYNONYMS for color in _COLORS}

    @staticmethod
    def draw(sprite: Sprite, size: int) -> Image.Image:
        """Return the sprite at a size in pixels, as premultiplied "RGBa"."""
        offsets = np.arange(size, dtype=np.float32) + 0.5 - size / 2
        inside = 0.5 - _signed_distance(sprite.concept, offsets[None], offsets[:, None], _RADIUS * size)
        alpha = np.clip(inside, 0, 1)[..., None]
        pixels = np.concatenate([alpha * np.array(_COLORS[sprite.style]), alpha * 255], -1)
        return Image.fromarray((pixels + 0.5).astype(np.uint8), "RGBa")


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return the distance to the outline of a shape around the origin, negative inside; y grows downwards."""
    distance = np.hypot(x, y)
    if shape == "circle":
        return distance - radius
    if shape == "ring":
        return np.maximum(distance - radius, 0.45 * radius - distance)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.86 * radius
    if shape == "diamond":
        return (abs(x) + abs(y) - radius) * 0.5**0.5
    half = 0.866 * radius  # an equilateral triangle: its base, and two sides at 60 degrees
    return np.maximum(y - half, 0.866 * abs(x) - 0.5 * (y + half))


def load(folder: Path | None = None, *, artwork: Path | None = None, concepts: int | None = None) -> Sprites:
    """Make the sprites; they need no files."""
    found = {name: Concept(name, _SYNONYMS[name], "shapes", name) for name in list(_SYNONYMS)[:concepts]}
    styles = {color: (color,) for color in _COLORS}
    return Sprites(found, styles, _Shapes(), DIALECT, hints=_HINTS, usual_styles=_USUAL_COLORS, holds_out=False)


@lru_cache(maxsize=1)
def judge():
    """Make the judge of this world's images."""
    from .template_judge import TemplateJudge  # needs torch

    return TemplateJudge(load())


def reward(images: Sequence[Image.Image], scenes: Sequence[Sequence[str]], **columns) -> list[float]:
    """Return rewards for GRPO (`nextflow_hf.worlds.shapes:reward`), see [`~judge.reward`]."""
    from .judge import reward

    return reward(judge(), images, scenes)


def suite(**options):
    """Make the suite; `options` are those of [`~suite.WorldSuite`]."""
    from ..training.evaluation.suite import bind
    from .suite import WorldSuite

    return bind("shapes", partial(WorldSuite, load(), judge()), options)
