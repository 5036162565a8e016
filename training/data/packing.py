"""Documents -> packs of equal cost: what one step of one GPU computes (§4).

A pack is documents one after the other in a row; each sees only itself. Its size is limited by tokens (memory), by
FLOPs (time), or by both: packs of as many tokens are not as long at work, since attention grows with the square of a
document. Deterministic; either over a data set, from its lengths alone, or over a stream, a window at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers.utils import logging

from ...modeling_nextflow.configuration_nextflow import NextFlowConfig
from ...modeling_nextflow.loss_nextflow import IGNORE_INDEX
from ..common.flops import flops_of_counts, training_flops
from .packs import PackingReport, _shares, make_packs


logger = logging.get_logger(__name__)

ON_LONG_ROW = ("raise", "skip")
_ROWS_AT_ONCE = 65_536  # whose columns are read


def document_costs(rows: Sequence[dict] | datasets.Dataset, config: NextFlowConfig) -> tuple[np.ndarray, np.ndarray]:
    """
    Tokens and training FLOPs of each row, from the columns `length` and `image_grids`. Those of a data set are read
    as they lie in its memory-mapped files, without a Python object for a row.
    """
    if not isinstance(rows, datasets.Dataset):
        flops = [training_flops(config, int(row["length"]), row["image_grids"]) for row in rows]
        return np.array([row["length"] for row in rows], dtype=np.int64), np.array(flops, dtype=np.float64)
    lengths, flops = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    for table in rows.select_columns(["length", "image_grids"]).with_format("arrow").iter(_ROWS_AT_ONCE):
        lengths.append(table["length"].to_numpy())
        flops.append(flops_of_counts(config, lengths[-1], *_count_cells(table["image_grids"].combine_chunks())))
    return np.concatenate(lengths), np.concatenate(flops)


def _count_cells(grids: pa.ListArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row: images, codes, and pairs of a query and a later key in its scale but for the first (§2.2)."""
    images = np.asarray(grids.offsets)
    if pa.types.is_null(grids.type.value_type):  # no row has an image
        return (np.zeros(len(grids), dtype=np.int64),) * 3
    scales = np.asarray(grids.values.offsets)
    sides = np.asarray(grids.values.values.offsets)[:-1]
    numbers = grids.values.values.values.to_numpy()
    cells = numbers[sides] * numbers[sides + 1]
    pairs = cells * (cells - 1) // 2
    pairs[scales[:-1][np.diff(scales) > 0]] = 0
    of_row = scales[images]  # first scale of each row, and the end
    codes, pairs = (np.diff(np.concatenate([[0], np.cumsum(values)])[of_row]) for values in (cells, pairs))
    return np.diff(images), codes, pairs


class PackedDataset(Dataset):
    """
    Packs of a data set's rows; an item is the list of rows of one pack. For [`PackingCollator`].

    Args:
        dataset: Rows of tokens and codes, as [`load_codes`] gives them.
        config ([`NextFlowConfig`]): Of the model: it says what a row costs.
        max_length, max_flops, window, seed: See [`make_packs`].
        on_long_row (`str`, *optional*, defaults to `"raise"`):
            What becomes of rows that fit into no pack: `"raise"` is an error, `"skip"` leaves them out and names them.
    """

    def __init__(
        self,
        dataset: Sequence[dict],
        config: NextFlowConfig,
        *,
        max_length: int | None = None,
        max_flops: float | None = None,
        window: int = 2048,
        seed: int | None = 0,
        on_long_row: str = "raise",
    ):
        self.dataset = dataset
        self.lengths, self.flops = document_costs(dataset, config)
        limits = {"max_length": max_length, "max_flops": max_flops}
        kept = _rows_to_pack(self.lengths, self.flops, on_long_row, lambda index: self.dataset[index], **limits)
        self.packs = make_packs(self.lengths[kept], self.flops[kept], **limits, window=window, seed=seed)
        self.packs.documents = kept[self.packs.documents]

    def report(self, num_ranks: int = 1, *, padded_length: int | None = None) -> PackingReport:
        return PackingReport.of(self.packs, self.lengths, self.flops, num_ranks=num_ranks, padded_length=padded_length)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict]:
        return [self.dataset[int(document)] for document in self.packs[index]]


