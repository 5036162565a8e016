"""Several images in a row: stories that a request determines, and example pairs that show an unsaid rule."""

from dataclasses import dataclass, replace
from functools import partial

from .captions import join_words, with_article
from .edits import Edit, sample_edit
from .sampling import Context
from .scene import Scene, Thing, default_places
from .sprites import Sprite


@dataclass(frozen=True)
class Story:
    """A request of one of `STORIES`, the scenes that it asks for in order, and a sentence before each."""

    kind: str
    text: str
    scenes: tuple[Scene, ...]
    sentences: tuple[str, ...]


_PATHS = (
    ("left", "middle", "right"),
    ("top", "middle", "bottom"),
    ("top left corner", "middle", "bottom right corner"),
)


def sample_story(context: Context, kind: str | None = None) -> Story:
    """Sample a story of `kind` (any where None) in two to four images."""
    kind = kind or context.rng.choice(list(STORIES))
    text, scenes, events = {**STORIES, **context.dialect.stories}[kind](context)
    openings = ("first", *["then"] * (len(scenes) - 2), "in the end")
    sentences = tuple(f"{opening}, {event}." for opening, event in zip(openings, events, strict=True))
    request = context.say.choose(("a story: {}", "tell and draw a story: {}", "show me how {}", "story: {}", "{}"))
    return Story(kind, context.say.manner(request.format(text)), scenes, sentences)


Told = tuple[str, tuple[Scene, ...], list[str]]


def _moves(context: Context) -> Told:
    sprite, background, path = context.sprite(), context.background(), list(context.rng.choice(_PATHS))
    path = path[:: context.rng.choice((1, -1))]
    scenes = tuple(Scene(background, (Thing(sprite, place, context.dialect.usual_size),)) for place in path)
    hero = context.say.indefinite(sprite)
    text = f"{hero} on {context.say.background(background)} moves from the {path[0]} to the {path[-1]}"
    return text, scenes, [f"it is {context.say.place(place)}" for place in path]


def _becomes(context: Context) -> Told:
    sprites, background = context.different(context.rng.choice((2, 3))), context.background()
    scenes = tuple(_alone(context, sprite, background) for sprite in sprites)
    first, *others = (context.say.indefinite(sprite) for sprite in sprites)
    text = f"{first} on {context.say.background(background)} turns into {' and then '.join(others)}"
    return text, scenes, [f"it is {with_article(sprite.concept)}" for sprite in sprites]


def _restyles(context: Context) -> Told:
    first = context.sprite()
    others = context.seen_styles(first.concept, first.style)
    styles = [first.style, *context.rng.sample(others, min(len(others), context.rng.choice((2, 3))))]
    background = context.background()
    scenes = tuple(_alone(context, Sprite(first.concept, style), background) for style in styles)
    words = [context.say.style(style) for style in styles]
    hero = context.say.indefinite(replace(first, tone=""))
    text = f"{hero} on {context.say.background(background)} turns {' and then '.join(words[1:])}"
    return text, scenes, [f"it is {word}" for word in words]


def _one_by_one(context: Context, verb: str, shown) -> Told:
    sprites, background = context.different(context.rng.choice((2, 3))), context.background()
    places = default_places(len(sprites), context.canvas)
    full = context.arrange(sprites, background, places)
    nouns = [context.say.indefinite(sprite) for sprite in sprites]
    text = f"{join_words(nouns)} {verb} one by one on {context.say.background(background)}"
    scenes = tuple(Scene(background, shown(full.things, index)) for index in range(len(sprites)))
    names = [" and ".join(with_article(thing.sprite.concept) for thing in scene.things) for scene in scenes]
    return text, scenes, [f"there is {name}" for name in names]


def _changes_background(context: Context) -> Told:
    sprite, first = context.sprite(), context.background()
    names = (first, context.background(other_than=first))
    text = f"the background of {context.say.indefinite(sprite)} turns from {names[0]} into {names[1]}"
    scenes = tuple(_alone(context, sprite, name) for name in names)
    return text, scenes, [f"the background is {name}" for name in names]


def _alone(context: Context, sprite: Sprite, background: str) -> Scene:
    return Scene(background, (Thing(sprite, "middle", context.dialect.sizes[-1]),))


STORIES = {
    "move": _moves,
    "become": _becomes,
    "restyle": _restyles,
    "appear": partial(_one_by_one, verb="appear", shown=lambda things, index: things[: index + 1]),
    "vanish": partial(_one_by_one, verb="vanish", shown=lambda things, index: things[index:]),
    "background": _changes_background,
}


@dataclass(frozen=True)
class ExamplePair:
    """Two scenes before and after a rule of `RULES`, and two others before and after the same rule."""

    rule: str
    scenes: tuple[Scene, Scene, Scene, Scene]


RULES = ("style", "background", "move", "resize", "tone")


def sample_examples(context: Context) -> ExamplePair:
    """Sample `A is to B as C is to`: in both pairs, the rule changes one thing to the same value."""
    can = [rule for rule in RULES if rule in context.dialect.edits]
    if context.pool == "held_out" or not context.sprites.tones_of:
        can = [rule for rule in can if rule != "tone"]
    while True:
        edit = sample_edit(context, context.rng.choice(can))
        if pair := _apply_alike(context, edit):
            return ExamplePair(edit.kind, (*pair, edit.source, edit.target))


def _apply_alike(context: Context, edit: Edit) -> tuple[Scene, Scene] | None:
    """Apply the change of an edit to another scene of one thing; return None where it does not apply."""
    if len(edit.target.things) != 1:
        return None
    (old,), (new,) = edit.source.things, edit.target.things
    if edit.kind == "background":
        sprite = context.sprite(other_than=(old.sprite.concept,))
        background = context.background(other_than=edit.target.background)
        return _alone(context, sprite, background), _alone(context, sprite, edit.target.background)
    concept = _concept_with(context, old, new)
    if concept is None:
        return None
    background = context.background()
    things = [replace(thing, sprite=replace(thing.sprite, concept=concept)) for thing in (old, new)]
    return tuple(Scene(background, (thing,)) for thing in things)


def _concept_with(context: Context, *things: Thing) -> str | None:
    """Sample another concept that training sees in the styles and tones of all these things."""
    for _ in range(50):
        concept = context.rng.choice(context.sprites.names)
        seen = context.sprites.seen_styles_of[concept]
        looks = [thing.sprite for thing in things]
        toned = all(not s.tone or s.tone in context.tones(Sprite(concept, s.style)) for s in looks)
        if concept != looks[0].concept and all(s.style in seen for s in looks) and toned:
            return concept
    return None
