"""The shapes world: five shapes in seven colours. A colour is a style, so all of the grammar applies."""

from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw

from .sprites import MIPMAPS, RASTER, Concept, Sprite, Sprites


_COLORS = {
    "red": (214, 32, 44),
    "green": (28, 158, 60),
    "blue": (36, 64, 214),
    "yellow": (250, 222, 40),
    "purple": (138, 36, 164),
    "orange": (250, 130, 16),
    "cyan": (32, 204, 222),
}
_SYNONYMS = {
    "circle": ("disc",),
    "square": ("box",),
    "triangle": (),
    "diamond": ("rhombus",),
    "ring": ("donut",),
}
_THINGS = {
    "red": ("in the color of blood",),
    "green": ("in the color of grass",),
    "blue": ("in the color of the sea",),
    "yellow": ("in the color of the sun",),
    "purple": ("in the color of a plum",),
    "orange": ("in the color of a carrot",),
    "cyan": ("in the color of ice",),
}


class _Shapes:
    """Draws them, four times as large and then scaled down."""

    def __init__(self):
        self.numbers = {Sprite(shape, color): 0 for shape in _SYNONYMS for color in _COLORS}
        self.levels = lru_cache(maxsize=None)(self._levels)

    @staticmethod
    def _levels(sprite: Sprite) -> list[Image.Image]:
        side = 4 * RASTER
        low, middle, high = side * 0.06, side / 2, side * 0.94
        mask = Image.new("L", (side, side))
        draw = ImageDraw.Draw(mask)
        if sprite.concept in ("circle", "ring"):
            draw.ellipse((low, low, high, high), 255)
        elif sprite.concept == "square":
            draw.rectangle((side * 0.12, side * 0.12, side * 0.88, side * 0.88), 255)
        elif sprite.concept == "triangle":
            draw.polygon([(middle, side * 0.12), (high, side * 0.88), (low, side * 0.88)], 255)
        else:
            draw.polygon([(middle, low), (high, middle), (middle, high), (low, middle)], 255)
        if sprite.concept == "ring":
            draw.ellipse((side * 0.3, side * 0.3, side * 0.7, side * 0.7), 0)
        image = Image.new("RGB", mask.size, _COLORS[sprite.style])
        image.putalpha(mask)
        return [image.convert("RGBa").reduce(side // size) for size in MIPMAPS]


def load(folder: Path, *, artwork: Path | None = None, concepts: int | None = None) -> Sprites:
    """The sprites, which need no files."""
    names = list(_SYNONYMS)[:concepts]
    found = {name: Concept(name, _SYNONYMS[name], "shapes", name) for name in names}
    return Sprites(found, {color: (color,) for color in _COLORS}, _Shapes(), hints=_THINGS)
