"""What every training does around its own part: the batch of a step, fallbacks, and the folder of the run.

A module of a training has `GROUPS` (dataclasses whose fields are a recipe's keys; the last one is the trainer's),
`MODEL` (the key that names what the training starts from, or `None`), `train(*groups, checkpoint=...)` and
`plan(*groups)`, the lines of `--dry-run` that are its own. Knows nothing of what is trained.
"""

import os
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import logging

from ...atomic import write_text
from .checkpoints import is_finished, last_checkpoint
from .folders import RUN_FILE
from .processes import computes_bfloat16
from .recipe import Recipe, check_recipe, parse_recipe, read_recipe, source_of


logger = logging.get_logger(__name__)

# Keys of a recipe that a checkpoint overrides: its optimizer and its average hold their values.
HELD_BY_CHECKPOINT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "ema_decay")


@dataclass
class BatchArguments:
    """
    What one step of the optimizer sees.

    Args:
        global_batch_size (`int`, *optional*):
            Rows (or packs, images, samples) of one step, over all processes. `gradient_accumulation_steps` follows
            from it, `per_device_train_batch_size` and the number of processes, unless the recipe has that key, too.
    """

    global_batch_size: int | None = None


def resolve(recipe: Recipe, groups: Sequence[type]) -> tuple[Recipe, tuple[Any, ...], list[str]]:
    """
    A recipe as it will run on this machine.

    Returns:
        The recipe's keys with what follows from them, one instance of each of `groups`, and a sentence about each
        setting that this machine cannot have.
    """
    known = {field.name: field for group in groups for field in fields(group)}
    recipe = check_recipe(recipe, groups)
    if not recipe.get("output_dir"):
        raise ValueError(f"{source_of(recipe)}: output_dir must be set: write it there, or output_dir=... behind it")
    said = fall_back(recipe, known) if "use_cpu" in known else []
    if recipe.get("global_batch_size") is not None and recipe.get("gradient_accumulation_steps") is None:
        size = recipe.get("per_device_train_batch_size", known["per_device_train_batch_size"].default)
        recipe["gradient_accumulation_steps"] = accumulation_steps(
            recipe["global_batch_size"], size, source_of(recipe)
        )
    instances = parse_recipe(recipe, groups)
    check_trackers(getattr(instances[-1], "report_to", []), source_of(recipe))
    return recipe, instances, said


def check_trackers(names: Sequence[str], source: str | Path) -> None:
    """Raises `ImportError` where a tracker of `report_to` is not installed: its callback would, without the key."""
    missing = sorted(set(names) & set(INTEGRATION_TO_CALLBACK) - set(get_available_reporting_integrations()))
    if missing:
        raise ImportError(f"{source}: report_to has {missing}, not installed: install them, or write report_to: none")


def world_size() -> int:
    """Processes of this training, as `torchrun` and `accelerate launch` announce them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def accumulation_steps(global_batch_size: int, size: int, source: str | Path) -> int:
    """Micro-batches of `size` rows that make a step of `global_batch_size` rows over all processes."""
    at_once = size * world_size()
    if not 0 < at_once <= global_batch_size or global_batch_size % at_once:
        raise ValueError(
            f"{source}: global_batch_size is {global_batch_size}, expected a multiple of per_device_train_batch_size "
            f"{size} x {world_size()} processes = {at_once}: change one of them"
        )
    return global_batch_size // at_once


def fall_back(recipe: dict[str, Any], known: Container[str] = ()) -> list[str]:
    """Replace, in place, what this machine cannot do; returns a sentence about each. `known` are the recipe's keys."""
    said = []

    def replace(key: str, value: Any, reason: str) -> None:
        said.append(f"{reason}: {key} is {value!r} instead of {recipe.get(key)!r}")
        recipe[key] = value

    if not recipe.get("use_cpu") and not torch.accelerator.is_available():
        recipe["use_cpu"] = True
        said.append("there is no accelerator: this trains on the CPU")
    on_cpu = recipe.get("use_cpu")
    if on_cpu and recipe.get("attn_implementation") in ("flex_attention", "flash_attention_2", "flash_attention_3"):
        replace("attn_implementation", "sdpa", "a CPU has no such attention")
    if recipe.get("use_liger_kernel") and (on_cpu or find_spec("liger_kernel") is None):
        reason = "Liger's kernels need a GPU" if on_cpu else "liger-kernel is not installed"
        replace("use_liger_kernel", False, reason)
    if recipe.get("bf16") and not computes_bfloat16(bool(on_cpu)):
        reason = f"this {'CPU' if on_cpu else 'GPU'} has no instructions for bfloat16"
        replace("bf16", False, reason)
        if "frozen_dtype" in known and recipe.get("frozen_dtype") in (None, "bfloat16"):
            replace("frozen_dtype", "float32", reason)
    return said


