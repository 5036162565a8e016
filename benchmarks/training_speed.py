"""Tokens a second, peak memory and utilisation of a training step, forward and backward.

    python benchmarks/training_speed.py                      # a toy model on the CPU, one thread
    python benchmarks/training_speed.py --device cuda        # the 7B model's shape, 512-level documents

Each row is a way to attend, with Liger's kernels or without, and a way to batch the same documents (the mix of
packing.py). All are timed in turn in one process, again and again, and the median counts: compare rows of one run.
"forward" is the same without gradients, as in an evaluation. The optimizer's step is left out.

On the CPU a second is one of the process's own (`time.process_time`), which other work on the machine takes little of.
Flex attention has no backward pass there, and Liger no kernels.

On CUDA the model has a few layers of the 7B model's 28. What is outside the layers costs the same at any depth, so two
depths a < b give those 28: time(28) = time(a) + (28 - a) * (time(b) - time(a)) / (b - a), and memory alike.

Model FLOPs utilisation = FLOPs of the documents (no padding, no recomputation) / seconds / peak.
The peak is --peak-tflops, or by default what a large matrix product reaches here.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from packing import MIX
from torch.distributed._tools.mem_tracker import MemTracker
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule
from nextflow_hf.training.common.flops import training_flops
from nextflow_hf.training.data.collator import NextFlowDataCollator, PackingCollator
from nextflow_hf.training.data.packing import PackedDataset, document_costs


TOY = {
    "vocab_size": 512 + 1024 + 2, "text_vocab_size": 512, "codebook_size": 1024, "boi_token_id": 1536,
    "eoi_token_id": 1537, "image_token_id": 2, "pad_token_id": 0, "eos_token_id": 1, "hidden_size": 128,
    "intermediate_size": 672, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}  # fmt: skip


def draw_rows(count: int, config: NextFlowConfig, grids: list, text_scale: float) -> list[dict]:
    """Documents of random tokens and codes of the 512-level mix; `text_scale` shortens the text."""
    rng = np.random.default_rng(0)
    shares, images, means, sigmas = (np.array(column) for column in zip(*MIX.values()))
    cells = sum(height * width for height, width in grids)
    rows = []
    for kind in rng.choice(len(MIX), count, p=shares / shares.sum()):
        mean = np.log(means[kind]) - sigmas[kind] ** 2 / 2
        words = int(np.clip(rng.lognormal(mean, sigmas[kind]), 8, 8192) * text_scale) + 2
        image = [config.boi_token_id, *[config.image_token_id] * (cells - 1), config.eoi_token_id]
        ids = [*rng.integers(3, 500, words).tolist(), *image * images[kind], 1]
        codes = rng.integers(0, config.codebook_size, cells * images[kind]).tolist()
        padded = [*grids, *[(0, 0)] * (config.max_scales - len(grids))]
        rows.append({"input_ids": ids, "labels": ids, "image_codes": codes, "image_target_codes": codes,
                     "image_grids": [padded] * images[kind], "length": len(ids)})  # fmt: skip
    return rows


def make_batches(rows: list[dict], config: NextFlowConfig, batch_size: int) -> dict[str, list[dict]]:
    """The same rows in batches padded to their longest, in packs of as many tokens, in packs of as many FLOPs."""
    groups = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    collate = NextFlowDataCollator(pad_token_id=config.pad_token_id)
    batches = {"padding": [collate(group) for group in groups]}
    lengths, flops = document_costs(rows, config)
    max_length = max(sum(lengths) // len(groups), max(lengths))
    max_flops = max(sum(flops) / len(groups), max(flops))
    collate = PackingCollator(config, pad_to_multiple_of=128)
    for name, limits in (("length", {"max_length": max_length}), ("computation", {"max_flops": max_flops})):
        packs = PackedDataset(rows, config, **limits)
        batches[name] = [collate([packs[index]]) for index in range(len(packs))]
    return batches


def step(model: NextFlowForCausalLM, batches: list[dict], *, backward: bool) -> None:
    for batch in batches:
        batch = {name: tensor.to(model.device, non_blocking=True) for name, tensor in batch.items()}
        with (
            torch.set_grad_enabled(backward),
            torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cpu"),
        ):
            loss = model(**batch).loss
        if backward:
            loss.backward()
            model.zero_grad()


def seconds(run: Callable[[], None], device: str) -> float:
    """Of the clock on CUDA, of the process on the CPU: see above."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_gigabytes(model: NextFlowForCausalLM, batches: list[dict]) -> float:
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(model, batches, backward=True)
        return torch.cuda.max_memory_allocated() / 1e9
    peaks = []
    for batch in batches:
        tracker = MemTracker()  # it takes one step
        tracker.track_external(model)
        with tracker:
            step(model, [batch], backward=True)
        peaks.append(sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values()))
    return max(peaks) / 1e9


