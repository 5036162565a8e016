"""A world as ordinary data sets: rows of every task, each a function of (seed, split, task, number), as parquet files.

A row has the form that people have it in (a captioned image, an edit triplet, LLaVA's turns, `messages`, plain text),
which `nextflow-hf extract` reads; its further columns (`category`, `wording`, `scenes`) are for an evaluation. `train`
has no held-out pair, sentence or scene. In `test` every sentence is held out, or the last scene where an image asks.
In `held_out` every row has a held-out pair.
"""

import io
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import datasets
import numpy as np
import yaml
from PIL import Image
from tqdm.auto import tqdm

from ..atomic import write_file, write_text
from ..processing.messages_nextflow import THINKING_PROMPT, join_reasoning
from .captions import caption
from .edits import sample_edit, sample_subject
from .questions import sample_questions
from .sampling import Context, is_held_out
from .scene import MAX_THINGS, Canvas, Scene, render, render_loose
from .sprites import Sprites
from .stories import sample_examples, sample_story
from .thinking import sample_conversation, sample_implied, sample_text


SPLITS = ("train", "test", "held_out")
PEOPLE_SHARE = 0.5  # of the rows, worded as people write
ROWS_PER_FILE = 2000
_MAX_ATTEMPTS = 1000  # to sample a row of a category


@dataclass
class Row:
    """
    A row before it has pixels.

    Args:
        columns (`dict`): What it says, by the names of the task's columns but for its images.
        scenes (`tuple[Scene, ...]`): Scenes of its images, in reading order.
        category (`str`): Within the task.
        sentence (`str`, *optional*): What must be in the right split; None where the image asks.
        open_background (`bool`, *optional*): Whether any background of the last scene is right.
    """

    columns: dict
    scenes: tuple[Scene, ...]
    category: str
    sentence: str | None = None
    open_background: bool = False


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


_IMAGE = {"type": "image", "text": None}


def _turn(role: str, *parts: dict) -> dict:
    return {"role": role, "content": list(parts)}


# ---- the tasks


def _text_to_image(context: Context) -> Row:
    scene = context.scene()
    is_open = context.dialect.default_background is None and context.say.maybe(0.5)
    text = context.say.request(context.say.describe(scene, context.canvas, background=not is_open))
    kind = "single" if len(scene.things) == 1 else "count" if len(set(_sprites(scene))) == 1 else "composition"
    return Row({"text": text}, (scene,), kind, text, is_open)


def _sprites(scene: Scene) -> list:
    return [thing.sprite for thing in scene.things]


def _edit(context: Context) -> Row:
    edit = sample_edit(context)
    return Row({"instruction": edit.instruction}, (edit.source, edit.target), edit.kind, edit.instruction)


def _subject(context: Context) -> Row:
    subject = sample_subject(context)
    kind = f"{len(subject.sources)}_subjects"
    return Row({"instruction": subject.instruction}, (*subject.sources, subject.target), kind)


def _caption(context: Context) -> Row:
    scene = context.scene() if context.say.maybe(0.5) else context.spread(context.rng.randint(1, MAX_THINGS))
    request = context.say.manner(context.rng.choice(context.dialect.caption_requests))
    return Row({"question": request, "answer": caption(context.sprites, scene)}, (scene,), str(len(scene.things)))


def _questions(context: Context) -> Row:
    scene = context.scene() if context.say.maybe(0.5) else context.spread(context.rng.randint(1, MAX_THINGS))
    questions = sample_questions(context, scene, context.rng.randint(1, 5))
    turns = []
    for question in questions:
        image = "" if turns else "<image>\n"
        turns.append({"from": "human", "value": f"{image}{question.text}"})
        turns.append({"from": "gpt", "value": question.answer})
    return Row({"conversations": turns}, (scene,), questions[0].kind) if turns else _questions(context)


def _thinking(context: Context) -> Row:
    """Think before the image where the system message asks for it; answer the same prompts directly without it."""
    implied = sample_implied(context)
    answer = (_IMAGE,)
    turns = [_turn("user", _text(implied.text))]
    if thinks := context.say.maybe(0.8):
        turns.insert(0, _turn("system", _text(THINKING_PROMPT)))
        answer = (_text(join_reasoning(implied.reasoning, implied.explicit)), _IMAGE)
    kind = "thinking" if thinks else "direct"
    return Row({"messages": [*turns, _turn("assistant", *answer)]}, (implied.scene,), kind, implied.text)


