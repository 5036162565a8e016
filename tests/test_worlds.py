"""Worlds: artwork is found by name, every row is a function of its seed, and every task says exactly what it shows."""

import hashlib
import json
from collections import Counter
from random import Random

import datasets
import numpy as np
import pytest
import toy_world

from nextflow_hf import cli
from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule
from nextflow_hf.training.data.description import load_images, load_rows, read_description
from nextflow_hf.training.data.mixture import MixtureArguments, load_mixture
from nextflow_hf.worlds import artwork, emoji
from nextflow_hf.worlds.captions import Speaker, caption, plural, read_caption, with_article
from nextflow_hf.worlds.dataset import TASKS, finish_row, sample_row
from nextflow_hf.worlds.demo import PROMPTS, write_demo
from nextflow_hf.worlds.dialect import Dialect
from nextflow_hf.worlds.edits import INSTRUCTIONS, changed_boxes, sample_edit
from nextflow_hf.worlds.questions import is_same, sample_questions
from nextflow_hf.worlds.sampling import Context, is_held_out
from nextflow_hf.worlds.scene import (
    BACKGROUNDS,
    CELLS,
    Scene,
    Thing,
    backdrop,
    box,
    canvases,
    default_places,
    fits,
    render,
)
from nextflow_hf.worlds.sprites import Sprite


CANVASES = canvases(64)


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return toy_world.toy_sprites(tmp_path_factory.mktemp("world"))


def contexts(sprites, count: int, **options):
    for seed in range(count):
        rng = Random(seed)
        yield Context(sprites, rng, rng.choice(CANVASES), seed % 2 == 1, **options)


# ---- artwork


def test_artwork_is_joined_by_name(sprites):
    assert "a flag" not in sprites.concepts  # of a group that is left out
    assert "rare thing" not in sprites.concepts  # in two styles only
    assert "one o’clock" not in sprites.concepts and "clock face" in sprites.concepts  # merged
    assert sprites.styles_of["octopus"] == ["noto", "glossy", "flat", "blob", "firefox"]
    assert sprites.styles_of["fox"] == ["noto", "glossy", "flat", "blob"]
    assert set(sprites.tones_of) == {(name, style) for name in toy_world.WITH_TONES for style in ("noto", "flat")}
    assert sprites.concepts["octopus"].synonyms == ("eight arms", "oct")
    assert "toy" not in sprites.concepts["fox"].synonyms  # means others, too


def test_a_mirrored_alias_is_mirrored(sprites):
    ball, octopus = (np.asarray(sprites.draw(Sprite(name, "firefox"), 64)) for name in ("red ball", "octopus"))
    np.testing.assert_array_equal(ball, octopus[:, ::-1])


def test_rendering_goes_on_and_leaves_no_part(tmp_path, monkeypatch):
    monkeypatch.setattr(artwork, "_CHUNK", 4)
    _, drawings = artwork.read_artwork(toy_world.write_archives(tmp_path / "artwork"))
    render_svg, calls = artwork.render_svg, Counter()

    def failing(drawing):
        calls["all"] += 1
        if calls["all"] == 7:
            raise KeyboardInterrupt
        return render_svg(drawing)

    monkeypatch.setattr(artwork, "render_svg", failing)
    with pytest.raises(KeyboardInterrupt):
        artwork.Rasters(tmp_path / "sprites", drawings[:8])
    assert [path.name[:6] for path in (tmp_path / "sprites").iterdir()] == ["000000"]
    rasters = artwork.Rasters(tmp_path / "sprites", drawings[:8])
    assert calls["all"] == 7 + 4
    assert [level.width for level in rasters.levels(drawings[7].sprite)] == [32, 64, 128]


def test_processes_may_render_at_once(tmp_path, monkeypatch):
    _, drawings = artwork.read_artwork(toy_world.write_archives(tmp_path / "artwork"))
    save, others = np.save, []

    def while_another_does(*args, **options):
        if not others:
            others.append(None)
            others[0] = artwork.Rasters(tmp_path / "sprites", drawings[:2])
        save(*args, **options)

    monkeypatch.setattr(np, "save", while_another_does)
    rasters = artwork.Rasters(tmp_path / "sprites", drawings[:2])
    assert others[0].levels(drawings[1].sprite)[0].tobytes() == rasters.levels(drawings[1].sprite)[0].tobytes()
    assert len(list((tmp_path / "sprites").iterdir())) == 1


def test_a_changed_archive_is_refused(tmp_path):
    path = toy_world.write_archives(tmp_path)["noto"]
    with pytest.raises(ValueError, match=f"{path.name} has the SHA-256 .*, expected 3e918d88"):
        artwork.fetch_archives(tmp_path)


