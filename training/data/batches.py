"""Extraction on an engine that is there already: a batch of rows -> columns of codes.

    encode = BatchEncoder("data.yaml")
    rows = Dataset.from_dict({"id": range(len(encode.rows))}).map(encode, batched=True, remove_columns=["id"])

    ray.data.range(count).map_batches(BatchEncoder, fn_constructor_args=("data.yaml",), batch_format="pyarrow", ...)

A row gets the codes that `nextflow-hf extract` gives it, whatever the engine and its batches. [`index_shards`] makes
the parquet files of an engine a folder that a training reads. examples/extract_with_ray.py is a whole program.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset

from ...modeling_nextflow.pixel_cnn_nextflow import convolution_layout
from .description import load_rows, read_description
from .encoding import RowEncoder
from .messages import message
from .shards import SHARD_FEATURES, describe_tokenizer


_SCHEMA = SHARD_FEATURES.arrow_schema.remove_metadata().append(pa.field("fingerprint", pa.string()))


class BatchEncoder:
    """
    A function of batches: for `map_batches` of Ray Data (a class of actors) and `map(batched=True)` of `datasets`.

    A batch is a dictionary of columns or a `pyarrow.Table`, and so is the result. It has one of these columns:

    - `id`: numbers of rows of the description, as `ray.data.range` counts them;
    - `messages`, and `images` if there are some: rows in the format of training data;
    - `image`: images alone, each an answer without a question.

    `number`, `row_id`, `source`, `task` and `resolution` may be there besides. The result has the columns of
    [`load_codes`] and `fingerprint`, that of the vision tokenizer. Bad rows are left out with `on_bad_row: skip`.

    Args:
        source (`str` or `Path` or `Mapping`): What [`read_description`] takes: model, settings and sources.
        overrides (`str`): `key=value` that replaces a key.
        device (`str` or `torch.device`, *optional*): The encoder's; by default the accelerator, if any.
    """

    def __init__(
        self, source: str | Path | Mapping[str, Any], *overrides: str, device: str | torch.device | None = None
    ):
        self.data = read_description(source, *overrides)
        device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        vision_tokenizer = self.data.model.load_vision_tokenizer()
        self.fingerprint = describe_tokenizer(vision_tokenizer)["fingerprint"]
        vision_tokenizer = vision_tokenizer.to(device, memory_format=convolution_layout(device))
        self.encoder = RowEncoder(self.data.model.load_processor(), vision_tokenizer, self.data.settings)

    @cached_property
    def rows(self) -> Dataset:
        """The rows of the description, which `id` numbers."""
        rows = load_rows(self.data, self.data.settings.purpose)
        if isinstance(rows, IterableDataset):
            raise ValueError("a source streams: its rows have no numbers, pass the rows themselves")
        return rows

    def __call__(self, batch: Mapping[str, Sequence] | pa.Table) -> dict[str, list] | pa.Table:
        is_table = isinstance(batch, pa.Table)
        columns = batch.to_pydict() if is_table else {name: list(values) for name, values in batch.items()}
        rows = [row for good, _ in self.encoder(self._numbered(columns)) for row in good]
        rows = [{**row, "fingerprint": self.fingerprint} for row in rows]
        if is_table:
            return pa.Table.from_pylist(rows, schema=_SCHEMA)
        return {name: [row[name] for row in rows] for name in _SCHEMA.names}

    def _numbered(self, columns: dict[str, list]) -> list[tuple[int, dict]]:
        """The rows of a batch, each with the number that seeds it."""
        if "id" in columns:
            return [(int(number), self.rows[int(number)]) for number in columns["id"]]
        if "messages" not in columns and "image" not in columns:
            raise ValueError(f"a batch has the columns {list(columns)}, expected id, messages or image among them")
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        return [_numbered_row(row) for row in rows]


def _numbered_row(row: dict[str, Any]) -> tuple[int, dict]:
    if "messages" in row:
        row = {**row, "images": row.get("images") or []}
    else:
        answer = message("assistant", {"type": "image"})
        row = {**row, "messages": [answer], "images": [row.pop("image")]}
    if row.get("number") is not None:
        return int(row["number"]), row
    # A row without a number is seeded by what it is: its place in a batch of an engine means nothing.
    named = json.dumps([row.get("source"), row.get("row_id"), row["messages"]], default=str)
    digest = hashlib.sha256(named.encode())
    # Rows without a name may differ in their images alone.
    for image in row["images"] if row.get("row_id") is None else ():
        digest.update(_content(image))
    return int.from_bytes(digest.digest()[:6]), row


def _content(image: Any) -> bytes:
    """Bytes that identify an image: those of its file, else its path, else its pixels."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        return image.encode(errors="surrogatepass")
    try:
        return image if isinstance(image, bytes) else np.asarray(image).tobytes()
    except Exception:  # a broken file, which is a bad row once it is opened
        return b""
