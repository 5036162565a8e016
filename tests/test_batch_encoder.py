"""Codes by another engine are those of the command, row for row, and train as they do."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from data_files import picture
from toy_pipeline import toy_processor, toy_vision_tokenizer

from nextflow_hf import cli
from nextflow_hf.training.data.batches import BatchEncoder
from nextflow_hf.training.data.shards import index_shards, load_codes


EXAMPLE = Path(__file__).parents[1] / "examples" / "extract_with_ray.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, captioned images of which one is broken, and their codes by the command."""
    folder = tmp_path_factory.mktemp("batches")
    toy_processor().save_pretrained(folder / "model")
    toy_vision_tokenizer().save_pretrained(folder / "model" / "vision_tokenizer")
    (folder / "images").mkdir()
    for index in range(12):
        (folder / "images" / f"{index:02}.png").write_bytes(picture(index) if index != 5 else b"broken")
        (folder / "images" / f"{index:02}.txt").write_text(f"image {index}")
    source = {"path": str(folder / "images"), "task": "text_to_image"}
    data = {"model": str(folder / "model"), "output_dir": str(folder / "codes"), "sources": [source]}
    (folder / "data.yaml").write_text(yaml.safe_dump({**data, "on_bad_row": "skip", "rows_per_shard": 4}))
    assert cli.main(["extract", str(folder / "data.yaml")]) == 0
    return folder


def by_id(rows) -> dict[str, dict]:
    return {str(row["row_id"]): row for row in rows}


def assert_equal(codes, expected) -> None:
    codes, expected = by_id(codes), by_id(expected)
    assert codes.keys() == expected.keys() and len(codes) == 11
    for row_id, row in expected.items():
        assert all(np.array_equal(codes[row_id][name], value) for name, value in row.items())


def test_a_map_of_datasets_writes_what_the_command_writes(folder, tmp_path):
    encode = BatchEncoder(folder / "data.yaml")
    rows = datasets.Dataset.from_dict({"id": range(len(encode.rows))})
    codes = rows.map(encode, batched=True, batch_size=5, remove_columns=["id"])
    assert set(codes["fingerprint"]) == {encode.fingerprint}
    codes.to_parquet(tmp_path / "codes.parquet")
    assert index_shards(tmp_path) == 11
    assert_equal(load_codes(tmp_path, vision_tokenizer=encode.fingerprint), load_codes(folder / "codes"))


def test_rows_and_images_of_ones_own(folder):
    encode = BatchEncoder(folder / "data.yaml", "self_correction=false", "text_drop_rate=0", "image_drop_rate=0")
    images = encode({"image": [picture(0), picture(1)]})
    row = encode.rows[0]
    rows = encode({"messages": [row["messages"]], "images": [row["images"]], "row_id": ["mine"], "number": [0]})
    assert rows["row_id"] == ["mine"] and rows["image_codes"] == images["image_codes"][:1]
    assert set(images["fingerprint"]) == {encode.fingerprint} and images["image_grids"][0] == rows["image_grids"][0]
    # Named and seeded by their pixels, in any batch
    assert images["row_id"][0] != images["row_id"][1] == encode({"image": [{"bytes": picture(1)}]})["row_id"][0]
    table = encode(datasets.Dataset.from_dict({"id": [0, 5, 1]}).data.table)
    assert table.num_rows == 2 and table["image_codes"].to_pylist() == images["image_codes"]
    with pytest.raises(ValueError, match=r"the columns \['photo'\], expected id, messages or image"):
        encode({"photo": [1]})


def test_codes_of_two_tokenizers_are_no_folder(folder, tmp_path):
    encode = BatchEncoder(folder / "data.yaml")
    for name in ("one", "two"):
        encode.fingerprint = name
        pq.write_table(encode(datasets.Dataset.from_dict({"id": [0]}).data.table), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"vision tokenizers \['one', 'two'\], expected those of one"):
        index_shards(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: the extra `ray` brings it")
def test_two_actors_of_ray(folder, tmp_path):
    command = [sys.executable, EXAMPLE, folder / "data.yaml", "--output", tmp_path, "--encoders", "2"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*map(str, command), "--batch-size", "3"], check=True, env=environment, timeout=240)
    assert len(list(tmp_path.glob("*.parquet"))) > 1
    assert_equal(load_codes(tmp_path), load_codes(folder / "codes"))
