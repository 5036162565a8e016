"""Sources and mixtures: every kind of file gives the same messages, streamed or not; weights are shares; what a row
lacks is said."""

from collections import Counter

import datasets
import numpy as np
import pytest
from data_files import example_config, example_mixture, picture, write_example
from PIL import Image

from nextflow_hf.training.data.messages import BadRowError, drop_condition, open_image
from nextflow_hf.training.data.mixture import DataSource, MixtureArguments, load_mixture
from nextflow_hf.training.data.tasks import TASKS


MAX_PIXELS = 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    write_example(folder)
    return folder


def written(row: dict) -> str:
    """A row as one line: roles, texts, and `*` for an image."""
    turns = []
    for turn in row["messages"]:
        parts = ["*" if part["type"] == "image" else part["text"] for part in turn["content"]]
        turns.append(f"{turn['role'][0]}: {' '.join(parts)}")
    return " / ".join(turns)


# What the recipe's sources are, row by row, without inversion.
EXPECTED = {
    "data/captioned_folder": [f"u: folder {i} / a: *" for i in range(3)],
    "data/imagefolder": [f"u: meta {i} / a: *" for i in range(3)],
    "data/webdataset/*.tar": [f"u: tar {a} {i} / a: *" for a in range(2) for i in range(2)],
    "data/edits": [f"u: * edit {i} / a: *" for i in range(2)],
    "data/llava.json": ["u: * What? / a: A thing."],
    "data/obelics.parquet": ["a: one * two *"],
    "data/mmc4.jsonl": ["a: * first * second"],
    "data/texts": [f"a: document {i}\nof two lines" for i in range(2)],
    "data/messages.jsonl": ["u: * And now? / a: *"],
}


@pytest.mark.parametrize("streaming", [False, True])
def test_every_source_of_the_example(folder, monkeypatch, streaming):
    monkeypatch.chdir(folder)
    for source in example_config()["sources"]:
        source = {"inversion_rate": 0, **source, "streaming": streaming}
        rows = list(load_mixture(MixtureArguments(sources=[source])))
        assert [row["error"] for row in rows] == [None] * len(rows)
        assert {row["source"] for row in rows} == {source["path"]}
        if source["path"] == "data/parquet":
            asked = {text for i in range(2) for text in (f"u: * Describe this image. / a: alt {i}",)}
            asked |= {line.replace("Describe this image.", "What is this?") for line in asked}
            assert len(rows) == 2 and {written(row) for row in rows} < asked
        else:
            assert sorted(map(written, rows)) == sorted(EXPECTED[source["path"]])
        for row in rows:
            sizes = {open_image(image, MAX_PIXELS).size for image in row["images"]}
            assert sizes <= {(20, 16), (8, 16)}
    assert rows[0]["resolution"] is None


def test_images_are_the_ones_of_their_rows(folder, monkeypatch):
    """Order of an edit's images; ids of files; the level of a source."""
    monkeypatch.chdir(folder)
    sources = {source["path"]: source for source in example_config()["sources"]}

    def first(path: str) -> dict:
        return load_mixture(MixtureArguments(sources=[{**sources[path], "inversion_rate": 0}]))[0]

    row = first("data/edits")
    assert [image["bytes"] for image in row["images"]] == [picture(40), picture(50, (8, 16))]
    assert first("data/captioned_folder")["row_id"] == "0.png"
    row = first("data/webdataset/*.tar")
    assert (row["row_id"].rpartition("/")[2], row["resolution"]) == ("00", 12)
    assert first("data/llava.json")["row_id"] == "a"
    (image, _) = first("data/mmc4.jsonl")["images"]
    assert image == "data/captioned_folder/1.png"


