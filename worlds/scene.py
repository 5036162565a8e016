"""What an image of a world shows: up to four sprites at places of a 3x3 lattice, on a background; and how it is drawn.

A scene has no pixels: a canvas (height, width) gives it those. Whatever a caption can leave out has one default, so
that words and canvas settle the image. Knows nothing about language.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image

from ..processing.scale_schedule_nextflow import ScaleSchedule
from .sprites import Sprite, Sprites


Canvas = tuple[int, int]  # height, width in pixels

COLORS = {
    "white": (248, 248, 248),
    "black": (18, 18, 20),
    "gray": (150, 152, 156),
    "red": (222, 62, 62),
    "orange": (250, 156, 66),
    "yellow": (252, 226, 112),
    "green": (126, 200, 120),
    "dark green": (28, 96, 58),
    "turquoise": (84, 208, 200),
    "sky blue": (150, 205, 245),
    "blue": (54, 92, 214),
    "purple": (150, 98, 208),
    "pink": (250, 182, 208),
    "brown": (136, 92, 58),
    "beige": (236, 218, 186),
}
DEFAULT_BACKGROUND = "white"
GRADIENTS = (  # from the top to the bottom
    ("sky blue", "white"),
    ("blue", "black"),
    ("pink", "orange"),
    ("yellow", "red"),
    ("turquoise", "purple"),
    ("white", "green"),
    ("beige", "brown"),
    ("purple", "pink"),
)
BACKGROUNDS = (*COLORS, *(f"{top} to {bottom}" for top, bottom in GRADIENTS))

# PLACES[row][column]
PLACES = (
    ("top left corner", "top", "top right corner"),
    ("left", "middle", "right"),
    ("bottom left corner", "bottom", "bottom right corner"),
)
CELLS = {name: (row, column) for row, names in enumerate(PLACES) for column, name in enumerate(names)}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SIZES = {"small": 0.33, "medium": 0.47, "large": 0.85, "tile": 0.25}  # of the side of a square of this area, at most
WIDEST = 0.58  # of the shorter side, for what is not large: top, middle and bottom stay apart
MAX_THINGS = 4
MIN_PIXELS = 16  # of a sprite: below it nobody can tell what it is
_GRID = 4  # sprites begin at margin + n * grid: the codes of a sprite are then nearly alike at every place
RATIOS = ((1, 2), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (2, 1))  # height : width
# What the recipes' image processors have as well, so that nothing of an image is cropped.
_BUCKETS = {"patch_size": 8, "bucket_area": 144, "min_bucket_fill": 0.88, "max_aspect_ratio": 2.0}


@dataclass(frozen=True)
class Thing:
    """A sprite at one of `PLACES` in one of `SIZES`."""

    sprite: Sprite
    place: str
    size: str


@dataclass(frozen=True)
class Scene:
    """Things on one of `BACKGROUNDS`; in a request, None stands for any background."""

    background: str | None
    things: tuple[Thing, ...]

    def with_thing(self, old: Thing, new: Thing | None) -> "Scene":
        """Replace `old` by `new`, or remove it."""
        things = [new if thing == old else thing for thing in self.things]
        return replace(self, things=tuple(thing for thing in things if thing is not None))

    def to_json(self) -> dict:
        """Convert to plain data."""
        return {
            "background": self.background,
            "things": [[*vars(thing.sprite).values(), thing.place, thing.size] for thing in self.things],
        }

    @classmethod
    def from_json(cls, data: dict) -> "Scene":
        """Convert from plain data."""
        things = (Thing(Sprite(*values[:3]), *values[3:]) for values in data["things"])
        return cls(data["background"], tuple(things))


def canvases(resolution: int, ratios: Sequence[tuple[int, int]] = RATIOS) -> list[Canvas]:
    """Return the sizes (height, width) of a resolution for all ratios, as the image processor has them."""
    schedule = ScaleSchedule((1, resolution // _BUCKETS["patch_size"]), **_BUCKETS)
    return list(dict.fromkeys(schedule.pixel_size(schedule.nearest_bucket(*ratio), 2) for ratio in ratios))


def box(thing: Thing, canvas: Canvas) -> tuple[int, int, int]:
    """Return the box of a thing: (left, top, side) in pixels."""
    widest = (SIZES["large"] if thing.size == "large" else WIDEST) * min(canvas)
    side = int(min(SIZES[thing.size] * math.sqrt(math.prod(canvas)), widest)) // _GRID * _GRID
    margin = 0 if thing.size == "tile" else 2

    def start(cell: int, length: int) -> int:
        free = (margin, (length - side) / 2, length - side - margin)[cell]
        return max(0, round((free - margin) / _GRID) * _GRID + margin)

    row, column = CELLS[thing.place]
    return start(column, canvas[1]), start(row, canvas[0]), side


def fits(things: Sequence[Thing], canvas: Canvas) -> bool:
    """Tell whether no two things overlap and each is large enough to be recognised."""
    boxes = [box(thing, canvas) for thing in things]
    apart = all(
        abs(a[0] - b[0]) >= max(a[2], b[2]) or abs(a[1] - b[1]) >= max(a[2], b[2])
        for index, a in enumerate(boxes)
        for b in boxes[:index]
    )
    return apart and all(thing.size == "tile" or side >= MIN_PIXELS for thing, (*_, side) in zip(things, boxes))


def default_places(count: int, canvas: Canvas) -> tuple[str, ...]:
    """Return the places of things that no words place: in a line along the longer side, or in the corners."""
    line = ("left", "middle", "right") if canvas[1] >= canvas[0] else ("top", "middle", "bottom")
    corners = tuple(name for name in CELLS if "corner" in name)
    return {1: line[1:2], 2: line[::2], 3: line, 4: corners}[count]


def default_size(places: Sequence[str], canvas: Canvas, sizes: Sequence[str]) -> str | None:
    """Return the largest of `sizes` that fits at all `places`; None where none fits."""
    if len(sizes) == 1:
        return sizes[0]
    if tuple(places) == ("middle",):
        return "large"
    for size in ("medium", "small"):
        if fits([Thing(Sprite("", ""), place, size) for place in places], canvas):
            return size
    return None


@lru_cache(maxsize=1024)
def backdrop(background: str, canvas: Canvas) -> np.ndarray:
    """Paint a background: uint8 (height, width, 3)."""
    height, width = canvas
    top, _, bottom = background.partition(" to ")
    share = np.linspace(0, 1, height)[:, None]
    column = (1 - share) * np.array(COLORS[top]) + share * np.array(COLORS[bottom or top])
    return np.repeat((column + 0.5).astype(np.uint8)[:, None], width, axis=1)


@lru_cache
def check_canvas(canvas: Canvas, sizes: Sequence[str]) -> None:
    """Raise `ValueError` where four sprites fit nowhere: a search for such a scene would not end."""
    if default_size(default_places(MAX_THINGS, canvas), canvas, sizes) is None:
        raise ValueError(
            f"{MAX_THINGS} sprites of at least {MIN_PIXELS} pixels fit into no image of {canvas[0]}x{canvas[1]}: name "
            "a larger resolution, or larger sizes"
        )


def paste(pixels: np.ndarray, sprite: Image.Image, left: int, top: int) -> None:
    """Paint a premultiplied sprite onto uint8 `pixels`, clipped to them."""
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + sprite.width, width), min(top + sprite.height, height)
    if x0 < x1 and y0 < y1:
        source = np.asarray(sprite)[y0 - top : y1 - top, x0 - left : x1 - left]
        window = pixels[y0:y1, x0:x1]
        window[:] = source[..., :3] + (window * (255 - source[..., 3:].astype(np.uint16)) // 255).astype(np.uint8)


def render(scene: Scene, sprites: Sprites, canvas: Canvas) -> np.ndarray:
    """Render a scene as uint8 (height, width, 3)."""
    pixels = backdrop(scene.background, canvas).copy()
    for thing in scene.things:
        left, top, side = box(thing, canvas)
        paste(pixels, sprites.draw(thing.sprite, side), left, top)
    return pixels


def render_loose(
    rng: Random, sprites: Sprites, drawings: Sequence[Sprite], background: str, canvas: Canvas
) -> np.ndarray:
    """Render sprites of any size anywhere, one over the other: varied images for a vision tokenizer."""
    pixels = backdrop(background, canvas).copy()
    for sprite in drawings:
        side = rng.randint(MIN_PIXELS, int(0.95 * min(canvas)))
        left, top = (rng.randint(-side // 4, length - 3 * side // 4) for length in canvas[::-1])
        paste(pixels, sprites.draw(sprite, side), left, top)
    return pixels
