"""A story in images and words, as a GIF and a page of text: python examples/story.py --num-frames 3."""

import argparse
from pathlib import Path

import torch

from nextflow_hf import NextFlowPipeline
from nextflow_hf.hub_cards import shapes_model_path


STORY = "a story: a red circle on a white background moves from left to right"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("story", nargs="?", default=STORY)
    parser.add_argument("--model", default=str(shapes_model_path()))
    parser.add_argument("--num-frames", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("story.gif"))
    args = parser.parse_args(argv)

    pipe = NextFlowPipeline.from_pretrained(args.model)
    generator = torch.Generator().manual_seed(args.seed)
    story = pipe.frames(args.story, num_frames=args.num_frames, generator=generator)
    story.save(args.output)
    args.output.with_suffix(".txt").write_text("\n".join(story.texts) + "\n")
    print(f"{len(story.frames)} frames: {args.output}")


if __name__ == "__main__":
    main()
