"""A world's evaluation: held-out rows of every task, in clean words and as people write them, judged turn by turn.

Sample `i` of a group depends on (seed, i) alone, so a longer evaluation begins with the shorter one.
"""

import io
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from ..processing.messages_nextflow import split_reasoning
from ..training.data import tasks as row_formats
from ..training.evaluation.suite import Answer, Part, Sample, Turn, check_upscale_factor, images_of, text_of
from .captions import read_caption
from .dataset import TASKS, finish_row, sample_row, shares, test_splits
from .judge import Judge, kept_psnr
from .questions import is_same
from .scene import Canvas, Scene, canvases
from .sprites import Sprites


WORDINGS = ("clean", "people")
_MAX_IMAGES = 4
_RECONSTRUCTION = "reconstruction"
_TO_MESSAGES = {  # the columns of a task, as `nextflow-hf extract` reads them
    "text_to_image": lambda row: row_formats.text_to_image(row["image"], row["text"]),
    "edit": lambda row: row_formats.edit(row["source"], row["instruction"], row["target"]),
    "image_to_text": lambda row: row_formats.image_to_text(row["image"], row["answer"], row["question"]),
    "conversation": lambda row: row_formats.conversation(row["conversations"], [row["image"]]),
    "messages": lambda row: row_formats.ready_messages(row["messages"], row["images"]),
}


