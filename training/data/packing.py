"""Documents -> packs of equal cost: what one step of one GPU computes (§4).

A pack is documents one after the other in a row; each sees only itself. Its size is limited by tokens (memory), by
FLOPs (time), or by both: packs of equally many tokens differ in time, since attention grows with the square of a
document. Deterministic; over a data set at once, over a large one block by block, or over a stream window by window.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers.utils import logging

from ...atomic import write_json
from ...modeling_nextflow.configuration_nextflow import NextFlowConfig
from ..common.flops import attended_pairs, flops_of_counts, training_flops
from .packs import WINDOWS_AT_ONCE, PackingReport, Packs, document_shares, endless_rows, make_packs


logger = logging.get_logger(__name__)

ON_LONG_ROW = ("raise", "skip")
_ROWS_AT_ONCE = 65_536  # whose columns are read


def document_costs(
    rows: Sequence[dict] | datasets.Dataset, config: NextFlowConfig, numbers: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """
    Tokens and training FLOPs of each row, from the columns `length` and `image_grids`. Those of a data set are read
    as they lie in its memory-mapped files, without a Python object for a row.

    Args:
        numbers (`np.ndarray`, *optional*): The rows, ascending. All by default.
    """
    numbers = np.arange(len(rows)) if numbers is None else numbers
    lengths, flops = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    if not isinstance(rows, datasets.Dataset):
        lengths.append(np.array([rows[number]["length"] for number in numbers], dtype=np.int64))
        grids = (rows[number]["image_grids"] for number in numbers)
        flops.append(np.array([training_flops(config, int(n), grid) for n, grid in zip(lengths[-1], grids)]))
        return np.concatenate(lengths), np.concatenate(flops)
    columns = rows.select_columns(["length", "image_grids"]).with_format("arrow")
    # Consecutive rows are read as one slice, without a look-up for each.
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
        for part in np.split(run, range(_ROWS_AT_ONCE, len(run), _ROWS_AT_ONCE)) if len(run) else ():
            table = columns[int(part[0]) : int(part[-1]) + 1]
            lengths.append(table["length"].to_numpy())
            images, codes, pairs = _count_cells(table["image_grids"].combine_chunks())
            flops.append(flops_of_counts(config, lengths[-1], images, codes, attended_pairs(lengths[-1]) + pairs))
    return np.concatenate(lengths), np.concatenate(flops)


def _count_cells(grids: pa.ListArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row: images, codes, and pairs of a query and a later key in its scale but for the first (§2.2)."""
    images = np.asarray(grids.offsets)
    if pa.types.is_null(grids.type.value_type):  # no row has an image
        return (np.zeros(len(grids), dtype=np.int64),) * 3
    # Arrow keeps nested lists flat, with the offsets of each level: rows, images, scales, (height, width).
    scales = np.asarray(grids.values.offsets)
    sides = np.asarray(grids.values.values.offsets)[:-1]
    numbers = grids.values.values.values.to_numpy()
    cells = numbers[sides] * numbers[sides + 1]
    pairs = cells * (cells - 1) // 2
    # Scale 1 is predicted at `<boi>`, which sees no later token.
    pairs[scales[:-1][np.diff(scales) > 0]] = 0
    of_row = scales[images]  # first scale of each row, and the end
    codes, pairs = (np.diff(np.concatenate([[0], np.cumsum(values)])[of_row]) for values in (cells, pairs))
    return np.diff(images), codes, pairs