def _story(context: Context) -> Row:
    story = sample_story(context)
    answer = [part for sentence in story.sentences for part in (_text(sentence), _IMAGE)]
    turns = [_turn("user", _text(story.text)), _turn("assistant", *answer)]
    return Row({"messages": turns}, story.scenes, story.kind, story.text)


def _examples(context: Context) -> Row:
    pair = sample_examples(context)
    asked = [_IMAGE, _text("is to"), _IMAGE, _text("as"), _IMAGE, _text("is to")]
    return Row({"messages": [_turn("user", *asked), _turn("assistant", _IMAGE)]}, pair.scenes, pair.rule)


def _conversation(context: Context) -> Row:
    conversation = sample_conversation(context)
    turns = []
    for asked, answer in conversation.turns:
        turns.append(_turn("user", _text(asked)))
        turns.append(_turn("assistant", _IMAGE if isinstance(answer, Scene) else _text(answer)))
    scenes = tuple(answer for _, answer in conversation.turns if isinstance(answer, Scene))
    return Row({"messages": turns}, scenes, " ".join(conversation.kinds), conversation.turns[0][0])


def _plain_text(context: Context) -> Row:
    text = sample_text(context)
    return Row({"text": text}, (), "text", text)


_IMAGE_FEATURE = datasets.Image()
_STRING = datasets.Value("string")
_MESSAGES = {
    "messages": datasets.List({"role": _STRING, "content": datasets.List({"type": _STRING, "text": _STRING})}),
    "images": datasets.List(_IMAGE_FEATURE),
}


@dataclass(frozen=True)
class Task:
    """
    A kind of rows.

    Args:
        sample (`Callable`): Makes one.
        share (`float`): Share of all rows.
        format (`str`): The task by which `nextflow-hf extract` reads them.
        features (`dict`): Its columns. Images fill those named "image", "target", "source" (a list) and "images".
        tests (`bool`, *optional*, defaults to `True`): Whether it is in the splits for evaluation.
    """

    sample: Callable[[Context], Row]
    share: float
    format: str
    features: dict
    tests: bool = True


_EDIT = {"source": datasets.List(_IMAGE_FEATURE), "instruction": _STRING, "target": _IMAGE_FEATURE}
_TURNS = {"conversations": datasets.List({"from": _STRING, "value": _STRING}), "image": _IMAGE_FEATURE}
TASKS = {
    "text_to_image": Task(_text_to_image, 0.36, "text_to_image", {"image": _IMAGE_FEATURE, "text": _STRING}),
    "edit": Task(_edit, 0.22, "edit", _EDIT),
    "subject": Task(_subject, 0.06, "edit", _EDIT),
    "caption": Task(
        _caption, 0.09, "image_to_text", {"question": _STRING, "image": _IMAGE_FEATURE, "answer": _STRING}
    ),
    "questions": Task(_questions, 0.08, "conversation", _TURNS),
    "thinking": Task(_thinking, 0.04, "messages", _MESSAGES),
    "story": Task(_story, 0.05, "messages", _MESSAGES),
    "examples": Task(_examples, 0.03, "messages", _MESSAGES),
    "conversation": Task(_conversation, 0.05, "messages", _MESSAGES),
    "text": Task(_plain_text, 0.02, "text", {"text": _STRING}, tests=False),
}
_MORE = {"category": _STRING, "wording": _STRING, "height": datasets.Value("int32"), "width": datasets.Value("int32")}
_MORE["scenes"] = datasets.List(_STRING)


def shares(sprites: Sprites) -> dict[str, float]:
    """Return the share of every task in a world's training rows."""
    found = {name: task.share for name, task in TASKS.items()} | sprites.dialect.shares
    return {name: share for name, share in found.items() if share}


def test_splits(sprites: Sprites) -> tuple[str, ...]:
    """Return the evaluation splits of a world."""
    return SPLITS[1:] if sprites.held_out else SPLITS[1:2]


