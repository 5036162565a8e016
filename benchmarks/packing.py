"""What packing is worth: table 3 of the paper, by counting floating-point operations.

    python benchmarks/packing.py
    python benchmarks/packing.py --start-up 10_000_000

The second writes so many rows of `length` and `image_grids`, as an extraction leaves them, to a temporary file and
measures how long a training waits for its first pack. The first is the table.

The paper gives 620, 2109 and 2517 tokens/s/GPU for batches padded to their longest document, packs of a fixed length
and packs of a fixed computation, at the 512 level: 1 : 3.4 : 4.1. It does not give the lengths. Assumed here, with the
7B model:

- documents as table 2 counts them: 700M of text, 345M text-to-image, 20M edits, 5M interleaved;
- images square, 3,684 codes each: one, two in an edit, five in an interleaved document (the most that is allowed);
- captions, instructions and stories log-normal with means of 120, 60 and 400 tokens (sigma .5), text with a mean of
  357 (sigma 1): so the mean document has the 1,682 tokens that table 2 implies (1.8T over 1,070M). None above 8,192.

Every token of padding costs what a token costs outside attention. The ranks of a step wait for the busiest. All else
(communication, kernels' efficiency) is left out, and the same for all.
"""

import argparse
import itertools
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter

from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig
from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule
from nextflow_hf.training.common.flops import training_flops
from nextflow_hf.training.data.packing import EndlessPackedDataset, PackedDataset
from nextflow_hf.training.data.packs import make_packs
from nextflow_hf.training.data.shards import SHARD_FEATURES


_ROWS_OF_A_TABLE = 100_000
PAPER = (620, 2109, 2517)
# Share, images, mean and sigma of the text, of each kind of document.
MIX = {
    "text": (700, 0, 357, 1.0),
    "t2i": (345, 1, 120, 0.5),
    "edit": (20, 2, 60, 0.5),
    "interleaved": (5, 5, 400, 0.5),
}


