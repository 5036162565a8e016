"""The Shapes world: drawing, captions, edits, the held-out split, and rows that depend on (seed, index) alone."""

import time

import numpy as np
import pytest

from nextflow_hf.training.shapes import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    EDIT_TASKS,
    SHAPES,
    Scene,
    ShapeObject,
    describe,
    is_held_out,
    render,
    sample_edit,
    sample_prompt,
    sample_scene,
)
from nextflow_hf.training.shapes.captions import RELATIONS
from nextflow_hf.training.shapes.dataset import shapes_sample, shapes_samples
from nextflow_hf.training.shapes.scene import RADIUS


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("shape", SHAPES)
def test_render_draws_the_shape_in_its_color_at_its_place(shape):
    image = render(Scene("white", (ShapeObject(shape, "red", 0.25, 0.75, 0.15),)), 128, 64)
    assert image.dtype == np.uint8 and image.shape == (128, 64, 3)
    assert tuple(image[96, 16]) == (BACKGROUNDS["white"] if shape == "ring" else COLORS["red"])
    assert tuple(image[0, 0]) == BACKGROUNDS["white"]
    changed = (image != BACKGROUNDS["white"]).any(-1)
    rows, columns = np.nonzero(changed)
    radius = 0.15 * 64
    assert abs(rows - 95.5).max() <= radius + 0.5 and abs(columns - 15.5).max() <= radius + 0.5
    assert abs(columns.max() - columns.min() + 1 - 2 * radius * (0.86 if shape == "square" else 1)) <= 2
    on_line = (image.astype(int) - BACKGROUNDS["white"])[..., 1] / (COLORS["red"][1] - BACKGROUNDS["white"][1])
    assert ((on_line > 0.05) & (on_line < 0.95)).any()  # anti-aliased


def test_shapes_have_different_masks():
    images = [render(Scene("black", (ShapeObject(shape, "red", 0.5, 0.5, 0.15),))) for shape in SHAPES]
    for first in range(len(images)):
        for second in range(first):
            assert (images[first] != images[second]).any(-1).sum() > 20


def test_render_is_fast(rng):
    scenes = [sample_scene(rng, sample_prompt(rng)) for _ in range(200)]
    start = time.process_time()
    for scene in scenes:
        render(scene)
    assert 200 / (time.process_time() - start) > 1000


def test_objects_keep_their_distance(rng):
    scenes = [sample_scene(rng, sample_prompt(rng)) for _ in range(300)]
    scenes += [scene for edit in (sample_edit(rng) for _ in range(300)) for scene in (edit.source, edit.target)]
    for scene in scenes:
        assert 1 <= len(scene.objects) <= 4
        for index, item in enumerate(scene.objects):
            assert item.radius == RADIUS
            for center in (item.x, item.y):
                assert 1 / 64 - 1e-6 <= center - item.radius and center + item.radius <= 63 / 64 + 1e-6
            for other in scene.objects[:index]:
                gap = max(abs(item.x - other.x), abs(item.y - other.y)) - item.radius - other.radius
                assert gap >= 2 / 64 - 1e-6


@pytest.mark.parametrize("category", CATEGORIES)
def test_scenes_meet_their_prompts(rng, category):
    for _ in range(100):
        prompt = sample_prompt(rng, category)
        scene = sample_scene(rng, prompt)
        assert prompt.category == category
        assert len(scene.objects) == sum(spec.count for spec in prompt.objects)
        wanted = [spec for spec in prompt.objects for _ in range(spec.count)]
        for item, spec in zip(scene.objects, wanted, strict=True):
            assert item.shape == spec.shape and spec.shape in prompt.text
            assert spec.color is None or (item.color == spec.color and spec.color in prompt.text)
            assert spec.place is None or (item.place == spec.place and spec.place in prompt.text)
        if prompt.background is not None:
            assert scene.background == prompt.background and f"{prompt.background} background" in prompt.text
        if prompt.relation is not None:
            first, second = scene.objects
            dx, dy = second.x - first.x, second.y - first.y
            along, across = (dx, dy) if prompt.relation in ("left of", "right of") else (dy, dx)
            assert along * (1 if prompt.relation in ("left of", "above") else -1) > 0.2 and abs(across) < 0.5


def test_counting_without_a_color_uses_one_color(rng):
    prompts = [sample_prompt(rng, "counting") for _ in range(100)]
    free = [prompt for prompt in prompts if prompt.objects[0].color is None]
    assert free and all(len({item.color for item in sample_scene(rng, p).objects}) == 1 for p in free)


@pytest.mark.parametrize("split", ["train", "test"])
def test_held_out_texts_are_only_in_test(rng, split):
    for category in CATEGORIES:
        assert all(is_held_out(sample_prompt(rng, category, split=split).text) == (split == "test") for _ in range(30))
    for task in EDIT_TASKS:
        for _ in range(15):
            edit = sample_edit(rng, task, split=split)
            assert is_held_out(edit.instruction) == (split == "test")
            inverse = edit.inverse(rng, split=split)
            assert inverse is None or is_held_out(inverse.instruction) == (split == "test")


