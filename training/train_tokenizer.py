"""Trains a vision tokenizer by a recipe: one of the paper's three stages (§3.1), on a folder or a data set of images.

    nextflow-hf train-tokenizer vision_tokenizer_pixel --override train_images=path/to/pictures
    torchrun --nproc_per_node 8 -m nextflow_hf.training.train_tokenizer recipe.yaml

A recipe is a YAML file, or the name of one in training/recipes; its keys are the fields of the arguments in
tokenizer_recipe.py and tokenizer_arguments.py. The same command goes on where an interrupted run stopped.
"""

import argparse
import logging
from collections.abc import Sequence

from transformers import set_seed

from ..processing.image_processing_nextflow import NextFlowImageProcessor
from .checkpoints import last_checkpoint
from .tokenizer_recipe import build_datasets, build_tokenizer, parse_recipe, read_recipe
from .tokenizer_trainer import NextFlowVisionTokenizerTrainer


logger = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nextflow-hf train-tokenizer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="A YAML file, or the name of one in training/recipes.")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="May be repeated.")
    parser.add_argument("--from-scratch", action="store_true", help="Begin again, past any checkpoint.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    tokenizer_args, picture_args, training_args = parse_recipe(read_recipe(args.recipe, args.override))
    set_seed(training_args.seed)
    image_processor = NextFlowImageProcessor(**(picture_args.image_processor or {}))
    train, evaluation = build_datasets(picture_args, image_processor, seed=training_args.seed)
    tokenizer, teacher = build_tokenizer(tokenizer_args)
    trainer = NextFlowVisionTokenizerTrainer(
        tokenizer,
        training_args,
        semantic_teacher=teacher,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=image_processor,
    )
    checkpoint = None if args.from_scratch else last_checkpoint(training_args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    if evaluation is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    if train.bad_pictures:
        logger.warning("%d pictures were bad and skipped: %s", len(train.bad_pictures), train.bad_pictures[:100])


if __name__ == "__main__":
    main()
