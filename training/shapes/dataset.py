"""Shapes as training data: rows of the one `messages` format, drawn on the fly, each a function of (seed, index).

Rows are the same whatever the number of workers, the order or the size of the batch. Whatever an answer must draw, the
conversation settles, but for the background of a picture that no text gives one: that the first scale's single cell
can choose (see `sample_scene`).
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image

from ...processing.messages_nextflow import THINKING_PROMPT, join_reasoning
from .captions import describe, in_split, pick, sample_prompt, sample_scene
from .edits import Edit, sample_edit
from .examples import ExamplePairs, sample_examples
from .scene import Scene, render
from .storylines import Story, sample_story
from .thinking import ImpliedPrompt, sample_implied
from .understanding import CAPTION_CATEGORIES, CAPTION_REQUESTS, Question, caption, sample_questions, sample_view


DESCRIPTION_SHARE = 0.25  # of the text-to-image rows: the scene of an edit, fully described, in place of a prompt
MAX_QUESTIONS = 6  # a turn each: the picture costs many tokens, a question few
TWO_PAIRS_SHARE = 0.15  # of the rows with example pairs

IMAGE = {"type": "image"}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def assistant(*parts: dict) -> dict:
    return {"role": "assistant", "content": list(parts)}


# ---- the conversations; their image parts take the row's images in order


def prompt_messages(text: str) -> list[dict]:
    """A text-to-image conversation; its one image is the assistant's."""
    return [user(text_part(text)), assistant(IMAGE)]


def edit_messages(instruction: str) -> list[dict]:
    """An editing conversation; its images are the user's and then the assistant's."""
    return [user(IMAGE, text_part(instruction)), assistant(IMAGE)]


def caption_messages(request: str, answer: str) -> list[dict]:
    """A picture, and what it shows."""
    return [user(IMAGE, text_part(request)), assistant(text_part(answer))]


def question_messages(questions: tuple[Question, ...]) -> list[dict]:
    """A picture, and questions about it, a turn each."""
    messages = []
    for question in questions:
        picture = [] if messages else [IMAGE]
        messages += [user(*picture, text_part(question.text)), assistant(text_part(question.answer))]
    return messages


def thinking_messages(implied: ImpliedPrompt) -> list[dict]:
    """A prompt that is thought about before it is drawn, as the system message asks."""
    answer = join_reasoning(implied.reasoning, implied.explicit)
    system = {"role": "system", "content": [text_part(THINKING_PROMPT)]}
    return [system, user(text_part(implied.prompt.text)), assistant(text_part(answer), IMAGE)]


def story_messages(story: Story) -> list[dict]:
    """A request for a story, and its sentences and pictures in turn."""
    answer = [part for sentence in story.sentences for part in (text_part(sentence), IMAGE)]
    return [user(text_part(story.text)), assistant(*answer)]


def example_messages(examples: ExamplePairs) -> list[dict]:
    """`A is to B as C is to`, and the answer. The pairs are all the user's: no rule is known before the first ends."""
    parts = []
    for _ in examples.pairs:
        parts += [IMAGE, text_part("is to"), IMAGE, text_part("as")]
    return [user(*parts, IMAGE, text_part("is to")), assistant(IMAGE)]


# ---- the rows of each task: messages, scenes in the order of the conversation, category

Row = tuple[list[dict], tuple[Scene, ...], str]


def _edit(rng: np.random.Generator, split: str) -> Row:
    """In either direction: removals get sources of four objects this way."""
    edit: Edit = sample_edit(rng, split=split)
    inverse = edit.inverse(rng, split=split) if rng.random() < 0.5 else None
    edit = inverse if inverse is not None else edit
    return edit_messages(edit.instruction), (edit.source, edit.target), edit.task


def _text_to_image(rng: np.random.Generator, split: str) -> Row:
    if rng.random() >= DESCRIPTION_SHARE:
        prompt = sample_prompt(rng, split=split)
        return prompt_messages(prompt.text), (sample_scene(rng, prompt),), prompt.category
    while True:
        scene = sample_edit(rng, split=split).target
        text = describe(scene, rng)
        if in_split(text, split):
            return prompt_messages(text), (scene,), "description"


