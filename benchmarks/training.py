"""Seconds, memory and utilisation of training the paper's 7B model with random weights: transformer, GRPO, extraction.

    python benchmarks/training.py lora full grpo extraction        # on a GPU
    python benchmarks/training.py full --optim paged_adamw_8bit --tokens 40960
    python benchmarks/training.py lora full grpo extraction --toy  # a toy model, on the CPU where there is no GPU

- lora, full: steps of `NextFlowTrainer` on packs of --tokens of the 512-level mix (packing.py), layers recomputed,
  Liger's kernels where they are installed. Model FLOPs utilisation = FLOPs of the documents (no padding, nothing
  computed again) / seconds / the rate of a large product, measured here. The peak is that of torch's allocator, beside
  the arithmetic of `nextflow-hf memory`.
- grpo: a group of 8 rollouts of 256 pixels under LoRA, the first 8 scales trained: seconds of rollout and update.
- extraction: images of 512 pixels to codes, from PIL.

Seconds are the median of the steps after the first, on a CPU those of the process.
"""

import argparse
import statistics
import tempfile
from typing import Any

import numpy as np
import torch
from common import (
    TOY,
    TOY_TOKENIZER,
    make_pipeline,
    median_seconds,
    now,
    peak_gigabytes,
    product_flops,
    where_and_when,
)
from datasets import Dataset
from packing import MIX
from PIL import Image
from transformers import TrainerCallback
from transformers.utils import is_liger_kernel_available

from nextflow_hf import NextFlowPipeline
from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig, NextFlowVisionTokenizerConfig
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule
from nextflow_hf.training.common.flops import training_flops
from nextflow_hf.training.data.collator import PackingCollator
from nextflow_hf.training.data.encoding import ExtractionSettings, RowEncoder
from nextflow_hf.training.data.packing import PackedDataset
from nextflow_hf.training.transformer.arguments import ModelArguments, NextFlowTrainingArguments
from nextflow_hf.training.transformer.memory import training_memory
from nextflow_hf.training.transformer.model_loading import add_adapter
from nextflow_hf.training.transformer.trainer import NextFlowTrainer


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


class Clock(TrainerCallback):
    """Seconds of every step, forward, backward and optimizer."""

    def __init__(self, device: str):
        self.device, self.seconds, self.began = device, [], 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = now(self.device)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now(self.device) - self.began)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds[1:] or self.seconds)


