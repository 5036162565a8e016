"""Benchmarks of images from text: GenEval, GenEval 2, DPG-Bench, WISE and PRISM-Bench."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from .benchmark import (
    OFFICIAL,
    Benchmark,
    Question,
    Request,
    Rows,
    Spec,
    by_category,
    find_file,
    mean,
    one_file,
    open_files,
    read_lines,
    with_overall,
)
from .suite import Answer, Sample


def _percentages(rows: Rows, name: str) -> dict[str, float]:
    """Kind -> percentage, over the single answers of all images."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for kind, value in row["kept"][name]:
            found.setdefault(kind, []).append(value)
    return {kind: 100 * mean(values) for kind, values in found.items()}


# ---- GenEval (arXiv 2310.11513)


def _read_geneval(folder: Path, language: str) -> Iterator[Request]:
    for index, row in enumerate(read_lines(find_file(folder, "evaluation_metadata.jsonl"))):
        yield Request(f"{index:05d}", row["prompt"], row["tag"], row)


def _lay_out_geneval(request: Request, files: list[Path]) -> dict[str, Any]:
    samples = {f"{request.id}/samples/{index:05d}.png": file for index, file in enumerate(files)}
    return {**samples, f"{request.id}/metadata.jsonl": json.dumps(request.row)}


GENEVAL = Spec(
    name="geneval",
    read=_read_geneval,
    questions=lambda request: [],
    score=lambda request, replies: {},
    figures=partial(with_overall, name="correct"),
    layout=_lay_out_geneval,
)


class GenEval(Benchmark):
    """
    GenEval: images and layout are made here, its detector scores them in an environment of its own, and `results`
    reads what that wrote.

    Args:
        results (`str`, *optional*): The `results.jsonl` of GenEval's `evaluate_images.py`.
        prompts, samples, count: Arguments of [`Benchmark`].
    """

    def __init__(
        self,
        prompts: str | None = None,
        *,
        results: str | None = None,
        samples: int | None = None,
        count: int | None = None,
    ):
        super().__init__(GENEVAL, prompts, samples=samples, count=count)
        rows = [] if results is None else read_lines(Path(results))
        self._correct = {"/".join(Path(row["filename"]).parts[-3:]): row["correct"] for row in rows}

    def check_judge(self) -> None:
        if not self._correct:
            raise ValueError(
                "GenEval has no score without its detector: pass --generate-only, run evaluation/evaluate_images.py "
                f"of {self.spec.about['prompts']} on the folder {OFFICIAL}, then --score-only with results=FILE"
            )

    def score(self, sample: Sample, answer: Answer) -> dict[str, Any]:
        """Whether the detector found all that the prompt says."""
        id, _, number = sample.id.rpartition("-")
        file = f"{id}/samples/{int(number):05d}.png"
        if file not in self._correct:
            raise ValueError(f"the results of GenEval's detector have no {file}")
        return {"correct": self._correct[file]}


# ---- GenEval 2 (arXiv 2512.16853)

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def answer_forms(answer: str) -> tuple[str, ...]:
    """The ways to write an answer that count as it: both cases, a leading space, and a number in digits."""
    words = [answer.lower(), answer.capitalize()]
    if answer.lower() in _NUMBERS:
        words.append(str(_NUMBERS.index(answer.lower()) + 1))
    return tuple(space + word for word in words for space in ("", " "))


def soft_tifa(probabilities: Sequence[float]) -> dict[str, float]:
    """
    Section 4: the arithmetic mean of the answers' probabilities estimates how many atoms of a prompt are right, their
    geometric mean whether the whole prompt is. In percent.
    """
    geometric = 0.0 if min(probabilities) <= 0 else math.exp(mean(map(math.log, probabilities)))
    return {"Soft-TIFA AM": 100 * mean(probabilities), "Soft-TIFA GM": 100 * geometric}


def _read_geneval2(folder: Path, language: str) -> Iterator[Request]:
    for index, row in enumerate(read_lines(find_file(folder, "geneval2_data.jsonl"))):
        yield Request(f"{index:03d}", row["prompt"], f"{row['atom_count']} atoms", row)


def _score_geneval2(request: Request, replies: list[float]) -> dict[str, Any]:
    return {**soft_tifa(replies), "atoms": [*zip(request.row["skills"], replies, strict=True)]}


def _figures_geneval2(rows: Rows) -> dict[str, float]:
    means = {name: mean(row["scores"][name] for row in rows) for name in ("Soft-TIFA AM", "Soft-TIFA GM")}
    return {**means, **_percentages(rows, "atoms")}


def _lay_out_geneval2(request: Request, files: list[Path]) -> dict[str, Any]:
    path = f"images/{request.id}.png"
    return {path: files[0], "image_paths.json": {request.prompt: str(files[0].parent.parent / OFFICIAL / path)}}


GENEVAL2 = Spec(
    name="geneval2",
    read=_read_geneval2,
    questions=lambda request: [
        Question("atom", text=question, answers=answer_forms(answer)) for question, answer in request.row["vqa_list"]
    ],
    score=_score_geneval2,
    figures=_figures_geneval2,
    layout=_lay_out_geneval2,
)


# ---- DPG-Bench (arXiv 2403.05135)


