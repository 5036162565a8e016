"""Questions about a scene, each with its one right answer."""

from collections.abc import Callable
from dataclasses import dataclass

from .captions import COUNT_WORDS, plural, with_article
from .sampling import Context
from .scene import CELLS, RELATIONS, Scene, Thing
from .sprites import Sprite


@dataclass(frozen=True)
class Question:
    """A question of one of `KINDS`, and the answer."""

    kind: str
    text: str
    answer: str


Asked = tuple[str, str] | None


def is_same(text: str, answer: str) -> bool:
    """Compare an answer with the right one, ignoring case, spaces, articles and a full stop."""

    def plain(words: str) -> list[str]:
        return [word for word in words.lower().strip(" .!\n").split() if word not in ("a", "an", "the")]

    return plain(text) == plain(answer)


def sample_questions(context: Context, scene: Scene, count: int) -> list[Question]:
    """Sample up to `count` different questions about a scene."""
    found: dict[str, Question] = {}
    for _ in range(4 * count):
        kind = context.rng.choice(list(_ASK))
        asked = _ASK[kind](context, scene)
        if asked is not None and len(found) < count:
            text = context.say.manner(f"{asked[0]}{context.dialect.question_end}")
            found.setdefault(asked[0].lower(), Question(kind, text, asked[1]))
    return list(found.values())


def _concept(context: Context, scene: Scene) -> Asked:
    thing = context.rng.choice(scene.things)
    named = thing.sprite.concept if context.dialect.names_styles else with_article(thing.sprite.concept)
    if len(scene.things) == 1 and not context.dialect.names_styles:
        return context.say.choose(("what is this", "what do you see")), named
    return context.dialect.what_is.format(place=context.say.place(thing.place)), named


def _only(context: Context, scene: Scene) -> tuple[Thing, str | None]:
    """Sample a thing, and its name if no other thing has its concept."""
    thing = context.rng.choice(scene.things)
    name = context.say.refer(scene, thing)
    return thing, name if sum(t.sprite.concept == thing.sprite.concept for t in scene.things) == 1 else None


def _style(context: Context, scene: Scene) -> Asked:
    thing, name = _only(context, scene)
    return (
        (context.dialect.style_is.format(thing=name), context.sprites.styles[thing.sprite.style][0]) if name else None
    )


def _background(context: Context, scene: Scene) -> Asked:
    return context.say.choose(("what color is the background", "which background is it")), scene.background


def _count(context: Context, scene: Scene) -> Asked:
    if context.say.maybe(0.4):
        return context.say.choose(context.dialect.how_many), COUNT_WORDS[len(scene.things)]
    concept = context.rng.choice(scene.things).sprite.concept
    count = sum(thing.sprite.concept == concept for thing in scene.things)
    return f"how many {plural(context.say.name(concept))} are there", COUNT_WORDS[count]


def _existence(context: Context, scene: Scene) -> Asked:
    """Ask whether a concept is there, as often yes as no; absent ones are often of the same group."""
    if context.dialect.names_styles:
        return _existence_of_sprite(context, scene)
    concept, answer = context.rng.choice(scene.things).sprite.concept, "yes"
    if context.say.maybe(0.5):
        group = context.sprites.concepts[concept].group
        options = context.sprites.names if context.say.maybe(0.5) else context.sprites.names_of_group[group]
        concept, answer = context.rng.choice(options), "no"
        if any(thing.sprite.concept == concept for thing in scene.things):
            return None
    return f"is there {with_article(context.say.name(concept))}", answer


def _existence_of_sprite(context: Context, scene: Scene) -> Asked:
    """Ask whether a sprite is there; an absent one shares its concept or its style with one that is."""
    there = {thing.sprite for thing in scene.things}
    sprite, answer = context.rng.choice(scene.things).sprite, "yes"
    if context.say.maybe(0.5):
        alike = [other for other in context.sprites.all if other not in there]
        alike = [other for other in alike if other.concept == sprite.concept or other.style == sprite.style]
        sprite, answer = context.rng.choice(alike), "no"
    return f"is there {_called(context, sprite)}", answer


def _called(context: Context, sprite: Sprite) -> str:
    """Name a sprite: `an octopus`, or `a red circle` where styles are named."""
    style = f"{context.sprites.styles[sprite.style][0]} " if context.dialect.names_styles else ""
    return with_article(f"{style}{sprite.concept}")


def _place(context: Context, scene: Scene) -> Asked:
    thing, name = _only(context, scene)
    return (f"where is {name}", context.dialect.places[thing.place][0]) if name else None


def _relation(context: Context, scene: Scene) -> Asked:
    """Ask for the one thing that lies in a straight line on one side of another."""
    thing, relation = context.rng.choice(scene.things), context.rng.choice(list(RELATIONS))
    beyond = [other for other in scene.things if is_related(other, relation, thing)]
    name = context.say.refer(scene, thing)
    if name is None or len(beyond) != 1:
        return None
    return f"what is {context.say.relation(relation)} {name}", _called(context, beyond[0].sprite)


def is_related(first: Thing, relation: str, second: Thing) -> bool:
    """Tell whether a relation holds between two things of one row or column."""
    axis = 0 if RELATIONS[relation][0] else 1
    here, there = CELLS[first.place], CELLS[second.place]
    return (here[axis] - there[axis]) * RELATIONS[relation][axis] > 0 and here[1 - axis] == there[1 - axis]


_ASK: dict[str, Callable[[Context, Scene], Asked]] = {
    "concept": _concept,
    "style": _style,
    "background": _background,
    "count": _count,
    "existence": _existence,
    "place": _place,
    "relation": _relation,
}
KINDS = tuple(_ASK)
