"""One description of data: each command gets what it needs from the same file."""

import json
import re
from collections import Counter
from dataclasses import fields

import datasets
import pytest
import yaml
from data_files import RECIPE, example_config, file, lines, picture, table, write_example

from nextflow_hf.training.data.description import (
    ModelArguments,
    load_captioned_images,
    load_images,
    load_prompts,
    load_rows,
    load_rows_by_id,
    load_texts,
    read_description,
)
from nextflow_hf.training.data.encoding import ExtractionSettings
from nextflow_hf.training.data.mixture import MixtureArguments
from nextflow_hf.training.data.sources import DataSource


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    write_example(folder)
    return folder


@pytest.fixture
def example(folder, monkeypatch):
    """The shipped example, and every row of it once."""
    monkeypatch.chdir(folder)
    (folder / "data.yaml").write_text(
        yaml.safe_dump(example_config(stopping_strategy="all_exhausted_without_replacement"))
    )
    return read_description("data.yaml")


def description(*sources: dict, **keys):
    keys = {"stopping_strategy": "all_exhausted_without_replacement", **keys}
    return read_description({"sources": list(sources), **keys})


def test_rows_of_the_example(example):
    rows = list(load_rows(example))
    by_id = load_rows_by_id(example)
    assert example.settings.on_bad_row == "skip" and len(rows) == 20
    for row in rows:
        assert row["error"] is None and by_id(row["source"], row["row_id"])["messages"] == row["messages"]


def test_images_of_the_example(example):
    images = load_images(example)
    assert {images[index]["image"].size for index in range(len(images))} <= {(20, 16), (8, 16)}
    assert images.bad_rows == []
    # Documents of text are left out, and everything else is there.
    assert len(images) == 18
    edit = next(index for index in range(len(images)) if "data/edits" in images[index]["row_id"])
    first = images[edit]["image"]
    images.set_epoch(1)
    assert images[edit]["image"].tobytes() != first.tobytes()  # the other image of the row


def test_images_need_no_caption(folder, tmp_path):
    """A folder that `extract` reads, with a caption missing; and the folder alone."""
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(picture(index))
        (tmp_path / f"{index}.txt").write_text(f"caption {index}")
    (tmp_path / "3.txt").unlink()
    data = description({"path": str(tmp_path), "task": "text_to_image"})
    assert [row["error"] is None for row in load_rows(data)].count(False) == 1
    assert len(load_images(data)) == len(load_images(read_description(tmp_path))) == 4
    assert load_images(data)[3]["image"].size == (20, 16)


def test_captioned_images_of_the_example(example):
    images = load_captioned_images(example)
    captions = [images[index]["caption"] for index in range(len(images))]
    expected = [f"{kind} {i}" for kind, n in (("folder", 3), ("meta", 3), ("alt", 2)) for i in range(n)]
    expected += [f"tar {a} {i}" for a in range(2) for i in range(2)]
    assert sorted(captions) == sorted(expected)


def test_answers_to_questions_are_no_captions(tmp_path):
    table(tmp_path / "vqa.parquet", [{"image": file(0), "question": "How many?", "answer": "two"}])
    table(tmp_path / "captions.parquet", [{"image": file(1), "text": "a cat"}])
    data = description(
        {"path": str(tmp_path / "vqa.parquet"), "format": "parquet", "task": "image_to_text"},
        {"path": str(tmp_path / "captions.parquet"), "format": "parquet", "task": "image_to_text"},
    )
    images = load_captioned_images(data)
    assert [images[i]["caption"] for i in range(len(images))] == ["a cat"]


def test_prompts_of_the_example(example):
    prompts = load_prompts(example)
    texts = {(row["source"], row["prompt"]): len(row["images"]) for row in prompts}
    assert texts[("data/edits", "edit 1")] == 1 and texts[("data/captioned_folder", "folder 2")] == 0
    assert texts[("data/messages.jsonl", "And now?")] == 1 and len(texts) == 3 + 3 + 4 + 2 + 1
    assert {type(image).__name__ for row in prompts for image in row["images"]} == {"PngImageFile"}


def test_prompts_of_several_turns_are_messages(tmp_path):
    part = {"type": "text", "text": "Draw a cat."}
    turns = [{"role": "system", "content": [part]}, {"role": "user", "content": [part]}]
    rows = [{"messages": [*turns, {"role": "assistant", "content": [{"type": "image"}]}], "images": ["a.png"]}]
    rows += [{"messages": [*turns, {"role": "assistant", "content": [part]}], "images": []}]
    (tmp_path / "a.png").write_bytes(picture(0))
    lines(tmp_path / "rows.jsonl", rows)
    source = {"path": str(tmp_path / "rows.jsonl"), "format": "json", "task": "messages", "image_root": str(tmp_path)}
    (prompt,) = load_prompts(description(source))
    assert prompt["prompt"] == turns and prompt["images"] == []


