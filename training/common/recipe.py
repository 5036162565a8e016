"""Recipes: YAML files whose keys are the fields of groups of arguments. Knows files and keys, not what they are for.

A shipped recipe is `recipes/<kind>/<name>.yaml`. `base: NAME` in a recipe takes over the keys of another one of its
kind, or of a file beside it. The YAML is that of version 1.2, as people write it: `no` is a word
(`eval_strategy: no`), `1e-4` is a number. PyYAML reads version 1.1, where the first is false and the second a text.
"""

import difflib
import inspect
import os
import re
from argparse import Action, ArgumentError
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from functools import reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

from ...hub_cards import SHIPPED, shipped_model_path


if TYPE_CHECKING:
    from transformers import HfArgumentParser


_MODELS = ("model", "vision_tokenizer", "processor")  # keys of models, beside those in `_name_or_path`
RECIPES = Path(__file__).parents[1] / "recipes"

_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_RESOLVED_ANEW = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _RESOLVED_ANEW]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Raise where a key is given twice: PyYAML would silently take the last."""
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


def load_yaml(text: str) -> Any:
    """The value of a YAML text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:  # its message has several lines, with a pointer
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


def shipped_recipes(kind: str) -> dict[str, Path]:
    """Name -> file of the recipes of a kind that come with the package."""
    return {path.stem: path for path in sorted((RECIPES / kind).glob("*.yaml"))}


def load_recipe(kind: str, name_or_path: str | Path, assignments: Sequence[str] = ()) -> Recipe:
    """
    The keys of a recipe.

    Args:
        kind (`str`): Kind of the training, such as `"transformer"`.
        name_or_path (`str` or `Path`): A YAML file, or the name of a shipped recipe of that kind.
        assignments (`Sequence[str]`, *optional*): `key=value` to write over it, see [`override`].
    """
    recipe = _with_base(kind, _find_recipe(kind, name_or_path), ())
    for assignment in assignments:
        override(recipe, assignment)
    return recipe


def _find_recipe(kind: str, name_or_path: str | Path, beside: Path = Path()) -> Path:
    shipped = shipped_recipes(kind)
    for path in (shipped.get(str(name_or_path)), beside / name_or_path):
        if path is not None and path.is_file():
            return path
    near = difflib.get_close_matches(str(name_or_path), shipped, n=3)
    raise FileNotFoundError(
        f"{name_or_path} is no file and no recipe of {kind}, expected a file or one of {near or list(shipped)}"
    )


def _with_base(kind: str, path: Path, derived: tuple[Path, ...]) -> Recipe:
    if path in derived:
        raise ValueError(f"{path}: base leads back to this recipe")
    recipe = read_recipe(path)
    base = recipe.pop("base", None)
    if base is None:
        return recipe
    inherited = _with_base(kind, _find_recipe(kind, base, path.parent), (*derived, path))
    return Recipe(_merge(inherited, recipe), path)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `old`; mappings are merged key by key."""
    both = {key: _merge(old[key], new[key]) for key in new if isinstance(old.get(key), dict) and new[key]}
    return {**old, **new, **{key: value for key, value in both.items() if isinstance(new[key], dict)}}


def check_fields(values: dict[str, Any] | None, config: type, where: str) -> None:
    """Refuse names that are no fields of `config`, which would take and forget them."""
    known = {field.name for field in fields(config)}
    if unknown := {key: difflib.get_close_matches(key, known, n=3) for key in values or {} if key not in known}:
        raise ValueError(f"{where} has unknown keys; near ones that exist: {unknown}")


def check_call(make: Callable, options: dict[str, Any], where: str) -> None:
    """Options that the signature of `make` lacks, or needs, are a mistake in the part `where` of a recipe."""
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def call_with(make: Callable, options: dict[str, Any], where: str) -> Any:
    """`make(**options)` after [`check_call`]."""
    check_call(make, options, where)
    return make(**options)


def override(recipe: dict[str, Any], assignment: str) -> None:
    """Set a key as `key=value` says, in place; the value is YAML, and `a.b=value` sets `b` in the mapping `a`."""
    path, separator, value = assignment.partition("=")
    if not separator:
        raise ValueError(f"got {assignment!r}, expected key=value such as max_steps=100")
    *parents, key = path.strip().split(".")
    for parent in parents:
        recipe[parent] = {} if recipe.get(parent) is None else recipe[parent]
        recipe = recipe[parent]
        if not isinstance(recipe, dict):
            raise ValueError(f"{assignment}: {parent} is {recipe!r}, expected a mapping")
    try:
        recipe[key] = load_yaml(value)
    except ValueError as error:
        raise ValueError(f"{assignment}: {error}") from error


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """What several `key=value` say, see [`override`]."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        override(values, assignment)
    return values


