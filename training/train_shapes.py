"""Trains the small real model of the Shapes world from nothing, stage by stage: a complete NextFlow in miniature.

    python -m nextflow_hf.training.train_shapes --output-dir runs/shapes
    python -m nextflow_hf.training.train_shapes --output-dir runs/shapes --stage tokenizer

A finished stage is skipped and an interrupted one goes on from its last checkpoint, so the same command resumes. The
numbers are in `recipes/shapes_<stage>.yaml`; they fit one CPU core, and a GPU is used where there is one.
"""

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.utils.data import Dataset
from transformers import AutoTokenizer, Siglip2Model, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..modeling_nextflow.configuration_nextflow import NextFlowVisionTokenizerConfig
from ..modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..processing.scale_schedule import ScaleSchedule
from .shapes import describe, render, sample_edit, sample_prompt, sample_scene
from .shapes.teacher import CaptionedPictures, train_teacher
from .shapes.text_tokenizer import train_text_tokenizer
from .tokenizer_trainer import (
    NextFlowVisionTokenizerTrainer,
    NextFlowVisionTokenizerTrainingArguments,
    pixels_from_uint8,
)


logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"


class Pictures(Dataset):
    """Square pictures uint8 (n, size, size, 3) as the tokenizer's inputs, with the scale schedule of their size."""

    def __init__(self, pictures: np.ndarray, schedule: ScaleSchedule):
        self.pictures = pictures
        bucket = schedule.nearest_bucket(*pictures.shape[1:3])
        self.image_grids = torch.tensor(schedule.grids(bucket, schedule.num_scales(pictures.shape[1])))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": pixels_from_uint8(self.pictures[index]), "image_grids": self.image_grids}


def load_recipe(stage: str) -> dict:
    """The numbers of a stage."""
    return yaml.safe_load((RECIPES / f"shapes_{stage.replace('-', '_')}.yaml").read_text())


def draw_pictures(folder: Path) -> tuple[np.ndarray, list[str]]:
    """
    Pictures uint8 (n, size, size, 3), memory-mapped, and their captions; drawn once, so that no training renders. The
    last `num_eval` show captions that are held out.
    """
    recipe = load_recipe("pictures")
    pictures_file, captions_file = folder / "pictures.npy", folder / "captions.json"
    if not captions_file.exists():
        rng = np.random.default_rng(recipe["seed"])
        pictures = np.empty((recipe["num_train"] + recipe["num_eval"], recipe["size"], recipe["size"], 3), np.uint8)
        captions = []
        for index in range(len(pictures)):
            prompt = sample_prompt(rng, split="train" if index < recipe["num_train"] else "test")
            scene = sample_scene(rng, prompt)
            pictures[index] = render(scene, recipe["size"], recipe["size"])
            # Half of the captions say all there is to see: the teacher must look at everything.
            captions.append(prompt.text if index % 2 else describe(scene, rng))
        folder.mkdir(parents=True, exist_ok=True)
        np.save(pictures_file, pictures)
        captions_file.write_text(json.dumps(captions))
    return np.load(pictures_file, mmap_mode="r"), json.loads(captions_file.read_text())


def text_tokenizer_stage(folder: Path) -> None:
    """Captions and instructions of the world to a byte-level tokenizer."""
    recipe = load_recipe("text-tokenizer")
    rng = np.random.default_rng(recipe["seed"])
    texts = []
    for _ in range(recipe["num_texts"]):
        prompt = sample_prompt(rng)
        texts += [prompt.text, describe(sample_scene(rng, prompt), rng), sample_edit(rng).instruction]
    train_text_tokenizer(texts, recipe["vocab_size"]).save_pretrained(folder / "text_tokenizer")


def teacher_stage(folder: Path) -> None:
    """A SigLIP2-shaped teacher by contrastive learning."""
    recipe = load_recipe("teacher")
    pictures, captions = draw_pictures(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "text_tokenizer")
    args = TrainingArguments(output_dir=folder / "teacher_run", **device_arguments(), **recipe["training"])
    set_seed(args.seed)
    model, accuracy = train_teacher(
        CaptionedPictures(pictures, captions), tokenizer, args, patch_size=recipe["patch_size"]
    )
    logger.info("teacher finds the right one of 64 captions for %.1f%% of held-out pictures", 100 * accuracy)
    model.save_pretrained(folder / "teacher")


def tokenizer_stage(folder: Path) -> None:
    """The dual-codebook vision tokenizer, distilled from the teacher."""
    recipe = load_recipe("tokenizer")
    pictures, _ = draw_pictures(folder)
    numbers = load_recipe("pictures")["schedule"]
    schedule = ScaleSchedule(**{**numbers, "scale_bases": tuple(numbers["scale_bases"])})
    args = NextFlowVisionTokenizerTrainingArguments(
        output_dir=folder / "tokenizer_run", **device_arguments(), **recipe["training"]
    )
    set_seed(args.seed)
    teacher = Siglip2Model.from_pretrained(folder / "teacher").vision_model
    config = NextFlowVisionTokenizerConfig(semantic_config=teacher.config.to_dict(), **recipe["model"])
    model = NextFlowVisionTokenizer(config)
    # The semantic encoder starts as the teacher, whose last layer and last norm it does not have (§2.1).
    model.semantic_encoder.load_state_dict(
        {name: value for name, value in teacher.state_dict().items() if name in model.semantic_encoder.state_dict()}
    )
    num_eval = load_recipe("pictures")["num_eval"]
    trainer = NextFlowVisionTokenizerTrainer(
        model,
        args,
        semantic_teacher=teacher,
        train_dataset=Pictures(pictures[:-num_eval], schedule),
        eval_dataset=Pictures(pictures[-num_eval:], schedule),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    trainer.evaluate()
    trainer.save_model(folder / "vision_tokenizer")
    trainer.save_state()


# Stage -> its function and the file that is there when it is finished.
STAGES = {
    "text-tokenizer": (text_tokenizer_stage, "text_tokenizer/tokenizer.json"),
    "teacher": (teacher_stage, "teacher/model.safetensors"),
    "tokenizer": (tokenizer_stage, "vision_tokenizer/model.safetensors"),
}


def device_arguments() -> dict:
    """bf16 everywhere; the CPU when there is no accelerator."""
    return {"bf16": True, "use_cpu": not torch.accelerator.is_available(), "report_to": "none"}


def last_checkpoint(folder: str) -> str | None:
    """The checkpoint to go on from, None at the first start."""
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="Folder of all stages.")
    parser.add_argument("--stage", choices=STAGES, nargs="*", default=list(STAGES), help="Default: all, in order.")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for stage in STAGES:
        run_stage, finished = STAGES[stage]
        if stage in args.stage and not (args.output_dir / finished).exists():
            logger.info("stage %s", stage)
            run_stage(args.output_dir)


if __name__ == "__main__":
    main()
