"""The Shapes world: a GenEval for coloured shapes, with exact captions, edits, and a judge in code.

Here is the world; `.judge` (needs scipy) and `.dataset` are imported by their own names.
"""

from .captions import CATEGORIES, RELATIONS, ObjectSpec, Prompt, describe, is_held_out, sample_prompt, sample_scene
from .edits import EDIT_TASKS, Edit, sample_edit
from .scene import BACKGROUNDS, COLORS, PLACES, SHAPES, Scene, ShapeObject, render


__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLORS",
    "EDIT_TASKS",
    "Edit",
    "ObjectSpec",
    "PLACES",
    "Prompt",
    "RELATIONS",
    "SHAPES",
    "Scene",
    "ShapeObject",
    "describe",
    "is_held_out",
    "render",
    "sample_edit",
    "sample_prompt",
    "sample_scene",
]