def dependent_score(answers: Mapping[int, bool], parents: Mapping[int, Sequence[int]]) -> float:
    """
    The percentage of questions that are answered with yes, where a question whose parent is not counts as no. They
    are gone through in their order, so that one that fell with its parent takes its own children with it. Parent 0 is
    none.
    """
    right = dict(answers)
    for question, its_parents in parents.items():
        right[question] = right[question] and all(right.get(parent, True) for parent in its_parents)
    return 100 * mean(right.values())


def _read_dpg(folder: Path, language: str) -> Iterator[Request]:
    items: dict[str, list[dict]] = {}
    with open(find_file(folder, "dpg_bench.csv"), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            items.setdefault(row["item_id"], []).append(row)
    for id, rows in items.items():
        yield Request(id, rows[0]["text"], "all", {"questions": rows})


def _score_dpg(request: Request, replies: list[bool]) -> dict[str, Any]:
    rows = request.row["questions"]
    numbers = [int(row["proposition_id"]) for row in rows]
    parents = {number: [int(one) for one in row["dependency"].split(",")] for number, row in zip(numbers, rows)}
    kinds = [row["tuple"].partition("(")[0].partition("-")[0].strip().capitalize() for row in rows]
    score = dependent_score(dict(zip(numbers, replies, strict=True)), parents)
    return {"DPG": score, "answers": [*zip(kinds, map(float, replies))]}


def _lay_out_dpg(request: Request, files: list[Path]) -> dict[str, Any]:
    """One image, or a grid with two columns, read row by row."""
    if len(files) == 1:
        return {f"{request.id}.png": files[0]}
    images = open_files(*files)
    width, height = images[0].size
    grid = Image.new("RGB", (2 * width, height * ((len(images) + 1) // 2)))
    for index, image in enumerate(images):
        grid.paste(image, (index % 2 * width, index // 2 * height))
    return {f"{request.id}.png": grid}


DPG = Spec(
    name="dpg",
    read=_read_dpg,
    questions=lambda request: [
        Question("question", count=0, text=row["question_natural_language"]) for row in request.row["questions"]
    ],
    score=_score_dpg,
    figures=lambda rows: {**_percentages(rows, "answers"), "Overall": mean(row["scores"]["DPG"] for row in rows)},
    layout=_lay_out_dpg,
)


# ---- WISE (arXiv 2503.07265) and its update of 2026, WISE_Verified

_WISE_CATEGORIES = {
    "cultural knowledge": "Cultural",
    "time": "Time",
    "space": "Space",
    "biology": "Biology",
    "physical knowledge": "Physics",
    "chemistry": "Chemistry",
}


def wiscore(consistency: float, realism: float, aesthetics: float) -> float:
    """Three scores from 0 to 2, of which agreement with the knowledge counts most: 0 to 1."""
    return (0.7 * consistency + 0.2 * realism + 0.1 * aesthetics) / 2


def _read_wise(folder: Path, language: str, suffix: str = "") -> Iterator[Request]:
    for name in ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science"):
        for row in json.loads(find_file(folder, f"{name}{suffix}.json").read_text(encoding="utf-8")):
            category = _WISE_CATEGORIES[row["Category"].lower()]
            yield Request(str(row["prompt_id"]), row["Prompt"], category, {"explanation": row["Explanation"]})


def _figures_wise(rows: Rows, weights: Sequence[float]) -> dict[str, float]:
    """No overall score unless all six categories are there."""
    found = by_category(rows)
    names = list(_WISE_CATEGORIES.values())
    if set(names) <= found.keys():
        found["Overall"] = sum(weight * found[name] for weight, name in zip(weights, names, strict=True))
    return found


WISE = Spec(
    name="wise",
    read=_read_wise,
    questions=lambda request: [Question("wise", count=3, high=2)],
    score=lambda request, replies: {"score": wiscore(*replies[0])},
    figures=partial(_figures_wise, weights=(0.4, 0.167, 0.133, 0.1, 0.1, 0.1)),
)
WISE_VERIFIED = Spec(
    name="wise_verified",
    read=partial(_read_wise, suffix="_verified"),
    questions=lambda request: [Question("wise_verified", high=1)],
    score=lambda request, replies: {"score": replies[0][0]},
    figures=partial(_figures_wise, weights=(0.4, 0.12, 0.12, 0.12, 0.12, 0.12)),
)


# ---- PRISM-Bench (arXiv 2509.09680)

PRISM_TRACKS = ("imagination", "entity", "text_rendering", "style", "affection", "composition", "long_text")


def _read_prism(folder: Path, language: str) -> Iterator[Request]:
    for track in PRISM_TRACKS:
        file = find_file(folder, f"captions/{language}/{track}.jsonl", f"{track}.jsonl")
        for index, row in enumerate(read_lines(file)):
            yield Request(f"{track}-{index}", row["prompt"], track, {"index": index})


def _score_prism(request: Request, replies: list[list[float]]) -> dict[str, float]:
    """Scores from 0 to 10, as the official questions have them, in percent."""
    (alignment,), (looks,) = replies
    return {"alignment": 10 * alignment, "aesthetic": 10 * looks, "score": 5 * (alignment + looks)}


PRISM = Spec(
    name="prism",
    read=_read_prism,
    questions=lambda request: [Question(f"alignment_{request.category}"), Question("aesthetic")],
    score=_score_prism,
    figures=with_overall,
    layout=one_file("images/{request.category}/{row[index]}.png"),
)

geneval = GenEval
geneval2, dpg, wise, wise_verified, prism = (
    partial(Benchmark, spec) for spec in (GENEVAL2, DPG, WISE, WISE_VERIFIED, PRISM)
)
