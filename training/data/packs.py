"""Sizes of documents -> packs of equal cost, as arrays: a million documents take about a second.

First fit, the costliest first, within windows of documents; all windows of a block take their next document at once.
Knows numbers alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


WINDOWS_AT_ONCE = 512
CHUNK = 2048  # consecutive rows that an endless walk reads together


@dataclass
class Packs(Sequence):
    """
    Packs of documents as arrays; an item is the array of a pack's documents.

    Args:
        documents (`np.ndarray`): The documents of one pack after the other.
        ends (`np.ndarray`): Where each pack ends among them.
        order (`np.ndarray`): Order of the packs.
        tokens, flops (`np.ndarray`): Per pack, in that order; no FLOPs where those of documents are not known.
    """

    documents: np.ndarray
    ends: np.ndarray
    order: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray | None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> np.ndarray:
        pack = self.order[index]
        return self.documents[self.ends[pack - 1] if pack else 0 : self.ends[pack]]


def make_packs(
    lengths: Sequence[int],
    flops: Sequence[float] | None = None,
    *,
    max_length: int | None = None,
    max_flops: float | None = None,
    window: int = 2048,
    seed: int | Sequence[int] | None = None,
) -> Packs:
    """
    Packs of document indices that exceed neither limit: first fit, the costliest documents first.

    Args:
        lengths (`Sequence[int]`): Tokens of each document.
        flops (`Sequence[float]`, *optional*): FLOPs of each document ([`training_flops`]); needed for `max_flops`.
        max_length (`int`, *optional*): Tokens of a pack. Alone: packing to a fixed length.
        max_flops (`float`, *optional*): FLOPs of a pack. Packing to a fixed computation.
        window (`int`, *optional*, defaults to 2048):
            Documents that are packed among themselves, so that packs are as mixed as the data are.
        seed (`int`, *optional*): Shuffles the documents before, and the packs after. In the given order by default.
    """
    shares = document_shares(lengths, flops, max_length=max_length, max_flops=max_flops)
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
    whole = len(order) // window * window
    # Whole windows side by side, then the documents that are left as a shorter one.
    rows = [*_blocks(order[:whole].reshape(-1, window)), *_blocks(order[whole:][None])]
    packed = [_first_fit(block, shares) for block in rows]
    sizes = np.concatenate([np.zeros(0, dtype=np.int64), *(sizes for _, sizes in packed)])
    documents, ends = np.concatenate([order[:0], *(documents for documents, _ in packed)]), np.cumsum(sizes)
    order = np.arange(len(sizes)) if seed is None else rng.permutation(len(sizes))  # not the costliest first
    tokens, flops = (
        None if values is None else np.add.reduceat(np.asarray(values)[documents], ends - sizes)[order]
        for values in (lengths, flops)
    )
    return Packs(documents, ends, order, tokens, flops)


def document_shares(
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


def _blocks(windows: np.ndarray) -> Iterator[np.ndarray]:
    if windows.size:
        for start in range(0, len(windows), WINDOWS_AT_ONCE):
            yield windows[start : start + WINDOWS_AT_ONCE]


def _first_fit(windows: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Every document of (windows, documents), the costliest of its window first, into its window's first pack that has
    room for it. Returns the documents of one pack after the other, and how many each pack has.
    """
    count, num_documents = windows.shape
    # By the limit that a document takes most of.
    costliest = np.argsort(-shares[windows].max(axis=2), axis=1, kind="stable")
    windows = np.take_along_axis(windows, costliest, axis=1)
    all_windows, pack_of = np.arange(count), np.empty_like(windows)
    costs = shares[windows].transpose(2, 1, 0).copy()  # (limits, documents, windows)
    room = np.ones((len(costs), count, 64))  # a pack that is not begun has room for every document
    num_packs = np.zeros(count, dtype=np.int64)
    for place in range(num_documents):
        begun = int(num_packs.max())
        if begun == room.shape[2]:
            room = np.concatenate([room, np.ones_like(room)], axis=2)
        needed = costs[:, place, :, None]
        # One pack more than is begun, so that one always fits. Fractions rarely add up to 1 exactly, hence the
        # tolerance.
        fits = (room[:, :, : begun + 1] >= needed - 1e-9).all(axis=0)
        first = fits.argmax(axis=1)
        room[:, all_windows, first] -= needed[:, :, 0]
        pack_of[:, place] = first
        np.maximum(num_packs, first + 1, out=num_packs)
    by_pack = np.argsort(pack_of, axis=1, kind="stable")
    # Packs are numbered through all windows.
    numbers = pack_of + (np.cumsum(num_packs) - num_packs)[:, None]
    return np.take_along_axis(windows, by_pack, axis=1).ravel(), np.bincount(numbers.ravel())


