"""Seconds and peak memory of work on a device."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


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