class WorldSuite:
    """
    The suite of a world.

    Args:
        sprites ([`Sprites`]): Sprites of the world.
        judge ([`Judge`]): Judge of its images.
        resolution (`int`, *optional*, defaults to 64): Resolution of the images, in all of the world's ratios.
        count (`int`, *optional*, defaults to 100): Samples of each task in each wording.
        tasks (`Sequence[str]`, *optional*):
            Those that are asked; all of the world where left out. "reconstruction" judges true images through the
            vision tokenizer, for which that is model enough: the ceiling of what any model can reach with it.
        wordings (`Sequence[str]`, *optional*): Clean, and as people write.
        split (`str`, *optional*, defaults to `"test"`): "held_out" asks for pairs that no training saw.
        categories (`Sequence[str]`, *optional*): Ask only for rows of these categories, such as "single".
        sizes (`Sequence[Canvas]`, *optional*): Heights and widths of the images, instead of the world's ratios.
        seed (`int`, *optional*, defaults to 0): Seed of the samples, not of the model.
        upscale_factor (`int`, *optional*, defaults to 1):
            Side of the images that "reconstruction" draws and judges, in units of what the vision tokenizer decodes
            to; decoded images of another size are resized bicubically.
    """

    name = "world"

    def __init__(
        self,
        sprites: Sprites,
        judge: Judge,
        *,
        resolution: int = 64,
        count: int = 100,
        tasks: Sequence[str] | None = None,
        wordings: Sequence[str] = WORDINGS,
        split: str = "test",
        categories: Sequence[str] | None = None,
        sizes: Sequence[Canvas] | None = None,
        seed: int = 0,
        upscale_factor: int = 1,
    ):
        possible = [name for name in shares(sprites) if TASKS[name].tests]
        known = {"tasks": (tasks, [*possible, _RECONSTRUCTION]), "wordings": (wordings, WORDINGS)}
        for name, (given, names) in {**known, "split": ([split], test_splits(sprites))}.items():
            if unknown := sorted({*(given or ())} - {*names}):
                raise ValueError(f"{name} has {unknown}, expected some of {list(names)}")
        self.sprites, self.judge, self.split, self.seed = sprites, judge, split, seed
        self.categories, self.resolution = categories, resolution
        self.upscale_factor = check_upscale_factor(upscale_factor)
        self.canvases = [tuple(size) for size in sizes or canvases(resolution, sprites.dialect.ratios)]
        self.without = ("transformer",) if tasks and {*tasks} == {_RECONSTRUCTION} else ()
        names = [(task, wording) for wording in wordings for task in tasks or possible]
        self.ids = [f"{task}-{wording}-{number:04d}" for number in range(count) for task, wording in names]
        self.judged_by = {} if judge.classifier is None else {"judge_weights": judge.classifier}
        self.sample = lru_cache(maxsize=None)(self._sample)

    def _sample(self, id: str) -> Sample:
        task, wording, number = id.split("-")
        shown, factor = ("text_to_image", self.upscale_factor) if task == _RECONSTRUCTION else (task, 1)
        sizes = [(height * factor, width * factor) for height, width in self.canvases]
        key, people = f"{self.seed}/evaluation/{int(number)}", wording == "people"
        row, context = sample_row(
            self.sprites, shown, key, sizes, split=self.split, people=people, categories=self.categories
        )
        values = finish_row(self.sprites, shown, row, context)
        if task == _RECONSTRUCTION:
            image = Image.open(io.BytesIO(values["image"]["bytes"])).convert("RGB")
            turn = Turn("reconstruct", [{"role": "user", "content": [{"type": "image", "image": image}]}])
            settings = {"resolution": self.resolution, "upscale_factor": self.upscale_factor}
            return Sample(id, [turn], task, row.category, settings, (task, row.scenes, []))
        messages, encoded = _TO_MESSAGES[TASKS[task].format](values)
        images = iter([Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in encoded])
        turns, expected, true_images, pending = [], [], [], []
        for message in messages:
            parts = [
                {**part, "image": next(images)} if part["type"] == "image" else part for part in message["content"]
            ]
            if message["role"] == "assistant":
                turns.append(Turn(_ability(message["content"]), pending))
                expected.append(message["content"])
                true_images += images_of(parts)
                pending = []
            else:
                pending.append({**message, "content": parts})
        scenes = [Scene.from_json(json.loads(scene)) for scene in values["scenes"]]
        height, width = context.canvas
        longest = {"max_images": _MAX_IMAGES, "max_new_tokens": 256} if task == "story" else {"max_new_tokens": 96}
        settings = {"height": height, "width": width, **longest}
        group = f"{task}, {wording}"
        category = "conversation" if task == "conversation" else values["category"]
        return Sample(id, turns, group, category, settings, (task, scenes, expected), true_images)

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """Return the judge's checks over all images, "text" over all answers in words, and "passed": all of them."""
        task, scenes, expected = sample.reference
        if task == _RECONSTRUCTION:
            true, decoded = map(np.asarray, images_of(answer[0]))
            return {**self.judge.judge_image(decoded, scenes[0]), "psnr": kept_psnr(decoded, true, [])}
        given = len(
            [part for turn in sample.turns for message in turn.messages for part in images_of(message["content"])]
        )
        targets = iter(scenes[given:])
        checks: list[dict[str, bool]] = []
        for parts, wanted in zip(answer, expected, strict=True):
            images, count = images_of(parts), sum(part["type"] == "image" for part in wanted)
            checks.append({"images": len(images) == count} if count else {"text": self._is_right(task, parts, wanted)})
            for image, target in zip(images, [next(targets) for _ in range(count)]):
                checks.append(self._judge(sample, task, image, target))
        names = dict.fromkeys(name for one in checks for name in one if name not in ("passed", "images"))
        found = {name: [one[name] for one in checks if name in one] for name in names}
        passed = all(one.get("passed", all(one.values())) for one in checks)
        values = {"passed": passed, **{name: sum(values) / len(values) for name, values in found.items()}}
        if task == "thinking" and len(expected[0]) > 1:
            values["reasoning"] = split_reasoning(text_of(answer[0]))[1] == split_reasoning(text_of(expected[0]))[1]
        return values

    def summarize(self, answers: Iterable[tuple[Sample, Answer]], results: Sequence[dict]) -> dict[str, float]:
        """Return nothing beyond the means."""
        return {}

    def _judge(self, sample: Sample, task: str, image: Image.Image, target: Scene) -> dict[str, bool]:
        if task != "edit":
            return self.judge.judge_image(image, target)
        source = images_of(sample.turns[0].messages[-1]["content"])[0]
        return self.judge.judge_edit(image, sample.reference[1][0], target, source)

    def _is_right(self, task: str, parts: list[Part], wanted: list[Part]) -> bool:
        """Compare a caption with the whole scene, and an answer with the one right answer."""
        text, right = text_of(parts), text_of(wanted)
        if task != "caption":
            return is_same(text, right)
        said, true = (read_caption(self.sprites, words) for words in (text, right))
        return said is not None and said.background == true.background and {*said.things} == {*true.things}


def _ability(parts: list[Part]) -> str:
    kinds = [part["type"] for part in parts]
    if "image" not in kinds:
        return "text"
    if "text" not in kinds:
        return "image"
    return "think" if kinds == ["text", "image"] else "interleave"
