"""The tasks of Shapes beyond prompts and edits: what is said is true, and settles what is to be drawn."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from toy_pipeline import toy_processor, toy_vision_tokenizer

from nextflow_hf.processing import THINKING_PROMPT, split_reasoning
from nextflow_hf.training.data.collator import NextFlowDataCollator
from nextflow_hf.training.data.extraction import extract_codes
from nextflow_hf.training.data.messages import drop_condition
from nextflow_hf.training.shapes import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    SHAPES,
    Scene,
    is_held_out,
    render,
    sample_prompt,
    sample_scene,
)
from nextflow_hf.training.shapes.captions import COUNT_WORDS
from nextflow_hf.training.shapes.dataset import TASKS, shapes_sample
from nextflow_hf.training.shapes.examples import EXAMPLE_TASKS, Rule, sample_examples
from nextflow_hf.training.shapes.judge import judge_prompt, parse_image
from nextflow_hf.training.shapes.scene import CELLS
from nextflow_hf.training.shapes.storylines import STORY_KINDS, sample_story
from nextflow_hf.training.shapes.thinking import THINKING_CATEGORIES, sample_implied
from nextflow_hf.training.shapes.understanding import (
    QUESTION_CATEGORIES,
    caption,
    judge_answer,
    judge_caption,
    sample_questions,
    sample_view,
)


EVERY_TASK = dict.fromkeys(TASKS, 1 / len(TASKS))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def rows_of(split: str, count: int = 160) -> list[dict]:
    return [shapes_sample(5, index, split=split, tasks=EVERY_TASK) for index in range(count)]


def text_of(message: dict) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


# ---- captions and questions


def test_a_caption_says_all_and_reads_back(rng):
    captions = {}
    for _ in range(200):
        scene = sample_view(rng)
        text = caption(scene)
        looks = frozenset((item.shape, item.color, item.place) for item in scene.objects), scene.background
        assert captions.setdefault(text, looks) == looks
        assert judge_caption(text, scene).passed
        shuffled = Scene(scene.background, scene.objects[::-1])
        assert caption(shuffled) == text


def test_a_wrong_caption_is_found(rng):
    for _ in range(100):
        scene, other = sample_view(rng), sample_view(rng)
        if caption(scene) == caption(other):
            continue
        verdict = judge_caption(caption(other), scene)
        assert not verdict.passed and verdict.background == (scene.background == other.background)
        assert verdict.objects <= 1
        text = caption(scene)
        for wrong in (text.replace("background", ""), f"{text} and more", f"a red circle, {text}", "", "a red circle"):
            assert not judge_caption(wrong, scene).passed


def answer_by_looking(scene: Scene, question: str) -> str:
    """An independent reader of the questions, on the picture's objects."""
    objects, words = scene.objects, question.split()

    def named(name: list[str]) -> list:
        return [item for item in objects if item.shape == name[-1] and (len(name) == 2 or item.color == name[1])]

    if question == "what color is the background":
        return scene.background
    if question.startswith("how many"):
        matching = [item for item in objects if words[2] in ("objects", f"{item.shape}s")]
        return ("zero", "one", *COUNT_WORDS.values())[len(matching)]
    if question.startswith("what color is the"):
        (item,) = named(words[3:])
        return item.color
    if question.startswith("what shape is"):
        (item,) = [item for item in objects if question.endswith(f"the {item.place}")]
        return item.shape
    if question.startswith("is there"):
        return "yes" if any((item.color, item.shape) == tuple(words[-2:]) for item in objects) else "no"
    if question.startswith("where is"):
        (item,) = named(words[2:])
        return f"{'in' if 'corner' in item.place or item.place == 'center' else 'at'} the {item.place}"
    start = words.index("the")
    (item,) = named(words[start:])
    relation = words[2]
    sides = {
        "left": lambda other: other.x < item.x - 0.1,
        "right": lambda other: other.x > item.x + 0.1,
        "above": lambda other: other.y < item.y - 0.1,
        "below": lambda other: other.y > item.y + 0.1,
    }
    (found,) = filter(sides[relation], objects)
    return f"{'an' if found.color[0] in 'aeiou' else 'a'} {found.color} {found.shape}"


@pytest.mark.parametrize("category", QUESTION_CATEGORIES)
def test_answers_are_true(rng, category):
    answers = []
    for _ in range(80):
        scene, (question,) = sample_questions(rng, 1, category)
        assert question.category == category and question.answer == answer_by_looking(scene, question.text)
        assert judge_answer(f" {question.answer.capitalize()}.", question) and not judge_answer("seven", question)
        answers.append(question.answer)
    assert len(set(answers)) > 1
    if category == "existence":
        assert 0.3 < answers.count("yes") / len(answers) < 0.7