def sample_row(
    sprites: Sprites,
    task: str,
    key: str,
    canvases: list[Canvas],
    *,
    split: str = "train",
    people: bool | None = None,
    categories: Collection[str] | None = None,
) -> tuple[Row, Context]:
    """
    Sample the row of a task that `key` names, or the next one of `categories`, and its context.

    `people=None` words half of the rows as people do.
    """
    for attempt in range(_MAX_ATTEMPTS):
        row, context = _sample_row(sprites, task, f"{key}/{attempt}" if attempt else key, canvases, split, people)
        if categories is None or row.category in categories:
            return row, context
    raise ValueError(f"no row of {task} in {_MAX_ATTEMPTS} is of the categories {list(categories or ())}")


def _sample_row(
    sprites: Sprites, task: str, key: str, canvases: list[Canvas], split: str, people: bool | None
) -> tuple[Row, Context]:
    rng = Random(f"{key}/{split}/{task}")
    canvas = rng.choice(canvases)
    people = rng.random() < PEOPLE_SHARE if people is None else people
    while True:
        context = Context(sprites, rng, canvas, people, "held_out" if split == "held_out" else "seen")
        row = TASKS[task].sample(context)
        if _is_in_split(row, split, sprites):
            return row, context


def _is_in_split(row: Row, split: str, sprites: Sprites) -> bool:
    """In `test`, the sentence is held out; where there is none, the last scene is."""
    if split == "held_out":
        shown = (thing.sprite for scene in row.scenes for thing in scene.things)
        return any((sprite.concept, sprite.style) in sprites.held_out for sprite in shown)
    scenes = [json.dumps(scene.to_json()) for scene in row.scenes]
    if split == "train":
        return not (row.sentence is not None and is_held_out(row.sentence.lower()) or any(map(is_held_out, scenes)))
    return is_held_out(scenes[-1] if row.sentence is None else row.sentence.lower())


def encode(pixels: np.ndarray) -> dict:
    """Encode pixels as a PNG in the form that `datasets` stores."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}


def finish_row(sprites: Sprites, task: str, row: Row, context: Context) -> dict:
    """Render a row: the columns of its task, with images."""
    images = [encode(render(scene, sprites, context.canvas)) for scene in row.scenes]
    values = dict(row.columns)
    for name in TASKS[task].features:
        if name == "image" or name == "target":
            values[name] = images[-1]
        elif name in ("source", "images"):
            values[name] = images[:-1] if name == "source" else images
    height, width = context.canvas
    wording = "people" if context.people else "clean"
    scenes = [scene.to_json() for scene in row.scenes]
    if row.open_background:
        scenes[-1]["background"] = None
    scenes = [json.dumps(scene) for scene in scenes]
    return {**values, "category": row.category, "wording": wording, "height": height, "width": width, "scenes": scenes}


# ---- the files


def write_dataset(
    sprites: Sprites,
    folder: Path,
    canvases: list[Canvas],
    *,
    seed: int = 0,
    rows: int = 100_000,
    test_rows: int = 200,
    images: int = 20_000,
    tasks: Iterable[str] | None = None,
    categories: Collection[str] | None = None,
) -> None:
    """
    Writes what training and evaluation need, and goes on where it was interrupted: a file is complete or not there.

    Args:
        sprites ([`Sprites`]): Sprites of the world.
        folder (`Path`): Gets `train/TASK`, `test/TASK`, `held_out/TASK`, `images/train`, `images/test` with parquet
            files, and `data.yaml`, which every training takes, with `prompts.yaml`, its images from words alone.
        canvases (`list[tuple[int, int]]`): Heights and widths of the images.
        seed (`int`, *optional*, defaults to 0): Seed of everything.
        rows (`int`, *optional*): Rows of all training tasks together, in their shares.
        test_rows (`int`, *optional*): Rows of each task in each split for evaluation, half of them in clean wording.
        images (`int`, *optional*): For the vision tokenizer; a twentieth as many to evaluate it.
        tasks (`Iterable[str]`, *optional*): Those of [`shares`] that are written.
        categories (`Collection[str]`, *optional*): Write only rows of these categories, such as "single".
    """
    datasets.disable_progress_bars()  # they count batches; ours count rows
    chosen = {name: share for name, share in shares(sprites).items() if tasks is None or name in tasks}
    numbers = {"seed": seed, "rows": rows, "test_rows": test_rows, "images": images, "concepts": len(sprites.names)}
    kinds = {"tasks": list(chosen), "categories": categories and list(categories)}
    _check_manifest(folder, {**numbers, **kinds, "sizes": [list(canvas) for canvas in canvases]})
    whole = sum(chosen.values())
    for name, share in chosen.items():
        count = max(1, round(rows * share / whole))
        _write_task(sprites, folder / "train" / name, name, canvases, "train", seed, count, categories)
        for split in test_splits(sprites) if TASKS[name].tests else ():
            _write_task(sprites, folder / split / name, name, canvases, split, seed, test_rows, categories)
    for split, count in (("train", images), ("test", images // 20)):
        _write_images(sprites, folder / "images" / split, canvases, f"{seed}/images/{split}", count)
    sources = []
    for name, share in chosen.items():
        task = TASKS[name].format
        source = {"path": str(folder / "train" / name), "format": "parquet", "task": task, "label": name}
        # Captions are rows of their own: a request to draw is none.
        inversion = {"inversion_rate": 0.0} if task == "text_to_image" else {}
        sources.append({**source, "weight": round(share, 3), **inversion})
    mixture = {"stopping_strategy": "all_exhausted_without_replacement", "sources": sources}
    command = f"# nextflow-hf extract {folder / 'data.yaml'} model=MODEL output_dir=CODES\n"
    write_text(folder / "data.yaml", command + yaml.safe_dump(mixture, sort_keys=False))
    prompts = {**sources[0], "extra_columns": ["scenes"]}  # images from words alone, and prompts of GRPO
    write_text(folder / "prompts.yaml", yaml.safe_dump({"sources": [prompts]}, sort_keys=False))


def _check_manifest(folder: Path, options: dict) -> None:
    """Refuse to continue a folder that was begun with other options."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "world.json"
    begun = json.loads(path.read_text()) if path.exists() else options
    if changed := [name for name in options if options[name] != begun.get(name)]:
        was, now = ({name: values.get(name) for name in changed} for values in (begun, options))
        raise ValueError(f"{folder} was begun with {was}, got {now}: delete it, or name another --output-dir")
    write_text(path, json.dumps(options))


