"""Aligns a NextFlow model with rewards, by a recipe.

    python -m nextflow_hf.training.grpo --model DIR_OR_HUB_ID --output-dir runs/grpo
    accelerate launch -m nextflow_hf.training.grpo --model ... --recipe my.yaml --output-dir ... --set max_steps=500

A recipe has `data` (`shapes`, or the arguments of `datasets.load_dataset`), `rewards` (a list of `name`, `weight` and
options), `training` ([`NextFlowGRPOConfig`]) and optionally `peft` (`LoraConfig`). The same command goes on from the
last checkpoint. The result is a pipeline in `<output-dir>/pipeline`.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nextflow_hf.training.recipe import RECIPES, load_yaml, read_recipe


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
    return read_recipe(path)


def make_reward(name: str, **options: Any) -> Callable:
    """A reward by its name in a recipe."""
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}, expected one of {sorted(REWARDS)}")
    module, attribute, takes_options = REWARDS[name]
    reward = getattr(importlib.import_module(f"nextflow_hf.training.rewards.{module}"), attribute)
    if options and not takes_options:
        raise ValueError(f"the reward {name!r} has no options, got {sorted(options)}")
    return reward(**options) if takes_options else reward


def make_dataset(shapes: dict | None = None, **options: Any):
    """The data set of a recipe."""
    if shapes is not None:
        from nextflow_hf.training.rewards.shapes import shapes_prompts

        return shapes_prompts(**shapes)
    from datasets import load_dataset

    return load_dataset(**{"split": "train", **options})


def make_trainer(model: str, recipe: dict[str, Any], output_dir: str | Path, **overrides: Any):
    """The trainer of a recipe; `overrides` are entries of its `training`."""
    from nextflow_hf.training.grpo_trainer import NextFlowGRPOConfig, NextFlowGRPOTrainer

    rewards = [dict(entry) for entry in recipe["rewards"]]
    weights = [float(entry.pop("weight", 1.0)) for entry in rewards]
    peft_config = None
    if recipe.get("peft"):
        from peft import LoraConfig

        peft_config = LoraConfig(**recipe["peft"])
    numbers = {"reward_weights": weights, "report_to": "none", **recipe["training"], **overrides}
    return NextFlowGRPOTrainer(
        str(model),
        [make_reward(**entry) for entry in rewards],
        NextFlowGRPOConfig(output_dir=str(output_dir), **numbers),
        make_dataset(**recipe["data"]),
        peft_config=peft_config,
    )


def save_pipeline(trainer, folder: str | Path) -> None:
    """The trained model as a pipeline, adapters merged into it. Ends the training."""
    from nextflow_hf.training.sharding import gather_policy

    model = gather_policy(trainer.accelerator, trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        trainer.pipeline.register_modules(transformer=model)
        trainer.pipeline.save_pretrained(folder)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a NextFlowPipeline")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--recipe", default="shapes_grpo", help="name in recipes/, or a .yaml file")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="entries of the recipe's training")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    overrides = {name: load_yaml(value) for name, _, value in (entry.partition("=") for entry in args.set)}

    from nextflow_hf.training.checkpoints import last_checkpoint

    trainer = make_trainer(args.model, load_recipe(args.recipe), args.output_dir, **overrides)
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    save_pipeline(trainer, args.output_dir / "pipeline")


if __name__ == "__main__":
    main()
