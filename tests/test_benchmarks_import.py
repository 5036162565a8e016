"""Benchmarks that no test runs still find what they import."""

import subprocess
import sys
from pathlib import Path


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_every_benchmark_imports():
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import {', '.join(names)}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-500:]
