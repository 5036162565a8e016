"""What a picture shows: its one caption, and questions about it with short answers, right or wrong to the letter.

A caption is the same for the same picture: objects in reading order, each with colour, shape and place, then the
background. So it can be read back into a scene and compared, and no two pictures share one.
"""

import re
from dataclasses import dataclass

import numpy as np

from .captions import (
    COUNT_WORDS,
    RELATIONS,
    enumerate_objects,
    in_split,
    noun_phrase,
    pick,
    place_phrase,
    random_cells,
)
from .edits import refer
from .scene import BACKGROUNDS, CELLS, COLORS, MAX_OBJECTS, SHAPES, Scene, ShapeObject, place_object


CAPTION_REQUESTS = ("describe the picture", "what is in the picture", "what do you see")
CAPTION_CATEGORIES = ("one_object", "two_objects", "three_objects", "four_objects")
NUMBERS = {0: "zero", 1: "one", **COUNT_WORDS}
QUESTION_CATEGORIES = ("count", "color", "shape", "existence", "place", "relation", "background")

_OBJECT = rf"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) (?:in|at) the ({'|'.join(CELLS)})"
_CAPTION = re.compile(rf"({_OBJECT}(?:(?:, | and ){_OBJECT})*) on a ({'|'.join(BACKGROUNDS)}) background")


@dataclass(frozen=True)
class Question:
    """A question of one of `QUESTION_CATEGORIES` about a picture, and its one right answer."""

    category: str
    text: str
    answer: str


@dataclass(frozen=True)
class CaptionVerdict:
    """Whether a caption is right in everything (`passed`); the share of the objects that it names rightly, and whether
    it names the background."""

    passed: bool
    objects: float
    background: bool


def caption(scene: Scene) -> str:
    """The caption of a scene."""
    objects = sorted(scene.objects, key=lambda item: CELLS[item.place])
    return f"{enumerate_objects(objects)} on a {scene.background} background"


def judge_caption(text: str, scene: Scene) -> CaptionVerdict:
    """Reads a caption back and compares it with the scene; the order of the objects does not matter."""
    text = " ".join(text.split())
    wanted = {(item.color, item.shape, item.place) for item in scene.objects}
    said = re.findall(_OBJECT, text)
    background = text.endswith(f" on a {scene.background} background")
    is_exact = _CAPTION.fullmatch(text) is not None and sorted(said) == sorted(wanted)
    return CaptionVerdict(is_exact and background, len(wanted & set(said)) / len(wanted), background)


def judge_answer(text: str, question: Question) -> bool:
    """Whether an answer is the right one, but for case, spaces and a full stop."""
    return " ".join(text.lower().strip(" .\n").split()) == question.answer


def sample_view(rng: np.random.Generator, category: str | None = None, *, split: str = "train") -> Scene:
    """
    A scene to talk about, whose caption belongs to `split`: as many objects as one of `CAPTION_CATEGORIES` says (any
    when None), anywhere, often of one shape.
    """
    if category not in (None, *CAPTION_CATEGORIES):
        raise ValueError(f"unknown category {category!r}, expected one of {CAPTION_CATEGORIES}")
    while True:
        count = int(rng.integers(1, MAX_OBJECTS + 1)) if category is None else CAPTION_CATEGORIES.index(category) + 1
        shape = pick(rng, SHAPES) if rng.random() < 0.4 else None  # so that there is something to count
        objects = tuple(
            place_object(shape or pick(rng, SHAPES), pick(rng, COLORS), cell) for cell in random_cells(rng, count)
        )
        scene = Scene(pick(rng, BACKGROUNDS), objects)
        if in_split(caption(scene), split):
            return scene


def sample_question(rng: np.random.Generator, scene: Scene, category: str | None = None) -> Question | None:
    """A question of `category` (any when None) about `scene`; None where the scene has no answer to the one drawn."""
    if category is None:
        category = pick(rng, QUESTION_CATEGORIES)
    if category not in QUESTION_CATEGORIES:
        raise ValueError(f"unknown category {category!r}, expected one of {QUESTION_CATEGORIES}")
    found = _ASK[category](rng, scene)
    return None if found is None else Question(category, *found)


def sample_questions(
    rng: np.random.Generator, count: int, category: str | None = None, *, split: str = "train"
) -> tuple[Scene, tuple[Question, ...]]:
    """A scene whose caption belongs to `split`, and `count` different questions about it."""
    while True:
        scene = sample_view(rng, split=split)
        attempts = [sample_question(rng, scene, category) for _ in range(4 * count)]
        questions = list({question.text: question for question in attempts if question is not None}.values())
        if len(questions) >= count:
            return scene, tuple(questions[:count])


def _pick_object(rng: np.random.Generator, scene: Scene) -> ShapeObject:
    return scene.objects[int(rng.integers(len(scene.objects)))]


def _ask_count(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    if rng.random() < 0.3:
        return "how many objects are there", NUMBERS[len(scene.objects)]
    shape = _pick_object(rng, scene).shape if rng.random() < 0.8 else pick(rng, SHAPES)
    return f"how many {shape}s are there", NUMBERS[sum(item.shape == shape for item in scene.objects)]


def _ask_color(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    item = _pick_object(rng, scene)
    is_only = sum(other.shape == item.shape for other in scene.objects) == 1
    return (f"what color is the {item.shape}", item.color) if is_only else None


def _ask_shape(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    item = _pick_object(rng, scene)
    return f"what shape is {place_phrase(item.place)}", item.shape


def _ask_existence(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """As often yes as no; the object that is not there has the shape or the colour of one that is."""
    item = _pick_object(rng, scene)
    look, answer = (item.shape, item.color), "yes"
    if rng.random() < 0.5:
        others = [(item.shape, color) for color in COLORS] + [(shape, item.color) for shape in SHAPES]
        seen = {(other.shape, other.color) for other in scene.objects}
        absent = [other for other in others if other not in seen]
        look, answer = absent[int(rng.integers(len(absent)))], "no"
    return f"is there {noun_phrase(*look)}", answer


def _ask_place(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    item = _pick_object(rng, scene)
    name = refer(rng, scene, item)
    return None if name is None else (f"where is {name}", place_phrase(item.place))


def _ask_relation(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """What lies on one side of an object: just one object does, and straight on."""
    item, relation = _pick_object(rng, scene), pick(rng, RELATIONS)
    axis, step = (0, RELATIONS[relation][0]) if RELATIONS[relation][0] else (1, RELATIONS[relation][1])
    cell = CELLS[item.place]
    beyond = [other for other in scene.objects if (CELLS[other.place][axis] - cell[axis]) * step > 0]
    name = refer(rng, scene, item)
    if name is None or len(beyond) != 1 or CELLS[beyond[0].place][1 - axis] != cell[1 - axis]:
        return None
    return f"what is {relation} {name}", noun_phrase(beyond[0].shape, beyond[0].color)


def _ask_background(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    return "what color is the background", scene.background


_ASK = dict(
    zip(
        QUESTION_CATEGORIES,
        (_ask_count, _ask_color, _ask_shape, _ask_existence, _ask_place, _ask_relation, _ask_background),
        strict=True,
    )
)
