"""Example pairs: a rule that nobody says, shown by one or two pairs of pictures, to be applied to another picture.

The rules are few, and each changes one thing to one value, so that a single pair tells which rule it is.
"""

from dataclasses import dataclass, replace

import numpy as np

from .captions import in_split, pick, random_cells
from .scene import BACKGROUNDS, CELLS, COLORS, SHAPES, Scene, ShapeObject, place_object
from .understanding import caption


EXAMPLE_TASKS = ("recolor", "reshape", "background", "move", "add", "remove")


@dataclass(frozen=True)
class Rule:
    """One rule of `EXAMPLE_TASKS`.

    Args:
        task (`str`): "recolor" and "reshape" do it to every object, "move" to the only one.
        color (`str`, *optional*): Of the objects ("recolor"), or of the one that is added or removed.
        shape (`str`, *optional*): Of the objects ("reshape"), or of the one that is added or removed.
        background (`str`, *optional*): The new one ("background").
        place (`str`, *optional*): Where to ("move"), or of the object that is added or removed.
    """

    task: str
    color: str | None = None
    shape: str | None = None
    background: str | None = None
    place: str | None = None

    def apply(self, scene: Scene) -> Scene | None:
        """The scene after it; None where the rule does not apply, or where a part of what it asks is there already."""
        objects = scene.objects
        if self.task == "background":
            return replace(scene, background=self.background) if scene.background != self.background else None
        if self.task == "recolor":
            can, objects = _none_has(objects, color=self.color), _all_with(objects, color=self.color)
        elif self.task == "reshape":
            can, objects = _none_has(objects, shape=self.shape), _all_with(objects, shape=self.shape)
        elif self.task == "move":
            can = len(objects) == 1 and objects[0].place != self.place
            objects = tuple(place_object(item.shape, item.color, CELLS[self.place]) for item in objects)
        else:
            single = place_object(self.shape, self.color, CELLS[self.place])
            others = tuple(item for item in objects if item.place != self.place)
            is_add = self.task == "add"
            can = len(others) == len(objects) if is_add else len(others) > 0 and single in objects
            objects = (*others, single) if is_add else others
        return replace(scene, objects=objects) if can else None


@dataclass(frozen=True)
class ExamplePairs:
    """Pairs of scenes before and after a rule, another scene, and that one after the rule."""

    rule: Rule
    pairs: tuple[tuple[Scene, Scene], ...]
    query: Scene
    target: Scene

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """All of them in the order in which they are shown; the last one is the answer."""
        return (*(scene for pair in self.pairs for scene in pair), self.query, self.target)


def sample_examples(
    rng: np.random.Generator, task: str | None = None, *, num_pairs: int = 1, split: str = "train"
) -> ExamplePairs:
    """Example pairs of a rule of `task` (any when None); the query and the rule together belong to `split`."""
    if task is None:
        task = pick(rng, EXAMPLE_TASKS)
    if task not in EXAMPLE_TASKS:
        raise ValueError(f"unknown task {task!r}, expected one of {EXAMPLE_TASKS}")
    while True:
        rule = _sample_rule(rng, task)
        sources = [_sample_source(rng, rule) for _ in range(num_pairs + 1)]
        if in_split(f"{rule} {caption(sources[-1])}", split):
            targets = [rule.apply(source) for source in sources]
            return ExamplePairs(rule, tuple(zip(sources[:-1], targets[:-1])), sources[-1], targets[-1])


def _sample_rule(rng: np.random.Generator, task: str) -> Rule:
    fields = {
        "recolor": ("color",),
        "reshape": ("shape",),
        "background": ("background",),
        "move": ("place",),
        "add": ("color", "shape", "place"),
        "remove": ("color", "shape", "place"),
    }
    options = {"color": COLORS, "shape": SHAPES, "background": BACKGROUNDS, "place": CELLS}
    return Rule(task, **{name: pick(rng, options[name]) for name in fields[task]})


def _sample_source(rng: np.random.Generator, rule: Rule) -> Scene:
    """One or two objects on a background, where the rule applies."""
    while True:
        objects = tuple(
            place_object(pick(rng, SHAPES), pick(rng, COLORS), cell)
            for cell in random_cells(rng, 1 if rule.task == "move" else int(rng.integers(1, 3)))
        )
        if rule.task == "remove":  # that object and others elsewhere
            objects = tuple(item for item in objects if item.place != rule.place)
            objects = (*objects, place_object(rule.shape, rule.color, CELLS[rule.place]))
        scene = Scene(pick(rng, BACKGROUNDS), objects)
        if rule.apply(scene) is not None:
            return scene


def _none_has(objects: tuple[ShapeObject, ...], **look: str) -> bool:
    return not any(getattr(item, name) == value for item in objects for name, value in look.items())


def _all_with(objects: tuple[ShapeObject, ...], **look: str) -> tuple[ShapeObject, ...]:
    return tuple(replace(item, **look) for item in objects)
