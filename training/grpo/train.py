"""`nextflow-hf train grpo`: the transformer, aligned with rewards of its images (§3.2.5)."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
from datasets.exceptions import DatasetGenerationError

from ..common.checkpoints import train_to_the_end
from ..common.folders import check_source
from ..common.import_path import import_object
from ..common.recipe import call_with
from ..common.run import BatchArguments
from ..data.description import load_prompts, read_description
from .config import NextFlowGRPOConfig
from .trainer import NextFlowGRPOTrainer


if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass
class GRPOArguments:
    """
    What is trained, on which prompts, by which rewards.

    Args:
        model (`str`): Pipeline to start from, by folder or Hub id.
        prompts (`str`):
            Description of data as `nextflow-hf extract` reads it, of which the prompts are taken; or a file: of text
            with a prompt in each line, or JSON lines, CSV or Parquet with a column `prompt` and optionally `images` to
            edit. Other columns (`extra_columns` of a description) are arguments of the rewards.
        rewards (`list[str]`):
            Import paths, `module:name`, of functions `(images, **columns) -> scores`, or of classes whose instances
            are such functions. A module may be a file in the working directory. `reward_weights` are their weights.
        reward_options (`dict`, *optional*):
            Import path -> arguments of the class or function, which then returns the reward.
        use_peft (`bool`, *optional*, defaults to `False`): Train a LoRA adapter instead of the model.
        lora_r, lora_alpha, lora_dropout, lora_target_modules (*optional*): Fields of PEFT's `LoraConfig`.
    """

    model: str
    prompts: str
    rewards: list[str] = field(default_factory=list)
    reward_options: dict | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("rewards is empty, expected import paths such as my_rewards:redness")
        if unused := sorted(set(self.reward_options or {}) - set(self.rewards)):
            raise ValueError(f"reward_options has {unused}, expected some of the rewards, {self.rewards}")


GROUPS = (GRPOArguments, BatchArguments, NextFlowGRPOConfig)
MODEL = "model"


def make_reward(path: str, options: dict | None = None) -> Callable:
    """The reward that an import path names; a class, or a function with `options`, is called to make it."""
    reward = import_object(path)
    if not callable(reward):
        raise ValueError(f"{path} is {type(reward).__name__}, expected a function or a class")
    if options is None and not inspect.isclass(reward):
        return reward
    return call_with(reward, options or {}, f"the reward {path}")


def read_prompts(source: str) -> datasets.Dataset:
    """Rows with a column `prompt`, of a description of data or of a file."""
    suffix = Path(source).suffix.removeprefix(".")
    if suffix in ("yaml", "yml"):
        return load_prompts(read_description(source))
    reader = {"txt": "text", "jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}.get(suffix)
    if reader is None:
        raise ValueError(f"prompts is {source!r}, expected a file: .yaml, .txt, .jsonl, .csv or .parquet")
    try:
        rows = datasets.load_dataset(reader, data_files=source, split="train")
    except DatasetGenerationError as error:
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error
    if reader == "text":
        rows = rows.rename_column("text", "prompt").filter(lambda text: bool(text.strip()), input_columns="prompt")
    if "prompt" not in rows.column_names:
        raise ValueError(f"{source} has the columns {rows.column_names}, expected 'prompt' among them")
    if not len(rows) or None in rows["prompt"]:
        raise ValueError(f"{source} has {len(rows)} rows, expected at least one, and a prompt in each")
    return rows


def make_trainer(args: GRPOArguments, config: NextFlowGRPOConfig) -> NextFlowGRPOTrainer:
    """The trainer of a recipe."""
    check_source("model", args.model, "pipeline")
    options = args.reward_options or {}
    return NextFlowGRPOTrainer(
        args.model,
        [make_reward(path, options.get(path)) for path in args.rewards],
        config,
        read_prompts(args.prompts),
        peft_config=lora_config(args),
    )


def lora_config(args: GRPOArguments) -> "LoraConfig | None":
    """PEFT's configuration by the recipe, or `None` where all weights are trained."""
    if not args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
    )


def train(
    grpo_args: GRPOArguments, batch_args: BatchArguments, args: NextFlowGRPOConfig, *, checkpoint: str | None = None
) -> NextFlowGRPOTrainer:
    """Train from `checkpoint` on, and save the transformer, or its adapter, in `output_dir`."""
    trainer = make_trainer(grpo_args, args)
    train_to_the_end(trainer, checkpoint, lambda: trainer.save_model(args.output_dir))
    return trainer


def plan(grpo_args: GRPOArguments, batch_args: BatchArguments, args: NextFlowGRPOConfig) -> list[str]:
    """What a training would read, for `--dry-run`."""
    prompts = read_prompts(grpo_args.prompts)
    for path in grpo_args.rewards:
        import_object(path)
    return [f"data    {grpo_args.prompts}: {len(prompts):,} prompts"]