def endless_rows(start: int, stop: int, size: int, seed: Sequence[int]) -> np.ndarray:
    """
    Rows at the positions `start` to `stop` of a walk through `size` rows without end: each epoch has every row once,
    in chunks of [`CHUNK`] consecutive rows, whose order is shuffled anew.
    """
    epochs, places = np.divmod(np.arange(start, stop), size)
    rows = np.empty_like(places)
    for epoch in range(start // size, -(-stop // size)):
        rng = np.random.default_rng((*seed, epoch))
        chunks = np.append(rng.permutation(size // CHUNK), size // CHUNK)  # the last one may be short
        number, place = np.divmod(places[epochs == epoch], CHUNK)
        # Turned by a random number, so that chunks have other borders in each epoch.
        rows[epochs == epoch] = (chunks[number] * CHUNK + place + rng.integers(size)) % size
    return rows


@dataclass(frozen=True)
class PackingReport:
    """
    What packs are worth where `num_ranks` of them make a step, and every rank waits for the last.

    Attributes:
        num_documents, num_packs, num_tokens (`int`): Sums over all packs, padding not counted.
        padding (`float`): Share of the tokens computed that are padding.
        balance (`float`): Mean FLOPs of a rank over those of the busiest, of all steps; 1 is no waiting.
    """

    num_documents: int
    num_packs: int
    num_tokens: int
    padding: float
    balance: float

    @classmethod
    def of(cls, packs: Packs, *, num_ranks: int = 1) -> "PackingReport":
        """Of packs whose FLOPs are known; `ValueError` where they make no step."""
        if not len(packs):
            raise ValueError("there is no pack: no row fits into one; raise max_length or max_flops")
        return cls._of_work(len(packs.documents), packs.tokens, 0 * packs.tokens, packs.flops, num_ranks)

    @classmethod
    def of_padding(
        cls,
        lengths: Sequence[int],
        flops: Sequence[float],
        batches: Sequence[Sequence[int]],
        *,
        padding_flops: float,
        num_ranks: int = 1,
    ) -> "PackingReport":
        """
        Batches of documents, those of the ranks of a step after each other, each padded to its longest, a token of it
        at `padding_flops`.
        """
        sizes = np.array([len(batch) for batch in batches])
        documents = np.concatenate([np.asarray(batch) for batch in batches])
        starts = np.cumsum(sizes) - sizes
        lengths, flops = np.asarray(lengths)[documents], np.asarray(flops)[documents]
        tokens = np.add.reduceat(lengths, starts)
        padding = np.maximum.reduceat(lengths, starts) * sizes - tokens
        work = np.add.reduceat(flops, starts) + padding * padding_flops
        return cls._of_work(len(documents), tokens, padding, work, num_ranks)

    @classmethod
    def _of_work(
        cls, num_documents: int, tokens: np.ndarray, padding: np.ndarray, work: np.ndarray, num_ranks: int
    ) -> "PackingReport":
        """From the tokens, the padding and the FLOPs of each pack or batch."""
        # Whole steps alone: in a part of one, fewer processes would wait.
        work = work[: len(work) // num_ranks * num_ranks].reshape(-1, num_ranks)
        if not len(work):
            raise ValueError(f"{len(tokens)} packs make no step of {num_ranks} ranks")
        return cls(
            num_documents=num_documents,
            num_packs=len(tokens),
            num_tokens=int(tokens.sum()),
            padding=float(padding.sum() / (padding.sum() + tokens.sum())),
            balance=float(work.mean(axis=1).sum() / work.max(axis=1).sum()),
        )
