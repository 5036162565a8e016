"""Trains the diffusion decoder of the Shapes world, in the folder in which `train_shapes` has trained the rest:

    python -m nextflow_hf.training.train_shapes_decoder --output-dir runs/shapes

First a denoiser of pictures that knows no codes, then the two stages of the paper: a decoder of the pictures' size,
and one of twice that. Either is a [`NextFlowDiffusionDecoderPipeline`], `diffusion_decoder_base` and
`diffusion_decoder_upscale`, for `benchmarks/diffusion_decoder_shapes.py`. The same command resumes; the numbers are in
`recipes/shapes_diffusion_decoder.yaml`. `--add-to` puts the last one into the model's repository.
"""

import argparse
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.utils.data import Dataset
from transformers import set_seed

from ..hub_cards.cards import decoder_section
from ..hub_cards.export import add_diffusion_decoder
from ..modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..pipelines.pipeline_nextflow_diffusion_decoder import NextFlowDiffusionDecoderPipeline
from .data.decoder_rows import NextFlowDecoderDataset
from .data.extraction import load_codes
from .data.shards import MANIFEST
from .diffusion_decoder.build import (
    STAGES,
    UPSCALE_FACTOR,
    build_decoder_pipeline,
    load_decoder_recipe,
    load_stage,
    make_denoiser,
    make_scheduler,
    stage_arguments,
    train_stage,
)
from .diffusion_decoder.trainer import NextFlowDiffusionDecoderTrainingArguments
from .shapes import render, sample_prompt, sample_scene
from .shapes.dataset import shapes_sample
from .shapes.denoiser import train_denoiser
from .train_shapes import device_arguments, draw_pictures, load_recipe, make_processor


logger = logging.getLogger(__name__)

HELD_OUT, EVAL_SEED = 64, 7


class HeldOutPictures(Dataset):
    """Pictures of held-out captions with their codes, as rows for the decoder."""

    def __init__(self, pipeline: NextFlowDiffusionDecoderPipeline, count: int, size: int):
        rng = np.random.default_rng(EVAL_SEED)
        native = size // pipeline.diffusion_decoder.config.upscale_factor
        self.rows = []
        for _ in range(count):
            scene = sample_scene(rng, sample_prompt(rng, split="test"))
            codes, grids = pipeline.encode_image(Image.fromarray(render(scene, native, native)))
            picture = Image.fromarray(render(scene, size, size))
            row = {"image": picture, "image_codes": codes.cpu(), "image_grids": grids[0].cpu(), "caption": ""}
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def shapes_device_arguments() -> dict:
    """A CPU computes convolutions of so few channels faster in float32."""
    return {**device_arguments(), "bf16": torch.accelerator.is_available()}


def denoiser_stage(folder: Path) -> None:
    """What the decoder starts from."""
    recipe = load_decoder_recipe("shapes_diffusion_decoder")
    set_seed(recipe["training"]["seed"])
    options = {**recipe["training"], **recipe["pretraining"], **shapes_device_arguments()}
    args = NextFlowDiffusionDecoderTrainingArguments(output_dir=str(folder / "denoiser_run"), **options)
    pictures, _ = draw_pictures(folder)
    num_eval = load_recipe("pictures")["num_eval"]
    scheduler = make_scheduler(recipe["scheduler"], None)
    train_denoiser(make_denoiser(recipe["denoiser"]), scheduler, pictures[:-num_eval], args).save_pretrained(
        folder / "denoiser"
    )


def decoder_stage(stage: str, folder: Path) -> None:
    recipe = load_decoder_recipe("shapes_diffusion_decoder")
    data = json.loads((folder / "codes" / MANIFEST).read_text())["data"]  # of the codes, whatever the recipe says now
    # In half precision, as when the codes were extracted and as it is shipped; a CPU computes faster in float32.
    tokenizer = NextFlowVisionTokenizer.from_pretrained(folder / "vision_tokenizer", dtype=torch.bfloat16).eval()
    tokenizer = tokenizer if torch.accelerator.is_available() else tokenizer.float()
    set_seed(recipe["training"]["seed"])
    denoiser = UNet2DConditionModel.from_pretrained(folder / "denoiser")
    pipeline = build_decoder_pipeline(recipe, tokenizer, make_processor(folder).image_processor, denoiser=denoiser)
    pipeline.diffusion_decoder.register_to_config(upscale_factor=UPSCALE_FACTOR[stage])
    side = load_recipe("pictures")["size"] * UPSCALE_FACTOR[stage]

    def get_row(_: None, row_id: str) -> dict:
        # The same scenes that the codes show, drawn at the size of the stage
        return shapes_sample(data["seed"], int(row_id), tasks=data["tasks"], sizes=((side, side),))

    run = folder / "diffusion_decoder_run"
    train_stage(
        pipeline,
        stage_arguments(recipe, stage, run, **shapes_device_arguments()),
        stage,
        run,
        train_dataset=NextFlowDecoderDataset(load_codes(folder / "codes", vision_tokenizer=tokenizer), get_row),
        eval_dataset=HeldOutPictures(pipeline, HELD_OUT, side),
    )
    load_stage(pipeline, run / stage)
    pipeline.to("cpu").save_pretrained(folder / f"diffusion_decoder_{stage}")


def export_stage(folder: Path, repository: Path, report: Path | None) -> None:
    """The decoder of twice the size into the model's repository, with what was measured on its card."""
    pipeline = NextFlowDiffusionDecoderPipeline.from_pretrained(folder / f"diffusion_decoder_{STAGES[-1]}")
    measured = {}
    if report is not None:
        shutil.copyfile(report / "pictures.png", repository / "diffusion_decoder.png")
        measured = {"tables": (report / "tables.md").read_text(), "picture": "diffusion_decoder.png"}
    options = load_decoder_recipe("shapes_diffusion_decoder")["sampling"]
    section = decoder_section(pipeline, options=options, **measured)
    add_diffusion_decoder(repository, pipeline, dtype=torch.bfloat16, section=section)


# Stage -> the file that is there when it is finished.
FINISHED = {
    "denoiser": "denoiser/diffusion_pytorch_model.safetensors",
    **{stage: f"diffusion_decoder_{stage}/model_index.json" for stage in STAGES},
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="The folder of `train_shapes`.")
    parser.add_argument("--stage", choices=FINISHED, nargs="*", default=list(FINISHED), help="Default: all, in order.")
    parser.add_argument("--add-to", type=Path, help="Then add the decoder to this exported repository of the model.")
    parser.add_argument("--report", type=Path, help="Folder that the benchmark wrote, for the card of `--add-to`.")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for stage, finished in FINISHED.items():
        if stage in args.stage and not (args.output_dir / finished).exists():
            logger.info("stage %s", stage)
            if stage == "denoiser":
                denoiser_stage(args.output_dir)
            else:
                decoder_stage(stage, args.output_dir)
    if args.add_to is not None:
        export_stage(args.output_dir, args.add_to, args.report)


if __name__ == "__main__":
    main()
