"""The language of a world: from a scene to words that settle it, and from a caption back to the scene.

A [`Speaker`] words everything, either cleanly (names, articles, small letters) or as people write: synonyms, no
articles, capitals, "please", full stops, any order.
"""

import re
from collections.abc import Sequence
from random import Random

from .scene import (
    CELLS,
    OPPOSITES,
    Canvas,
    Scene,
    Thing,
    default_places,
    default_size,
)
from .sprites import Sprite, Sprites


COUNT_WORDS = ("no", "one", "two", "three", "four")
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("medium-sized",), "large": ("large", "big", "huge")}
_RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_CLEAN_REQUESTS = ("{}", "{}", "a picture of {}", "draw {}")
_REQUESTS = (
    *("{}", "{}", "{}", "draw {}", "please draw {}", "{}, please", "{} please", "show me {}", "can you draw {}?"),
    *("I want {}", "I'd like a picture of {}", "make an image of {}", "an image of {}", "picture of {}"),
    *("give me {}", "could you make me a picture with {}?", "paint {}", "generate {}"),
)
_IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "ox": "oxen"}
_IRREGULAR |= {"foot": "feet", "tooth": "teeth", "leaf": "leaves", "wolf": "wolves", "knife": "knives"}
_IRREGULAR |= {"goose": "geese", "scarf": "scarves", "fish": "fish", "sheep": "sheep", "shrimp": "shrimp"}
_AFTER_HEAD = {"with", "without", "of", "in", "on", "behind", "and", "at", "for", "under", "over", "from", "to"}
_AFTER_ALL = {"up", "down", "together", "vertically", "horizontally"}


def head_index(words: Sequence[str]) -> int:
    """Find the word that takes the plural: `cat` in `cat with tears of joy`, `man` in `man shrugging`."""
    for index, word in enumerate(words[1:], 1):
        if word in _AFTER_HEAD or (word.endswith("ing") and words[index - 1] in (*_IRREGULAR, "face", "hands")):
            return index - 1
    return max(index for index, word in enumerate(words) if word not in _AFTER_ALL or not index)


def is_plural(name: str) -> bool:
    """Tell whether a name is a plural already: `chopsticks`, `crossed swords`."""
    words = name.split()
    head = words[head_index(words)]
    return head in _IRREGULAR.values() and head not in _IRREGULAR or bool(re.search(r"[^su'i]s$", head))


def plural(name: str) -> str:
    """Form the plural: `cats with tears of joy`, `foxes`, `cherries`."""
    if is_plural(name):
        return name
    words = name.split()
    index = head_index(words)
    head = words[index]
    if head.lower() in _IRREGULAR:
        words[index] = _IRREGULAR[head.lower()]
    elif re.search(r"[^aeiou]y$", head):
        words[index] = f"{head[:-1]}ies"
    else:
        words[index] = f"{head}es" if re.search(r"(s|x|z|ch|sh)$", head) else f"{head}s"
    return " ".join(words)


def with_article(words: str) -> str:
    """Add the article: `an octopus`, `a unicorn`, `chopsticks`."""
    if is_plural(words):
        return words
    first = words.split()[0].lower()
    vowel = first[0] in "aeiou" and not re.match(r"(uni|eu|use|one|ufo$)", first) or first.startswith("hour")
    return f"{'an' if vowel else 'a'} {words}"


def join_words(items: Sequence[str], last: str = " and ") -> str:
    """Join items as `a, b and c`."""
    return last.join(filter(None, (", ".join(items[:-1]), *items[-1:])))


