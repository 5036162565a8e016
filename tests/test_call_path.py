"""A prompt goes straight through the package: what benchmarks/call_path.py counts."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import call_path  # noqa: E402


LIMITS = {"functions": 119, "files": 15, "changes of file": 70, "depth": 9}


def test_a_prompt_takes_few_functions_and_files():
    counts = call_path.trace().counts()
    assert all(counts[name] <= limit for name, limit in LIMITS.items()), counts
