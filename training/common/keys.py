"""The keys of a recipe with type, default and meaning, as the docstrings of the argument classes have them."""

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from typing import Any


# `name (`type`, *optional*): Meaning`, or several names, or no parenthesis, at the beginning of a line.
_ENTRY = re.compile(r"\s*(\w+(?:, \w+)*)\s*(?:\(.*?\)\s*)?:(?:\s+(.*))?$")


@dataclass(frozen=True)
class Key:
    """A key of a recipe, as `--help` prints it."""

    name: str
    type: str
    default: str
    meaning: str

    def __str__(self) -> str:
        meaning = textwrap.fill(self.meaning, 112, initial_indent="      ", subsequent_indent="      ")
        return f"  {self.name}  {self.type}, {self.default}\n{meaning}"


def document_keys(group: type) -> list[Key]:
    """The fields of a dataclass that a recipe may have."""
    meanings = {name: text for parent in reversed(group.__mro__) for name, text in _entries(parent, group)}
    return [
        Key(
            field.name,
            _type_name(field.type),
            _default(field),
            meanings.get(field.name) or field.metadata.get("help", ""),
        )
        for field in fields(group)
        if field.init
    ]


def _entries(documented: type, group: type) -> Iterator[tuple[str, str]]:
    """Name and meaning of the fields of `group` that the docstring of a class has entries of."""
    known = {field.name for field in fields(group)}
    names, lines = (), []
    for line in [*inspect.cleandoc(documented.__doc__ or "").splitlines(), ""]:
        entry = _ENTRY.match(line)
        found = tuple(entry[1].split(", ")) if entry else ()
        if (found and set(found) <= known) or not line.strip() or line.strip().startswith(">"):
            yield from ((name, " ".join(" ".join(lines).split())) for name in names)
            names, lines = (found, [entry[2] or ""]) if found and set(found) <= known else ((), [])
        else:
            lines.append(line)


def _type_name(hint: Any) -> str:
    text = (
        hint
        if isinstance(hint, str)
        else hint.__name__
        if isinstance(hint, type) and "[" not in str(hint)
        else str(hint)
    )
    return re.sub(r"\b(?:[a-z_]+\.)+(?=\w)", "", text).replace("Optional[", "[")


def _default(field: Field) -> str:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is MISSING:
        return "required"
    return f"default {value.value if isinstance(value, Enum) else value}"
