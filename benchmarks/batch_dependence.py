"""How often an image of a seed is the same alone and in a batch, by the shipped model:

    python benchmarks/batch_dependence.py                       # bfloat16 and float32, batches of 2, 4 and 8
    python benchmarks/batch_dependence.py --seeds 40 --dtypes float16

Float rounding depends on the shapes of a batch, so the logits of an image differ in their last bits. "Beside others"
has prompts of other lengths in the batch, which pads; "repeated" has the one prompt with other seeds.
"""

import argparse
from collections.abc import Callable

import torch

from nextflow_hf import NextFlowPipeline
from nextflow_hf.hub_cards import shapes_model_path


PROMPTS = [
    "a red circle left of a blue square",
    "two green triangles",
    "a blue ring",
    "three purple squares at the top of a black background",
]
BATCH_SIZES = (2, 4, 8)


def codes_of(pipe: NextFlowPipeline, prompts: list[str], seeds: list[int], **settings) -> torch.Tensor:
    """Codes (images, codes) of a batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = pipe(prompts, generator=generators, output_type="codes", **settings)
    return output.image_codes.view(len(prompts), -1)


def share_equal(pipe: NextFlowPipeline, batch_size: int, num_seeds: int, neighbour: Callable, **settings) -> float:
    """Share of the images that are equal alone and as the first of a batch of `neighbour(prompt, place)`."""
    equal = []
    for prompt in PROMPTS:
        for seed in range(num_seeds):
            batch = [prompt, *(neighbour(prompt, place) for place in range(1, batch_size))]
            together = codes_of(pipe, batch, [seed, *range(1000, 999 + batch_size)], **settings)
            equal.append(torch.equal(codes_of(pipe, [prompt], [seed], **settings)[0], together[0]))
    return sum(equal) / len(equal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="of each prompt; default: %(default)s")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    neighbours = {
        "beside others": lambda prompt, place: PROMPTS[(PROMPTS.index(prompt) + place) % len(PROMPTS)],
        "repeated": lambda prompt, place: prompt,
    }
    print("| dtype | guidance | batch | " + " | ".join(neighbours) + " |\n|---|---|---|" + "---|" * len(neighbours))
    for dtype in args.dtypes:
        pipe = NextFlowPipeline.from_pretrained(shapes_model_path(), dtype=getattr(torch, dtype)).to(args.device)
        pipe.set_progress_bar_config(disable=True)
        for guidance in (1.0, 2.0):
            for size in BATCH_SIZES:
                shares = [
                    share_equal(pipe, size, args.seeds, neighbour, guidance_scale=guidance)
                    for neighbour in neighbours.values()
                ]
                print(f"| {dtype} | {guidance:g} | {size} | " + " | ".join(f"{one:.0%}" for one in shares) + " |")


if __name__ == "__main__":
    main()
