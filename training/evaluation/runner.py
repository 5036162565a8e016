"""Runs a suite: sample by sample, on one process or several, so that a kill loses at most the sample in work.

The folder has `evaluation.json` (what is evaluated), `images/`, `answers-P.jsonl`, `results-P.jsonl` and
`unscored-P.jsonl` (samples that got no score, and why) of process P.
A line is appended and flushed to the disk when its images are; a line that a kill cut short is not counted. Processes
share the samples that are left, so a run may be resumed with another number. `timings-P.jsonl` has the seconds and
the peak memory of each sample, `scoring.json` what decides the scores, `judge.json` hashes of what that names. Knows
neither suites nor models.
"""

import contextlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from ...atomic import write_file, write_json
from ..common.processes import process_state
from .suite import Answer, Sample, Suite, UnscoredError, text_of


logger = logging.getLogger(__name__)

DESCRIPTION, SCORING, JUDGE, IMAGES = "evaluation.json", "scoring.json", "judge.json", "images"
MOST_UNSCORED = 20  # before the first score: a judge that is asked in a wrong way has none for any
SAMPLE_SEEDS = 1000  # between two samples: each turn has one


class EvaluationRun:
    """
    One evaluation in its folder.

    Args:
        suite ([`Suite`]): What is asked.
        folder (`Path`): Resumed if it is of the same evaluation.
        description (`dict`): What decides the answers: the suite, the model, the settings, the seed.
    """

    def __init__(self, suite: Suite, folder: Path, description: dict[str, Any]):
        if not suite.ids:
            raise ValueError(f"the suite {suite.name} has no samples")
        if wrong := [id for id, count in Counter(suite.ids).items() if count > 1 or Path(id).name != id]:
            raise ValueError(f"the suite {suite.name} has the ids {wrong[:3]}, expected file names that occur once")
        self.suite, self.folder, self.seed = suite, folder, description["seed"]
        self.settings = description.get("settings", {})
        self.state = process_state()
        self.claim(DESCRIPTION, description)

    def claim(self, name: str, description: dict[str, Any], decides: Collection[str] | None = None) -> None:
        """
        Writes what decides the answers or the scores: all of it, or the keys `decides`. Other values of these than
        those that are there are refused.
        """
        file, now = self.folder / name, json.loads(json.dumps(description))
        if file.exists():
            there = json.loads(file.read_text(encoding="utf-8"))
            keys = {*there, *now} if decides is None else decides
            if changed := sorted(key for key in keys if there.get(key) != now.get(key)):
                raise ValueError(
                    f"{self.folder} has an evaluation with other values of {', '.join(changed)}: name "
                    "another --output-dir, or remove it"
                )
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            write_json(file, now)
        self.state.wait_for_everyone()

    def generate(self, answer: Callable[[Sample, int], Answer], memory: Callable[[], int] = lambda: 0) -> None:
        """Answers to all samples that have none yet: `answer(sample, seed)`; `memory` is the peak so far, in bytes."""

        def work(index: int, sample: Sample) -> dict:
            seed = self.seed * 10_000_019 + index * SAMPLE_SEEDS
            started = time.perf_counter()
            turns = answer(sample, seed)
            seconds = time.perf_counter() - started
            self._append("timings", {"id": sample.id, "seconds": seconds, "peak_bytes": memory()})
            return {"seed": seed, "answer": [self._save(sample, seed, *turn) for turn in enumerate(turns)]}

        self._fill("answers", work)

    def score(self, scoring: dict[str, Any], judge: dict[str, str]) -> None:
        """
        Scores of all answers that have none yet; `scoring` is what decides them, such as the judge's path, and `judge`
        has hashes of what is there, for it may be trained on in place.
        """
        self.claim(SCORING, scoring)
        self.claim(JUDGE, judge)
        answers = self.rows("answers")

        def work(index: int, sample: Sample) -> dict:
            values = self.suite.score(sample, self.load(answers[sample.id]))
            kept = {name: value for name, value in values.items() if isinstance(value, (str, list, dict))}
            scores = {name: float(value) for name, value in values.items() if name not in kept}
            return {"scores": scores, **({"kept": kept} if kept else {})}

        self._fill("results", work, only=answers)

    def rows(self, kind: str) -> dict[str, dict]:
        """The finished lines of "answers", "timings", "results" or "unscored" by their samples' ids, in any order."""
        found = {}
        for path in sorted(self.folder.glob(f"{kind}-*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n"):
                with contextlib.suppress(ValueError):  # it was cut short, or is empty
                    row = json.loads(line)
                    found[row["id"]] = row
        return found

    def pairs(self) -> Iterator[tuple[Sample, Answer]]:
        """The samples that have answers, in the order of the suite."""
        rows = self.rows("answers")
        for id in self.suite.ids:
            if id in rows:
                yield self.suite.sample(id), self.load(rows[id])

    def load(self, row: dict) -> Answer:
        """The answer of a row of `rows("answers")`, with its images."""
        return [self._load(parts) for parts in row["answer"]]

    def _fill(self, kind: str, work: Callable[[int, Sample], dict], only: dict | None = None) -> None:
        done = self.rows(kind)
        left = [i for i, id in enumerate(self.suite.ids) if id not in done and (only is None or id in only)]
        self.state.wait_for_everyone()  # all have read what is done
        # Dealt out by turns: neighbours are of one category, so each process gets some of every kind.
        mine = left[self.state.process_index :: self.state.num_processes]
        unscored, has_worked = 0, bool(done) or kind != "results"
        for index in tqdm(mine, desc=kind, unit="sample", disable=not self.state.is_main_process):
            try:
                sample = self.suite.sample(self.suite.ids[index])
                row = {"id": sample.id, "group": sample.group, "category": sample.category, **work(index, sample)}
            except UnscoredError as error:
                logger.warning("no score for %s: %s", self.suite.ids[index], error)
                self._append("unscored", {"id": self.suite.ids[index], "reason": str(error)})
                unscored += 1
                if unscored == MOST_UNSCORED and not has_worked:
                    raise ValueError(f"none of the first {unscored} samples has a score: {error}") from error
                continue
            self._append(kind, row)
            has_worked = True
        self.state.wait_for_everyone()

    def _append(self, kind: str, row: dict) -> None:
        with open(self.folder / f"{kind}-{self.state.process_index}.jsonl", "a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(row)}\n")  # the first ends a line that was cut short
            file.flush()
            os.fsync(file.fileno())

    def _save(self, sample: Sample, seed: int, number: int, parts: list[dict]) -> list[dict]:
        """The parts with files instead of images; a file says how its image was made."""
        prompt = " / ".join(
            text_of(message["content"]) for turn in sample.turns[: number + 1] for message in turn.messages
        )
        saved = []
        for index, part in enumerate(parts):
            if part["type"] == "image":
                info = PngInfo()
                values = {
                    "prompt": prompt,
                    "seed": str(seed + number),
                    "settings": json.dumps({**sample.settings, **self.settings}),
                }
                for name, value in values.items():
                    info.add_itxt(name, value)
                file = f"{IMAGES}/{sample.id}-{number}-{index}.png"
                write_file(self.folder / file, partial(part["image"].save, pnginfo=info))
                part = {"type": "image", "image": file}
            saved.append(part)
        return saved

    def _load(self, parts: list[dict]) -> list[dict]:
        loaded = []
        for part in parts:
            if part["type"] == "image":
                with Image.open(self.folder / part["image"]) as image:
                    part = {"type": "image", "image": image.convert("RGB")}
            loaded.append(part)
        return loaded
