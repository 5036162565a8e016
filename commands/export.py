"""`nextflow-hf export`: a run of training as a repository that everything loads, with a filled card."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.common.folders import TRANSFORMERS, VISION_TOKENIZERS, Run, check_folder, kind_of, read_run
from .console import one_line_mistakes
from .loading import find_model, load_transformer
from .options import new_parser


if TYPE_CHECKING:
    from .. import NextFlowDiffusionDecoderPipeline, NextFlowPipeline, NextFlowVisionTokenizer


# What has a part of a pipeline.
EXPORTED = (
    *TRANSFORMERS,
    *VISION_TOKENIZERS,
    "diffusion decoder",
    "run of a diffusion decoder",
    "NextFlowDiffusionDecoderPipeline",
)
# Arguments of `create_card` that a file may give.
CARD_KEYS = (
    "title",
    "summary",
    "images",
    "example",
    "use",
    "limits",
    "credits",
    "license",
    "language",
    "datasets",
    "tags",
)
# Options of a pipeline, which a part alone does not have.
OF_PIPELINES = ("transformer", "vision_tokenizer", "decoder", "standalone", "set", "without_code")
EXAMPLES = """\
  nextflow-hf export runs/full --output my-model
  nextflow-hf export runs/lora --checkpoint 500 --output my-model
  nextflow-hf export runs/decoder --model my-model --output my-model-with-decoder
"""


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "export",
        "Write the pipeline of a training run, with a card that says how it was made. The run's weights replace\n"
        "those that it started from, and an adapter is merged; all other parts come from the pipeline that the run\n"
        "started from, or from the options.",
        EXAMPLES,
    )
    parser.add_argument("run", type=Path, help="folder of a run, or of the weights that it saved")
    parser.add_argument(
        "--output", "-o", type=Path, required=True, metavar="FOLDER", help="folder to write; new, or empty"
    )
    parser.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="export this checkpoint; default: the finished result"
    )
    parser.add_argument("--model", help="pipeline with the other parts; default: the one that the run started from")
    parser.add_argument(
        "--transformer", metavar="PATH", help="use this transformer, where the run trained another part"
    )
    parser.add_argument(
        "--vision-tokenizer", metavar="PATH", help="use this vision tokenizer, where the run trained another part"
    )
    parser.add_argument("--decoder", type=Path, metavar="RUN", help="add the diffusion decoder of this run")
    parser.add_argument("--adapter", action="store_true", help="write the adapter alone, not merged")
    code = parser.add_mutually_exclusive_group()
    code.add_argument(
        "--standalone",
        action="store_true",
        help="let diffusers' DiffusionPipeline load it without this package, with trust_remote_code=True",
    )
    code.add_argument(
        "--without-code", action="store_true", help="leave out the code that loads the model without this package"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights in the files; default: as the run saved them",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="key=value",
        help="defaults of sampling that the model is exported with, such as guidance_scale=3 resolution=64",
    )
    parser.add_argument(
        "--card",
        type=Path,
        metavar="YAML",
        help="what the card says beyond the run: title, summary, use, limits, credits, license, ...",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest file of weights; default: %(default)s"
    )
    return parser


@one_line_mistakes("export")
def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns the exit status."""
    args = make_parser().parse_args(argv)
    if args.output.exists() and (args.output.is_file() or any(args.output.iterdir())):
        raise FileExistsError(f"{args.output} exists and is not an empty folder")
    check_folder(args.run, "run", *EXPORTED, *(["unfinished run"] if args.checkpoint else []))
    if args.model is not None:
        args.model = find_model(args.model)
    from ..hub_cards.cards import save_stages

    run = read_run(args.run, args.checkpoint)
    if args.vision_tokenizer is not None:  # the stages on the card are those of what is exported
        run.recipe["vision_tokenizer_name_or_path"] = args.vision_tokenizer
    if args.adapter:
        export_adapter_alone(args, run)
    elif run.kind == "tokenizer" and args.model is None and args.transformer is None:
        export_tokenizer_alone(args, run)
    else:
        export_whole(args, run)
    save_stages(run, args.output)
    return 0


