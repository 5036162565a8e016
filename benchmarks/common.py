"""What the benchmarks share: a toy model, the paper's, clocks, and the rates that this device reaches."""

import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nextflow_hf import NextFlowPipeline
from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig, NextFlowVisionTokenizerConfig
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from nextflow_hf.modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from nextflow_hf.processing import NextFlowImageProcessorPil, NextFlowProcessor, extend_tokenizer
from nextflow_hf.training.common.flops import training_flops


ROOT = Path(__file__).resolve().parents[1]
TOY = {
    "vocab_size": 512 + 1024 + 2, "text_vocab_size": 512, "codebook_size": 1024, "boi_token_id": 1536,
    "eoi_token_id": 1537, "image_token_id": 2, "pad_token_id": 0, "eos_token_id": 1, "hidden_size": 128,
    "intermediate_size": 672, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}  # fmt: skip
TOY_TOKENIZER = {
    "semantic_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "patch_size": 16, "num_patches": 16},
    "codebook_size": TOY["codebook_size"], "encoder_channels": 8, "decoder_channels": 8, "latent_channels": 16,
}  # fmt: skip


def now(device: str) -> float:
    """Seconds of the clock on CUDA; on a CPU those of the process, which other work on the machine takes little of."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], object], device: str) -> float:
    began = now(device)
    run()
    return now(device) - began


def median_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """After one more call, which warms up."""
    return statistics.median([seconds(run, device) for _ in range(repeats + 1)][1:])


def product_flops(device: str) -> float:
    """FLOPs a second of a large product in bfloat16."""
    size = 8192 if device == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / median_seconds(lambda: matrix @ matrix, device, 10)


def copied_bytes(device: str) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.zeros(2**31 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / median_seconds(lambda: target.copy_(source), device, 10)


def peak_gigabytes(device: str) -> float:
    """Of torch's allocator, since the last call."""
    if device == "cpu":
        return float("nan")
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


def where_and_when(device: str) -> str:
    """The line above a table: command, device, date and versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"a CPU, {torch.get_num_threads()} threads"
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return f"`{command}`, {date.today()}, {name}, torch {torch.__version__}"


def make_pipeline(config: NextFlowConfig, tokenizer: NextFlowVisionTokenizerConfig, device: str) -> NextFlowPipeline:
    """Of random weights in bfloat16. A letter is a token; `config` gets the ids of the text tokenizer."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("unused_{}".format, range(config.text_vocab_size))]
    vocabulary = {word: index for index, word in enumerate(words[: config.text_vocab_size - 4])}
    text = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = PreTrainedTokenizerFast(tokenizer_object=text, model_max_length=config.max_position_embeddings)
    extend_tokenizer(text, text_vocab_size=config.text_vocab_size, codebook_size=config.codebook_size)
    processor = NextFlowProcessor(NextFlowImageProcessorPil(), text)
    for name, owner in (("boi", processor), ("eoi", processor), ("image", processor), ("pad", text), ("eos", text)):
        setattr(config, f"{name}_token_id", getattr(owner, f"{name}_token_id"))
    torch.manual_seed(0)
    with torch.device(device):
        transformer = NextFlowForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        vision_tokenizer = NextFlowVisionTokenizer._from_config(tokenizer, dtype=torch.bfloat16).eval()
    pipe = NextFlowPipeline(transformer=transformer, vision_tokenizer=vision_tokenizer, processor=processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def floor_seconds(
    config: NextFlowConfig, grids: list, batch: int, prompt_length: int, flops: float, bandwidth: float
) -> float:
    """
    The roofline of sampling `batch` images with guidance: for every scale the FLOPs of both rows at the rate of a
    large product, and no less than reading the weights once takes at the bandwidth of a large copy.
    """
    config = NextFlowConfig(**{**config.to_dict(), "joint_image_loss": False})  # codes are scored among codes
    with torch.device("meta"):
        layers = sum(weight.numel() for weight in NextFlowForCausalLM(config).model.layers.parameters())
    weights = 2 * (layers + config.hidden_size * config.codebook_size)  # bytes
    total = before = 0.0
    for count in range(1, len(grids) + 1):
        cells = sum(height * width for height, width in grids[:count])
        forward = training_flops(config, prompt_length + cells - 1, [grids[:count]]) / 3  # backward is two thirds
        total += max(2 * batch * (forward - before) / flops, weights / bandwidth)
        before = forward
    return total