def describe_batch(args: TrainingArguments, batch: BatchArguments | None) -> str:
    """The rows of a step, beside those of the recipe."""
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    rows = size * world_size() * steps
    text = f"{rows:,} rows a step: {size} at once x {world_size()} processes x {steps} accumulated"
    wanted = None if batch is None else batch.global_batch_size
    return text if wanted in (None, rows) else f"{text}; the recipe's global_batch_size is {wanted:,}"


def begin(kind: str, recipe: Recipe, args: TrainingArguments, *, model: str | None, mode: str, command: list[str]):
    """
    Prepare the folder of a run, on all processes, and write `run.yaml`, which says what is trained there and how.

    Args:
        mode (`str`):
            `"auto"` resumes from the last checkpoint if there is one, `"resume"` insists on one, `"fresh"` moves an
            earlier run aside, to `<output_dir>.old-<time>`, and begins anew.

    Returns:
        Whether there is something to do, and the checkpoint to resume from.
    """
    folder = Path(args.output_dir)
    if mode == "fresh":
        with args.main_process_first(local=False):  # the others wait for it
            if args.process_index == 0:
                move_aside(folder)
    elif is_finished(args):
        return False, None
    checkpoint = None if mode == "fresh" else args.resume_from_checkpoint or last_checkpoint(folder)
    if checkpoint in ("true", "false"):
        raise ValueError(f"resume_from_checkpoint is {checkpoint!r}, expected a folder; --fresh begins anew")
    if checkpoint is not None and not args.resume_from_checkpoint and (folder / RUN_FILE).is_file():
        earlier = read_recipe(folder / RUN_FILE)
        if mode == "auto":
            _check_same_model(folder, earlier, kind, model)
        _check_same_optimizer(folder, earlier, args)
    if mode == "resume" and checkpoint is None:
        raise FileNotFoundError(f"{folder} has no checkpoint to resume from: leave --resume out to begin")
    if args.process_index == 0:
        if checkpoint is not None:
            logger.warning(f"resuming from {checkpoint}; --fresh begins anew")
        write_run(folder, kind, recipe, model=model, command=command)
    return True, checkpoint


def _check_same_model(folder: Path, earlier: Recipe, kind: str, model: str | None) -> None:
    """Refuse to go on from the checkpoint of another model: the recipe's would be neither trained nor missed."""
    was_kind, was_model = earlier.get("kind"), earlier.get("model")
    if (was_kind, was_model) != (kind, model):
        raise ValueError(
            f"{folder} has checkpoints of a training of kind {was_kind} from {was_model}, but the recipe is of kind "
            f"{kind} from {model}: --fresh begins anew, --resume goes on from them all the same"
        )


def _check_same_optimizer(folder: Path, earlier: Recipe, args: TrainingArguments) -> None:
    """Refuse values that the optimizer's state in a checkpoint would replace by its own."""
    for field in fields(args):
        if field.name not in HELD_BY_CHECKPOINT:
            continue
        before, now = earlier.get("recipe", {}).get(field.name, field.default), getattr(args, field.name)
        if before != now:
            raise ValueError(
                f"{field.name} is {now}, but the checkpoints in {folder} were made with {before} and keep it: set it "
                "back, or begin from the weights of one in another output_dir"
            )


def move_aside(folder: Path) -> None:
    """Rename the folder of an earlier run, if it is one."""
    if (folder / RUN_FILE).is_file() or last_checkpoint(folder) is not None:
        old = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        os.rename(folder, old)
        logger.warning(f"the earlier run in {folder} is now in {old}")


def write_run(folder: Path, kind: str, recipe: Recipe, *, model: str | None, command: list[str]) -> None:
    """Write `run.yaml`: the kind, the recipe, the model that it starts from, the command, and where that was given."""
    values = {"kind": kind, "recipe": dict(recipe), "model": model, "command": command, "directory": os.getcwd()}
    write_text(folder / RUN_FILE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
