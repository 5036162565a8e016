"""How fast a pipeline is here, and what memory it takes: medians of warm runs."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..pipelines.pipeline_nextflow import NextFlowPipeline


BATCH_SIZE = 4
NEW_TOKENS = 32
PROMPT = "a red circle"


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes, until the device is done with it."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def warm_seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of `repeats` runs after one that does not count."""
    work()
    return statistics.median(timed(work, device) for _ in range(repeats))


def reset_peak_memory(device: torch.device) -> bool:
    """Let the peak be that of what follows. False where the system only knows that of the whole process's life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Bytes at the worst moment since the reset, and of what: the GPU's for tensors, else all of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "tensors on the GPU"
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024, "the whole process"
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "the whole process"


@torch.no_grad()
def measure(pipe: NextFlowPipeline, *, repeats: int = 3) -> dict[str, Any]:
    """Speed of images, text, encoding and decoding at the model's own settings and size."""
    device = pipe._execution_device

    def generate(count: int) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPT, num_images_per_prompt=count, generator=generator)

    inputs = pipe.encode_conversations([[{"role": "user", "content": PROMPT}]], generation_mode="text")
    (image,) = generate(1).images
    codes, grids = pipe.encode_images(image)
    seconds = {
        "image_seconds": lambda: generate(1),
        "batch_seconds": lambda: generate(BATCH_SIZE),
        "encode_seconds": lambda: pipe.encode_images(image),
        "decode_seconds": lambda: pipe.decode_codes(codes, grids),
        "text_seconds": lambda: pipe.transformer.generate(
            **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        ),
    }
    measured = {name: warm_seconds(work, device, repeats) for name, work in seconds.items()}
    measured["tokens_per_second"] = NEW_TOKENS / measured.pop("text_seconds")
    peak, of = peak_memory(device)
    return {**measured, "batch_size": BATCH_SIZE, "peak_memory_bytes": peak, "peak_memory_of": of}
