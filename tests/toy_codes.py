"""Folders of toy codes as training finds them, and rows of text, images and edits."""

import json
from pathlib import Path

from datasets import Dataset
from toy import BOI, EOS, SQUARE, WIDE, grids_tensor, image_tokens, random_codes


def row(*schedules, prompt: list[int], seed: int = 0, identity: str | None = None) -> dict:
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
        "id": identity or f"row-{seed}",
    }


def toy_rows(count: int, *, offset: int = 0) -> list[dict]:
    """Squares, wide images, edits and text in turn: rows of 34, 18, 65 and 4 tokens, 32, 16, 32 and 3 supervised."""
    rows = []
    for seed in range(offset, offset + count):
        schedules = ([SQUARE], [WIDE], [SQUARE, SQUARE], [])[seed % 4]
        rows.append(row(*schedules, prompt=[5, 6 + seed % 30] if schedules else [5, 6, 7 + seed % 30], seed=seed))
    return rows


def write_codes(folder: Path, rows: list[dict], *, vision_tokenizer: str = "toy") -> Path:
    folder.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(str(folder / "shard-00000.parquet"))
    (folder / "manifest.json").write_text(json.dumps({"vision_tokenizer": vision_tokenizer}))
    return folder