class Speaker:
    """
    Words things.

    Args:
        sprites ([`Sprites`]): Sprites of the world.
        rng (`Random`): Chooses the words.
        people (`bool`, *optional*, defaults to `False`): As people write, else cleanly.
    """

    def __init__(self, sprites: Sprites, rng: Random, people: bool = False):
        self.sprites, self.rng, self.people = sprites, rng, people

    def choose(self, options: Sequence[str]) -> str:
        """Return the first option, which is the usual one; in people's wording any of them."""
        return self.rng.choice(options) if self.people else options[0]

    def maybe(self, chance: float) -> bool:
        """Return True with a probability."""
        return self.rng.random() < chance

    def name(self, concept: str) -> str:
        """Name a concept, in people's wording sometimes by a synonym."""
        others = self.sprites.concepts[concept].synonyms
        return self.rng.choice(others) if self.people and others and self.maybe(0.3) else concept

    def style(self, style: str) -> str:
        """Return an adjective for a style."""
        return self.choose(self.sprites.styles[style])

    def noun(self, sprite: Sprite, *, size: str = "", style: bool = True, tone: bool = True, count: int = 1) -> str:
        """Word a sprite without an article: `small flat octopus`, `octopus in flat style`, `three flat octopuses`."""
        words = self.name(sprite.concept)
        words = plural(words) if count > 1 else words
        if tone and sprite.tone:
            words = f"{words} with {sprite.tone} {self.sprites.tone_words}"
        if style:
            adjective = self.style(sprite.style)
            late = self.people and not self.sprites.dialect.names_styles and self.maybe(0.25)
            words = f"{words} in {adjective} style" if late else f"{adjective} {words}"
        if size:
            words = f"{self.size(size)} {words}"
        return f"{COUNT_WORDS[count]} {words}" if count > 1 else words

    def indefinite(self, sprite: Sprite, **parts) -> str:
        """Word a sprite with its article, which people sometimes leave out: `a small flat octopus`."""
        words = self.noun(sprite, **parts)
        bare = parts.get("count", 1) > 1 or self.people and self.maybe(0.3)
        return words if bare else with_article(words)

    def place(self, place: str) -> str:
        """Word a place: `in the top left corner`."""
        return self.choose(self.sprites.dialect.places[place])

    def place_name(self, place: str) -> str:
        """Name a place: `top left corner`."""
        return self.sprites.dialect.places[place][0].split(" the ")[1]

    def size(self, size: str) -> str:
        """Word a size: `small`, `tiny`."""
        return self.choose(_SIZE_WORDS[size])

    def relation(self, relation: str) -> str:
        """Word a relation: `to the left of`."""
        return self.choose(_RELATION_PHRASES[relation])

    def background(self, background: str) -> str:
        """Word a background: `a sky blue background`, `a gradient from pink to orange`."""
        if " to " in background:
            return self.choose((f"a {background} gradient background", f"a gradient from {background}"))
        return self.choose((f"{with_article(background)} background", background, f"{background} background"))

    def with_background(self, words: str, background: str) -> str:
        """Add the background after or before the other words."""
        phrase = self.background(background)
        if not self.people or self.maybe(0.6):
            return f"{words} on {phrase}"
        return self.rng.choice((f"on {phrase}, {words}", f"{words}, {phrase}", f"{words} in front of {phrase}"))

    def refer(self, scene: Scene, thing: Thing) -> str | None:
        """Name one thing of the scene and no other: `the octopus`, `the flat octopus`, `the octopus on the left`."""
        alike = [other for other in scene.things if other.sprite.concept == thing.sprite.concept]
        same_style = [other for other in alike if other.sprite.style == thing.sprite.style]
        name = self.name(thing.sprite.concept)
        if len(alike) == 1:
            return f"the {name}"
        if len(same_style) == 1:
            return f"the {self.style(thing.sprite.style)} {name}"
        return f"the {name} {self.place(thing.place)}" if len({t.place for t in alike}) == len(alike) else None

    def request(self, words: str) -> str:
        """Turn a description into a request."""
        return self.manner(self.fill(_REQUESTS if self.people else _CLEAN_REQUESTS, words))

    def fill(self, templates: Sequence[str], words: str) -> str:
        """Fill a random template; words that begin with the background come first in the sentence."""
        if words.startswith("on "):
            templates = [template for template in templates if template.startswith("{}")]
        return self.rng.choice(templates).format(words)

    def manner(self, text: str) -> str:
        """Vary capitals and full stops as people do; clean text stays as it is."""
        if not self.people:
            return text
        text = text[0].upper() + text[1:] if self.maybe(0.5) else text
        text = text.upper() if self.maybe(0.03) else text.lower() if self.maybe(0.2) else text
        return f"{text}{self.rng.choice(('.', '.', '!', ''))}" if text[-1].isalnum() and self.maybe(0.6) else text

    # ---- scenes

    def describe(self, scene: Scene, canvas: Canvas, *, background: bool = True) -> str:
        """Describe what is no default of the canvas, and some of what is, with or without the background."""
        places = [thing.place for thing in scene.things]
        usual = default_size(places, canvas, self.sprites.dialect.sizes)
        is_usual = tuple(places) == default_places(len(places), canvas)
        sizes = [
            thing.size if thing.size != usual or self.maybe(0.1) and len(self.sprites.dialect.sizes) > 1 else ""
            for thing in scene.things
        ]
        styles = [self._names_style(thing.sprite) for thing in scene.things]
        parts = [{"size": size, "style": style} for size, style in zip(sizes, styles)]
        if (relation := _facing(scene)) and self.maybe(0.5):
            words = self._related(scene, parts, relation)
        elif is_usual and (len(places) > self.sprites.dialect.most_different or not self.maybe(0.25)):
            words = self._in_line(scene, parts, canvas)
        else:
            words = self._placed(scene, parts)
        if background and (scene.background != self.sprites.dialect.default_background or self.maybe(0.15)):
            words = self.with_background(words, scene.background)
        return words

    def _names_style(self, sprite: Sprite) -> bool:
        return sprite.style != self.sprites.styles_of[sprite.concept][0] or self.maybe(0.5)

    def _related(self, scene: Scene, parts: list[dict], relation: str) -> str:
        order = self.rng.choice((1, -1))
        first, second = [self.indefinite(thing.sprite, **part) for thing, part in zip(scene.things, parts)][::order]
        return f"{first} {self.relation(relation if order == 1 else OPPOSITES[relation])} {second}"

    def _in_line(self, scene: Scene, parts: list[dict], canvas: Canvas) -> str:
        """List things in their usual order, and count neighbours that are alike."""
        groups: list[tuple[Sprite, dict, int]] = []
        for thing, part in zip(scene.things, parts):
            if groups and (groups[-1][0], groups[-1][1]["size"]) == (thing.sprite, part["size"]):
                groups[-1] = (*groups[-1][:2], groups[-1][2] + 1)
            else:
                groups.append((thing.sprite, part, 1))
        words = join_words([self.indefinite(sprite, **part, count=count) for sprite, part, count in groups])
        if len(groups) == 3 and self.maybe(0.3):
            words += " from left to right" if canvas[1] >= canvas[0] else " from top to bottom"
        return words

    def _placed(self, scene: Scene, parts: list[dict]) -> str:
        pairs = zip(scene.things, parts)
        things = [f"{self.indefinite(thing.sprite, **part)} {self.place(thing.place)}" for thing, part in pairs]
        self.rng.shuffle(things)
        return join_words(things)


