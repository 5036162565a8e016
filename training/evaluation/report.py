"""The report of an evaluation: rates with their intervals and means, as data, as tables and as contact sheets."""

import json
import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from ...atomic import write_file, write_json, write_text
from .runner import JUDGE, SCORING, EvaluationRun
from .suite import images_of, text_of


PASSED = "passed"
ORIGIN = "origin.json"  # what the command writes of what answers: command, weights, hardware
SHEET_COLUMNS = 6
TILE, FRAME, TEXT_HEIGHT, LINE_HEIGHT, MOST_LINES = 128, 4, 54, 13, 12
PASS_COLOR, FAIL_COLOR, GIVEN_COLOR, TRUE_COLOR = (40, 170, 70), (215, 40, 40), (200, 200, 200), (60, 110, 230)


def wilson_interval(passed: float, total: int) -> tuple[float, float]:
    """95% interval of a rate (Wilson score); (0, 1) without samples."""
    if total == 0:
        return 0.0, 1.0
    z, rate = 1.96, passed / total
    center = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, center - half), min(1.0, center + half)


def summarize(rows: Iterable[dict]) -> dict:
    """
    Groups of results -> "total", "values" (means), "interval" of the rate "passed", the same of every category, and
    "overall": the mean of the categories' rates, as GenEval has it.
    """
    groups: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        groups.setdefault(row["group"], {}).setdefault(row["category"], []).append(row["scores"])
    summary = {}
    for group in sorted(groups):
        categories = {name: _means(groups[group][name]) for name in sorted(groups[group])}
        found = _means([scores for of_category in groups[group].values() for scores in of_category])
        rates = [row["values"][PASSED] for row in categories.values() if PASSED in row["values"]]
        summary[group] = {**found, **({"overall": sum(rates) / len(rates)} if rates else {}), "categories": categories}
    return summary


def _means(scores: list[dict[str, float]]) -> dict:
    names = dict.fromkeys(name for one in scores for name in one)
    given = {name: [one[name] for one in scores if not math.isnan(one.get(name, math.nan))] for name in names}
    means = {name: sum(values) / len(values) for name, values in given.items() if values}
    row = {"total": len(scores), "values": means}
    return {**row, "interval": wilson_interval(sum(given[PASSED]), len(given[PASSED]))} if PASSED in means else row


def to_markdown(title: str, summary: dict) -> str:
    """What all answers have together, and a table of every group."""
    lines = [f"# {title}", "", *(f"{name}: {value:.4f}\n" for name, value in summary["values"].items())]
    unscored = summary.get("unscored", {})
    for id, reason in [*unscored.items()][:1]:
        lines += [f"Samples without a score, which count nowhere: {len(unscored)}, such as {id}: {reason}", ""]
    for group, found in summary["groups"].items():
        names = [name for name in found["values"] if name != PASSED]
        rate = ["passed", "95% interval"] if PASSED in found["values"] else []
        lines += [
            f"| {' | '.join([group, 'samples', *rate, *names])} |",
            "|---|" + "---:|" * (1 + len(rate) + len(names)),
        ]
        rows = [*found["categories"].items(), ("all", found)] if len(found["categories"]) > 1 else [("all", found)]
        for name, row in rows:
            cells = [name, str(row["total"])]
            if rate and PASSED not in row["values"]:
                cells += ["", ""]
            elif rate:
                low, high = row["interval"]
                cells += [f"{row['values'][PASSED]:.3f}", f"{low:.3f} to {high:.3f}"]
            cells += [f"{row['values'][other]:.3f}" if other in row["values"] else "" for other in names]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def write_report(
    run: EvaluationRun, description: dict, command: Sequence[str], sheet_samples: int
) -> tuple[dict, list[Path]]:
    """
    Writes `report.json`, `report.md` and a contact sheet of each group with images, of its first `sheet_samples`; what
    it says, and the files. `command` is that of the scores.
    """
    results = run.rows("results")
    ordered = [results[id] for id in run.suite.ids if id in results]
    summary = {**description, "complete": len(ordered) == len(run.suite.ids), "samples": len(ordered)}
    summary |= {"groups": summarize(ordered), "values": run.suite.summarize(run.pairs(), ordered)}
    summary["provenance"] = {**_provenance(run), "scored_by": list(command)}
    summary["unscored"] = {id: row["reason"] for id, row in run.rows("unscored").items() if id not in results}
    title = f"{description['suite']}: {len(ordered)} of {len(run.suite.ids)} samples, {description['model']}"
    files = [run.folder / "report.json", run.folder / "report.md"]
    write_text(files[1], to_markdown(title, summary))
    answers = run.rows("answers")
    for group in summary["groups"]:
        shown = [row for row in ordered if row["group"] == group][:sheet_samples]
        tiles = [_draw_tile(run, answers[row["id"]], row) for row in shown]
        if any(tile.width > 1 for tile in tiles):
            files.append(run.folder / f"{group.replace(' ', '_').replace(',', '')}.png")
            write_file(files[-1], _sheet(tiles).save)
    summary["sheets"] = [file.name for file in files[2:]]
    write_json(files[0], summary)
    return summary, files


