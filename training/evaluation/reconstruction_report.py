"""What a vision tokenizer makes of pictures: PSNR, SSIM, GMSD, r-FID, and the use of its codebook.

    python -m nextflow_hf.training.evaluation.reconstruction --model path/to/model --images path/to/images \
        --resolution 512 --features inception

`--model` is a tokenizer, or a whole NextFlow repository; `--images` a description of data, of which the rows for
evaluation are taken, or a folder or data set of images. r-FID is computed where `--features` names a feature model;
the numbers are also written as JSON with `--output`.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from ...atomic import write_json
from ...conversion.assemble import load_vision_tokenizer
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...processing.image_processing_nextflow import NextFlowImageProcessor
from ..data.description import load_images, read_description
from ..data.images import NextFlowImageDataset, NextFlowVisionTokenizerCollator
from ..vision_tokenizer.codebook import CodeUsage
from ..vision_tokenizer.losses import picture_sizes
from .frechet import FeatureModel, FeatureStatistics, frechet_distance, load_feature_model
from .reconstruction import SSIM_WINDOW, gradient_similarity_deviation, peak_signal_to_noise, structural_similarity


logger = logging.getLogger(__name__)


@dataclass
class BatchMeasurement:
    """Numbers of every picture of a batch, each (n,), with the codes and the pictures that they are of."""

    values: dict[str, torch.FloatTensor]
    image_codes: torch.LongTensor
    decoded: torch.FloatTensor


@torch.no_grad()
def measure_batch(
    tokenizer: NextFlowVisionTokenizer,
    pixel_values: torch.FloatTensor,
    image_grids: torch.LongTensor,
    *,
    num_scales: int = 0,
) -> BatchMeasurement:
    """
    `psnr`, `ssim` and `gmsd` of every picture, and `psnr_scale_k` of what its first k scales decode to, for k up to
    `num_scales` (§2.1). SSIM is not a number for pictures smaller than its window.
    """
    sizes = picture_sizes(tokenizer, image_grids)
    true = _pictures(pixel_values, sizes)
    image_codes = tokenizer.encode(pixel_values, image_grids).image_codes
    values = {}
    for scales in range(1, num_scales + 1):
        previews = _pictures(tokenizer.decode(image_codes, image_grids, num_scales=scales), sizes)
        values[f"psnr_scale_{scales}"] = _each(peak_signal_to_noise, previews, true)
    decoded = tokenizer.decode(image_codes, image_grids)
    pictures = _pictures(decoded, sizes)
    values["psnr"] = _each(peak_signal_to_noise, pictures, true)
    values["ssim"] = _each(
        lambda fake, real: (
            structural_similarity(fake, real)
            if min(real.shape[2:]) >= SSIM_WINDOW
            else torch.full((len(real),), torch.nan, device=real.device)
        ),
        pictures,
        true,
    )
    values["gmsd"] = _each(gradient_similarity_deviation, pictures, true)
    return BatchMeasurement(values, image_codes, decoded)


def reconstruction_report(
    tokenizer: NextFlowVisionTokenizer,
    dataset: Dataset,
    image_processor: NextFlowImageProcessor,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    feature_model: FeatureModel | None = None,
) -> dict[str, float]:
    """
    Means over the pictures of [`NextFlowImageDataset`] of what [`measure_batch`] gives, usage and perplexity of the
    codebook, and with a feature model `rfid`: the Fréchet distance of the pictures and their reconstructions.
    """
    sums: dict[str, list[torch.Tensor]] = {}
    usage = CodeUsage(tokenizer.config.codebook_size, Accelerator(cpu=tokenizer.device.type == "cpu"))
    true_features, decoded_features = FeatureStatistics(), FeatureStatistics()
    loader = DataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=NextFlowVisionTokenizerCollator()
    )
    for batch in loader:
        pixel_values, image_grids = (batch[name].to(tokenizer.device) for name in ("pixel_values", "image_grids"))
        measured = measure_batch(tokenizer, pixel_values, image_grids)
        for name, value in measured.values.items():
            sums.setdefault(name, []).append(value.cpu())
        usage.add(measured.image_codes, image_grids)
        if feature_model is not None:
            for statistics, pixels in ((true_features, pixel_values), (decoded_features, measured.decoded)):
                images = image_processor.post_process_images(pixels, image_grids, output_type="np")
                statistics.update(feature_model([(image * 255).round().astype("uint8") for image in images]))
    report = {name: torch.cat(values).nanmean().item() for name, values in sums.items()}
    report |= {name: value for name, value in usage.metrics().items() if name.startswith("codebook_")}
    if feature_model is not None:
        report["rfid"] = frechet_distance(true_features, decoded_features)
    return {"images": len(dataset), **{name: round(value, 4) for name, value in report.items()}}


def _pictures(pixels: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Padded pixels in [-1, 1] as pictures (1, 3, height, width) in [0, 1]."""
    return [
        pixels[index : index + 1, :, :height, :width].float() / 2 + 0.5 for index, (height, width) in enumerate(sizes)
    ]


def _each(metric, decoded: Sequence[torch.Tensor], true: Sequence[torch.Tensor]) -> torch.FloatTensor:
    return torch.cat([metric(fake, real) for fake, real in zip(decoded, true, strict=True)])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Vision tokenizer or NextFlow repository: folder or Hub id.")
    parser.add_argument("--processor", help="Its image processor: folder or Hub id. default: --model")
    parser.add_argument("--images", required=True, help="A data.yaml, or a folder or Hub id of images.")
    parser.add_argument("--resolution", type=int, help="Level; by default the image processor's.")
    parser.add_argument("--num-images", type=int, help="Only the first so many.")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--num-workers", type=int, default=0, help="Of the data loader. default: %(default)s")
    parser.add_argument("--features", help="r-FID's: inception, or a vision model by folder or Hub id.")
    parser.add_argument("--dtype", default="float32", help="Of the tokenizer. default: %(default)s")
    parser.add_argument("--device", help="By default the accelerator, where there is one.")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    available = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = torch.device(args.device) if args.device else available
    options = {} if args.resolution is None else {"resolution": args.resolution}
    image_processor = NextFlowImageProcessor.from_pretrained(args.processor or args.model, **options)
    tokenizer = load_vision_tokenizer(args.model, dtype=getattr(torch, args.dtype)).eval().to(device)
    images = load_images(read_description(args.images), "evaluation", max_pixels=image_processor.max_pixels)
    images = images if args.num_images is None else images.select(args.num_images)
    report = reconstruction_report(
        tokenizer,
        NextFlowImageDataset(images, image_processor),
        image_processor,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        feature_model=None if args.features is None else load_feature_model(args.features, device),
    )
    report["bad_images"] = len(images.bad_rows)
    logger.info("%s", "\n".join(f"{name:>20} {value:g}" for name, value in report.items()))
    if args.output is not None:
        write_json(args.output, {"model": args.model, "images": args.images, **report})


__all__ = ["BatchMeasurement", "load_vision_tokenizer", "measure_batch", "reconstruction_report"]
