"""Copies codes and puts those of some rows in a wrong order, each scale in itself: a fault that has to be seen.

python shuffle_codes.py runs/ablations/codes runs/ablations/codes_shuffled --share 0.3
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from nextflow_hf.training.data.shards import MANIFEST, finish, load_codes, write_shard


def shuffle(row: dict, rng: np.random.Generator) -> dict:
    """The row with the codes and the targets of every scale in a new order, the same for both."""
    cells = np.array(row["image_grids"]).prod(-1).flatten()
    starts = np.cumsum(cells) - cells
    order = np.concatenate([start + rng.permutation(count) for start, count in zip(starts, cells)]).astype(int)
    moved = {name: np.array(row[name])[order].tolist() for name in ("image_codes", "image_target_codes")}
    return {**row, **moved, "is_clean": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("codes", type=Path, help="written by nextflow-hf extract")
    parser.add_argument("output", type=Path)
    parser.add_argument("--share", type=float, default=0.3, help="of the rows (0.3)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    rows = load_codes(args.codes).with_format(None).to_list()
    args.output.mkdir(parents=True, exist_ok=True)
    shutil.copy(args.codes / MANIFEST, args.output)
    write_shard(args.output, 0, [shuffle(row, rng) if rng.random() < args.share else row for row in rows], [])
    finish(args.output, 1)


if __name__ == "__main__":
    main()
