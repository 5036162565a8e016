"""Pictures alone, for the vision tokenizer: a folder of images, or an image column of a data set, as pixels and grids.

The image processor makes the pixels; what it refuses (corrupt files, absurd ratios, decompression bombs) is a bad
picture, and skipped and counted or raised. A picture is a function of (seed, epoch, index), whatever the workers.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ...processing.image_processing_nextflow import NextFlowImageProcessor
from .messages import bad_row_reason, open_image


logger = logging.getLogger(__name__)

BAD_PICTURES = ("skip", "raise")


def load_pictures(
    source: str | Path, *, split: str = "train", name: str | None = None, image_column: str = "image"
) -> datasets.Dataset:
    """
    Rows with encoded images in "image": of a folder of image files, of a data set's folder (parquet, webdataset, or
    what `save_to_disk` wrote), or of a Hub id, whose column `image_column` has the images.
    """
    if (Path(source) / "dataset_info.json").is_file() and (Path(source) / "state.json").is_file():
        rows = datasets.load_from_disk(str(source))
    else:
        rows = datasets.load_dataset(str(source), name, split=split)
    if image_column not in rows.column_names:
        raise ValueError(f"{source} has the columns {rows.column_names}, expected {image_column!r} among them")
    rows = rows.select_columns([image_column])
    rows = rows if image_column == "image" else rows.rename_column(image_column, "image")
    # Decoded where a bad one can be caught and named.
    return rows.cast_column("image", datasets.Image(decode=False))


class NextFlowPictureDataset(Dataset):
    """
    Items for [`NextFlowVisionTokenizerCollator`]: `pixel_values` (3, height, width) of the picture's bucket and
    `image_grids` (scales, 2); and `row_id`, which names it where a batch is bad.

    Args:
        rows (`datasets.Dataset`): With encoded images in "image": what [`load_pictures`] gives.
        image_processor ([`NextFlowImageProcessor`]): Makes the pixels, at its `resolution`.
        on_bad_picture (`str`, *optional*, defaults to `"skip"`):
            `"skip"`: the next good picture takes the place of a bad one, whose id is in the log and in `bad_pictures`.
            `"raise"`: the run stops with its id.
        random_crop (`float`, *optional*, defaults to 1.0):
            Least share of each side that a random crop keeps (TokenFlow trains with 0.8); 1 crops nothing at random.
        random_flip (`bool`, *optional*, defaults to `False`): Whether every second picture is mirrored.
        seed (`int`, *optional*, defaults to 0): Of crops and flips.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_processor: NextFlowImageProcessor,
        *,
        on_bad_picture: str = "skip",
        random_crop: float = 1.0,
        random_flip: bool = False,
        seed: int = 0,
    ):
        if on_bad_picture not in BAD_PICTURES:
            raise ValueError(f"on_bad_picture is {on_bad_picture!r}, expected one of {BAD_PICTURES}")
        if not 0 < random_crop <= 1:
            raise ValueError(f"random_crop is {random_crop}, expected more than 0 and at most 1")
        if not len(rows):
            raise ValueError("got 0 pictures, expected at least 1")
        self.rows = rows
        self.image_processor = image_processor
        self.on_bad_picture = on_bad_picture
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.seed = seed
        # Both are shared with the loader's workers, which live through several epochs and find the bad ones.
        self.epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self.is_bad = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Other crops and flips."""
        self.epoch[0] = epoch

    @property
    def bad_pictures(self) -> list[int]:
        """Indices of the pictures of this process that were skipped so far."""
        return self.is_bad.nonzero().flatten().tolist()

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self.is_bad[candidate]:
                continue
            try:
                return self._load(candidate)
            except MemoryError:
                raise
            except Exception as error:  # whatever this one image raises, as in the extraction of rows
                message = f"image {candidate} ({self._name(candidate)}) is bad: {bad_row_reason(error)}"
                if self.on_bad_picture == "raise":
                    raise ValueError(message) from error
                logger.warning("%s; the next one takes its place", message)
                self.is_bad[candidate] = True
        raise ValueError(f"all {len(self)} pictures are bad; see the log for the first causes")

    def _load(self, index: int) -> dict[str, torch.Tensor | str]:
        encoded = self.rows[index]["image"]
        if encoded is None:
            raise ValueError("the image is missing")
        picture = open_image(encoded, self.image_processor.max_pixels)
        if self.random_crop < 1 or self.random_flip:
            picture = self._augment(picture, np.random.default_rng((self.seed, int(self.epoch[0]), index)))
        inputs = self.image_processor(picture, return_tensors="pt")
        grids = inputs["image_grids"][0]
        row_id = f"{index}: {self._name(index)}"
        return {"pixel_values": inputs["pixel_values"][0], "image_grids": grids[grids.prod(-1) > 0], "row_id": row_id}

    def _augment(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        scale, left, top = rng.uniform(self.random_crop, 1), rng.random(), rng.random()
        width, height = (max(1, round(side * scale)) for side in picture.size)
        left, top = round(left * (picture.width - width)), round(top * (picture.height - height))
        picture = picture.crop((left, top, left + width, top + height))
        mirrored = self.random_flip and rng.random() < 0.5
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture

    def _name(self, index: int) -> str:
        try:
            encoded = self.rows[index]["image"] or {}
        except ValueError:  # its row cannot be read
            encoded = {}
        return encoded.get("path") or "no path"


class NextFlowVisionTokenizerCollator:
    """
    Items to a batch: `pixel_values` float32 (n, 3, max_height, max_width), zero-padded, and `image_grids`
    LongTensor (n, max_scales, 2); and the `row_ids` of items that have one.

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
        pixels = [torch.as_tensor(item["pixel_values"]) for item in items]
        grids = [torch.as_tensor(item["image_grids"]) for item in items]
        height, width = (max(image.shape[axis] for image in pixels) for axis in (1, 2))
        # Plainly contiguous: in channels-last layout GroupNorm's bf16 backward is thirty times slower on a CPU.
        pixel_values = torch.zeros(len(items), 3, height, width)
        image_grids = torch.zeros(len(items), max(len(rows) for rows in grids), 2, dtype=torch.long)
        for index, (image, rows) in enumerate(zip(pixels, grids, strict=True)):
            pixel_values[index, :, : image.shape[1], : image.shape[2]] = image
            image_grids[index, : len(rows)] = rows
        names = {"row_ids": [item["row_id"] for item in items]} if "row_id" in items[0] else {}
        return {"pixel_values": pixel_values, "image_grids": image_grids, **names}


def pixels_from_uint8(image: np.ndarray) -> torch.FloatTensor:
    """uint8 (height, width, 3) to float32 (3, height, width) in [-1, 1], contiguous."""
    # The copy: an array that is mapped from a file is read-only, and torch warns about that.
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()


__all__ = ["NextFlowPictureDataset", "NextFlowVisionTokenizerCollator", "load_pictures", "pixels_from_uint8"]
