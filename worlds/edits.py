"""Instructions that change one thing of a scene and keep the rest, and subjects to be shown in another scene."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .captions import COUNT_WORDS, Speaker
from .sampling import Context
from .scene import CELLS, RELATIONS, Canvas, Scene, Thing, box, default_places, fits
from .sprites import Sprite


INSTRUCTIONS = {
    "style": ("make {thing} {style}", "draw {thing} in {style} style", "turn {thing} into {style} style"),
    "replace": ("replace {thing} with {new}", "turn {thing} into {new}", "{new} instead of {thing}"),
    "background": (
        *("change the background to {background}", "make the background {background}"),
        *("put everything on {background}", "use {background} as the background"),
        "set the background to {background}",
    ),
    "add": ("add {new} {where}", "put {new} {where}", "draw {new} {where}"),
    "remove": ("remove {thing}", "delete {thing}", "take {thing} away", "erase {thing}"),
    "move": ("move {thing} to the {place}", "put {thing} {where}", "place {thing} {where}"),
    "resize": ("make {thing} {size}", "draw {thing} {size}", "{thing} should be {size}"),
    "tone": ("give {thing} {tone}", "make it {thing} with {tone}", "change {thing} to {tone}"),
    "swap": ("swap {first} and {second}", "exchange {first} and {second}", "swap {first} with {second}"),
    "count": ("make it {new}", "there should be {new}", "draw {new} in place of {old}"),
}


@dataclass(frozen=True)
class Edit:
    """An instruction of a kind, and the scenes before and after it."""

    kind: str
    instruction: str
    source: Scene
    target: Scene


def changed_boxes(source: Scene, target: Scene, canvas: Canvas) -> list[tuple[int, int, int]] | None:
    """Return the boxes (left, top, side) in which two scenes differ; None if their backgrounds differ."""
    if source.background != target.background:
        return None
    return [box(thing, canvas) for thing in {*source.things} ^ {*target.things}]


def sample_edit(context: Context, kind: str | None = None, source: Scene | None = None) -> Edit:
    """
    A random edit of `kind` (any where None), of a scene that is made for it, or of `source`: then of a kind that it
    allows.
    """
    while True:
        chosen = kind or context.rng.choice(context.dialect.edits)
        found = _EDITS[chosen](context, source)
        if found is None:
            continue
        before, after, words = found
        template = context.say.choose({**INSTRUCTIONS, **context.dialect.instructions}[chosen])
        if None not in words.values() and before != after:
            return Edit(chosen, context.say.manner(template.format(**words)), before, after)


Found = tuple[Scene, Scene, dict[str, str | None]] | None  # before, after, and the words of the instruction


def _subject(context: Context, source: Scene | None, *, room: int = 0) -> tuple[Scene, Thing]:
    """Return a scene and the thing in it that will change."""
    scene = source or context.spread(min(context.rng.choice((1, 1, 2, 3)), context.dialect.most_different), room=room)
    return scene, scene.things[0] if source is None else context.rng.choice(scene.things)


def _name(say: Speaker, scene: Scene, thing: Thing) -> str | None:
    return "it" if say.people and len(scene.things) == 1 and say.maybe(0.5) else say.refer(scene, thing)


def _style(context: Context, source: Scene | None) -> Found:
    """Change the style of a thing; a held-out style is always the new one."""
    scene, thing = _subject(context, source)
    sprite = thing.sprite
    others = context.seen_styles(sprite.concept, sprite.style)
    if not others:
        return None
    other = replace(thing, sprite=Sprite(sprite.concept, context.rng.choice(others)))
    plain = replace(thing, sprite=Sprite(sprite.concept, sprite.style))
    if source is None:  # the first sprite of a context may be held out: it is to be drawn
        before, after, new = scene.with_thing(thing, other), scene.with_thing(thing, plain), plain
        thing = other
    else:
        before, after, new = scene, scene.with_thing(thing, other), other
    if len({t.sprite.concept for t in before.things}) < len(before.things):
        return None
    words = {"thing": _name(context.say, before, thing), "style": context.say.style(new.sprite.style)}
    return before, after, words


def _replace(context: Context, source: Scene | None) -> Found:
    new = context.sprite()
    scene, thing = _subject(context, source)
    if any(new.concept == other.sprite.concept for other in scene.things):
        return None
    words = {"thing": _name(context.say, scene, thing), "new": context.say.indefinite(new)}
    return scene, scene.with_thing(thing, replace(thing, sprite=new)), words


def _background(context: Context, source: Scene | None) -> Found:
    scene = source or context.scene()
    background = context.background(other_than=scene.background)
    words = {"background": context.say.background(background), "name": background}
    return scene, replace(scene, background=background), words


def _add(context: Context, source: Scene | None) -> Found:
    new = context.sprite()
    scene, anchor = _subject(context, source, room=1)
    if len(scene.things) >= len(COUNT_WORDS) - 1 or any(new.concept == t.sprite.concept for t in scene.things):
        return None
    free = context.free_places(scene, Thing(new, "", anchor.size))
    if not free:
        return None
    place = context.rng.choice(free)
    row, column = CELLS[anchor.place]
    beside = [name for name, (down, right) in RELATIONS.items() if CELLS[place] == (row + down, column + right)]
    where = context.say.place(place)
    if beside and context.say.maybe(0.7):
        name = context.say.refer(scene, anchor)
        where = f"{context.say.relation(beside[0])} {name}" if name else None
    words = {"new": context.say.indefinite(new), "where": where}
    return scene, replace(scene, things=(*scene.things, Thing(new, place, anchor.size))), words


def _remove(context: Context, source: Scene | None) -> Found:
    scene = source or context.spread(min(context.rng.choice((2, 2, 3, 4)), context.dialect.most_different))
    if len(scene.things) < 2:
        return None
    thing = context.rng.choice(scene.things[1:])  # the first stays: it may be the one that is held out
    return scene, scene.with_thing(thing, None), {"thing": context.say.refer(scene, thing)}


def _move(context: Context, source: Scene | None) -> Found:
    scene, thing = _subject(context, source, room=1)
    free = context.free_places(scene, thing)
    if not free:
        return None
    place = context.rng.choice(free)
    words = {"thing": _name(context.say, scene, thing), "place": context.say.place_name(place)}
    return scene, scene.with_thing(thing, replace(thing, place=place)), words | {"where": context.say.place(place)}


def _resize(context: Context, source: Scene | None) -> Found:
    scene, thing = _subject(context, source)
    others = [size for size in context.dialect.sizes if size != thing.size]
    resized = {size: scene.with_thing(thing, replace(thing, size=size)) for size in others}
    fitting = {size: after for size, after in resized.items() if fits(after.things, context.canvas)}
    if not fitting:
        return None
    size = context.rng.choice(list(fitting))
    words = {"thing": _name(context.say, scene, thing), "size": context.say.size(size)}
    return scene, fitting[size], words


def _tone(context: Context, source: Scene | None) -> Found:
    scene, thing = _subject(context, source)
    sprite = thing.sprite
    if source is None and not context.tones(sprite):
        pairs = [pair for pair in context.sprites.tones_of if pair not in context.sprites.held_out]
        if not pairs or context.pool == "held_out":
            return None
        concept, style = context.rng.choice(pairs)
        new = replace(thing, sprite=context.toned(Sprite(concept, style), 0.8))
        scene, thing, sprite = scene.with_thing(thing, new), new, new.sprite
    tones = [tone for tone in context.tones(sprite) if tone != sprite.tone]
    if not tones:
        return None
    new = replace(sprite, tone=context.rng.choice(tones))
    words = {"thing": context.say.refer(scene, thing), "tone": f"{new.tone} {context.sprites.tone_words}"}
    return scene, scene.with_thing(thing, replace(thing, sprite=new)), words


def _swap(context: Context, source: Scene | None) -> Found:
    """Swap the places of two things."""
    scene = source or context.spread(2)
    if len(scene.things) < 2:
        return None
    first, second = context.rng.sample(scene.things, 2)
    placed = {first: replace(first, place=second.place), second: replace(second, place=first.place)}
    after = replace(scene, things=tuple(placed.get(thing, thing) for thing in scene.things))
    if not fits(after.things, context.canvas):
        return None
    return scene, after, {"first": context.say.refer(scene, first), "second": context.say.refer(scene, second)}


def _count(context: Context, source: Scene | None) -> Found:
    """Change the number of equal things; they move to the default places of that number."""
    if source is not None and len({thing.sprite for thing in source.things}) > 1:
        return None
    sprite = context.sprite() if source is None else source.things[0].sprite
    counts = context.rng.sample((1, 2, 3, 4), 2) if source is None else [len(source.things), context.rng.randint(1, 4)]
    background = context.background() if source is None else source.background
    before, after = (
        context.arrange([sprite] * count, background, default_places(count, context.canvas)) for count in counts
    )
    if after is None or before is None:
        return None
    old, new = (
        f"{'one ' if count == 1 else ''}{context.say.noun(sprite, style=False, tone=False, count=count)}"
        for count in counts
    )
    return source or before, after, {"new": new, "old": f"the {old}"}


_MADE_BY = (_style, _replace, _background, _add, _remove, _move, _resize, _tone, _swap, _count)
_EDITS: dict[str, Callable[[Context, Scene | None], Found]] = dict(zip(INSTRUCTIONS, _MADE_BY, strict=True))


@dataclass(frozen=True)
class Subject:
    """One or two subjects, each shown in a scene of its own, and the scene that an instruction asks of them."""

    instruction: str
    sources: tuple[Scene, ...]
    target: Scene


def sample_subject(context: Context) -> Subject:
    """Ask for subjects that only their images identify: this one, there, on blue."""
    say, rng = context.say, context.rng
    sprites = context.different(rng.choice((1, 1, 2)))
    sources = tuple(
        Scene(context.background(), (Thing(sprite, "middle", rng.choice(("medium", "large"))),)) for sprite in sprites
    )
    target = None
    while target is None:
        target = context.arrange(sprites, context.background())
    names = ("this one",) if len(sprites) == 1 else ("the first one", "the second one")
    parts = [f"{name} {say.place(thing.place)}" for name, thing in zip(names, target.things)]
    words = say.with_background(" and ".join(parts), target.background)
    templates = ("draw {}", "{}", "put {}", "{}, please")[: None if say.people else 1]
    return Subject(say.manner(say.fill(templates, words)), sources, target)
