"""What a world is made of: concepts with words, drawn in styles. Knows nothing about scenes and sentences.

A sprite is a drawing of a concept in a style, perhaps with a tone. An emoji's style is the set of artwork that it is
from and its tone that of the skin; a coloured shape's style is its colour.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Protocol

from PIL import Image


if TYPE_CHECKING:
    from .dialect import Dialect


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
    """Draws sprites."""

    numbers: dict[Sprite, int]

    def draw(self, sprite: Sprite, size: int) -> Image.Image:
        """Return the sprite at a size in pixels, as premultiplied "RGBa"."""


class Sprites:
    """
    The sprites of a world.

    Args:
        concepts (`dict[str, Concept]`): Those that are used, by name.
        styles (`dict[str, tuple[str, ...]]`):
            Style -> adjectives for it, the usual one first; the first style that a concept has is the one that is
            drawn where none is named.
        source ([`RasterSource`]): What draws them; sprites of other concepts in it are not used.
        dialect ([`Dialect`]): Which scenes they are in, and the words for them.
        tone_words (`str`, *optional*): What a tone is of, such as "skin tone".
        hints (`dict[str, tuple[str, ...]]`, *optional*): Style -> phrases that imply it.
        usual_styles (`dict[str, str]`, *optional*): Concept -> the style that it has where none is named.
        holds_out (`bool`, *optional*, defaults to `True`): Whether some pairs are kept from training.
    """

    def __init__(
        self,
        concepts: dict[str, Concept],
        styles: dict[str, tuple[str, ...]],
        source: RasterSource,
        dialect: "Dialect",
        *,
        tone_words: str = "",
        hints: dict[str, tuple[str, ...]] | None = None,
        usual_styles: dict[str, str] | None = None,
        holds_out: bool = True,
    ):
        self.concepts, self.styles, self.source, self.dialect = concepts, styles, source, dialect
        self.usual_styles, self.holds_out = usual_styles or {}, holds_out
        self.tone_words, self.hints = tone_words, hints or {}
        self.all = [sprite for sprite in source.numbers if sprite.concept in concepts]

    @cached_property
    def styles_of(self) -> dict[str, list[str]]:
        """The styles of every concept, in the order of preference."""
        found: dict[str, list[str]] = {name: [] for name in self.concepts}
        for sprite in self.all:
            if not sprite.tone:
                found[sprite.concept].append(sprite.style)
        order = list(self.styles)
        return {
            name: sorted(styles, key=lambda style: (style != self.usual_styles.get(name), order.index(style)))
            for name, styles in found.items()
        }

    @cached_property
    def tones_of(self) -> dict[tuple[str, str], list[str]]:
        """The tones of every (concept, style)."""
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
            if self.holds_out and len(styles) > 2 and code % 1000 < 1000 * HELD_OUT_SHARE * len(styles):
                pairs.add((name, styles[code // 1000 % len(styles)]))
        return frozenset(pairs)

    @cached_property
    def held_out_pairs(self) -> list[tuple[str, str]]:
        """`held_out`, sorted."""
        return sorted(self.held_out)

    @cached_property
    def names(self) -> list[str]:
        """The names of all concepts."""
        return list(self.concepts)

    @cached_property
    def names_of_group(self) -> dict[str, list[str]]:
        """The names of the concepts of every group."""
        found: dict[str, list[str]] = {}
        for name, concept in self.concepts.items():
            found.setdefault(concept.group, []).append(name)
        return found

    @cached_property
    def seen_styles_of(self) -> dict[str, list[str]]:
        """The styles of every concept that are not held out."""
        return {
            name: [style for style in styles if (name, style) not in self.held_out]
            for name, styles in self.styles_of.items()
        }

    @cached_property
    def draw(self):
        """The source's `draw`, cached."""
        return lru_cache(maxsize=4096)(self.source.draw)


def scaled(levels: list[Image.Image], size: int) -> Image.Image:
    """Scale a sprite down from the next larger of its `MIPMAPS`."""
    image = next((level for level in levels if level.width >= size), levels[-1])
    return image if image.width == size else image.resize((size, size), Image.Resampling.BICUBIC)