class PackedIterableDataset(IterableDataset):
    """
    Packs of a stream of rows, a window at a time: [`PackedDataset`] for data that do not end or are not at hand.

    Arguments as there. Windows are taken as they come: shuffle before. The last pack of a window may be small.
    """

    def __init__(
        self,
        dataset: Iterable[dict],
        config: NextFlowConfig,
        *,
        max_length: int | None = None,
        max_flops: float | None = None,
        window: int = 2048,
        on_long_row: str = "raise",
    ):
        self.dataset = dataset
        self.config = config
        self.limits = {"max_length": max_length, "max_flops": max_flops}
        self.window = window
        self.on_long_row = on_long_row

    def __iter__(self) -> Iterator[list[dict]]:
        rows: list[dict] = []
        for row in self.dataset:
            rows.append(row)
            if len(rows) == self.window:
                yield from self._packed(rows)
                rows = []
        yield from self._packed(rows)

    def _packed(self, rows: list[dict]) -> Iterator[list[dict]]:
        if rows:
            lengths, flops = document_costs(rows, self.config)
            kept = _rows_to_pack(lengths, flops, self.on_long_row, rows.__getitem__, **self.limits)
            for documents in make_packs(lengths[kept], flops[kept], **self.limits, window=self.window):
                yield [rows[kept[index]] for index in documents]


def _rows_to_pack(
    lengths: Sequence[int],
    flops: Sequence[float],
    on_long_row: str,
    get_row: Callable[[int], dict],
    *,
    max_length: int | None,
    max_flops: float | None,
) -> np.ndarray:
    """Numbers of the rows that are to be packed: without those that fit into no pack, if these are to be skipped."""
    if on_long_row not in ON_LONG_ROW:
        raise ValueError(f"on_long_row is {on_long_row!r}, expected one of {ON_LONG_ROW}")
    if on_long_row == "raise":
        return np.arange(len(lengths))
    is_long = (_shares(lengths, flops, max_length=max_length, max_flops=max_flops) > 1).any(axis=1)
    if is_long.any():
        long = np.flatnonzero(is_long).tolist()
        names = [str(get_row(index).get("row_id", index)) for index in long[:20]]
        logger.warning(f"{len(long)} of {len(lengths)} rows fit into no pack and are left out: {names}")
    return np.flatnonzero(~is_long)


@dataclass
class PackingCollator:
    """
    Packs of rows -> a batch with a row for each, and integer `position_ids` (batch, length) that restart at every
    document.

    Takes lists of rows, as [`PackedDataset`] has them; a plain row is a pack of one. What fills a row up is a document
    of its own, unsupervised, so there is no `attention_mask`. `row_ids` are as in [`NextFlowDataCollator`].

    Args:
        config ([`NextFlowConfig`]): Of the model: its token ids.
        pad_to_multiple_of (`int`, *optional*, defaults to 1): Of the length of a row. 128 suits flex attention.
        length (`int`, *optional*): Length of all rows of all batches, for compiled models. As needed by default.
    """

    config: NextFlowConfig
    pad_to_multiple_of: int = 1
    length: int | None = None

    def __call__(self, packs: list[list[dict] | dict]) -> dict[str, torch.Tensor]:
        packs = [[pack] if isinstance(pack, dict) else pack for pack in packs]
        longest = max(sum(len(row["input_ids"]) for row in pack) for pack in packs)
        if self.length is not None and longest > self.length:
            raise ValueError(f"a pack has {longest} tokens, expected at most length={self.length}")
        length = self.length or -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(packs), length)
        input_ids = torch.full(shape, self.config.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        position_ids = torch.zeros(shape, dtype=torch.long)  # not floats: sharded training rounds those
        images: list[dict] = []
        for index, pack in enumerate(packs):
            start = 0
            for row in pack:
                stop = start + len(row["input_ids"])
                self._place(row, input_ids[index, start:stop], labels[index, start:stop])
                position_ids[index, start:stop] = torch.arange(stop - start)
                images += [row] if len(row["image_grids"]) else []
                start = stop
            position_ids[index, start:] = torch.arange(length - start)
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        if images:
            for name in ("image_codes", "image_target_codes", "image_grids"):
                batch[name] = torch.cat([torch.tensor(row[name]) for row in images])
        rows = [row for pack in packs for row in pack]
        if "row_id" in rows[0]:
            batch["row_ids"] = [str(row["row_id"]) for row in rows]
        return batch

    def _place(self, row: dict, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        input_ids[:] = torch.tensor(row["input_ids"])
        labels[:] = torch.tensor(row["labels"])
        if input_ids[0] == self.config.boi_token_id and labels[0] != IGNORE_INDEX:
            raise ValueError("a document begins with an image to be trained on: packed, a token must come before it")
        labels[0] = IGNORE_INDEX  # else the document before it would be trained to predict it


__all__ = [
    "ON_LONG_ROW",
    "PackedDataset",
    "PackedIterableDataset",
    "PackingCollator",
    "document_costs",
]