def test_a_stream_is_the_same_mixture(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def rows(streaming: bool) -> list[tuple]:
        config = example_config()
        config["sources"][0]["streaming"] = streaming
        return [(row["source"], row["row_id"], written(row)) for row in load_mixture(example_mixture(**config))]

    mapped, streamed = rows(False), rows(True)
    assert mapped == rows(False)
    assert mapped[: len(streamed)] == streamed[: len(mapped)]
    assert abs(len(mapped) - len(streamed)) <= 1 and len({source for source, *_ in mapped}) == 10


def text_source(folder, name: str, count: int, **options) -> dict:
    path = folder / name
    path.write_text("".join(f"{name} {i}\n" for i in range(count)))
    return {"path": str(path), "format": "text", "task": "text", **options}


def test_weights_are_shares_and_the_seed_decides(tmp_path):
    sources = [text_source(tmp_path, "a", 3000, weight=3), text_source(tmp_path, "b", 3000, weight=1)]

    def order(seed: int) -> list[str]:
        return load_mixture(MixtureArguments(sources=sources, data_seed=seed, num_rows=2000))[:]["source"]

    counts = Counter(order(0))
    share = counts[sources[0]["path"]] / 2000
    assert abs(share - 0.75) < 0.03  # three standard deviations
    assert order(0) == order(0) != order(1)


def test_every_row_once_without_replacement(tmp_path):
    sources = [text_source(tmp_path, "a", 20, weight=3), text_source(tmp_path, "b", 5)]
    rows = load_mixture(MixtureArguments(sources=sources, stopping_strategy="all_exhausted_without_replacement"))
    assert sorted(map(written, rows)) == sorted(
        f"a: {name} {i}" for name, n in (("a", 20), ("b", 5)) for i in range(n)
    )


def test_a_tenth_of_text_to_image_is_turned_round(tmp_path):
    path = str(tmp_path / "rows.parquet")
    rows = [{"image": {"bytes": b"%d" % i, "path": None}, "caption": f"caption {i}"} for i in range(1500)]
    datasets.Dataset.from_list(rows).to_parquet(path)
    mixture = load_mixture(MixtureArguments(sources=[{"path": path, "format": "parquet", "task": "text_to_image"}]))
    inverted = [row for row in mixture if row["task"] == "image_to_text"]
    assert abs(len(inverted) / 1500 - 0.1) < 0.025
    for row in inverted:
        number = row["images"][0]["bytes"].decode()
        assert row["messages"][0]["content"][0]["type"] == "image" and row["messages"][0]["role"] == "user"
        assert written(row).endswith(f" / a: caption {number}") and row["row_id"] == number
    assert len({row["messages"][0]["content"][1]["text"] for row in inverted}) == 4
    assert (
        next(row for row in mixture if row["task"] == "text_to_image")["messages"][1]["content"][0]["type"] == "image"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"task": "drawing"}, "task is 'drawing', expected one of"),
        ({"format": "zip"}, "format is 'zip', expected one of"),
        ({"weight": 0}, "weight is 0, expected more than 0"),
        ({"weight": "1"}, "weight is '1', expected float"),
        ({"path": None}, "path is None, expected str"),
        ({"label": 2024}, "label is 2024, expected str"),
        ({"columns": ["text"]}, r"columns is \['text'\], expected dict"),
        ({"extra_columns": "author"}, "extra_columns is 'author', expected tuple"),
        ({"columns": {"caption": "x"}}, r"columns has \['caption'\], which are no parts of the task 'text'"),
        ({"wait": 1}, r"source 0 has \['wait'\]"),
        ({"columns": {"text": "body"}}, r"text is column 'body', but the columns are \['text'\]"),
        ({"task": "edit"}, r"needs a column for 'source', by default one of .* but the columns are \['text'\]"),
    ],
)
def test_wrong_sources_are_refused_before_they_are_read(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        load_mixture(MixtureArguments(sources=[{**text_source(tmp_path, "a", 1), **source}]))


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="got no sources"):
        MixtureArguments()
    for name, value in (("num_rows", 0), ("num_rows", -1), ("data_seed", -1)):
        with pytest.raises(ValueError, match=f"{name} is {value}, expected at least"):
            MixtureArguments(sources=[DataSource(path="a", task="text")], **{name: value})
    with pytest.raises(ValueError, match="give those of one path and task different labels"):
        MixtureArguments(sources=[DataSource(path="a", task="text"), DataSource(path="a", task="text")])


HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Look: <image> so."}


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("text_to_image", {"image": None, "text": "x"}, r"images \[0\] of 1 are missing"),
        ("text_to_image", {"image": {"bytes": None, "path": None}, "text": "x"}, "are missing"),
        ("text_to_image", {"image": b"1", "text": " \n"}, "a text is empty"),
        ("text_to_image", {"image": b"1", "text": None}, "a text is NoneType, expected a string"),
        ("edit", {"source": [b"1", None], "instruction": "x", "target": b"1"}, r"images \[1\] of 3 are missing"),
        ("edit", {"source": [], "instruction": "x", "target": b"1"}, "there is no image to edit"),
        ("conversation", {"conversations": [HUMAN, GPT], "images": [b"1"]}, "got 1 images for 2 image parts"),
        ("conversation", {"conversations": [HUMAN], "images": b"1"}, "expected an assistant among them"),
        ("conversation", {"conversations": [{"from": "cat", "value": "x"}]}, "a turn is from 'cat'"),
        ("conversation", {"conversations": [{"from": "gpt", "value": ""}]}, "a turn from 'gpt' has no text"),
        ("interleaved", {"texts": ["a"], "images": [None, b"1"]}, "got 1 texts and 2 images"),
        ("interleaved", {"texts": ["a"], "images": [b"1"]}, "place 0 has both a text and an image"),
        ("interleaved", {"texts": [None], "images": [None]}, "a message of the assistant is empty"),
        *(
            ("interleaved", {"texts": ["a"], "images": [{"matched_text_index": place, "image_name": "x"}]}, message)
            for place, message in (
                (3, "before the text 3, but there are 1"),
                (-1, "before the text -1"),
                (None, "None"),
            )
        ),
        ("interleaved", {"texts": ["a"], "images": [{"matched_text_index": 0}]}, "has none of image, image_name"),
        ("interleaved", {"texts": ["a"], "images": [{"matched_text_index": 0, "image": b"1"}, None]}, "is None, exp"),
        ("conversation", {"conversations": [None, GPT]}, "a turn is None, expected a dictionary"),
        ("messages", {"messages": [None]}, "message 0 is None"),
        ("messages", {"messages": [{"role": "user", "content": [None]}]}, "message 0, part 0 is None"),
        ("text", {"text": "half \ud800"}, "a text is not Unicode"),
        ("text_to_image", {"image": 5, "text": "x"}, r"images are \['int'\], expected paths"),
        ("text", {"text": ""}, "a text is empty"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        ("messages", {"messages": [{"role": "assistant", "content": "x"}], "images": [b"1"]}, "1 images for 0"),
        ("messages", {"messages": [{"role": "assistant", "content": [{"type": "video"}]}]}, "type 'video'"),
    ],
)
def test_what_a_row_lacks_is_said(task, values, message):
    with pytest.raises(BadRowError, match=message):
        TASKS[task](values)


def test_conversations_of_all_kinds():
    messages, images = TASKS["conversation"]({"conversations": [HUMAN, GPT], "images": [b"1", b"2"]})
    assert written({"messages": messages}) == "u: * What? / a: Look:  *  so." and images == [b"1", b"2"]
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    messages, images = TASKS["messages"]({"messages": turns, "images": [b"1", b"2"]})
    assert written({"messages": messages}) == "u: * * What? / a: That." and images == [b"1", b"2"]
    turns = [{"role": "assistant", "content": [{"type": "image"}, {"type": "image", "path": "x.png"}]}]
    assert TASKS["messages"]({"messages": turns, "images": [b"1"]})[1] == [b"1", "x.png"]


def test_only_rows_that_draw_lose_their_condition():
    caption, _ = TASKS["image_to_text"]({"image": b"1", "text": "a cat", "prompt": "What?"})
    row = {"messages": caption, "images": [b"1"]}
    assert drop_condition(row, np.random.default_rng(0), text_rate=1, image_rate=0) == (caption, [b"1"])
    messages, images = TASKS["edit"]({"source": b"1", "instruction": "x", "target": b"2"})
    row = {"messages": messages, "images": images}
    dropped, kept = drop_condition(row, np.random.default_rng(0), text_rate=1, image_rate=0)
    assert written({"messages": dropped}) == "u: * / a: *" and kept == images


def test_opening_images(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    expected = np.asarray(Image.open(tmp_path / "a.png"))
    path = str(tmp_path / "a.png")
    for image in (picture(0), path, f"file://{path}", {"bytes": None, "path": path}, Image.open(path), expected):
        assert np.array_equal(np.asarray(open_image(image, MAX_PIXELS)), expected)
    with pytest.raises(ValueError, match="truncated, corrupt or not an image"):
        open_image(picture(0)[:300], MAX_PIXELS)
    with pytest.raises(ValueError, match=r"has 320 pixels \(16 x 20\), expected at most 300"):
        open_image(picture(0), 300)
    with pytest.raises(FileNotFoundError):
        open_image({"bytes": None, "path": str(tmp_path / "b.png")}, MAX_PIXELS)
    with pytest.raises(ValueError, match="cannot be fetched: 127.0.0.1 has the address .* not public"):
        open_image("http://127.0.0.1:9/a.png", MAX_PIXELS)
    for path in ("ftp://127.0.0.1/a.png", "zip://a.png::http://127.0.0.1/a.zip", "filecache::http://127.0.0.1/a.png"):
        with pytest.raises(ValueError, match="may lead to a private address, expected some of"):
            open_image(path, MAX_PIXELS)
