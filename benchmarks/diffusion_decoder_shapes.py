"""The diffusion decoder against the VQ decoder, on held-out pictures and edits of the Shapes world:

    python benchmarks/diffusion_decoder_shapes.py --decoder runs/shapes/diffusion_decoder_base \
        runs/shapes/diffusion_decoder_upscale --teacher runs/shapes/teacher --output-dir runs/decoder_benchmark

Writes `tables.md`, `numbers.json` and `pictures.png`. All decoders get the same codes: those of the true pictures.
They are judged at the pictures' size, and at twice that, where the VQ decoder is enlarged by a filter; what is larger
than the truth is reduced by averaging. Perceptual: GMSD and, with `--teacher`, the cosine distance of its features at
the size that it knows. Sharpness: how steep the edges are, the true picture's being 1. What sharpness costs: PSNR, and
PSNR where an edit changes nothing, of the edited picture's codes against the source.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from transformers import Siglip2Model

from nextflow_hf import NextFlowDiffusionDecoderPipeline, NextFlowPipeline
from nextflow_hf.atomic import write_file, write_text
from nextflow_hf.hub_cards import shapes_model_path
from nextflow_hf.training.evaluation.reconstruction import (
    edge_steepness,
    gradient_similarity_deviation,
    peak_signal_to_noise,
    structural_similarity,
)
from nextflow_hf.training.shapes import render, sample_edit, sample_prompt, sample_scene
from nextflow_hf.training.shapes.scene import Scene


COLUMNS = {
    "psnr": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "gmsd": ("GMSD (lower is nearer)", ".4f"),
    "nearer": ("lower than the first row's in", ".0%"),
    "teacher": ("distance to the teacher's features", ".5f"),
    "sharpness": ("edge steepness (true: 1)", ".3f"),
    "untouched": ("untouched by edits: PSNR, dB", ".2f"),
    "seconds": ("s per picture", ".3f"),
}
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "Lanczos": Image.Resampling.LANCZOS}
Decode = Callable[[torch.LongTensor, torch.LongTensor], torch.FloatTensor]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--decoder", type=Path, nargs="+", help="Folders of diffusion decoders' pipelines; default: the model's."
    )
    parser.add_argument("--model", help="NextFlow repository with a decoder. default: the shipped Shapes model")
    parser.add_argument("--teacher", type=Path, help="Folder of the Siglip2 teacher, for a distance of features.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--num-edits", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--strengths", type=float, nargs="*", default=[1.0, 0.5], help="default: 1.0 0.5")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    return parser


def load_decoders(args: argparse.Namespace) -> list[NextFlowDiffusionDecoderPipeline]:
    """Pipelines around one and the same vision tokenizer."""
    if args.decoder is None:
        model = NextFlowPipeline.from_pretrained(args.model or shapes_model_path(), dtype=torch.float32)
        pipes = [model.diffusion_decoder_pipeline]
    else:
        pipes = [NextFlowDiffusionDecoderPipeline.from_pretrained(path, dtype=torch.float32) for path in args.decoder]
    weights = pipes[0].vision_tokenizer.state_dict()
    for pipe in pipes:
        if any(not torch.equal(value, weights[name]) for name, value in pipe.vision_tokenizer.state_dict().items()):
            raise ValueError("the vision tokenizers of the decoders differ, expected one: they are to get equal codes")
        pipe.to(args.device)
        pipe.set_progress_bar_config(disable=True)
    return pipes


def draw(scenes: list[Scene], size: int) -> torch.FloatTensor:
    """The true pictures, (n, 3, size, size) in [0, 1]."""
    return torch.stack([torch.from_numpy(render(scene, size, size)) for scene in scenes]).permute(0, 3, 1, 2) / 255


def encode(pipe: NextFlowDiffusionDecoderPipeline, pictures: torch.FloatTensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pipe.encode_image([Image.fromarray(one) for one in to_bytes(pictures)])


def to_bytes(pictures: torch.FloatTensor) -> np.ndarray:
    return pictures.permute(0, 2, 3, 1).clamp(0, 1).mul(255).round().byte().numpy()


def resized(pictures: torch.FloatTensor, size: int, filter_name: str | None = None) -> torch.FloatTensor:
    """Enlarged by a filter of PIL, reduced by averaging."""
    if pictures.shape[-1] >= size:
        return F.interpolate(pictures, (size, size), mode="area")
    images = [Image.fromarray(one).resize((size, size), FILTERS[filter_name]) for one in to_bytes(pictures)]
    return torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in images])


def teacher_features(
    teacher: Siglip2Model, pipe: NextFlowDiffusionDecoderPipeline, pictures: torch.FloatTensor
) -> torch.FloatTensor:
    """What the teacher sees in the pictures, (n, cells, hidden)."""
    inputs = pipe.image_processor(list(pictures), do_rescale=False, return_tensors="pt", device="cpu")
    pixel_values, grids = inputs["pixel_values"].float(), inputs["image_grids"]
    return torch.stack(pipe.vision_tokenizer.get_teacher_features(teacher.vision_model, pixel_values, grids))


def measure(
    decoded: torch.FloatTensor,
    true: torch.FloatTensor,
    edited: torch.FloatTensor,
    edits: tuple[torch.FloatTensor, torch.BoolTensor],
    features: Callable[[torch.FloatTensor], torch.FloatTensor] | None,
) -> dict[str, torch.FloatTensor]:
    """One number a picture."""
    values = {
        "psnr": peak_signal_to_noise(decoded, true),
        "ssim": structural_similarity(decoded, true),
        "gmsd": gradient_similarity_deviation(decoded, true),
        "sharpness": edge_steepness(decoded) / edge_steepness(true),
        "untouched": peak_signal_to_noise(edited, *edits),
    }
    if features is not None:
        values["teacher"] = 1 - torch.cosine_similarity(features(decoded), features(true), dim=-1).mean(1)
    return values


def table(rows: dict[str, dict[str, float]]) -> str:
    names = [name for name in COLUMNS if name in next(iter(rows.values()))]
    lines = [f"| decoder | {' | '.join(COLUMNS[name][0] for name in names)} |", "|---|" + "---:|" * len(names)]
    for title, numbers in rows.items():
        lines.append(f"| {title} | {' | '.join(format(numbers[name], COLUMNS[name][1]) for name in names)} |")
    return "\n".join(lines) + "\n"


def sheet(rows: dict[str, torch.FloatTensor], side: int = 256, count: int = 6) -> Image.Image:
    """The first pictures of every row under its title, each pixel as a square."""
    label = 16
    image = Image.new("RGB", (count * side, len(rows) * (side + label)), "white")
    for index, (title, pictures) in enumerate(rows.items()):
        top = index * (side + label)
        ImageDraw.Draw(image).text((2, top + 2), title, "black")
        for column, one in enumerate(to_bytes(pictures[:count])):
            square = Image.fromarray(one).resize((side, side), Image.Resampling.NEAREST)
            image.paste(square, (column * side, top + label))
    return image


def vq_decoder(pipe: NextFlowDiffusionDecoderPipeline) -> Decode:
    def decode(codes: torch.LongTensor, grids: torch.LongTensor) -> torch.FloatTensor:
        return pipe.vision_tokenizer.decode(codes, grids).float().cpu().add(1).div(2).clamp(0, 1)

    return decode


def diffusion_decoder(pipe: NextFlowDiffusionDecoderPipeline, strength: float, args: argparse.Namespace) -> Decode:
    def decode(codes: torch.LongTensor, grids: torch.LongTensor) -> torch.FloatTensor:
        noise = [torch.Generator().manual_seed(args.seed + index) for index in range(len(grids))]
        options = {"num_inference_steps": args.steps, "strength": strength, "output_type": "pt"}
        return pipe(codes, grids, generator=noise, **options).images.float().cpu()

    return decode


@torch.no_grad()
def main() -> None:
    args = make_parser().parse_args()
    pipes = load_decoders(args)
    size = pipes[0].image_processor.resolution
    features = None
    if args.teacher is not None:
        teacher = Siglip2Model.from_pretrained(args.teacher).eval()
        features = lambda pictures: teacher_features(teacher, pipes[0], pictures)  # noqa: E731

    rng = np.random.default_rng((args.seed, 1))
    scenes = [sample_scene(rng, sample_prompt(rng, split="test")) for _ in range(args.num_images)]
    rng = np.random.default_rng((args.seed, 2))
    edits = [sample_edit(rng, split="test") for _ in range(args.num_edits)]
    # An edit of the background touches all there is.
    edits = [edit for edit in edits if edit.source.background == edit.target.background]
    codes = encode(pipes[0], draw(scenes, size))
    edited_codes = encode(pipes[0], draw([edit.target for edit in edits], size))

    ways = {"VQ": vq_decoder(pipes[0])}
    for pipe in pipes:
        factor = pipe.diffusion_decoder.config.upscale_factor
        for strength in args.strengths:
            start = "noise" if strength == 1 else f"the VQ picture at strength {strength:g}"
            title = f"diffusion {factor}x, {args.steps} steps, from {start}"
            ways[title] = diffusion_decoder(pipe, strength, args)
    decoded, edited, seconds = {}, {}, {}
    for title, decode in ways.items():
        begin = time.perf_counter()
        decoded[title] = decode(*codes)
        seconds[title] = (time.perf_counter() - begin) / args.num_images
        edited[title] = decode(*edited_codes)

    text, numbers, values = "", {}, {}
    for factor in sorted({1, *(pipe.diffusion_decoder.config.upscale_factor for pipe in pipes)}):
        side = factor * size
        true, sources = draw(scenes, side), draw([edit.source for edit in edits], side)
        targets = draw([edit.target for edit in edits], side)
        untouched = sources, (sources == targets).all(1)
        rows: dict[str, dict[str, float]] = {}
        shown = {"true picture": true}
        for title in ways:
            small = decoded[title].shape[-1] < side
            if small and title != "VQ":
                continue  # it has no say in the larger size
            for name in FILTERS if small else [None]:
                full = f"{title}, enlarged by a {name} filter" if small else title
                shown[full] = resized(decoded[title], side, name)
                each = measure(shown[full], true, resized(edited[title], side, name), untouched, features)
                rows[full] = {key: one.mean().item() for key, one in each.items()} | {"seconds": seconds[title]}
                values[f"{side}: {full}"] = {key: one.tolist() for key, one in each.items()}
                first = torch.tensor(values[f"{side}: {next(iter(rows))}"]["gmsd"])
                rows[full]["nearer"] = (each["gmsd"] < first).float().mean().item()
        numbers[side] = rows
        text += f"{side} x {side} pixels:\n\n{table(rows)}\n"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(args.output_dir / "tables.md", text.strip() + "\n")
    facts = {"arguments": vars(args), "rows": numbers, "pictures": values}
    write_text(args.output_dir / "numbers.json", json.dumps(facts, default=str, indent=1))
    write_file(args.output_dir / "pictures.png", lambda path: sheet(shown).save(path, optimize=True))
    print(text)


if __name__ == "__main__":
    main()