def settings_of(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What both trainers are told."""
    on_cuda = arguments.device == "cuda"
    return {
        "output_dir": folder,
        "max_steps": arguments.steps,
        "use_cpu": not on_cuda,
        "bf16": True,
        "gradient_checkpointing": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train(kind: str, arguments: argparse.Namespace, config: NextFlowConfig) -> str:
    """A row of the table: steps of LoRA or of all weights."""
    on_cuda = arguments.device == "cuda"
    grids = [(side, side) for side in (1, 2, 3, 4, 5, 6, 8)] if arguments.toy else ScaleSchedule().grids((16, 16), 16)
    rows = draw_rows(64 * arguments.steps, config, grids, 155 / 3684 if arguments.toy else 1.0)
    packs = PackedDataset(rows, config, max_length=arguments.tokens, on_long_row="skip")
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = NextFlowForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.set_attn_implementation("flex_attention" if on_cuda else "sdpa")
    if kind == "lora":
        model = add_adapter(model, ModelArguments("random", use_peft=True))
    optim = arguments.optim or ("adamw_8bit" if kind == "full" else "adamw_torch_fused")
    clock, collator = Clock(arguments.device), PackingCollator(config, length=-(-arguments.tokens // 128) * 128)
    peak_gigabytes(arguments.device)  # making random weights takes more than loading them
    with tempfile.TemporaryDirectory() as folder:
        args = NextFlowTrainingArguments(
            **settings_of(arguments, folder),
            optim=optim,
            per_device_train_batch_size=1,
            use_liger_kernel=on_cuda and is_liger_kernel_available(),
        )
        NextFlowTrainer(model, args, collator, train_dataset=packs, callbacks=[clock]).train()
    documents = [row for pack in packs for row in pack]
    tokens = sum(row["length"] for row in documents) / len(packs)
    flops = sum(training_flops(config, row["length"], row["image_grids"], frozen=kind == "lora") for row in documents)
    expected = training_memory(
        config, trainable="all" if kind == "full" else kind, optim=optim, tokens=collator.length, dtype="bfloat16"
    )
    return (
        f"| {kind}, {optim} | {clock.median:.2f} | {tokens / clock.median:.0f} tokens/s | "
        f"{flops / len(packs) / clock.median / arguments.rate:.1%} | "
        f"{peak_gigabytes(arguments.device):.1f} | {expected.total / 1e9:.1f} |"
    )


def brightness(images: list[Image.Image], **columns: Any) -> list[float]:
    return [image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for image in images]


def grpo(arguments: argparse.Namespace, config: NextFlowConfig, tokenizer: NextFlowVisionTokenizerConfig) -> str:
    """A row of the table: a group's rollout and its update, under LoRA."""
    from peft import LoraConfig

    from nextflow_hf import NextFlowGRPOConfig, NextFlowGRPOTrainer  # which need TRL

    pipe, clock, rollouts = make_pipeline(config, tokenizer, arguments.device), Clock(arguments.device), []

    class Timed(NextFlowGRPOTrainer):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            began = now(arguments.device)
            batch = super()._generate_and_score_completions(inputs)
            rollouts.append(now(arguments.device) - began)
            return batch

    peak_gigabytes(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        args = NextFlowGRPOConfig(
            **settings_of(arguments, folder),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            num_generations=8,
            prefix_scales=8,
            resolution=256,
        )
        Timed(
            pipe.transformer,
            brightness,
            args,
            Dataset.from_list([{"prompt": "a house at a lake"}] * 8),
            processing_class=pipe.processor,
            vision_tokenizer=pipe.vision_tokenizer,
            peft_config=LoraConfig(r=64, target_modules="all-linear"),
            callbacks=[clock],
        ).train()
    rollout = statistics.median(rollouts[1:] or rollouts)
    parts = f"{rollout:.2f} s of rollout, {clock.median - rollout:.2f} of update"
    return f"| grpo, 8 rollouts | {clock.median:.2f} | {parts} | | {peak_gigabytes(arguments.device):.1f} | |"


def extraction(arguments: argparse.Namespace, pipe: NextFlowPipeline) -> str:
    """A row of the table: images to codes, as `nextflow-hf extract` does it."""
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    image, count = Image.fromarray(pixels), 4 if arguments.toy else 32
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a house"}]},
        {"role": "assistant", "content": [{"type": "image"}]},
    ]
    encode = RowEncoder(pipe.processor, pipe.vision_tokenizer, ExtractionSettings(resolution=512, batch_size=8))
    rows = [(index, {"messages": messages, "images": [image]}) for index in range(count)]
    peak_gigabytes(arguments.device)
    taken = median_seconds(lambda: [*encode(rows)], arguments.device, arguments.steps)
    speed = f"{taken / count:.3f} an image | {count / taken:.1f} images/s"
    return f"| extraction | {speed} | | {peak_gigabytes(arguments.device):.1f} | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=["lora", "full", "grpo", "extraction"])
    parser.add_argument("--optim", help="default: adamw_8bit of all weights, else adamw_torch_fused")
    parser.add_argument("--tokens", type=int, default=20480, help="of a pack; no less than the longest document")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cpu" and not arguments.toy:
        parser.error("there is no GPU for the 7B model: try --toy")
    arguments.rate = product_flops(arguments.device)
    print(f"{where_and_when(arguments.device)}; {arguments.rate / 1e12:.3g} TFLOP/s of a product\n")
    print("| | s a step | | MFU | peak (GB) | arithmetic (GB) |\n| --- | ---: | --- | ---: | ---: | ---: |")
    for kind in arguments.kinds:
        config = NextFlowConfig(**(TOY if arguments.toy else {}))
        tokenizer = NextFlowVisionTokenizerConfig(**(TOY_TOKENIZER if arguments.toy else {}))
        if kind == "grpo":
            row = grpo(arguments, config, tokenizer)
        elif kind == "extraction":
            row = extraction(arguments, make_pipeline(config, tokenizer, arguments.device))
        else:
            row = train(kind, arguments, config)
        print(row, flush=True)


if __name__ == "__main__":
    main()
