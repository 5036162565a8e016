"""What an evaluation asks and how its answers are scored: the protocol that a suite follows.

A suite is named by import path (`my_module:suite`): a function whose keyword arguments are the `key=value` of the
command, and which returns a [`Suite`]. It knows no model and no files; the runner knows no suite.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from ..common.import_path import import_object
from ..common.recipe import call_with


Part = dict[str, Any]  # {"type": "text", "text": ...} or {"type": "image", "image": PIL image}
Answer = list[list[Part]]  # of every turn

_BENCHMARKS = {
    "generation": ("geneval", "geneval2", "dpg", "wise", "wise_verified", "prism"),
    "editing": ("imgedit", "gedit", "omnicontext", "edit_canvas"),
}
# Short names of the suites of this package.
SUITES = {
    **{
        name: f"nextflow_hf.training.evaluation.{module}:{name}"
        for module, names in _BENCHMARKS.items()
        for name in names
    },
    "reconstruction": "nextflow_hf.training.evaluation.reconstruction_suite:suite",
    "shapes": "nextflow_hf.worlds.shapes:suite",
    "emoji": "nextflow_hf.worlds.emoji:suite",
}


class UnscoredError(ValueError):
    """One answer got no score: the run reports it, continues without it, and asks again when it is restarted."""


@dataclass(frozen=True)
class Turn:
    """
    What is said before one answer.

    Args:
        ability (`str`): Which answer: "image", "text", "think" (thoughts and an image), "interleave" (text and
            images), or "reconstruct" (the image itself, resized, and what is decoded of its codes).
        messages (`list[dict]`): Follow the turns before and their answers; image parts carry PIL images.
    """

    ability: str
    messages: list[dict]


@dataclass(frozen=True)
class Sample:
    """
    One conversation that waits for its answers.

    Args:
        id (`str`): Unique in the suite, and a valid file name.
        turns (`list[Turn]`): Each is answered with those before, and the model's own answers, in view.
        group (`str`): Its table in the report.
        category (`str`, *optional*): Its row in the table.
        settings (`dict`, *optional*): Passed to the pipeline's calls, such as `guidance_scale`.
        reference (*optional*): What `score` needs to know.
        true_images (`list[PIL.Image.Image]`, *optional*): Right ones, where they are known; contact sheets show them.
    """

    id: str
    turns: list[Turn]
    group: str
    category: str = "all"
    settings: dict[str, Any] = field(default_factory=dict)
    reference: Any = None
    true_images: list[Image.Image] = field(default_factory=list)


class Suite(Protocol):
    """
    A suite.

    Attributes:
        name (`str`): Names its folder and its report.
        ids (`Sequence[str]`): Names all samples, in one fixed order.
        judged_by (`dict[str, Any]`, *optional*):
            What decides the scores and may change under its name: modules, of which the weights count, and values.
    """

    name: str
    ids: Sequence[str]

    def sample(self, id: str) -> Sample:
        """The sample; images and sentences are made when it is asked for."""

    def score(self, sample: Sample, answer: Answer) -> dict[str, Any]:
        """
        Named values of one answer. "passed" is a rate with an interval in the report, the other numbers are means;
        what is no number, such as a judge's words, is kept in the row under "kept". Raises [`UnscoredError`].
        """

    def summarize(self, answers: Iterable[tuple[Sample, Answer]], results: Sequence[dict]) -> dict[str, float]:
        """Named values of all answers or all rows of results together, such as a Fréchet distance; often none."""


def images_of(parts: list[Part]) -> list:
    """The images among the parts of an answer."""
    return [part["image"] for part in parts if part["type"] == "image"]


def text_of(parts: list[Part]) -> str:
    """The text of an answer."""
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def check_upscale_factor(factor: Any) -> int:
    """The side of compared images in units of what the vision tokenizer decodes to; raises `ValueError`."""
    if type(factor) is not int or factor < 1:
        raise ValueError(f"upscale_factor is {factor!r}, expected a whole number of at least 1")
    return factor


def find_suite(name: str) -> Callable[..., Suite]:
    """The function that makes a suite, by short name or by import path."""
    path = SUITES.get(name, name)
    if ":" not in path:
        raise ValueError(f"there is no suite {name!r}, expected module:function or one of {', '.join(SUITES)}")
    found = import_object(path)
    if not callable(found):
        raise ValueError(f"{name} is {type(found).__name__}, expected a function that makes a suite")
    return found


def bind(name: str, function: Callable[..., Any], options: dict[str, Any]) -> Any:
    """`function(**options)`; options that it does not take are refused by name."""
    return call_with(function, options, f"the suite {name}, which takes {inspect.signature(function)}")


def make_suite(name: str, options: dict[str, Any]) -> Suite:
    """The suite with its options."""
    for key in ("count", "samples"):
        if isinstance(options.get(key), int) and options[key] < 1:
            raise ValueError(f"{key} is {options[key]}, expected at least 1")
    return bind(name, find_suite(name), options)
