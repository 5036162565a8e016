"""`nextflow-hf train tokenizer`: one of the paper's three stages (§3.1), on a folder or a data set of images."""

from pathlib import Path

from transformers import set_seed
from transformers.utils import logging

from ...atomic import replaced_folder, write_json
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..common.checkpoints import train_to_the_end
from ..common.run import BatchArguments
from ..data.description import load_images, read_description
from ..data.images import NextFlowImageDataset
from .arguments import NextFlowVisionTokenizerTrainingArguments
from .codebook import merged_codes
from .recipe import (
    ImageArguments,
    VisionTokenizerArguments,
    build_datasets,
    build_image_processor,
    build_tokenizer,
)
from .trainer import NextFlowVisionTokenizerTrainer


logger = logging.get_logger(__name__)

GROUPS = (VisionTokenizerArguments, ImageArguments, BatchArguments, NextFlowVisionTokenizerTrainingArguments)
MODEL = "vision_tokenizer_name_or_path"


def train(
    tokenizer_args: VisionTokenizerArguments,
    image_args: ImageArguments,
    batch_args: BatchArguments,
    args: NextFlowVisionTokenizerTrainingArguments,
    *,
    checkpoint: str | None = None,
) -> NextFlowVisionTokenizerTrainer:
    """Train from `checkpoint` on, evaluate where there are images for it, and save in `output_dir`."""
    set_seed(args.seed)
    image_processor = build_image_processor(image_args.image_processor)
    images, evaluation = build_datasets(image_args, image_processor, seed=args.seed)
    tokenizer, teacher = build_tokenizer(tokenizer_args)
    if (merge_codes := tokenizer_args.merge_codes or 0) >= (codes := tokenizer.config.codebook_size):
        raise ValueError(f"merge_codes is {merge_codes}, expected fewer than the {codes} codes that there are")
    trainer = NextFlowVisionTokenizerTrainer(
        tokenizer,
        args,
        semantic_teacher=teacher,
        train_dataset=images,
        eval_dataset=evaluation,
        processing_class=image_processor,
    )

    def save() -> None:
        trainer.save_model()
        if tokenizer_args.merge_codes is not None:
            _merge_codes(trainer, images, tokenizer_args.merge_codes, tokenizer_args.merge_images)
        if evaluation is not None:
            metrics = trainer.evaluate()
            if trainer.is_world_process_zero():
                write_json(Path(args.output_dir, "eval_results.json"), metrics)

    train_to_the_end(trainer, checkpoint, save)
    if bad := images.images.bad_rows:
        logger.warning(f"{len(bad)} images were bad and skipped: {bad[:100]}")
    return trainer


def _merge_codes(
    trainer: NextFlowVisionTokenizerTrainer, images: NextFlowImageDataset, num_codes: int, num_images: int
) -> None:
    """Merge codes of the saved tokenizer; the trainer has it from then on, for what is measured is what is saved."""
    args = trainer.args
    if trainer.is_world_process_zero():
        saved = NextFlowVisionTokenizer.from_pretrained(args.output_dir).eval().to(args.device)
        merged = merged_codes(saved, images, num_codes, num_images=num_images)
        with replaced_folder(args.output_dir) as staging:
            merged.save_pretrained(staging)
    trainer.accelerator.wait_for_everyone()
    trainer.model = NextFlowVisionTokenizer.from_pretrained(args.output_dir).to(args.device)
    trainer.ema = None  # of the codes before


def plan(
    tokenizer_args: VisionTokenizerArguments,
    image_args: ImageArguments,
    batch_args: BatchArguments,
    args: NextFlowVisionTokenizerTrainingArguments,
) -> list[str]:
    """What a training would read, for `--dry-run`."""
    data = read_description(image_args.data)
    lines = [f"data    {image_args.data}: {len(load_images(data)):,} images to train on"]
    if image_args.eval_data is not None or data.has_evaluation:
        evaluation = data if image_args.eval_data is None else read_description(image_args.eval_data)
        lines.append(f"        {len(load_images(evaluation, 'evaluation')):,} to evaluate on")
    return lines
