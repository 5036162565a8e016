"""The judge of Shapes: passes what is right, also after blur and noise, and fails every kind of mistake."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from nextflow_hf.training.shapes import (
    BACKGROUNDS,
    COLORS,
    EDIT_TASKS,
    SHAPES,
    ObjectSpec,
    Prompt,
    Scene,
    ShapeObject,
    render,
    sample_edit,
    sample_prompt,
    sample_scene,
)
from nextflow_hf.training.shapes.judge import UNKNOWN, judge_edit, judge_prompt, judge_scene, judge_story, parse_image


RED_CIRCLE = ShapeObject("circle", "red", 0.25, 0.5, 0.14)
BLUE_SQUARE = ShapeObject("square", "blue", 0.75, 0.5, 0.14)
SCENE = Scene("black", (RED_CIRCLE, BLUE_SQUARE))
PROMPT = Prompt(
    "a red circle left of a blue square on a black background",
    "position",
    (ObjectSpec("circle", "red"), ObjectSpec("square", "blue")),
    relation="left of",
    background="black",
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def degrade(rng):
    """Blur, correlated noise and a shift of hue, as a lossy decoder leaves them."""

    def apply(image, blur=0.8, noise=10.0):
        blurred = ndimage.gaussian_filter(image.astype(np.float32), (blur, blur, 0))
        grain = ndimage.gaussian_filter(rng.normal(size=image.shape), (0.7, 0.7, 0))
        shifted = blurred + grain / grain.std() * noise + rng.normal(size=(1, 1, 3)) * 0.4 * noise
        return np.clip(shifted, 0, 255).astype(np.uint8)

    return apply


@pytest.mark.parametrize("shape", SHAPES)
def test_parse_finds_what_was_drawn(shape):
    for color in COLORS:
        for background in BACKGROUNDS:
            parsed = parse_image(render(Scene(background, (ShapeObject(shape, color, 0.3, 0.6, 0.14),))))
            assert parsed.background == background
            (item,) = parsed.objects
            assert (item.shape, item.color) == (shape, color) and item.confidence > 0.9
            assert max(abs(item.x - 0.3), abs(item.y - 0.6), abs(item.radius - 0.14)) < 0.015


def test_parse_any_size_and_type():
    for height, width in ((64, 64), (48, 96), (96, 56), (256, 320)):
        image = render(SCENE, height, width)
        assert judge_prompt(image, PROMPT).passed
        assert judge_prompt(Image.fromarray(image).convert("RGBA"), PROMPT).passed
    with pytest.raises(ValueError, match="expected uint8"):
        parse_image(np.zeros((64, 64, 3), dtype=np.float32))


def test_specks_are_ignored_and_touching_objects_are_a_defect():
    image = render(SCENE)
    image[4:7, 40:43] = COLORS["green"]
    assert judge_prompt(image, PROMPT).passed
    touching = (ShapeObject("circle", "red", 0.4, 0.5, 0.14), ShapeObject("circle", "red", 0.6, 0.5, 0.14))
    (item,) = parse_image(render(Scene("white", touching))).objects
    assert item.shape == UNKNOWN


def test_touching_objects_of_two_colors_are_two():
    touching = (ShapeObject("circle", "red", 0.36, 0.5, 0.14), ShapeObject("square", "blue", 0.61, 0.5, 0.14))
    parsed = parse_image(render(Scene("white", touching)))
    assert sorted((item.shape, item.color) for item in parsed.objects) == [("circle", "red"), ("square", "blue")]


@pytest.mark.parametrize("value", [0, 60, 128, 255])
def test_empty_pictures_fail(value):
    image = np.full((64, 64, 3), value, dtype=np.uint8)
    assert parse_image(image).objects == ()
    assert not judge_prompt(image, PROMPT).passed


def test_noise_fails(rng):
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert parse_image(image).background == UNKNOWN
    assert not judge_prompt(image, PROMPT).passed


def test_ground_truth_of_prompts_passes(rng):
    prompts = [sample_prompt(rng) for _ in range(300)]
    assert np.mean([judge_prompt(render(sample_scene(rng, p)), p).passed for p in prompts]) >= 0.99


def test_ground_truth_of_edits_passes(rng):
    edits = [sample_edit(rng) for _ in range(150)]
    edits += [inverse for edit in edits if (inverse := edit.inverse(rng)) is not None]
    assert len(edits) >= 290
    assert np.mean([judge_edit(render(edit.target), edit).passed for edit in edits]) >= 0.99


def test_lossy_pictures_pass(rng, degrade):
    errors, passed = [], []
    for _ in range(100):
        prompt, edit = sample_prompt(rng), sample_edit(rng)
        for image, judge, goal in (
            (render(sample_scene(rng, prompt)), judge_prompt, prompt),
            (render(edit.target), judge_edit, edit),
        ):
            lossy = degrade(image)
            errors.append(np.square(image.astype(float) - lossy).mean())
            passed.append(judge(lossy, goal).passed)
    psnr = np.mean(10 * np.log10(255**2 / np.array(errors)))
    assert 25 < psnr < 28  # hard enough to say something
    assert np.mean(passed) >= 0.95


@pytest.mark.parametrize(
    "wrong, check",
    [
        (Scene("black", (replace(RED_CIRCLE, color="orange"), BLUE_SQUARE)), "color"),
        (Scene("black", (replace(RED_CIRCLE, color="blue"), replace(BLUE_SQUARE, color="red"))), "color"),
        (Scene("black", (replace(RED_CIRCLE, shape="diamond"), BLUE_SQUARE)), "shape"),
        (Scene("black", (RED_CIRCLE,)), "count"),
        (Scene("black", (*SCENE.objects, ShapeObject("ring", "cyan", 0.5, 0.15, 0.13))), "count"),
        (Scene("black", (replace(RED_CIRCLE, x=0.75), replace(BLUE_SQUARE, x=0.25))), "position"),
        (Scene("black", (replace(RED_CIRCLE, x=0.5, y=0.2), replace(BLUE_SQUARE, x=0.5, y=0.8))), "position"),
        (Scene("pink", SCENE.objects), "background"),
    ],
)
def test_a_wrong_picture_fails_its_check(wrong, check):
    assert judge_prompt(render(SCENE), PROMPT).passed
    verdict = judge_prompt(render(wrong), PROMPT)
    assert not verdict.passed and not verdict.checks[check]


def test_counting_and_places_are_exact():
    three = Prompt("three green rings", "counting", (ObjectSpec("ring", "green", 3),))
    rings = tuple(ShapeObject("ring", "green", x, 0.3, 0.13) for x in (0.17, 0.5, 0.83))
    assert judge_prompt(render(Scene("pink", rings)), three).passed
    assert not judge_prompt(render(Scene("pink", rings[:2])), three).passed
    assert not judge_prompt(render(Scene("pink", (*rings, replace(rings[0], y=0.8)))), three).passed
    assert not judge_prompt(render(Scene("pink", (*rings[:2], replace(rings[2], color="red")))), three).passed
    corner = Prompt("a circle in the top left corner", "position", (ObjectSpec("circle", place="top left corner"),))
    assert judge_prompt(render(Scene("white", (replace(RED_CIRCLE, x=0.2, y=0.2),))), corner).passed
    assert not judge_prompt(render(Scene("white", (replace(RED_CIRCLE, x=0.5, y=0.2),))), corner).passed


@pytest.mark.parametrize("task", EDIT_TASKS)
def test_an_edit_that_was_not_made_fails(rng, task):
    for _ in range(15):
        edit = sample_edit(rng, task)
        verdict = judge_edit(render(edit.source), edit)
        assert not verdict.changed and verdict.preserved and not verdict.passed, edit.instruction


@pytest.mark.parametrize(
    "task", [task for task in EDIT_TASKS if task != "swap"]
)  # of two objects, swapping keeps none
def test_an_edit_that_changes_more_is_not_preserved(rng, task):
    """Another object moved, recoloured, reshaped or lost, an extra one, another background."""
    tried = 0
    while tried < 10:
        edit = sample_edit(rng, task)
        if not edit.kept or len(edit.target.objects) > 3:
            continue
        tried += 1
        victim = edit.kept[0]
        rest = tuple(item for item in edit.target.objects if item != victim)
        used = {item.place for item in (*edit.source.objects, *edit.target.objects)}
        free = [
            spot
            for row in (0.17, 0.5, 0.83)
            for column in (0.17, 0.5, 0.83)
            if (spot := ShapeObject("circle", "red", column, row, 0.125)).place not in used
            and all(max(abs(spot.x - o.x), abs(spot.y - o.y)) > 0.28 for o in edit.target.objects)
        ]
        others = [
            rest,
            (*rest, replace(victim, color="green" if victim.color != "green" else "blue")),
            (*rest, replace(victim, shape="diamond" if victim.shape != "diamond" else "ring")),
        ]
        if free:
            others.append((*rest, replace(victim, x=free[0].x, y=free[0].y, radius=0.125)))
            others.append((*edit.target.objects, free[0]))
        background = edit.target.background
        for objects in others:
            verdict = judge_edit(render(Scene(background, objects)), edit)
            assert not verdict.preserved and not verdict.passed, edit.instruction
        if task != "background":
            other = "white" if background != "white" else "black"
            assert not judge_edit(render(Scene(other, edit.target.objects)), edit).preserved


def test_an_edit_made_wrongly_is_not_changed():
    recolored = Scene("black", (replace(RED_CIRCLE, color="green"), BLUE_SQUARE))
    edit = sample_edit(np.random.default_rng(0), "recolor")
    edit = replace(edit, source=SCENE, target=recolored, before=(RED_CIRCLE,), after=recolored.objects[:1])
    assert judge_edit(render(recolored), edit).passed
    for wrong in (replace(RED_CIRCLE, color="yellow"), replace(RED_CIRCLE, color="green", shape="square")):
        verdict = judge_edit(render(Scene("black", (wrong, BLUE_SQUARE))), edit)
        assert not verdict.changed and verdict.preserved
    verdict = judge_edit(render(Scene("black", (RED_CIRCLE, replace(BLUE_SQUARE, color="green")))), edit)
    assert not verdict.changed and not verdict.preserved


def test_a_whole_scene_is_judged():
    assert judge_scene(render(SCENE), SCENE).checks == {"objects": True, "extras": True, "background": True}
    mistakes = {
        "objects": replace(SCENE, objects=(RED_CIRCLE, replace(BLUE_SQUARE, y=0.2))),
        "extras": replace(SCENE, objects=(*SCENE.objects, replace(BLUE_SQUARE, y=0.85))),
        "background": replace(SCENE, background="white"),
    }
    for name, scene in mistakes.items():
        verdict = judge_scene(render(scene), SCENE)
        assert not verdict.passed and not verdict.checks[name]
        assert verdict.checks["objects"] == (name != "objects")


def test_a_story_can_be_consistent_and_wrong():
    def pictures(*objects: ShapeObject, background: str = "white") -> list[np.ndarray]:
        return [render(Scene(background, (item,))) for item in objects]

    moved = replace(RED_CIRCLE, x=0.75)
    story = [Scene("white", (RED_CIRCLE,)), Scene("white", (moved,))]
    assert judge_story(pictures(RED_CIRCLE, moved), story).passed
    green = [replace(item, color="green") for item in (RED_CIRCLE, moved)]
    verdict = judge_story(pictures(*green), story)
    assert verdict.checks == {"pictures": True, "scenes": False, "consistent": True}
    for wrong in (pictures(RED_CIRCLE, green[1]), [*pictures(RED_CIRCLE), *pictures(moved, background="black")]):
        assert judge_story(wrong, story).checks == {"pictures": True, "scenes": False, "consistent": False}
    assert judge_story(pictures(RED_CIRCLE), story).checks == {"pictures": False, "scenes": False, "consistent": False}
