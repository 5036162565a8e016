"""Aligns a NextFlow model with rewards, by a recipe.

    python -m nextflow_hf.training.grpo.train --model DIR_OR_HUB_ID --output-dir runs/grpo
    accelerate launch -m nextflow_hf.training.grpo.train --model ... --recipe my.yaml --output-dir ... --set seed=1

A recipe has `data` (`shapes`, or the arguments of `datasets.load_dataset`), `rewards` (a list of `name`, `weight` and
options), `training` ([`NextFlowGRPOConfig`]) and optionally `peft` (`LoraConfig`). The same command goes on from the
last checkpoint. The result is a pipeline in `<output-dir>/pipeline`.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...atomic import replaced_folder
from ...commands.console import one_line_mistakes
from ..common.recipe import RECIPES, Recipe, call_with, check_parts, override, parse_recipe, read_recipe


if TYPE_CHECKING:
    from .trainer import NextFlowGRPOConfig, NextFlowGRPOTrainer

# Name in a recipe -> (module, name, whether the options make it).
REWARDS = {
    "shapes_judge": ("shapes", "shapes_judge", False),
    "shapes_checks": ("shapes", "shapes_checks", False),
    "clean_shapes": ("shapes", "clean_shapes", False),
    "ocr": ("ocr", "OCRReward", True),
    "clip": ("preference", "CLIPReward", True),
    "hpsv3": ("hpsv3", "HPSv3Reward", True),
    "sequence_score": ("preference", "SequenceScoreReward", True),
    "image_score": ("preference", "ImageScoreReward", True),
    "vlm_judge": ("vlm_judge", "VLMJudge", True),
}


def load_recipe(name_or_path: str) -> dict[str, Any]:
    """A recipe of this package by name, or a file."""
    path = Path(name_or_path)
    if path.suffix != ".yaml":
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.exists():
        names = sorted(file.stem for file in RECIPES.glob("*grpo*.yaml"))
        raise FileNotFoundError(f"no recipe {name_or_path!r}, expected one of {names} or a .yaml file")
    recipe = read_recipe(path)
    check_parts(recipe, path, {"data": dict, "rewards": list, "training": dict}, {"peft": dict})
    if wrong := [entry for entry in recipe["rewards"] if not isinstance(entry, dict)]:
        raise ValueError(f"rewards of {path} has {wrong}, expected mappings with name, weight and options")
    return recipe


def make_reward(name: str | None = None, **options: Any) -> Callable:
    """A reward by its name in a recipe."""
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}, expected one of {sorted(REWARDS)}")
    module, attribute, takes_options = REWARDS[name]
    reward = getattr(importlib.import_module(f"nextflow_hf.training.rewards.{module}"), attribute)
    if options and not takes_options:
        raise ValueError(f"the reward {name!r} has no options, got {sorted(options)}")
    return call_with(reward, options, f"the reward {name!r}") if takes_options else reward


def make_dataset(shapes: dict | None = None, **options: Any):
    """The data set of a recipe."""
    if shapes is not None:
        from ..rewards.shapes import shapes_prompts

        return call_with(shapes_prompts, shapes, "data.shapes")
    from datasets import load_dataset

    return load_dataset(**{"split": "train", **options})


def make_config(recipe: dict[str, Any], output_dir: str | Path, **overrides: Any) -> "NextFlowGRPOConfig":
    """The numbers of a recipe; `overrides` are entries of its `training`."""
    from .config import NextFlowGRPOConfig

    weights = [float(entry.get("weight", 1.0)) for entry in recipe["rewards"]]
    numbers = {"reward_weights": weights, "report_to": "none", **recipe["training"], **overrides}
    values = Recipe.section(recipe, {**numbers, "output_dir": str(output_dir)})
    (config,) = parse_recipe(values, [NextFlowGRPOConfig], prog="nextflow-hf grpo")
    return config


def make_trainer(model: str | Path, recipe: dict[str, Any], config: "NextFlowGRPOConfig") -> "NextFlowGRPOTrainer":
    """The trainer of a recipe, with the numbers of [`make_config`]."""
    from .trainer import NextFlowGRPOTrainer

    rewards = [{name: value for name, value in entry.items() if name != "weight"} for entry in recipe["rewards"]]
    peft_config = None
    if recipe.get("peft"):
        from peft import LoraConfig

        peft_config = call_with(LoraConfig, recipe["peft"], "peft")
    return NextFlowGRPOTrainer(
        str(model),
        [make_reward(**entry) for entry in rewards],
        config,
        make_dataset(**recipe["data"]),
        peft_config=peft_config,
    )


def save_pipeline(trainer, folder: str | Path) -> None:
    """The trained model as a pipeline, adapters merged into it. Ends the training."""
    from ..common.sharding import gather_policy

    model = gather_policy(trainer.accelerator, trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        trainer.pipeline.register_modules(transformer=model)
        with replaced_folder(folder) as staging:
            trainer.pipeline.save_pretrained(staging)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a NextFlowPipeline")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--recipe", default="shapes_grpo", help="name in recipes/, or a .yaml file")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="entries of the recipe's training")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    return parser


@one_line_mistakes("grpo")
def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    recipe = load_recipe(args.recipe)
    for assignment in args.set:
        override(recipe["training"], assignment)

    from ..common.checkpoints import is_finished, last_checkpoint, train_to_the_end

    config = make_config(recipe, args.output_dir)
    if is_finished(config):
        return 0
    trainer = make_trainer(args.model, recipe, config)
    checkpoint = last_checkpoint(args.output_dir)
    train_to_the_end(trainer, checkpoint, lambda: save_pipeline(trainer, args.output_dir / "pipeline"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
