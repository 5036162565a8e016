"""Shapes, the second world on the one grammar: its words, its judge without training, its reward and its suite."""

import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageFilter
from transformers import AutoTokenizer

from nextflow_hf import cli
from nextflow_hf.hub_cards import shapes_model_path
from nextflow_hf.training.evaluation.suite import images_of
from nextflow_hf.worlds import shapes
from nextflow_hf.worlds.captions import caption, read_caption
from nextflow_hf.worlds.dataset import finish_row, sample_row, shares
from nextflow_hf.worlds.sampling import Context
from nextflow_hf.worlds.scene import Scene, Thing, render
from nextflow_hf.worlds.sprites import Sprite


CANVAS = (64, 64)
SPRITES = shapes.load()
RING, SQUARE = Sprite("ring", "red"), Sprite("square", "blue")


def scene_of(*things: tuple[Sprite, str], background: str = "white") -> Scene:
    return Scene(background, tuple(Thing(sprite, place, "tile") for sprite, place in things))


def draw(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene, SPRITES, CANVAS))


def rows(task: str, count: int, **options):
    for number in range(count):
        yield sample_row(SPRITES, task, f"0/{number}", [CANVAS], **options)


def words_of(row) -> list[str]:
    """All texts of a row."""
    found, left = [], [row.columns]
    while left:
        value = left.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, (dict, list)):
            left += value.values() if isinstance(value, dict) else value
    return found


def test_clean_words_are_those_that_the_shipped_model_reads():
    """A word that its text tokenizer cuts into letters is one that it has hardly seen."""
    tokenizer = AutoTokenizer.from_pretrained(shapes_model_path())
    columns = {"text", "system", "user", "assistant", "human", "gpt", "image"}
    seen = set()
    for task in ("text_to_image", "edit", "caption", "questions", "thinking"):
        for row, _ in rows(task, 60, people=False):
            seen |= {word.strip(",.<>/") for text in words_of(row) for word in text.split()}
    ids = {word: tokenizer([word, f" {word}"])["input_ids"] for word in seen - columns if word.isalpha()}
    cut = [word for word, options in ids.items() if min(map(len, options)) > 1]
    assert len(seen) > 60 and not cut


def test_one_scene_has_one_caption():
    found = {}
    for number in range(300):
        context = Context(SPRITES, Random(number), CANVAS)
        scene = context.spread(1 + number % 4)
        text = caption(SPRITES, scene)
        assert {*read_caption(SPRITES, text).things} == {*scene.things}
        assert read_caption(SPRITES, text).background == scene.background
        key = (scene.background, frozenset(scene.things))
        assert found.setdefault(text, key) == key
    assert read_caption(SPRITES, "a red bicycle in the center on a white background") is None


def test_every_task_asks_in_both_wordings_and_keeps_to_its_split():
    for task in shares(SPRITES):
        texts = {people: [words_of(row) for row, _ in rows(task, 8, people=people)] for people in (False, True)}
        assert task in ("examples", "text") or texts[False] != texts[True]
    people = [text for row, _ in rows("text_to_image", 60, people=True) for text in words_of(row)]
    assert any(text[0].isupper() for text in people) and any("please" in text for text in people)
    assert any(text.endswith(".") for text in people)


def test_conversations_draw_ask_and_change():
    for row, _ in rows("conversation", 10):
        kinds = [turn["content"][0]["type"] for turn in row.columns["messages"] if turn["role"] == "assistant"]
        assert kinds[:3] == ["image", "text", "image"] and len(row.scenes) == kinds.count("image")


def test_what_a_request_leaves_open_is_not_judged():
    opened = [finish_row(SPRITES, "text_to_image", *found) for found in rows("text_to_image", 40, people=False)]
    backgrounds = {json.loads(row["scenes"][-1])["background"] for row in opened}
    assert backgrounds == {None, "white", "black", "pink"}
    for row in opened:
        assert ("background" in row["text"]) == (json.loads(row["scenes"][-1])["background"] is not None)
    judge, scene = shapes.judge(), scene_of((RING, "middle"))
    assert judge.judge_image(draw(replace(scene, background="pink")), replace(scene, background=None))["passed"]


@pytest.mark.parametrize("sprite", SPRITES.all, ids=str)
def test_the_judge_knows_every_shape_through_a_lossy_decoder(sprite):
    scene = scene_of((sprite, "top left corner"), (RING, "right"), background="black")
    noise = np.random.default_rng(0).normal(0, 4, (64, 64, 3))
    blurred = np.asarray(draw(scene).filter(ImageFilter.GaussianBlur(0.4))) + noise
    assert shapes.judge().judge_image(blurred.clip(0, 255).astype(np.uint8), scene)["passed"]


@pytest.mark.parametrize(
    ("drawn", "failed"),
    [
        (scene_of((RING, "left")), {"place", "concept"}),
        (scene_of((RING, "left"), (SQUARE, "right"), (RING, "top")), {"count"}),
        (scene_of((RING, "left"), (SQUARE, "right"), background="pink"), {"background"}),
        (scene_of((RING, "left"), (Sprite("square", "cyan"), "right")), {"style"}),
        (scene_of((RING, "right"), (SQUARE, "left")), {"place"}),
        (scene_of((Sprite("circle", "red"), "left"), (SQUARE, "right")), {"place", "concept"}),
    ],
)
def test_the_judge_names_what_is_wrong(drawn, failed):
    checks = shapes.judge().judge_image(draw(drawn), scene_of((RING, "left"), (SQUARE, "right")))
    assert not checks["passed"] and not any(checks[name] for name in failed)