def _write_task(
    sprites: Sprites,
    folder: Path,
    task: str,
    canvases: list[Canvas],
    split: str,
    seed: int,
    count: int,
    categories: Collection[str] | None,
) -> None:
    features = datasets.Features({**TASKS[task].features, **_MORE})

    def make(number: int) -> dict:
        people = None if split == "train" else number % 2 == 1
        row, context = sample_row(
            sprites, task, f"{seed}/{number}", canvases, split=split, people=people, categories=categories
        )
        return finish_row(sprites, task, row, context)

    _write_files(folder, features, make, count, f"{split} {task}")


def _write_images(sprites: Sprites, folder: Path, canvases: list[Canvas], key: str, count: int) -> None:
    """Write images, half of them scenes, half sprites of any size anywhere, without held-out pairs."""

    def make(number: int) -> dict:
        rng = Random(f"{key}/{number}")
        context = Context(sprites, rng, rng.choice(canvases))
        if rng.random() < 0.5:
            return {"image": encode(render(context.scene(), sprites, context.canvas))}
        drawings = [context.sprite() for _ in range(rng.choice((1, 1, 2, 3, 4)))]
        return {"image": encode(render_loose(rng, sprites, drawings, context.background(), context.canvas))}

    _write_files(folder, datasets.Features({"image": _IMAGE_FEATURE}), make, count, f"images {folder.name}")


def _write_files(
    folder: Path, features: datasets.Features, make: Callable[[int], dict], count: int, title: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, ROWS_PER_FILE):
        path = folder / f"{start // ROWS_PER_FILE:05d}.parquet"
        if path.exists():
            continue
        numbers = tqdm(range(start, min(start + ROWS_PER_FILE, count)), desc=f"{title} {path.stem}", unit="row")
        rows = datasets.Dataset.from_list(list(map(make, numbers)), features=features)
        write_file(path, rows.to_parquet)
