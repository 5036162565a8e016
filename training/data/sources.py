"""One data set, in whatever files it lies -> rows of `messages` and `images`, one by one.

`datasets` reads the files; what one row raises while it is read and adapted is that row's `error`. Nothing is decoded
or copied here: an image is the path or the bytes that its file has. Knows nothing of other sources.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError

from ..common.recipe import check_types
from .messages import bad_row_reason
from .raw_files import ERROR, FORMATS, open_raw_rows
from .tasks import TASKS


# What a mixture's rows have. `extras` holds the source's `extra_columns` as JSON. `error` says why a
# row is bad: then it has neither messages nor images.
ROW_FEATURES = Features(
    {
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(datasets.Image(decode=False)),
        "task": Value("string"),
        "source": Value("string"),
        "row_id": Value("string"),
        "resolution": Value("int64"),
        "extras": Value("string"),
        "error": Value("string"),
    }
)
_ID_NAMES = ("id", "__key__")
_CAPTION_PROMPTS = (
    "Describe this image.",
    "What is in this picture?",
    "Write a caption for this image.",
    "What does this image show?",
)


@dataclass(kw_only=True)
class DataSource:
    """
    One data set and what it is used for.

    Args:
        path (`str`): A folder, a file, a pattern such as `"tars/*.tar"`, an address, or a repository of the Hub.
        task (`str`):
            `"text_to_image"`, `"image_to_text"`, `"edit"`, `"conversation"` (LLaVA), `"interleaved"` (OBELICS, MMC4),
            `"text"`, or `"messages"` for rows in the format already; `"image"` for images alone, which the vision
            tokenizer trains on, and `"prompt"` for prompts alone, which GRPO trains on. See [`TASKS`].
        format (`str`, *optional*):
            `"imagefolder"` (with its metadata file), `"parquet"`, `"webdataset"`, `"json"`, `"csv"`, `"text"`,
            `"arrow"`: as in `datasets`; `"captioned_folder"`: images beside a `.txt` of the same name; `"disk"`:
            written by `save_to_disk`. By default the files tell.
        weight (`float`, *optional*, defaults to 1.0): Its rows' share of the mixture, over the sum of all weights.
        label (`str`, *optional*): Name of the source in shards and reports. Defaults to `path`.
        columns (`dict[str, str]`, *optional*):
            Part in the task -> column, where the usual names do not find it (an error lists them); `"json.caption"`
            is a field of a column. The part `"id"` names the rows (else `id`, `__key__`, or their number).
        name, split, revision (`str`, *optional*): As in `load_dataset`; the split defaults to `"train"`.
        streaming (`bool`, *optional*, defaults to `False`): Read the rows as they come, without a copy on this disk.
        options (`dict`, *optional*): More for `load_dataset`, such as `{"sample_by": "document"}` for texts.
        image_root (`str`, *optional*): Folder of images that are named by relative paths.
        inversion_rate (`float`, *optional*, defaults to 0.1):
            Share of the text-to-image rows that are turned round into captioning (§6.7).
        caption_prompts (`list[str]`, *optional*): What captioning is asked with, one at random.
        eval_fraction (`float`, *optional*, defaults to 0.0):
            Share of the rows that is held out for evaluation, evenly spread; 1 keeps the source out of training.
        extra_columns (`list[str]`, *optional*):
            Columns that prompts keep for the rewards of GRPO and for evaluation, under their own names.
        max_images (`int`, *optional*):
            Images of an interleaved document, whose rest is left out (§5.4: 5 at 512 pixels, 3 at 1024).
        resolution (`int`, *optional*): Resolution of its images; by default the processor's.
    """

    path: str
    task: str
    format: str | None = None
    weight: float = 1.0
    label: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    image_root: str | None = None
    inversion_rate: float = 0.1
    caption_prompts: tuple[str, ...] = _CAPTION_PROMPTS
    eval_fraction: float = 0.0
    extra_columns: tuple[str, ...] = ()
    max_images: int | None = None
    resolution: int | None = None

    def __post_init__(self):
        for name in ("path", "image_root", "caption_prompts", "extra_columns"):
            value = getattr(self, name)
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        try:
            check_types(self)
        except ValueError as error:
            raise ValueError(f"source {self.label or self.path}: {error}") from error
        self.label = self.label or self.path
        if self.task not in TASKS:
            raise ValueError(f"source {self.label}: task is {self.task!r}, expected one of {list(TASKS)}")
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"source {self.label}: format is {self.format!r}, expected one of {list(FORMATS)}")
        if not self.weight > 0:
            raise ValueError(f"source {self.label}: weight is {self.weight}, expected more than 0")
        for name in ("inversion_rate", "eval_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"source {self.label}: {name} is {getattr(self, name)}, expected 0 to 1")
        if not self.caption_prompts:
            raise ValueError(f"source {self.label}: caption_prompts is empty, expected at least one prompt")
        if taken := sorted({"prompt", "images", "source", "row_id"} & set(self.extra_columns)):
            raise ValueError(f"source {self.label}: extra_columns has {taken}, which prompts have of their own")
        if unknown := sorted(set(self.columns) - {"id", *TASKS[self.task].columns}):
            raise ValueError(
                f"source {self.label}: columns has {unknown}, which are no parts of the task {self.task!r}, expected "
                f"{['id', *TASKS[self.task].columns]}"
            )


def is_held_out(numbers: np.ndarray, fraction: float) -> np.ndarray:
    """Whether the rows of these numbers are for evaluation: `fraction` of them, evenly spread."""
    # Told by the number alone: rows that are added later do not move those before them to the other side.
    return np.floor((numbers + 1) * fraction) > np.floor(numbers * fraction)


class OpenSource:
    """
    An opened [`DataSource`]: its columns are known to be there, its rows become messages one by one.

    Args:
        source ([`DataSource`]): What it is.
        number (`int`): Number of the source in its mixture.
        seed (`int`): Seeds inversion and caption prompts, with the number of the source and that of the row.
    """

    def __init__(self, source: DataSource, number: int = 0, seed: int = 0):
        self.source, self.number, self.seed = source, number, seed
        self.task, self.label = TASKS[source.task], source.label
        try:
            names = ("path", "format", "name", "split", "revision", "streaming", "options")
            opened = open_raw_rows(**{name: getattr(source, name) for name in names})
        except (DatasetGenerationError, pa.ArrowException, StopIteration) as error:  # names neither source nor cause
            cause = str(error.__cause__ or error) or "it has no rows"
            raise ValueError(f"source {source.label} cannot be read: {cause}") from error
        self.streaming, self.decode = isinstance(opened.rows, IterableDataset), opened.decode
        self.columns = self._find_columns(opened.names)
        if missing := sorted(set(source.extra_columns) - set(opened.names)):
            raise ValueError(f"source {self.label} has no columns {missing}, but only {sorted(opened.names)}")
        named = [self._top_level(column, opened.names) for column in self.columns.values()]
        kept = {ERROR, *source.extra_columns, *named}
        names = opened.rows.column_names or opened.names
        # What a line of JSON holds is no column of its file.
        chosen = [name for name in names if name in kept] if set(opened.names) <= set(names) else names
        self.rows = _undecoded(opened.rows.select_columns(chosen))

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Name of a row -> its number."""
        if (column := self.columns.get("id")) is None:
            return {str(number): number for number in range(len(self.rows))}
        top = self._top_level(column, self.rows.column_names)
        rows = self.rows.select_columns([top]) if top in self.rows.column_names else self.rows
        ids = [self._row_id(values, number) for number, values in enumerate(rows)]
        numbers = {row_id: number for number, row_id in enumerate(ids)}
        if len(numbers) < len(ids):
            raise ValueError(f"source {self.label} has {len(ids)} rows of {len(numbers)} names in {column!r}")
        return numbers

    def _row_id(self, values: dict[str, Any], number: int) -> str:
        column = self.columns.get("id")
        try:
            values = values if column in values else self.decode(values)
            row_id = None if column is None else _lookup(values, column)
            return str(number if row_id is None else row_id)
        except ValueError:  # no JSON; the row says so
            return str(number)

    def row(self, number: int) -> dict[str, Any]:
        """Row `number` as messages and images."""
        return self._adapt(lambda: self.rows[number], number)

    def row_numbers(self, held_out: bool | None = None) -> np.ndarray:
        """Numbers of the rows that are, or are not, held out for evaluation; of all rows by default."""
        numbers = np.arange(len(self.rows))
        if held_out is None:
            return numbers
        return numbers[is_held_out(numbers, self.source.eval_fraction) == held_out]

    def stream(self, held_out: bool | None = None) -> IterableDataset:
        """The rows of [`~OpenSource.row_numbers`], one by one."""
        rows = self.rows if self.streaming else self.rows.to_iterable_dataset()

        def adapt(values: dict[str, Any], number: int) -> dict[str, Any]:
            return self._adapt(lambda: values, number)

        rows = rows.map(adapt, with_indices=True, remove_columns=rows.column_names, features=ROW_FEATURES)
        if held_out is None:
            return rows
        fraction = self.source.eval_fraction
        return rows.filter(lambda _, number: bool(is_held_out(number, fraction)) == held_out, with_indices=True)

    def _adapt(self, read: Callable[[], dict[str, Any]], number: int) -> dict[str, Any]:
        """
        What `read` gives as messages and images. Whatever reading and adapting this one row raises is its `error`:
        whoever reads the mixture decides what happens to it.
        """
        source = self.source
        row = {"task": source.task, "source": self.label, "row_id": str(number), "resolution": source.resolution}
        row["extras"] = "{}"
        try:
            values = read()
            # Named before anything else can fail, so that a bad row is reported by its name.
            row["row_id"] = self._row_id(values, number)
            values = self.decode(values)
            row["extras"] = json.dumps({name: values.get(name) for name in source.extra_columns})
            found = {part: _lookup(values, column) for part, column in self.columns.items() if part != "id"}
            task = self.task
            # A function of the row, so that neither the order of reading nor the number of processes changes what it
            # says.
            rng = np.random.default_rng((self.seed, self.number, number))
            if source.task == "text_to_image" and rng.random() < source.inversion_rate:
                task, row["task"] = TASKS["image_to_text"], "image_to_text"
            if row["task"] == "image_to_text" and "prompt" not in found:
                found["prompt"] = source.caption_prompts[rng.integers(len(source.caption_prompts))]
            messages, images = task(found, max_images=source.max_images)
            return {**row, "messages": messages, "images": [self._rooted(image) for image in images], "error": None}
        except Exception as error:
            return {**row, "messages": [], "images": [], "error": bad_row_reason(error)}

    def _rooted(self, image: Any) -> Any:
        """A relative path in the folder of the images."""
        if self.source.image_root is None:
            return image
        path = image if isinstance(image, str) else image.get("path") if isinstance(image, dict) else None
        if path is None or "://" in path or path.startswith("data:") or (isinstance(image, dict) and image["bytes"]):
            return image
        return os.path.join(os.path.expanduser(self.source.image_root), path)

    def _find_columns(self, names: list[str]) -> dict[str, str]:
        """Part in the task -> column. `ValueError` where a part has none."""
        columns, parts = {}, {"id": _ID_NAMES, **self.task.columns}
        for part, usual in parts.items():
            if (chosen := self.source.columns.get(part)) is not None:
                if self._top_level(chosen, names) not in names:
                    raise ValueError(
                        f"source {self.label}: {part} is column {chosen!r}, but the columns are {sorted(names)}"
                    )
                columns[part] = chosen
            elif found := [name for name in usual if name in names and name not in columns.values()]:
                columns[part] = found[0]
            elif part != "id" and part not in self.task.optional:
                raise ValueError(
                    f"source {self.label}: the task {self.source.task!r} needs a column for {part!r}, by default one "
                    f"of {list(usual)}, but the columns are {sorted(names)}: name it, as in columns: {{{part}: ...}}"
                )
        return columns

    @staticmethod
    def _top_level(column: str, names: list[str]) -> str:
        return column if column in names else column.partition(".")[0]


def _lookup(values: dict[str, Any], column: str) -> Any:
    if column in values:
        return values[column]
    for name in column.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _undecoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same rows, with every image as its path and bytes."""
    undecoded = datasets.Image(decode=False)
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, undecoded)
        elif isinstance(feature, List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(name, List(undecoded))
    return rows
