"""What the host does for an image: operators a pass, waits for the device, and memory for keys and values.

    python benchmarks/count_operators.py [--layers 28] [--size 256]

Counts on a CPU, at a width of 64: the counts do not depend on the width. Views start no kernel and are not counted;
inference mode leaves composite operators whole, such as RMS norm, which is one kernel on an accelerator.

A pass is one call of the decoder (prefill, then one a scale); "a scale" adds embedding, head, guidance and sampling.
The prompt has 8 tokens, its unconditional one 8 or 5: fused layers attend to an unequal pair row by row, transformers'
with a mask.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nextflow_hf.modeling_nextflow import NextFlowConfig, NextFlowForCausalLM, generation_image_nextflow
from nextflow_hf.modeling_nextflow.attention_nextflow import NextFlowCacheLayer
from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule


WAITS = {"_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2"}
TEXT, CODES = 128, 256


def share_memory(result: Any, argument: Any) -> bool:
    tensors = [one[0] if isinstance(one, (list, tuple)) and one else one for one in (result, argument)]
    if not all(isinstance(one, torch.Tensor) for one in tensors):
        return False
    return len({one.untyped_storage().data_ptr() for one in tensors}) == 1


class OperatorCounter(TorchDispatchMode):
    """Counts operators by name, and those among them for whose result the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        masks = args[1] if name in ("index", "index_put", "index_put_") else []
        is_masked = any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in masks)
        self.waits[name] += name in WAITS or is_masked
        result = function(*args, **(kwargs or {}))
        is_view = not function._schema.is_mutable and share_memory(result, args[0] if args else None)
        self.operators[name] += not is_view
        return result

    @property
    def total(self) -> int:
        return sum(self.operators.values())


@dataclass
class Counts:
    passes: list[int] = field(default_factory=list)  # operators of every call of the decoder
    scales: list[int] = field(default_factory=list)  # operators of a scale, those before the first with it
    waits: dict[str, int] = field(default_factory=dict)  # from the end of prefill to the last scale
    moves: int = 0  # of a layer's keys and values to larger memory, after prefill


def make_model(layers: int, *, fused: bool) -> NextFlowForCausalLM:
    torch.manual_seed(0)
    config = NextFlowConfig(
        vocab_size=TEXT + CODES + 2, text_vocab_size=TEXT, codebook_size=CODES, image_token_id=2, pad_token_id=0,
        boi_token_id=TEXT + CODES, eoi_token_id=TEXT + CODES + 1, eos_token_id=1, hidden_size=64, intermediate_size=96,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=20000,
    )  # fmt: skip
    model = NextFlowForCausalLM(config).eval()
    if fused:
        model.fuse_qkv_projections()
    return model


@contextmanager
def counting_passes(model: NextFlowForCausalLM, counter: OperatorCounter, passes: list[int]) -> Iterator[None]:
    before = model.model.register_forward_pre_hook(lambda *_: passes.append(-counter.total))
    after = model.model.register_forward_hook(lambda *_: passes.append(passes.pop() + counter.total))
    try:
        yield
    finally:
        before.remove()
        after.remove()


def count(model: NextFlowForCausalLM, size: int, negative_length: int, *, length: int = 8) -> Counts:
    """Sample one image of `size` pixels with guidance, as an accelerator would: the host looks at no value."""
    schedule = ScaleSchedule()
    grids = schedule.grids((16, 16), schedule.num_scales(size))
    rows = torch.zeros(1, model.config.max_scales, 2, dtype=torch.long)
    rows[0, : len(grids)] = torch.tensor(grids)
    prompt, negative = (torch.full((1, count), 5) for count in (length, negative_length))
    prompt[:, -1] = negative[:, -1] = model.config.boi_token_id
    inputs = {"image_grids": rows, "negative_input_ids": negative, "generator": torch.Generator().manual_seed(0)}
    settings = {"guidance_scale": 3.0, "top_k": 100, "top_p": 0.9}
    counts, counter, move = Counts(), OperatorCounter(), NextFlowCacheLayer.reserve
    moves = []
    with (
        mock.patch.object(NextFlowCacheLayer, "reserve", lambda *args: moves.append(move(*args))),
        mock.patch.object(generation_image_nextflow, "SYNCHRONOUS", ()),
        torch.inference_mode(),
        counter,
        counting_passes(model, counter, counts.passes),
    ):
        scales = model.stream_images(prompt, **inputs, **settings)
        counter.waits.clear()
        moves.clear()
        ends = [counter.total]
        for _ in itertools.islice(scales, len(grids) - 1):
            ends.append(counter.total)
        counts.waits = {name: number for name, number in counter.waits.items() if number}
        counts.moves = len(moves)
        for _ in scales:
            ends.append(counter.total)
    counts.scales = [end - start for start, end in itertools.pairwise(ends)]
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--size", type=int, default=256, help="pixels a side: 256, 512 or 1024")
    args = parser.parse_args()
    print("| layers | prompts | prefill | a pass | a scale | waits | moved keys and values |\n" + "|---" * 7 + "|")
    for fused in (False, True):
        model = make_model(args.layers, fused=fused)
        for negative_length in (8, 5):
            found = count(model, args.size, negative_length)
            kind = "fused" if fused else "transformers'"
            prompts = "equal" if negative_length == 8 else "unequal"
            passes, scales = set(found.passes[1:]), set(found.scales[1:-1])
            print(
                f"| {kind} | {prompts} | {found.passes[0]} | {max(passes)} | {max(scales)} | {found.waits or 0} | "
                f"{found.moves} |"
            )


if __name__ == "__main__":
    main()
