"""What the vision tokenizer makes of the first images, before hours of extraction: numbers and a contact sheet.

A transformer that is trained on codes of images that the tokenizer cannot show learns nothing, and no loss says so.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging

from ...atomic import write_file, write_json
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...processing.processing_nextflow import NextFlowProcessor
from .encoding import ExtractionSettings
from .messages import open_image


logger = logging.get_logger(__name__)

SHEET, NUMBERS = "reconstructions.png", "reconstructions.json"
_SIDE, _PAIRS_IN_A_ROW = 256, 4  # of the contact sheet


@torch.inference_mode()
def preview_reconstruction(
    rows: Iterable[dict],
    output_dir: Path,
    *,
    processor: NextFlowProcessor,
    vision_tokenizer: NextFlowVisionTokenizer,
    settings: ExtractionSettings,
) -> float | None:
    """
    Write `reconstructions.png` (each original beside its reconstruction) and `reconstructions.json` for the first
    `preview_images` images of the first shard's rows, and warn where their mean PSNR is below `warn_psnr`.

    Returns:
        The mean PSNR in dB, or None if there is no image.
    """
    image_processor, pairs, psnr = processor.image_processor, [], []
    first = itertools.islice(rows, settings.rows_per_shard)  # texts alone would be read to their end
    for inputs in itertools.islice(_images(first, settings, image_processor), settings.preview_images):
        pixels = inputs["pixel_values"].to(vision_tokenizer.device, vision_tokenizer.dtype)
        grids = inputs["image_grids"].to(vision_tokenizer.device)
        decoded = vision_tokenizer.decode(vision_tokenizer.encode(pixels, grids).image_codes, grids)
        error = ((decoded.float() - pixels.float()) / 2).square().mean()
        psnr.append(round(-10 * error.clamp(min=1e-10).log10().item(), 2))
        both = torch.cat([pixels, decoded]).float().cpu()
        pairs.append(image_processor.post_process_images(both, inputs["image_grids"].expand(2, -1, -1)))
    if not pairs:
        return None
    mean = sum(psnr) / len(psnr)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_file(output_dir / SHEET, lambda path: _sheet(pairs).save(path, "PNG"))
    write_json(output_dir / NUMBERS, {"psnr": round(mean, 2), "psnr_of_images": psnr, "warn_psnr": settings.warn_psnr})
    said = f"the tokenizer reconstructs the first {len(psnr)} images at {mean:.1f} dB PSNR: see {output_dir / SHEET}"
    if mean < settings.warn_psnr:
        said += (
            f". That is below warn_psnr={settings.warn_psnr:g}: no model that is trained on these codes can show such "
            "images; train the tokenizer on them first (nextflow-hf train tokenizer)"
        )
    logger.warning(said)
    return mean


def _images(rows: Iterable[dict], settings: ExtractionSettings, image_processor: Any) -> Iterator[dict[str, Any]]:
    """Pixels and schedules of the images of all good rows, as they are encoded."""
    limits = {"allow_private_addresses": settings.allow_private_addresses}
    for row in rows:
        if row["error"] is not None:
            continue
        resolution = row["resolution"] or settings.resolution
        options = {} if resolution is None else {"resolution": resolution}
        for image in row["images"]:
            try:
                opened = open_image(image, image_processor.max_pixels, **limits)
                inputs = image_processor(opened, return_tensors="pt", **options)
            except (ValueError, OSError):  # the extraction names it
                continue
            yield inputs


def _sheet(pairs: list[list[Image.Image]]) -> Image.Image:
    columns = min(_PAIRS_IN_A_ROW, len(pairs))
    sheet = Image.new("RGB", (2 * columns * _SIDE, -(-len(pairs) // columns) * _SIDE), "white")
    for index, pair in enumerate(pairs):
        for side, image in enumerate(pair):
            scale = _SIDE / max(image.size)
            image = image.resize([max(1, round(length * scale)) for length in image.size])
            sheet.paste(image, ((2 * (index % columns) + side) * _SIDE, index // columns * _SIDE))
    return sheet