def test_a_rounded_square_is_no_square():
    scene = scene_of((SQUARE, "middle"))
    pixels = render(scene, SPRITES, CANVAS)
    corner = (slice(26, 30), slice(26, 30))
    for flip in (pixels, pixels[::-1], pixels[:, ::-1], pixels[::-1, ::-1]):
        flip[corner] = 246
    assert not shapes.judge().judge_image(pixels, scene)["passed"]


def test_the_reward_is_the_share_of_the_checks():
    wanted = [json.dumps(scene_of((RING, "left")).to_json())]
    images = [draw(scene_of((RING, "left"))), draw(scene_of((RING, "left"), background="black"))]
    right, wrong = shapes.reward(images, scenes=[wanted] * 2, prompts=["", ""])
    assert right == 1 and 0.5 < wrong < 1


def test_the_suite_passes_true_answers_and_fails_others():
    suite = shapes.suite(count=2)
    assert len(suite.ids) == 2 * 2 * len([name for name in shares(SPRITES) if name != "text"])
    for id in suite.ids:
        sample = suite.sample(id)
        _, scenes, expected = sample.reference
        shown = iter([replace(scene, background=scene.background or "pink") for scene in scenes][_given(sample) :])
        true = [
            [{**part, "image": draw(next(shown))} if part["type"] == "image" else part for part in parts]
            for parts in expected
        ]
        assert suite.score(sample, true)["passed"]
        images = [image for answer in true for image in images_of(answer)]
        assert [np.asarray(one).tolist() for one in sample.true_images] == [np.asarray(one).tolist() for one in images]
        blank = Image.new("RGB", (64, 64), "white")
        wrong = [
            [{**p, "image": blank} if p["type"] == "image" else {**p, "text": "nothing"} for p in a] for a in true
        ]
        assert not suite.score(sample, wrong)["passed"]


def test_the_suite_asks_for_the_categories_and_sizes_that_are_named():
    options = {"tasks": ["text_to_image"], "wordings": ["clean"], "sizes": [[32, 64]]}
    suite = shapes.suite(count=6, categories=["single"], **options)
    samples = [suite.sample(id) for id in suite.ids]
    assert {(sample.category, len(sample.reference[1][0].things)) for sample in samples} == {("single", 1)}
    assert {(sample.settings["height"], sample.settings["width"]) for sample in samples} == {(32, 64)}
    every = shapes.suite(count=6, **options)
    kept = [id for id in every.ids if every.sample(id).category == "single"]
    assert kept and all(suite.sample(id).turns == every.sample(id).turns for id in kept)
    for name, value in {"wordings": ["cleen"], "split": "held_out", "tasks": ["paint"]}.items():
        with pytest.raises(ValueError, match=rf"{name} has \['\w+'\], expected some of"):
            shapes.suite(**{**options, name: value})
    with pytest.raises(ValueError, match=r"of the categories \['plural'\]"):
        shapes.suite(count=1, categories=["plural"], **options).sample("text_to_image-clean-0000")


def _given(sample) -> int:
    return sum(len(images_of(message["content"])) for turn in sample.turns for message in turn.messages)


def test_the_command_writes_this_world(tmp_path, capsys):
    command = ["world", "shapes", "--output-dir", str(tmp_path), "--rows", "40", "--test-rows", "2", "--images", "20"]
    assert cli.main(command) == 0
    assert {path.name for path in (tmp_path / "64" / "train").iterdir()} == {*shares(SPRITES)}
    assert not (tmp_path / "64" / "held_out").exists() and (tmp_path / "64" / "data.yaml").exists()


def test_no_other_room_imports_a_world():
    """Commands find a world by its name, recipes and suites by import path."""
    root = Path(shapes.__file__).parents[1]
    rooms = ("app", "commands", "conversion", "hub_cards", "modeling_nextflow", "pipelines", "processing", "training")
    found = re.compile(r"^\s*(from|import)\s.*\b(worlds import (shapes|emoji)|worlds\.(shapes|emoji))", re.MULTILINE)
    sources = [path for room in rooms for path in (root / room).rglob("*.py")]
    assert len(sources) > 100 and not [path for path in sources if found.search(path.read_text())]


def test_true_images_through_the_vision_tokenizer_are_judged():
    suite = shapes.suite(count=1, tasks=["reconstruction"], wordings=["clean"])
    assert suite.without == ("transformer",) and shapes.suite(count=1).without == ()
    (id,) = suite.ids
    sample = suite.sample(id)
    (true,) = images_of(sample.turns[0].messages[0]["content"])
    noisy = np.asarray(true) + np.random.default_rng(0).integers(-3, 4, (64, 64, 3))
    blank = Image.new("RGB", true.size, "white")
    answers = [
        [{"type": "image", "image": true}, {"type": "image", "image": image}]
        for image in (Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), blank)
    ]
    near, wrong = (suite.score(sample, [answer]) for answer in answers)
    assert near["passed"] and not wrong["passed"] and near["psnr"] > 35 > wrong["psnr"]
    suite = shapes.suite(count=1, tasks=["reconstruction", "text_to_image"], wordings=["clean"], upscale_factor=2)
    true, drawn = map(suite.sample, suite.ids)  # twice the side for what is decoded, the codes' own for what is drawn
    assert images_of(true.turns[0].messages[0]["content"])[0].size == (128, 128)
    assert true.settings["resolution"] == drawn.settings["width"] == 64
    with pytest.raises(ValueError, match="upscale_factor is 1.5, expected a whole number of at least 1"):
        shapes.suite(upscale_factor=1.5)
