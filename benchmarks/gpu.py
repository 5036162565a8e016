"""Everything that wants a GPU, in at most nine minutes, the most valuable first: `make gpu`.

    python benchmarks/gpu.py                  # appends a section to benchmarks/RESULTS.md as it goes
    python benchmarks/gpu.py --toy --output /tmp/toy.md     # that all of it runs, on a CPU

Each line below is a process of its own, which is ended at its limit; what it printed until then stays. Python needs
the package's dependencies and the extras `rl` and `quant`, for fp8 torchao: what lacks them ends with its error.
"""

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9
SUMMARY = re.compile(r"\d+ (passed|failed|skipped|error)")
GPU_TESTS = ["test_attention_backends.py", "test_offloading.py", "test_pipeline_common_nextflow.py", "test_liger.py"]
# Title, seconds at most, command; compiling takes minutes, so those modes come last.
PARTS = (
    ("Tests", 90, ["-m", "pytest", "-q", "-k", "cuda or gpu or GPU", *(f"tests/{name}" for name in GPU_TESTS)]),
    (
        "One image by pipe()",
        150,
        ["benchmarks/generate.py", "--batch-sizes", "1", "--modes", "plain", "lean", "graphs"],
    ),
    ("Training", 120, ["benchmarks/training.py", "lora", "full"]),
    ("GRPO and extraction", 90, ["benchmarks/training.py", "grpo", "extraction"]),
    ("Compiled, and FP8", 200, ["benchmarks/generate.py", "--batch-sizes", "1", "--modes", "compiled", "fp8"]),
    ("Several images", 90, ["benchmarks/generate.py", "--batch-sizes", "4", "8", "--modes", "lean", "graphs"]),
)
TOY = {
    "benchmarks/generate.py": ["--toy", "--repeats", "1", "--pixels", "256"],
    "benchmarks/training.py": ["--toy", "--steps", "2", "--tokens", "1024"],
}


def revision() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "of an unknown revision"


def run(title: str, limit: float, command: list[str], output: Path, env: dict[str, str]) -> None:
    """Appends tables and pytest's summary to `output`, as `command` prints them; of its errors the last line."""
    began = time.monotonic()
    with output.open("a") as file, tempfile.TemporaryFile("w+") as errors:
        print(f"\n### {title}\n", file=file, flush=True)
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=env
        )
        timer = threading.Timer(limit, process.kill)
        timer.start()
        for line in process.stdout:
            if line.startswith(("|", "`")) or SUMMARY.match(line):
                print(line.rstrip(), end="\n" if line.startswith("|") else "\n\n", file=file, flush=True)
        status = process.wait()
        timer.cancel()
        errors.seek(0)
        if status != 0:
            last = (errors.read().strip().splitlines() or [""])[-1]
            print(f"\nEnded with status {status} after {time.monotonic() - began:.0f} s. {last[:300]}", file=file)
    print(f"{title}: status {status}, {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "RESULTS.md")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.toy):
        parser.error("there is no GPU: try --toy")
    deadline = time.monotonic() + 60 * arguments.minutes
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    with arguments.output.open("a") as file:
        now = f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
        print(f"\n## `make gpu` on {name}, {now}, revision {revision()}, torch {torch.__version__}", file=file)
    with tempfile.TemporaryDirectory() as folder:
        # A machine with a GPU has a Python of its own, in which the package need not be installed.
        Path(folder, "nextflow_hf").symlink_to(ROOT)
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        for title, limit, command in PARTS:
            left = deadline - time.monotonic()
            if left < 20:
                print(f"{title}: left out, {arguments.minutes:g} minutes are over", flush=True)
                continue
            toy = TOY.get(command[0], []) if arguments.toy else []
            run(title, min(limit, left), [*command, *toy], arguments.output, env)


if __name__ == "__main__":
    main()
