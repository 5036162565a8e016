"""What the record in an image may hold. Anybody can write one, so every value has a type and bounds: a record that
keeps to them names no address, and asks for no more memory than the options of a command may.

One table, and the few kinds of rules that it is made of. Knows nothing of files, models or commands.
"""

import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Rule(NamedTuple):
    expected: str
    accepts: Callable[[Any], bool]


def _integer(low: int, high: int) -> Rule:
    return Rule(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _number(low: float, high: float) -> Rule:  # NaN is in no range
    return Rule(f"a number from {low} to {high}", lambda value: type(value) in (int, float) and low <= value <= high)


def _one_of(*values: str) -> Rule:
    return Rule(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def _text(longest: int, pattern: str = r"[^\x00\ud800-\udfff]*") -> Rule:  # surrogates cannot be written again
    shape = re.compile(pattern, re.DOTALL)
    return Rule(
        f"text of at most {longest} characters",
        lambda value: isinstance(value, str) and len(value) <= longest and shape.fullmatch(value) is not None,
    )


def _either(*rules: Rule) -> Rule:
    return Rule(" or ".join(rule.expected for rule in rules), lambda value: any(rule.accepts(value) for rule in rules))


def _listed(rule: Rule, most: int, least: int = 0) -> Rule:
    return Rule(
        f"a list of {least} to {most} entries, each {rule.expected}",
        lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(rule.accepts, value)),
    )


def _mapping(rule: Rule, most: int) -> Rule:
    return Rule(
        f"an object of at most {most} entries, each {rule.expected}",
        lambda value: isinstance(value, dict) and len(value) <= most and all(map(rule.accepts, value.values())),
    )


def _table(**rules: Rule) -> Rule:
    return Rule(
        "an object with " + ", ".join(f"{name}: {rule.expected}" for name, rule in rules.items()),
        lambda value: (
            isinstance(value, dict)
            and value.keys() == rules.keys()
            and all(rule.accepts(value[name]) for name, rule in rules.items())
        ),
    )


def _per_scale(rule: Rule) -> Rule:
    return _either(rule, _listed(_either(rule, NOTHING), MOST_SCALES, 1))


MOST_SCALES = 64
NOTHING = Rule("null", lambda value: value is None)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
PROMPT = _text(100_000)
PRINTABLE = r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]"  # what errors may quote on a terminal
NAME = _text(4096, f"{PRINTABLE}*")
VERSION = _text(64, f"{PRINTABLE}*")
SIDE = _integer(1, 16_384)
SCALES = _integer(0, MOST_SCALES)
TOKENS = _integer(1, 131_072)
IMAGES = _integer(0, 64)
SHARE = _number(0, 1)
STRENGTH = _number(-1e6, 1e6)
SEED = _integer(0, 2**63 - 1)
TOP_K = _integer(0, 2**31)
# Not `//host/share`, which Windows would ask a server for.
FILE = _table(path=_text(4096, rf"(?![\\/]{{2}}){PRINTABLE}+"), sha256=_text(64, "[0-9a-f]{64}"))
PART = _either(
    _table(type=_one_of("text"), text=PROMPT),
    _table(type=_one_of("image"), image=FILE),
    _table(type=_one_of("image")),  # drawn in a chat, which `info` shows and nothing repeats
)
MESSAGE = _table(role=_one_of("system", "user", "assistant"), content=_either(PROMPT, _listed(PART, 256)))

# Options, under their names.
ARGUMENTS = {
    "model": NAME,
    "transformer": NAME,
    "vision_tokenizer": NAME,
    "revision": NAME,
    "lora": _listed(NAME, 16),
    "device": _text(32, r"[a-z]+(:\d{1,3})?"),
    "dtype": _one_of("auto", "float32", "bfloat16", "float16"),
    "quantize": _one_of("4bit", "8bit"),
    "prompt": PROMPT,
    "negative_prompt": PROMPT,
    "decoder_prompt": PROMPT,
    "storyline": _listed(PROMPT, 64, 1),
    "messages": _listed(MESSAGE, 1024, 1),
    "image": _listed(FILE, 64),
    "mask_image": FILE,
    "mask_coverage": SHARE,
    "seed": SEED,
    "height": SIDE,
    "width": SIDE,
    "resolution": SIDE,
    "aspect_ratio": _text(32, r"\d+(\.\d+)?:\d+(\.\d+)?"),
    "guidance_scale": _per_scale(STRENGTH),
    "image_guidance_scale": _per_scale(STRENGTH),
    "guidance_schedule": _one_of("constant", "linear", "early"),
    "temperature": _per_scale(_number(0, 1e6)),
    "top_k": _per_scale(TOP_K),
    "top_p": _per_scale(SHARE),
    "text_temperature": _number(0, 1e6),
    "text_top_k": TOP_K,
    "text_top_p": SHARE,
    "num_scales": SCALES,
    "keep_scales": SCALES,
    "think": FLAG,
    "max_new_tokens": TOKENS,
    "max_images": IMAGES,
    "num_frames": IMAGES,
    "columns": IMAGES,
    "decoder": _one_of("vq", "diffusion"),
    "decoder_num_inference_steps": _integer(1, 1000),
    "decoder_guidance_scale": STRENGTH,
    "decoder_strength": SHARE,
    "decoder_tile_size": SIDE,
}
RECORD = {
    "format": _integer(1, 1),
    "command": _one_of("generate", "edit", "interleave", "frames", "chat", "reconstruct"),
    "weights": _mapping(VERSION, 32),
    "environment": _mapping(VERSION, 32),
    "batch": _either(NOTHING, _table(seeds=_listed(SEED, 4096, 1), index=_integer(0, 4095))),
}
RESULTS = {"thought": PROMPT, "final_prompt": PROMPT, "number": _either(NOTHING, _integer(0, 4096))}


def check_record(record: Any) -> None:
    """Raises `ValueError` where `record`, an object of JSON, has what no record has, or lacks what each has."""
    if not isinstance(record, dict):
        raise ValueError(f"it is {reprlib.repr(record)}, expected an object")
    tables = {"arguments": ARGUMENTS, "results": RESULTS}
    if record.keys() != {*RECORD, *tables}:
        raise ValueError(f"it has {reprlib.repr(sorted(record))}, expected {sorted({*RECORD, *tables})}")
    _check("", {name: value for name, value in record.items() if name not in tables}, RECORD)
    for name, rules in tables.items():
        if not isinstance(record[name], dict):
            raise ValueError(f"{name} is {reprlib.repr(record[name])}, expected an object")
        _check(f"{name}.", record[name], rules)


def _check(prefix: str, values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    if unknown := sorted(set(values) - set(rules)):
        raise ValueError(f"it has {reprlib.repr(unknown)}, which this version does not know")
    for name, value in values.items():
        if not rules[name].accepts(value):
            raise ValueError(f"{prefix}{name} is {reprlib.repr(value)}, expected {rules[name].expected}")


__all__ = ["check_record"]