def parse_recipe(recipe: dict[str, Any], groups: Iterable[type]) -> tuple[Any, ...]:
    """A recipe's keys as one instance of each group of arguments, which are dataclasses."""
    groups, source = tuple(groups), source_of(recipe)
    values = check_recipe(recipe, groups)
    try:
        return tuple(group(**{f.name: values[f.name] for f in fields(group) if f.name in values}) for group in groups)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def check_recipe(recipe: dict[str, Any], groups: Iterable[type]) -> Recipe:
    """
    The recipe with its values as the types of the groups' fields. Raises one `ValueError` that names every key that is
    unknown, missing, or of another type.
    """
    groups, source = tuple(groups), source_of(recipe)
    from transformers import HfArgumentParser  # which imports torch: a list of recipes needs neither

    parser = HfArgumentParser(groups)
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    actions = {action.dest: action for action in reversed(parser._actions)}  # the first, where there is a --no_ too
    known = [name for name in actions if name != "help"]
    values, mistakes = {}, []
    for key, value in recipe.items():
        try:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=3)
                raise ValueError(f"{key} is unknown" + (f", near ones that exist: {near}" if near else ""))
            values[key] = _typed(parser, actions[key], _placed(key, value), hints[key])
        except ValueError as error:
            mistakes.append(f"{source}: {error}")
    needed = [f.name for group in groups for f in fields(group) if f.default is f.default_factory is MISSING]
    if missing := [name for name in needed if recipe.get(name) is None]:
        hint = " ".join(f"{name}=..." for name in missing)
        mistakes.append(f"{source}: {', '.join(missing)} must be set: write it there, or {hint} behind it")
    if mistakes:
        raise ValueError("; ".join(mistakes))
    return Recipe(values, source)


def source_of(recipe: dict[str, Any]) -> str | Path:
    """What errors call the place that a recipe is from."""
    return getattr(recipe, "source", "the recipe")


def _placed(key: str, value: Any) -> Any:
    """A path below `~` in full, as the shell gives options, and the folder of a shipped model that `key` names."""
    if isinstance(value, list):
        return [_placed(key, entry) for entry in value]
    if not isinstance(value, str):
        return value
    if value in SHIPPED and (key in _MODELS or key.endswith("_name_or_path")):
        return str(shipped_model_path(value))
    return os.path.expanduser(value) if value.startswith("~/") else value


def _typed(parser: "HfArgumentParser", action: Action, value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` says; a word is read as on the command line."""
    kinds = [kind for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
    choices = action.choices or [member.value for kind in kinds for member in kind]
    expected = f"one of {list(choices)}" if choices else hint.__name__ if isinstance(hint, type) else str(hint)
    is_one_of_a_list = isinstance(value, str) and any(get_origin(kind) is list for kind in (hint, *get_args(hint)))
    expected += f", such as [{value}]" if is_one_of_a_list else ""
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
        raise ValueError(f"{action.dest} is {value!r}, expected {expected}")
    return found


def check_types(values: Any) -> None:
    """Raises `ValueError` where a field of a dataclass has a value of another type; an integer is a float, too."""
    hints = get_type_hints(type(values))
    for field in fields(values):
        value, hint = getattr(values, field.name), hints[field.name]
        try:
            type_validator(field.name, value, _with_whole_numbers(hint))
        except TypeError as error:
            expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint
            raise ValueError(f"{field.name} is {value!r:.80}, expected {expected}") from error


def _with_whole_numbers(hint: Any) -> Any:
    """`hint`, where an integer is a float, too."""
    if hint is float:
        return float | int
    parts = tuple(map(_with_whole_numbers, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return reduce(or_, parts)
    return get_origin(hint)[parts] if get_origin(hint) in (list, dict) else hint
