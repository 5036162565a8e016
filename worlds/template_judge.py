"""A judge without training, for few and simple sprites: it compares each box with all of them."""

from collections.abc import Sequence

import numpy as np

from .judge import NOTHING, Judge, Look, background_of, extent
from .scene import backdrop
from .sprites import Sprite, Sprites


MAX_ERROR = 0.08  # squared error of the nearest sprite, in the energy of its difference from the background
SHIFTS = (-1, 0, 1)  # pixels that a sprite may be from its place


class TemplateJudge(Judge):
    """
    Looks at images of a world.

    Args:
        sprites ([`Sprites`]): What there is to see.
    """

    classifier = None

    def __init__(self, sprites: Sprites):
        self.sprites, self.backgrounds, self.sizes = sprites, sprites.dialect.backgrounds, sprites.dialect.sizes
        self.extents = {sprite: extent(sprites, sprite) for sprite in sprites.all}

    def look(self, pixels: np.ndarray, boxes: Sequence[tuple[int, int, int]]) -> list[Look]:
        """Return the nearest sprite of each box (left, top, side) of a uint8 image; nothing where none is near."""
        ground = backdrop(background_of(pixels, self.backgrounds) or self.backgrounds[0], pixels.shape[:2])
        return [self._nearest(pixels.astype(np.float32), ground, *place) for place in boxes]

    def _nearest(self, pixels: np.ndarray, ground: np.ndarray, left: int, top: int, side: int) -> Look:
        window = ground[top : top + side, left : left + side].astype(np.float32)
        drawings = np.stack([np.asarray(self.sprites.draw(sprite, side), np.float32) for sprite in self.sprites.all])
        templates = drawings[..., :3] + window * (1 - drawings[..., 3:] / 255)
        energies = ((templates - window) ** 2).mean((1, 2, 3))
        padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
        errors = np.min(
            [
                ((templates - padded[1 + top + y :, 1 + left + x :][:side, :side]) ** 2).mean((1, 2, 3))
                for y in SHIFTS
                for x in SHIFTS
            ],
            axis=0,
        )
        shares = errors / energies
        best = int(shares.argmin())
        sprite = self.sprites.all[best] if shares[best] <= MAX_ERROR else Sprite(NOTHING, "")
        return Look(sprite, float(1 - min(1, shares[best])))
