"""One page of all evaluations of a model: tables beside published figures, images, speed, memory, command, revision.

It is `card.md` and `card.html` (with its images inside), and a section and the `model-index` of a model card.
"""

import base64
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader

from ...atomic import write_text
from ..common.folders import without_folders
from .benchmark import BENCHMARKS
from .report import PASSED


# The Hub's names of what a group of a world asks for.
HUB_TASKS = {
    "text_to_image": "text-to-image",
    "edit": "image-to-image",
    "subject": "image-to-image",
    "caption": "image-to-text",
    "questions": "visual-question-answering",
}
# Options of a world's suite that tell one evaluation of it from another.
TELLING = ("concepts", "resolution", "sizes", "split", "categories")
SHEET_CAPTION = (
    "the first samples, none left out: what passed in green, what did not in red, what was given in grey, "
    "what is true in blue"
)


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
    if _is_sampled(report):
        columns, rows = _group_table(report)
    else:
        columns = [name for name in published.get("columns", found) if name in found or published.get("rows")]
        rows = [(without_folders(report["model"]), [found.get(name) for name in columns], True)]
        for model, values in (published.get("rows") or {}).items():
            rows.append((model, [*values, *[None] * (len(columns) - len(values))], False))
    return {
        "title": published.get("title", _title(report)),
        "columns": columns,
        "rows": rows,
        "source": published.get("source"),
        "notes": _notes(report, published),
        "facts": _facts(report),
        "commands": dict.fromkeys(
            shlex.join(map(without_folders, report["provenance"][name]))
            for name in ("command", "scored_by")
            if name in report["provenance"]
        ),
        "images": [(name, folder / name) for name in report.get("sheets", ())],
        "report": report,
        "task": published.get("task", "any-to-any"),
    }


def _is_sampled(report: Mapping[str, Any]) -> bool:
    """Whether a suite makes its samples, in any number, and passes or fails each: a world's does, no benchmark."""
    passed = [PASSED in group["values"] for group in report["groups"].values()]
    return report["suite"] not in BENCHMARKS and any(passed)


def _title(report: Mapping[str, Any]) -> str:
    options = {name: report["options"][name] for name in TELLING if name in report.get("options", {})}
    return ", ".join([report["suite"], *(f"{name} {_said(value)}" for name, value in options.items())])


def _said(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return " and ".join("x".join(map(str, one)) if isinstance(one, list) else str(one) for one in value)


def _group_table(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[Any], bool]]]:
    """Columns, and a row for each group and, under it, for each of its categories."""
    named: list[tuple[str, Mapping[str, Any], bool]] = []
    for group, found in report["groups"].items():
        named.append((group, found, True))
        if len(found["categories"]) > 1:
            named += [(f"{group}: {name}", row, False) for name, row in found["categories"].items()]
    others = dict.fromkeys(name for _, row, _ in named for name in row["values"] if name != PASSED)
    rows = []
    for name, row, is_group in named:
        interval = "{:.2f} to {:.2f}".format(*row["interval"]) if "interval" in row else ""
        rate = [row["total"], row["values"].get(PASSED), interval]
        rows.append((name, [*rate, *(row["values"].get(other) for other in others)], is_group))
    return ["samples", PASSED, "95% interval", *others], rows


def _notes(report: Mapping[str, Any], published: Mapping[str, Any]) -> list[str]:
    """Why the first row does not compare with the published ones."""
    provenance, notes = report["provenance"], []
    if not report["complete"]:
        notes.append(f"Not complete: {report['samples']} samples have a score. No figure of the benchmark.")
    if _is_sampled(report):
        return notes
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
    judge = provenance.get("judge")
    if _is_sampled(report) and judge and (file := Path(judge, "report.json")).is_file():
        rates = json.loads(file.read_text(encoding="utf-8")).items()
        said = [
            f"{side} px {rate['things']:.1%} of the sprites, {rate['passed']:.1%} of the scenes"
            for side, rate in rates
        ]
        facts["The judge on true scenes"] = "; ".join(said)
    for name in ("hardware", "weights", "environment"):
        if name in provenance:
            value = provenance[name]
            both = value.items() if isinstance(value, Mapping) else [("", value)]
            facts[name.capitalize()] = ", ".join(f"{key} {one}".strip() for key, one in both)
    return facts