def _caption(rng: np.random.Generator, split: str) -> Row:
    scene = sample_view(rng, split=split)
    category = CAPTION_CATEGORIES[len(scene.objects) - 1]
    return caption_messages(pick(rng, CAPTION_REQUESTS), caption(scene)), (scene,), category


def _questions(rng: np.random.Generator, split: str) -> Row:
    scene, questions = sample_questions(rng, int(rng.integers(1, MAX_QUESTIONS + 1)), split=split)
    return question_messages(questions), (scene,), questions[0].category


def _thinking(rng: np.random.Generator, split: str) -> Row:
    implied = sample_implied(rng, split=split)
    return thinking_messages(implied), (sample_scene(rng, implied.prompt),), implied.prompt.category


def _direct(rng: np.random.Generator, split: str) -> Row:
    """The prompts of thinking, drawn at once."""
    prompt = sample_implied(rng, split=split).prompt
    return prompt_messages(prompt.text), (sample_scene(rng, prompt),), prompt.category


def _storyline(rng: np.random.Generator, split: str) -> Row:
    story = sample_story(rng, split=split)
    return story_messages(story), story.scenes, story.kind


def _example_pairs(rng: np.random.Generator, split: str) -> Row:
    examples = sample_examples(rng, num_pairs=1 + int(rng.random() < TWO_PAIRS_SHARE), split=split)
    return example_messages(examples), examples.scenes, examples.rule.task


TASKS: dict[str, Callable[[np.random.Generator, str], Row]] = {
    "edit": _edit,
    "text_to_image": _text_to_image,
    "caption": _caption,
    "questions": _questions,
    "thinking": _thinking,
    "direct": _direct,
    "storyline": _storyline,
    "example_pairs": _example_pairs,
}


def shapes_sample(
    seed: int,
    index: int,
    *,
    split: str = "train",
    tasks: Mapping[str, float] | None = None,
    sizes: tuple[tuple[int, int], ...] = ((64, 64),),
) -> dict:
    """Row `index` of the data set `seed`.

    Args:
        seed (`int`): Names the data set.
        index (`int`): Names the row; rows do not depend on each other.
        split (`str`, *optional*, defaults to `"train"`): Which texts (or pictures, where these ask) may occur.
        tasks (`Mapping[str, float]`, *optional*): Share of each of `TASKS` among the rows, adding up to 1; half edits
            and half text-to-image when left out.
        sizes (`tuple[tuple[int, int], ...]`, *optional*): The (height, width) to draw from.

    Returns:
        `dict`: "messages", "images" (PIL, in the order of the conversation), "task" (one of `TASKS`) and "category"
        (within the task).
    """
    tasks = {"edit": 0.5, "text_to_image": 0.5} if tasks is None else tasks
    if unknown := sorted(set(tasks) - set(TASKS)):
        raise ValueError(f"unknown tasks {unknown}, expected some of {tuple(TASKS)}")
    if abs(sum(tasks.values()) - 1) > 1e-6:
        raise ValueError(f"the shares of the tasks add up to {sum(tasks.values())}, expected 1: {dict(tasks)}")
    rng = np.random.default_rng((seed, index))
    height, width = sizes[int(rng.integers(len(sizes)))]
    bounds = np.cumsum(list(tasks.values()))
    task = list(tasks)[min(int((bounds <= rng.random()).sum()), len(tasks) - 1)]
    messages, scenes, category = TASKS[task](rng, split)
    images = [Image.fromarray(render(scene, height, width)) for scene in scenes]
    return {"messages": messages, "images": images, "task": task, "category": category}


def shapes_samples(split: str, seed: int, num_samples: int, *, start: int = 0, **options) -> Iterator[dict]:
    """Rows `start` to `start + num_samples` of the data set `seed`, one by one; `options` as in `shapes_sample`."""
    for index in range(start, start + num_samples):
        yield shapes_sample(seed, index, split=split, **options)