class PackedDataset(Dataset):
    """
    Packs of a data set's rows; an item is the list of rows of one pack. For [`PackingCollator`].

    Args:
        dataset: Rows of tokens and codes, as [`load_codes`] gives them.
        config ([`NextFlowConfig`]): Config of the model, which says what a row costs.
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
        limits = {"max_length": max_length, "max_flops": max_flops}
        self.packs = _pack(dataset, config, np.arange(len(dataset)), on_long_row, **limits, window=window, seed=seed)

    def report(self, num_ranks: int = 1) -> PackingReport:
        """For steps of `num_ranks` packs, or of as many as there are."""
        return PackingReport.of(self.packs, num_ranks=max(1, min(num_ranks, len(self))))

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict]:
        return [self.dataset[int(document)] for document in self.packs[index]]


class EndlessPackedDataset(Dataset):
    """
    Packs of more rows than are planned at once, epoch after epoch without an end: a training starts after one block of
    512 windows, however many rows there are. A function of the rows, the weights and the seed alone.

    An item `(block, place)` is the list of rows of one pack; `sampler()` gives these numbers in the order of training.
    Every source is walked through in shuffled chunks of consecutive rows, and a block's rows are shuffled among
    themselves. There is no length: pass `max_steps`.

    Args:
        sources (`Sequence[Dataset]`): Rows of tokens and codes, as [`load_codes`] gives them.
        config ([`NextFlowConfig`]): Config of the model, which says what a row costs.
        weights (`Sequence[float]`, *optional*):
            How many rows come from each source, relative to the others. By default as many as it has.
        max_length, max_flops, window, on_long_row: See [`PackedDataset`].
        seed (`int`, *optional*, defaults to 0): Seed of all orders.
        counts_file (`Path`, *optional*):
            File that remembers how many packs each block has, so that a resumed run skips blocks without planning
            them.
    """

    def __init__(
        self,
        sources: Sequence[datasets.Dataset],
        config: NextFlowConfig,
        weights: Sequence[float] | None = None,
        *,
        max_length: int | None = None,
        max_flops: float | None = None,
        window: int = 2048,
        seed: int = 0,
        on_long_row: str = "raise",
        counts_file: Path | None = None,
    ):
        self.rows = datasets.concatenate_datasets(list(sources)).with_format("numpy")
        self.sizes, self.config, self.seed, self.on_long_row = [*map(len, sources)], config, seed, on_long_row
        weights = np.array(self.sizes if weights is None else weights, dtype=np.float64)
        self.shares = weights / weights.sum()
        self.limits, self.window = {"max_length": max_length, "max_flops": max_flops}, window
        self.block_size = WINDOWS_AT_ONCE * window
        self._plans: dict[int, Packs] = {}  # of the last two blocks: a batch may reach from one to the next
        # Whatever changes the packs: counts of other ones would send a resumed run to other rows.
        self._key = json.dumps(
            [self.rows._fingerprint, self.shares.tolist(), self.limits, window, seed, on_long_row, config.to_dict()],
            default=str,
        )
        self._counts_file, self._counts = counts_file, []
        if counts_file is not None and counts_file.is_file():
            found = json.loads(counts_file.read_text())
            self._counts = found["packs"] if found["key"] == self._key else []

    def __getitem__(self, number: tuple[int, int]) -> list[dict]:
        block, place = number
        return [self.rows[int(row)] for row in self._plan(block)[place]]

    def sampler(self) -> "PackSampler":
        """A sampler that gives the packs in their order."""
        return PackSampler(self)

    def num_packs(self, block: int) -> int:
        """Packs of a block, which are counted in the order of the blocks."""
        if block == len(self._counts):
            self._counts.append(len(self._plan(block)))
            if self._counts_file is not None:
                write_json(self._counts_file, {"key": self._key, "packs": self._counts})
        return self._counts[block]

    def report(self, num_ranks: int = 1) -> PackingReport:
        """Of the first block."""
        first = self._plan(0)
        return PackingReport.of(first, num_ranks=max(1, min(num_ranks, len(first))))

    def _plan(self, block: int) -> Packs:
        if block not in self._plans:
            # Seed 1 is that of the packs; seed 0, below, that of the rows in a block.
            options = {**self.limits, "window": self.window, "seed": (self.seed, 1, block)}
            packs = _pack(self.rows, self.config, np.sort(self._rows_of(block)), self.on_long_row, **options)
            # The newest plan and the one before it are kept; blocks are asked for in order.
            last = max(self._plans, default=None)
            self._plans = {block: packs} if last is None else {last: self._plans[last], block: packs}
        return self._plans[block]

    def _rows_of(self, block: int) -> np.ndarray:
        """The rows of a block: of each source those that follow its rows of the block before."""
        # Positions are rounded, and not the rows of a block, so that errors of rounding never add up.
        edges = (self.shares[:, None] * [block * self.block_size, (block + 1) * self.block_size]).round().astype(int)
        offsets = np.cumsum([0, *self.sizes])
        return np.concatenate(
            [
                offsets[source] + endless_rows(*edges[source], size, (self.seed, 0, source))
                for source, size in enumerate(self.sizes)
            ]
        )


class PackSampler(Sampler[tuple[int, int]]):
    """The packs of an [`EndlessPackedDataset`] in the order of training, without an end."""

    def __init__(self, packs: EndlessPackedDataset):
        self.packs = packs

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for block in itertools.count():
            yield from ((block, place) for place in range(self.packs.num_packs(block)))


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
        self.dataset, self.config = dataset, config
        self.options = {"max_length": max_length, "max_flops": max_flops, "on_long_row": on_long_row, "seed": None}
        self.window = window

    def __iter__(self) -> Iterator[list[dict]]:
        rows = iter(self.dataset)
        while window := list(itertools.islice(rows, self.window)):
            packs = PackedDataset(window, self.config, window=self.window, **self.options)
            yield from (packs[index] for index in range(len(packs)))


def check_fit(
    rows: Iterable[dict], config: NextFlowConfig, *, max_length: int | None = None, max_flops: float | None = None
) -> None:
    """`ValueError` where no row fits into a pack: a stream would be read for ever. Reads until one does."""
    for row in rows:
        if (document_shares(*document_costs([row], config), max_length=max_length, max_flops=max_flops) <= 1).all():
            return
    raise ValueError(
        f"no row fits into a pack of max_length={max_length}, max_flops={max_flops}, expected one that does: raise "
        "the limit"
    )


def _pack(
    rows: Sequence[dict] | datasets.Dataset, config: NextFlowConfig, numbers: np.ndarray, on_long_row: str, **options
) -> Packs:
    """[`make_packs`] of the rows of these ascending numbers; without those that fit into no pack, if `on_long_row`
    says so."""
    if on_long_row not in ON_LONG_ROW:
        raise ValueError(f"on_long_row is {on_long_row!r}, expected one of {ON_LONG_ROW}")
    unique, places = np.unique(numbers, return_inverse=True)  # a small source may be in a block several times
    lengths, flops = (costs[places] for costs in document_costs(rows, config, unique))
    if on_long_row == "skip":
        limits = {name: options[name] for name in ("max_length", "max_flops")}
        is_long = (document_shares(lengths, flops, **limits) > 1).any(axis=1)
        if is_long.any():
            names = [str(rows[int(number)].get("row_id", number)) for number in numbers[is_long][:20]]
            logger.warning(f"{is_long.sum()} of {len(numbers)} rows fit into no pack and are left out: {names}")
        numbers, lengths, flops = numbers[~is_long], lengths[~is_long], flops[~is_long]
    packs = make_packs(lengths, flops, **options)
    packs.documents = numbers[packs.documents]
    return packs
