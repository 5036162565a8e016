"""Instructions that change one thing of a Shapes picture: the pair of scenes, and what must change between them.

Every reference ("the circle", "the red circle") points to exactly one object of the source scene, everything that the
instruction does not name keeps exactly its place, and every edit can be turned round, so one pair of pictures
trains both directions.
"""

from dataclasses import dataclass

import numpy as np

from .captions import (
    RELATION_PHRASINGS,
    RELATIONS,
    in_split,
    neighbour,
    noun_phrase,
    pick,
    place_phrase,
    random_cells,
)
from .scene import BACKGROUNDS, CELLS, COLORS, SHAPES, Scene, ShapeObject, place_object


EDIT_TASKS = ("recolor", "add", "remove", "move", "swap", "background")

INSTRUCTIONS = {
    "recolor": (
        "make {object} {color}",
        "change the color of {object} to {color}",
        "paint {object} {color}",
        "turn {object} {color}",
    ),
    "add": ("add {object} {where}", "draw {object} {where}", "put {object} {where}"),
    "remove": ("remove {object}", "delete {object}", "take away {object}", "erase {object}"),
    "move": ("move {object} to the {place}", "put {object} {where}", "place {object} {where}"),
    "swap": ("swap {first} and {second}", "exchange {first} and {second}", "swap {first} with {second}"),
    "background": (
        "change the background to {background}",
        "make the background {background}",
        "turn the background {background}",
        "paint the background {background}",
        "set the background to {background}",
        "change the color of the background to {background}",
        "use a {background} background",
        "give the picture a {background} background",
        "put everything on a {background} background",
        "replace the background with {background}",
    ),
}


@dataclass(frozen=True)
class Edit:
    """An instruction, the scenes before and after it, and what must change.

    Args:
        task (`str`): One of `EDIT_TASKS`.
        instruction (`str`): What the user says.
        source (`Scene`): The picture before.
        target (`Scene`): One right picture after.
        before (`tuple[ShapeObject, ...]`): The objects of `source` that change or vanish.
        after (`tuple[ShapeObject, ...]`): What they become, in the same order; or the object that is added.
        place (`str`, *optional*): The lattice cell where `after[0]` must be ("add", "move").
        relation (`str`, *optional*): Where `after[0]` must be relative to `anchor` ("add").
        anchor (`ShapeObject`, *optional*): The object of `source` that `relation` refers to.
    """

    task: str
    instruction: str
    source: Scene
    target: Scene
    before: tuple[ShapeObject, ...] = ()
    after: tuple[ShapeObject, ...] = ()
    place: str | None = None
    relation: str | None = None
    anchor: ShapeObject | None = None

    @property
    def kept(self) -> tuple[ShapeObject, ...]:
        """The objects that must stay exactly as they are."""
        return tuple(item for item in self.source.objects if item not in self.before)

    def inverse(self, rng: np.random.Generator, *, split: str = "train", attempts: int = 32) -> "Edit | None":
        """The edit that leads from `target` back to `source`, with its own instruction of `split`.

        None when an object cannot be named in `target`, or when no wording of the instruction belongs to `split`.
        """
        task = {"add": "remove", "remove": "add"}.get(self.task, self.task)
        place = self.before[0].place if task in ("add", "move") else None
        for _ in range(attempts):
            instruction = _instruct(
                rng, task, self.target, before=self.after, after=self.before, place=place,
                background=self.source.background,
            )  # fmt: skip
            if instruction is None:
                return None
            if in_split(instruction, split):
                return Edit(task, instruction, self.target, self.source, self.after, self.before, place)
        return None


def refer(rng: np.random.Generator, scene: Scene, item: ShapeObject) -> str | None:
    """`the circle` or `the red circle`, whichever names one object of `scene` only; None if neither does."""
    same_shape = [other for other in scene.objects if other.shape == item.shape]
    if sum(other.color == item.color for other in same_shape) != 1:
        return None
    if len(same_shape) == 1 and rng.random() < 0.5:
        return f"the {item.shape}"
    return f"the {item.color} {item.shape}"


def _instruct(
    rng: np.random.Generator,
    task: str,
    source: Scene,
    *,
    before: tuple[ShapeObject, ...],
    after: tuple[ShapeObject, ...],
    place: str | None = None,
    relation: str | None = None,
    anchor: ShapeObject | None = None,
    background: str | None = None,
) -> str | None:
    """Words an edit of `source`; None when one of its objects has no unambiguous name."""
    template = pick(rng, INSTRUCTIONS[task])
    names = [refer(rng, source, item) for item in before]
    if None in names:
        return None
    if task == "recolor":
        return template.format(object=names[0], color=after[0].color)
    if task == "remove":
        return template.format(object=names[0])
    if task == "swap":
        return template.format(first=names[0], second=names[1])
    if task == "background":
        return template.format(background=background)
    if task == "move":
        return template.format(object=names[0], place=place, where=place_phrase(place))
    if relation is None:
        where = place_phrase(place)
    else:
        anchor_name = refer(rng, source, anchor)
        if anchor_name is None:
            return None
        where = f"{pick(rng, RELATION_PHRASINGS[relation])} {anchor_name}"
    return template.format(object=noun_phrase(after[0].shape, after[0].color), where=where)


