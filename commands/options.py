"""Options that several commands have, under the names of the pipeline's arguments. All are None where not given: what
the pipeline takes by default is for it to know, and a value from an image's metadata can tell that it is wanted."""

import argparse
import secrets
import sys
from collections.abc import Callable
from pathlib import Path


# Arguments of `NextFlowPipeline.__call__` that say how an image is drawn.
SIZE = ("height", "width", "aspect_ratio", "resolution")
SAMPLING = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p")
DECODING = (
    "decoder",
    "decoder_prompt",
    "decoder_num_inference_steps",
    "decoder_guidance_scale",
    "decoder_strength",
    "decoder_tile_size",
)
# How text is written between images; of `chat`, the same without `text_`.
WRITING = ("max_new_tokens", "text_temperature", "text_top_k", "text_top_p")
# What is loaded, and on what.
MODEL = ("model", "transformer", "vision_tokenizer", "revision", "device", "dtype", "quantize", "lora")

SHIPPED_MODEL = "nextflow-shapes"


def per_scale(number: Callable[[str], float]) -> Callable[[str], float | list[float]]:
    """`3` for all scales, or `1,2,3` with a value for each."""

    def parse(text: str) -> float | list[float]:
        values = [number(value) for value in text.split(",")]
        return values[0] if len(values) == 1 else values

    parse.__name__ = f"{number.__name__}, or a comma-separated list of them"  # in argparse's error
    return parse


def new_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of `nextflow-hf <name>`."""
    return argparse.ArgumentParser(
        prog=f"nextflow-hf {name}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def one_text(words: list[str], name: str) -> str | None:
    """The text of a positional argument, which a shell has cut into words where it was not in quotes."""
    if len(words) > 1:
        print(
            f'nextflow-hf {name}: got {len(words)} texts, expected one, in quotes: "{" ".join(words)}"',
            file=sys.stderr,
        )
        raise SystemExit(2)
    return words[0] if words else None


def choose_seed(seed: int | None) -> int:
    """The seed that is given, else a random one."""
    if seed is None:
        return secrets.randbelow(2**32)
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is {seed}, expected 0 to {2**63 - 1}")
    return seed


def add_model_options(parser: argparse.ArgumentParser, *, draws: bool = True, names_model: bool = True) -> None:
    group = parser.add_argument_group("model")
    if names_model:
        group.add_argument(
            "--model", help=f"folder or Hub id of a NextFlowPipeline; default: {SHIPPED_MODEL}, shipped"
        )
    if draws:
        group.add_argument(
            "--transformer",
            metavar="PATH",
            help="in the place of its own: a run, a checkpoint, a pipeline or a Hub id",
        )
    group.add_argument(
        "--vision-tokenizer", metavar="PATH", help="in the place of its own, likewise; of the same codes"
    )
    group.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; default: the accelerator, where there is one")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights; default: auto, each component as it was saved",
    )
    if draws:
        group.add_argument("--quantize", choices=("4bit", "8bit"), help="the transformer, by bitsandbytes")
        group.add_argument(
            "--lora",
            action="append",
            metavar="PATH[=SCALE]",
            help="file, folder or Hub id of a LoRA for the transformer; repeat for several",
        )
    group.add_argument("--offload", action="store_true", help="keep on the accelerator only what computes")


def add_conversation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=Path, action="append", metavar="FILE", help="to show; repeat for several")
    parser.add_argument(
        "--messages", type=Path, metavar="FILE", help="the conversation so far, as JSON (-: standard input)"
    )


def add_size_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("size of the image")
    group.add_argument("--height", type=int, metavar="PIXELS", help="snapped to the nearest size the model knows")
    group.add_argument("--width", type=int, metavar="PIXELS")
    group.add_argument("--aspect-ratio", metavar="WIDTH:HEIGHT", help="such as 16:9, instead of a size")
    group.add_argument("--resolution", type=int, metavar="PIXELS", help="side of a square image with as many scales")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to draw (one value, or one for each scale: 1,2,3)")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    group.add_argument("--guidance-scale", type=per_scale(float), metavar="X", help="1 is none, and costs nothing")
    group.add_argument(
        "--guidance-schedule",
        choices=("constant", "linear", "early"),
        help="linear: from 1 at the first scale to the value; early: none at the last two scales",
    )
    group.add_argument("--temperature", type=per_scale(float), metavar="X", help="0 takes the best code")
    group.add_argument("--top-k", type=per_scale(int), metavar="N", help="codes to sample from; 0 is all")
    group.add_argument("--top-p", type=per_scale(float), metavar="X", help="probability mass to sample from")


def add_decoder_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pixels")
    group.add_argument(
        "--decoder", choices=("vq", "diffusion"), help="vq: the vision tokenizer (default); diffusion: sharper, slower"
    )
    group.add_argument("--decoder-prompt", metavar="TEXT", help="caption for the diffusion decoder")
    group.add_argument("--decoder-num-inference-steps", type=int, metavar="N")
    group.add_argument("--decoder-guidance-scale", type=float, metavar="X")
    group.add_argument("--decoder-strength", type=float, metavar="X")
    group.add_argument("--decoder-tile-size", type=int, metavar="PIXELS")


def add_writing_options(parser: argparse.ArgumentParser, *, prefix: str = "") -> None:
    group = parser.add_argument_group("how to write")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer; an image counts as one token")
    group.add_argument(f"--{prefix}temperature", type=float, metavar="X", help="sample; 0 takes the best token")
    group.add_argument(f"--{prefix}top-k", type=int, metavar="N", help="tokens to sample from")
    group.add_argument(f"--{prefix}top-p", type=float, metavar="X", help="probability mass to sample from")


def add_recall_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("metadata")
    group.add_argument(
        "--from-image",
        type=Path,
        metavar="PNG",
        help="repeat what made this image, pixel for pixel; other options then change it",
    )
    group.add_argument(
        "--allow-model",
        action="store_true",
        help="with --from-image: load the model and the LoRAs that the image names, from a folder or from the Hub",
    )
    group.add_argument("--no-metadata", action="store_true", help="save the images without how they were made")


def add_console_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("console")
    group.add_argument("--json", action="store_true", help="one JSON object on standard output, for scripts")
    group.add_argument("--quiet", action="store_true", help="no progress on standard error")