def export_whole(args: argparse.Namespace, run: Run) -> None:
    """Write a run as a pipeline folder with a model card."""
    import torch

    from ..hub_cards.cards import run_card
    from ..hub_cards.export import export_pipeline
    from ..training.common.recipe import parse_assignments

    texts = read_texts(args.card)
    pipeline = assemble_pipeline(args, run)
    set_defaults(pipeline, parse_assignments(args.set))
    code = {"include_code": not args.without_code, "standalone": args.standalone}
    card = run_card("model", args.output.name, run, pipeline=pipeline, **code, **texts)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    export_pipeline(
        pipeline,
        args.output,
        card,
        dtype=dtype,
        max_shard_size=args.max_shard_size,
        **code,
    )
    print(f"written: {args.output.resolve()}, a pipeline: `nextflow-hf generate TEXT --model {args.output}` uses it")


def read_texts(card: Path | None) -> dict[str, Any]:
    """What `--card` says, as arguments of `create_card`."""
    from ..training.common.recipe import read_recipe

    texts = {} if card is None else read_recipe(card)
    if unknown := sorted({*texts} - {*CARD_KEYS}):
        raise ValueError(f"{card} has {unknown}, expected some of {list(CARD_KEYS)}")
    return texts


def refuse_options(args: argparse.Namespace, names: Sequence[str], what: str) -> None:
    """Refuse options that an export would ignore."""
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]:
        raise ValueError(f"{what}, which takes no {' and no '.join(given)}")


def set_defaults(pipeline: "NextFlowPipeline", settings: dict[str, Any]) -> None:
    """Write into a pipeline how it samples images where a call does not say, by the names of its call."""
    from ..modeling_nextflow.image_settings_nextflow import CONFIG_NAMES

    if unknown := sorted({*settings} - {*CONFIG_NAMES, "resolution"}):
        raise ValueError(f"--set has {unknown}, expected some of {[*CONFIG_NAMES, 'resolution']}")
    image_processor = pipeline.processor.image_processor
    if (resolution := settings.get("resolution")) is not None:
        image_processor.schedule.num_scales(resolution)  # refuses what it does not have
        image_processor.resolution = resolution
    of_config = {CONFIG_NAMES[name]: value for name, value in settings.items() if name in CONFIG_NAMES}
    pipeline.transformer.generation_config.update(**of_config)


def export_tokenizer_alone(args: argparse.Namespace, run: Run) -> None:
    """Write a run of the vision tokenizer as a folder of its own."""
    from ..conversion.assemble import load_image_processor, load_vision_tokenizer
    from ..hub_cards.cards import run_card
    from ..hub_cards.export import cast_copy, export_vision_tokenizer

    refuse_options(args, OF_PIPELINES, "without --model PIPELINE the vision tokenizer is exported alone")
    texts = read_texts(args.card)
    model = load_vision_tokenizer(run.result)
    if args.dtype is not None:
        import torch

        model = cast_copy(model, getattr(torch, args.dtype))
    image_processor = load_image_processor(run.result, model.config)
    card = run_card("vision_tokenizer", args.output.name, run, **texts)
    export_vision_tokenizer(model, image_processor, args.output, card, max_shard_size=args.max_shard_size)
    print(f"written: {args.output.resolve()}, a vision tokenizer. With --model PIPELINE it is put into that")


def export_adapter_alone(args: argparse.Namespace, run: Run) -> None:
    """Write the adapter of a run, without the model that it adapts."""
    from ..hub_cards.cards import PLACEHOLDER_OWNER, run_card
    from ..hub_cards.export import export_adapter

    if not run.is_adapter:
        raise ValueError(f"{run.result} is no adapter: leave out --adapter")
    refuse_options(args, (*OF_PIPELINES, "dtype"), "--adapter writes the adapter alone")
    texts = read_texts(args.card)
    base = args.model or run.base_pipeline
    if base is None or Path(base).exists():
        base = f"{PLACEHOLDER_OWNER}/{'BASE-MODEL' if base is None else Path(base).name}"
    card = run_card("adapter", args.output.name, run, base_model=base, **texts)
    export_adapter(run.result, args.output, card, base_model=base)
    print(f"written: {args.output.resolve()}, an adapter: `nextflow-hf generate TEXT --lora {args.output}` uses it")


