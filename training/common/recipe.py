"""Recipes: YAML files whose keys are the fields of groups of arguments. Knows files and keys, not what they are for.

The YAML is that of version 1.2, as people write it: `no` is a word (`eval_strategy: no`), `1e-4` is a number. PyYAML
reads version 1.1, where the first is false and the second a text.
"""

import difflib
import inspect
import re
from argparse import Action, ArgumentError
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from enum import Enum
from functools import reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator
from transformers import HfArgumentParser


RECIPES = Path(__file__).parents[1] / "recipes"

_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_RESOLVED_ANEW = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _RESOLVED_ANEW]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Of two equal keys PyYAML takes the last, whatever the first one was for."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(name := self.construct_object(key, deep=True), str):
                raise ValueError(
                    f"the key {name!r} in line {line} is {type(name).__name__}, expected a word: quote it"
                )
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise ValueError(f"{key.value!r} is there twice, in lines {lines[key.value]} and {line}: keep one")
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
# After integers, which are resolved first.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"({_NUMBER.pattern})$"), [*"-+0123456789."])


class Recipe(dict):
    """Keys and values, and what errors call the place that they are from."""

    def __init__(self, values: dict[str, Any], source: str | Path = "the recipe"):
        super().__init__(values)
        self.source = source

    @classmethod
    def section(cls, recipe: dict[str, Any], values: dict[str, Any]) -> "Recipe":
        """`values` that are from where `recipe` is from."""
        return cls(values, recipe.source) if isinstance(recipe, Recipe) else cls(values)


def load_yaml(text: str) -> Any:
    """The value of a YAML text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:  # its message is a drawing of several lines
        raise ValueError(f"this is no YAML: {' '.join(str(error).split())}") from error


def read_recipe(path: Path) -> Recipe:
    """The keys of a recipe."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, expected a mapping of keys to values")
    return Recipe(values, path)


def check_parts(
    recipe: dict[str, Any], where: str | Path, needed: dict[str, type], optional: dict[str, type] | None = None
) -> None:
    """Refuse what lacks a part, has one that nobody reads, or one of another type than is given here by its name."""
    known = {**needed, **(optional or {})}
    if missing := [key for key in needed if key not in recipe]:
        raise ValueError(f"{where} lacks {missing}")
    if unknown := [key for key in recipe if key not in known]:
        raise ValueError(f"{where} has {unknown}, expected some of {list(known)}")
    for key, value in recipe.items():
        if value is not None and not isinstance(value, known[key]):
            raise ValueError(f"{key} of {where} is {value!r}, expected {getattr(known[key], '__name__', known[key])}")


def check_fields(values: dict[str, Any] | None, config: type, where: str) -> None:
    """Refuse names that are no fields of `config`, which would take and forget them."""
    known = {field.name for field in fields(config)}
    if unknown := {key: difflib.get_close_matches(key, known, n=3) for key in values or {} if key not in known}:
        raise ValueError(f"{where} has unknown keys; near ones that exist: {unknown}")


def call_with(make: Callable, options: dict[str, Any], where: str) -> Any:
    """`make(**options)`; options that its signature lacks, or needs, are a mistake in the part `where` of a recipe."""
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
    return make(**options)


class OneLineParser(HfArgumentParser):
    """Without its usage before an error: that is hundreds of options."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def override(recipe: dict[str, Any], assignment: str) -> None:
    """Set a key as `key=value` says, in place; the value is YAML, and `a.b=value` sets `b` in the mapping `a`."""
    path, separator, value = assignment.partition("=")
    if not separator:
        raise ValueError(f"--override got {assignment!r}, expected key=value such as max_steps=100")
    *parents, key = path.strip().split(".")
    for parent in parents:
        recipe[parent] = recipe.get(parent) or {}
        recipe = recipe[parent]
        if not isinstance(recipe, dict):
            raise ValueError(f"--override {assignment}: {parent} is {recipe!r}, expected a mapping")
    try:
        recipe[key] = load_yaml(value)
    except ValueError as error:
        raise ValueError(f"--override {assignment}: {error}") from error


def parse_recipe(
    recipe: dict[str, Any],
    groups: Iterable[type],
    *,
    prog: str,
    needed: dict[str, str] | None = None,
    rest: Sequence[str] = (),
) -> tuple[Any, ...]:
    """
    A recipe's keys as one instance of each group of arguments.

    Args:
        groups: Dataclasses.
        prog: Name of the command, for its errors.
        needed: Keys without a default that must be there, and what is expected of them.
        rest: What the command line says besides (`--learning_rate 1e-4`); it wins.
    """
    groups = tuple(groups)
    parser = OneLineParser(groups, prog=prog)
    set_defaults(parser, groups, recipe)
    source = Recipe.section(recipe, {}).source
    for key, expected in (needed or {}).items():
        if recipe.get(key) is None and not any(word.partition("=")[0] == f"--{key}" for word in rest):
            raise ValueError(f"{source}: {key} is missing, expected {expected}")
    try:
        return parser.parse_args_into_dataclasses(args=list(rest), look_for_args_file=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def set_defaults(parser: HfArgumentParser, groups: Iterable[type], recipe: dict[str, Any]) -> None:
    """
    Makes a recipe's values the defaults of `parser`, which is one of `groups`. Raises `ValueError` where a key is none
    of theirs or a value is of another type.
    """
    source = Recipe.section(recipe, {}).source
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    actions = {action.dest: action for action in reversed(parser._actions)}  # the first, where there is a --no_ too
    if unknown := sorted(set(recipe) - set(actions)):
        near = {key: difflib.get_close_matches(key, actions, n=3) for key in unknown}
        raise ValueError(f"{source} has unknown keys; near ones that exist: {near}")
    for key, value in recipe.items():
        parser.set_defaults(**{key: _typed(parser, actions[key], value, hints[key], source)})
        actions[key].required = False


def _typed(parser: HfArgumentParser, action: Action, value: Any, hint: Any, source: str | Path) -> Any:
    """`value` as the type that `hint` says; a word is read as on the command line."""
    kinds = [kind for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
    choices = action.choices or [member.value for kind in kinds for member in kind]
    expected = f"one of {list(choices)}" if choices else hint.__name__ if isinstance(hint, type) else str(hint)
    try:
        found = parser._get_value(action, value) if isinstance(value, str) else value
        if isinstance(found, bool) and bool not in (hint, *get_args(hint)) and str in (hint, *get_args(hint)):
            found = str(found).lower()  # the word, as in `resume_from_checkpoint: false`
        if isinstance(found, float) and found.is_integer() and int in (hint, *get_args(hint)):
            found = int(found)
        type_validator(action.dest, found, _with_whole_numbers(hint))
        is_choice = not choices or found is None or found in choices
    except (ArgumentError, TypeError):
        is_choice = False
    if not is_choice:
        raise ValueError(f"{source}: {action.dest} is {value!r}, expected {expected}")
    return found


def _with_whole_numbers(hint: Any) -> Any:
    """`hint`, where an integer is a float, too."""
    if hint is float:
        return float | int
    parts = tuple(map(_with_whole_numbers, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return reduce(or_, parts)
    return get_origin(hint)[parts] if get_origin(hint) in (list, dict) else hint


__all__ = [
    "RECIPES",
    "OneLineParser",
    "Recipe",
    "call_with",
    "check_fields",
    "check_parts",
    "load_yaml",
    "override",
    "parse_recipe",
    "read_recipe",
    "set_defaults",
]
