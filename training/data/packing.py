"""Documents -> packs of equal cost: what one step of one GPU computes (§4).

A pack is documents one after the other in a row; each sees only itself. Its size is limited by tokens (memory), by
FLOPs (time), or by both: packs of as many tokens are not as long at work, since attention grows with the square of a
document. Deterministic; either over a data set, from its lengths alone, or over a stream, a window at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers.utils import logging

from ...modeling_nextflow.configuration_nextflow import NextFlowConfig
from ...modeling_nextflow.loss_nextflow import IGNORE_INDEX
from ..common.flops import training_flops


logger = logging.get_logger(__name__)

ON_LONG_ROW = ("raise", "skip")


def row_flops(config: NextFlowConfig, row: dict) -> float:
    """Training FLOPs of a row, by its `length` and `image_grids`."""
    return training_flops(config, int(row["length"]), row["image_grids"])


def make_packs(
    lengths: Sequence[int],
    flops: Sequence[float] | None = None,
    *,
    max_length: int | None = None,
    max_flops: float | None = None,
    window: int = 2048,
    seed: int | None = None,
) -> list[list[int]]:
    """
    Indices of documents, in packs that none of both limits is exceeded in: first fit, the costliest first.

    Args:
        lengths (`Sequence[int]`): Tokens of each document.
        flops (`Sequence[float]`, *optional*): FLOPs of each document ([`training_flops`]); needed for `max_flops`.
        max_length (`int`, *optional*): Tokens of a pack. Alone: packing to a fixed length.
        max_flops (`float`, *optional*): FLOPs of a pack. Packing to a fixed computation.
        window (`int`, *optional*, defaults to 2048):
            Documents that are packed among themselves, so that packs are as mixed as the data are.
        seed (`int`, *optional*): Shuffles the documents before, and the packs after. In the given order by default.
    """
    shares = _shares(lengths, flops, max_length=max_length, max_flops=max_flops)
    too_large = np.flatnonzero((shares > 1).any(axis=1))
    if len(too_large):
        index = int(too_large[0])
        cost = f"{int(lengths[index])} tokens" + (f" and {flops[index]:.3g} FLOPs" if max_flops is not None else "")
        raise ValueError(
            f"{len(too_large)} documents fit into no pack, the first is document {index} of {cost}; a pack has "
            f"max_length={max_length}, max_flops={max_flops}. Raise the limit, or leave them out with "
            'on_long_row="skip"'
        )
    rng = np.random.default_rng(seed)
    order = np.arange(len(lengths)) if seed is None else rng.permutation(len(lengths))
    packs = []
    for start in range(0, len(order), window):
        packs += _first_fit(order[start : start + window], shares)
    return packs if seed is None else [packs[index] for index in rng.permutation(len(packs))]


def _shares(
    lengths: Sequence[int], flops: Sequence[float] | None, *, max_length: int | None, max_flops: float | None
) -> np.ndarray:
    """(documents, limits): how much of each limit of a pack a document takes."""
    lengths = np.asarray(lengths, dtype=np.float64)
    if max_length is None and max_flops is None:
        raise ValueError("pass max_length, max_flops or both: something must limit a pack")
    if max_flops is not None and (flops is None or len(flops) != len(lengths)):
        got = None if flops is None else len(flops)
        raise ValueError(f"max_flops needs the flops of all {len(lengths)} documents, got {got}")
    costs = [lengths / max_length] if max_length is not None else []
    if max_flops is not None:
        costs.append(np.asarray(flops, dtype=np.float64) / max_flops)
    return np.stack(costs, axis=1)


def _first_fit(documents: np.ndarray, shares: np.ndarray) -> list[list[int]]:
    """Every document, the costliest first, into the first pack that has room for it."""
    costliest = np.argsort(-shares[documents].max(axis=1), kind="stable")
    packs: list[list[int]] = []
    room = np.zeros((len(documents), shares.shape[1]))
    for index in documents[costliest]:
        fits = (room[: len(packs)] >= shares[index] - 1e-9).all(axis=1)
        first = int(fits.argmax()) if fits.any() else len(packs)
        if first == len(packs):
            packs.append([])
            room[first] = 1
        packs[first].append(int(index))
        room[first] -= shares[index]
    return packs


@dataclass(frozen=True)
class PackingReport:
    """
    What packs are worth where `num_ranks` of them make a step, and every rank waits for the last.

    Attributes:
        num_documents, num_packs, num_tokens (`int`): Of all packs, padding not counted.
        padding (`float`): Share of the tokens computed that are padding.
        balance (`float`): Mean FLOPs of a rank over those of the busiest, of all steps; 1 is no waiting.
    """

    num_documents: int
    num_packs: int
    num_tokens: int
    padding: float
    balance: float

    @classmethod
    def of(
        cls,
        packs: Sequence[Sequence[int]],
        lengths: Sequence[int],
        flops: Sequence[float],
        *,
        num_ranks: int = 1,
        padded_length: int | None = None,
    ) -> "PackingReport":
        """`padded_length` is what every pack is padded to, if it is."""
        lengths, flops = np.asarray(lengths), np.asarray(flops)
        tokens = np.array([lengths[pack].sum() for pack in packs])
        work = np.array([flops[pack].sum() for pack in packs])
        work = work[: len(work) // num_ranks * num_ranks].reshape(-1, num_ranks)
        if not len(work):
            raise ValueError(f"{len(packs)} packs make no step of {num_ranks} ranks")
        computed = tokens.sum() if padded_length is None else padded_length * len(packs)
        return cls(
            num_documents=sum(map(len, packs)),
            num_packs=len(packs),
            num_tokens=int(tokens.sum()),
            padding=float(1 - tokens.sum() / computed),
            balance=float(work.mean(axis=1).sum() / work.max(axis=1).sum()),
        )

    @classmethod
    def of_padding(
        cls,
        lengths: Sequence[int],
        flops: Sequence[float],
        *,
        batch_size: int,
        padding_flops: float,
        num_ranks: int = 1,
    ) -> "PackingReport":
        """Batches of documents in the given order, each padded to its longest, a token of it at `padding_flops`."""
        whole = len(lengths) // (batch_size * num_ranks) * batch_size * num_ranks
        if not whole:
            raise ValueError(f"{len(lengths)} documents make no step of {num_ranks} ranks with {batch_size} each")
        lengths, work = (np.asarray(values)[:whole].reshape(-1, batch_size) for values in (lengths, flops))
        padding = lengths.max(axis=1) * batch_size - lengths.sum(axis=1)
        work = (work.sum(axis=1) + padding * padding_flops).reshape(-1, num_ranks)
        return cls(
            num_documents=whole,
            num_packs=len(padding),
            num_tokens=int(lengths.sum()),
            padding=float(padding.sum() / (padding.sum() + lengths.sum())),
            balance=float(work.mean(axis=1).sum() / work.max(axis=1).sum()),
        )


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
        sizes = dataset.select_columns(["length", "image_grids"]) if isinstance(dataset, datasets.Dataset) else dataset
        self.lengths, self.flops = [], []
        for row in sizes:
            self.lengths.append(int(row["length"]))
            self.flops.append(row_flops(config, row))
        limits = {"max_length": max_length, "max_flops": max_flops}
        kept = _rows_to_pack(self.lengths, self.flops, on_long_row, lambda index: self.dataset[index], **limits)
        packs = make_packs(
            [self.lengths[index] for index in kept],
            [self.flops[index] for index in kept],
            **limits,
            window=window,
            seed=seed,
        )
        self.packs = [[kept[index] for index in pack] for pack in packs]

    def report(self, num_ranks: int = 1, *, padded_length: int | None = None) -> PackingReport:
        return PackingReport.of(self.packs, self.lengths, self.flops, num_ranks=num_ranks, padded_length=padded_length)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict]:
        return [self.dataset[document] for document in self.packs[index]]


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
            lengths = [int(row["length"]) for row in rows]
            flops = [row_flops(self.config, row) for row in rows]
            kept = _rows_to_pack(lengths, flops, self.on_long_row, rows.__getitem__, **self.limits)
            sizes = [lengths[index] for index in kept], [flops[index] for index in kept]
            for documents in make_packs(*sizes, **self.limits, window=self.window):
                yield [rows[kept[index]] for index in documents]


def _rows_to_pack(
    lengths: Sequence[int],
    flops: Sequence[float],
    on_long_row: str,
    get_row: Callable[[int], dict],
    *,
    max_length: int | None,
    max_flops: float | None,
) -> list[int]:
    """Numbers of the rows that are to be packed: without those that fit into no pack, if these are to be skipped."""
    if on_long_row not in ON_LONG_ROW:
        raise ValueError(f"on_long_row is {on_long_row!r}, expected one of {ON_LONG_ROW}")
    if on_long_row == "raise":
        return list(range(len(lengths)))
    is_long = (_shares(lengths, flops, max_length=max_length, max_flops=max_flops) > 1).any(axis=1)
    if is_long.any():
        long = np.flatnonzero(is_long).tolist()
        names = [str(get_row(index).get("row_id", index)) for index in long[:20]]
        logger.warning(f"{len(long)} of {len(lengths)} rows fit into no pack and are left out: {names}")
    return np.flatnonzero(~is_long).tolist()


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
    "PackingReport",
    "make_packs",
    "row_flops",
]