def assemble_pipeline(args: argparse.Namespace, run: Run) -> "NextFlowPipeline":
    """The pipeline of a run: its own part, those of the options, and all others of what it started from."""
    from ..conversion.assemble import load_processor, load_vision_tokenizer
    from ..pipelines.pipeline_nextflow import NextFlowPipeline

    is_transformer, is_tokenizer = run.kind in ("transformer", "grpo"), run.kind == "tokenizer"
    kinds = {"transformer": is_transformer, "vision_tokenizer": is_tokenizer, "decoder": run.kind == "decoder"}
    for name, own in kinds.items():
        if own and getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, but that is what {args.run} trained"
            )
    base = args.model or run.base_pipeline
    parts: dict[str, Any] = {}
    if transformer := str(run.result) if is_transformer else args.transformer:
        parts["transformer"] = load_transformer(transformer)
    named = run.recipe.get("vision_tokenizer_name_or_path") if is_transformer and args.model is None else None
    if args.vision_tokenizer is not None:
        check_folder(args.vision_tokenizer, *VISION_TOKENIZERS, "pipeline")
    if vision_tokenizer := run.result if is_tokenizer else args.vision_tokenizer or named:
        parts["vision_tokenizer"] = load_vision_tokenizer(vision_tokenizer)
    if args.model is None and (processor := run.recipe.get("processor_name_or_path")):
        parts["processor"] = load_processor(processor)
    if base is not None:
        pipeline = NextFlowPipeline.from_pretrained(base, **parts)
    elif missing := [name for name in ("transformer", "vision_tokenizer", "processor") if name not in parts]:
        raise ValueError(
            f"{args.run} does not say where the {' and the '.join(missing)} of its pipeline are from: pass --model "
            "with the pipeline that it started from"
        )
    else:
        pipeline = NextFlowPipeline(**parts)
    decoder = run if run.kind == "decoder" else args.decoder and read_run(args.decoder)
    if decoder:
        pipeline = NextFlowPipeline(**{**pipeline.components, **decoder_parts(decoder, pipeline)})
    return pipeline


def decoder_parts(run: Run, pipeline: "NextFlowPipeline") -> dict[str, Any]:
    """The components of a pipeline that a diffusion decoder needs."""
    if run.kind != "decoder":
        raise ValueError(f"--decoder is {run.folder}, a run of kind {run.kind}, expected a diffusion decoder")
    decoder = decoder_of(run, pipeline.vision_tokenizer, pipeline.processor.image_processor)
    parts = {f"decoder_{name}": part for name, part in decoder.components.items() if part is not None}
    parts["diffusion_decoder"] = decoder.diffusion_decoder
    return {name: part for name, part in parts.items() if name in type(pipeline)._optional_components}


def decoder_of(
    run: Run, vision_tokenizer: "NextFlowVisionTokenizer", image_processor: Any
) -> "NextFlowDiffusionDecoderPipeline":
    """The decoder of a saved pipeline, or of a run: what its recipe names around the weights that it saved."""
    from ..pipelines.pipeline_nextflow_diffusion_decoder import NextFlowDiffusionDecoderPipeline
    from ..training.diffusion_decoder.build import DecoderArguments, build_decoder_pipeline, load_decoder

    if kind_of(run.result) == "NextFlowDiffusionDecoderPipeline":
        return NextFlowDiffusionDecoderPipeline.from_pretrained(run.result, vision_tokenizer=vision_tokenizer)
    if not run.recipe:
        raise ValueError(f"{run.folder} has no run.yaml, which names the denoiser and the scheduler of a decoder")
    names = {field.name for field in fields(DecoderArguments)}
    arguments = DecoderArguments(**{name: value for name, value in run.recipe.items() if name in names})
    is_lora, earlier = _is_lora(run.result), arguments.decoder_name_or_path
    if earlier is not None and (_is_lora(Path(earlier)) or not is_lora):  # what was saved holds all of it
        arguments.decoder_name_or_path = None
    decoder = build_decoder_pipeline(arguments, vision_tokenizer, image_processor)
    load_decoder(decoder, str(run.result))
    if is_lora:
        decoder.fuse_lora(components=["diffusion_decoder"])
        decoder.unload_lora_weights()
    decoder.diffusion_decoder.register_to_config(upscale_factor=arguments.upscale_factor)
    return decoder


def _is_lora(folder: Path) -> bool:
    return (folder / "pytorch_lora_weights.safetensors").is_file()
