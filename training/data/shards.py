"""Shards of codes on the disk: whole, checksummed, of one tokenizer. Knows nothing of images or messages.

    codes/
      manifest.json        what every shard depends on: tokenizer, processor, settings, data
      shard-00000.parquet  rows of tokens and codes
      shard-00000.json     its checksum and the rows left out; a shard without it does not count and is written again
      bad_rows.jsonl       all rows left out, with their source, id and cause
      index.json           the list of shards, written last: a folder without it is not finished, and not loaded

Every file is written by atomic.py: a kill or a full disk leaves the old file or none, never half of one.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers.utils import logging

from ...atomic import write_file, write_json, write_text
from ...modeling_nextflow.modeling_nextflow_vision_tokenizer import NextFlowVisionTokenizer
from ...processing.processing_nextflow import NextFlowProcessor
from .messages import log_causes


logger = logging.get_logger(__name__)

MANIFEST, INDEX, BAD_ROWS = "manifest.json", "index.json", "bad_rows.jsonl"
# Of a text tokenizer's file: what makes tokens of a text, and no padding or truncation of the last call.
_RULES = ("added_tokens", "normalizer", "pre_tokenizer", "model", "post_processor")
_INTEGERS = List(Value("int64"))
SHARD_FEATURES = Features(
    {
        "input_ids": _INTEGERS,
        "labels": _INTEGERS,
        "image_codes": _INTEGERS,
        "image_target_codes": _INTEGERS,
        "image_grids": List(List(_INTEGERS)),
        "length": Value("int64"),
        "task": Value("string"),
        "source": Value("string"),
        "row_id": Value("string"),
        # Neither prompt dropout nor self-correction: as it is asked for after the training.
        "is_clean": Value("bool"),
    }
)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_tokenizer(vision_tokenizer: NextFlowVisionTokenizer) -> dict[str, Any]:
    """The vision tokenizer in a manifest."""
    config, fingerprint = vision_tokenizer.config, vision_tokenizer.get_codes_fingerprint()
    if fingerprint is None:
        raise ValueError(
            f"the vision tokenizer in {vision_tokenizer.dtype} does not say whose codes it gives: load it in float32 "
            "and save it, which writes `codes_fingerprint` to its config"
        )
    return {
        "fingerprint": fingerprint,
        "codebook_size": config.codebook_size,
        # Features of another precision may have other nearest codes.
        "dtype": str(vision_tokenizer.dtype).removeprefix("torch."),
        "self_correction_top_k": config.self_correction_top_k,
        "self_correction_ratio": config.self_correction_ratio,
    }


def describe_processor(processor: NextFlowProcessor) -> dict[str, Any]:
    """The processor in a manifest: settings of its images, and hashes of what makes tokens of texts."""
    tokenizer = processor.tokenizer
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    return {
        "text_tokenizer": _hash(sorted(tokenizer.get_vocab().items())),
        "text_tokenizer_rules": _hash([rules.get(name) for name in _RULES]),
        "chat_template": _hash(processor.chat_template),
        "append_last_scale": processor.append_last_scale,
        # Through JSON, as it will be read: tuples become lists.
        "image_processor": json.loads(json.dumps(processor.image_processor.to_dict(), default=str)),
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def check_manifest(folder: Path, manifest: dict[str, Any], vision_tokenizer: NextFlowVisionTokenizer) -> None:
    """
    Write the manifest of a new folder; `ValueError` where the folder has another one. The origin of the vision
    tokenizer is written for the reader, and not compared.
    """
    path, config = folder / MANIFEST, vision_tokenizer.config
    # As it will be read: JSON makes lists of tuples.
    manifest = json.loads(json.dumps(manifest))
    if not path.exists():
        revision = getattr(config, "_commit_hash", None)  # set by the loading from the Hub alone
        origin = {"vision_tokenizer": config._name_or_path, "revision": revision}
        write_json(path, {**manifest, "origin": origin})
        return
    found = json.loads(path.read_text())
    found.pop("origin", None)
    if "text_tokenizer_rules" not in found["processor"]:  # it was written before they were hashed
        del manifest["processor"]["text_tokenizer_rules"]
    if found != manifest:
        ours, theirs = _flat(manifest), _flat(found)
        differing = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        raise ValueError(
            f"{path} was written with other settings: {[(key, theirs.get(key)) for key in differing]}, expected "
            f"{[(key, ours.get(key)) for key in differing]}. Remove the folder or name another one"
        )


def shard_path(folder: Path, shard: int) -> Path:
    """File of a shard."""
    return folder / f"shard-{shard:05d}.parquet"


def shard_exists(folder: Path, shard: int) -> bool:
    """Whether a shard is there, whole."""
    return shard_path(folder, shard).with_suffix(".json").exists()


def write_shard(folder: Path, shard: int, rows: list[dict], bad_rows: list[dict]) -> None:
    """A shard of the rows that were read for it, less those that are bad."""
    path = shard_path(folder, shard)
    table = pa.Table.from_pylist(rows, schema=SHARD_FEATURES.arrow_schema)
    write_file(path, lambda temporary: pq.write_table(table, temporary))
    entry = {"file": path.name, "sha256": checksum(path), "num_rows": len(rows)}
    entry["num_read"] = len(rows) + len(bad_rows)
    # Last: a shard counts once its checksum is there, and a kill before that leaves it to be written again.
    write_json(path.with_suffix(".json"), {**entry, "bad_rows": bad_rows})


def finish(folder: Path, num_shards: int) -> None:
    """The index and the report of `num_shards` shards, once they are all there; harmless to do twice."""
    if (folder / INDEX).exists() or not all(shard_exists(folder, shard) for shard in range(num_shards)):
        return  # another process has finished, or will
    entries = [json.loads(shard_path(folder, shard).with_suffix(".json").read_text()) for shard in range(num_shards)]
    bad_rows = [row for entry in entries for row in entry.pop("bad_rows")]
    report = "".join(json.dumps(row) + "\n" for row in bad_rows)
    write_text(folder / BAD_ROWS, report)
    totals = {"num_rows": sum(entry["num_rows"] for entry in entries), "num_bad_rows": len(bad_rows)}
    # Last: with its index the folder counts as finished.
    write_json(folder / INDEX, {**totals, "shards": entries})
    logger.warning(f"{folder}: {totals['num_rows']} rows in {num_shards} shards, {len(bad_rows)} bad rows left out")
    log_causes(row["reason"] for row in bad_rows)


def index_shards(folder: str | os.PathLike) -> int:
    """
    Make parquet files of [`BatchEncoder`]'s columns a folder for [`load_codes`], and return the number of rows.

    Raises:
        `ValueError`: where the files hold codes of several vision tokenizers, or none.
    """
    folder, entries, fingerprints = Path(folder), [], set()
    # Sorted, so that rows have one order on every machine.
    for path in sorted(folder.glob("*.parquet")):
        fingerprints |= set(pq.read_table(path, columns=["fingerprint"])["fingerprint"].unique().to_pylist())
        num_rows = pq.read_metadata(path).num_rows
        entries.append({"file": path.name, "sha256": checksum(path), "num_rows": num_rows, "num_read": num_rows})
    if len(fingerprints) != 1:
        raise ValueError(
            f"{folder} holds codes of the vision tokenizers {sorted(fingerprints)}, expected those of one"
        )
    num_rows = sum(entry["num_rows"] for entry in entries)
    write_json(folder / MANIFEST, {"vision_tokenizer": {"fingerprint": fingerprints.pop()}})
    write_json(folder / INDEX, {"num_rows": num_rows, "num_bad_rows": 0, "shards": entries})
    return num_rows


def num_rows_of(folder: Path) -> int | None:
    """Rows of a finished extraction, else None."""
    return json.loads((folder / INDEX).read_text())["num_rows"] if (folder / INDEX).exists() else None


def load_codes(
    folder: str | os.PathLike,
    *,
    vision_tokenizer: NextFlowVisionTokenizer | str | None = None,
    verify: bool = True,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """
    The rows of a finished extraction.

    Args:
        folder (`str` or `os.PathLike`): Output of `nextflow-hf extract`.
        vision_tokenizer ([`NextFlowVisionTokenizer`] or `str`, *optional*):
            The tokenizer of the model that is trained, or its [`~NextFlowVisionTokenizer.get_codes_fingerprint`]
            (`model.config.vision_tokenizer_fingerprint`): shards of another one are refused.
        verify (`bool`, *optional*, defaults to `True`):
            Compare the checksums of the shards, each rank of a distributed run those of its share.
        streaming (`bool`, *optional*, defaults to `False`): An `IterableDataset`, without a copy in the cache.

    Returns:
        `datasets.Dataset` with `input_ids`, `labels`, `image_codes`, `image_target_codes`, `image_grids`, `length`,
        `is_clean` (neither dropout nor self-correction), and for the reader `task`, `source` and `row_id`.
    """
    files = [str(path) for path in checked_files(folder, vision_tokenizer=vision_tokenizer, verify=verify)]
    # Shards of an engine have one column more, and older ones may lack some.
    columns = [name for name in pq.read_schema(files[0]).names if name in SHARD_FEATURES]
    rows = (IterableDataset if streaming else Dataset).from_parquet(files, columns=columns)
    return rows.with_format("numpy")


def checked_files(
    folder: str | os.PathLike, *, vision_tokenizer: NextFlowVisionTokenizer | str | None = None, verify: bool = True
) -> list[Path]:
    """The shards of a finished extraction that hold rows. Arguments and refusals are those of [`load_codes`]."""
    folder = Path(folder)
    found = tokenizer_of(folder)
    if vision_tokenizer is not None:
        is_model = isinstance(vision_tokenizer, NextFlowVisionTokenizer)
        expected = vision_tokenizer.get_codes_fingerprint() if is_model else vision_tokenizer
        if found != expected:
            raise ValueError(
                f"{folder} holds codes of the vision tokenizer {found}, expected those of {expected}: extract them "
                "with the tokenizer of the model"
            )
    index = json.loads((folder / INDEX).read_text())
    if index["num_rows"] == 0:
        raise ValueError(f"{folder} has no rows: all {index['num_bad_rows']} were bad, see {folder / BAD_ROWS}")
    if verify:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        for entry in index["shards"][rank::world_size]:
            _verify(folder / entry["file"], entry["sha256"])
    return [folder / entry["file"] for entry in index["shards"] if entry["num_rows"]]


def tokenizer_of(folder: str | os.PathLike) -> str:
    """Fingerprint of the vision tokenizer whose codes a finished extraction holds."""
    folder = Path(folder)
    if not (folder / INDEX).exists():
        started = (folder / MANIFEST).exists()
        raise FileNotFoundError(
            f"no {INDEX} in {folder}: "
            + ("its extraction has not finished, run it again to go on" if started else "extract the codes first")
        )
    return json.loads((folder / MANIFEST).read_text())["vision_tokenizer"]["fingerprint"]


def _verify(path: Path, expected: str) -> None:
    mend = f"remove {path.with_suffix('.json')} and {path.parent / INDEX}, and extract again: only it is redone"
    if not path.exists():
        raise FileNotFoundError(f"{path} is gone: {mend}")
    if (found := checksum(path)) != expected:
        raise ValueError(f"{path} has the checksum {found}, expected {expected}: it is damaged; {mend}")


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries with one level of dotted names."""
    flat = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
