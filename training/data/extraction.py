"""Images -> codes, once, before training: the encoder never runs beside the transformer (§4).

Rows of `messages` and `images` become shards of token ids, labels and codes (shards.py). Shard n holds the rows
`n * rows_per_shard` and on, and is a function of them, the settings and the seed alone: not of the number of
processes, of kills, or of the rows that were left out before. So an interrupted extraction resumes with the shards
that are missing, and ends in the same files.

Rows with a length are read by number. A stream is read in order by every process, which skips the rows of the shards
that are there or another's: skipped rows are read but not decoded, so a resumed stream costs its reading, and many
processes are better served by sources that do not stream.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...processing.processing_nextflow import NextFlowProcessor
from ..common.processes import process_state
from .encoding import ExtractionSettings, RowEncoder
from .messages import BadRowError, bad_row_reason
from .shards import (
    INDEX,
    check_manifest,
    describe_processor,
    describe_tokenizer,
    finish,
    num_rows_of,
    shard_exists,
    write_shard,
)


logger = logging.get_logger(__name__)


def extract_rows(
    rows: Sequence[dict] | Dataset | IterableDataset,
    output_dir: str | os.PathLike,
    *,
    processor: NextFlowProcessor,
    vision_tokenizer: NextFlowVisionTokenizer,
    settings: ExtractionSettings,
    data: dict[str, Any] | None = None,
) -> int | None:
    """
    Encode rows and store them as shards for [`load_codes`]; resume where an earlier call was interrupted.

    Under `accelerate launch` or `torchrun` every process takes its share of the shards. The processes never wait for
    each other: the one that completes the set writes the index.

    Args:
        rows (`Sequence` or `Dataset` or `IterableDataset`):
            Rows with "messages" and "images", the same ones in the same order each time, and if known "source",
            "row_id", "task", "resolution" and "error", as [`load_mixture`] gives them.
        output_dir (`str` or `os.PathLike`): Where the shards go.
        processor ([`NextFlowProcessor`]): Tokens, labels and pixels of the messages.
        vision_tokenizer ([`NextFlowVisionTokenizer`]): The frozen encoder.
        settings ([`ExtractionSettings`]): How.
        data (`dict`, *optional*): What the rows are, for the manifest: an extraction resumes only with the same.

    Returns:
        The number of rows in the finished folder, or None where other processes are still at work on it.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    is_stream = isinstance(rows, IterableDataset)
    manifest = {
        "vision_tokenizer": describe_tokenizer(vision_tokenizer),
        "processor": describe_processor(processor),
        "settings": settings.to_dict(),
        "num_rows": None if is_stream else len(rows),
        "data": data,
    }
    check_manifest(output_dir, manifest, vision_tokenizer)
    if (output_dir / INDEX).exists():  # finished, maybe by other processes
        logger.warning(f"{output_dir} is finished and stays as it is; remove it if captions or images changed since")
        return num_rows_of(output_dir)
    state = process_state()
    encoder, num_shards = RowEncoder(processor, vision_tokenizer, settings), 0

    def is_mine(shard: int) -> bool:
        return shard % state.num_processes == state.process_index and not shard_exists(output_dir, shard)

    read = _read_stream if is_stream else _read_by_number
    progress = tqdm(desc="rows", unit="row", disable=not state.is_local_main_process)
    for shard, numbered_rows in read(rows, settings.rows_per_shard, is_mine):
        num_shards = shard + 1
        if numbered_rows is not None:
            good, bad = [], []
            for encoded, left_out in encoder(numbered_rows):
                good += encoded
                bad += left_out
                progress.update(len(encoded) + len(left_out))
            if bad:
                logger.warning(f"shard {shard}: {len(bad)} of {len(good + bad)} rows left out, the first: {bad[0]}")
            write_shard(output_dir, shard, good, bad)
    finish(output_dir, num_shards)  # does nothing unless all shards are there
    return num_rows_of(output_dir)


NumberedRows = Iterator[tuple[int, dict]]


def _read_by_number(
    rows: Sequence[dict], rows_per_shard: int, is_mine: Callable[[int], bool]
) -> Iterator[tuple[int, NumberedRows | None]]:
    """Every shard with its rows, or with None where they are not to be read."""
    for shard in range(math.ceil(len(rows) / rows_per_shard)):
        numbers = range(shard * rows_per_shard, min((shard + 1) * rows_per_shard, len(rows)))
        yield shard, ((number, _read(rows, number)) for number in numbers) if is_mine(shard) else None


def _read(rows: Sequence[dict], number: int) -> dict:
    try:
        row = rows[number]
    except Exception as error:  # whatever reading this one row raises
        return {"error": bad_row_reason(error)}
    return row if isinstance(row, Mapping) else {"error": f"a row is {row!r:.80}, expected a dictionary"}


def _read_stream(
    rows: IterableDataset, rows_per_shard: int, is_mine: Callable[[int], bool]
) -> Iterator[tuple[int, NumberedRows | None]]:
    """As [`_read_by_number`]; only reading to its end tells how many shards a stream has."""
    numbered = enumerate(_until_it_breaks(rows))
    for shard in itertools.count():
        of_shard = itertools.islice(numbered, rows_per_shard)
        first = next(of_shard, None)
        if first is None:
            return
        yield shard, itertools.chain([first], of_shard) if is_mine(shard) else None
        deque(of_shard, maxlen=0)  # what was not read


def _until_it_breaks(rows: IterableDataset) -> Iterator[dict]:
    """The rows of a stream. None can be read behind one that fails, so that is an error and not a bad row."""
    number = -1
    try:
        for number, row in enumerate(rows):  # noqa: B007
            yield row
    except Exception as error:
        raise BadRowError(f"the stream breaks off after {number + 1} rows: {bad_row_reason(error)}") from error
