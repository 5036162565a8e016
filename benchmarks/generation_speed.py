"""Seconds an image, and where they go, of the paper's 7B model with random weights.

    python benchmarks/generation_speed.py                 # on a GPU: 256, 512 and 1024 pixels
    python benchmarks/generation_speed.py --compile       # the decoder's layers and the pixel decoder compiled
    python benchmarks/generation_speed.py --toy           # that it runs: a toy model, on the CPU where there is no GPU

Every row draws with guidance and decodes with the vision tokenizer; the median counts, after a call that warms up. On
the CPU a second is one of the process's own.
"as long": the unconditional prompt is as long as the prompt. In practice it is shorter, and its row has padding.

The floor of the codes: the FLOPs of both rows (training/common/flops.py) at the rate of a large matrix product,
measured here, and for every scale no less than reading the weights once takes at the bandwidth of a large copy.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from training_speed import TOY, product_flops, seconds

from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig, NextFlowVisionTokenizerConfig
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from nextflow_hf.modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule
from nextflow_hf.training.common.flops import training_flops


PROMPT_LENGTH = 128
NEGATIVE_LENGTHS = {"as long": PROMPT_LENGTH, "shorter": 24}
SAMPLING = {"guidance_scale": 5.0, "top_k": 900, "top_p": 0.96}
TOY_TOKENIZER = {
    "semantic_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "patch_size": 16, "num_patches": 16},
    "codebook_size": TOY["codebook_size"], "encoder_channels": 8, "decoder_channels": 8, "latent_channels": 16,
}  # fmt: skip


def median_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """After one more call, which warms up."""
    return statistics.median([seconds(run, device) for _ in range(repeats + 1)][1:])


def copied_bytes(device: str) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.zeros(2**31 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / median_seconds(lambda: target.copy_(source), device, 10)


def prompts_of(batch: int, negative: int, config: NextFlowConfig, grids: list, device: str) -> dict[str, torch.Tensor]:
    """Prompts of random text and their unconditional ones, each with a `<boi>` at its end."""
    generator = torch.Generator().manual_seed(0)
    padded = torch.tensor([*grids, *[(0, 0)] * (config.max_scales - len(grids))], device=device)
    inputs = {"image_grids": padded.expand(batch, -1, -1)}
    for name, length in (("input_ids", PROMPT_LENGTH), ("negative_input_ids", negative)):
        ids = torch.randint(3, 500, (batch, length), generator=generator)
        ids[:, -1] = config.boi_token_id
        inputs[name] = ids.to(device)
    return inputs


def floor_seconds(config: NextFlowConfig, grids: list, batch: int, flops: float, bandwidth: float) -> float:
    """Of drawing `batch` images with guidance, scale by scale."""
    config = NextFlowConfig(**{**config.to_dict(), "joint_image_loss": False})  # codes are scored among codes
    with torch.device("meta"):
        layers = sum(weight.numel() for weight in NextFlowForCausalLM(config).model.layers.parameters())
    weights = 2 * (layers + config.hidden_size * config.codebook_size)  # bytes
    total = before = 0.0
    for count in range(1, len(grids) + 1):
        cells = sum(height * width for height, width in grids[:count])
        forward = training_flops(config, PROMPT_LENGTH + cells - 1, [grids[:count]]) / 3  # backward is two thirds
        total += max(2 * batch * (forward - before) / flops, weights / bandwidth)
        before = forward
    return total


def peak_gigabytes(device: str) -> float:
    """Since the last call."""
    if device == "cpu":
        return float("nan")
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.toy:
        parser.error("there is no GPU for the 7B model: try --toy")

    config = NextFlowConfig(**TOY) if arguments.toy else NextFlowConfig()
    tokenizer_config = NextFlowVisionTokenizerConfig(**(TOY_TOKENIZER if arguments.toy else {}))
    torch.manual_seed(0)
    with torch.device(device):
        model = NextFlowForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        vision_tokenizer = NextFlowVisionTokenizer._from_config(tokenizer_config, dtype=torch.bfloat16).eval()
    if arguments.compile:
        model.compile_repeated_blocks()
        vision_tokenizer.pixel_decoder.compile()

    flops, bandwidth = product_flops(device), copied_bytes(device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}; {flops / 1e12:.3g} TFLOP/s of a product, {bandwidth / 1e12:.2f} TB/s of "
        f"a copy; median of {arguments.repeats}; {'' if arguments.compile else 'not '}compiled\n"
    )
    print("| pixels | images | unconditional prompt | s an image | codes | floor | GB | decoding | GB |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    schedule = ScaleSchedule()
    for pixels in arguments.pixels:
        grids = schedule.grids((16, 16), schedule.num_scales(pixels))
        for batch in arguments.batch_sizes:
            for kind, length in NEGATIVE_LENGTHS.items():
                inputs = prompts_of(batch, length, config, grids, device)
                generators = [torch.Generator().manual_seed(index) for index in range(batch)]
                draw = partial(model.generate_images, **inputs, **SAMPLING, generator=generators)
                peak_gigabytes(device)
                drawn = median_seconds(draw, device, arguments.repeats)
                memory = [peak_gigabytes(device)]
                output = draw()
                decode = partial(vision_tokenizer.decode, output.image_codes, output.image_grids)
                decoded = median_seconds(decode, device, arguments.repeats)
                memory.append(peak_gigabytes(device))
                floor = floor_seconds(config, grids, batch, flops, bandwidth)
                print(
                    f"| {pixels} | {batch} | {kind} | {(drawn + decoded) / batch:.3f} | {drawn / batch:.3f} | "
                    f"{floor / batch:.3f} | {memory[0]:.1f} | {decoded / batch:.3f} | {memory[1]:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
