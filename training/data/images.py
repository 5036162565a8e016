"""Images alone or with captions, from the rows of a description of data; for the vision tokenizer as pixels and grids.

A row that cannot be read, adapted or decoded is skipped and counted, or raised, as in the extraction of codes. An item
is a function of (seed, epoch, index), whatever the workers.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ...processing.image_loading_nextflow import MAX_PIXELS
from ...processing.image_processing_nextflow import NextFlowImageProcessor
from .messages import MEND, BadRowError, bad_row_reason, caption_of, check_on_bad_row, open_image


logger = logging.getLogger(__name__)


class ImageRows(Dataset):
    """
    One image of every row: items `{"image": upright RGB image, "caption": str, "row_id": str}`. Where a row has
    several images, epochs take turns. The caption is empty unless the row is one image that a text asks for.

    Args:
        rows (`Sequence[dict]`): With "images" and "messages", as [`load_mixture`] gives them.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            `"skip"`: the next good row takes the place of a bad one, whose id is in the log and in `bad_rows`.
            `"raise"`: the run stops with its id.
        max_pixels (`int`, *optional*): Most pixels of an image; a row with a larger one is bad.
        allow_private_addresses (`bool`, *optional*, defaults to `False`): See [`load_image`].
    """

    def __init__(
        self,
        rows: Sequence[dict],
        *,
        on_bad_row: str = "raise",
        max_pixels: int = MAX_PIXELS,
        allow_private_addresses: bool = False,
    ):
        if not len(rows):
            raise ValueError("got 0 images, expected at least 1")
        self.rows = rows
        self.on_bad_row = check_on_bad_row(on_bad_row)
        self.max_pixels = max_pixels
        self.allow_private_addresses = allow_private_addresses
        # Both are shared with the loader's workers, which live through several epochs and find the bad ones.
        self.epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self.is_bad = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.first_good(index, lambda item, _: item)

    def select(self, count: int) -> "ImageRows":
        """The first `count` of them."""
        first = copy.copy(self)
        first.rows = self.rows.select(range(min(count, len(self))))
        first.is_bad = self.is_bad[: len(first.rows)]
        return first

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, by which the images of a row take turns; the loader calls it."""
        self.epoch[0] = epoch

    @property
    def bad_rows(self) -> list[int]:
        """Indices of the rows of this process that were skipped so far."""
        return self.is_bad.nonzero().flatten().tolist()

    def first_good(self, index: int, make: Callable[[dict[str, Any], int], Any]) -> Any:
        """`make(item, index)` of the first row from `index` on that neither reading nor `make` fails on."""
        for candidate in [*range(index, len(self)), *range(index)]:
            if self.is_bad[candidate]:
                continue
            row = {}
            try:
                row = self.rows[candidate]
                return make(self._open(row, candidate), candidate)
            except MemoryError:
                raise
            except Exception as error:  # whatever this one row raises, as in the extraction of rows
                message = f"row {candidate} ({_name(row)}) is bad: {bad_row_reason(error)}"
                if self.on_bad_row == "raise":
                    raise BadRowError(f"{message}. {MEND}") from error
                logger.warning("%s; the next one takes its place", message)
                self.is_bad[candidate] = True
        raise BadRowError(f"all {len(self)} rows are bad; see the log for the first causes")

    def _open(self, row: dict, index: int) -> dict[str, Any]:
        if row["error"] is not None:
            raise BadRowError(row["error"])
        if not row["images"]:
            raise BadRowError("it has no image")
        image = row["images"][(index + int(self.epoch[0])) % len(row["images"])]
        image = open_image(image, self.max_pixels, allow_private_addresses=self.allow_private_addresses)
        return {"image": image, "caption": caption_of(row["messages"]), "row_id": f"{index}: {_name(row)}"}


def _name(row: dict) -> str:
    return f"{row.get('row_id')} of {row.get('source')}"


class NextFlowImageDataset(Dataset):
    """
    Items for [`NextFlowVisionTokenizerCollator`]: `pixel_values` (3, height, width) of the image's bucket and
    `image_grids` (scales, 2); and `row_id`, which names it where a batch is bad.

    Args:
        images ([`ImageRows`]): What [`load_images`] gives. An image that `image_processor` refuses is a bad row, too.
        image_processor ([`NextFlowImageProcessor`]): Makes the pixels, at its `resolution`.
        random_crop (`float`, *optional*, defaults to 1.0):
            Least share of each side that a random crop keeps (TokenFlow trains with 0.8); 1 crops nothing at random.
        random_flip (`bool`, *optional*, defaults to `False`): Whether every second image is mirrored.
        seed (`int`, *optional*, defaults to 0): Seeds crops and flips.
    """

    def __init__(
        self,
        images: ImageRows,
        image_processor: NextFlowImageProcessor,
        *,
        random_crop: float = 1.0,
        random_flip: bool = False,
        seed: int = 0,
    ):
        if not 0 < random_crop <= 1:
            raise ValueError(f"random_crop is {random_crop}, expected more than 0 and at most 1")
        self.images = images
        self.image_processor = image_processor
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        return self.images.first_good(index, self._pixels)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which crops and flips depend."""
        self.images.set_epoch(epoch)

    def _pixels(self, item: dict[str, Any], index: int) -> dict[str, torch.Tensor | str]:
        image = item["image"]
        if self.random_crop < 1 or self.random_flip:
            image = self._augment(image, np.random.default_rng((self.seed, int(self.images.epoch[0]), index)))
        inputs = self.image_processor(image, return_tensors="pt")
        grids = inputs["image_grids"][0]
        grids = grids[grids.prod(-1) > 0]
        return {"pixel_values": inputs["pixel_values"][0], "image_grids": grids, "row_id": item["row_id"]}

    def _augment(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        scale, left, top = rng.uniform(self.random_crop, 1), rng.random(), rng.random()
        width, height = (max(1, round(side * scale)) for side in image.size)
        left, top = round(left * (image.width - width)), round(top * (image.height - height))
        image = image.crop((left, top, left + width, top + height))
        mirrored = self.random_flip and rng.random() < 0.5
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


class NextFlowVisionTokenizerCollator:
    """
    Items to a batch: `pixel_values` float32 (n, 3, max_height, max_width), zero-padded, and `image_grids`
    int64 (n, max_scales, 2); and the `row_ids` of items that have one.

    Args:
        image_processor (`Callable`, *optional*):
            A `NextFlowImageProcessor`. With it an item is `{"image": PIL image}`; without, an item is
            `{"pixel_values": (3, height, width), "image_grids": (scales, 2)}`.
    """

    def __init__(self, image_processor: Callable | None = None):
        self.image_processor = image_processor

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor | list[str]]:
        if self.image_processor is not None:
            batch = self.image_processor([item["image"] for item in items], return_tensors="pt")
            return {name: batch[name] for name in ("pixel_values", "image_grids")}
        names = {"row_ids": [item["row_id"] for item in items]} if "row_id" in items[0] else {}
        return {
            "pixel_values": pad_images([torch.as_tensor(item["pixel_values"]) for item in items]),
            "image_grids": pad_sequence([torch.as_tensor(item["image_grids"]) for item in items], batch_first=True),
            **names,
        }


def pad_images(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images (3, height, width) in the top-left corners of one batch (n, 3, height, width), zeros elsewhere."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    # Plainly contiguous: in channels-last layout GroupNorm's bf16 backward is thirty times slower on a CPU.
    return torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images])