def _facing(scene: Scene) -> str | None:
    """Return the relation of two things that face each other across the middle; it settles where they are."""
    pairs = {("left", "right"): "left of", ("top", "bottom"): "above"}
    pairs |= {places[::-1]: OPPOSITES[relation] for places, relation in pairs.items()}
    return pairs.get(tuple(thing.place for thing in scene.things))


def caption(sprites: Sprites, scene: Scene) -> str:
    """Write the full caption of a scene: things in reading order, each with style and place, then the background."""
    speaker = Speaker(sprites, Random(0))
    last, joint = sprites.dialect.caption_joints
    things = sorted(scene.things, key=lambda thing: CELLS[thing.place])
    sizes = [thing.size if thing.size in ("small", "large") else "" for thing in things]
    nouns = [with_article(speaker.noun(thing.sprite, size=size)) for thing, size in zip(things, sizes)]
    words = join_words([f"{noun} {speaker.place(thing.place)}" for noun, thing in zip(nouns, things)], last)
    return f"{words}{joint}{speaker.background(scene.background)}"


def read_caption(sprites: Sprites, text: str) -> Scene | None:
    """Parse a caption of the form that [`caption`] writes into its scene; return None for other text."""
    speaker = Speaker(sprites, Random(0))
    last, joint = sprites.dialect.caption_joints
    words, _, ground = text.strip(" .\n").rpartition(joint)
    grounds = {speaker.background(name): name for name in sprites.dialect.backgrounds}
    places = {phrases[0]: place for place, phrases in sprites.dialect.places.items()}
    pattern = re.compile(
        rf"(?:an? )?(?:(small|large) )?({'|'.join(words[0] for words in sprites.styles.values())}) (.+?)"
        rf"(?: with (\S+) {sprites.tone_words or '-'})? ({'|'.join(places)})"
    )
    styles = {words[0]: style for style, words in sprites.styles.items()}
    found = [pattern.fullmatch(item) for item in re.split(f", |{last}", words)]
    if ground not in grounds or not all(found) or any(match[3] not in sprites.concepts for match in found):
        return None
    things = (
        Thing(
            Sprite(match[3], styles[match[2]], match[4] or ""),
            places[match[5]],
            match[1] or sprites.dialect.usual_size,
        )
        for match in found
    )
    return Scene(grounds[ground], tuple(things))
