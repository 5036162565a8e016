"""How much of the reward the first scales decide: how much of its variance within a prompt lies between prefixes.

    python prefix_share.py runs/ablations/arms/baseline-0/pipeline --prompts data/ablations/few/64/prompts.yaml \
        --judge data/ablations/judge

Of each prompt, images with `--prefixes` beginnings and `--suffixes` ends of each are sampled as the recipe of GRPO
samples them; one-way analysis of variance. GRPO on a prefix can learn from this share alone: the rest is noise to it.
"""

import argparse

import numpy as np
import torch

from nextflow_hf.pipelines.pipeline_nextflow import NextFlowPipeline
from nextflow_hf.processing.scale_schedule_nextflow import num_cells
from nextflow_hf.training.grpo.rollout import Rollout, decode, encode_rows, sample_codes
from nextflow_hf.training.grpo.train import read_prompts
from nextflow_hf.worlds.emoji import Reward


def share_between(rewards: np.ndarray) -> float:
    """The share of the variance of rewards (prompts, prefixes, suffixes) within a prompt that is between prefixes."""
    within = rewards.var(-1, ddof=1).mean()
    between = max(0.0, rewards.mean(-1).var(1, ddof=1).mean() - within / rewards.shape[-1])
    return between / (between + within)


def generators(count: int, number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * number + index) for index in range(count)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of a pipeline")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--judge", required=True)
    parser.add_argument("--scales", type=int, nargs="+", default=[2, 4, 6], help="lengths of the prefix (2 4 6)")
    parser.add_argument("--prefixes", type=int, default=8)
    parser.add_argument("--suffixes", type=int, default=4)
    args = parser.parse_args()
    pipeline, reward = NextFlowPipeline.from_pretrained(args.model), Reward(args.judge)
    rows = [row for row in read_prompts(args.prompts) for _ in range(args.prefixes)]
    prompts = encode_rows(pipeline, rows, guided=False)
    settings = {"guidance_scale": 1.0, "top_k": 20}
    images = sample_codes(pipeline, prompts, generators=generators(len(rows), 0), **settings)
    for scales in args.scales:
        prefixes = [codes[: num_cells(prompts[0].grids[:scales])] for codes in images]
        rewards = []
        for suffix in range(args.suffixes):
            own = generators(len(rows), 10 * scales + suffix + 1)
            codes = sample_codes(pipeline, prompts, prefixes=prefixes, generators=own, **settings)
            decoded = decode(pipeline, [Rollout(*parts) for parts in zip(prompts, codes)])
            rewards.append(reward(decoded, [row["scenes"] for row in rows]))
        grouped = np.array(rewards).T.reshape(-1, args.prefixes, args.suffixes)
        print(f"{scales} scales: {share_between(grouped):.2f} of the variance, mean reward {grouped.mean():.3f}")


if __name__ == "__main__":
    main()
