"""`nextflow-hf convert`: released weights of others as NextFlow's."""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..training.common.folders import VISION_TOKENIZERS, check_folder
from .console import one_line_mistakes
from .options import new_parser, whole


if TYPE_CHECKING:
    import torch

    from ..modeling_nextflow.configuration_nextflow import NextFlowVisionTokenizerConfig
    from ..processing.processing_nextflow import NextFlowProcessor


LEFT_BEHIND, NEW = "(left behind)", "(new)"


EXAMPLES = """\
  nextflow-hf convert qwen Qwen/Qwen2.5-VL-7B-Instruct model --vision-tokenizer tokenflow_clipb_32k_enhanced.pt
  nextflow-hf convert qwen Qwen/Qwen2.5-VL-7B-Instruct model --vision-tokenizer tokenflow.pt --dry-run
  nextflow-hf convert tokenflow tokenflow_clipb_32k_enhanced.pt vision_tokenizer
"""


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "convert",
        "Convert released weights: a Qwen language model to a complete pipeline that training starts from, or a\n"
        "TokenFlow tokenizer to a vision tokenizer.",
        EXAMPLES,
    )
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    qwen = sources.add_parser("qwen", help="make a pipeline from a Qwen language model and a vision tokenizer")
    qwen.add_argument("model", help="folder or Hub id of a dense Qwen2.5-VL, Qwen2.5, Qwen3 or Qwen3-VL")
    qwen.add_argument(
        "--vision-tokenizer",
        required=True,
        metavar="SOURCE",
        help="folder or Hub id of a vision tokenizer or of a pipeline, or TokenFlow's .pt; its codebook becomes the "
        "embedding of the image codes",
    )
    qwen.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the model on the Hub")
    qwen.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="seed of the new rows and modules; default: %(default)s"
    )
    tokenflow = sources.add_parser("tokenflow", help="make a vision tokenizer from a TokenFlow tokenizer")
    tokenflow.add_argument("checkpoint", type=Path, help="tokenflow_*.pt, or its weights as safetensors")
    tokenflow.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="224 or 256 (default) with CLIP, 384 with SigLIP"
    )
    for command, default in ((tokenflow, "float32"), (qwen, "auto")):
        command.add_argument("output", type=Path, help="folder to write; new, or empty")
        command.add_argument(
            "--dtype",
            choices=("auto", "float32", "bfloat16", "float16")[command is tokenflow :],
            default=default,
            help="type of the weights in the files; default: %(default)s"
            + (", the type that the source has" if default == "auto" else ""),
        )
        command.add_argument(
            "--max-shard-size", default="5GB", metavar="SIZE", help="largest file of weights; default: %(default)s"
        )
        command.add_argument(
            "--dry-run", action="store_true", help="say what goes where, and how large the result is; write nothing"
        )
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
    """`convert tokenflow`: a TokenFlow checkpoint as a folder of our vision tokenizer."""
    import torch

    from ..conversion import from_tokenflow as conversion
    from ..conversion.assemble import image_processor_for
    from ..hub_cards.cards import PLACEHOLDER_OWNER, create_card
    from ..hub_cards.export import export_vision_tokenizer

    dtype = getattr(torch, args.dtype)
    print(f"reading {args.checkpoint}", flush=True)
    if not args.dry_run:
        model = conversion.from_tokenflow(args.checkpoint, image_size=args.image_size, dtype=dtype)
        print_size(model.parameters())
        card = create_card("vision_tokenizer", repo_id=f"{PLACEHOLDER_OWNER}/{args.output.name}")
        export_vision_tokenizer(
            model, image_processor_for(model.config), args.output, card, max_shard_size=args.max_shard_size
        )
        print(f"written: {args.output.resolve()}, a vision tokenizer: `nextflow-hf reconstruct --model` shows it")
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
    """`convert qwen`: a Qwen and a vision tokenizer as a pipeline folder, or with `--dry-run` the plan of it."""
    from transformers import AutoConfig

    from ..conversion import assemble
    from ..conversion.from_qwen import check_source, checkpoint_folder, from_qwen
    from ..hub_cards.cards import converted_card
    from ..hub_cards.export import export_pipeline
    from ..pipelines.pipeline_nextflow import NextFlowPipeline

    check_folder(args.model, "Qwen checkpoint")
    check_folder(args.vision_tokenizer, *VISION_TOKENIZERS, "pipeline")
    print(f"reading {args.model}", flush=True)
    check_source(source := AutoConfig.from_pretrained(args.model, revision=args.revision))
    vision_tokenizer = assemble.load_vision_tokenizer(args.vision_tokenizer)
    processor = assemble.make_processor(
        assemble.load_image_processor(args.vision_tokenizer, vision_tokenizer.config),
        assemble.load_text_tokenizer(args.model, revision=args.revision),
        text_vocab_size=source.get_text_config().vocab_size,
        codebook_size=vision_tokenizer.config.codebook_size,
    )
    fields = assemble.transformer_fields(processor, vision_tokenizer)
    if args.dry_run:
        plan_qwen(args, source, fields)
        print_parts(args, processor, vision_tokenizer.config)
        return
    model = from_qwen(
        checkpoint_folder(args.model, revision=args.revision),
        vision_tokenizer.codebook.detach(),
        dtype=args.dtype,
        seed=args.seed,
        config_overrides=fields,
    )
    print_parts(args, processor, vision_tokenizer.config)
    print_size(model.parameters())
    pipeline = NextFlowPipeline(model, vision_tokenizer, processor)
    card = converted_card(pipeline, args.output.name, args.model, args.vision_tokenizer)
    export_pipeline(pipeline, args.output, card, max_shard_size=args.max_shard_size)
    print(
        f"written: {args.output.resolve()}, a pipeline. It cannot make images before `nextflow-hf train transformer`"
    )


