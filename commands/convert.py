"""Released weights of others as NextFlow's:

    nextflow-hf convert tokenflow tokenflow_clipb_32k_enhanced.pt vision_tokenizer
    nextflow-hf convert qwen Qwen/Qwen2.5-VL-7B-Instruct transformer --vision-tokenizer vision_tokenizer

`--dry-run` says what would go where, and how large the result is. It writes nothing, and of a model on the Hub it
reads the names and shapes alone.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .console import one_line_mistakes


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


LEFT_BEHIND, NEW = "(left behind)", "(new)"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nextflow-hf convert", description="Released weights of others as NextFlow's."
    )
    sources = parser.add_subparsers(dest="source", metavar="source", required=True)

    tokenflow = sources.add_parser("tokenflow", help="a TokenFlow tokenizer as a NextFlowVisionTokenizer")
    tokenflow.add_argument("checkpoint", type=Path, help="tokenflow_*.pt, or its weights as safetensors")
    tokenflow.add_argument(
        "--image-size", type=int, help="pixels a side: 224 or 256 (default) with CLIP, 384 with SigLIP"
    )
    tokenflow.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s"
    )

    qwen = sources.add_parser(
        "qwen", help="a Qwen language model as the NextFlowForCausalLM that training starts from"
    )
    qwen.add_argument("model", help="folder or Hub id of a Qwen2.5-VL, Qwen2.5, Qwen3 or Qwen3-VL, dense")
    qwen.add_argument("--vision-tokenizer", required=True, help="folder or Hub id: its codebook becomes the embedding")
    qwen.add_argument("--revision", help="of the model on the Hub")
    qwen.add_argument("--image-token-id", type=int, help="placeholder of image cells; default: Qwen's <|image_pad|>")
    qwen.add_argument("--seed", type=int, default=0, help="of the new rows and modules; default: %(default)s")
    qwen.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: as in the files"
    )
    for command in (tokenflow, qwen):
        command.add_argument("output", type=Path, help="folder to write: new, or empty")
        command.add_argument("--max-shard-size", default="5GB", help="of one file; default: %(default)s")
        command.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
        command.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    return parser


@one_line_mistakes("convert")
def main(argv: Sequence[str] | None = None) -> int:
    """Convert, or say what would be; returns the exit status."""
    args = make_parser().parse_args(argv)
    # Weights are read where they lie while the output is written: into the same folder would destroy both.
    if not args.dry_run and args.output.exists() and (args.output.is_file() or any(args.output.iterdir())):
        raise FileExistsError(f"{args.output} exists and is not an empty folder")
    (convert_tokenflow if args.source == "tokenflow" else convert_qwen)(args)
    return 0


def convert_tokenflow(args: argparse.Namespace) -> None:
    import torch

    from ..conversion import from_tokenflow as conversion

    dtype = getattr(torch, args.dtype)
    print(f"reading {args.checkpoint}", flush=True)
    if not args.dry_run:
        save(conversion.from_tokenflow(args.checkpoint, image_size=args.image_size, dtype=dtype), args)
        return
    state = {name: tensor.to("meta") for name, tensor in conversion.load_tokenflow(args.checkpoint).items()}
    config = conversion.config_from_tokenflow(state, image_size=args.image_size)
    model = conversion.empty_tokenizer(config)
    conversion.convert_tokenflow(state, model)  # raises what the conversion itself would
    print_plan(
        (name, tensor.shape, " + ".join(conversion.target_names(name, config)) or LEFT_BEHIND)
        for name, tensor in state.items()
    )
    print(f"images of {config.image_size} x {config.image_size} pixels, scales {list(config.scale_sides)}")
    print_size(conversion.cast(model, dtype).parameters())


def convert_qwen(args: argparse.Namespace) -> None:
    import torch

    from ..conversion import from_qwen as conversion
    from ..modeling_nextflow.configuration_nextflow import NextFlowVisionTokenizerConfig
    from ..modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer

    tokenizer_config = NextFlowVisionTokenizerConfig.from_pretrained(args.vision_tokenizer)
    overrides = {name: getattr(tokenizer_config, name) for name in ("semantic_code_dim", "pixel_code_dim")}
    if args.image_token_id is not None:
        overrides["image_token_id"] = args.image_token_id
    print(f"reading {args.model}", flush=True)
    if not args.dry_run:
        vision_tokenizer = NextFlowVisionTokenizer.from_pretrained(args.vision_tokenizer)
        codebook = vision_tokenizer.codebook.detach()
        overrides["vision_tokenizer_fingerprint"] = vision_tokenizer.get_codes_fingerprint()
        model = conversion.from_qwen(
            args.model,
            codebook,
            dtype=args.dtype,
            seed=args.seed,
            config_overrides=overrides,
            revision=args.revision,
        )
        save(model, args)
        return
    source, state = conversion.read_shapes(args.model, revision=args.revision)
    config = conversion.config_from_qwen(source, codebook_size=tokenizer_config.codebook_size, **overrides)
    model = conversion.empty_model(config)
    converted = conversion.convert_qwen(state, model, tied=source.tie_word_embeddings)
    names = {id(tensor): name for name, tensor in state.items()}
    rows = [(names[id(tensor)], tensor.shape, name) for name, tensor in converted.items()]
    used = {name for name, _, _ in rows}
    rows += [(name, tensor.shape, LEFT_BEHIND) for name, tensor in state.items() if name not in used]
    rows += [(NEW, tensor.shape, name) for name, tensor in model.state_dict().items() if name not in converted]
    print_plan(rows)
    print(
        f"vocabulary of {config.vocab_size}: {config.text_vocab_size} of text, {config.codebook_size} codes, 2 marks"
    )
    print_size(model.to(state[rows[0][0]].dtype if args.dtype == "auto" else getattr(torch, args.dtype)).parameters())


def save(model: "PreTrainedModel", args: argparse.Namespace) -> None:
    print_size(model.parameters())
    from ..atomic import replaced_folder

    with replaced_folder(args.output) as staging:
        model.save_pretrained(staging, max_shard_size=args.max_shard_size)  # with a progress bar over its files
    print(f"written: {args.output.resolve()}")


def print_plan(rows: Iterable[tuple[str, Sequence[int], str]]) -> None:
    """Source, shape and target of every tensor, one line for all that differ in the numbers of their names alone."""
    groups: dict[tuple, list[tuple[str, str]]] = {}
    for source, shape, target in rows:
        alike = re.sub(r"\b\d+\b", "#", source), tuple(shape), re.sub(r"\b\d+\b", "#", target)
        groups.setdefault(alike, []).append((source, target))
    for (source, shape, target), members in groups.items():
        if len(members) == 1:
            source, target = members[0]
        print(f"{len(members):4} x {list(shape)}  {source} -> {target}")


def print_size(parameters: Iterable["torch.nn.Parameter"]) -> None:
    count = size = 0
    for parameter in parameters:
        count += parameter.numel()
        size += parameter.numel() * parameter.itemsize
    print(f"{count:,} parameters, {size / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
