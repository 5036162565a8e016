"""What values the options of commands have: how each is read from a command line, and what a record may hold of it.

Anybody can write the record in an image, so every value has a type and bounds: a record that keeps to them names no
address, and asks for no more memory than the options of a command may. Knows nothing of files, models or commands.
"""

import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """
    The values of an option.

    Args:
        expected (`str`): What they are, for errors.
        accepts (`Callable`): Whether a value, as JSON has it, is one of them.
        reads (`dict`): Arguments of `add_argument` that read one from a command line.
    """

    expected: str
    accepts: Callable[[Any], bool]
    reads: Mapping[str, Any] = {}


def integer(low: int, high: int) -> Rule:
    """Integers from `low` to `high`; no booleans."""
    return Rule(
        f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high, {"type": int}
    )


def number(low: float, high: float) -> Rule:  # NaN is in no range
    """Integers and floats from `low` to `high`."""
    return Rule(
        f"a number from {low} to {high}",
        lambda value: type(value) in (int, float) and low <= value <= high,
        {"type": float},
    )


def one_of(*values: str) -> Rule:
    """One of these words."""
    return Rule(
        f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values, {"choices": values}
    )


def text(longest: int, pattern: str = r"[^\x00\ud800-\udfff]*") -> Rule:  # surrogates cannot be written again
    """Text of at most `longest` characters that `pattern` matches as a whole."""
    shape = re.compile(pattern, re.DOTALL)
    return Rule(
        f"text of at most {longest} characters",
        lambda value: isinstance(value, str) and len(value) <= longest and shape.fullmatch(value) is not None,
    )


def either(*rules: Rule) -> Rule:
    """Whatever one of the rules accepts."""
    return Rule(" or ".join(rule.expected for rule in rules), lambda value: any(rule.accepts(value) for rule in rules))


def listed(rule: Rule, most: int, least: int = 0) -> Rule:
    """Lists of `least` to `most` entries that `rule` accepts."""
    return Rule(
        f"a list of {least} to {most} entries, each {rule.expected}",
        lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(rule.accepts, value)),
        {**rule.reads, "action": "append"},
    )


def mapping(rule: Rule, most: int) -> Rule:
    """Objects of at most `most` entries, whose values `rule` accepts."""
    return Rule(
        f"an object of at most {most} entries, each {rule.expected}",
        lambda value: isinstance(value, dict) and len(value) <= most and all(map(rule.accepts, value.values())),
    )


def table(**rules: Rule) -> Rule:
    """Objects with exactly these keys, each with a rule of its own."""
    return Rule(
        "an object with " + ", ".join(f"{name}: {rule.expected}" for name, rule in rules.items()),
        lambda value: (
            isinstance(value, dict)
            and value.keys() == rules.keys()
            and all(rule.accepts(value[name]) for name, rule in rules.items())
        ),
    )


def per_scale(rule: Rule) -> Rule:
    """One value for all scales, or a list with one for each: `3` or `1,2,3` on a command line."""
    read = rule.reads["type"]

    def parse(text: str) -> Any:
        values = [read(value) for value in text.split(",")]
        return values[0] if len(values) == 1 else values

    parse.__name__ = f"{read.__name__}, or a comma-separated list of them"  # in argparse's error
    return either(rule, listed(either(rule, NOTHING), MOST_SCALES, 1))._replace(reads={"type": parse})


MOST_SCALES = 64
NOTHING = Rule("null", lambda value: value is None)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
PROMPT = text(100_000)
PRINTABLE = r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]"  # what errors may quote on a terminal
NAME = text(4096, f"{PRINTABLE}*")
VERSION = text(64, f"{PRINTABLE}*")
SIDE = integer(1, 16_384)
SCALES = integer(0, MOST_SCALES)
IMAGES = integer(0, 64)
SHARE = number(0, 1)
STRENGTH = number(-1e6, 1e6)
TEMPERATURE = number(0, 1e6)
SEED = integer(0, 2**63 - 1)
TOP_K = integer(0, 2**31)
# Not `//host/share`, which Windows would ask a server for.
FILE = table(path=text(4096, rf"(?![\\/]{{2}}){PRINTABLE}+"), sha256=text(64, "[0-9a-f]{64}"))
FILE = FILE._replace(reads={"type": Path})
PART = either(
    table(type=one_of("text"), text=PROMPT),
    table(type=one_of("image"), image=FILE),
    table(type=one_of("image")),  # sampled in a chat, which `info` shows and nothing repeats
)
MESSAGE = table(role=one_of("system", "user", "assistant"), content=either(PROMPT, listed(PART, 256)))


def check(prefix: str, values: Any, rules: Mapping[str, Rule]) -> None:
    """Raises `ValueError` where `values`, an object of JSON, has an entry that `rules` lack or do not accept."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')} is {reprlib.repr(values)}, expected an object")
    if unknown := sorted(set(values) - set(rules)):
        raise ValueError(f"it has {reprlib.repr(unknown)}, which this version does not know")
    for name, value in values.items():
        if not rules[name].accepts(value):
            raise ValueError(f"{prefix}{name} is {reprlib.repr(value)}, expected {rules[name].expected}")