def plan_qwen(args: argparse.Namespace, source: object, fields: dict) -> None:
    """Print where each tensor of the checkpoint would go, without reading weights."""
    import torch

    from ..conversion import from_qwen as conversion

    _, state = conversion.read_shapes(args.model, revision=args.revision)
    config = conversion.config_from_qwen(source, **fields)
    model = conversion.empty_model(config)
    converted = conversion.convert_qwen(state, model, tied=source.tie_word_embeddings)
    names, whole = {id(tensor): name for name, tensor in state.items()}, model.state_dict()
    added = {name: len(whole[name]) - len(tensor) for name, tensor in converted.items()}
    rows = [
        (names[id(tensor)], tensor.shape, name + (f", and {added[name]} new rows" if added[name] else ""))
        for name, tensor in converted.items()
    ]
    used = {name for name, _, _ in rows}
    rows += [(name, tensor.shape, LEFT_BEHIND) for name, tensor in state.items() if name not in used]
    codebook = {"model.image_codebook.weight": f"(codebook of {args.vision_tokenizer})"}
    rows += [(codebook.get(name, NEW), tensor.shape, name) for name, tensor in whole.items() if name not in converted]
    print_plan(rows)
    dtype = state[rows[0][0]].dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    print_size(model.to(dtype).parameters())


def print_parts(
    args: argparse.Namespace, processor: "NextFlowProcessor", vision_tokenizer: "NextFlowVisionTokenizerConfig"
) -> None:
    """The parts of the pipeline, and where they are from."""
    codes, total, images = vision_tokenizer.codebook_size, len(processor.tokenizer), processor.image_processor
    print(f"vocabulary of {total}: {total - codes - 2} of text from {args.model}, {codes} codes, <boi> and <eoi>")
    scales = images.schedule.num_scales(images.resolution)
    print(
        f"images of {images.resolution} x {images.resolution} pixels and {len(images.schedule.buckets)} shapes, in "
        f"{scales} scales, by {args.vision_tokenizer}"
    )
    for part, place in (("transformer and processor", ""), ("vision tokenizer", "vision_tokenizer")):
        print(f"{part} -> {args.output / place}")


def print_plan(rows: Iterable[tuple[str, Sequence[int], str]]) -> None:
    """Source, shape and target of every tensor, one line for all that differ in the numbers of their names alone."""
    print("tensors, shape, source -> target; # is any number")
    groups: dict[tuple, list[tuple[str, str]]] = {}
    for source, shape, target in rows:
        alike = re.sub(r"\b\d+\b", "#", source), tuple(shape), re.sub(r"\b\d+\b", "#", target)
        groups.setdefault(alike, []).append((source, target))
    for (source, shape, target), members in groups.items():
        if len(members) == 1:
            source, target = members[0]
        print(f"{len(members):4} x {list(shape)}  {source} -> {target}")


def print_size(parameters: Iterable["torch.nn.Parameter"]) -> None:
    """Print the number of parameters and their size in GB."""
    count = size = 0
    for parameter in parameters:
        count += parameter.numel()
        size += parameter.numel() * parameter.itemsize
    print(f"{count:,} parameters, {size / 1e9:.2f} GB", flush=True)
