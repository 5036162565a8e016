"""`nextflow-hf info`: what a model is, without loading it; how an image was made."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import options, records
from .console import Console, run
from .options import new_parser


EXAMPLES = """\
  nextflow-hf info                                     # the shipped model
  nextflow-hf info user/nextflow --dtype bfloat16      # of a model on the Hub only the configuration is read
  nextflow-hf info circle.png                          # how an image was made
"""


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("info", "Describe a model without loading it, or say how an image was made.", EXAMPLES)
    parser.add_argument(
        "model",
        nargs="?",
        help="folder or Hub id of a pipeline, or of a transformer or vision tokenizer alone; or an image made by "
        f"nextflow-hf; default: {options.SHIPPED_MODEL}",
    )
    options.add_options(parser, "model", "revision", "dtype")
    options.add_console_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Say what it is; returns the exit status."""
    return run("info", make_parser().parse_args(argv), info)


def info(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Describe a model, or print the record of an image; returns what `--json` prints."""
    if args.model is not None and Path(args.model).is_file():
        record = asdict(records.read_record(Path(args.model)))
        console.show(json.dumps(record, indent=2, ensure_ascii=False))
        return {"image": args.model, "record": record}

    from .checkpoint import describe, read_checkpoint

    folder = read_checkpoint(args.model, revision=args.revision)
    described = describe(folder, dtype=None if args.dtype == "auto" else args.dtype)
    described["model"] = args.model or options.SHIPPED_MODEL
    for line in _lines(described):
        console.show(line)
    return described


def _lines(described: Mapping[str, Any]) -> list[str]:
    """The description as lines of text."""
    lines = [f"{described['model']}: {described['class']}", "", "components"]
    for part in described["components"]:
        line = f"  {part['name']:<18} {part['class']}"
        if part["parameters"] is not None:
            line += f", {part['parameters']:,} parameters, {part['dtype']}, {size(part['bytes'])}"
        lines.append(line)
    if "vocabulary" in described:
        words, layers = described["vocabulary"], described["attention"]
        lines += [
            "",
            f"vocabulary  {words['total']:,} tokens: {words['text']:,} of text, {words['image_codes']:,} image codes, "
            f"{words['other']} others",
            f"codes       {words['semantic_code_dim']} semantic and {words['pixel_code_dim']} pixel dimensions",
            f"layers      {layers['layers']} of width {layers['hidden_size']}",
            f"attention   {layers['heads']} heads of {layers['head_dim']}, {layers['key_value_heads']} of keys and "
            f"values, {layers['implementation']}",
        ]
    if "sampling" in described:
        settings = ", ".join(f"{name} {value}" for name, value in described["sampling"].items())
        lines.append(f"sampling    {settings}")
    memory = described["memory"]
    lines += ["", f"memory      {size(memory['weights_bytes'])} for the weights in {memory['dtype']}"]
    if "kv_cache_bytes_per_token" in memory:
        lines[-1] += f", {size(memory['kv_cache_bytes_per_token'])} a token for keys and values"
    if "resolutions" in described:
        lines += ["", "resolution  pixels    scales    codes    keys and values of an image, with guidance"]
        for one in described["resolutions"]:
            mark = "*" if one["resolution"] == described["resolution"] else " "
            line = f"          {mark} {one['resolution']:>6}    {one['scales']:>6}    {one['codes']:>5}"
            if "kv_cache_bytes" in one:
                line += f"    {size(one['kv_cache_bytes'])}, {size(one['kv_cache_bytes_guided'])}"
            lines.append(line)
        lines.append("            of a square; * is the default")
        shapes = [f"{bucket['width']}x{bucket['height']}" for bucket in described["buckets"]]
        lines.append(f"shapes      {len(shapes)}, from {shapes[0]} to {shapes[-1]} pixels (width x height)")
    return lines


def size(count: float) -> str:
    """A number of bytes with its unit."""
    for unit, worth in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= worth:
            return f"{count / worth:.3g} {unit}"
    return f"{count:.0f} bytes"
