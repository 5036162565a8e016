"""What the loss takes of the memory, and of the time: the logits of a whole sequence are its largest tensor.

    python benchmarks/loss_memory.py                      # on the CPU, one thread
    python benchmarks/loss_memory.py --device cuda        # one sequence of the 7B model

Four ways to the same loss and the same gradients, of the hidden states and of the head: all logits at once; the two of
loss_nextflow.py, for any head (logits made again for the gradient) and for a plain matrix (the gradient made with the
logits); and, on CUDA, Liger's kernel. The peak is over what is there before: hidden states and head. On the CPU it is
that of a process's resident memory, each way in a process of its own, and seconds are the process's own.

"must" is what the gradients take, which every way ends with.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.utils import is_liger_kernel_available

from nextflow_hf.modeling_nextflow.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling_nextflow.loss_nextflow import linear_cross_entropy, weighted_cross_entropy
from nextflow_hf.modeling_nextflow.modeling_nextflow import NextFlowForCausalLM
from nextflow_hf.training.transformer.liger import liger_weighted_cross_entropy


Loss = Callable[[torch.Tensor, torch.nn.Linear, torch.Tensor, torch.Tensor, int], torch.Tensor]


def all_at_once(hidden, head, targets, weights, chunk_size):
    return (F.cross_entropy(head(hidden).float(), targets, reduction="none") * weights).sum()


def any_head(hidden, head, targets, weights, chunk_size):
    return (linear_cross_entropy(hidden, head, targets, chunk_size=chunk_size) * weights).sum()


def plain_matrix(hidden, head, targets, weights, chunk_size):
    parts = [(len(targets), slice(0, len(head.weight)))]
    return weighted_cross_entropy(hidden, head.weight, targets, weights, parts=parts, chunk_size=chunk_size)[0]


def liger(hidden, head, targets, weights, chunk_size):
    parts = [(len(targets), slice(0, len(head.weight)))]
    return liger_weighted_cross_entropy(hidden, head.weight, targets, weights, parts=parts, chunk_size=chunk_size)[0]


def measure(loss: Loss, arguments: argparse.Namespace) -> dict[str, float]:
    """Peak in bytes, seconds, and the loss with the length of its gradients, which all ways must share."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device, dtype = arguments.device, torch.bfloat16 if arguments.device == "cuda" else torch.float32
    hidden = torch.randn(arguments.tokens, arguments.hidden, device=device, dtype=dtype).requires_grad_()
    head = torch.nn.Linear(arguments.hidden, arguments.vocabulary, bias=False, device=device, dtype=dtype)
    targets = torch.randint(arguments.vocabulary, (arguments.tokens,), device=device)
    weights = torch.rand(arguments.tokens, device=device)
    warm = slice(0, 8)
    loss(hidden[warm], head, targets[warm], weights[warm], arguments.chunk_size).backward()
    hidden.grad = head.weight.grad = None
    before = resident_bytes(device, reset=True)
    start = now(device)
    value = loss(hidden, head, targets, weights, arguments.chunk_size)
    value.backward()
    taken = now(device) - start
    peak = resident_bytes(device) - before
    lengths = [gradient.float().norm().item() for gradient in (hidden.grad, head.weight.grad)]
    return {"peak": peak, "seconds": taken, "values": [value.item(), *lengths]}


def resident_bytes(device: str, *, reset: bool = False) -> int:
    """The most that was there so far, or since the last reset."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    config = NextFlowConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, help="default: 4,096 on the CPU, 16,384 on CUDA")
    parser.add_argument("--hidden", type=int, help="default: 256 on the CPU, the 7B model's on CUDA")
    parser.add_argument("--vocabulary", type=int, help="default: 32,770 on the CPU, the 7B model's on CUDA")
    parser.add_argument("--chunk-size", type=int, default=NextFlowForCausalLM.loss_chunk_size)
    arguments = parser.parse_args()
    on_cuda = arguments.device == "cuda"
    arguments.tokens = arguments.tokens or (16384 if on_cuda else 4096)
    arguments.hidden = arguments.hidden or (config.hidden_size if on_cuda else 256)
    arguments.vocabulary = arguments.vocabulary or (config.vocab_size if on_cuda else 32770)

    ways: dict[str, Loss] = {
        "all logits at once": all_at_once,
        f"chunks of {arguments.chunk_size}, any head": any_head,
        f"chunks of {arguments.chunk_size}, a plain matrix": plain_matrix,
    }
    if on_cuda and is_liger_kernel_available():
        ways["Liger"] = liger
    results = {}
    for name, loss in ways.items():
        if on_cuda:
            results[name] = measure(loss, arguments)
        else:  # the most that a process ever held is told once
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results[name] = pool.apply(measure, (loss, arguments))

    size = 2 if on_cuda else 4
    logits = arguments.tokens * arguments.vocabulary * size
    gradients = (arguments.tokens + arguments.vocabulary) * arguments.hidden * size
    print(
        f"{arguments.tokens} tokens of {arguments.hidden}, {arguments.vocabulary} rows of the head, "
        f"{'bfloat16' if on_cuda else 'float32'}, torch {torch.__version__}; the logits of all are "
        f"{logits / 1e9:.2f} GB, the gradients {gradients / 1e9:.2f} GB\n"
    )
    print("| loss and its gradients | peak (GB) | of it must | seconds |")
    print("| --- | --- | --- | --- |")
    first = results["all logits at once"]["values"]
    for name, result in results.items():
        torch.testing.assert_close(result["values"], first, rtol=2e-2 if on_cuda else 1e-4, atol=0)
        print(f"| {name} | {result['peak'] / 1e9:.2f} | {gradients / 1e9:.2f} | {result['seconds']:.2f} |")


if __name__ == "__main__":
    main()
