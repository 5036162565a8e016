"""A recipe of the vision tokenizer's training: its sections, checked, and the objects that they name.

start:     where weights come from            -> [`TokenizerStart`], `build_tokenizer`
model:     fields of the tokenizer's config that differ from those of `start`
data:      pictures, and the processor's numbers  -> [`TokenizerData`], `build_datasets`
training:  [`NextFlowVisionTokenizerTrainingArguments`]
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
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
class TokenizerStart:
    r"""
    Where the weights come from; without anything, from nothing.

    Args:
        tokenizer (`str`, *optional*): A tokenizer, or a NextFlow repository with one: folder or Hub id.
        parts (`list[str]`, *optional*):
            What is taken of it, its first-level modules by name; by default everything. The others start from nothing.
        semantic_teacher (`str`, *optional*):
            SigLIP2 to distil from, folder or Hub id. Where no tokenizer gives a semantic encoder, that starts as the
            teacher.
    """

    tokenizer: str | None = None
    parts: list[str] | None = None
    semantic_teacher: str | None = None


@dataclass
class TokenizerData:
    r"""
    The pictures.

    Args:
        train (`str`): Folder of images, or folder or Hub id of a data set with an image column.
        train_split (`str`, *optional*, defaults to `"train"`): Of that data set.
        eval (`str`, *optional*): Pictures to evaluate on; without them nothing is evaluated.
        eval_split (`str`, *optional*, defaults to `"train"`): Of that data set.
        image_column (`str`, *optional*, defaults to `"image"`): Of both.
        max_eval_pictures (`int`, *optional*): The first so many of `eval`.
        image_processor (`dict`, *optional*): Fields of [`NextFlowImageProcessor`] that differ from its defaults.
        on_bad_picture (`str`, *optional*, defaults to `"skip"`): Or `"raise"`, see [`NextFlowPictureDataset`].
        random_crop (`float`, *optional*, defaults to 1.0): Least share of a side that a random crop keeps.
        random_flip (`bool`, *optional*, defaults to `False`): Whether every second picture is mirrored.
    """

    train: str
    train_split: str = "train"
    eval: str | None = None
    eval_split: str = "train"
    image_column: str = "image"
    max_eval_pictures: int | None = None
    image_processor: dict[str, Any] = field(default_factory=dict)
    on_bad_picture: str = "skip"
    random_crop: float = 1.0
    random_flip: bool = False


@dataclass
class TokenizerRecipe:
    """The four sections."""

    start: TokenizerStart
    model: dict[str, Any]
    data: TokenizerData
    training: NextFlowVisionTokenizerTrainingArguments


def load_tokenizer_recipe(source: str | Path, overrides: Sequence[str] = ()) -> TokenizerRecipe:
    """
    A recipe by its file or by the name of one of ours, with `section.key=value` written over it; a value is YAML.
    Raises `ValueError` on what no section knows.
    """
    path = Path(source) if str(source).endswith((".yaml", ".yml")) else RECIPES / f"{source}.yaml"
    if not path.is_file():
        ours = sorted(file.stem for file in RECIPES.glob("*vision_tokenizer*.yaml"))
        raise FileNotFoundError(f"there is no recipe {path}, expected a file or one of {ours}")
    sections = {name: dict(values or {}) for name, values in yaml.safe_load(path.read_text()).items()}
    for override in overrides:
        apply_override(sections, override)
    known = [section.name for section in fields(TokenizerRecipe)]
    unknown = sorted(set(sections) - set(known))
    if unknown:
        raise ValueError(f"{path} has the sections {unknown}, expected {known}")
    return TokenizerRecipe(
        start=_section("start", TokenizerStart, sections.get("start", {})),
        model=sections.get("model", {}),
        data=_section("data", TokenizerData, sections.get("data", {})),
        training=_training_arguments(sections.get("training", {})),
    )


def apply_override(sections: dict[str, dict], override: str) -> None:
    """Writes `section.key[.key]=value` into the sections."""
    path, equals, value = override.partition("=")
    *parents, key = path.split(".")
    if not equals or not parents:
        raise ValueError(f"override is {override!r}, expected section.key=value such as training.max_steps=100")
    target: dict = sections
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ValueError(f"override is {override!r}, but {parent!r} is {target!r} and has no keys")
    target[key] = yaml.safe_load(value)


def build_tokenizer(recipe: TokenizerRecipe) -> tuple[NextFlowVisionTokenizer, Siglip2VisionModel | None]:
    """The tokenizer before its first step, and the teacher if there is one."""
    start = recipe.start
    teacher = None if start.semantic_teacher is None else load_teacher(start.semantic_teacher)
    if start.tokenizer is None:
        parts, given, config = [], None, {}
    else:
        given = load_vision_tokenizer(start.tokenizer)
        names = [name for name, _ in given.named_children()]
        parts = names if start.parts is None else start.parts
        if set(parts) - set(names):
            raise ValueError(f"start.parts has {sorted(set(parts) - set(names))}, expected some of {names}")
        config = given.config.to_dict()
    teaches = teacher is not None and "semantic_encoder" not in parts
    if teaches:
        config["semantic_config"] = teacher.config.to_dict()
    tokenizer = NextFlowVisionTokenizer(NextFlowVisionTokenizerConfig(**{**config, **recipe.model}))
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
                f"{name} of {start.tokenizer} does not fit `model`: leave it out of start.parts. {error}"
            ) from error
    return tokenizer, teacher


def load_teacher(source: str) -> Siglip2VisionModel:
    """The vision part of a SigLIP2, which may be the whole model or the vision part alone."""
    if AutoConfig.from_pretrained(source).model_type == "siglip2":
        return Siglip2Model.from_pretrained(source).vision_model
    return Siglip2VisionModel.from_pretrained(source)


def build_datasets(
    recipe: TokenizerRecipe, image_processor: NextFlowImageProcessor
) -> tuple[NextFlowPictureDataset, NextFlowPictureDataset | None]:
    """Pictures to train on and, if there are some, to evaluate on."""
    data = recipe.data
    train = NextFlowPictureDataset(
        load_pictures(data.train, split=data.train_split, image_column=data.image_column),
        image_processor,
        on_bad_picture=data.on_bad_picture,
        random_crop=data.random_crop,
        random_flip=data.random_flip,
        seed=recipe.training.seed,
    )
    if data.eval is None:
        return train, None
    rows = load_pictures(data.eval, split=data.eval_split, image_column=data.image_column)
    if data.max_eval_pictures is not None:
        rows = rows.select(range(min(data.max_eval_pictures, len(rows))))
    return train, NextFlowPictureDataset(rows, image_processor, on_bad_picture=data.on_bad_picture)


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


def _section(name: str, section_class: type, values: dict[str, Any]) -> Any:
    known = [one.name for one in fields(section_class)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"section {name} has {unknown}, expected some of {known}")
    try:
        return section_class(**values)
    except TypeError as error:
        raise ValueError(f"section {name}: {error}; give it with --override {name}.key=value") from error


def _training_arguments(values: dict[str, Any]) -> NextFlowVisionTokenizerTrainingArguments:
    """Through transformers' parser, which makes numbers of what YAML takes for text, such as 1e-4."""
    known = [one.name for one in fields(NextFlowVisionTokenizerTrainingArguments) if one.init]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"section training has {unknown}, which no training argument is called")
    parser = HfArgumentParser(NextFlowVisionTokenizerTrainingArguments)
    parser.set_defaults(**values)
    (arguments,) = parser.parse_args_into_dataclasses([])
    return arguments


__all__ = [
    "TokenizerData",
    "TokenizerRecipe",
    "TokenizerStart",
    "build_datasets",
    "build_tokenizer",
    "last_whole_checkpoint",
    "load_teacher",
    "load_tokenizer_recipe",
]
