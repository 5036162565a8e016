"""Trains a vision tokenizer by a recipe: one of the paper's three stages (§3.1), on the images of a data.yaml.

    nextflow-hf train-tokenizer vision_tokenizer_pixel --override data=data.yaml
    torchrun --nproc_per_node 8 -m nextflow_hf.training.vision_tokenizer.train recipe.yaml

A recipe is a YAML file, or the name of one in training/recipes; its keys are the fields of the arguments in
recipe.py and arguments.py. The same command goes on where an interrupted run stopped.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from ...atomic import write_json
from ...commands.console import one_line_mistakes
from ...processing.image_processing_nextflow import NextFlowImageProcessor
from ..common.checkpoints import is_finished, last_checkpoint, train_to_the_end
from .recipe import build_datasets, build_tokenizer, parse_recipe, read_recipe
from .trainer import NextFlowVisionTokenizerTrainer


logger = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nextflow-hf train-tokenizer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="A YAML file, or the name of one in training/recipes.")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="May be repeated.")
    parser.add_argument("--from-scratch", action="store_true", help="Begin again, past any checkpoint.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of a mistake.")
    return parser


@one_line_mistakes("train-tokenizer")
def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    tokenizer_args, image_args, training_args = parse_recipe(read_recipe(args.recipe, args.override))
    if not args.from_scratch and is_finished(training_args):
        return 0
    set_seed(training_args.seed)
    image_processor = NextFlowImageProcessor(**(image_args.image_processor or {}))
    train, evaluation = build_datasets(image_args, image_processor, seed=training_args.seed)
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

    def save() -> None:
        if evaluation is not None:
            metrics = trainer.evaluate()
            if trainer.is_world_process_zero():
                write_json(Path(training_args.output_dir, "eval_results.json"), metrics)
        trainer.save_model()

    train_to_the_end(trainer, checkpoint, save)
    if train.images.bad_rows:
        logger.warning("%d images were bad and skipped: %s", len(train.images.bad_rows), train.images.bad_rows[:100])
    return 0


if __name__ == "__main__":
    sys.exit(main())
