"""One page of all evaluations of a model: tables beside published figures, images, speed, memory, command, revision.

It is `card.md` and `card.html` (with its images inside), and the `model-index` of a model card.
"""

import base64
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader

from ...atomic import write_text
from .benchmark import BENCHMARKS


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """A benchmark's figures; of another suite those of all samples, with the means of its only group, or its rates."""
    groups = report["groups"]
    if "prompts" in BENCHMARKS.get(report["suite"], {}):
        return report["values"]
    if len(groups) == 1:
        (group,) = groups.values()
        return {**group["values"], **report["values"]}
    rates = {name: group["values"]["passed"] for name, group in groups.items() if "passed" in group["values"]}
    return {**rates, **report["values"]}


def section(folder: Path) -> dict[str, Any]:
    """What the page says of the evaluation in a folder."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    found, published = figures(report), BENCHMARKS.get(report["suite"], {})
    columns = [name for name in published.get("columns", found) if name in found or published.get("rows")]
    rows = [(report["model"], [found.get(name) for name in columns], True)]
    for model, values in (published.get("rows") or {}).items():
        rows.append((model, [*values, *[None] * (len(columns) - len(values))], False))
    return {
        "title": published.get("title", report["suite"]),
        "columns": columns,
        "rows": rows,
        "source": published.get("source"),
        "notes": _notes(report, published),
        "facts": _facts(report),
        "commands": dict.fromkeys(
            shlex.join(report["provenance"][name]) for name in ("command", "scored_by") if name in report["provenance"]
        ),
        "images": [(name, folder / name) for name in report.get("sheets", ())],
        "report": report,
        "task": published.get("task", "any-to-any"),
    }


def _notes(report: Mapping[str, Any], published: Mapping[str, Any]) -> list[str]:
    """What keeps the first row from being compared with the others."""
    provenance, notes = report["provenance"], []
    if not report["complete"]:
        notes.append(f"Not complete: {report['samples']} samples have a score. No figure of the benchmark.")
    if "count" in report.get("options", {}):
        notes.append(f"Only the first {report['options']['count']} prompts. No figure of the benchmark.")
    if judge := provenance.get("judge"):
        name = provenance.get("judge_model") or judge
        asked = provenance.get("judge_prompts")
        words = f"the questions of {asked}" if asked else "our own questions, not the benchmark's"
        notes.append(f"Judged by {name} with {words}. The published judge is {published.get('judge', 'another')}.")
        if not asked:
            notes.append("Other questions give other scores: do not compare this row with published ones.")
    return notes


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    provenance, facts = report["provenance"], {}
    for name in ("revision", "seed", "settings"):
        if report.get(name) not in (None, {}):
            facts[name.capitalize()] = str(report[name])
    if "seconds_per_sample" in provenance:
        facts["Seconds a sample (median)"] = f"{provenance['seconds_per_sample']:.2f}"
        facts["Peak memory"] = f"{provenance['peak_bytes'] / 2**30:.2f} GiB, {provenance.get('memory_of', '')}"
    for name in ("hardware", "weights", "environment"):
        if name in provenance:
            value = provenance[name]
            both = value.items() if isinstance(value, Mapping) else [("", value)]
            facts[name.capitalize()] = ", ".join(f"{key} {one}".strip() for key, one in both)
    return facts


def eval_results(sections: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """Entries of a `model-index`: the figures of complete evaluations of whole benchmarks, and no others."""
    results = []
    for one in sections:
        report = one["report"]
        if not report["complete"] or "count" in report.get("options", {}):
            continue
        provenance = report["provenance"]
        judge = {"judge": provenance.get("judge_model") or provenance.get("judge")}
        judge["questions"] = provenance.get("judge_prompts", "of nextflow-hf")
        for name, value in figures(report).items():
            results.append(
                EvalResult(
                    task_type=one["task"],
                    dataset_type=report["suite"],
                    dataset_name=one["title"],
                    metric_type=name,
                    metric_value=round(value, 4),
                    metric_args=judge if judge["judge"] else None,
                )
            )
    return results


def write_card(model: str, folders: Sequence[Path], output: Path, *, update: bool = False) -> list[Path]:
    """
    Writes `card.md`, with a `model-index`, and `card.html`.

    Args:
        model (`str`): Name of the model; its folder, if it is one.
        folders (`Sequence[Path]`): Folders of evaluations, each with a `report.json`.
        output (`Path`): Folder of the page.
        update (`bool`, *optional*, defaults to `False`): Put the `model-index` into `README.md` of the model's folder.
    """
    if not folders:
        raise ValueError(f"there are no evaluations of {model}: run `nextflow-hf evaluate SUITE {model}` first")
    sections = [section(folder) for folder in folders]
    results = eval_results(sections)
    metadata = ModelCardData(model_name=Path(model).name, eval_results=results) if results else ModelCardData()
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=lambda name: "html" in name, trim_blocks=True
    )
    templates.filters |= {"number": _number, "data_url": _data_url}
    templates.filters["relative"] = lambda file: Path(os.path.relpath(file, output)).as_posix()
    files = []
    for kind in ("md", "html"):
        text = templates.get_template(f"card.{kind}.jinja").render(
            model=model, sections=sections, metadata=metadata.to_yaml()
        )
        files.append(output / f"card.{kind}")
        write_text(files[-1], text)
    if update:
        readme = Path(model) / "README.md"
        card = ModelCard.load(readme)
        card.data.model_name, card.data.eval_results = Path(model).name, results
        card.save(readme)
        files.append(readme)
    return files


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"


def _data_url(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
