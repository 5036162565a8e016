"""How far apart the ways of running one model are: images and codes of the same prompts and seeds.

python benchmarks/parity.py                      # the shipped model, in float32, on the CPU
python benchmarks/parity.py --model path/to/pipeline --device cuda --count 64
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from diffusers import PipelineQuantizationConfig
from transformers import TorchAoConfig

from nextflow_hf import NextFlowPipeline
from nextflow_hf.commands.loading import choose_device, find_model
from nextflow_hf.serving.worker import ImageRequest, Worker


PROMPTS = ("a red circle", "a blue square left of a green circle", "a green triangle", "two yellow circles")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


def sample(pipe: NextFlowPipeline, count: int) -> list[np.ndarray]:
    """Images, each sampled alone."""
    return [
        np.asarray(pipe(PROMPTS[seed % 4], generator=torch.Generator().manual_seed(seed)).images[0], int)
        for seed in range(count)
    ]


def served(pipe: NextFlowPipeline, count: int) -> list[np.ndarray]:
    """Images of the server's worker, in batches of eight."""
    found: dict[int, np.ndarray] = {}
    worker = Worker(pipe, max_queue=count, max_wait=1.0)
    for seed in range(count):
        request = ImageRequest(prompt=PROMPTS[seed % 4], seed=seed, settings={})
        request.emit = lambda answer, seed=seed: found.update({seed: np.asarray(answer.images[0], int)})
        worker.submit(request)
    worker.stop()
    return [found[seed] for seed in range(count)]


def ways_of(model: str, device: str, count: int) -> dict[str, Callable[[], list[np.ndarray]]]:
    """The images of a model by each way to run it."""

    def load(attention: str | None = None, **options) -> NextFlowPipeline:
        pipe = NextFlowPipeline.from_pretrained(model, **{"dtype": torch.float32, **options}).to(device)
        pipe.set_progress_bar_config(disable=True)
        if attention is not None:
            pipe.transformer.set_attn_implementation(attention)
        return pipe

    def prepared(*methods: str) -> list[np.ndarray]:
        """Of a transformer that these methods have changed."""
        pipe = load()
        for method in methods:
            getattr(pipe.transformer, method)()
        return sample(pipe, count)

    def by_torchao(kind: str) -> list[np.ndarray]:
        from torchao import quantization

        kinds = {"transformer": TorchAoConfig(getattr(quantization, kind)())}
        return sample(load(quantization_config=PipelineQuantizationConfig(quant_mapping=kinds)), count)

    four_bits = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit", quant_kwargs=NF4, components_to_quantize=["transformer"]
    )
    ways = {
        "sdpa": lambda: sample(load("sdpa"), count),
        "eager": lambda: sample(load("eager"), count),
        "compiled": lambda: prepared("compile_repeated_blocks"),
        "lean": lambda: prepared("fuse_qkv_projections"),
        "lean, compiled": lambda: prepared("fuse_qkv_projections", "compile_repeated_blocks"),
        "bfloat16": lambda: sample(load(dtype=torch.bfloat16), count),
        "4-bit": lambda: sample(load(quantization_config=four_bits), count),
        "int8 by torchao": lambda: by_torchao("Int8WeightOnlyConfig"),
        "fp8 by torchao": lambda: by_torchao("Float8WeightOnlyConfig"),
        "served": lambda: served(load(), count),
    }
    if device == "cuda":
        ways["graphs"] = lambda: prepared("compile_sampling")
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=32)
    args = parser.parse_args()
    ways = ways_of(find_model(args.model), choose_device(args.device), args.count)
    reference = None
    print("| way | equal | within 1/255 | mean difference (of 255) |\n| --- | ---: | ---: | ---: |")
    for name, way in ways.items():
        try:
            images = way()
        except (AttributeError, ImportError) as error:
            print(f"| {name} | {error} | | |", flush=True)
            continue
        reference = images if reference is None else reference
        apart = [np.abs(one - other) for one, other in zip(images, reference, strict=True)]
        equal, near = (sum(one.max() <= most for one in apart) for most in (0, 1))
        print(f"| {name} | {equal} of {args.count} | {near} | {float(np.mean(apart)):.3g} |", flush=True)


if __name__ == "__main__":
    main()
