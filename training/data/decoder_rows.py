"""Rows for the diffusion decoder: the pictures themselves beside their codes, which are extracted once."""

from collections.abc import Callable, Sequence

import torch
from datasets import Dataset as CodesDataset
from torch.utils.data import Dataset

from .messages import _parts


class NextFlowDecoderDataset(Dataset):
    """
    The last image of every row: what the transformer draws, with the codes that it is trained to draw.

    Args:
        codes (`datasets.Dataset`): The shards of [`~training.data.extraction.extract_codes`].
        get_row (`Callable`): Index -> the row with "messages" and "images" that the codes were extracted from.
    """

    def __init__(self, codes: CodesDataset, get_row: Callable[[int], dict]):
        self.codes = codes
        self.get_row = get_row

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> dict:
        stored, row = self.codes[index], self.get_row(index)
        image_grids = torch.tensor(stored["image_grids"])
        if not len(image_grids) or not row["images"]:
            raise ValueError(f"row {index} has {len(image_grids)} images' codes and {len(row['images'])} images")
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
    draws; `image_codes` (total_codes,), `image_grids` (n, max_scales, 2), `captions`.

    Args:
        image_processor ([`NextFlowImageProcessor`]): The one that the codes were extracted with.
        upscale_factor (`int`, *optional*, defaults to 1): Side of the pictures in units of what the codes decode to.
    """

    def __init__(self, image_processor: Callable, upscale_factor: int = 1):
        self.image_processor = image_processor
        self.upscale_factor = upscale_factor

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor | list[str]]:
        # The same cells, each of more pixels.
        inputs = self.image_processor(
            [row["image"] for row in rows],
            patch_size=self.image_processor.patch_size * self.upscale_factor,
            resolution=self.image_processor.resolution * self.upscale_factor,
            return_tensors="pt",
        )
        image_grids, image_codes = inputs["image_grids"], []
        for index, row in enumerate(rows):
            stored = row["image_grids"][row["image_grids"].prod(-1) > 0]
            own = image_grids[index][image_grids[index].prod(-1) > 0]
            # An image that was given, not drawn, may have its last grid again: the processor's `append_last_scale`.
            if not (torch.equal(stored, own) or torch.equal(stored, torch.cat([own, own[-1:]]))):
                raise ValueError(
                    f"an image's codes have the grids {stored.tolist()}, but the image processor gives "
                    f"{own.tolist()}: were they extracted with another one?"
                )
            image_codes.append(row["image_codes"][: int(own.prod(-1).sum())])
        return {
            "pixel_values": inputs["pixel_values"],
            "image_codes": torch.cat(image_codes),
            "image_grids": image_grids,
            "captions": [row["caption"] for row in rows],
        }


def caption_of(messages: list[dict]) -> str:
    """The text that one image was drawn for. Where there are more images it is an instruction: no caption."""
    parts = [part for message in messages for part in _parts(message)]
    if sum(part["type"] == "image" for part in parts) != 1:
        return ""
    texts = [part["text"] for message in messages if message["role"] == "user" for part in _parts(message)]
    return " ".join(texts)
