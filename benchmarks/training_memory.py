"""What training takes of a GPU's memory: the peak of a few steps, beside training/transformer/memory.py's estimate.

    python benchmarks/training_memory.py --optim paged_adamw_8bit                    # the whole 7B model
    python benchmarks/training_memory.py --trainable lora --optim adamw_torch_fused

Random weights and documents of the 512-level mix (packing.py), one pack of --tokens a step, layers recomputed, Liger's
kernels where they are installed. The peak is that of torch's allocator. Without a GPU `--toy` shows that it runs.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from training_speed import TOY, draw_rows
from transformers.utils import is_liger_kernel_available

from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule
from nextflow_hf.training.data.collator import PackingCollator
from nextflow_hf.training.data.packing import PackedDataset
from nextflow_hf.training.transformer.arguments import ModelArguments, NextFlowTrainingArguments
from nextflow_hf.training.transformer.freezing import set_trainable
from nextflow_hf.training.transformer.memory import OPTIMIZERS, TRAINABLE, table, training_memory
from nextflow_hf.training.transformer.model_loading import add_adapter, load_model
from nextflow_hf.training.transformer.trainer import NextFlowTrainer


def make_model(config: NextFlowConfig, trainable: str, device: str, folder: Path) -> torch.nn.Module:
    """With random weights in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        model = NextFlowForCausalLM._from_config(config, dtype=torch.bfloat16)
    if trainable == "qlora":  # bitsandbytes quantises what is loaded
        model.save_pretrained(folder)
        del model
        return load_model(ModelArguments(str(folder), dtype="bfloat16", use_peft=True, load_in_4bit=True))
    model.set_attn_implementation("flex_attention" if device == "cuda" else "sdpa")
    if trainable == "lora":
        return add_adapter(model, ModelArguments("random", use_peft=True))
    set_trainable(model, trainable)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainable", choices=TRAINABLE, default="all")
    parser.add_argument("--optim", choices=OPTIMIZERS, default="adamw_8bit")
    parser.add_argument("--tokens", type=int, default=20480, help="of a pack; no less than the longest document")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="a toy model, on the CPU where there is no GPU")
    arguments = parser.parse_args()
    on_cuda = torch.cuda.is_available()
    if not (on_cuda or arguments.toy):
        parser.error("there is no GPU: its memory is what is measured; try --toy")

    config = NextFlowConfig(**TOY) if arguments.toy else NextFlowConfig()
    grids = [(side, side) for side in (1, 2, 3, 4, 5, 6, 8)] if arguments.toy else ScaleSchedule().grids((16, 16), 16)
    rows = draw_rows(64, config, grids, 155 / 3684 if arguments.toy else 1.0)
    packs = PackedDataset(rows, config, max_length=arguments.tokens, on_long_row="skip")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(config, arguments.trainable, "cuda" if on_cuda else "cpu", Path(folder) / "model")
        args = NextFlowTrainingArguments(
            output_dir=folder,
            optim=arguments.optim,
            max_steps=arguments.steps,
            per_device_train_batch_size=1,
            bf16=True,
            gradient_checkpointing=True,
            use_cpu=not on_cuda,
            use_liger_kernel=on_cuda and is_liger_kernel_available(),
            save_strategy="no",
            report_to="none",
        )
        collator = PackingCollator(config, length=-(-arguments.tokens // 128) * 128)
        trainer = NextFlowTrainer(model, args, collator, train_dataset=packs)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()  # making random weights takes more than loading them
        trainer.train()

    expected = training_memory(
        config, trainable=arguments.trainable, optim=arguments.optim, tokens=collator.length, dtype="bfloat16"
    )
    gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9 if on_cuda else 0.0
    print(table([(f"{arguments.trainable}, {arguments.optim}, bfloat16", expected)], gigabytes))
    if on_cuda:
        name, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 1e9
        print(f"\n{name}, torch {torch.__version__}: {peak:.1f} GB at the peak of {arguments.steps} steps")


if __name__ == "__main__":
    main()