def test_prompts_from_files_and_what_rewards_need_beside_them(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    prompts = load_prompts(description({"path": str(tmp_path / "prompts.txt"), "format": "text", "task": "prompt"}))
    assert list(prompts["prompt"]) == ["a cat", "a dog"]
    rows = [{"prompt": f"{n} cats", "count": n, "objects": ["cat"]} for n in range(3)]
    lines(tmp_path / "prompts.jsonl", rows)
    source = {"path": str(tmp_path / "prompts.jsonl"), "format": "json", "task": "prompt"}
    prompts = load_prompts(description({**source, "extra_columns": ["count", "objects"]}))
    assert [{name: row[name] for name in rows[0]} for row in prompts] == rows
    with pytest.raises(ValueError, match=r"has no columns \['counts'\], but only \['count'"):
        load_prompts(description({**source, "extra_columns": ["counts"]}))
    with pytest.raises(ValueError, match="no source has a response: their tasks are \\['prompt'\\]"):
        load_rows(description(source))


def test_a_bad_prompt_is_skipped_or_raised(tmp_path):
    lines(tmp_path / "edits.jsonl", [{"prompt": "redden it", "image": "gone.png"}, {"prompt": "a cat", "image": None}])
    source = {"path": str(tmp_path / "edits.jsonl"), "format": "json", "task": "prompt"}
    prompts = load_prompts(description(source, on_bad_row="skip"))
    assert list(prompts["prompt"]) == ["a cat"]
    with pytest.raises(ValueError, match="row '0' of source .*gone.png.*Mend or remove it"):
        load_prompts(description(source))


def test_texts_of_the_example(example):
    texts = Counter(load_texts(example))
    for text in ("folder 0", "alt 1", "edit 0", "What?", "A thing.", "one", "second", "And now?"):
        assert texts[text] == 1, text
    assert texts["document 0\nof two lines"] == 1


def test_weights_oversample_a_source(tmp_path):
    for name in ("faces", "others"):
        table(tmp_path / f"{name}.parquet", [{"image": file(i)} for i in range(40)])
    sources = [
        {"path": str(tmp_path / f"{name}.parquet"), "format": "parquet", "task": "image", "weight": weight}
        for name, weight in (("faces", 3), ("others", 1))
    ]
    images = load_images(description(*sources, stopping_strategy="all_exhausted"))
    counts = Counter(images[index]["row_id"].rpartition("/")[2] for index in range(len(images)))
    assert counts["others.parquet"] == 40 and 2 < counts["faces.parquet"] / 40 < 4.5


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_held_out_for_evaluation(tmp_path, streaming):
    lines(tmp_path / "a.jsonl", [{"text": f"a {i}"} for i in range(20)])
    lines(tmp_path / "b.jsonl", [{"text": f"b {i}"} for i in range(3)])
    a, b = (
        {"path": str(tmp_path / f"{name}.jsonl"), "format": "json", "task": "text", "streaming": streaming}
        for name in "ab"
    )
    data = description({**a, "eval_fraction": 0.1}, {**b, "eval_fraction": 1.0})
    held_out, trained = set(load_texts(data, "evaluation")), set(load_texts(data))
    assert data.has_evaluation and held_out == {"a 9", "a 19", "b 0", "b 1", "b 2"}
    assert trained == {f"a {i}" for i in range(20)} - held_out
    assert {row["row_id"] for row in load_rows(data, "evaluation")} == {"9", "19", "0", "1", "2"}
    # Without rows that are held out, the file is for what it is given for.
    everything = description(a)
    assert not everything.has_evaluation and len(set(load_texts(everything, "evaluation"))) == 20


@pytest.mark.parametrize("streaming", [False, True])
def test_blank_lines_are_no_texts(tmp_path, streaming):
    (tmp_path / "texts.txt").write_text("one\n\n  \ntwo\n")
    source = {"path": str(tmp_path / "texts.txt"), "format": "text", "task": "text", "streaming": streaming}
    assert sorted(load_texts(description(source))) == ["one", "two"]


def test_a_mistake_is_said(tmp_path):
    (tmp_path / "texts.txt").write_text("one\n")
    source = {"path": str(tmp_path / "texts.txt"), "format": "text", "task": "text"}
    with pytest.raises(ValueError, match=r"no source has images: their tasks are \['text'\]"):
        load_images(description(source))
    with pytest.raises(ValueError, match="eval_fraction is 2, expected 0 to 1"):
        description({**source, "eval_fraction": 2})
    with pytest.raises(ValueError, match=r"extra_columns has \['prompt'\], which prompts have of their own"):
        description({**source, "task": "prompt", "extra_columns": ["prompt", "style"]})
    with pytest.raises(ValueError, match="no source has rows for training"):
        load_rows(description({**source, "eval_fraction": 1.0}))
    table(tmp_path / "a.parquet", [{"image": file(0)}])
    stream = {"path": str(tmp_path / "a.parquet"), "format": "parquet", "task": "image", "streaming": True}
    with pytest.raises(ValueError, match="stream, expected rows that can be read by number"):
        load_images(description(stream))


def test_overrides_and_formats_that_the_files_tell(tmp_path):
    datasets.Dataset.from_list([{"text": "saved"}]).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "data.yaml").write_text(json.dumps({"sources": [{"path": str(tmp_path / "saved"), "task": "text"}]}))
    data = read_description(tmp_path / "data.yaml", "purpose=evaluation", "model=folder")
    assert (data.settings.purpose, data.model.model) == ("evaluation", "folder")
    assert list(load_texts(data)) == ["saved"]
    keys = {"sources": [{"path": str(tmp_path / "saved"), "task": "text"}]}
    assert read_description(keys, "purpose=evaluation").settings.purpose == "evaluation" and "purpose" not in keys
    with pytest.raises(ValueError, match="purposes is unknown"):
        read_description(tmp_path / "data.yaml", "purposes=evaluation")


def test_the_example_names_every_key():
    text = RECIPE.read_text()
    for group in (ModelArguments, MixtureArguments, ExtractionSettings, DataSource):
        for entry in fields(group):
            assert re.search(rf"\b{entry.name}\b", text), entry.name
