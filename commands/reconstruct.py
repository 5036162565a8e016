"""`nextflow-hf reconstruct`: images through the vision tokenizer and back, and how near they come."""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import loading, options, records
from .console import Console, run
from .messages import existing_file
from .options import new_parser
from .output import folder_for, numbered, unused


if TYPE_CHECKING:
    import PIL.Image
    from transformers import BatchFeature

    from .. import NextFlowPipeline

EXAMPLES = """\
  nextflow-hf reconstruct photo.png --output again.png
  nextflow-hf reconstruct *.png --output folder --compare
  nextflow-hf reconstruct photo.png --num-scales 4          # what the first scales alone hold
"""
RECORDED = (*options.MODEL, "image", "resolution", "num_scales", "seed", *options.DECODING)


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("reconstruct", "Encode images by the vision tokenizer and decode them again.", EXAMPLES)
    parser.add_argument("image", type=Path, nargs="+", help="images; each is resized to the model's nearest size")
    parser.add_argument(
        "--output", "-o", type=Path, metavar="PATH", help="a .png or a folder; default: <name>-reconstructed.png, here"
    )
    parser.add_argument("--compare", action="store_true", help="save the original and the result side by side")
    options.add_options(parser, None, "resolution", "num_scales")
    options.add_no_metadata(parser)
    options.add_options(parser, "pixels", *options.DECODING, "seed")
    options.add_model_options(parser, samples=False)
    options.add_console_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Reconstruct; returns the exit status."""
    return run("reconstruct", make_parser().parse_args(argv), reconstruct)


def reconstruct(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Encode and decode images; returns what `--json` prints."""
    # 1. What to encode
    # One image that is not there is a mistake at once; among several, it is left out like any bad one.
    sources = [existing_file(path) if len(args.image) == 1 else path.resolve() for path in args.image]
    paths = _output_paths(args.output, sources)
    given = [name for name in options.DECODING if name != "decoder" and getattr(args, name) is not None]
    if given and args.decoder != "diffusion":
        raise ValueError(f"got --{given[0].replace('_', '-')}, which needs --decoder diffusion")
    if args.decoder == "diffusion":
        args.seed = options.choose_seed(args.seed)

    # 2. The model without its transformer: nothing is sampled
    pipe = loading.load_pipeline(args, without=["transformer"])
    recorder = records.Recorder("reconstruct", args, RECORDED, loading.image_modules(pipe, args.decoder))

    # 3. There and back, one by one: their sizes differ
    described, left_out = [], []
    for source, path in zip(sources, paths, strict=True):
        try:
            inputs = pipe.processor.image_processor(source, return_tensors="pt", **_given(resolution=args.resolution))
        except (ValueError, OSError) as error:
            if len(sources) == 1:
                raise
            console.warn(f"left out {source}: {error}")
            left_out.append({"source": str(source), "error": str(error)})
            console.status = 1
            continue
        original, image, measured = _there_and_back(pipe, args, source, inputs)
        recorder.save(_beside(original, image) if args.compare else image, path, image=[source])
        described.append({"path": str(path), "source": str(source), **measured})
        console.show(
            f"{path}  {image.width} x {image.height}, {measured['codes']} codes ({measured['bits_per_pixel']:.3f} "
            f"bits a pixel), PSNR {measured['psnr']:.2f} dB"
        )
    return {**loading.loaded(args), "images": described, "left_out": left_out}


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _there_and_back(
    pipe: "NextFlowPipeline", args: argparse.Namespace, source: Path, inputs: "BatchFeature"
) -> tuple["PIL.Image.Image", "PIL.Image.Image", dict[str, Any]]:
    """The image as the model sees it, what becomes of it, and how near that is."""
    import torch

    (original,) = pipe.processor.image_processor.post_process_images(**inputs)
    start = time.perf_counter()
    codes, grids = pipe.encode_images(source, **_given(resolution=args.resolution))
    num_scales = int((grids[0, :, 0] > 0).sum())
    if args.num_scales is not None:
        if not 1 <= args.num_scales <= num_scales:
            raise ValueError(f"--num-scales is {args.num_scales}, expected 1 to {num_scales}, those of {source}")
        num_scales = args.num_scales
        codes = codes[: int(grids[0, :num_scales].prod(-1).sum())]
    if args.decoder == "diffusion":
        settings = {name.removeprefix("decoder_"): getattr(args, name) for name in options.DECODING[1:]}
        (image,) = pipe.diffusion_decoder_pipeline(
            codes,
            grids,
            num_scales=num_scales,
            generator=torch.Generator().manual_seed(args.seed),
            **_given(**settings),
        ).images
    else:
        (image,) = pipe.decode_codes(codes, grids, num_scales=num_scales)
    seconds = time.perf_counter() - start
    bits = len(codes) * math.log2(pipe.vision_tokenizer.config.codebook_size)
    return (
        original,
        image,
        {
            "width": image.width,
            "height": image.height,
            "codes": len(codes),
            "bits_per_pixel": bits / (original.width * original.height),
            "psnr": _psnr(image.resize(original.size), original),  # a decoder may give twice the size
            "seconds": round(seconds, 3),
        },
    )


def _output_paths(output: Path | None, sources: Sequence[Path]) -> list[Path]:
    if output is not None and output.suffix and not output.is_dir():
        if output.suffix.lower() != ".png":
            raise ValueError(f"--output is {output}, expected a .png or a folder")
        return [numbered(output, number, len(sources)) for number in range(1, len(sources) + 1)]
    folder = Path() if output is None else folder_for(output, "")
    free = unused if output is None else Path
    names = [f"{source.stem}-reconstructed" for source in sources]
    # Sources of one name lie in different folders.
    return [
        free(folder / (f"{name}.png" if names.count(name) == 1 else f"{name}-{number}.png"))
        for number, name in enumerate(names, start=1)
    ]


def _psnr(image: "PIL.Image.Image", original: "PIL.Image.Image") -> float:
    """In decibel, of pixels as they are saved."""
    import numpy as np
    import torch

    from ..training.evaluation.reconstruction import peak_signal_to_noise

    pixels = [torch.from_numpy(np.array(one)).permute(2, 0, 1)[None] / 255 for one in (image, original)]
    return round(peak_signal_to_noise(*pixels).item(), 4)


def _beside(original: "PIL.Image.Image", image: "PIL.Image.Image") -> "PIL.Image.Image":
    from diffusers.utils import make_image_grid

    return make_image_grid([original.resize(image.size), image], rows=1, cols=2)