def test_questions_of_a_row_differ(rng):
    for _ in range(30):
        _, questions = sample_questions(rng, 5)
        assert len({question.text for question in questions}) == 5


# ---- thinking


@pytest.mark.parametrize("category", THINKING_CATEGORIES)
def test_thoughts_lead_to_the_prompt(rng, category):
    for _ in range(80):
        implied = sample_implied(rng, category)
        (spec,), prompt = implied.prompt.objects, implied.prompt
        thoughts = dict(thought.split(" is ") for thought in implied.reasoning.split(", "))
        assert (len(thoughts) > 1) == (category == "several")
        said = prompt.text
        for hint, meaning in thoughts.items():
            if hint.startswith("a shape like") or hint.startswith("a shape with"):
                assert hint.removeprefix("a shape ") in said and meaning.split()[1] == spec.shape
            else:
                assert hint in said
                assert meaning in (spec.color, prompt.background, COUNT_WORDS.get(spec.count))
        # Substituting the thoughts leaves nothing of the explicit prompt unsaid.
        for value in (spec.color, prompt.background, spec.shape):
            assert value is None or value in implied.explicit
            assert value is None or value in said or value in " ".join(thoughts.values())
        assert spec.count == 1 or COUNT_WORDS[spec.count] in implied.explicit.split()


def test_the_thinking_row_asks_and_answers():
    row = next(row for row in rows_of("train") if row["task"] == "thinking")
    system, user, assistant = row["messages"]
    assert system["role"] == "system" and text_of(system) == THINKING_PROMPT
    reasoning, prompt = split_reasoning(text_of(assistant))
    assert " is " in reasoning and prompt and assistant["content"][-1] == {"type": "image"}
    assert len(user["content"]) == 1


# ---- storylines


@pytest.mark.parametrize("kind", STORY_KINDS)
def test_a_story_settles_its_pictures(rng, kind):
    told = {}
    for _ in range(150):
        story = sample_story(rng, kind)
        assert 2 <= len(story.scenes) <= 3 and len(set(story.scenes)) == len(story.scenes)
        assert told.setdefault(story.text, story.scenes) == story.scenes
        assert story.scenes[0].background in story.text
        for scene, sentence in zip(story.scenes, story.sentences, strict=True):
            assert judge_caption(sentence.partition(", ")[2], scene).passed
        if kind != "background":
            assert len({scene.background for scene in story.scenes}) == 1


# ---- example pairs

EVERY_RULE = [
    *(Rule("recolor", color=color) for color in COLORS),
    *(Rule("reshape", shape=shape) for shape in SHAPES),
    *(Rule("background", background=background) for background in BACKGROUNDS),
    *(Rule("move", place=place) for place in CELLS),
    *(
        Rule(task, color=color, shape=shape, place=place)
        for task, color, shape, place in product(("add", "remove"), COLORS, SHAPES, CELLS)
    ),
]


def as_set(scene: Scene | None) -> tuple | None:
    return None if scene is None else (scene.background, frozenset(scene.objects))


@pytest.mark.parametrize("task", EXAMPLE_TASKS)
def test_one_pair_tells_the_rule(rng, task):
    """Of all rules there are, those that lead from the source to the target do the same to the query."""
    for _ in range(25):
        examples = sample_examples(rng, task)
        ((source, target),) = examples.pairs
        fitting = [rule for rule in EVERY_RULE if as_set(rule.apply(source)) == as_set(target)]
        assert examples.rule in fitting and source != target and examples.query != examples.target
        outcomes = {as_set(rule.apply(examples.query)) for rule in fitting} - {None}
        assert outcomes == {as_set(examples.target)}


def test_two_pairs_show_the_same_rule(rng):
    for _ in range(30):
        examples = sample_examples(rng, num_pairs=2)
        assert len(examples.pairs) == 2 and len(examples.scenes) == 6
        for before, after in (*examples.pairs, (examples.query, examples.target)):
            assert examples.rule.apply(before) == after


# ---- rows


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_of_every_task(split):
    rows = rows_of(split)
    assert {row["task"] for row in rows} == set(TASKS)
    for row in rows:
        images = [part for message in row["messages"] for part in message["content"] if part["type"] == "image"]
        assert len(images) == len(row["images"]) and row["messages"][-1]["role"] == "assistant"
        user = next(message for message in row["messages"] if message["role"] == "user")
        asked, answered = text_of(user), text_of(row["messages"][-1])
        if row["task"] in ("edit", "text_to_image", "thinking", "direct", "storyline"):
            assert is_held_out(asked) == (split == "test")
        elif row["task"] == "caption":
            assert is_held_out(answered) == (split == "test")
        if split == "train":  # what a picture is drawn after is no held-out caption in an answer either
            for part in row["messages"][-1]["content"]:
                sentence = part.get("text", "").rpartition("</think>")[2]
                assert not sentence or not is_held_out(sentence.removeprefix("first, ").removeprefix("then, "))


