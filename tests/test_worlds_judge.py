"""The judge of a world: it learns a few sprites in seconds, passes what is right, and names what is wrong."""

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import toy_world
from PIL import Image
from safetensors.torch import load_file

from nextflow_hf.worlds import emoji, judge
from nextflow_hf.worlds.judge import Judge, background_of, kept_psnr, train_judge
from nextflow_hf.worlds.sampling import Context
from nextflow_hf.worlds.scene import BACKGROUNDS, Scene, Thing, backdrop, box, canvases, paste, render
from nextflow_hf.worlds.sprites import Sprite
from nextflow_hf.worlds.suite import WorldSuite
from nextflow_hf.worlds.template_judge import TemplateJudge


CANVAS = (64, 64)
FOX, OCTOPUS = Sprite("fox", "flat"), Sprite("octopus", "noto")


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return toy_world.toy_sprites(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def folder(sprites, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    report = train_judge(sprites, folder, steps=150, batch_size=64, check_scenes=60)
    assert report["128"]["things"] > 0.9 and report["128"]["passed"] > 0.7
    assert report["64"]["background"] == report["64"]["count"] == 1
    return folder


@pytest.fixture
def scene():
    return Scene("green", (Thing(FOX, "left", "medium"), Thing(OCTOPUS, "right", "medium")))


def test_a_true_scene_passes(folder, sprites, scene):
    checks = Judge(folder).judge_image(Image.fromarray(render(scene, sprites, CANVAS)), scene)
    assert set(checks) == {"concept", "place", "style", "size", "count", "background", "passed"}
    assert all(checks.values())


def test_a_suite_says_whose_weights_score(folder, sprites):
    judge = Judge(folder)
    assert WorldSuite(sprites, judge, count=1).judged_by == {"judge_weights": judge.classifier}
    assert WorldSuite(sprites, TemplateJudge(sprites), count=1).judged_by == {}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (lambda s: replace(s, background="blue"), {"background"}),
        (
            lambda s: s.with_thing(s.things[0], Thing(Sprite("tall tower", "flat"), "left", "medium")),
            {"concept", "place"},
        ),
        (lambda s: replace(s, things=(*s.things, Thing(FOX, "top", "small"))), {"count"}),
        (lambda s: Scene(s.background, s.things[:1]), {"concept", "place"}),
        (lambda s: s.with_thing(s.things[0], Thing(FOX, "left", "small")), {"size"}),
        (lambda s: Scene(s.background, tuple(map(_swapped, s.things))), {"place"}),
    ],
)
def test_what_is_wrong_is_named(folder, sprites, scene, change, failed):
    image = render(change(scene), sprites, CANVAS)
    checks = Judge(folder).judge_image(image, scene)
    assert not checks["passed"] and not any(checks[name] for name in failed)


def _swapped(thing: Thing) -> Thing:
    return Thing(thing.sprite, {"left": "right", "right": "left"}[thing.place], thing.size)


def test_a_concept_is_found_where_it_should_not_be(folder, sprites, scene):
    image = render(Scene("green", tuple(map(_swapped, scene.things))), sprites, CANVAS)
    assert Judge(folder).judge_image(image, scene)["concept"]


def test_an_edit_keeps_the_rest(folder, sprites, scene):
    target = scene.with_thing(scene.things[0], Thing(Sprite("tall tower", "flat"), "left", "medium"))
    source, image = (render(s, sprites, CANVAS) for s in (scene, target))
    found = Judge(folder)
    assert found.judge_edit(image, scene, target, source)["passed"]
    assert not found.judge_edit(source, scene, target, source)["changed"]
    spoilt = image.copy()
    spoilt[:, 32:] = np.random.default_rng(0).integers(0, 255, spoilt[:, 32:].shape)
    assert not found.judge_edit(spoilt, scene, target, source)["kept"]
    assert kept_psnr(image, source, [box(scene.things[0], CANVAS)]) == float("inf")
    background = replace(scene, background="pink")
    assert found.judge_edit(render(background, sprites, CANVAS), scene, background, source)["passed"]


def test_the_reward_is_the_share_of_the_checks(folder, sprites, scene):
    images = [Image.fromarray(render(s, sprites, CANVAS)) for s in (scene, replace(scene, background="blue"))]
    right, wrong = emoji.Reward(str(folder))(images, scenes=[[json.dumps(scene.to_json())]] * 2, prompts=["", ""])
    assert right == 1 and 0.5 < wrong < 1


def test_the_reward_reports_the_boxes_that_it_looks_at(folder, sprites, scene):
    image = Image.fromarray(render(scene, sprites, CANVAS))
    found = []
    emoji.Reward(str(folder))([image], scenes=[[json.dumps(scene.to_json())]], prompts=[""], report_masks=found.extend)
    (mask,) = found
    places = [box(thing, CANVAS) for thing in scene.things]
    assert mask.shape == CANVAS and mask.sum() == sum(side * side for _, _, side in places)
    assert all(mask[top : top + side, left : left + side].all() for left, top, side in places)


@pytest.mark.parametrize("canvas", canvases(64))
def test_backgrounds_are_read_off_the_border(sprites, canvas):
    for index, name in enumerate(BACKGROUNDS):
        context = Context(sprites, Random(index), canvas)
        pixels = render(replace(context.scene(), background=name), sprites, canvas)
        noise = np.random.default_rng(index).normal(0, 6, pixels.shape)
        assert background_of((pixels + noise).clip(0, 255).astype(np.uint8)) == name
    assert background_of(np.random.default_rng(0).integers(0, 255, (*canvas, 3), dtype=np.uint8)) is None


def test_training_goes_on_to_the_same_weights(sprites, tmp_path, monkeypatch):
    options = {"steps": 4, "batch_size": 8, "save_steps": 2, "check_scenes": 1}
    train_judge(sprites, tmp_path / "whole", **options)
    train_step, calls = judge._train_step, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(judge, "_train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train_judge(sprites, tmp_path / "parts", **options)
    train_judge(sprites, tmp_path / "parts", **options)
    assert len(calls) == 4 + 2
    whole, parts = (load_file(tmp_path / name / "judge.safetensors") for name in ("whole", "parts"))
    assert all((whole[name] == parts[name]).all() for name in whole)
    train_judge(sprites, tmp_path / "ten", **options | {"steps": 10})  # fewer than a cycle needs to rise
    with pytest.raises(ValueError, match="of a judge of other sprites, or of other settings"):
        train_judge(sprites, tmp_path / "whole", **options, seed=1)


def test_what_lies_outside_is_cut_off(sprites):
    pixels = backdrop("white", CANVAS).copy()
    paste(pixels, sprites.draw(FOX, 32), -16, 48)
    assert (pixels[:48] == 248).all() and (pixels[:, 16:] == 248).all() and (pixels[48:, :16] != 248).any()
