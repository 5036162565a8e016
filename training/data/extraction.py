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
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ...modeling_nextflow.loss_nextflow import IGNORE_INDEX
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...processing.processing_nextflow import NextFlowProcessor
from .messages import drop_condition


logger = logging.get_logger(__name__)


def codes_fingerprint(vision_tokenizer: NextFlowVisionTokenizer) -> str:
    """Hash of the weights that decide the codes, wherever they were loaded from. Decoders may be trained on (§3.1)."""
    decoders = ("post_quant_conv.", "pixel_decoder.", "semantic_decoder.", "decode_task_layer.")
    digest = hashlib.sha256()
    for name, tensor in sorted(vision_tokenizer.state_dict().items()):
        if not name.startswith(decoders):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def extract_codes(
    get_row: Callable[[int], dict],
    num_rows: int,
    output_dir: str | os.PathLike,
    *,
    processor: NextFlowProcessor,
    vision_tokenizer: NextFlowVisionTokenizer,
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
            "vision_tokenizer": codes_fingerprint(vision_tokenizer),
            "num_rows": num_rows,
            "rows_per_shard": rows_per_shard,
            "self_correction": self_correction,
            "text_drop_rate": text_drop_rate,
            "image_drop_rate": image_drop_rate,
            "seed": seed,
        },
    )
    state = PartialState()  # under torchrun or accelerate launch every process takes its share of the shards
    shards = list(enumerate(range(0, num_rows, rows_per_shard)))[state.process_index :: state.num_processes]
    for shard, start in tqdm(shards, desc="shards", unit="shard", disable=not state.is_local_main_process):
        path = output_dir / f"shard-{shard:05d}.parquet"
        if path.exists():
            continue
        generator = torch.Generator(device=vision_tokenizer.device).manual_seed(seed * 1_000_003 + shard)
        rows = []
        for first in range(start, min(start + rows_per_shard, num_rows), batch_size):
            indices = range(first, min(first + batch_size, start + rows_per_shard, num_rows))
            batch = []
            for index in indices:
                rng = np.random.default_rng((seed, 1, index))
                batch.append(drop_condition(get_row(index), rng, text_rate=text_drop_rate, image_rate=image_drop_rate))
            rows += _encode_batch(batch, processor, vision_tokenizer, self_correction, generator)
        temporary = path.with_suffix(".tmp")
        Dataset.from_list(rows).to_parquet(str(temporary))
        os.replace(temporary, path)
    state.wait_for_everyone()
    return load_codes(output_dir)


def load_codes(folder: str | os.PathLike) -> Dataset:
    """The shards of [`extract_codes`]: `input_ids`, `labels`, `image_codes`, `image_target_codes`, `image_grids`,
    `length`."""
    shards = sorted(str(path) for path in Path(folder).glob("shard-*.parquet"))
    if not shards:
        raise FileNotFoundError(f"no shard-*.parquet in {folder}: extract the codes first")
    return Dataset.from_parquet(shards).with_format("numpy")


def check_fingerprint(folder: str | os.PathLike, vision_tokenizer: NextFlowVisionTokenizer) -> None:
    """Raises `ValueError` where the shards of `folder` were written with another tokenizer."""
    written, own = json.loads((Path(folder) / "manifest.json").read_text()), codes_fingerprint(vision_tokenizer)
    if written["vision_tokenizer"] != own:
        raise ValueError(
            f"{folder} has codes of the tokenizer {written['vision_tokenizer']}, expected {own}: another one, or in "
            f"another precision than {vision_tokenizer.dtype}"
        )


def _check_manifest(path: Path, manifest: dict) -> None:
    if path.exists():
        found = json.loads(path.read_text())
        if found != manifest:
            differing = sorted(key for key in manifest if found.get(key) != manifest[key])
            raise ValueError(
                f"{path} was written with other settings: {[(key, found.get(key)) for key in differing]}, expected "
                f"{[(key, manifest[key]) for key in differing]}. Remove the folder or name another one"
            )
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(temporary, path)


@torch.inference_mode()
def _encode_batch(
    batch: list[tuple[list[dict], list]],
    processor: NextFlowProcessor,
    vision_tokenizer: NextFlowVisionTokenizer,
    self_correction: bool,
    generator: torch.Generator,
) -> list[dict]:
    """Rows of plain lists. Every image is encoded once: those that are trained on with self-correction."""
    tokens = [
        processor.apply_chat_template(
            messages, images=images or None, tokenize=True, return_dict=True, return_labels=True, return_tensors="pt"
        )
        for messages, images in batch
    ]
    pixels, grids, trained = [], [], []
    for row in tokens:
        pixels += list(row.get("pixel_values", []))
        grids += list(row.get("image_grids", []))
        trained += (row["labels"] != IGNORE_INDEX)[row["input_ids"] == processor.boi_token_id].tolist()
    codes: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(pixels)
    for corrected in (False, True):
        members = [index for index, is_target in enumerate(trained) if (is_target and self_correction) == corrected]
        if not members:
            continue
        group = torch.stack([grids[index] for index in members])
        padded = _pad_images([pixels[index] for index in members])
        encoded = vision_tokenizer.encode(
            padded.to(vision_tokenizer.device, vision_tokenizer.dtype),
            group.to(vision_tokenizer.device),
            **({"self_correction": True, "generator": generator} if corrected else {}),
        )
        counts = group.prod(-1).sum(-1).tolist()
        inputs = encoded.image_codes.cpu().split(counts)
        targets = encoded.image_target_codes.cpu().split(counts) if corrected else inputs
        for index, pair in zip(members, zip(inputs, targets)):
            codes[index] = pair
    remaining = iter(codes)
    rows = []
    for row in tokens:
        image_grids = row.get("image_grids", torch.zeros(0, 0, 2, dtype=torch.long))
        pairs = [next(remaining) for _ in image_grids]
        rows.append(
            {
                "input_ids": row["input_ids"][0].tolist(),
                "labels": row["labels"][0].tolist(),
                "image_codes": [code for inputs, _ in pairs for code in inputs.tolist()],
                "image_target_codes": [code for _, targets in pairs for code in targets.tolist()],
                "image_grids": image_grids.tolist(),
                "length": row["input_ids"].shape[1],
            }
        )
    return rows


def _pad_images(images: list[torch.Tensor]) -> torch.Tensor:
    """Images (3, height, width) in the top-left corners of one batch."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    return torch.stack(
        [torch.nn.functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    )
