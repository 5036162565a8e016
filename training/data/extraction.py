"""Images -> codes, once, before training: the encoder never runs beside the transformer (§4).

Rows of `messages` and `images` become shards of token ids, labels and codes (shards.py). Shard n holds the rows
`n * rows_per_shard` and on, and is a function of them, the settings and the seed alone: not of the number of
processes, of kills, or of the rows that were left out before. So an interrupted extraction goes on with the shards
that are missing, and ends in the same files.

Rows with a length are read by number. A stream is read in order by every process, which skips the rows of the shards
that are there or another's: skipped rows are read but not decoded, so a resumed stream costs its reading, and many
processes are better served by sources that do not stream.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ...modeling_nextflow.loss_nextflow import IGNORE_INDEX
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...processing.processing_nextflow import NextFlowProcessor
from .messages import MEND, BadRowError, bad_row_reason, check_on_bad_row, drop_condition, open_image
from .mixture import PURPOSES
from .shards import (
    INDEX,
    check_manifest,
    describe_processor,
    describe_tokenizer,
    finish,
    load_codes,
    num_rows_of,
    shard_exists,
    write_shard,
)


logger = logging.get_logger(__name__)


@dataclass(kw_only=True)
class ExtractionSettings:
    """
    How rows become codes.

    Args:
        purpose (`str`, *optional*, defaults to `"training"`):
            With `"evaluation"` no condition is dropped and no code is sampled, whatever the other settings say. The
            `eval_codes` of a training are such a folder.
        resolution (`int`, *optional*): Level of the images of rows that name none. Defaults to the processor's.
        train_on (`str`, *optional*, defaults to `"responses"`): As in [`~NextFlowProcessor.apply_chat_template`].
        self_correction (`bool`, *optional*, defaults to `True`):
            Store sampled input codes and the targets that correct them (§2.2) for the images that are trained on.
            Context images are always clean. The tokenizer's config has the number of candidates
            (`self_correction_top_k`) and the share of the codes that are sampled (`self_correction_ratio`).
        self_correction_samples (`float`, *optional*, defaults to 1.0): Share of the rows that are (§3.2.1: all).
        text_drop_rate, image_drop_rate (`float`, *optional*): See [`drop_condition`].
        rows_per_shard, batch_size (`int`, *optional*): Rows to read for a shard, and to encode at a time.
        decoding_threads (`int`, *optional*, defaults to 4): Threads that decode images ahead of the encoder.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops at a row that cannot be trained on (missing, corrupt, too large or too long an image, empty
            text, images that do not match the messages, too long a sequence), and names it; `"skip"` leaves it out,
            whatever it raises while it is read, adapted and tokenized, writes it to `bad_rows.jsonl` and counts it by
            its cause. Failures of the encoder and of the disk end the extraction in either case.
        allow_private_addresses (`bool`, *optional*, defaults to `False`):
            Whether rows may name images at addresses of this machine and its network. See [`load_image`].
        seed (`int`, *optional*, defaults to 0): Of sampling and dropping.
    """

    purpose: str = "training"
    resolution: int | None = None
    train_on: str = "responses"
    self_correction: bool = True
    self_correction_samples: float = 1.0
    text_drop_rate: float = 0.1
    image_drop_rate: float = 0.05
    rows_per_shard: int = 2048
    batch_size: int = 64
    decoding_threads: int = 4
    on_bad_row: str = "raise"
    allow_private_addresses: bool = False
    seed: int = 0

    def __post_init__(self):
        check_on_bad_row(self.on_bad_row)
        for name in ("rows_per_shard", "batch_size", "decoding_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("self_correction_samples", "text_drop_rate", "image_drop_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if self.purpose not in PURPOSES:
            raise ValueError(f"purpose is {self.purpose!r}, expected one of {PURPOSES}")
        if self.purpose == "evaluation":
            self.self_correction, self.text_drop_rate, self.image_drop_rate = False, 0.0, 0.0

    def to_dict(self) -> dict[str, Any]:
        """What decides the shards."""
        # An extraction may go on with others of these.
        free = ("batch_size", "decoding_threads", "on_bad_row", "allow_private_addresses")
        return {name: value for name, value in asdict(self).items() if name not in free}


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
    Encode rows and store them as shards for [`load_codes`]; go on where an earlier call was interrupted.

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
        data (`dict`, *optional*): What the rows are, for the manifest: an extraction only goes on with the same.

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
    origin = {
        "vision_tokenizer": vision_tokenizer.config._name_or_path,
        "revision": getattr(vision_tokenizer.config, "_commit_hash", None),  # set by the loading from the Hub alone
    }
    check_manifest(output_dir, manifest, origin)
    if (output_dir / INDEX).exists():
        return num_rows_of(output_dir)
    encoder = _Encoder(processor, vision_tokenizer, settings)
    state = PartialState()

    def is_mine(shard: int) -> bool:
        return shard % state.num_processes == state.process_index and not shard_exists(output_dir, shard)

    read = _read_stream if is_stream else _read_by_number
    shards = read(rows, settings.rows_per_shard, is_mine)
    num_shards = 0
    progress = tqdm(desc="rows", unit="row", disable=not state.is_local_main_process)
    for shard, numbered_rows in shards:
        num_shards = shard + 1
        if numbered_rows is not None:
            good, bad, num_read = encoder(numbered_rows, progress)
            if bad:
                logger.warning(f"shard {shard}: {len(bad)} of {num_read} rows left out, the first: {bad[0]}")
            write_shard(output_dir, shard, good, num_read=num_read, bad_rows=bad)
    finish(output_dir, num_shards)
    return num_rows_of(output_dir)


def extract_codes(
    get_row: Callable[[int], dict],
    num_rows: int,
    output_dir: str | os.PathLike,
    *,
    processor: NextFlowProcessor,
    vision_tokenizer: NextFlowVisionTokenizer,
    data: dict[str, Any] | None = None,
    **settings,
) -> Dataset:
    """
    [`extract_rows`] of the rows `get_row(0)` to `get_row(num_rows - 1)`, waited for and loaded. `settings` are those
    of [`ExtractionSettings`].
    """
    extract_rows(
        _NumberedRows(get_row, num_rows),
        output_dir,
        processor=processor,
        vision_tokenizer=vision_tokenizer,
        settings=ExtractionSettings(**settings),
        data=data,
    )
    PartialState().wait_for_everyone()
    return load_codes(output_dir)


@dataclass
class _NumberedRows(Sequence):
    get_row: Callable[[int], dict]
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict:
        return self.get_row(index)


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
    """The rows of a stream. There is no way on behind one that is not read: that is an error, not a bad row."""
    number = -1
    try:
        for number, row in enumerate(rows):  # noqa: B007
            yield row
    except Exception as error:
        raise BadRowError(f"the stream breaks off after {number + 1} rows: {bad_row_reason(error)}") from error


@dataclass
class _Item:
    """A row on its way: what it is, and either its images or why there are none."""

    number: int
    row: dict
    messages: list[dict] | None = None
    images: list | None = None
    error: str | None = None
    cause: Exception | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what is done to this row alone, with no model: whatever that raises makes it a bad row."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            self.error, self.cause = bad_row_reason(error), error

    @property
    def row_id(self) -> str:
        row_id = self.row.get("row_id")
        return str(self.number if row_id is None else row_id)

    def describe(self) -> dict[str, Any]:
        names = {"source": self.row.get("source"), "row_id": self.row_id, "task": self.row.get("task")}
        return {"number": self.number, **names, "reason": self.error}


class _Encoder:
    """Rows of messages and images to rows of tokens and codes."""

    def __init__(
        self, processor: NextFlowProcessor, vision_tokenizer: NextFlowVisionTokenizer, settings: ExtractionSettings
    ):
        self.processor, self.vision_tokenizer, self.settings = processor, vision_tokenizer, settings

    def __call__(self, numbered_rows: NumberedRows, progress: tqdm) -> tuple[list[dict], list[dict], int]:
        """Encoded rows, descriptions of those left out, and how many there were."""
        good, bad, num_read = [], [], 0
        items = self._decode_ahead(numbered_rows)
        while batch := list(itertools.islice(items, self.settings.batch_size)):
            encoded = self._encode(batch)
            for item in batch:
                if item.error is not None:
                    self._check_wanted(item)
                    bad.append(item.describe())
            good += encoded
            num_read += len(batch)
            progress.update(len(batch))
        return good, bad, num_read

    def _check_wanted(self, item: _Item) -> None:
        if self.settings.on_bad_row == "raise":
            raise BadRowError(
                f"row {item.row_id!r} of source {item.row.get('source')!r} (number {item.number} of the mixture): "
                f"{item.error}. {MEND}; what is extracted so far is kept"
            ) from item.cause

    def _decode_ahead(self, numbered_rows: Iterable[tuple[int, dict]]) -> Iterator[_Item]:
        """The rows with their images decoded, in order, some batches ahead of the encoder."""
        with ThreadPoolExecutor(self.settings.decoding_threads) as threads:
            pending = deque()
            for number, row in numbered_rows:
                pending.append(threads.submit(self._decode, number, row))
                if len(pending) > 2 * self.settings.batch_size:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _decode(self, number: int, row: dict) -> _Item:
        item = _Item(number, row)
        if row.get("error") is not None:
            item.error = row["error"]
            return item
        rates = {"text_rate": self.settings.text_drop_rate, "image_rate": self.settings.image_drop_rate}
        options = {"allow_private_addresses": self.settings.allow_private_addresses}
        max_pixels = self.processor.image_processor.max_pixels
        with item.reading():
            item.messages, images = drop_condition(
                row, np.random.default_rng((self.settings.seed, 1, number)), **rates
            )
            item.images = [open_image(image, max_pixels, **options) for image in images]
        return item

    @torch.inference_mode()
    def _encode(self, batch: list[_Item]) -> list[dict]:
        """Rows of plain lists of those that are good. Every image is encoded once."""
        items, tokens, images = [], [], []
        for item in batch:
            row = None if item.error is not None else self._tokenize(item)
            if row is None:
                continue
            places = row["input_ids"] == self.processor.boi_token_id
            is_trained = (row["labels"] != IGNORE_INDEX)[places].tolist()
            corrects = (
                self.settings.self_correction and self._rng(item, 2).random() < self.settings.self_correction_samples
            )
            images += [
                {
                    "pixels": self._crop(pixels, grids),
                    "grids": grids,
                    "corrected": trained and corrects,
                    "rng": self._rng(item, 3, place),
                }
                for place, (pixels, grids, trained) in enumerate(
                    zip(row.get("pixel_values", []), row.get("image_grids", []), is_trained, strict=True)
                )
            ]
            items.append(item)
            tokens.append(row)
        self._encode_images(images)
        remaining, rows = iter(images), []
        for item, row in zip(items, tokens):
            grids = row.get("image_grids", torch.zeros(0, 0, 2, dtype=torch.long))
            members = list(itertools.islice(remaining, len(grids)))
            codes = torch.cat([torch.zeros(0, dtype=torch.long), *(image["codes"] for image in members)])
            if len(codes) and not 0 <= codes.min() <= codes.max() < self.vision_tokenizer.config.codebook_size:
                size = self.vision_tokenizer.config.codebook_size
                item.error = f"its codes are in [{codes.min()}, {codes.max()}], expected [0, {size - 1}]"
                continue
            rows.append(
                {
                    "input_ids": row["input_ids"][0].tolist(),
                    "labels": row["labels"][0].tolist(),
                    "image_codes": codes.tolist(),
                    "image_target_codes": [code for image in members for code in image["targets"].tolist()],
                    "image_grids": grids.tolist(),
                    "length": row["input_ids"].shape[1],
                    "task": item.row.get("task"),
                    "source": item.row.get("source"),
                    "row_id": item.row_id,
                    "is_clean": item.messages == item.row["messages"] and not any(one["corrected"] for one in members),
                }
            )
        return rows

    def _tokenize(self, item: _Item) -> dict | None:
        """Tokens, labels, pixels and grids of a row, or None and its error."""
        resolution = item.row.get("resolution") or self.settings.resolution
        with item.reading():
            return self.processor.apply_chat_template(
                item.messages,
                images=item.images or None,
                tokenize=True,
                return_dict=True,
                return_labels=True,
                train_on=self.settings.train_on,
                return_tensors="pt",
                **({} if resolution is None else {"resolution": resolution}),
            )

    def _encode_images(self, images: list[dict]) -> None:
        """`codes` and `targets` of every image: those that are corrected for, and those that are not."""
        for corrected in (False, True):
            members = [image for image in images if image["corrected"] == corrected]
            if not members:
                continue
            device = self.vision_tokenizer.device
            grids = torch.stack([image["grids"] for image in members])
            # One generator an image: its codes then depend on no other row.
            generators = [torch.Generator(device).manual_seed(int(image["rng"].integers(2**63))) for image in members]
            encoded = self.vision_tokenizer.encode(
                _pad_images([image["pixels"] for image in members]).to(device, self.vision_tokenizer.dtype),
                grids.to(device),
                **({"self_correction": True, "generator": generators} if corrected else {}),
            )
            counts = grids.prod(-1).sum(-1).tolist()
            codes = encoded.image_codes.cpu().split(counts)
            targets = encoded.image_target_codes.cpu().split(counts) if corrected else codes
            for image, image_codes, image_targets in zip(members, codes, targets, strict=True):
                image.update(codes=image_codes, targets=image_targets)

    def _crop(self, pixels: torch.Tensor, grids: torch.LongTensor) -> torch.Tensor:
        """An image (3, height, width) without the padding that it has beside the others of its row."""
        height, width = self.vision_tokenizer.pixel_size(grids[grids.prod(-1) > 0][-1].tolist())
        return pixels[:, :height, :width]

    def _rng(self, item: _Item, *stream: int) -> np.random.Generator:
        return np.random.default_rng((self.settings.seed, *stream, item.number))


def _pad_images(images: list[torch.Tensor]) -> torch.Tensor:
    """Images (3, height, width) in the top-left corners of one batch."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    return torch.stack(
        [torch.nn.functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    )


__all__ = ["ExtractionSettings", "extract_codes", "extract_rows", "load_codes"]
