"""Shards of codes as an endless stream, for training on more than fits into the cache of `datasets`.

Deterministic: a function of the files, the weights, the seed and the number of a loader's workers. Nothing runs ahead
in threads: the workers of the loader do.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import IterableDataset, get_worker_info

from .shards import checked_files


_ROWS_AT_ONCE = 64  # that are read


class RowStream(IterableDataset):
    """
    The rows of folders of codes, again and again.

    Every source begins anew when it ends, its files in another order; rows are sampled from the sources by their
    weights, and shuffled within a buffer. There is no end, so no place where processes could disagree on it: each
    reads all rows and, as accelerate splits any stream, takes its own of every step. The workers of a loader share the
    files among themselves, or the rows where there are fewer files than workers.

    Args:
        folders (`Sequence[str]`): Outputs of `nextflow-hf extract`.
        weights (`Sequence[float]`, *optional*):
            How often each folder is sampled from, relative to the others. By default all their files are one source:
            every row comes once before any comes twice.
        seed (`int`, *optional*, defaults to 0): Seed of all orders.
        shuffle_buffer (`int`, *optional*, defaults to 1000): Rows among which the next one is sampled.
        vision_tokenizer (`NextFlowVisionTokenizer` or `str`, *optional*): See [`load_codes`].
    """

    def __init__(
        self,
        folders: Sequence[str | os.PathLike],
        weights: Sequence[float] | None = None,
        *,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        vision_tokenizer: str | None = None,
    ):
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer}, expected at least 1")
        files = [checked_files(folder, vision_tokenizer=vision_tokenizer) for folder in folders]
        self.sources = [sum(files, [])] if weights is None else files
        weights = np.ones(1) if weights is None else np.asarray(weights, dtype=np.float64)
        self.probabilities = weights / weights.sum()
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer

    def once(self) -> Iterator[dict]:
        """The rows that are ever sampled, each once, in the order of the files."""
        for probability, files in zip(self.probabilities, self.sources, strict=True):
            for path in files if probability else ():
                yield from _rows(path)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # The same in all processes, which read the same rows and take turns.
        rng = np.random.default_rng((self.seed, 0, part))
        sources = [self._endless(number, part, parts) for number in range(len(self.sources))]
        buffer: list[dict] = []
        while True:
            row = next(sources[rng.choice(len(sources), p=self.probabilities)])
            if len(buffer) < self.shuffle_buffer:
                buffer.append(row)
                continue
            # A random row leaves the buffer, and the new one takes its place.
            place = rng.integers(len(buffer))
            row, buffer[place] = buffer[place], row
            yield row

    def _endless(self, source: int, part: int, parts: int) -> Iterator[dict]:
        """The rows of a source that are for one of the `parts` workers."""
        files = self.sources[source]
        for epoch in count():
            # The same order for all workers, who take turns.
            order = np.random.default_rng((self.seed, 1, source, epoch)).permutation(len(files))
            if len(files) >= parts:
                for index in order[part::parts]:
                    yield from _rows(files[index])
            else:
                # Others in each epoch: of one file, a worker might else wait for ever for a row, or for one that fits.
                for number, row in enumerate(row for index in order for row in _rows(files[index])):
                    if (number + epoch) % parts == part:
                        yield row


def _rows(path: Path) -> Iterator[dict]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, use_threads=False):
            for index in range(batch.num_rows):
                yield {name: _value(column[index]) for name, column in zip(batch.schema.names, batch.columns)}


def _value(scalar: pa.Scalar) -> Any:
    """Tokens and codes as arrays: they fill the buffer. A copy, which does not hold on to the rows beside it."""
    if pa.types.is_list(scalar.type) and pa.types.is_integer(scalar.type.value_type):
        return scalar.values.to_numpy(zero_copy_only=False).copy()
    return scalar.as_py()
