"""Rows for the diffusion decoder: the images themselves beside their codes, which are extracted once."""

from collections.abc import Callable, Sequence

import torch
from datasets import Dataset as CodesDataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .images import pad_images
from .messages import caption_of, open_image


class NextFlowDecoderDataset(Dataset):
    """
    The last image of every row: what the transformer samples, with the codes that it is trained on.

    Args:
        codes (`datasets.Dataset`): The shards of [`extract_rows`]. Rows of text alone are
            left out.
        get_row (`Callable`):
            `get_row(source, row_id)` is the row with "messages" and "images" that the codes were extracted from:
            [`~training.data.mixture.MixtureRows`] of a mixture. The shards of one data set name no source, and their
            ids are numbers.
    """

    def __init__(self, codes: CodesDataset, get_row: Callable[[str | None, str], dict]):
        self.codes = codes.filter(
            lambda grids: [len(one) > 0 for one in grids], input_columns="image_grids", batched=True
        )
        self.get_row = get_row

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> dict:
        stored = self.codes[index]
        row = self.get_row(stored["source"], stored["row_id"])
        image_grids = torch.tensor(stored["image_grids"])
        if not row["images"]:
            raise ValueError(
                f"row {stored['row_id']!r} of source {stored['source']!r} has codes of {len(image_grids)} images, but "
                "no image: has the data set changed since they were extracted?"
            )
        # `torch.tensor` copies: rows of a memory-mapped data set are read-only.
        codes = torch.tensor(stored["image_codes"])[-int(image_grids[-1].prod(-1).sum()) :]
        return {
            "image": row["images"][-1],
            "image_codes": codes,
            "image_grids": image_grids[-1],
            "caption": caption_of(row["messages"]),
        }


class NextFlowDecoderCollator:
    """
    Rows to a batch: `pixel_values` float32 (n, 3, max_height, max_width), zero-padded, at the size that the decoder
    samples; `image_codes` (total_codes,), `image_grids` (n, max_scales, 2), `captions`.

    Args:
        image_processor ([`NextFlowImageProcessor`]): The one that the codes were extracted with.
        upscale_factor (`int`, *optional*, defaults to 1): Side of the images in units of what the codes decode to.
    """

    def __init__(self, image_processor: Callable, upscale_factor: int = 1):
        self.image_processor = image_processor
        self.upscale_factor = upscale_factor

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor | list[str]]:
        images, schedules, image_codes = [], [], []
        for row in rows:
            pixels, grids = self._prepare(row)
            images.append(pixels)
            schedules.append(grids)
            image_codes.append(row["image_codes"][: int(grids.prod(-1).sum())])
        return {
            "pixel_values": pad_images(images),
            "image_codes": torch.cat(image_codes),
            "image_grids": pad_sequence(schedules, batch_first=True),
            "captions": [row["caption"] for row in rows],
        }

    def _prepare(self, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The image at the resolution of its codes, of as many cells but more pixels, and its grids."""
        stored = row["image_grids"][row["image_grids"].prod(-1) > 0]
        schedule = self.image_processor.schedule
        patch_size = schedule.patch_size * self.upscale_factor
        image = open_image(row["image"], self.image_processor.max_pixels)
        # An image that was given, not sampled, may have its last grid again: the processor's `append_last_scale`.
        is_again = len(stored) > 1 and torch.equal(stored[-1], stored[-2])
        own = stored[:0]
        for count in [len(stored), len(stored) - 1] if is_again else [len(stored)]:
            if count > schedule.max_scales:
                continue
            resolution = schedule.resolutions[count - 1] * self.upscale_factor
            inputs = self.image_processor(image, patch_size=patch_size, resolution=resolution, return_tensors="pt")
            own = inputs["image_grids"][0]
            own = own[own.prod(-1) > 0]
            if torch.equal(stored[:count], own):
                return inputs["pixel_values"][0], own
        raise ValueError(
            f"an image's codes have the grids {stored.tolist()}, but the image processor gives {own.tolist()}: were "
            "they extracted with another one?"
        )
