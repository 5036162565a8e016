"""Trains the diffusion decoder of the Shapes world on the codes that `train_shapes` extracted.

    python -m nextflow_hf.training.train_shapes_decoder --output-dir runs/shapes

Writes a [`NextFlowDiffusionDecoderPipeline`] as `diffusion_decoder_base` (and `diffusion_decoder_upscale`) in that
folder, for `benchmarks/diffusion_decoder_shapes.py`. The same command resumes; the numbers are in
`recipes/shapes_diffusion_decoder.yaml`.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..pipelines.pipeline_nextflow_diffusion_decoder import NextFlowDiffusionDecoderPipeline
from .data.decoder_rows import NextFlowDecoderDataset
from .data.extraction import check_fingerprint, load_codes
from .decoder import STAGES, UPSCALE_FACTOR, build_decoder_pipeline, load_decoder_recipe, load_stage, train_stage
from .shapes import render, sample_prompt, sample_scene
from .shapes.dataset import shapes_sample
from .train_shapes import device_arguments, load_recipe, make_processor


logger = logging.getLogger(__name__)

EVAL_SEED = 7


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


def run_stage(stage: str, folder: Path) -> None:
    recipe, data_recipe = load_decoder_recipe("shapes_diffusion_decoder"), load_recipe("transformer")["data"]
    # Half precision, as when the codes were extracted and as it is shipped
    tokenizer = NextFlowVisionTokenizer.from_pretrained(folder / "vision_tokenizer", dtype=torch.bfloat16).eval()
    set_seed(recipe["training"]["seed"])
    pipeline = build_decoder_pipeline(recipe, tokenizer, make_processor(folder).image_processor)
    pipeline.diffusion_decoder.register_to_config(upscale_factor=UPSCALE_FACTOR[stage])
    side = load_recipe("pictures")["size"] * UPSCALE_FACTOR[stage]
    check_fingerprint(folder / "codes", tokenizer)

    def get_row(index: int) -> dict:
        # The same scenes that the codes show, drawn at the size of the stage
        fraction = data_recipe["edit_fraction"]
        return shapes_sample(data_recipe["data_seed"], index, edit_fraction=fraction, sizes=((side, side),))

    run = folder / "diffusion_decoder_run" / f"{stage}_run"
    train_stage(
        pipeline,
        recipe,
        stage,
        run.parent,
        resume_from_checkpoint=get_last_checkpoint(run) if run.is_dir() else None,
        device_arguments=device_arguments(),
        train_dataset=NextFlowDecoderDataset(load_codes(folder / "codes"), get_row),
        eval_dataset=HeldOutPictures(pipeline, 64, side),
    )
    load_stage(pipeline, run.parent / stage)
    pipeline.to("cpu").save_pretrained(folder / f"diffusion_decoder_{stage}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="The folder of `train_shapes`.")
    parser.add_argument("--stage", choices=STAGES, nargs="*", default=["base"], help="default: base")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for stage in STAGES:
        finished = args.output_dir / f"diffusion_decoder_{stage}" / "model_index.json"
        if stage in args.stage and not finished.exists():
            logger.info("stage %s", stage)
            run_stage(stage, args.output_dir)


if __name__ == "__main__":
    main()
