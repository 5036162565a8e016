"""Rows of tokens and codes in memory, and folders of them as training finds them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from toy import BOI, EOS, SQUARE, WIDE, grids_tensor, image_tokens, random_codes

from nextflow_hf.training.data.encoding import ExtractionSettings
from nextflow_hf.training.data.extraction import extract_rows
from nextflow_hf.training.data.shards import load_codes


TASKS = ("text_to_image", "edit", "text", "image_to_text", "interleaved")


def row(*schedules, prompt: list[int], seed: int = 0) -> dict:
    """Images of these schedules after a prompt, the last one trained on; without a schedule: text, trained on."""
    images = [token for schedule in schedules for token in image_tokens(schedule)]
    ids = [*prompt, *images, EOS]
    labels = list(ids) if not schedules else [-100] * len(ids)
    if schedules:
        last = len(ids) - 1 - len(image_tokens(schedules[-1]))
        labels[last], labels[-1] = BOI, EOS
    return {
        "input_ids": ids,
        "labels": labels,
        "image_codes": random_codes(*schedules, seed=seed).tolist() if schedules else [],
        "image_target_codes": random_codes(*schedules, seed=seed + 100).tolist() if schedules else [],
        "image_grids": grids_tensor(*schedules).tolist(),
        "length": len(ids),
        "row_id": f"row-{seed}",
    }


def toy_rows(count: int) -> list[dict]:
    """Squares, wide images, edits and text in turn, with 32, 16, 32 and 3 supervised tokens."""
    rows = []
    for seed in range(count):
        schedules = ([SQUARE], [WIDE], [SQUARE, SQUARE], [])[seed % 4]
        rows.append(row(*schedules, prompt=[5, 6 + seed % 30] if schedules else [5, 6, 7 + seed % 30], seed=seed))
    return rows


def toy_messages(task: str, index: int) -> dict:
    """Row `index` of a task in the format of training data."""
    rng = np.random.default_rng(index)
    pictures = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(2)]
    image, text = {"type": "image"}, {"type": "text", "text": f"red {index}"}
    user, assistant, count = {
        "text_to_image": ([text], [image], 1),
        "edit": ([image, text], [image], 2),
        "text": ([text], [text], 0),
        "image_to_text": ([image, text], [text], 1),
        "interleaved": ([text], [image, text, image], 2),
    }[task]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages, "images": pictures[:count]}


@dataclass
class NumberedRows(Sequence):
    """The rows `get_row(0)` to `get_row(count - 1)`, made when they are read."""

    get_row: Callable[[int], dict]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return self.get_row(index)


def extract_codes(
    get_row: Callable[[int], dict], count: int, folder: Path, *, processor, vision_tokenizer, **settings
):
    """[`extract_rows`] of these rows, loaded."""
    rows, parts = NumberedRows(get_row, count), {"processor": processor, "vision_tokenizer": vision_tokenizer}
    extract_rows(rows, folder, **parts, settings=ExtractionSettings(**settings))
    return load_codes(folder)


def extract_toy_codes(
    folder: Path, processor, vision_tokenizer, *, task: str | None = None, rows: int = 16, **settings
) -> Path:
    """A folder of codes of one task, or of all in turn."""
    extract_codes(
        lambda index: toy_messages(task or TASKS[index % len(TASKS)], index),
        rows,
        folder,
        processor=processor,
        vision_tokenizer=vision_tokenizer,
        **settings,
    )
    return folder
