"""The results of a Shapes evaluation: rates with their intervals, as data, as tables and as contact sheets."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from ...atomic import write_file
from .shapes_trials import KINDS


PASS_COLOR, FAIL_COLOR, GIVEN_COLOR = (40, 170, 70), (215, 40, 40), (200, 200, 200)


@dataclass(frozen=True)
class ShapesResult:
    """One judged answer. `kind` is one of `KINDS`, `category` one of its own; `checks` are rates or booleans."""

    kind: str
    category: str
    text: str
    passed: bool
    checks: dict[str, float]
    answer: str = ""
    sources: tuple[Image.Image, ...] = field(default=(), repr=False)
    pictures: tuple[Image.Image, ...] = field(default=(), repr=False)


def wilson_interval(passed: int, total: int) -> tuple[float, float]:
    """95% interval of a rate (Wilson score); (0, 1) without samples."""
    if total == 0:
        return 0.0, 1.0
    z, rate = 1.96, passed / total
    center = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True)
class ShapesReport:
    """All results of one evaluation, and their summaries."""

    results: tuple[ShapesResult, ...]
    seed: int

    def select(self, kind: str, category: str | None = None) -> list[ShapesResult]:
        """The results of a kind, and of a category if given."""
        return [item for item in self.results if item.kind == kind and category in (None, item.category)]

    def to_dict(self) -> dict:
        """Rates by kind and category, as plain data. "overall" is the mean of the categories, as in GenEval."""
        summary: dict = {"seed": self.seed}
        for kind in KINDS:
            categories = KINDS[kind].categories
            rows = {name: _summarize(self.select(kind, name)) for name in categories if self.select(kind, name)}
            if rows:
                overall = sum(row["passed"] / row["total"] for row in rows.values()) / len(rows)
                summary[kind] = {"overall": overall, "all": _summarize(self.select(kind)), "categories": rows}
        return summary

    def to_markdown(self) -> str:
        """A table of every kind, by category."""
        lines: list[str] = []
        report = self.to_dict()
        for kind in KINDS:
            if kind not in report:
                continue
            summary = report[kind]
            checks = sorted({name for row in summary["categories"].values() for name in row["checks"]})
            lines += [
                f"| {KINDS[kind].title} | passed | of | rate | 95% interval | {' | '.join(checks)} |",
                "|---|" + "---:|" * (4 + len(checks)),
            ]
            for name, row in (*summary["categories"].items(), ("all", summary["all"])):
                low, high = row["interval"]
                cells = [f"{row['checks'][check]:.3f}" if check in row["checks"] else "" for check in checks]
                lines.append(
                    f"| {name} | {row['passed']} | {row['total']} | {row['rate']:.3f} | {low:.3f} to {high:.3f} | "
                    f"{' | '.join(cells)} |"
                )
            lines += [f"| **mean of categories** | | | **{summary['overall']:.3f}** | |{' |' * len(checks)}", ""]
        return "\n".join(lines)

    def save_contact_sheet(self, path: str | Path, *, kind: str = "prompt", limit: int = 60, columns: int = 6) -> None:
        """
        Saves the first `limit` answers of a kind: what was given in grey frames, what was drawn in a green (passed) or
        red one, over what was asked and what was answered.
        """
        tiles = [_draw_tile(item) for item in self.select(kind)[:limit]]
        if not tiles:
            raise ValueError(f"no results of kind {kind!r} to show, got {len(self.results)} results of other kinds")
        width, height = max(tile.width for tile in tiles), tiles[0].height
        sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height), "white")
        for index, tile in enumerate(tiles):
            sheet.paste(tile, (index % columns * width, index // columns * height))
        write_file(path, sheet.save)

    def save_contact_sheets(self, folder: str | Path) -> list[Path]:
        """A contact sheet of each kind in `folder`, named by its plural."""
        paths = {kind: Path(folder) / f"{KINDS[kind].plural}.png" for kind in KINDS if self.select(kind)}
        for kind, path in paths.items():
            self.save_contact_sheet(path, kind=kind, columns=3 if kind in ("storyline", "example") else 6)
        return list(paths.values())


def _summarize(results: list[ShapesResult]) -> dict:
    """Counts, rate, interval, and the rate of every check over the results that have it."""
    passed, total = sum(item.passed for item in results), len(results)
    checks: dict[str, list[bool]] = {}
    for item in results:
        for name, holds in item.checks.items():
            checks.setdefault(name, []).append(holds)
    return {
        "passed": passed,
        "total": total,
        "rate": passed / total,
        "interval": wilson_interval(passed, total),
        "checks": {name: sum(values) / len(values) for name, values in checks.items()},
    }


def _draw_tile(item: ShapesResult, size: int = 128, frame: int = 4, text_height: int = 40) -> Image.Image:
    outcome = PASS_COLOR if item.passed else FAIL_COLOR
    framed = [(picture, GIVEN_COLOR if item.pictures else outcome) for picture in item.sources]
    framed += [(picture, outcome) for picture in item.pictures]
    columns = max(1, len(framed))  # an answer without the picture that it should have leaves its place empty
    tile = Image.new("RGB", (columns * (size + 2 * frame) + frame, size + 3 * frame + text_height), "white")
    for index, (picture, color) in enumerate(framed):
        fitted = ImageOps.pad(picture.convert("RGB"), (size, size), Image.Resampling.NEAREST, color="white")
        tile.paste(ImageOps.expand(fitted, frame, color), (index * (size + 2 * frame), frame))
    lines, line_length = [""], 22 * columns
    for word in f"{item.text}{': ' if item.answer else ''}{item.answer}".split():
        if len(lines[-1]) + len(word) + 1 > line_length and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    ImageDraw.Draw(tile).multiline_text((frame, size + 3 * frame), "\n".join(lines[:3]), fill="black", spacing=2)
    return tile
