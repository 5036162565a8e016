"""Sample several images and keep the one that a reward likes best: python examples/best_of_n.py "a red circle".

The reward has the signature of those of `nextflow-hf train grpo`: a function that works here can train a model.
"""

import argparse

import numpy as np
import PIL.Image
import torch

from nextflow_hf import NextFlowPipeline
from nextflow_hf.hub_cards import shapes_model_path


def redness(images: list[PIL.Image.Image], prompts: list[str], **columns: object) -> list[float]:
    """The mean of red minus the mean of blue, in [-1, 1]."""
    arrays = [np.asarray(image.convert("RGB"), dtype=float) / 255 for image in images]
    return [float(array[..., 0].mean() - array[..., 2].mean()) for array in arrays]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--model", default=str(shapes_model_path()))
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="best.png")
    args = parser.parse_args(argv)

    pipe = NextFlowPipeline.from_pretrained(args.model)
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(args.num_images)]
    images = pipe(args.prompt, num_images_per_prompt=args.num_images, generator=generators).images
    scores = redness(images, [args.prompt] * len(images))
    best = int(np.argmax(scores))
    images[best].save(args.output)
    print(f"image {best} of {len(images)}, reward {scores[best]:.3f}: {args.output}")


if __name__ == "__main__":
    main()
