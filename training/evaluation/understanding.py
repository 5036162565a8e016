"""Understanding (§6.7), by lmms-eval: its own command with the model `nextflow`, and its results as a report."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...atomic import write_json, write_text
from .report import to_markdown


# Those of the paper's table 13.
TASKS = ("mmstar", "chartqa", "ocrbench", "mme", "mmbench_en_dev", "mmmu_val", "textvqa_val")
# Shares that tables print as percentages.
PERCENT = (
    *("mmstar average", "chartqa relaxed_overall", "ocrbench ocrbench_accuracy", "mmmu_val mmmu_acc"),
    "textvqa_val exact_match",
)


def evaluate_understanding(
    model: str,
    folder: Path,
    command: Sequence[str],
    *,
    tasks: Sequence[str] = TASKS,
    batch_size: int = 1,
    limit: int | None = None,
) -> list[Path]:
    """
    Runs lmms-eval in a process of its own; the files of the report.

    Args:
        model (`str`): Folder or Hub id of a pipeline.
        folder (`Path`): Folder of the report; lmms-eval writes below it.
        command (`Sequence[str]`): By which this was called, for the report.
        tasks (`Sequence[str]`, *optional*): Tasks of lmms-eval; by default those of the paper.
        batch_size (`int`, *optional*, defaults to 1): Questions at a time.
        limit (`int`, *optional*): Only the first so many questions of each task.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise ImportError("understanding needs the package lmms-eval, which asks the questions: pip install lmms-eval")
    output = folder / "lmms_eval"
    call = [sys.executable, "-m", "lmms_eval", "--model", "nextflow", "--model_args", f"pretrained={model}"]
    call += ["--tasks", ",".join(tasks), "--batch_size", str(batch_size), "--output_path", str(output)]
    call += ["--log_samples", *(["--limit", str(limit)] if limit else [])]
    if status := subprocess.run(call, check=False).returncode:
        raise ValueError(f"lmms-eval ended with status {status}: {' '.join(call)}")
    written = sorted(output.rglob("*results.json"), key=lambda path: path.stat().st_mtime)
    if not written:
        raise ValueError(f"lmms-eval wrote no results below {output}")
    values = read_results(json.loads(written[-1].read_text(encoding="utf-8")))
    options: dict[str, Any] = {"tasks": list(tasks)} | ({"count": limit} if limit else {})
    report = {"suite": "understanding", "model": model, "options": options, "complete": True, "groups": {}}
    report |= {"values": values, "provenance": {"command": list(command)}}
    files = [folder / "report.json", folder / "report.md"]
    write_json(files[0], report)
    write_text(files[1], to_markdown(f"understanding: {model}", report))
    return files


def read_results(results: dict[str, Any]) -> dict[str, float]:
    """`"task metric"` -> value, of all numbers but standard errors."""
    found = {}
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric = name.partition(",")[0]
            if isinstance(value, (int, float)) and "stderr" not in metric:
                key = f"{task} {metric}"
                found[key] = value * 100 if key in PERCENT else value
    return found
