"""The options that commands share: one table of their values and meanings, from which parsers are made.

Names are those of the pipeline's arguments. An option that is not given is `None`: the pipeline has its own defaults,
and `--from-image` fills in only what is `None`.
"""

import argparse
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..hub_cards import SHIPPED, installed_models
from . import rules
from .console import OneLineParser


SHIPPED_MODEL = SHIPPED[0]


class Option(NamedTuple):
    """Values, `--help` and placeholder of an option; one without help is a positional argument."""

    rule: rules.Rule
    help: str | None = None
    metavar: str | None = None


# Every option that an image's record may have: commands/records.py reads the rules from here.
OPTIONS = {
    "model": Option(
        rules.NAME,
        f"folder or Hub id of a pipeline, or one that is installed ({', '.join(installed_models())}); "
        f"default: {SHIPPED_MODEL}",
        "MODEL",
    ),
    "transformer": Option(
        rules.NAME, "use this transformer in the pipeline: a run, a checkpoint, a pipeline or a Hub id", "PATH"
    ),
    "vision_tokenizer": Option(
        rules.NAME, "use this vision tokenizer in the pipeline, likewise; it must have the same codes", "PATH"
    ),
    "revision": Option(rules.NAME, "branch, tag or commit of a model on the Hub", "NAME"),
    "device": Option(
        rules.text(32, r"[a-z]+(:\d{1,3})?"),
        "cpu, cuda, cuda:1, mps, ...; default: the accelerator if there is one",
        "NAME",
    ),
    "dtype": Option(
        rules.one_of("auto", "float32", "bfloat16", "float16"),
        "load the weights in this type; default: auto, each component in the type that it was saved in",
    ),
    "quantize": Option(rules.one_of("4bit", "8bit"), "quantise the transformer with bitsandbytes"),
    "lora": Option(
        rules.listed(rules.NAME, 16),
        "add a LoRA to the transformer: a file, a folder or a Hub id; repeat the option for several",
        "PATH[=SCALE]",
    ),
    "prompt": Option(rules.PROMPT),
    "storyline": Option(rules.listed(rules.PROMPT, 64, 1)),
    "messages": Option(
        rules.listed(rules.MESSAGE, 1024, 1)._replace(reads={"type": Path}),
        "JSON file with the conversation so far; - reads standard input",
        "FILE",
    ),
    "image": Option(rules.listed(rules.FILE, 64), "image of the prompt; repeat the option for several", "FILE"),
    "seed": Option(
        rules.SEED, "random seed; further images take the numbers after it; default: a random one, which is shown", "N"
    ),
    "height": Option(rules.SIDE, "height in pixels; the model's nearest size is taken", "PIXELS"),
    "width": Option(rules.SIDE, "width in pixels, with --height", "PIXELS"),
    "aspect_ratio": Option(
        rules.text(32, r"\d+(\.\d+)?:\d+(\.\d+)?"), "such as 16:9, instead of --height and --width", "WIDTH:HEIGHT"
    ),
    "resolution": Option(rules.SIDE, "side in pixels of a square image with as many scales", "PIXELS"),
    "negative_prompt": Option(rules.PROMPT, "text that guidance leads away from", "TEXT"),
    "guidance_scale": Option(
        rules.per_scale(rules.STRENGTH), "strength of guidance by the text; 1 turns it off and saves its cost", "X"
    ),
    "guidance_schedule": Option(
        rules.one_of("constant", "linear", "early"),
        "linear: guidance rises from 1 at the first scale to --guidance-scale; early: none at the last two scales",
    ),
    "temperature": Option(rules.per_scale(rules.TEMPERATURE), "0 takes the most likely code", "X"),
    "top_k": Option(rules.per_scale(rules.TOP_K), "sample from the N most likely codes; 0 is all", "N"),
    "top_p": Option(rules.per_scale(rules.SHARE), "sample from the most likely codes that have this probability", "X"),
    "image_guidance_scale": Option(
        rules.per_scale(rules.STRENGTH), "strength of guidance towards the given images; 1 turns it off", "X"
    ),
    "keep_scales": Option(
        rules.SCALES, "keep the first N scales of the first image, and sample the others: variations of a layout", "N"
    ),
    "mask_image": Option(rules.FILE, "inpaint: sample the first image anew where this one is white", "FILE"),
    "mask_coverage": Option(
        rules.SHARE, "share of a coarse cell that must be white for it to be sampled; default: 0.6", "X"
    ),
    "think": Option(
        rules.FLAG._replace(reads={"action": argparse.BooleanOptionalAction}), "write a thought before each image"
    ),
    "max_new_tokens": Option(
        rules.integer(1, 131_072), "longest answer or thought, in tokens; an image counts as one", "N"
    ),
    "num_scales": Option(rules.SCALES, "stop after the first N scales: a fast preview", "N"),
    "text_temperature": Option(rules.TEMPERATURE, "sample the text; 0 takes the most likely token", "X"),
    "text_top_k": Option(rules.TOP_K, "sample from the N most likely tokens", "N"),
    "text_top_p": Option(rules.SHARE, "sample from the most likely tokens that have this probability", "X"),
    "max_images": Option(rules.IMAGES, "most images of the answer; default: 4", "N"),
    "num_frames": Option(rules.IMAGES, "number of frames, for a storyline in one text", "N"),
    "columns": Option(rules.IMAGES, "columns of a contact sheet; default: 4", "N"),
    "decoder": Option(
        rules.one_of("vq", "diffusion"), "vq: the vision tokenizer (default); diffusion: sharper and slower"
    ),
    "decoder_prompt": Option(
        rules.PROMPT, "caption for the diffusion decoder; default: the prompt of a new image", "TEXT"
    ),
    "decoder_num_inference_steps": Option(rules.integer(1, 1000), "steps of the diffusion decoder", "N"),
    "decoder_guidance_scale": Option(rules.STRENGTH, "guidance of the diffusion decoder by its caption", "X"),
    "decoder_strength": Option(rules.SHARE, "noise that the diffusion decoder starts from; 1 is noise alone", "X"),
    "decoder_tile_size": Option(rules.SIDE, "decode by tiles of this size, to save memory", "PIXELS"),
}
# How an image is sampled.
SIZE = ("height", "width", "aspect_ratio", "resolution")
SAMPLING = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")
DECODING = tuple(name for name in OPTIONS if name.startswith("decoder"))
# How text is written between images; of `chat`, the same without `text_`.
WRITING = ("max_new_tokens", "text_temperature", "text_top_k", "text_top_p")
# What is loaded, and on what.
MODEL = ("model", "transformer", "vision_tokenizer", "revision", "device", "dtype", "quantize", "lora")


