"""A recipe of the vision tokenizer's training: one YAML file, whose keys are the fields of three groups of arguments.

What they name is built here: the tokenizer before its first step, its teacher, and the pictures.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, HfArgumentParser, Siglip2Model, Siglip2VisionModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..modeling_nextflow.configuration_nextflow import NextFlowVisionTokenizerConfig
from ..modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ..processing.image_processing_nextflow import NextFlowImageProcessor
from .data.pictures import NextFlowPictureDataset, load_pictures
from .evaluation.reconstruction_report import load_vision_tokenizer
from .tokenizer_arguments import NextFlowVisionTokenizerTrainingArguments


RECIPES = Path(__file__).parent / "recipes"


@dataclass
class VisionTokenizerArguments:
    r"""
    What is trained; without any, a tokenizer of the paper's size from nothing.

    Args:
        vision_tokenizer_name_or_path (`str`, *optional*):
            Weights to start from: a tokenizer, or a NextFlow repository with one, by folder or Hub id.
        vision_tokenizer_parts (`list[str]`, *optional*):
            What is taken of it, its first-level modules by name; by default everything. The rest starts from nothing.
        semantic_teacher (`str`, *optional*):
            SigLIP2 to distil from, by folder or Hub id. A semantic encoder that is not taken from the tokenizer above
            starts as the teacher.
        config_overrides (`dict`, *optional*):
            Fields of [`NextFlowVisionTokenizerConfig`] that differ from the tokenizer's above, or from the defaults.
    """

    vision_tokenizer_name_or_path: str | None = None
    vision_tokenizer_parts: list[str] | None = None
    semantic_teacher: str | None = None
    config_overrides: dict | None = None


@dataclass
class PictureArguments:
    r"""
    What it is trained on.

    Args:
        train_images (`str`): Folder of images, or folder or Hub id of a data set with an image column.
        train_split (`str`, *optional*, defaults to `"train"`): Of that data set.
        eval_images (`str`, *optional*): Pictures to evaluate on; without them nothing is evaluated.
        eval_split (`str`, *optional*, defaults to `"train"`): Of that data set.
        max_eval_images (`int`, *optional*): The first so many of `eval_images`.
        image_column (`str`, *optional*, defaults to `"image"`): Of both.
        image_processor (`dict`, *optional*):
            Fields of [`NextFlowImageProcessor`] that differ from its defaults; `resolution` is the level.
        on_bad_picture (`str`, *optional*, defaults to `"skip"`): Or `"raise"`, see [`NextFlowPictureDataset`].
        random_crop (`float`, *optional*, defaults to 1.0): Least share of a side that a random crop keeps.
        random_flip (`bool`, *optional*, defaults to `False`): Whether every second picture is mirrored.
    """

    train_images: str
    train_split: str = "train"
    eval_images: str | None = None
    eval_split: str = "train"
    max_eval_images: int | None = None
    image_column: str = "image"
    image_processor: dict | None = None
    on_bad_picture: str = "skip"
    random_crop: float = 1.0
    random_flip: bool = False


def read_recipe(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a recipe, of a file or of one of ours by its name, with `key=value` written over them."""
    path = Path(source) if str(source).endswith((".yaml", ".yml")) else RECIPES / f"{source}.yaml"
    if not path.is_file():
        ours = sorted(file.stem for file in RECIPES.glob("*vision_tokenizer_*.yaml"))
        raise FileNotFoundError(f"there is no recipe {path}, expected a file or one of {ours}")
    recipe = yaml.safe_load(path.read_text())
    for override in overrides:
        apply_override(recipe, override)
    return recipe


def apply_override(recipe: dict[str, Any], override: str) -> None:
    """Sets a key as `key=value` says; the value is YAML, and `a.b=value` sets `b` in the mapping `a`."""
    path, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"--override got {override!r}, expected key=value such as max_steps=100")
    *parents, key = path.split(".")
    for parent in parents:
        recipe[parent] = recipe.get(parent) or {}
        recipe = recipe[parent]
        if not isinstance(recipe, dict):
            raise ValueError(f"--override {override}: {parent} is {recipe!r}, expected a mapping")
    recipe[key] = yaml.safe_load(value)


