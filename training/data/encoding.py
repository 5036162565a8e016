"""Rows of messages and images -> rows of tokens and codes (§4).

[`RowEncoder`] decodes and tokenizes rows on threads, ahead of the vision tokenizer, and keeps their order; what a row
becomes depends on it, its number, the settings and the seed alone. Knows nothing of files.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ...modeling_nextflow.loss_nextflow import IGNORE_INDEX
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...processing.processing_nextflow import NextFlowProcessor
from .images import pad_images
from .messages import MEND, BadRowError, bad_row_reason, check_on_bad_row, drop_condition, open_image
from .mixture import PURPOSES


@dataclass(kw_only=True)
class ExtractionSettings:
    """
    How rows become codes.

    Args:
        purpose (`str`, *optional*, defaults to `"training"`):
            With `"evaluation"` no condition is dropped and no code is sampled, whatever the other settings say. The
            `eval_codes` of a training are such a folder.
        resolution (`int`, *optional*): Resolution of rows that name none; by default the processor's.
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
        seed (`int`, *optional*, defaults to 0): Seeds sampling and dropping.
        preview_images (`int`, *optional*, defaults to 16):
            The first so many images are reconstructed before the extraction: see [`preview_reconstruction`].
        warn_psnr (`float`, *optional*, defaults to 20.0): Mean PSNR of these, in dB, below which a warning is due.
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
    preview_images: int = 16
    warn_psnr: float = 20.0

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
        # An extraction may be resumed with other values of these.
        free = ("batch_size", "decoding_threads", "on_bad_row", "allow_private_addresses")
        free += ("preview_images", "warn_psnr")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass
class _Item:
    """A row on its way: what it is, and either its tokens and pixels or why there are none."""

    number: int
    row: dict
    messages: list[dict] | None = None
    inputs: dict[str, torch.Tensor] | None = None
    error: str | None = None
    cause: Exception | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Wraps work on this row alone, without a model: whatever that raises makes it a bad row."""
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


class RowEncoder:
    """
    Rows of messages and images to rows of tokens and codes.

    Args:
        processor ([`NextFlowProcessor`]): Tokens, labels and pixels of the messages.
        vision_tokenizer ([`NextFlowVisionTokenizer`]): The frozen encoder.
        settings ([`ExtractionSettings`]): How.
    """

    def __init__(
        self, processor: NextFlowProcessor, vision_tokenizer: NextFlowVisionTokenizer, settings: ExtractionSettings
    ):
        self.processor, self.vision_tokenizer, self.settings = processor, vision_tokenizer, settings

    def __call__(self, numbered_rows: Iterable[tuple[int, dict]]) -> Iterator[tuple[list[dict], list[dict]]]:
        """Batch by batch, the encoded rows and descriptions of those left out."""
        items = self._prepare_ahead(numbered_rows)
        while batch := list(itertools.islice(items, self.settings.batch_size)):
            # First, as encoding may find further rows bad.
            good = self._encode(batch)
            bad = [item for item in batch if item.error is not None]
            if bad and self.settings.on_bad_row == "raise":
                row, cause = bad[0].describe(), bad[0].cause
                raise BadRowError(
                    f"row {row['row_id']!r} of source {row['source']!r} (number {row['number']} of the mixture): "
                    f"{row['reason']}. {MEND}; what is extracted so far is kept"
                ) from cause
            yield good, [item.describe() for item in bad]

    def _prepare_ahead(self, numbered_rows: Iterable[tuple[int, dict]]) -> Iterator[_Item]:
        """The rows as tokens and pixels, in order, some batches ahead. This thread runs nothing but the encoder."""
        with ThreadPoolExecutor(self.settings.decoding_threads) as threads, ThreadPoolExecutor(1) as reader:
            # Rows are read on one thread, in order, as an iterator demands; they are decoded on several.
            rows = iter(numbered_rows)

            def read() -> Future[_Item] | None:
                numbered = next(rows, None)
                return None if numbered is None else threads.submit(self.prepare, *numbered)

            # Two batches: one is prepared while the other is encoded.
            pending = deque(reader.submit(read) for _ in range(2 * self.settings.batch_size))
            try:
                while (item := pending.popleft().result()) is not None:
                    pending.append(reader.submit(read))
                    yield item.result()
            finally:
                reader.shutdown(cancel_futures=True)

    def prepare(self, number: int, row: dict) -> _Item:
        """A row's tokens, labels, pixels and grids, or its error. Runs on any thread."""
        # A row that could not be read comes with its error, and takes its place in the order.
        item, settings = _Item(number, row, error=row.get("error")), self.settings
        if item.error is not None:
            return item
        rates = {"text_rate": settings.text_drop_rate, "image_rate": settings.image_drop_rate}
        options = {"allow_private_addresses": settings.allow_private_addresses}
        max_pixels = self.processor.image_processor.max_pixels
        resolution = row.get("resolution") or settings.resolution
        with item.reading():
            item.messages, images = drop_condition(row, self._rng(item, 1), **rates)
            images = [open_image(image, max_pixels, **options) for image in images]
            item.inputs = self.processor.apply_chat_template(
                item.messages,
                images=images or None,
                tokenize=True,
                return_dict=True,
                return_labels=True,
                train_on=settings.train_on,
                return_tensors="pt",
                **({} if resolution is None else {"resolution": resolution}),
            )
        return item

    @torch.inference_mode()
    def _encode(self, batch: list[_Item]) -> list[dict]:
        """Rows of plain lists of those that are good. Every image is encoded once."""
        items = [item for item in batch if item.error is None]
        images = [self._images_of(item) for item in items]
        self._encode_images(list(itertools.chain.from_iterable(images)))
        rows = [self._row(item, members) for item, members in zip(items, images)]
        # Those that were refused have their error on their item, and are reported with the others.
        return [row for row in rows if row is not None]

    def _images_of(self, item: _Item) -> list[dict[str, Any]]:
        """The images of a row, and whether what is trained on is corrected for."""
        row = item.inputs
        places = row["input_ids"] == self.processor.boi_token_id
        # As in the loss: an image is trained on if its `<boi>` has a label.
        is_trained = (row["labels"] != IGNORE_INDEX)[places].tolist()
        corrects = (
            self.settings.self_correction and self._rng(item, 2).random() < self.settings.self_correction_samples
        )
        return [
            {
                "pixels": self._crop(pixels, grids),
                "grids": grids,
                "corrected": trained and corrects,  # what is only read stays clean
                "rng": self._rng(item, 3, place),
            }
            for place, (pixels, grids, trained) in enumerate(
                zip(row.get("pixel_values", []), row.get("image_grids", []), is_trained, strict=True)
            )
        ]

    def _row(self, item: _Item, images: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The row as it is stored, or None and its error."""
        inputs, size = item.inputs, self.vision_tokenizer.config.codebook_size
        codes = torch.cat([torch.zeros(0, dtype=torch.long), *(image["codes"] for image in images)])
        if len(codes) and not 0 <= codes.min() <= codes.max() < size:
            item.error = f"its codes are in [{codes.min()}, {codes.max()}], expected [0, {size - 1}]"
            return None
        return {
            "input_ids": inputs["input_ids"][0].tolist(),
            "labels": inputs["labels"][0].tolist(),
            "image_codes": codes.tolist(),
            "image_target_codes": [code for image in images for code in image["targets"].tolist()],
            "image_grids": inputs["image_grids"].tolist() if images else [],
            "length": inputs["input_ids"].shape[1],
            "task": item.row.get("task"),
            "source": item.row.get("source"),
            "row_id": item.row_id,
            "is_clean": item.messages == item.row["messages"] and not any(image["corrected"] for image in images),
        }

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
                pad_images([image["pixels"] for image in members]).to(device, self.vision_tokenizer.dtype),
                grids.to(device),
                **({"self_correction": True, "generator": generators} if corrected else {}),
            )
            counts = grids.prod(-1).sum(-1).tolist()
            codes = encoded.image_codes.cpu().split(counts)
            targets = encoded.image_target_codes.cpu().split(counts) if corrected else codes
            for image, image_codes, image_targets in zip(members, codes, targets, strict=True):
                image.update(codes=image_codes, targets=image_targets)

    def _crop(self, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """An image (3, height, width) without the padding that it has beside the others of its row."""
        height, width = self.vision_tokenizer.pixel_size(grids[grids.prod(-1) > 0][-1].tolist())
        return pixels[:, :height, :width]

    def _rng(self, item: _Item, *stream: int) -> np.random.Generator:
        # Streams of their own: whether a condition is dropped does not change which codes are sampled.
        return np.random.default_rng((self.settings.seed, *stream, item.number))
