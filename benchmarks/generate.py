"""Seconds an image as a user calls `pipe(prompt)`: the paper's 7B model with random weights, in every way to run it.

    python benchmarks/generate.py                                    # on a GPU: 256, 512 and 1,024 pixels
    python benchmarks/generate.py --modes plain lean --batch-sizes 1
    python benchmarks/generate.py --toy                              # a toy model, on the CPU where there is no GPU

A prompt of 128 tokens, the empty negative prompt, guidance 5, decoding and PIL included. The median counts, after a
call that warms up; on the CPU a second is one of the process's own. Each mode begins with the plain model:

- plain: transformers' layers. lean: `transformer.fuse_qkv_projections()`. graphs: `pipe.compile_sampling()`, that and
  CUDA graphs, and a decoder with compiled norms. compiled: the same with compiled layers.
- fp8: the decoder's linear layers quantised by torchao (weights and activations by rows), compiled: not equal in
  quality, which `nextflow-hf evaluate` tells. int8: weights alone, anywhere.

"floor" is the roofline of the codes with the rates of a large product and a large copy, measured here.
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial

import torch
from common import (
    TOY,
    TOY_TOKENIZER,
    copied_bytes,
    floor_seconds,
    make_pipeline,
    median_seconds,
    peak_gigabytes,
    product_flops,
    where_and_when,
)

from nextflow_hf import NextFlowPipeline
from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig, NextFlowVisionTokenizerConfig


PROMPT = "a photograph of a small house at the edge of a lake at dawn, mist over the water, soft light".ljust(128, ".")
SAMPLING = {"guidance_scale": 5.0, "top_k": 900, "top_p": 0.96}


def quantize(pipe: NextFlowPipeline, kind: str) -> None:
    """Linear layers of the decoder by torchao, in place; the heads stay."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    config = (
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()) if kind == "fp8" else Int8WeightOnlyConfig()
    )
    quantize_(pipe.transformer.model.layers, config)


def quantize_and_compile(pipe: NextFlowPipeline) -> None:
    quantize(pipe, "fp8")
    pipe.transformer.compile_repeated_blocks()
    pipe.vision_tokenizer.compile_sampling()


MODES: dict[str, Callable[[NextFlowPipeline], None]] = {
    "plain": lambda pipe: None,
    "lean": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "graphs": lambda pipe: pipe.compile_sampling(),
    "compiled": lambda pipe: pipe.compile_sampling(mode="max-autotune-no-cudagraphs"),
    "fp8": quantize_and_compile,
    "int8": lambda pipe: quantize(pipe, "int8"),
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--modes", nargs="*", choices=MODES, default=["plain", "lean", "graphs", "compiled", "fp8"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.toy:
        parser.error("there is no GPU for the 7B model: try --toy")
    config = NextFlowConfig(**(TOY if arguments.toy else {}))
    tokenizer = NextFlowVisionTokenizerConfig(**(TOY_TOKENIZER if arguments.toy else {}))
    flops, bandwidth = product_flops(device), copied_bytes(device)
    print(
        f"{where_and_when(device)}; {flops / 1e12:.3g} TFLOP/s of a product, {bandwidth / 1e12:.2f} TB/s of a copy; "
        f"median of {arguments.repeats}\n\n| mode | pixels | images | s an image | floor | ratio | peak (GB) |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for mode in arguments.modes:
        pipe = None  # the memory of the last one
        pipe = make_pipeline(config, tokenizer, device)
        try:
            MODES[mode](pipe)
        except (AssertionError, AttributeError, ImportError, ValueError) as error:  # needs a GPU, or a package
            print(f"| {mode} | {str(error)[:100]} | | | | | |", flush=True)
            continue
        schedule = pipe.processor.image_processor.schedule
        for pixels, batch in itertools.product(arguments.pixels, arguments.batch_sizes):
            peak_gigabytes(device)
            taken = median_seconds(partial(sample, pipe, pixels, batch), device, arguments.repeats) / batch
            grids = schedule.grids((16, 16), schedule.num_scales(pixels))
            floor = floor_seconds(config, grids, batch, len(PROMPT), flops, bandwidth) / batch
            print(
                f"| {mode} | {pixels} | {batch} | {taken:.3f} | {floor:.3f} | {taken / floor:.1f} | "
                f"{peak_gigabytes(device):.1f} |",
                flush=True,
            )


def sample(pipe: NextFlowPipeline, pixels: int, batch: int) -> None:
    generators = [torch.Generator().manual_seed(index) for index in range(batch)]
    pipe([PROMPT] * batch, height=pixels, width=pixels, generator=generators, **SAMPLING)


if __name__ == "__main__":
    main()
