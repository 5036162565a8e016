"""The diffusion decoder against the VQ decoder, on held-out pictures and edits of the Shapes world:

    python benchmarks/diffusion_decoder_shapes.py --decoder runs/shapes/diffusion_decoder_base \
        --model runs/shapes/nextflow-shapes --teacher runs/shapes/teacher --output-dir runs/decoder_benchmark

Writes `table.md`, `numbers.json` and `pictures.png`. Both decoders get the same codes. Perceptual: GMSD and, with
`--teacher`, the cosine distance of its features. Sharpness: how steep the edges are, the true picture's being 1. What
sharpness costs: PSNR, and PSNR where an edit was to change nothing.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Siglip2Model

from nextflow_hf import NextFlowDiffusionDecoderPipeline, NextFlowPipeline
from nextflow_hf.hub_cards import shapes_model_path
from nextflow_hf.training.evaluation.reconstruction import (
    edge_steepness,
    gradient_similarity_deviation,
    peak_signal_to_noise,
)
from nextflow_hf.training.shapes import render, sample_edit, sample_prompt, sample_scene


COLUMNS = {
    "psnr": "PSNR, dB",
    "gmsd": "GMSD (lower is nearer)",
    "teacher": "distance to the teacher's features",
    "sharpness": "edge steepness (true: 1)",
    "untouched": "untouched by edits, PSNR, dB",
    "seconds": "s per picture",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", type=Path, help="Folder of a diffusion decoder's pipeline; default: the model's.")
    parser.add_argument("--model", help="NextFlow repository. default: the shipped Shapes model")
    parser.add_argument("--teacher", type=Path, help="Folder of the Siglip2 teacher, for a distance of features.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--num-edits", type=int, default=60, help="default: %(default)s; 0 draws none")
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--strengths", type=float, nargs="*", default=[1.0, 0.5], help="default: 1.0 0.5")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    return parser


def held_out_pictures(count: int, size: int, seed: int) -> list[Image.Image]:
    rng = np.random.default_rng((seed, 1))
    return [
        Image.fromarray(render(sample_scene(rng, sample_prompt(rng, split="test")), size, size)) for _ in range(count)
    ]


def held_out_edits(count: int, size: int, seed: int) -> tuple[list[Image.Image], list[str], torch.BoolTensor]:
    """Sources, instructions, and where source and target are the same (n, height, width)."""
    rng = np.random.default_rng((seed, 2))
    edits = [sample_edit(rng, split="test") for _ in range(count)]
    sources = [render(edit.source, size, size) for edit in edits]
    targets = [render(edit.target, size, size) for edit in edits]
    same = [(source == target).all(-1) for source, target in zip(sources, targets, strict=True)]
    # An edit of the background touches all there is.
    kept = [index for index, mask in enumerate(same) if mask.mean() > 0.5]
    masks = torch.from_numpy(np.stack([same[index] for index in kept]))
    return [Image.fromarray(sources[index]) for index in kept], [edits[index].instruction for index in kept], masks


def to_tensor(images: list[Image.Image]) -> torch.FloatTensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images])


def teacher_features(teacher: Siglip2Model | None, pipe: NextFlowDiffusionDecoderPipeline, images: torch.Tensor):
    """What the teacher sees in the pictures, (n, cells, hidden)."""
    if teacher is None:
        return None
    inputs = pipe.image_processor(list(images), return_tensors="pt", device="cpu")
    tokenizer = pipe.vision_tokenizer
    grids = inputs["image_grids"]
    features = tokenizer.get_teacher_features(teacher.vision_model.cpu(), inputs["pixel_values"].float(), grids)
    return torch.stack(features)


@torch.no_grad()
def measure(
    decode: Callable[[torch.LongTensor, torch.LongTensor], torch.Tensor],
    coded: tuple[torch.LongTensor, torch.LongTensor],
    true: torch.Tensor,
    features: Callable[[torch.Tensor], torch.Tensor | None],
    edits: tuple | None,
) -> tuple[dict[str, float], torch.Tensor]:
    """The numbers of one way to decode, and its pictures."""
    start = time.perf_counter()
    decoded = decode(*coded)
    seconds = (time.perf_counter() - start) / len(decoded)
    numbers = {
        "psnr": peak_signal_to_noise(decoded, true).mean().item(),
        "gmsd": gradient_similarity_deviation(decoded, true).mean().item(),
        "sharpness": (edge_steepness(decoded) / edge_steepness(true)).mean().item(),
        "seconds": seconds,
    }
    seen, expected = features(decoded), features(true)
    if seen is not None:
        numbers["teacher"] = (1 - torch.cosine_similarity(seen, expected, dim=-1)).mean().item()
    if edits is not None:
        edited_codes, sources, masks = edits
        numbers["untouched"] = peak_signal_to_noise(decode(*edited_codes), sources, masks).mean().item()
    return numbers, decoded


def table(rows: dict[str, dict[str, float]]) -> str:
    names = [name for name in COLUMNS if name in next(iter(rows.values()))]
    lines = ["| decoder | " + " | ".join(COLUMNS[name] for name in names) + " |", "|---|" + "---:|" * len(names)]
    for title, numbers in rows.items():
        cells = [f"{numbers[name]:.2f}" if name in ("psnr", "untouched") else f"{numbers[name]:.4f}" for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture_rows(rows: list[torch.Tensor], count: int = 12, zoom: int = 4) -> Image.Image:
    """The first pictures of every row, one row above the other."""
    strips = [torch.cat(list(row[:count]), dim=2) for row in rows]
    pixels = torch.cat(strips, dim=1).permute(1, 2, 0).clamp(0, 1).mul(255).round().byte().numpy()
    image = Image.fromarray(pixels)
    return image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST)


def main() -> None:
    args = make_parser().parse_args()
    whole = NextFlowPipeline.from_pretrained(args.model or shapes_model_path(), dtype=torch.float32)
    if args.decoder is None:
        pipe = whole.diffusion_decoder_pipeline
    else:
        pipe = NextFlowDiffusionDecoderPipeline.from_pretrained(args.decoder, dtype=torch.float32)
        if any(
            not torch.equal(value, pipe.vision_tokenizer.state_dict()[name])
            for name, value in whole.vision_tokenizer.state_dict().items()
        ):
            raise ValueError(
                f"the vision tokenizers of {args.decoder} and of the model differ, expected the same codes"
            )
    for each in (whole, pipe):
        each.to(args.device)
        each.set_progress_bar_config(disable=True)
    size = whole.processor.image_processor.resolution
    teacher = None if args.teacher is None else Siglip2Model.from_pretrained(args.teacher).eval()

    pictures = held_out_pictures(args.num_images, size, args.seed)
    coded = pipe.encode_image(pictures)
    edits = None
    if args.num_edits:
        sources, instructions, masks = held_out_edits(args.num_edits, size, args.seed)
        generators = [torch.Generator().manual_seed(args.seed + index) for index in range(len(sources))]
        drawn = whole(instructions, image=sources, generator=generators, output_type="codes")
        edits = ((drawn.image_codes, drawn.image_grids), to_tensor(sources), masks)

    def decode_vq(codes: torch.LongTensor, grids: torch.LongTensor) -> torch.Tensor:
        images = [torch.as_tensor(image) for image in whole.decode_codes(codes, grids, output_type="pt")]
        return torch.stack(images).cpu()

    def diffusion_decoder(strength: float) -> Callable:
        def decode(codes: torch.LongTensor, grids: torch.LongTensor) -> torch.Tensor:
            noise = [torch.Generator().manual_seed(args.seed + index) for index in range(len(grids))]
            images = pipe(codes, grids, num_inference_steps=args.steps, strength=strength, generator=noise,
                          output_type="pt").images.float().cpu()  # fmt: skip
            # A decoder of twice the size is judged at the size of the truth.
            return torch.nn.functional.interpolate(images, (size, size), mode="area")

        return decode

    ways = {"VQ": decode_vq}
    for strength in args.strengths:
        start = "noise" if strength == 1 else f"the VQ picture at strength {strength:g}"
        ways[f"diffusion, {args.steps} steps from {start}"] = diffusion_decoder(strength)
    true = to_tensor(pictures)
    rows, shown = {}, [true]
    for title, decode in ways.items():
        rows[title], decoded = measure(
            decode, coded, true, lambda images: teacher_features(teacher, pipe, images), edits
        )
        shown.append(decoded)
        print(title, {name: round(value, 4) for name, value in rows[title].items()}, flush=True)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "numbers.json").write_text(
        json.dumps({"arguments": vars(args), "rows": rows}, default=str, indent=2)
    )
    (args.output_dir / "table.md").write_text(table(rows))
    picture_rows(shown).save(args.output_dir / "pictures.png")
    print(table(rows))


if __name__ == "__main__":
    main()