def test_rows_depend_on_seed_and_index_alone():
    for index in range(20):
        first, again = (shapes_sample(9, index, tasks=EVERY_TASK) for _ in range(2))
        assert first["messages"] == again["messages"] and first["task"] == again["task"]
        assert all(np.array_equal(a, b) for a, b in zip(first["images"], again["images"], strict=True))


def test_the_shares_of_the_recipes_are_met():
    recipe = yaml.safe_load(
        (Path(__file__).parents[1] / "examples" / "shapes" / "recipes" / "shapes_extract.yaml").read_text()
    )
    shares = recipe["tasks"]
    assert set(shares) == set(TASKS) and sum(shares.values()) == pytest.approx(1)
    drawn = [shapes_sample(1, index, tasks=shares, sizes=((8, 8),))["task"] for index in range(600)]
    for task, share in shares.items():
        assert drawn.count(task) / 600 == pytest.approx(share, abs=0.06)


def test_wrong_tasks_are_refused():
    with pytest.raises(ValueError, match=r"unknown tasks \['captions'\]"):
        shapes_sample(0, 0, tasks={"captions": 1.0})
    with pytest.raises(ValueError, match="add up to 0.5, expected 1"):
        shapes_sample(0, 0, tasks={"edit": 0.5})


def test_answers_in_words_keep_their_condition(rng):
    for row in rows_of("train", 80):
        has_text = bool(text_of(row["messages"][-1]))
        messages, _ = drop_condition(row, rng, text_rate=1.0, image_rate=0.0)
        kept = [text_of(message) for message in messages if message["role"] == "user"]
        assert any(kept) == has_text


def test_rows_become_batches(tmp_path):
    """Every task through the processor, the extraction and the collator, with labels on the right things."""
    processor = toy_processor()
    processor.append_last_scale = True
    rows = [next(row for row in rows_of("train") if row["task"] == task) for task in TASKS]
    data = extract_codes(
        lambda index: rows[index], len(rows), tmp_path, processor=processor, vision_tokenizer=toy_vision_tokenizer(),
        text_drop_rate=0.0, image_drop_rate=0.0,
    )  # fmt: skip
    for row, encoded in zip(rows, data, strict=True):
        drawn = [part for part in row["messages"][-1]["content"] if part["type"] == "image"]
        labels, is_image = encoded["labels"], encoded["input_ids"] == processor.boi_token_id
        trained = labels[is_image] != -100
        assert trained.sum() == len(drawn) and trained[len(trained) - len(drawn) :].all()
        num_scales = [(grids[:, 0] > 0).sum() for grids in encoded["image_grids"]]
        assert num_scales == [4 if is_trained else 5 for is_trained in trained]
        answers = "".join(text_of(message) for message in row["messages"] if message["role"] == "assistant")
        said = labels[(labels != -100) & (encoded["input_ids"] != processor.boi_token_id)]
        said = processor.tokenizer.decode(said, skip_special_tokens=True)
        assert said.replace(" ", "") == answers.replace(" ", "")
    batch = NextFlowDataCollator(pad_token_id=processor.tokenizer.pad_token_id)(list(data))
    assert len(batch["input_ids"]) == len(rows)
    assert len(batch["image_codes"]) == sum(len(row["image_codes"]) for row in data)


def test_the_judge_reads_what_is_drawn():
    """The pictures of every row are what its conversation says, read back from their pixels."""
    for row in rows_of("train", 120):
        if row["task"] == "caption":
            scene = parse_image(row["images"][0])
            assert judge_caption(text_of(row["messages"][-1]), scene).passed
        if row["task"] == "storyline":
            sentences = [part["text"] for part in row["messages"][-1]["content"] if part["type"] == "text"]
            for sentence, image in zip(sentences, row["images"], strict=True):
                assert judge_caption(sentence.partition(", ")[2], parse_image(image)).passed
    prompts = [sample_implied(np.random.default_rng(index)) for index in range(30)]
    for index, implied in enumerate(prompts):
        other = sample_prompt(np.random.default_rng(index), CATEGORIES[index % len(CATEGORIES)])
        scene = sample_scene(np.random.default_rng(index), implied.prompt)
        assert judge_prompt(render(scene), implied.prompt).passed
        if sum(spec.count for spec in other.objects) != implied.prompt.objects[0].count:
            wrong = sample_scene(np.random.default_rng(index), other)
            assert not judge_prompt(render(wrong), implied.prompt).passed