def test_the_committed_list_has_enough_concepts_in_a_random_order():
    lines = [line.split("\t") for line in emoji.LIST.read_text(encoding="utf-8").splitlines()]
    codes = [code for code, _ in lines]
    assert len(set(codes)) == len(codes) > 1300 and len({name for _, name in lines}) == len(lines)
    assert codes != sorted(codes)


def test_one_tenth_of_the_pairs_is_held_out():
    names = [f"thing {index}" for index in range(2000)]

    class Source:
        numbers = {Sprite(name, style): 0 for name in names for style in "abcd"}

    sprites = emoji.Sprites(dict.fromkeys(names), {style: (style,) for style in "abcd"}, Source(), Dialect())
    assert abs(len(sprites.held_out) / 8000 - 0.1) < 0.01
    assert max(Counter(name for name, _ in sprites.held_out).values()) == 1


# ---- scenes


@pytest.mark.parametrize("resolution", [64, 96, 128])
def test_canvases_have_whole_patches_and_ratios_up_to_two(resolution):
    sizes = canvases(resolution)
    assert all(side % 8 == 0 for size in sizes for side in size)
    assert all(0.85 < height * width / resolution**2 < 1.04 for height, width in sizes)
    schedule = ScaleSchedule((1, resolution // 8), 8, bucket_area=144, min_bucket_fill=0.88, max_aspect_ratio=2.0)
    assert [schedule.pixel_size(schedule.nearest_bucket(*size), 2) for size in sizes] == sizes
    ratios = [height / width for height, width in sizes]
    assert min(ratios) < 0.56 and max(ratios) > 1.8 and 1 in ratios


def test_a_canvas_without_room_is_refused_and_not_searched_for_ever(sprites):
    with pytest.raises(ValueError, match="4 sprites of at least 16 pixels fit into no image of 32x32: name a larger"):
        sample_row(sprites, "text_to_image", "0/0", [(32, 32)])


@pytest.mark.parametrize("canvas", canvases(64) + canvases(96))
def test_default_arrangements_fit(sprites, canvas):
    for count in range(1, 5):
        scene = Context(sprites, Random(0), canvas).arrange(
            [Sprite("fox", "noto")] * count, "white", default_places(count, canvas)
        )
        assert scene is not None and fits(scene.things, canvas)
        for thing in scene.things:
            left, top, side = box(thing, canvas)
            assert 0 <= left <= canvas[1] - side and 0 <= top <= canvas[0] - side
            row, column = CELLS[thing.place]
            assert (top + side / 2) * 3 // canvas[0] == row and (left + side / 2) * 3 // canvas[1] == column


@pytest.mark.parametrize("canvas", canvases(64) + canvases(96) + canvases(128))
def test_places_lie_apart(canvas):
    for size in ("small", "medium"):
        for place, cell in CELLS.items():
            left, top, side = box(Thing(Sprite("fox", "noto"), place, size), canvas)
            assert ((top + side / 2) * 3 // canvas[0], (left + side / 2) * 3 // canvas[1]) == cell


def test_scenes_differ_only_in_the_boxes_of_their_things(sprites):
    for context in contexts(sprites, 20):
        scene = context.scene()
        changed = render(scene, sprites, context.canvas) != backdrop(scene.background, context.canvas)
        for thing in scene.things:
            left, top, side = box(thing, context.canvas)
            assert changed[top : top + side, left : left + side].any()
            changed[top : top + side, left : left + side] = False
        assert not changed.any()


def test_a_scene_comes_back_from_json(sprites):
    for context in contexts(sprites, 10):
        scene = context.scene()
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


# ---- words


@pytest.mark.parametrize(
    ("name", "article", "many"),
    [
        ("octopus", "an octopus", "octopuses"),
        ("unicorn", "a unicorn", "unicorns"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("cat with tears of joy", "a cat with tears of joy", "cats with tears of joy"),
        ("man shrugging", "a man shrugging", "men shrugging"),
        ("chopsticks", "chopsticks", "chopsticks"),
        ("thumbs up", "thumbs up", "thumbs up"),
        ("butterfly", "a butterfly", "butterflies"),
        ("waving hand", "a waving hand", "waving hands"),
    ],
)
def test_english(name, article, many):
    assert with_article(name) == article and plural(name) == many


def test_a_caption_reads_back_as_its_scene(sprites):
    for context in contexts(sprites, 100):
        scene = context.scene()
        read = read_caption(sprites, caption(sprites, scene))
        assert read.background == scene.background and Counter(read.things) == Counter(scene.things)
    assert read_caption(sprites, "a cat") is None


def test_clean_words_are_names_and_people_say_more(sprites):
    scene = Context(sprites, Random(0), (64, 64)).arrange([Sprite("octopus", "flat")], "blue")
    clean = {
        Speaker(sprites, Random(i)).request(Speaker(sprites, Random(i)).describe(scene, (64, 64))) for i in range(50)
    }
    people = {
        speaker.request(speaker.describe(scene, (64, 64)))
        for speaker in (Speaker(sprites, Random(i), people=True) for i in range(300))
    }
    assert all(text.islower() and "flat octopus" in text and "please" not in text for text in clean)
    assert len(people) > 100
    for sign in ("please", "eight arms", "in flat style", "."):
        assert any(sign in text.lower() for text in people)
    assert any(text.isupper() for text in people)


def test_a_background_that_stands_first_follows_nothing(sprites):
    texts = [sample_row(sprites, task, str(n), CANVASES, people=True)[0] for task in TASKS for n in range(150)]
    said = [value.lower() for row in texts for value in row.columns.values() if isinstance(value, str)]
    assert any(text.startswith("on ") for text in said)
    assert not [text for text in said if " of on " in text or " with on " in text or "put on " in text]


def test_a_description_settles_the_scene(sprites):
    """No two scenes of one canvas share a clean description."""
    seen: dict = {}
    for seed in range(3000):
        context = Context(sprites, Random(seed), (64, 64))
        scene = context.scene()
        words = context.say.describe(scene, context.canvas)
        picture = hashlib.sha256(render(scene, sprites, context.canvas)).digest()
        assert seen.setdefault(words, picture) == picture, words


def test_only_what_looks_alike_is_counted(sprites):
    fox = Sprite("fox", "noto")
    alike = Context(sprites, Random(0), (64, 64)).arrange([fox, fox], "white", ("left", "right"))
    differing = alike.with_thing(alike.things[0], Thing(fox, "left", "small"))
    words = [
        {Speaker(sprites, Random(seed)).describe(scene, (64, 64)) for seed in range(40)}
        for scene in (alike, differing)
    ]
    assert "two noto foxes" in words[0]
    assert all("small" in text and "two" not in text for text in words[1])


# ---- tasks


@pytest.mark.parametrize("kind", list(INSTRUCTIONS))
def test_an_edit_changes_what_it_says_and_nothing_else(sprites, kind):
    for context in contexts(sprites, 15):
        edit = sample_edit(context, kind)
        before, after = (render(scene, sprites, context.canvas) for scene in (edit.source, edit.target))
        differs = (before != after).any(-1)
        assert differs.any()
        boxes = changed_boxes(edit.source, edit.target, context.canvas)
        assert (boxes is None) == (kind == "background")
        for left, top, side in boxes or ():
            differs[top : top + side, left : left + side] = False
        assert kind == "background" or not differs.any()
        old, new = ({thing.place for thing in scene.things} for scene in (edit.source, edit.target))
        assert (old == new) == (kind not in ("add", "remove", "move", "count"))
        assert fits(edit.target.things, context.canvas)


def test_questions_have_right_answers(sprites):
    kinds = set()
    for context in contexts(sprites, 60):
        scene = context.scene()
        for question in sample_questions(context, scene, 5):
            kinds.add(question.kind)
            concepts = [thing.sprite.concept for thing in scene.things]
            if question.kind == "background":
                assert question.answer == scene.background
            elif question.kind in ("concept", "relation"):
                assert question.answer in [with_article(name) for name in concepts]
            elif question.kind == "existence" and question.answer == "yes":
                names = [w for name in concepts for w in (name, *sprites.concepts[name].synonyms)]
                assert any(name.lower() in question.text.lower() for name in names)
    assert kinds == {"concept", "style", "background", "count", "existence", "place", "relation"}
    assert is_same("The Octopus.", "an octopus")
    assert not is_same("a fox", "an octopus")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test", "held_out"])
def test_rows_are_functions_of_their_key_and_keep_to_their_split(sprites, task, split):
    if not TASKS[task].tests and split != "train":
        return
    for number in range(6):
        row, context = sample_row(sprites, task, f"0/{number}", CANVASES, split=split)
        again = finish_row(sprites, task, *sample_row(sprites, task, f"0/{number}", CANVASES, split=split))
        assert finish_row(sprites, task, row, context) == again
        pairs = {(t.sprite.concept, t.sprite.style) for scene in row.scenes for t in scene.things}
        assert bool(pairs & sprites.held_out) == (split == "held_out")
        keys = [json.dumps(scene.to_json()) for scene in row.scenes]
        if split == "train":
            assert not any(map(is_held_out, keys)) and not (row.sentence and is_held_out(row.sentence.lower()))
        elif split == "test":
            assert is_held_out(keys[-1] if row.sentence is None else row.sentence.lower())


def test_the_command_writes_what_extraction_and_the_tokenizer_read(tmp_path, monkeypatch, capsys):
    paths = toy_world.write_archives(tmp_path / "artwork")
    packages = {
        style: (*artwork.PACKAGES[style][:2], hashlib.sha256(path.read_bytes()).hexdigest())
        for style, path in paths.items()
    }
    monkeypatch.setattr(artwork, "PACKAGES", packages)
    found, _ = artwork.read_artwork(paths)
    monkeypatch.setattr(emoji, "LIST", tmp_path / "list.txt")
    emoji.LIST.write_text("".join(f"-\t{name}\n" for name in emoji.concept_order(found)))
    folder = tmp_path / "data"
    command = ["world", "emoji", "--output-dir", str(folder), "--artwork", str(tmp_path / "artwork"), "--rows", "60"]
    command += ["--test-rows", "2", "--images", "20", "--concepts", "8"]
    assert cli.main(command) == 0
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert cli.main(command) == 0  # all is there already
    assert written == {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert cli.main([*command, "--seed", "1"]) == 2
    assert "was begun with {'seed': 0}, got {'seed': 1}" in capsys.readouterr().err

    rows = list(load_rows(read_description(folder / "64" / "data.yaml")))
    assert len(rows) == 60 and not [row["error"] for row in rows if row["error"]]
    assert {row["source"] for row in rows} == set(TASKS)
    drawn = [row for row in rows if row["source"] == "text_to_image"]
    assert {row["task"] for row in drawn} == {"text_to_image"}
    story = next(row for row in rows if row["source"] == "story")
    assert [part["type"] for part in story["messages"][1]["content"]][:2] == ["text", "image"]
    for row in rows:
        assert len(row["images"]) == sum(p["type"] == "image" for m in row["messages"] for p in m["content"])
    single = ["--dataset", "single", "--tasks", "text_to_image", "--categories", "single", "--sizes", "64x64"]
    assert cli.main([*command, *single]) == 0
    rows = datasets.load_dataset("parquet", data_dir=str(folder / "single/train/text_to_image"), split="train")
    assert set(rows["category"]) == {"single"} and {image.size for image in rows["image"]} == {(64, 64)}

    test = MixtureArguments(sources=[{"path": str(folder / "64/held_out/edit"), "format": "parquet", "task": "edit"}])
    assert len(load_mixture(test)) == 2
    assert len(load_images(read_description(folder / "64" / "images" / "train"))) == 20
    first = datasets.load_dataset("parquet", data_files=str(folder / "64/train/edit/*.parquet"), split="train")[0]
    scene = Scene.from_json(json.loads(first["scenes"][-1]))
    assert scene.background in BACKGROUNDS
    assert first["target"].size == (first["width"], first["height"])


def test_a_demo_asks_for_what_no_training_saw_and_lists_all_that_is_known(sprites, tmp_path, capsys):
    for folder in ("one", "two"):
        write_demo(sprites, tmp_path / folder, 64)
    texts = [(tmp_path / folder / "demo.json").read_text() for folder in ("one", "two")]
    assert texts[0] == texts[1]
    demo = json.loads(texts[0])
    new = demo["prompts"][PROMPTS["test"] : sum(PROMPTS.values())]
    assert all(is_held_out(text.lower()) for text in demo["prompts"][: PROMPTS["test"]])
    assert all(any(concept in text for concept, _ in sprites.held_out) for text in new)
    assert [index for index, _ in demo["edits"]] == list(range(12, len(demo["prompts"])))
    assert len(demo["stories"]) == 2 and demo["conversations"][-1].endswith("?")
    lines = (tmp_path / "one" / "concepts.txt").read_text().splitlines()
    assert len(lines) == 1 + len(sprites.concepts) and lines[0].startswith(f"# {len(sprites.concepts)} concepts in ")
    assert sum(line.count("[") for line in lines[1:]) == len(sprites.held_out) > 0
    command = ["world", "shapes", "--output-dir", str(tmp_path), "--demo", str(tmp_path / "shapes")]
    assert cli.main([*command, "--tasks", "text_to_image", "--categories", "single"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "shapes" / "demo.json")
    demo = json.loads((tmp_path / "shapes" / "demo.json").read_text())
    assert list(demo) == ["prompts"] and len(demo["prompts"]) == 8


def test_what_npm_says_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "npm").write_text("#!/bin/sh\necho 'npm error: no network' >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert cli.main(["world", "emoji", "--output-dir", str(tmp_path / "data")]) == 2
    assert "failed: npm error: no network" in capsys.readouterr().err


def test_an_unknown_world_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["world", "shapes", "--output-dir", str(tmp_path), "--sizes", "64"])
    assert "--sizes: '64' is no size, expected HEIGHTxWIDTH" in capsys.readouterr().err
    assert cli.main(["world", "nowhere", "--output-dir", str(tmp_path)]) == 2
    assert "there is no world 'nowhere'" in capsys.readouterr().err
