"""What a world is made of: concepts with words, drawn in styles. Knows nothing about scenes and sentences.

A sprite is a drawing of a concept in a style, perhaps with a tone. An emoji's style is the set of artwork that it is
from and its tone that of the skin; a coloured shape's style is its colour.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

from PIL import Image


RASTER = 128  # pixels of a sprite in the cache
MIPMAPS = (32, 64, RASTER)  # sizes that a sprite is scaled down from
HELD_OUT_SHARE = 0.1  # of the pairs of concept and style


@dataclass(frozen=True)
class Concept:
    """Something that can be drawn: its name, other words that mean it alone, its group, and a code."""

    name: str
    synonyms: tuple[str, ...] = ()
    group: str = ""
    code: str = ""


@dataclass(frozen=True, order=True)
class Sprite:
    """A drawing: names of a concept, of a style and, where there are tones, of a tone."""

    concept: str
    style: str
    tone: str = ""


class RasterSource(Protocol):
    """What draws sprites."""

    numbers: dict[Sprite, int]

    def levels(self, sprite: Sprite) -> list[Image.Image]:
        """The sprite at each size of `MIPMAPS`, as premultiplied "RGBa"."""


class Sprites:
    """
    The sprites of a world.

    Args:
        concepts (`dict[str, Concept]`): Those that are used, by name.
        styles (`dict[str, tuple[str, ...]]`):
            Style -> adjectives for it, the usual one first; the first style that a concept has is the one that is
            drawn where none is named.
        source ([`RasterSource`]): What draws them; sprites of other concepts in it are not used.
        tone_words (`str`, *optional*): What a tone is of, such as "skin tone".
        hints (`dict[str, tuple[str, ...]]`, *optional*): Style -> phrases that imply it.
    """

    def __init__(
        self,
        concepts: dict[str, Concept],
        styles: dict[str, tuple[str, ...]],
        source: RasterSource,
        *,
        tone_words: str = "",
        hints: dict[str, tuple[str, ...]] | None = None,
    ):
        self.concepts, self.styles, self.source = concepts, styles, source
        self.tone_words, self.hints = tone_words, hints or {}
        self.all = [sprite for sprite in source.numbers if sprite.concept in concepts]

    @cached_property
    def styles_of(self) -> dict[str, list[str]]:
        """Concept -> the styles that it is drawn in, in the order of preference."""
        found: dict[str, list[str]] = {name: [] for name in self.concepts}
        for sprite in self.all:
            if not sprite.tone:
                found[sprite.concept].append(sprite.style)
        order = list(self.styles)
        return {name: sorted(styles, key=order.index) for name, styles in found.items()}

    @cached_property
    def tones_of(self) -> dict[tuple[str, str], list[str]]:
        """(Concept, style) -> the tones that it is drawn in."""
        found: dict[tuple[str, str], list[str]] = {}
        for sprite in self.all:
            if sprite.tone:
                found.setdefault((sprite.concept, sprite.style), []).append(sprite.tone)
        return found

    @cached_property
    def held_out(self) -> frozenset[tuple[str, str]]:
        """
        The (concept, style) pairs that no training sees: one tenth, by a hash, at most one of a concept, and none of
        a concept with less than three styles.
        """
        pairs = set()
        for name, styles in self.styles_of.items():
            code = zlib.crc32(f"held out: {name}".encode())
            if len(styles) > 2 and code % 1000 < 1000 * HELD_OUT_SHARE * len(styles):
                pairs.add((name, styles[code // 1000 % len(styles)]))
        return frozenset(pairs)

    @cached_property
    def held_out_pairs(self) -> list[tuple[str, str]]:
        """`held_out` in an order."""
        return sorted(self.held_out)

    @cached_property
    def names(self) -> list[str]:
        """Names of all concepts."""
        return list(self.concepts)

    @cached_property
    def names_of_group(self) -> dict[str, list[str]]:
        """Group -> names of its concepts."""
        found: dict[str, list[str]] = {}
        for name, concept in self.concepts.items():
            found.setdefault(concept.group, []).append(name)
        return found

    @cached_property
    def seen_styles_of(self) -> dict[str, list[str]]:
        """Concept -> the styles in which training sees it."""
        return {
            name: [style for style in styles if (name, style) not in self.held_out]
            for name, styles in self.styles_of.items()
        }

    @cached_property
    def draw(self):
        """(sprite, pixels) -> the sprite at that size, premultiplied "RGBa"."""
        return lru_cache(maxsize=4096)(self._draw)

    def _draw(self, sprite: Sprite, size: int) -> Image.Image:
        levels = self.source.levels(sprite)
        image = next((level for level in levels if level.width >= size), levels[-1])
        return image if image.width == size else image.resize((size, size), Image.Resampling.BICUBIC)