def new_parser(name: str, description: str, examples: str = "") -> argparse.ArgumentParser:
    """Return a parser for `nextflow-hf <name>`."""
    parser = OneLineParser(
        prog=f"nextflow-hf {name}",
        description=description,
        epilog=examples and f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    parser.set_defaults(json=False, quiet=False)
    return parser


def add_options(parser: argparse.ArgumentParser, title: str | None, *names: str, prefix: str = "") -> Any:
    """
    Add options of the table.

    Args:
        title (`str`, *optional*): Title of a new group for them; without it they join the parser's own options.
        names: Keys of [`OPTIONS`].
        prefix (`str`, *optional*): What to remove from their names: `text_top_k` becomes `--top-k` where all is text.

    Returns:
        The group, or the parser.
    """
    group = parser if title is None else parser.add_argument_group(title)
    for name in names:
        rule, text, metavar = OPTIONS[name]
        flag = "--" + name.removeprefix(prefix).replace("_", "-")
        group.add_argument(flag, help=text, **({"metavar": metavar} if metavar else {}), **rule.reads)
    return group


def add_model_options(parser: argparse.ArgumentParser, *, samples: bool = True, names_model: bool = True) -> None:
    """
    Add what is loaded, and on which device.

    Args:
        samples (`bool`): Whether the command loads the transformer.
        names_model (`bool`): Whether the pipeline is the option `--model`, and not a positional argument.
    """
    left_out = {*(() if names_model else ("model",)), *(() if samples else ("transformer", "quantize", "lora"))}
    group = add_options(parser, "model", *(name for name in MODEL if name not in left_out))
    group.add_argument(
        "--offload", action="store_true", help="keep a component on the accelerator only while it computes"
    )


def add_image_settings(parser: argparse.ArgumentParser) -> None:
    """Add size and sampling of an image."""
    add_options(parser, "size of the image", *SIZE)
    add_options(parser, "sampling (one value, or one for each scale: 1,2,3)", "negative_prompt", *SAMPLING)


def add_recall_options(parser: argparse.ArgumentParser) -> None:
    """Add `--from-image`, which repeats an image from its record."""
    group = parser.add_argument_group("metadata")
    group.add_argument(
        "--from-image",
        type=Path,
        metavar="PNG",
        help="take all options from the record in this image; those given on the command line replace them",
    )
    group.add_argument(
        "--allow-model",
        action="store_true",
        help="with --from-image: load the model and the LoRAs that the record names, from a folder or the Hub",
    )
    add_no_metadata(group)


def add_no_metadata(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--no-metadata`."""
    parser.add_argument("--no-metadata", action="store_true", help="do not record in the images how they were made")


def add_console_options(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--quiet`, which [`Console`] follows."""
    group = parser.add_argument_group("console")
    group.add_argument("--json", action="store_true", help="print one JSON object, for scripts")
    group.add_argument("--quiet", action="store_true", help="print no progress")


def whole(low: int = 1, high: int = 2**32 - 1) -> Callable[[str], int]:
    """Reads an integer of a range, for argparse; by default a positive one. With `low=0` also a seed."""

    def integer(text: str) -> int:
        number = int(text)
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{number} is out of range, expected {low} to {high}")
        return number

    return integer


def one_text(words: list[str], parser: argparse.ArgumentParser) -> str | None:
    """Return the text of a positional argument. Without quotes the shell splits it into words: refuse several."""
    if len(words) > 1:
        parser.error(f'got {len(words)} texts, expected one, in quotes: "{" ".join(words)}"')
    return words[0] if words else None


def choose_seed(seed: int | None) -> int:
    """Return the given seed, or a random one."""
    if seed is None:
        return secrets.randbelow(2**32)
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is {seed}, expected 0 to {2**63 - 1}")
    return seed