def product_flops(device: str) -> float:
    """FLOPs a second of a large product in bfloat16."""
    size = 8192 if device == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    matrix @ matrix
    return 2 * size**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(10))


def make_models(config: NextFlowConfig, arguments: argparse.Namespace) -> dict[bool, NextFlowForCausalLM]:
    """Without Liger's kernels and, where they run, with them."""
    models = {}
    for with_liger in (False, True):
        if with_liger and not (arguments.device == "cuda" and is_liger_kernel_available()):
            continue
        torch.manual_seed(0)
        with torch.device(arguments.device):
            model = NextFlowForCausalLM(config)
        model = model.to(torch.bfloat16 if arguments.device == "cuda" else torch.float32).train()
        if arguments.frozen:
            model.requires_grad_(False).model.connector.requires_grad_(True)
        if arguments.checkpointing:
            model.gradient_checkpointing_enable()
        if with_liger:
            apply_liger_kernel(model, None)
        models[with_liger] = model
    return models


Case = tuple[str, bool, str]  # attention, with Liger's kernels, batches by
OUT_OF_MEMORY = "out of memory"


class Measurements:
    """
    Seconds and gigabytes of every case at every depth, and why a case has none.

    Args:
        models: Without Liger's kernels and with them.
        batches: The documents in the ways that they are batched.
        depths: Numbers of layers that are measured.
        impossible: Cases that cannot be trained, or not run at all, with the reason.
    """

    def __init__(
        self,
        models: dict[bool, NextFlowForCausalLM],
        batches: dict[str, list[dict]],
        depths: list[int],
        impossible: dict[Case, str],
    ):
        self.models, self.batches, self.depths, self.impossible = models, batches, depths, dict(impossible)
        self.device = models[False].device.type
        self.times: dict[tuple, list[float]] = {}  # (case, depth, backward)
        self.memory: dict[tuple, float] = {}  # (case, depth)

    def run(self, cases: list[Case], repeats: int) -> None:
        for repeat in range(repeats + 1):  # the first warms up, and measures the memory
            for case in cases:
                for depth in self.depths:
                    self._run(case, depth, is_first=repeat == 0)

    def _run(self, case: Case, depth: int, *, is_first: bool) -> None:
        attention, liger, batching = case
        if liger not in self.models or self.impossible.get(case) == OUT_OF_MEMORY:
            return
        model, batches = self.models[liger], self.batches[batching]
        model.set_attn_implementation(attention)
        layers = model.model.layers
        model.model.layers = layers[:depth]
        try:
            for backward in (False, True):
                if backward and case in self.impossible:
                    continue
                if is_first and backward:
                    self.memory[case, depth] = peak_gigabytes(model, batches)
                elif is_first:
                    step(model, batches, backward=False)
                else:
                    found = seconds(partial(step, model, batches, backward=backward), self.device)
                    self.times.setdefault((case, depth, backward), []).append(found)
        except torch.OutOfMemoryError:
            self.impossible[case] = OUT_OF_MEMORY
            model.zero_grad()
            torch.cuda.empty_cache()
        model.model.layers = layers

    def seconds(self, case: Case, num_layers: int, *, backward: bool) -> float | None:
        """Of all documents, at the full depth; None where there is none."""
        low, high = (self.times.get((case, depth, backward)) for depth in (self.depths[0], self.depths[-1]))
        if not low or (backward and case in self.impossible):
            return None
        return self._at_depth(statistics.median(low), statistics.median(high), num_layers)

    def gigabytes(self, case: Case, num_layers: int) -> float:
        return self._at_depth(self.memory[case, self.depths[0]], self.memory[case, self.depths[-1]], num_layers)

    def _at_depth(self, low: float, high: float, num_layers: int) -> float:
        if self.depths[0] == self.depths[-1]:
            return low
        return low + (num_layers - self.depths[0]) * (high - low) / (self.depths[-1] - self.depths[0])

    @property
    def spread(self) -> float:
        """The largest difference of a repeat from the median of its case, over that median."""
        return max(abs(value / statistics.median(found) - 1) for found in self.times.values() for value in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8, help="documents of a padded batch, on average of a pack")
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 4], help="both depths that are timed on CUDA")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--frozen", action="store_true", help="all weights but the connector's, as under an adapter")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the activations of each layer")
    parser.add_argument("--peak-tflops", type=float, help="of the device, e.g. 989 for an H100's bfloat16")
    arguments = parser.parse_args()
    device, on_cuda = arguments.device, arguments.device == "cuda"
    torch.set_num_threads(1)

    config = NextFlowConfig() if on_cuda else NextFlowConfig(**TOY)
    depths = arguments.layers if on_cuda else [config.num_hidden_layers]
    grids = ScaleSchedule().grids((16, 16), 16) if on_cuda else [(side, side) for side in (1, 2, 3, 4, 5, 6, 8)]
    rows = draw_rows(arguments.documents, config, grids, 1.0 if on_cuda else 155 / 3684)
    tokens = sum(row["length"] for row in rows)
    flops = sum(training_flops(config, row["length"], row["image_grids"], frozen=arguments.frozen) for row in rows)
    batches = make_batches(rows, config, arguments.batch_size)
    shallow = NextFlowConfig(num_hidden_layers=max(depths)) if on_cuda else config
    models = make_models(shallow, arguments)

    ours, best = "computation", "flex_attention" if on_cuda else "sdpa"
    cases = [(attention, liger, ours) for attention in ("eager", "sdpa", "flex_attention") for liger in (False, True)]
    cases += [(best, True in models, batching) for batching in ("padding", "length")]
    impossible = {case: "Liger is not installed" if on_cuda else "no kernels on the CPU" for case in cases if case[1]}
    impossible = {case: reason for case, reason in impossible.items() if True not in models}
    if not on_cuda:
        impossible["flex_attention", False, ours] = "no backward pass on the CPU"
    measured = Measurements(models, batches, depths, impossible)
    measured.run(cases, arguments.repeats)

    peak = arguments.peak_tflops * 1e12 if arguments.peak_tflops else product_flops(device)
    name = torch.cuda.get_device_name() if on_cuda else "one CPU thread"
    print(
        f"{name}, torch {torch.__version__}; {config.num_hidden_layers} layers, timed at {depths}; "
        f"{len(rows)} documents, {tokens} tokens of {flops / tokens / 1e9:.3g} GFLOPs; "
        f"peak {peak / 1e12:.3g} TFLOP/s; median of {arguments.repeats}, none further from it than "
        f"{measured.spread:.0%}; load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores\n"
    )
    print("| attention | Liger | batches by | tokens/s | ratio | MFU | peak memory (GB) | tokens/s, forward |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    baseline = None
    for case in cases:
        cells = [case[0], "yes" if case[1] else "no", case[2]]
        taken = measured.seconds(case, config.num_hidden_layers, backward=True)
        if taken is None:
            cells += [measured.impossible[case], "", "", ""]
        else:
            baseline = baseline or taken
            cells += [f"{tokens / taken:.0f}", f"{baseline / taken:.2f}", f"{flops / taken / peak:.1%}"]
            cells.append(f"{measured.gigabytes(case, config.num_hidden_layers):.2f}")
        forward = measured.seconds(case, config.num_hidden_layers, backward=False)
        print("|", " | ".join([*cells, "" if forward is None else f"{tokens / forward:.0f}"]), "|")


if __name__ == "__main__":
    main()