def _provenance(run: EvaluationRun) -> dict:
    """Where the figures come from: what the folder keeps, the median time of a sample, and the peak of the memory."""
    found = {}
    for name in (ORIGIN, SCORING, JUDGE):
        if (run.folder / name).is_file():
            found |= json.loads((run.folder / name).read_text(encoding="utf-8"))
    timings = run.rows("timings").values()
    if timings:
        found["seconds_per_sample"] = statistics.median(row["seconds"] for row in timings)
        found["peak_bytes"] = max(row["peak_bytes"] for row in timings)
    return found


def _draw_tile(run: EvaluationRun, answer: dict, result: dict) -> Image.Image:
    """
    What was given in grey frames, what was answered in a green (passed) or red one, and what is true in a blue one,
    over the words.
    """
    sample = run.suite.sample(answer["id"])
    messages = [message for turn in sample.turns for message in turn.messages if message["role"] == "user"]
    given = [image for message in messages for image in images_of(message["content"])]
    outcome = PASS_COLOR if result["scores"].get(PASSED, 1.0) == 1.0 else FAIL_COLOR
    framed = [(image, GIVEN_COLOR) for image in given] + [
        (image, outcome) for parts in run.load(answer) for image in images_of(parts)
    ]
    framed += [(image, TRUE_COLOR) for image in sample.true_images]
    words = [text_of(message["content"]) for message in messages]
    words += [f"-> {text}" for parts in answer["answer"] if (text := text_of(parts))]
    columns = max(1, len(framed))
    lines = textwrap.wrap(" / ".join(words), 22 * columns)[:MOST_LINES]
    text_height = max(TEXT_HEIGHT, LINE_HEIGHT * len(lines) + FRAME)
    tile = Image.new("RGB", (columns * (TILE + 2 * FRAME) + FRAME, TILE + 3 * FRAME + text_height), "white")
    for index, (image, color) in enumerate(framed):
        fitted = ImageOps.pad(image.convert("RGB"), (TILE, TILE), Image.Resampling.NEAREST, color="white")
        tile.paste(ImageOps.expand(fitted, FRAME, color), (index * (TILE + 2 * FRAME), FRAME))
    pen = ImageDraw.Draw(tile)
    if not framed:
        pen.rectangle((0, FRAME, FRAME, TILE), fill=outcome)
    pen.multiline_text((FRAME, TILE + 3 * FRAME), "\n".join(lines), fill="black", spacing=1)
    return tile


def _sheet(tiles: list[Image.Image]) -> Image.Image:
    """Tiles in rows, each as wide as it is."""
    width = max(SHEET_COLUMNS * (TILE + 3 * FRAME), max(tile.width for tile in tiles))
    places, x, y, height = [], 0, 0, 0
    for tile in tiles:
        if x + tile.width > width:
            x, y, height = 0, y + height, 0
        places.append((x, y))
        x, height = x + tile.width, max(height, tile.height)
    sheet = Image.new("RGB", (width, y + height), "white")
    for tile, place in zip(tiles, places, strict=True):
        sheet.paste(tile, place)
    return sheet
