"""Random sprites, backgrounds and scenes of one row, and the words for them, from one seed."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from random import Random

from .captions import Speaker
from .dialect import Dialect
from .scene import CELLS, MAX_THINGS, Canvas, Scene, Thing, check_canvas, default_places, default_size, fits
from .sprites import Sprite, Sprites


_COUNTS = (1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4)
_HELD_OUT_PERCENT = 5


def is_held_out(key: object) -> bool:
    """Tell whether a sentence or a scene is held out for evaluation: one in twenty, by a hash of its text."""
    return zlib.crc32(str(key).encode()) % 100 < _HELD_OUT_PERCENT


@dataclass
class Context:
    """
    Samples of a row.

    Args:
        sprites ([`Sprites`]): Sprites of the world.
        rng (`Random`): Random numbers of the row.
        canvas (`tuple[int, int]`): Height and width of its images.
        people (`bool`, *optional*, defaults to `False`): How it is worded, see [`Speaker`].
        pool (`str`, *optional*, defaults to `"seen"`):
            "held_out": the first sprite that is asked for is of a pair that no training sees.
    """

    sprites: Sprites
    rng: Random
    canvas: Canvas
    people: bool = False
    pool: str = "seen"
    _first: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_canvas(self.canvas, self.dialect.sizes)

    @cached_property
    def say(self) -> Speaker:
        """The speaker that words the row."""
        return Speaker(self.sprites, self.rng, self.people)

    @property
    def dialect(self) -> Dialect:
        """The world's dialect."""
        return self.sprites.dialect

    def tones(self, sprite: Sprite) -> list[str]:
        """Return the tones in which a sprite's concept and style are drawn."""
        return self.sprites.tones_of.get((sprite.concept, sprite.style), [])

    def sprite(self, *, tone_rate: float = 0.2, other_than: tuple[str, ...] = ()) -> Sprite:
        """Sample a sprite, uniformly over the concepts that are not in `other_than`, then over their styles."""
        pool, self._first = self.pool if self._first else "seen", False
        while True:
            if pool == "held_out":
                concept, style = self.rng.choice(self.sprites.held_out_pairs)
            else:
                concept = self.rng.choice(self.sprites.names)
                style = self.rng.choice(self.seen_styles(concept))
            if concept not in other_than:
                return self.toned(Sprite(concept, style), tone_rate)

    def toned(self, sprite: Sprite, rate: float) -> Sprite:
        """Give the sprite a random tone with probability `rate`, if it has tones."""
        tones = self.tones(sprite)
        return replace(sprite, tone=self.rng.choice(tones)) if tones and self.say.maybe(rate) else sprite

    def seen_styles(self, concept: str, other_than: str = "") -> list[str]:
        """Return the styles of a concept that are not held out."""
        return [style for style in self.sprites.seen_styles_of[concept] if style != other_than]

    def different(self, count: int) -> list[Sprite]:
        """Sample sprites of `count` different concepts."""
        found: list[Sprite] = []
        while len(found) < count:
            found.append(self.sprite(other_than=tuple(sprite.concept for sprite in found)))
        return found

    def background(self, other_than: str = "") -> str:
        """Sample a background, often the default one."""
        usual = self.dialect.default_background
        if usual not in (None, other_than) and self.say.maybe(0.3):
            return usual
        return self.rng.choice([name for name in self.dialect.backgrounds if name != other_than])

    def arrange(self, sprites: Sequence[Sprite], background: str, places: Sequence[str] | None = None) -> Scene | None:
        """Place sprites, at random where no places are given, in the default size; return None if they do not fit."""
        places = places or self.rng.sample(list(CELLS), len(sprites))
        size = default_size(places, self.canvas, self.dialect.sizes)
        if size is None:
            return None
        pairs = zip(sprites, places, strict=True)
        return Scene(background, tuple(Thing(sprite, place, size) for sprite, place in pairs))

    def scene(self, count: int | None = None) -> Scene:
        """Sample a scene of one to four sprites, mostly at their default places and in their default size."""
        count = count or self.rng.choice(_COUNTS)
        too_many = count > self.dialect.most_different
        repeated = too_many or count > 1 and self.say.maybe(0.25)
        sprites = [self.sprite()] * count if repeated else self.different(count)
        if count == 3 and not repeated and self.say.maybe(0.3):
            sprites[1] = sprites[0]
        background = self.background()
        while True:
            usual = default_places(count, self.canvas) if too_many or self.say.maybe(0.6) else None
            scene = self.arrange(sprites, background, usual)
            if scene is not None:
                return self._resized(scene) if count <= 2 and self.say.maybe(0.15) else scene

    def _resized(self, scene: Scene) -> Scene:
        if len(self.dialect.sizes) == 1:
            return scene
        thing = self.rng.choice(scene.things)
        small = scene.with_thing(thing, replace(thing, size=self.rng.choice(("small", "medium"))))
        return small if fits(small.things, self.canvas) else scene

    def spread(self, count: int, *, room: int = 0) -> Scene:
        """Sample different sprites at random places, in a size that leaves room for `room` more."""
        sprites, background = self.different(count), self.background()
        while True:
            places = self.rng.sample(list(CELLS), min(MAX_THINGS, count + room))
            scene = self.arrange([*sprites, *sprites[:1] * (len(places) - count)], background, places)
            if scene is not None:
                return Scene(background, scene.things[:count])

    def free_places(self, scene: Scene, thing: Thing) -> list[str]:
        """Return the places where `thing` would overlap no other thing of the scene."""
        others = [other for other in scene.things if other != thing]
        places = [place for place in CELLS if place != thing.place]
        return [place for place in places if fits([*others, replace(thing, place=place)], self.canvas)]
