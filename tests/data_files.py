"""The files of `training/recipes/data_example.yaml`: a few rows of everything that people have."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from nextflow_hf.training.data.mixture import MixtureArguments


RECIPE = Path(__file__).parents[1] / "training" / "recipes" / "data_example.yaml"


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    """A PNG file of noise, size as (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_example(folder: Path) -> None:
    """`data/` below `folder`."""
    data = folder / "data"
    for name in ("captioned_folder/more", "imagefolder", "parquet", "webdataset", "edits", "texts"):
        (data / name).mkdir(parents=True)
    for index in range(3):
        path = data / "captioned_folder" / ("more" if index == 2 else ".") / f"{index}.png"
        path.write_bytes(picture(index))
        path.with_suffix(".txt").write_text(f"folder {index}\n")
        (data / "imagefolder" / f"{index}.png").write_bytes(picture(10 + index))
    lines(data / "imagefolder" / "metadata.jsonl", [{"file_name": f"{i}.png", "text": f"meta {i}"} for i in range(3)])
    table(data / "parquet" / "a.parquet", [{"image": file(20 + i), "alt_text": f"alt {i}", "x": i} for i in range(2)])
    for archive in range(2):
        with tarfile.open(data / "webdataset" / f"{archive}.tar", "w") as tar:
            for index in range(2):
                caption = json.dumps({"caption": f"tar {archive} {index}"}).encode()
                for name, content in (("png", picture(30 + index)), ("json", caption)):
                    info = tarfile.TarInfo(f"{archive}{index}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    table(
        data / "edits" / "a.parquet",
        [
            {"input_image": file(40 + i), "edit_prompt": f"edit {i}", "edited_image": file(50 + i, (8, 16))}
            for i in range(2)
        ],
    )
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    (data / "llava.json").write_text(json.dumps([{"id": "a", "image": "0.png", "conversations": turns}]))
    table(
        data / "obelics.parquet",
        [{"texts": ["one", None, "two", None, None], "images": [None, file(60), None, file(61), file(62)]}],
    )
    images = [{"image_name": "0.png", "matched_text_index": 1}, {"image_name": "1.png", "matched_text_index": 0}]
    lines(data / "mmc4.jsonl", [{"text_list": ["first", "second"], "image_info": images}])
    for index in range(2):
        (data / "texts" / f"{index}.txt").write_text(f"document {index}\nof two lines")
    content = [{"type": "image"}, {"type": "text", "text": "And now?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content[:1]}]
    lines(data / "messages.jsonl", [{"messages": messages, "images": ["0.png", "1.png"]}])


def example_config(**overrides) -> dict:
    """The recipe's options, at the toy processor's level."""
    return {**yaml.safe_load(RECIPE.read_text().replace("512", "12")), **overrides}


def example_mixture(**overrides) -> MixtureArguments:
    config = example_config(**overrides)
    return MixtureArguments(
        **{name: config[name] for name in ("sources", "stopping_strategy", "data_seed", "num_rows") if name in config}
    )


def file(seed: int, size: tuple[int, int] = (20, 16)) -> dict:
    return {"bytes": picture(seed, size), "path": None}


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)