def test_held_out_share_and_stability():
    share = np.mean([is_held_out(f"a picture of {index}") for index in range(5000)])
    assert 0.03 < share < 0.07
    assert is_held_out("draw a square on a pink background") and not is_held_out("a circle")


@pytest.mark.parametrize("task", EDIT_TASKS)
def test_edits_change_what_they_say_and_nothing_else(rng, task):
    for _ in range(60):
        edit = sample_edit(rng, task)
        source, target = edit.source, edit.target
        assert 1 <= len(source.objects) <= 3 and source != target
        assert set(edit.kept) == set(source.objects) & set(target.objects)
        assert set(source.objects) - set(edit.kept) == set(edit.before)
        assert set(target.objects) - set(edit.kept) == set(edit.after)
        assert (source.background != target.background) == (task == "background")
        if task == "swap":
            assert [(o.x, o.y) for o in edit.after] == [(o.x, o.y) for o in reversed(edit.before)]
        if task in ("move", "add") and edit.place is not None:
            assert edit.after[0].place == edit.place and edit.place in edit.instruction
        if task == "recolor":
            assert edit.after[0].color in edit.instruction


@pytest.mark.parametrize("task", EDIT_TASKS)
def test_references_are_unambiguous(rng, task):
    """Every `the [color] shape` of an instruction, read by an independent parser, names one object of the source."""
    for _ in range(60):
        edit = sample_edit(rng, task)
        for direction in filter(None, (edit, edit.inverse(rng))):
            words = direction.instruction.split()
            named = []
            for index, word in enumerate(words[:-1]):
                if word != "the":
                    continue
                color = words[index + 1] if words[index + 1] in COLORS else None
                noun = words[index + 1 + (color is not None)] if index + 1 + (color is not None) < len(words) else ""
                if noun in SHAPES:
                    hits = [o for o in direction.source.objects if o.shape == noun and color in (None, o.color)]
                    assert len(hits) == 1, direction.instruction
                    named += hits
            expected = set(direction.before) | ({direction.anchor} if direction.anchor else set())
            assert set(named) == expected, direction.instruction


@pytest.mark.parametrize("task", EDIT_TASKS)
def test_inverse_goes_back(rng, task):
    back = {"add": "remove", "remove": "add"}.get(task, task)
    for _ in range(20):
        edit = sample_edit(rng, task)
        inverse = edit.inverse(rng)
        assert inverse is not None and inverse.task == back
        assert (inverse.source, inverse.target) == (edit.target, edit.source)
        assert (inverse.before, inverse.after) == (edit.after, edit.before)


def test_inverse_is_none_without_a_name(rng):
    """Two red circles: neither can be named, so the way back cannot be asked for."""
    from nextflow_hf.training.shapes import Edit

    red, blue = ShapeObject("circle", "red", 0.2, 0.2, 0.13), ShapeObject("circle", "blue", 0.8, 0.8, 0.13)
    new = ShapeObject("circle", "red", 0.8, 0.8, 0.13)
    edit = Edit("recolor", "make the blue circle red", Scene("white", (red, blue)), Scene("white", (red, new)),
                (blue,), (new,))  # fmt: skip
    assert edit.inverse(rng) is None


def test_relations_of_additions(rng):
    seen = set()
    for _ in range(200):
        edit = sample_edit(rng, "add")
        if edit.relation is not None:
            seen.add(edit.relation)
            assert edit.relation in edit.instruction.replace("to the ", "") and edit.anchor in edit.source.objects
    assert seen == set(RELATIONS)


def test_describe_names_everything(rng):
    for _ in range(50):
        scene = sample_edit(rng).target
        text = describe(scene, rng)
        assert f"{scene.background} background" in text
        assert all(f"{item.color} {item.shape}" in text for item in scene.objects)


def test_samples_depend_on_seed_and_index_alone():
    rows = list(shapes_samples("train", 7, 20))
    again = shapes_sample(7, 13)
    assert rows[13]["messages"] == again["messages"] and rows[13]["category"] == again["category"]
    assert all(np.array_equal(a, b) for a, b in zip(rows[13]["images"], again["images"], strict=True))
    later = next(shapes_samples("train", 7, 1, start=13))
    assert later["messages"] == again["messages"]
    assert shapes_sample(8, 13)["messages"] != again["messages"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_samples_have_the_messages_format(split):
    rows = list(shapes_samples(split, 0, 80, sizes=((64, 64), (48, 80))))
    assert {row["task"] for row in rows} == {"text_to_image", "edit"}
    assert {row["images"][0].size for row in rows} == {(64, 64), (80, 48)}
    assert "description" in {row["category"] for row in rows}
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert assistant["content"] == [{"type": "image"}]
        parts = [part for message in row["messages"] for part in message["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(row["images"])
        assert len(row["images"]) == (2 if row["task"] == "edit" else 1)
        assert is_held_out(user["content"][-1]["text"]) == (split == "test")


def test_wrong_names_are_refused(rng):
    with pytest.raises(ValueError, match="unknown category 'colour'"):
        sample_prompt(rng, "colour")
    with pytest.raises(ValueError, match="unknown task 'paint'"):
        sample_edit(rng, "paint")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        sample_prompt(rng, split="dev")
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        ShapeObject("star", "red", 0.5, 0.5, 0.1)
