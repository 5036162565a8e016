"""What a Shapes model is asked in its evaluation: held-out conversations of every kind, and the judge of each answer.

Trial `i` of a kind depends on (seed, i) alone, so a longer evaluation begins with the shorter one.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from PIL import Image

from ...processing.messages_nextflow import split_reasoning
from ..shapes import CATEGORIES, EDIT_TASKS, Scene, render, sample_edit, sample_prompt, sample_scene
from ..shapes.captions import pick
from ..shapes.dataset import (
    caption_messages,
    edit_messages,
    example_messages,
    prompt_messages,
    question_messages,
    story_messages,
    thinking_messages,
)
from ..shapes.examples import EXAMPLE_TASKS, sample_examples
from ..shapes.judge import Verdict, judge_edit, judge_prompt, judge_scene, judge_story
from ..shapes.storylines import STORY_KINDS, sample_story
from ..shapes.thinking import THINKING_CATEGORIES, sample_implied
from ..shapes.understanding import (
    CAPTION_CATEGORIES,
    CAPTION_REQUESTS,
    QUESTION_CATEGORIES,
    caption,
    judge_answer,
    judge_caption,
    sample_questions,
    sample_view,
)


Part = dict[str, Any]  # {"type": "text", "text": ...} or {"type": "image", "image": PIL image}
Conversation = list[dict[str, Any]]


Judge = Callable[[list[Part]], tuple[bool, dict[str, float]]]


@dataclass(frozen=True)
class Trial:
    """One conversation that waits for its answer.

    Args:
        text (`str`): What is asked, for people.
        messages (`list[dict]`): The conversation, its image parts with their pictures.
        solution (`list[dict]`): The parts of one right answer.
        judge (`Callable`): The parts of an answer to whether it is right, and its checks.
    """

    text: str
    messages: Conversation
    solution: list[Part]
    judge: Judge

    @property
    def sources(self) -> tuple[Image.Image, ...]:
        """The pictures that are given."""
        return tuple(pictures_of([part for message in self.messages for part in message["content"]]))


def pictures_of(parts: list[Part]) -> list[Image.Image]:
    """The pictures among the parts of a message."""
    return [part["image"] for part in parts if part["type"] == "image"]


def text_of(parts: list[Part]) -> str:
    """The text of a message."""
    return " ".join(part["text"] for part in parts if part["type"] == "text")


@dataclass(frozen=True)
class Kind:
    """A kind of trials.

    Args:
        title (`str`): Of its table.
        plural (`str`): Names its option on the command line and its contact sheet.
        ability (`str`): Which of the model's functions answers: "draw", "chat", "think" or "interleave".
        categories (`tuple[str, ...]`): Trials are spread evenly over them.
        stream (`int`): Names its random numbers; two kinds of one stream ask the same.
        sample (`Callable`): (rng, category, split, size) to a [`Trial`].
    """

    title: str
    plural: str
    ability: str
    categories: tuple[str, ...]
    stream: int
    sample: Callable[[np.random.Generator, str, str, tuple[int, int]], Trial]

    def trial(self, seed: int, index: int, *, split: str = "test", size: tuple[int, int] = (64, 64)) -> Trial:
        """Trial `index`."""
        rng = np.random.default_rng((seed, self.stream, index))
        return self.sample(rng, self.categories[index % len(self.categories)], split, size)


def _trial(text: str, messages: Conversation, scenes: tuple[Scene, ...], size: tuple[int, int], judge: Judge) -> Trial:
    """A row of the data set with the pictures of `scenes` in place; its last message is the solution."""
    pictures = iter([Image.fromarray(render(scene, *size)) for scene in scenes])
    filled = []
    for message in messages:
        is_image = [part["type"] == "image" for part in message["content"]]
        parts = [
            {**part, "image": next(pictures)} if image else part for part, image in zip(message["content"], is_image)
        ]
        filled.append({**message, "content": parts})
    return Trial(text, filled[:-1], filled[-1]["content"], judge)


def _judge_picture(judge: Callable[[Image.Image], Verdict]) -> Judge:
    """The judge of an answer that should have one picture."""

    def judge_parts(parts: list[Part]) -> tuple[bool, dict[str, float]]:
        pictures = pictures_of(parts)
        if len(pictures) != 1:
            return False, {}
        verdict = judge(pictures[0])
        return verdict.passed, dict(verdict.checks)

    return judge_parts


def _prompt(rng: np.random.Generator, category: str, split: str, size: tuple[int, int]) -> Trial:
    prompt = sample_prompt(rng, category, split=split)
    judge = _judge_picture(lambda image: judge_prompt(image, prompt))
    return _trial(prompt.text, prompt_messages(prompt.text), (sample_scene(rng, prompt),), size, judge)


def _edit(rng: np.random.Generator, category: str, split: str, size: tuple[int, int]) -> Trial:
    edit = sample_edit(rng, category, split=split)

    def judge(image: Image.Image) -> Verdict:
        verdict = judge_edit(image, edit)
        return Verdict(verdict.passed, {"changed": verdict.changed, "preserved": verdict.preserved})

    messages = edit_messages(edit.instruction)
    return _trial(edit.instruction, messages, (edit.source, edit.target), size, _judge_picture(judge))


def _caption(rng: np.random.Generator, category: str, split: str, size: tuple[int, int]) -> Trial:
    scene, request = sample_view(rng, category, split=split), pick(rng, CAPTION_REQUESTS)

    def judge(parts: list[Part]) -> tuple[bool, dict[str, float]]:
        verdict = judge_caption(text_of(parts), scene)
        return verdict.passed, {"objects": verdict.objects, "background": verdict.background}

    return _trial(request, caption_messages(request, caption(scene)), (scene,), size, judge)


def _question(rng: np.random.Generator, category: str, split: str, size: tuple[int, int]) -> Trial:
    scene, questions = sample_questions(rng, 1, category, split=split)

    def judge(parts: list[Part]) -> tuple[bool, dict[str, float]]:
        return judge_answer(text_of(parts), questions[0]), {}

    return _trial(questions[0].text, question_messages(questions), (scene,), size, judge)


def _thinking(rng: np.random.Generator, category: str, split: str, size: tuple[int, int]) -> Trial:
    """ "reasoning" says whether the thinking arrived at the explicit prompt."""
    implied = sample_implied(rng, category, split=split)
    judge_image = _judge_picture(lambda image: judge_prompt(image, implied.prompt))

    def judge(parts: list[Part]) -> tuple[bool, dict[str, float]]:
        passed, checks = judge_image(parts)
        return passed, {**checks, "reasoning": split_reasoning(text_of(parts))[1] == implied.explicit}

    scene = sample_scene(rng, implied.prompt)
    return _trial(implied.prompt.text, thinking_messages(implied), (scene,), size, judge)


def _direct(rng: np.random.Generator, category: str, split: str, size: tuple[int, int]) -> Trial:
    prompt = sample_implied(rng, category, split=split).prompt
    judge = _judge_picture(lambda image: judge_prompt(image, prompt))
    return _trial(prompt.text, prompt_messages(prompt.text), (sample_scene(rng, prompt),), size, judge)


def _story(rng: np.random.Generator, category: str, split: str, size: tuple[int, int]) -> Trial:
    story = sample_story(rng, category, split=split)

    def judge(parts: list[Part]) -> tuple[bool, dict[str, float]]:
        verdict = judge_story(pictures_of(parts), story.scenes)
        return verdict.passed, dict(verdict.checks)

    return _trial(story.text, story_messages(story), story.scenes, size, judge)


def _example(rng: np.random.Generator, category: str, split: str, size: tuple[int, int]) -> Trial:
    examples = sample_examples(rng, category, split=split)
    judge = _judge_picture(lambda image: judge_scene(image, examples.target))
    text = " ".join(value for value in astuple(examples.rule) if value is not None)
    return _trial(text, example_messages(examples), examples.scenes, size, judge)


KINDS: dict[str, Kind] = {
    "prompt": Kind("Text to image", "prompts", "draw", CATEGORIES, 0, _prompt),
    "edit": Kind("Editing", "edits", "draw", EDIT_TASKS, 1, _edit),
    "caption": Kind("Captions", "captions", "chat", CAPTION_CATEGORIES, 2, _caption),
    "question": Kind("Questions", "questions", "chat", QUESTION_CATEGORIES, 3, _question),
    "thinking": Kind("Implied prompts, thinking first", "thinking", "think", THINKING_CATEGORIES, 4, _thinking),
    "direct": Kind("Implied prompts, drawn at once", "direct", "draw", THINKING_CATEGORIES, 4, _direct),
    "storyline": Kind("Storylines", "storylines", "interleave", STORY_KINDS, 5, _story),
    "example": Kind("Example pairs", "examples", "draw", EXAMPLE_TASKS, 6, _example),
}
