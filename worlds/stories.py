"""Several images in a row: stories that a request settles, and example pairs that show a rule nobody says."""

from dataclasses import dataclass

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
    """A random story of `kind` (any where None) in two to four images."""
    kind = kind or context.rng.choice(list(STORIES))
    text, scenes, events = {**STORIES, **context.sprites.dialect.stories}[kind](context)
    openings = ("first", *["then"] * (len(scenes) - 2), "in the end")
    sentences = tuple(f"{opening}, {event}." for opening, event in zip(openings, events, strict=True))
    request = context.say.choose(("a story: {}", "tell and draw a story: {}", "show me how {}", "story: {}", "{}"))
    return Story(kind, context.say.manner(request.format(text)), scenes, sentences)


Told = tuple[str, tuple[Scene, ...], list[str]]


def _series(context: Context, options: list[str]) -> list[str]:
    return context.rng.sample(options, min(len(options), context.rng.choice((2, 3))))


def _moves(context: Context) -> Told:
    sprite, background, path = context.sprite(), context.background(), list(context.rng.choice(_PATHS))
    path = path[:: context.rng.choice((1, -1))]
    scenes = tuple(Scene(background, (Thing(sprite, place, context.sprites.dialect.usual_size),)) for place in path)
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
    styles = [first.style, *_series(context, others)]
    background = context.background()
    scenes = tuple(_alone(context, Sprite(first.concept, style), background) for style in styles)
    words = [context.say.style(style) for style in styles]
    plain = Sprite(first.concept, first.style)
    text = (
        f"{context.say.indefinite(plain)} on {context.say.background(background)} turns {' and then '.join(words[1:])}"
    )
    return text, scenes, [f"it is {word}" for word in words]


def _appear(context: Context) -> Told:
    return _one_by_one(context, "appear", lambda things, index: things[: index + 1])


def _vanish(context: Context) -> Told:
    return _one_by_one(context, "vanish", lambda things, index: things[index:])


def _one_by_one(context: Context, verb: str, shown) -> Told:
    sprites, background = context.different(context.rng.choice((2, 3))), context.background()
    places = default_places(len(sprites), context.canvas)
    full = context.arrange(sprites, background, places)
    nouns = [context.say.indefinite(sprite) for sprite in sprites]
    text = f"{join_words(nouns)} {verb} one by one on {context.say.background(background)}"
    scenes = tuple(Scene(background, shown(full.things, index)) for index in range(len(sprites)))
    return text, scenes, [f"there is {_names(scene)}" for scene in scenes]


def _names(scene: Scene) -> str:
    return " and ".join(with_article(thing.sprite.concept) for thing in scene.things)


def _changes_background(context: Context) -> Told:
    sprite, first = context.sprite(), context.background()
    second = context.background(other_than=first)
    backgrounds = [first, second]
    text = f"the background of {context.say.indefinite(sprite)} turns from {first} into {second}"
    return (
        text,
        tuple(_alone(context, sprite, name) for name in backgrounds),
        [f"the background is {name}" for name in backgrounds],
    )


def _alone(context: Context, sprite: Sprite, background: str) -> Scene:
    return Scene(background, (Thing(sprite, "middle", context.sprites.dialect.sizes[-1]),))


STORIES = {
    "move": _moves,
    "become": _becomes,
    "restyle": _restyles,
    "appear": _appear,
    "vanish": _vanish,
    "background": _changes_background,
}


@dataclass(frozen=True)
class ExamplePair:
    """A pair of scenes before and after a rule of `RULES`, another scene, and that one after the rule."""

    rule: str
    scenes: tuple[Scene, Scene, Scene, Scene]


RULES = ("style", "background", "move", "resize", "tone")


def sample_examples(context: Context) -> ExamplePair:
    """`A is to B as C is to`: the rule changes one thing to one value, in both pairs the same."""
    while True:
        edit = sample_edit(
            context,
            context.rng.choice(
                [rule for rule in RULES if rule in context.sprites.dialect.edits and _can(context, rule)]
            ),
        )
        pair = _apply_alike(context, edit)
        if pair is not None:
            return ExamplePair(edit.kind, (*pair, edit.source, edit.target))


def _can(context: Context, rule: str) -> bool:
    return rule != "tone" or bool(context.sprites.tones_of) and context.pool == "seen"


def _apply_alike(context: Context, edit: Edit) -> tuple[Scene, Scene] | None:
    """Another scene before and after what the edit does, if it has but one thing and the rule applies to it."""
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
    sprites = [Sprite(concept, thing.sprite.style, thing.sprite.tone) for thing in (old, new)]
    background = context.background()
    return tuple(Scene(background, (Thing(s, t.place, t.size),)) for s, t in zip(sprites, (old, new)))


def _concept_with(context: Context, *things: Thing) -> str | None:
    """Another concept that training sees in the styles and tones of all of them."""
    for _ in range(50):
        concept = context.rng.choice(context.sprites.names)
        seen = context.sprites.seen_styles_of[concept]
        looks = [thing.sprite for thing in things]
        toned = all(not s.tone or s.tone in context.sprites.tones_of.get((concept, s.style), ()) for s in looks)
        if concept != looks[0].concept and all(s.style in seen for s in looks) and toned:
            return concept
    return None