def draw_documents(count: int, config: NextFlowConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and FLOPs of documents of the 512-level mix."""
    grids = ScaleSchedule().grids((16, 16), 16)
    cells = sum(height * width for height, width in grids) + 1  # `<boi>` stands for the 1x1 scale; and `<eoi>`
    shares, images, means, sigmas = (np.array(column) for column in zip(*MIX.values()))
    kinds = rng.choice(len(MIX), count, p=shares / shares.sum())
    text = rng.lognormal(np.log(means[kinds]) - sigmas[kinds] ** 2 / 2, sigmas[kinds])
    lengths = np.clip(text, 8, 8192).astype(int) + images[kinds] * cells
    flops = [training_flops(config, int(n), [grids] * images[kind]) for n, kind in zip(lengths, kinds)]
    return lengths, np.array(flops)


def tokens_per_petaflop(tokens: np.ndarray, work: np.ndarray, num_ranks: int) -> float:
    """Tokens for the time in which a rank does a PFLOP, idle or not; `work` of the packs or batches in turn."""
    whole = len(work) // num_ranks * num_ranks
    return tokens[:whole].sum() / num_ranks / (work[:whole].reshape(-1, num_ranks).max(axis=1).sum() / 1e15)


def measure_start_up(count: int, config: NextFlowConfig, arguments: argparse.Namespace) -> None:
    """Seconds from a data set on the disk to its first pack."""
    grids = [*map(list, ScaleSchedule().grids((16, 16), 16))]
    cells, rng = sum(height * width for height, width in grids) + 1, np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.arrow")
        columns = Features({name: SHARD_FEATURES[name] for name in ("length", "image_grids")})
        with ArrowWriter(path=str(path), features=columns) as writer:
            for start in range(0, count, _ROWS_OF_A_TABLE):
                rows = min(_ROWS_OF_A_TABLE, count - start)
                images = rng.choice([0, 1, 2, 5], rows, p=[0.654, 0.322, 0.019, 0.005])
                text = np.clip(rng.lognormal(5.3, 1.0, rows), 8, 8192).astype(int)
                tables = {"length": text + images * cells, "image_grids": _nested(images, grids)}
                writer.write_table(pa.table(tables, schema=columns.arrow_schema))
        rows = Dataset.from_file(str(path))
        print(f"{len(rows)} rows ({path.stat().st_size / 1e9:.2f} GB) on the disk; seconds until the first pack:")
        options = {"max_length": arguments.pack_length, "on_long_row": "skip"}
        begin = time.perf_counter()
        packs = EndlessPackedDataset([rows], config, **options, counts_file=Path(folder, "packs.json"))
        next(iter(packs.sampler()))
        report = packs.report()
        print(f"{time.perf_counter() - begin:6.1f}  with max_steps: a block of {report.num_documents} rows is planned")
        walk = itertools.islice(packs.sampler(), int(len(rows) / report.num_documents * report.num_packs))
        deque(walk, maxlen=0)
        print(f"{time.perf_counter() - begin:6.1f}  where a run goes on after all rows, without its packs.json")
        begin = time.perf_counter()
        again = EndlessPackedDataset([rows], config, **options, counts_file=Path(folder, "packs.json"))
        deque(itertools.islice(again.sampler(), sum(again._counts)), maxlen=0)
        print(f"{time.perf_counter() - begin:6.1f}  with its packs.json")
        begin = time.perf_counter()
        PackedDataset(rows, config, **options)
        print(f"{time.perf_counter() - begin:6.1f}  without max_steps: all rows are planned")


def _nested(images: np.ndarray, grids: list[list[int]]) -> pa.ListArray:
    """Rows with so many images of one schedule."""
    num_images = int(images.sum())
    sides = pa.array(np.tile(np.ravel(grids), num_images))
    scales = pa.ListArray.from_arrays(np.arange(0, len(sides) + 1, 2, dtype=np.int32), sides)
    each = pa.ListArray.from_arrays(np.arange(num_images + 1, dtype=np.int32) * len(grids), scales)
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(images)]).astype(np.int32), each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=16, help="documents of a padded batch")
    parser.add_argument("--pack-length", type=int, default=20480, help="tokens of a pack of fixed length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-up", type=int, help="rows to plan the packs of, instead of the table")
    arguments = parser.parse_args()

    config = NextFlowConfig()
    if arguments.start_up:
        measure_start_up(arguments.start_up, config, arguments)
        return
    lengths, flops = draw_documents(arguments.documents, config, np.random.default_rng(arguments.seed))
    padding_flops = training_flops(config, 1) - training_flops(config, 0)

    batches = np.arange(len(lengths) // arguments.batch_size * arguments.batch_size).reshape(-1, arguments.batch_size)
    batch_tokens = lengths[batches].sum(axis=1)
    padding = lengths[batches].max(axis=1) * arguments.batch_size - batch_tokens
    rows = {"batch padding": (batch_tokens, flops[batches].sum(axis=1) + padding * padding_flops)}

    by_length = make_packs(lengths, max_length=arguments.pack_length, seed=arguments.seed)
    # As much for a pack as one of fixed length has on average, if the costliest document fits.
    budget = max(flops.sum() / len(by_length), flops.max())
    by_flops = make_packs(lengths, flops, max_flops=budget, seed=arguments.seed)
    tokens = {name: np.array([lengths[pack].sum() for pack in packs]) for name, packs in
              (("length", by_length), ("computation", by_flops))}  # fmt: skip
    work = np.array([flops[pack].sum() for pack in by_length])
    work += (arguments.pack_length - tokens["length"]) * padding_flops
    rows["fixed length"] = tokens["length"], work
    rows["fixed computation"] = tokens["computation"], np.array([flops[pack].sum() for pack in by_flops])

    print(
        f"{len(lengths)} documents of {lengths.mean():.0f} tokens on average; batches of {arguments.batch_size}, "
        f"packs of {arguments.pack_length} tokens or {budget:.3g} FLOPs. Tokens per PFLOP of a rank, and ratios:\n"
    )
    ranks = [n for n in (1, 8, 64, 1024) if n * arguments.batch_size * 4 <= len(lengths)]
    print("| | computed tokens that are padding | " + " | ".join(f"{n} ranks" for n in ranks) + " | paper, 1024 |")
    print("| --- | --- |" + " --- |" * (len(ranks) + 1))
    baseline = {n: tokens_per_petaflop(*rows["batch padding"], n) for n in ranks}
    shares = [
        padding.sum() / (padding.sum() + batch_tokens.sum()),
        1 - tokens["length"].mean() / arguments.pack_length,
        0,
    ]
    for (name, row), share, published in zip(rows.items(), shares, PAPER):
        values = {n: tokens_per_petaflop(*row, n) for n in ranks}
        cells = [f"{value:.0f} = {value / baseline[n]:.2f}" for n, value in values.items()]
        print(f"| {name} | {share:.1%} | {' | '.join(cells)} | {published} = {published / PAPER[0]:.2f} |")


if __name__ == "__main__":
    main()
