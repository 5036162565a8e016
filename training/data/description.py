"""One description of data for every command: the YAML file that `nextflow-hf extract` reads.

    data = read_description("data.yaml")
    load_rows(data)             messages and images          extract (load_rows_by_id: train decoder)
    load_images(data)           images                       train tokenizer
    load_captioned_images(data) images with their captions   train teacher
    load_prompts(data)          prompts and source images    train grpo, evaluate
    load_texts(data)            texts                        train text_tokenizer

Each takes the sources that have what it needs, in their weights, and leaves the others out. `purpose="evaluation"`
reads the rows that sources hold out by their `eval_fraction`. `recipes/data_example.yaml` has all keys.
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, Features, IterableDataset, List
from transformers.utils import logging

from ...conversion.assemble import load_processor, load_vision_tokenizer
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...processing.image_loading_nextflow import MAX_PIXELS
from ...processing.processing_nextflow import NextFlowProcessor
from ..common.folders import PROCESSOR_FILE, PROCESSORS, VISION_TOKENIZERS, check_source
from ..common.recipe import override, parse_recipe, read_recipe
from .encoding import ExtractionSettings
from .images import ImageRows
from .messages import MEND, BadRowError, bad_row_reason, log_causes, open_image
from .mixture import MixtureArguments, MixtureRows, load_mixture
from .sources import DataSource, OpenSource
from .tasks import TASKS


logger = logging.get_logger(__name__)

_IMAGES = List(datasets.Image())


@dataclass(kw_only=True)
class ModelArguments:
    """
    What encodes, and where the codes go.

    Args:
        model (`str`, *optional*):
            Folder or Hub id of a pipeline: its processor (at the root or in `processor/`) and vision tokenizer.
        vision_tokenizer, processor (`str`, *optional*): Folders or Hub ids instead of those of `model`.
        revision (`str`, *optional*): Revision of `model`, `vision_tokenizer` and `processor` on the Hub.
        output_dir (`str`, *optional*): Folder of the shards.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype of the encoder; the quantizer computes in float32. `"bfloat16"` is faster and gives another code
            where two are nearly as near: 0.9% of the last scale's codes for the 128 of Shapes, 4 to 16% for 32,768
            random ones. The shards remember it, and an extraction resumes only with the same.
        self_correction_top_k, self_correction_ratio (`int`, `float`, *optional*):
            Candidates of a sampled code (§2.2), and the share of the codes that are sampled (§3.2.1). Default to the
            tokenizer's config: 10 and 0.6, the paper's share.
    """

    model: str | None = None
    vision_tokenizer: str | None = None
    processor: str | None = None
    revision: str | None = None
    output_dir: str | None = None
    dtype: str = "float32"
    self_correction_top_k: int | None = None
    self_correction_ratio: float | None = None

    def __post_init__(self):
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}, expected bfloat16, float16 or float32")

    def load_processor(self) -> NextFlowProcessor:
        """The processor that encodes rows."""
        return load_processor(self._require("processor"), **self._revision)

    def load_vision_tokenizer(self, **options: Any) -> NextFlowVisionTokenizer:
        """The vision tokenizer that encodes images, in `dtype`."""
        sampling = ("self_correction_top_k", "self_correction_ratio")
        sampling = {name: getattr(self, name) for name in sampling if getattr(self, name) is not None}
        options = {"dtype": getattr(torch, self.dtype), **self._revision, **sampling, **options}
        return load_vision_tokenizer(self._require("vision_tokenizer"), **options)

    @property
    def _revision(self) -> dict[str, str]:
        return {} if self.revision is None else {"revision": self.revision}

    def _require(self, part: str) -> str:
        if (source := getattr(self, part) or self.model) is None:
            raise ValueError(f"got no model: name a repository with `model`, or its {part} with `{part}`")
        if getattr(self, part) is None:
            check_source("model", source, "pipeline", file="vision_tokenizer/config.json")
        elif part == "processor":
            check_source(part, source, *PROCESSORS, "pipeline", file=PROCESSOR_FILE)
        else:
            check_source(part, source, *VISION_TOKENIZERS, "pipeline")
        return source


@dataclass(kw_only=True)
class DataDescription:
    """The keys of a data.yaml, by what they are for."""

    model: ModelArguments
    mixture: MixtureArguments
    settings: ExtractionSettings

    @property
    def has_evaluation(self) -> bool:
        """Whether a source holds out rows for evaluation."""
        return self.mixture.holds_out


def read_description(source: str | Path | Mapping[str, Any], *overrides: str) -> DataDescription:
    """
    A description of data.

    Args:
        source (`str` or `Path` or `Mapping`):
            A YAML file, or its keys. Anything else is the path or the Hub id of one source of images.
        overrides (`str`): `key=value` that replaces a key, such as `purpose=evaluation`.
    """
    if isinstance(source, Mapping):
        recipe = copy.deepcopy(source if isinstance(source, dict) else dict(source))  # overrides write into it
    elif str(source).endswith((".yaml", ".yml")):
        recipe = read_recipe(Path(source))
    else:
        recipe = {"sources": [{"path": str(source), "task": "image"}]}
    for assignment in overrides:
        override(recipe, assignment)
    groups = [entry.type for entry in fields(DataDescription)]
    model, mixture, settings = parse_recipe(recipe, groups)
    return DataDescription(model=model, mixture=mixture, settings=settings)


def load_rows(data: DataDescription, purpose: str = "training") -> Dataset | IterableDataset:
    """
    Rows of `messages` and `images` with a response, for the transformer: see [`load_mixture`]. A bad row is there with
    its `error`, for [`extract_rows`] to skip or raise.
    """
    return load_mixture(_with_sources(data, "a response", _respond), purpose)


def load_rows_by_id(data: DataDescription) -> MixtureRows:
    """`rows(source, row_id)`: the rows of both purposes by the names that their codes have in shards."""
    return MixtureRows(_with_sources(data, "a response", _respond))


def load_images(data: DataDescription, purpose: str = "training", *, max_pixels: int = MAX_PIXELS) -> ImageRows:
    """Images of all sources that have some. A captioned image needs no caption here."""
    return _image_rows(_with_sources(data, "images", _images), data.settings, purpose, max_pixels)


def load_captioned_images(
    data: DataDescription, purpose: str = "training", *, max_pixels: int = MAX_PIXELS
) -> ImageRows:
    """Images with their captions, of the sources of `text_to_image` and of `image_to_text` without questions."""
    return _image_rows(_with_sources(data, "images with captions", _captioned), data.settings, purpose, max_pixels)


def load_prompts(data: DataDescription, purpose: str = "training") -> Dataset:
    """
    What the model is asked to sample an image for: rows of `prompt` (a text, or messages if one of the rows needs
    them), `images` (those of the prompt), `source`, `row_id`, and the `extra_columns` of the sources.

    Read at once. Rows of `text_to_image`, `edit` and `messages` give the messages before their last image; rows of
    `messages` that do not end in one image are left out.
    """
    rows, mixed = [], load_mixture(_with_sources(data, "prompts", _prompts), purpose)
    for row in _good_rows(mixed, data.settings, open_images=True):
        turns, images = row["messages"], row["images"]
        if row["task"] != "prompt":
            if turns[-1]["role"] != "assistant" or [part["type"] for part in turns[-1]["content"]] != ["image"]:
                continue
            turns, images = turns[:-1], images[:-1]
        names = {name: row[name] for name in ("source", "row_id")}
        rows.append({"prompt": turns, "images": images, **names, **json.loads(row["extras"])})
    if not rows:
        raise ValueError(f"the sources have no prompts for {purpose}, expected rows that end in one image")
    return _as_prompts(rows)


def load_texts(data: DataDescription, purpose: str = "training") -> Iterator[str]:
    """All texts of all rows: prompts, captions, answers, documents."""
    for row in _good_rows(load_mixture(_with_sources(data, "texts", _texts), purpose), data.settings):
        for turn in row["messages"]:
            yield from (part["text"] for part in turn["content"] if part["type"] == "text")


def _with_sources(
    data: DataDescription, needed: str, choose: Callable[[DataSource], DataSource | None]
) -> MixtureArguments:
    """The mixture of the sources that `choose` takes, as it gives them."""
    chosen = [source for source in map(choose, data.mixture.sources) if source is not None]
    if not chosen:
        tasks = sorted({source.task for source in data.mixture.sources})
        raise ValueError(f"no source has {needed}: their tasks are {tasks}, out of {sorted(TASKS)}")
    if left_out := [source.label for source in data.mixture.sources if choose(source) is None]:
        logger.info(f"sources {left_out} have not {needed} and are left out")
    return replace(data.mixture, sources=chosen)


def _respond(source: DataSource) -> DataSource | None:
    return source if TASKS[source.task].has_response else None


def _images(source: DataSource) -> DataSource | None:
    if source.task == "text":
        return None
    return _as_task(source, "image") if source.task in ("text_to_image", "image_to_text") else source


def _captioned(source: DataSource) -> DataSource | None:
    is_question = source.task == "image_to_text" and "prompt" in OpenSource(source).columns
    if source.task not in ("text_to_image", "image_to_text") or is_question:
        return None
    return _as_task(source, "text_to_image")


def _prompts(source: DataSource) -> DataSource | None:
    if source.task == "text_to_image":
        return replace(source, inversion_rate=0.0)
    return source if source.task in ("edit", "messages", "prompt") else None


def _texts(source: DataSource) -> DataSource | None:
    return None if source.task == "image" else source


def _as_task(source: DataSource, task: str) -> DataSource:
    """The source for another task with some of its columns."""
    columns = {part: column for part, column in source.columns.items() if part in ("id", *TASKS[task].columns)}
    # One path may be there for several tasks.
    label = source.label if source.task == task else f"{source.label} ({source.task})"
    return replace(source, task=task, columns=columns, label=label, inversion_rate=0.0)


def _image_rows(mixture: MixtureArguments, settings: ExtractionSettings, purpose: str, max_pixels: int) -> ImageRows:
    rows = load_mixture(mixture, purpose)
    if isinstance(rows, IterableDataset):
        streamed = [source.label for source in mixture.sources if source.streaming]
        raise ValueError(f"sources {streamed} stream, expected rows that can be read by number: set streaming: false")
    return ImageRows(
        rows,
        on_bad_row=settings.on_bad_row,
        max_pixels=max_pixels,
        allow_private_addresses=settings.allow_private_addresses,
    )


def _good_rows(
    rows: Iterable[dict], settings: ExtractionSettings, *, open_images: bool = False
) -> Iterator[dict[str, Any]]:
    """The rows without the bad ones, which are raised, or counted by their cause."""
    reasons = []
    for row in rows:
        error = row["error"]
        try:
            for image in row["images"] if open_images else ():
                open_image(image, MAX_PIXELS, allow_private_addresses=settings.allow_private_addresses)
        except (ValueError, OSError) as unread:
            error = bad_row_reason(unread)
        if error is None:
            yield row
            continue
        if settings.on_bad_row == "raise":
            raise BadRowError(f"row {row['row_id']!r} of source {row['source']!r}: {error}. {MEND}")
        reasons.append(error)
    log_causes(reasons)


def _as_prompts(rows: list[dict]) -> Dataset:
    """Prompts of one text after its images as texts, unless others need messages."""
    kinds = [[(turn["role"], [part["type"] for part in turn["content"]]) for turn in row["prompt"]] for row in rows]
    if all(kind == [("user", ["image"] * len(row["images"]) + ["text"])] for kind, row in zip(kinds, rows)):
        rows = [{**row, "prompt": row["prompt"][0]["content"][-1]["text"]} for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Dataset.from_dict({name: [row.get(name) for row in rows] for name in names if name != "images"})
    images = Dataset.from_dict({"images": [row["images"] for row in rows]}, features=Features({"images": _IMAGES}))
    return datasets.concatenate_datasets([table, images], axis=1)
