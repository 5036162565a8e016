"""The emoji world: what emojibase names and at least three of five sets of artwork draw.

Credits: Noto Emoji, now and of 2013 to 2017 ("blob"), by Google (Apache-2.0); Fluent Emoji, "glossy" and flat, by
Microsoft (MIT); Firefox OS Emoji by Mozilla (Apache-2.0); all as packed by Iconify. Words: Emojibase by Miles Johnson
(MIT).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random

from PIL import Image

from .artwork import STYLES, Rasters, fetch_archives, read_artwork
from .dialect import Dialect
from .sprites import Concept, Sprites


_STYLE_WORDS = {
    "noto": ("noto", "google"),
    "glossy": ("glossy", "3D", "shiny"),
    "flat": ("flat",),
    "blob": ("blob", "old android"),
    "firefox": ("firefox", "mozilla"),
}
_HINTS = {
    "noto": ("as on a new android phone",),
    "glossy": ("with a shine and soft shadows",),
    "flat": ("without any shading",),
    "blob": ("as on an old android phone",),
    "firefox": ("as in the browser with the fox",),
}
_ORDER_SEED = 20260114
JUDGE = "data/emoji/judge"  # what `nextflow-hf world emoji --judge data/emoji/judge` writes
LIST = Path(__file__).with_name("emoji_concepts.txt")


def concept_order(concepts: dict[str, Concept]) -> list[str]:
    """Shuffle all concepts with a fixed seed, so that the first n are a random sample."""
    order = sorted(concepts, key=lambda name: concepts[name].code)
    Random(_ORDER_SEED).shuffle(order)
    return order


def load(folder: Path, *, artwork: Path | None = None, concepts: int | None = None) -> Sprites:
    """
    The sprites, rendered below `folder` where they are not there yet.

    Args:
        folder (`Path`): Folder of the world's data.
        artwork (`Path`, *optional*): Folder with the archives; what it lacks is fetched by `npm pack` into it.
        concepts (`int`, *optional*): The first so many of the committed list. Defaults to all.
    """
    found, drawings = read_artwork(fetch_archives(artwork or folder / "artwork"))
    listed = [line.split("\t")[1] for line in LIST.read_text(encoding="utf-8").splitlines()]
    if listed != concept_order(found):
        raise ValueError(f"{LIST.name} has {len(listed)} concepts, which are not the {len(found)} of the artwork")
    return make_sprites({name: found[name] for name in listed[:concepts]}, Rasters(folder / "sprites", drawings))


def make_sprites(concepts: dict[str, Concept], source: Rasters) -> Sprites:
    """Make the sprites of rendered artwork."""
    words = {style: _STYLE_WORDS[style] for style in STYLES}
    return Sprites(concepts, words, source, Dialect(), tone_words="skin tone", hints=_HINTS)


class Reward:
    """
    For GRPO (`nextflow_hf.worlds.emoji:Reward`): see [`~judge.reward`].

    Args:
        judge (`str`): Folder of the judge.
    """

    __name__ = "emoji"  # TRL logs it

    def __init__(self, judge: str = JUDGE):
        from .judge import Judge  # needs torch

        self.judge = Judge(Path(judge))

    def __call__(
        self,
        images: Sequence[Image.Image],
        scenes: Sequence[Sequence[str]],
        report_masks: Callable | None = None,
        **columns,
    ) -> list[float]:
        from .judge import looked_at, reward

        if report_masks is not None:
            report_masks([looked_at(image, of_row) for image, of_row in zip(images, scenes, strict=True)])
        return reward(self.judge, images, scenes)


def suite(folder: str = "data/emoji", judge: str = JUDGE, concepts: int | None = None, **options):
    """Make the suite of a world's folder and judge; `options` are those of [`~suite.WorldSuite`]."""
    from ..training.evaluation.suite import bind
    from .judge import Judge
    from .suite import WorldSuite

    return bind("emoji", partial(WorldSuite, load(Path(folder), concepts=concepts), Judge(Path(judge))), options)
