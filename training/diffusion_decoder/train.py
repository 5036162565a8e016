"""Trains a diffusion decoder for the codes of a NextFlow model (§3.3), at their own size and then at twice that.

    accelerate launch -m nextflow_hf.training.diffusion_decoder.train --recipe diffusion_decoder_12b --data data.yaml \
        --output-dir runs/decoder

`--data` is the file that `nextflow-hf extract` has made codes of: it names the model, the sources of the pictures, and
the folder of the codes. Pictures of less than twice the size of their codes teach the second stage nothing: leave such
sources out there. A stage that is finished is skipped, an interrupted one goes on.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import set_seed

from ...commands.console import one_line_mistakes
from ..common.checkpoints import is_finished
from ..data.decoder_rows import NextFlowDecoderDataset
from ..data.description import load_rows_by_id, read_description
from ..data.extraction import load_codes
from .build import STAGES, build_decoder_pipeline, load_decoder_recipe, stage_arguments, train_stage


logger = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="A YAML file, or the name of one in training/recipes.")
    parser.add_argument("--data", required=True, help="The YAML file of the extraction.")
    parser.add_argument("--model", help="NextFlow repository: its processor and tokenizer. default: that of --data")
    parser.add_argument("--codes", help="Folder of the extracted shards. default: output_dir of --data")
    parser.add_argument("--output-dir", type=Path, required=True, help="Folder of both stages.")
    parser.add_argument("--stage", choices=STAGES, nargs="*", default=list(STAGES), help="Default: both, in order.")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="Of what stays frozen. default: %(default)s",
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of a mistake.")
    return parser


@one_line_mistakes("train-decoder")
def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status."""
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = load_decoder_recipe(args.recipe)
    given = {"model": args.model, "output_dir": args.codes}
    description = read_description(args.data, *(f"{key}={value}" for key, value in given.items() if value is not None))
    model, dtype = description.model, getattr(torch, args.dtype)
    if model.output_dir is None:
        raise ValueError(f"{args.data} has no output_dir: name the folder of the codes with --codes")
    processor = model.load_processor()
    tokenizer = model.load_vision_tokenizer(dtype=dtype)
    codes = load_codes(model.output_dir, vision_tokenizer=tokenizer)
    data = NextFlowDecoderDataset(codes, load_rows_by_id(description))
    # A denoiser that trains whole does so in float32.
    denoiser_dtype = dtype if "lora_rank" in recipe["training"] else None
    for stage in STAGES:
        if stage not in args.stage:
            continue
        use_cpu = not torch.accelerator.is_available()
        stage_args = stage_arguments(recipe, stage, args.output_dir, use_cpu=use_cpu)
        if is_finished(stage_args):
            continue
        logger.info("stage %s", stage)
        set_seed(stage_args.seed)
        pipeline = build_decoder_pipeline(recipe, tokenizer, processor.image_processor, dtype=denoiser_dtype)
        train_stage(pipeline, stage_args, stage, args.output_dir, train_dataset=data)
        PartialState().wait_for_everyone()
    return 0


if __name__ == "__main__":
    sys.exit(main())
