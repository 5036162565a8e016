"""Trains a diffusion decoder for the codes of a NextFlow model (§2.3), at their own size and then at twice that.

    accelerate launch -m nextflow_hf.training.train_decoder --recipe diffusion_decoder_12b --model path/to/nextflow \
        --dataset path/to/rows --codes path/to/codes --output-dir runs/decoder

`--dataset` has rows of "messages" and "images"; `--codes` are the shards that `extract_codes` wrote of the same rows,
by the tokenizer of `--model` in `--dtype`. A stage that is finished is skipped, an interrupted one goes on.
"""

import argparse
import logging
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoProcessor, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from .data.decoder_rows import NextFlowDecoderDataset
from .data.extraction import check_fingerprint, load_codes
from .decoder import STAGES, build_decoder_pipeline, load_decoder_recipe, train_stage


logger = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="A YAML file, or the name of one in training/recipes.")
    parser.add_argument("--model", required=True, help="NextFlow repository: its processor and vision tokenizer.")
    parser.add_argument("--dataset", required=True, help="Folder or Hub id of the rows that the codes are of.")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--codes", type=Path, required=True, help="Folder of the extracted shards.")
    parser.add_argument("--output-dir", type=Path, required=True, help="Folder of both stages.")
    parser.add_argument("--stage", choices=STAGES, nargs="*", default=list(STAGES), help="Default: both, in order.")
    parser.add_argument("--dtype", default="bfloat16", help="Of what stays frozen. default: %(default)s")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = load_decoder_recipe(args.recipe)
    rows = load_dataset(args.dataset, split=args.split)
    processor = AutoProcessor.from_pretrained(args.model)
    dtype = getattr(torch, args.dtype)
    tokenizer = NextFlowVisionTokenizer.from_pretrained(args.model, subfolder="vision_tokenizer", dtype=dtype).eval()
    check_fingerprint(args.codes, tokenizer)
    data = NextFlowDecoderDataset(load_codes(args.codes), rows.__getitem__)
    # A denoiser that trains whole does so in float32.
    denoiser_dtype = dtype if "lora_rank" in recipe["training"] else None
    for stage in STAGES:
        if stage not in args.stage or (args.output_dir / stage / "training_args.bin").exists():
            continue
        logger.info("stage %s", stage)
        pipeline = build_decoder_pipeline(recipe, tokenizer, processor.image_processor, dtype=denoiser_dtype)
        run = args.output_dir / f"{stage}_run"
        set_seed(recipe["training"].get("seed", 42))
        train_stage(
            pipeline,
            recipe,
            stage,
            args.output_dir,
            resume_from_checkpoint=get_last_checkpoint(run) if run.is_dir() else None,
            device_arguments={"use_cpu": not torch.accelerator.is_available()},
            train_dataset=data,
        )
        PartialState().wait_for_everyone()


if __name__ == "__main__":
    main()
