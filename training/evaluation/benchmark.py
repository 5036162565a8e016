"""Benchmarks as a table: prompts -> requests -> the folder that the official scorer reads -> questions -> figures.

Formulas, file formats and layouts are the benchmarks' own; the questions are ours (`questions.yaml`) unless a folder
brings the official ones. Knows neither a benchmark (`generation`, `editing`) nor a model.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageOps

from ...atomic import write_file, write_json, write_text
from .judges import Judge, LocalJudge, check_judge, load_judge, read_scores, read_yes
from .runner import EvaluationRun
from .suite import Answer, Sample, Turn, images_of


OFFICIAL = "official"  # the folder that the benchmark's own scorer reads
OWN_QUESTIONS = Path(__file__).with_name("questions.yaml")
# Title, prompts and published figures of each, and of the suites that are no benchmarks but have published figures.
BENCHMARKS = yaml.safe_load(Path(__file__).with_name("benchmarks.yaml").read_text(encoding="utf-8"))
# Where a question's text has the prompt; official texts write it in these ways.
PROMPT_PLACES = ("<prompt>", "<instruction>", "<edit_prompt>", "{text_prompt}")
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Request:
    """
    One prompt of a benchmark.

    Args:
        id (`str`): Unique, and a valid file name.
        prompt (`str`): What the model is asked for.
        category (`str`): Its row in the report.
        row (`Mapping`, *optional*): The benchmark's own row, for questions, formulas and the layout.
        open_images (`Callable`, *optional*): Opens the source images; none by default.
    """

    id: str
    prompt: str
    category: str
    row: Mapping[str, Any] = field(default_factory=dict)
    open_images: Callable[[], list[Image.Image]] = list


@dataclass(frozen=True)
class Question:
    """
    One question to the judge.

    Args:
        name (`str`): Names its text in `questions.yaml` and in a folder of official questions.
        count (`int`, *optional*, defaults to 1): Numbers that the answer has; 0 asks for yes or no.
        low, high (`int`, *optional*, default to 0 and 10): Their range.
        answers (`tuple[str, ...]`, *optional*): Asks for the probability of these instead.
        sources (`bool`, *optional*, defaults to `False`): Show the source images before the result.
        text (`str`, *optional*): The benchmark's own, at the place `<question>`.
    """

    name: str
    count: int = 1
    low: int = 0
    high: int = 10
    answers: tuple[str, ...] = ()
    sources: bool = False
    text: str = ""


def one_file(path: str) -> Callable[[Request, list[Path]], dict[str, Any]]:
    """A layout of one image for each request."""
    return lambda request, files: {path.format(request=request, row=request.row): files[0]}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """
    A benchmark.

    Args:
        name (`str`): Name of its suite, and its key in `benchmarks.yaml`.
        read (`Callable`): (folder, or data set where there is a `hub`; language) -> requests.
        questions (`Callable`): Request -> questions.
        score (`Callable`): (request, the judge's replies: lists of numbers, booleans or probabilities) -> scores.
        figures (`Callable`): Rows of results -> the figures that are published.
        layout (`Callable`): (request, files of its images) -> path in the official layout -> an image file, an image,
            a text, or a dict, which is merged with those of the other requests.
    """

    name: str
    read: Callable[[Any, str], Iterator[Request]]
    questions: Callable[[Request], list[Question]]
    score: Callable[[Request, list], dict[str, Any]]
    figures: Callable[[Rows], dict[str, float]]
    layout: Callable[[Request, list[Path]], dict[str, Any]] = one_file("{request.id}.png")

    @property
    def about(self) -> dict[str, Any]:
        """Its entry in `benchmarks.yaml`."""
        return BENCHMARKS[self.name]


class Benchmark:
    """
    The suite of a [`Spec`].

    Args:
        spec ([`Spec`]): Which benchmark.
        prompts (`str`, *optional*): Folder of its prompts, or a data set's name on the Hub.
        judge, judge_model (`str`, *optional*): See [`load_judge`].
        judge_prompts (`str`, *optional*): Folder of official questions instead of ours: NAME.txt, or
            `prompts.json` or `judge_prompt.json` with NAME -> text.
        samples (`int`, *optional*): Images of each prompt; the benchmark's number by default.
        count (`int`, *optional*): Only the first so many prompts.
        language (`str`, *optional*, defaults to `"en"`): Language of the prompts, where there are several.
    """

    def __init__(
        self,
        spec: Spec,
        prompts: str | None = None,
        *,
        judge: str | None = None,
        judge_model: str | None = None,
        judge_prompts: str | None = None,
        samples: int | None = None,
        count: int | None = None,
        language: str = "en",
    ):
        self.spec, self.name, self.samples = spec, spec.name, samples or spec.about.get("samples", 1)
        self._named = (judge, judge_model, spec.about["title"])
        own = yaml.safe_load(OWN_QUESTIONS.read_text(encoding="utf-8"))
        self.texts = own if judge_prompts is None else read_questions(Path(judge_prompts))
        source = prompts or "the data set"
        try:
            requests = list(spec.read(find_prompts(spec, prompts), language))[:count]
        except KeyError as error:
            raise ValueError(f"a row of {source} has no {error}, which {spec.name} asks for") from error
        if not requests:
            raise ValueError(f"{source} has no prompts of {spec.name} in the language {language!r}")
        self.requests = {request.id: request for request in requests}
        self.ids = [f"{request.id}-{number}" for request in requests for number in range(self.samples)]

    @cached_property
    def judge(self) -> Judge:
        """Loaded when it is first asked. Raises `ValueError` where none is named."""
        return load_judge(*self._named)

    def check_judge(self) -> None:
        """Raises `ValueError` where nothing could be scored: before anything is generated."""
        check_judge(*self._named)

    @property
    def judged_by(self) -> dict[str, Any]:
        """The weights of a judge in this process, and the questions that are asked."""
        names = {question.name for request in self.requests.values() for question in self.spec.questions(request)}
        is_local = bool(names) and isinstance(self.judge, LocalJudge)  # who asks nothing has no judge
        questions = {name: text for name, text in self.texts.items() if name in names}
        return {**({"judge_weights": self.judge.model} if is_local else {}), "questions": questions}

    def sample(self, id: str) -> Sample:
        """One image of a request; its source images are opened."""
        request = self.requests[id.rpartition("-")[0]]
        parts = [{"type": "image", "image": image.convert("RGB")} for image in request.open_images()]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": request.prompt}]}]
        return Sample(id, [Turn("image", messages)], self.spec.about["title"], request.category, reference=request)

    def score(self, sample: Sample, answer: Answer) -> dict[str, Any]:
        """The benchmark's scores of one image; "judge" has the judge's words and probabilities."""
        (image,) = images_of(answer[0])
        sources = images_of(sample.turns[0].messages[0]["content"])
        request, said, replies = sample.reference, [], []
        for question in self.spec.questions(request):
            text, shown = self._text(question, request), [*(sources if question.sources else []), image]
            if question.answers:
                said.append(self.judge.probability(shown, text, question.answers))
                replies.append(said[-1])
                continue
            said.append(self.judge.ask(shown, text))
            limits = (question.count, question.low, question.high)
            replies.append(read_scores(said[-1], *limits) if question.count else read_yes(said[-1]))
        return {**self.spec.score(request, replies), "judge": said}

    def _text(self, question: Question, request: Request) -> str:
        if question.name not in self.texts:
            raise ValueError(f"--judge-prompts has no {question.name}.txt, which {self.name} asks for")
        fillings = dict.fromkeys(PROMPT_PLACES, request.prompt) | {"<question>": question.text}
        fillings |= {f"<{name}>": str(value) for name, value in request.row.items()}
        # In one pass: a value may itself contain the text of a placeholder.
        places = "|".join(map(re.escape, fillings))
        return re.sub(places, lambda found: fillings[found.group()], self.texts[question.name])

    def summarize(self, answers: Iterable, results: Rows) -> dict[str, float]:
        """The figures that the benchmark publishes."""
        return self.spec.figures(results) if results else {}

    def lay_out(self, run: EvaluationRun) -> Path:
        """Links the images of complete requests to where the official scorer looks for them; the folder."""
        folder, answers, merged = run.folder / OFFICIAL, run.rows("answers"), {}
        for request in self.requests.values():
            rows = [answers.get(f"{request.id}-{number}") for number in range(self.samples)]
            files = [run.folder / part["image"] for row in rows if row for part in row["answer"][0]]
            if len(files) < self.samples:
                continue
            for path, content in self.spec.layout(request, files).items():
                if isinstance(content, dict):
                    merged[path] = {**merged.get(path, {}), **content}
                elif not below(folder, path).exists():
                    _put(folder / path, content)
        for path, content in merged.items():
            write_json(folder / path, content)
        return folder


def _put(path: Path, content: Path | Image.Image | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        write_text(path, content)
    elif isinstance(content, Image.Image):
        write_file(path, content.save)
    else:
        try:
            os.link(content, path)
        except OSError:  # another file system, or one without links
            shutil.copyfile(content, path)


def find_prompts(spec: Spec, prompts: str | None) -> Any:
    """The folder of a benchmark's prompts; the data set, where it is one. Raises `ValueError` where there is none."""
    about = spec.about
    source = prompts or about.get("hub")
    advice = f"get {about['files']} from {about['prompts']}, and name the folder with --prompts"
    if source is None:
        raise ValueError(f"{spec.name} needs its prompts: {advice}")
    try:
        if "hub" in about:
            import datasets

            return datasets.load_dataset(source, split="train")
        from huggingface_hub import snapshot_download

        return Path(source) if Path(source).is_dir() else Path(snapshot_download(source, repo_type="dataset"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"no prompts of {spec.name} at {source} ({reason}): {advice}") from error


def read_questions(folder: Path) -> dict[str, str]:
    """Name -> text of the questions in a folder."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}
    for name in ("prompts.json", "judge_prompt.json"):
        if (folder / name).is_file():
            found |= json.loads((folder / name).read_text(encoding="utf-8"))
    if not found:
        raise ValueError(f"{folder} has no questions for a judge, expected NAME.txt or prompts.json")
    return found


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names` that is in the folder."""
    for name in names:
        if below(folder, name).is_file():
            return folder / name
    raise ValueError(f"{folder} has no {' or '.join(names)}")


def below(folder: Path, name: str) -> Path:
    """A file of the folder. Rows of prompts name files, and may come from anybody: no others are read or written."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"the prompts name the file {name!r}, expected one in {folder}")
    return folder / name


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def open_files(*paths: Path) -> list[Image.Image]:
    """Images, turned as their metadata says."""
    return [ImageOps.exif_transpose(Image.open(path)) for path in paths]


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; NaN without values."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def by_category(rows: Rows, name: str = "score") -> dict[str, float]:
    """Category -> the mean of the score `name` over its rows, in the order in which categories come."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["category"], []).append(row["scores"][name])
    return {category: mean(values) for category, values in found.items()}


def with_overall(rows: Rows, name: str = "score") -> dict[str, float]:
    """The categories' means and "Overall", their mean: every category counts alike, however many rows it has."""
    found = by_category(rows, name)
    return {**found, "Overall": mean(found.values())}
