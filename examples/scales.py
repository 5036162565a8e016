"""One image after every scale, side by side: python examples/scales.py "a red circle left of a blue square"."""

import argparse

import torch
from diffusers.utils import make_image_grid

from nextflow_hf import NextFlowPipeline
from nextflow_hf.hub_cards import shapes_model_path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--model", default=str(shapes_model_path()))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="scales.png")
    args = parser.parse_args(argv)

    pipe = NextFlowPipeline.from_pretrained(args.model)
    generator = torch.Generator().manual_seed(args.seed)
    images = [preview.images[0] for preview in pipe.preview(args.prompt, generator=generator)]
    images = [image.resize(images[-1].size) for image in images]
    make_image_grid(images, rows=1, cols=len(images)).save(args.output)
    print(f"{len(images)} scales: {args.output}")


if __name__ == "__main__":
    main()
