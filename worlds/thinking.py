"""Prompts that only imply the image, the reasoning behind them, conversations of several turns, and text alone."""

from dataclasses import dataclass

from .captions import COUNT_WORDS, Speaker, plural, with_article
from .edits import sample_edit
from .questions import Question, sample_questions
from .sampling import Context
from .scene import COLORS, OPPOSITES, Scene, default_places


_PLACE_HINTS = {"top": "twelve", "right": "three", "bottom": "six", "left": "nine"}  # on the face of a clock


@dataclass(frozen=True)
class Implied:
    """What the user says, what its hints mean, the prompt without hints, and the scene."""

    text: str
    reasoning: str
    explicit: str
    scene: Scene


def sample_implied(context: Context) -> Implied:
    """Sample a prompt with one or two hints, for a number or a place, a background, or a style."""
    say, rng, dialect = context.say, context.rng, context.dialect
    sprite = context.sprite(tone_rate=0)
    kinds = rng.sample(dialect.implied, rng.choice((1, 1, 2)))
    if {"number", "place"} <= set(kinds):
        kinds.remove("place")
    if not context.sprites.hints:
        kinds = [kind for kind in kinds if kind != "style"] or ["background"]
    thoughts = []
    style, name = f"{say.style(sprite.style)} ", say.name(sprite.concept)
    late_style = ""
    if "style" in kinds:
        hint = rng.choice(context.sprites.hints[sprite.style])
        style = ""
        thoughts.append(dialect.style_thought.format(hint=hint, style=context.sprites.styles[sprite.style][0]))
        late_style = f" {dialect.style_hint.format(hint)}"
    count, place = 1, None
    words = explicit = with_article(f"{style}{name}")
    if "number" in kinds:
        count = rng.choice(list(dialect.count_hints))
        hint = rng.choice(dialect.count_hints[count])
        thoughts.append(f"{hint} is {COUNT_WORDS[count]}")
        words = dialect.implied_number.format(things=f"{style}{plural(name)}", number=hint)
    words += late_style
    if "place" in kinds:
        place = rng.choice(list(_PLACE_HINTS))
        hint = f"where a clock has the {_PLACE_HINTS[place]}"
        thoughts.append(f"{hint} is the {place}")
        words += f" {hint}"
    background = context.background()
    if "background" in kinds:
        background = rng.choice([name for name in COLORS if name in dialect.backgrounds])
        hint = rng.choice(dialect.color_things[background])
        thoughts.append(f"the color of {hint} is {background}")
        words += f" on a background in the color of {hint}"
    else:
        words += f" on {say.background(background)}"
    clean = Speaker(context.sprites, rng)
    explicit = clean.indefinite(sprite, count=count) + (f" {clean.place(place)}" if place else "")
    explicit += f" on {clean.background(background)}"
    places = (place,) if place else default_places(count, context.canvas)
    scene = context.arrange([sprite] * count, background, places)
    if scene is None:
        return sample_implied(context)
    return Implied(say.manner(words), ", ".join(thoughts), explicit, scene)


@dataclass(frozen=True)
class Conversation:
    """Turns: (what the user says, a scene or a text as the answer)."""

    turns: tuple[tuple[str, Scene | str], ...]
    kinds: tuple[str, ...]


def sample_conversation(context: Context) -> Conversation:
    """Sample a conversation of four or five turns about one image: draw, ask, change, ask again."""
    scene = context.scene(context.rng.choice((1, 1, 2, 2, 3)))
    turns: list[tuple[str, Scene | str]] = [(context.say.request(context.say.describe(scene, context.canvas)), scene)]
    kinds = ["draw"]
    while len(turns) < 4 or len(turns) < 5 and context.say.maybe(0.3):
        if len(turns) % 2:
            question: Question | None = next(iter(sample_questions(context, scene, 1)), None)
            if question is None:
                return sample_conversation(context)
            turns.append((question.text, question.answer))
            kinds.append(question.kind)
        else:
            edit = sample_edit(context, source=scene)
            scene = edit.target
            turns.append((edit.instruction, scene))
            kinds.append(edit.kind)
    return Conversation(tuple(turns), tuple(kinds))


def sample_text(context: Context) -> str:
    """Sample a few sentences without an image: synonyms, groups, and what follows from where things are."""
    return " ".join(context.rng.choice(_TEXTS)(context) for _ in range(context.rng.randint(1, 3)))


def _synonym(context: Context) -> str:
    concept = context.sprites.concepts[context.rng.choice(context.sprites.names)]
    if not concept.synonyms:
        return _group(context)
    return f"Another name for {with_article(concept.name)} is {context.rng.choice(concept.synonyms)}."


def _group(context: Context) -> str:
    name = context.rng.choice(context.sprites.names)
    group = context.sprites.concepts[name].group.replace("-", " and ")
    return f"{with_article(name).capitalize()} belongs to {group}." if group else f"There is {with_article(name)}."


def _inference(context: Context) -> str:
    first, second = (with_article(sprite.concept) for sprite in context.different(2))
    relation = context.rng.choice(list(OPPOSITES))
    return f"If {first} is {relation} {second}, then {second} is {OPPOSITES[relation]} {first}."


def _description(context: Context) -> str:
    scene = context.scene()
    words = Speaker(context.sprites, context.rng).describe(scene, context.canvas)
    number = COUNT_WORDS[len(scene.things)]
    return f"A picture of {words} shows {number} thing{'' if number == 'one' else 's'}."


_TEXTS = (_synonym, _group, _inference, _description)