def eval_results(sections: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """
    Entries of a `model-index`: the figures of complete evaluations of whole benchmarks, and the rates of a world's
    tasks, of as many samples as were made.
    """
    results = []
    for one in sections:
        report = one["report"]
        if report["complete"] and _is_sampled(report):
            results += _rates(one)
            continue
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


def _rates(one: Mapping[str, Any]) -> Iterator[EvalResult]:
    for group, found in one["report"]["groups"].items():
        if PASSED not in found["values"]:
            continue
        yield EvalResult(
            task_type=HUB_TASKS.get(re.split(r"\W", group)[0], "any-to-any"),
            dataset_type=one["report"]["suite"],
            dataset_name=f"{one['title']}: {group}",
            dataset_config=f"{one['title']}: {group}",  # the Hub tells results apart by it
            metric_type="accuracy",
            metric_name=PASSED,
            metric_value=round(found["values"][PASSED], 4),
        )


def write_card(model: str, folders: Sequence[Path], output: Path, *, update: bool = False) -> list[Path]:
    """
    Writes `card.md`, with a `model-index`, and `card.html`.

    Args:
        model (`str`): Name of the model; its folder, if it is one.
        folders (`Sequence[Path]`): Folders of evaluations, each with a `report.json`.
        output (`Path`): Folder of the page.
        update (`bool`, *optional*, defaults to `False`):
            Put the `model-index` and a section "Evaluation", with its sheets, into the model's folder and its
            `README.md`, instead of older ones.
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
    page = {"model": without_folders(model), "sections": sections, "metadata": metadata.to_yaml()}
    files = []
    for kind in ("md", "html"):
        files.append(output / f"card.{kind}")
        write_text(files[-1], templates.get_template(f"card.{kind}.jinja").render(page))
    if update:
        files.append(_update(Path(model), sections, results, templates))
    return files


def _update(model: Path, sections: list[dict[str, Any]], results: list[EvalResult], templates: Environment) -> Path:
    """Put evaluations into a model's folder; returns its `README.md`."""
    for sheet in model.glob("evaluation-*.png"):
        sheet.unlink()
    for number, one in enumerate(sections, start=1):
        sheets = {name: model / f"evaluation-{number}-{name}" for name, _ in one["images"]}
        for name, file in one["images"]:
            shutil.copyfile(file, sheets[name])
        one["images"] = [(f"{name.rpartition('.')[0]}: {SHEET_CAPTION}", sheet) for name, sheet in sheets.items()]
    templates.filters["relative"] = lambda file: file.name
    section = templates.get_template("sections.md.jinja").render(sections=sections, heading="###")
    card = ModelCard.load(model / "README.md")
    card.data.eval_results = results or None
    card.data.model_name = (card.data.model_name or model.name) if results else None
    card.text = replaced_section(card.text, "Evaluation", section)
    card.save(model / "README.md")
    return model / "README.md"


def replaced_section(text: str, title: str, section: str) -> str:
    """Markdown with another section of this title, in its place, or else before what stands at the end of a card."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    kept = [part for part in parts if not part.startswith(f"## {title}\n")]
    last = [index for index, part in enumerate(kept) if re.match(r"## (Limits|Credits|Citation)\n", part)]
    found = [index for index, part in enumerate(parts) if part.startswith(f"## {title}\n")]
    place = (found or last or [len(kept)])[0]
    return "".join([*kept[:place], f"## {title}\n\n{section.strip()}\n\n", *kept[place:]]).rstrip() + "\n"


def _number(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"


def _data_url(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
