"""Images -> codes, once, before training: the encoder never runs beside the transformer (§4).

Rows of `messages` and `images` become shards of token ids, labels and codes. A shard is written whole or not at all,
so an interrupted extraction goes on where it was; a manifest names the tokenizer and the settings, and another
tokenizer's shards are refused.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from .messages import drop_condition


logger = logging.get_logger(__name__)


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Hash of all weights, the same for the same model wherever it was loaded from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def extract_codes(
    get_row: Callable[[int], dict],
    num_rows: int,
    output_dir: str | os.PathLike,
    *,
    processor,
    vision_tokenizer,
    self_correction: bool = True,
    text_drop_rate: float = 0.1,
    image_drop_rate: float = 0.05,
    rows_per_shard: int = 2048,
    batch_size: int = 64,
    seed: int = 0,
) -> Dataset:
    """
    Encode rows and store them as parquet shards.

    Args:
        get_row (`Callable`): Index -> row with "messages" and "images"; must give the same row each time.
        num_rows (`int`): Rows to encode.
        output_dir (`str` or `os.PathLike`): Where `manifest.json` and `shard-*.parquet` go.
        processor ([`NextFlowProcessor`]): Tokens, labels (responses only) and pixels of the messages.
        vision_tokenizer ([`NextFlowVisionTokenizer`]): The frozen encoder.
        self_correction (`bool`, *optional*, defaults to `True`):
            Store sampled input codes and the targets that correct them (§3.2.1) for the images that are trained on.
            Context images are always clean.
        text_drop_rate, image_drop_rate (`float`, *optional*): See [`drop_condition`].
        rows_per_shard, batch_size, seed (`int`, *optional*): Shard and batch sizes; the seed of sampling and dropping.

    Returns:
        `datasets.Dataset` with `input_ids`, `labels`, `image_codes`, `image_target_codes`, `image_grids`, `length`.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _check_manifest(
        output_dir / "manifest.json",
        {
            "vision_tokenizer": weights_fingerprint(vision_tokenizer),
            "num_rows": num_rows,
            "rows_per_shard": rows_per_shard,
            "self_correction": self_correction,
            "text_drop_rate": text_drop_rate,
            "image_drop_rate": image_drop_rate,
            "seed": seed,
        },
    )
    shards = []
    for shard, start in enumerate(tqdm(range(0, num_rows, rows_per_shard), desc="shards", unit="shard")):
        path = output_dir / f"shard-{shard:05d}.parquet"
        shards.append(str(path))
        if path.exists():
            continue
        generator = torch.Generator(device=vision_tokenizer.device).manual_seed(seed * 1_000_003 + shard)
        rows = []
        for first in range(start, min(start + rows_per_shard, num_rows), batch_size):
            indices = range(first, min(first + batch_size, start + rows_per_shard, num_rows))
            batch = []
            for index in indices:
                rng = np.random.default_rng((seed, 1, index))
                batch.append(
                    drop_condition(get_row(index), rng, text_rate=text_drop_rate, image_rate=image_drop_rate)
                )
            rows += _encode_batch(batch, processor, vision_tokenizer, self_correction, generator)
        temporary = path.with_suffix(".tmp")
        Dataset.from_list(rows).to_parquet(str(temporary))
        os.replace(temporary, path)
    return Dataset.from_parquet(shards).with_format("numpy")


def _check_manifest(path: Path, manifest: dict) -> None:
    if path.exists():
        found = json.loads(path.read_text())
        if found != manifest:
            differing = sorted(key for key in manifest if found.get(key) != manifest[key])
            raise ValueError(
                f"{path} was written with other settings ({', '.join(differing)} differ: "
                f"{[found.get(key) for key in differing]}, expected {[manifest[key] for key in differing]}): remove the "
                "folder or name another one"
            )
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(temporary, path)


@torch.inference_mode()
def _encode_batch(
    batch: list[tuple[list[dict], list]],
    processor,
    vision_tokenizer,
    self_correction: bool,
    generator: torch.Generator,
) -> list[dict]:
    """Rows of plain lists. One encoder pass over all images of the batch."""
    tokens = [
        processor.apply_chat_template(
            messages, images=images or None, tokenize=True, return_dict=True, return_labels=True, return_tensors="pt"
        )
        for messages, images in batch
    ]
    with_images = [row for row in tokens if "image_grids" in row and len(row["image_grids"])]
    clean, inputs, targets = iter(()), iter(()), iter(())
    if with_images:
        grids = torch.cat([row["image_grids"] for row in with_images])
        height, width = (max(row["pixel_values"].shape[side] for row in with_images) for side in (2, 3))
        pixels = torch.cat(
            [
                torch.nn.functional.pad(
                    row["pixel_values"], (0, width - row["pixel_values"].shape[3], 0, height - row["pixel_values"].shape[2])
                )
                for row in with_images
            ]
        ).to(vision_tokenizer.device, vision_tokenizer.dtype)
        counts = grids.prod(-1).sum(-1).tolist()
        encoded = vision_tokenizer.encode(pixels, grids.to(pixels.device))
        clean = iter(encoded.image_codes.cpu().split(counts))
        if self_correction:
            encoded = vision_tokenizer.encode(
                pixels, grids.to(pixels.device), self_correction=True, generator=generator
            )
            inputs = iter(encoded.image_codes.cpu().split(counts))
            targets = iter(encoded.image_target_codes.cpu().split(counts))
    rows = []
    for row in tokens:
        input_ids, labels = row["input_ids"][0], row["labels"][0]
        image_grids = row["image_grids"] if "image_grids" in row else torch.zeros(0, 0, 2, dtype=torch.long)
        trained = (labels[input_ids == processor.boi_token_id] != -100).tolist()
        codes, target_codes = [], []
        for is_target in trained:
            exact = next(clean)
            sampled = (next(inputs), next(targets)) if self_correction else (exact, exact)
            image_codes, image_targets = sampled if is_target else (exact, exact)
            codes += image_codes.tolist()
            target_codes += image_targets.tolist()
        rows.append(
            {
                "input_ids": input_ids.tolist(),
                "labels": labels.tolist(),
                "image_codes": codes,
                "image_target_codes": target_codes,
                "image_grids": image_grids.tolist(),
                "length": len(input_ids),
            }
        )
    return rows