def _source_scene(rng: np.random.Generator, count: int) -> Scene:
    """`count` objects, no two alike."""
    objects: tuple[ShapeObject, ...] = ()
    for cell in random_cells(rng, count):
        objects += (place_object(*_new_look(rng, objects), cell),)
    return Scene(pick(rng, BACKGROUNDS), objects)


def _new_look(rng: np.random.Generator, objects: tuple[ShapeObject, ...]) -> tuple[str, str]:
    """A (shape, color) that none of `objects` has."""
    taken = {(item.shape, item.color) for item in objects}
    while True:
        look = (pick(rng, SHAPES), pick(rng, COLORS))
        if look not in taken:
            return look


def _occupied(scene: Scene) -> set[tuple[int, int]]:
    return {CELLS[item.place] for item in scene.objects}


def _replace(scene: Scene, old: tuple[ShapeObject, ...], new: tuple[ShapeObject, ...]) -> Scene:
    """`scene` with each object of `old` replaced, in its position of the tuple, by the one of `new`."""
    swapped = dict(zip(old, new, strict=True))
    return Scene(scene.background, tuple(swapped.get(item, item) for item in scene.objects))


def _propose(rng: np.random.Generator, task: str) -> Edit | None:
    """One attempt at an edit; None when there is no place for an object or no name."""
    # At most two objects before and after: a small model learns how the codes of more depend on each other too slowly.
    count = {"add": 1, "remove": 2, "swap": 2}.get(task) or int(rng.integers(1, 3))
    source = _source_scene(rng, count)
    order = [source.objects[int(index)] for index in rng.permutation(count)]
    subject, others = order[0], tuple(order[1:])
    place = relation = anchor = None
    background = source.background

    if task == "recolor":
        taken = {item.color for item in others if item.shape == subject.shape} | {subject.color}
        color = pick(rng, tuple(name for name in COLORS if name not in taken))
        before = (subject,)
        after = (ShapeObject(subject.shape, color, subject.x, subject.y, subject.radius),)
        target = _replace(source, before, after)
    elif task == "add":
        shape, color = _new_look(rng, source.objects)
        if rng.random() < 0.5:
            relation, anchor = pick(rng, RELATIONS), subject
            cell = neighbour(CELLS[anchor.place], relation)
        else:
            place = pick(rng, CELLS)
            cell = CELLS[place]
        if cell is None or cell in _occupied(source):
            return None
        added = place_object(shape, color, cell)
        before, after = (), (added,)
        target = Scene(background, (*source.objects, added))
    elif task == "remove":
        before, after = (subject,), ()
        target = Scene(background, tuple(item for item in source.objects if item != subject))
    elif task == "move":
        place = pick(rng, CELLS)
        if CELLS[place] in _occupied(source):
            return None
        before, after = (subject,), (place_object(subject.shape, subject.color, CELLS[place]),)
        target = _replace(source, before, after)
    elif task == "swap":
        first, second = before = (subject, others[0])
        after = (
            ShapeObject(first.shape, first.color, second.x, second.y, first.radius),
            ShapeObject(second.shape, second.color, first.x, first.y, second.radius),
        )
        target = _replace(source, before, after)
    else:
        before = after = ()
        background = pick(rng, tuple(name for name in BACKGROUNDS if name != source.background))
        target = Scene(background, source.objects)

    instruction = _instruct(
        rng, task, source, before=before, after=after, place=place, relation=relation, anchor=anchor,
        background=background,
    )  # fmt: skip
    if instruction is None:
        return None
    return Edit(task, instruction, source, target, before, after, place, relation, anchor)


def sample_edit(rng: np.random.Generator, task: str | None = None, *, split: str = "train") -> Edit:
    """A random edit of `task` (any when None) whose instruction belongs to `split`."""
    if task is None:
        task = pick(rng, EDIT_TASKS)
    if task not in EDIT_TASKS:
        raise ValueError(f"unknown task {task!r}, expected one of {EDIT_TASKS}")
    while True:
        edit = _propose(rng, task)
        if edit is not None and in_split(edit.instruction, split):
            return edit