def parse_recipe(
    recipe: dict[str, Any],
) -> tuple[VisionTokenizerArguments, PictureArguments, NextFlowVisionTokenizerTrainingArguments]:
    """A recipe's keys as arguments. Raises `ValueError` on a key that is none."""
    parser = HfArgumentParser((VisionTokenizerArguments, PictureArguments, NextFlowVisionTokenizerTrainingArguments))
    actions = {action.dest: action for action in parser._actions}
    unknown = {key: difflib.get_close_matches(key, actions, n=3) for key in sorted(set(recipe) - set(actions))}
    if unknown:
        raise ValueError(f"the recipe has unknown keys; near ones that exist: {unknown}")
    if "train_images" not in recipe:
        raise ValueError("train_images is missing, expected a folder or a data set: --override train_images=path")
    for key, value in recipe.items():
        # To YAML, 1e-4 is text.
        is_number = actions[key].type in (int, float) and isinstance(value, str)
        parser.set_defaults(**{key: actions[key].type(value) if is_number else value})
        actions[key].required = False
    return parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)


def build_tokenizer(args: VisionTokenizerArguments) -> tuple[NextFlowVisionTokenizer, Siglip2VisionModel | None]:
    """The tokenizer before its first step, and the teacher if there is one."""
    teacher = None if args.semantic_teacher is None else load_teacher(args.semantic_teacher)
    if args.vision_tokenizer_name_or_path is None:
        parts, given, config = [], None, {}
    else:
        given = load_vision_tokenizer(args.vision_tokenizer_name_or_path)
        names = [name for name, _ in given.named_children()]
        parts = names if args.vision_tokenizer_parts is None else args.vision_tokenizer_parts
        if set(parts) - set(names):
            wrong = sorted(set(parts) - set(names))
            raise ValueError(f"vision_tokenizer_parts has {wrong}, expected some of {names}")
        config = given.config.to_dict()
    teaches = teacher is not None and "semantic_encoder" not in parts
    if teaches:
        config["semantic_config"] = teacher.config.to_dict()
    tokenizer = NextFlowVisionTokenizer(NextFlowVisionTokenizerConfig(**{**config, **(args.config_overrides or {})}))
    if teaches:  # the last layer and the last norm, which it does not have, are left out (§2.1)
        own = tokenizer.semantic_encoder.state_dict()
        tokenizer.semantic_encoder.load_state_dict(
            {name: value for name, value in teacher.state_dict().items() if name in own}
        )
    for name in parts:
        try:
            tokenizer.get_submodule(name).load_state_dict(given.get_submodule(name).state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"{name} of {args.vision_tokenizer_name_or_path} does not fit config_overrides: leave it out of "
                f"vision_tokenizer_parts. {error}"
            ) from error
    return tokenizer, teacher


def load_teacher(source: str) -> Siglip2VisionModel:
    """The vision part of a SigLIP2, which may be the whole model or the vision part alone."""
    if AutoConfig.from_pretrained(source).model_type == "siglip2":
        return Siglip2Model.from_pretrained(source).vision_model
    return Siglip2VisionModel.from_pretrained(source)


def build_datasets(
    args: PictureArguments, image_processor: NextFlowImageProcessor, *, seed: int
) -> tuple[NextFlowPictureDataset, NextFlowPictureDataset | None]:
    """Pictures to train on and, if there are some, to evaluate on."""
    train = NextFlowPictureDataset(
        load_pictures(args.train_images, split=args.train_split, image_column=args.image_column),
        image_processor,
        on_bad_picture=args.on_bad_picture,
        random_crop=args.random_crop,
        random_flip=args.random_flip,
        seed=seed,
    )
    if args.eval_images is None:
        return train, None
    rows = load_pictures(args.eval_images, split=args.eval_split, image_column=args.image_column)
    if args.max_eval_images is not None:
        rows = rows.select(range(min(args.max_eval_images, len(rows))))
    return train, NextFlowPictureDataset(rows, image_processor, on_bad_picture=args.on_bad_picture)


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end: `Trainer` writes its own state last."""
    checkpoints = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return str(checkpoint)
    return None


__all__ = [
    "PictureArguments",
    "VisionTokenizerArguments",
    "build_datasets",
    "build_tokenizer",
    "last_whole_checkpoint",
    "load_teacher",
    "parse_recipe",
    "read_recipe",
]
