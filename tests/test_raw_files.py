"""One broken row of a file is one bad row, and the others are read: lines of JSON and of text, tar files, captions."""

import io
import json
import tarfile

import pytest
from data_files import picture
from datasets import Dataset

from nextflow_hf.training.data.mixture import MixtureArguments, MixtureRows, load_mixture


def texts_and_errors(source: dict, streaming: bool) -> tuple[list[str], list[str]]:
    rows = list(load_mixture(MixtureArguments(sources=[{"inversion_rate": 0, **source, "streaming": streaming}])))
    good = [row["messages"][0]["content"][-1]["text"] for row in rows if row["error"] is None]
    return good, [f"{row['row_id']}: {row['error']}" for row in rows if row["error"] is not None]


pytestmark = pytest.mark.parametrize("streaming", [False, True])


def test_lines_of_json(tmp_path, streaming):
    lines = [b'{"id": "a", "text": "one"}', b'{"id": "b", "text": "cut', b"", b"[1]", b'{"text": "not \xff UTF-8"}']
    lines += [
        b'{"id": 7, "text": ["another type"]}',
        b'{"id": "c"}',
        '{"text": "zw\u00f6lf\u2028", "x": null}'.encode(),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n")
    good, errors = texts_and_errors({"path": str(path), "format": "json", "task": "text"}, streaming)
    assert good == ["one", "zw\u00f6lf\u2028"]
    causes = ["1: JSONDecodeError", "2: a line of JSON is a list", "3: UnicodeDecodeError", "7: a text is list", "c: "]
    assert len(errors) == len(causes) and all(map(str.startswith, errors, causes))
    rows = MixtureRows(MixtureArguments(sources=[{"path": str(path), "format": "json", "task": "text", "label": "x"}]))
    assert rows("x", "a")["messages"][0]["content"][0]["text"] == "one" and rows("x", "7")["error"] is not None


def test_turns_parts_and_images_that_are_null(tmp_path, streaming):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image"}]}
    rows = [
        {"messages": [user, answer], "images": ["a.png"]},
        {"messages": [None, answer], "images": ["a.png"]},
        {"messages": [user, {"role": "assistant", "content": [None]}], "images": ["a.png"]},
        {"messages": [user, answer], "images": [3]},
        {"messages": [user, answer], "images": [None]},
        {"messages": None, "images": []},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    good, errors = texts_and_errors({"path": str(path), "format": "json", "task": "messages"}, streaming)
    assert good == ["a"] and len(errors) == 5
    causes = ["message 0 is None", "message 1, part 0 is None", "images are ['int']", "images [0] of 1 are missing"]
    assert all(cause in error for cause, error in zip(causes, errors))


def test_texts_and_captions_that_are_not_utf_8(tmp_path, streaming):
    (tmp_path / "texts.txt").write_bytes("eins\nzw\u00f6lf\n".encode() + "zw\u00f6lf\n".encode("latin-1"))
    good, errors = texts_and_errors({"path": str(tmp_path / "texts.txt"), "format": "text", "task": "text"}, streaming)
    assert good == ["eins", "zw\u00f6lf"] and len(errors) == 1 and "UnicodeDecodeError" in errors[0]
    for name, caption in (("a", b"red"), ("b", b"\xff"), ("c", None)):
        (tmp_path / f"{name}.png").write_bytes(picture(0))
        if caption is not None:
            (tmp_path / f"{name}.txt").write_bytes(caption)
    source = {"path": str(tmp_path), "format": "captioned_folder", "task": "text_to_image"}
    rows = list(load_mixture(MixtureArguments(sources=[source])))
    assert [row["error"] is None for row in rows] == [True, False, False]
    assert "b.txt' is not UTF-8, save it as such" in rows[1]["error"]
    assert "c.png' has no caption, expected it in 'c.txt' beside it" in rows[2]["error"]


def test_a_mark_before_the_text_is_no_text(tmp_path, streaming):
    """Windows writes one at the beginning of a file."""
    (tmp_path / "texts.txt").write_bytes("\ufeffone\r\ntw\u00f6\r\n".encode())
    source = {"path": str(tmp_path / "texts.txt"), "format": "text", "task": "text"}
    assert texts_and_errors(source, streaming) == (["one", "tw\u00f6"], [])
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "a.txt").write_bytes("\ufeffred\r\n".encode())
    source = {"path": str(tmp_path), "format": "captioned_folder", "task": "text_to_image"}
    assert texts_and_errors(source, streaming) == (["red"], [])


def test_captions_of_parquet_that_are_not_utf_8(tmp_path, streaming):
    import pyarrow as pa
    import pyarrow.parquet as pq

    if streaming:
        pytest.skip("a stream of parquet is read in batches")
    broken = pa.array([b"one", b"\xff", b"two"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    source = {"path": str(tmp_path / "a.parquet"), "format": "parquet", "task": "text"}
    good, errors = texts_and_errors(source, streaming)
    assert good == ["one", "two"] and len(errors) == 1 and "UnicodeDecodeError" in errors[0]


def tar_file(path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_tar_files_that_break_off(tmp_path, streaming):
    for archive in "ab":
        captions = [b"one", b"not \xff", b"three", b"four"]
        members = [
            (f"{archive}{i}.{end}", data)
            for i in range(4)
            for end, data in (("png", picture(i)), ("txt", captions[i]))
        ]
        tar_file(tmp_path / f"{archive}.tar", members)
    path = tmp_path / "a.tar"
    path.write_bytes(path.read_bytes()[: 3 * (1024 + 2048) + 600])  # amid the last image
    source = {"path": str(tmp_path / "*.tar"), "format": "webdataset", "task": "text_to_image"}
    good, errors = texts_and_errors(source, streaming)
    assert good == ["one", "three", "one", "three", "four"]
    assert [error.partition(": ")[0].rpartition("/")[2] for error in errors] == ["a1", "a.tar after a2", "b1"]
    assert "UnicodeDecodeError" in errors[0] and "cannot be read: unexpected end of data" in errors[1]


def test_one_of_the_first_images_of_a_tar_file_may_lack_its_caption(tmp_path, streaming):
    tar_file(tmp_path / "a.tar", [("a.png", picture(0)), ("b.png", picture(1)), ("b.txt", b"two")])
    good, errors = texts_and_errors({"path": str(tmp_path / "a.tar"), "task": "text_to_image"}, streaming)
    assert good == ["two"] and errors == ["a: a text is NoneType, expected a string"]


def test_a_member_of_a_tar_file_names_its_row(tmp_path, streaming):
    about = [json.dumps({"caption": f"row {i}", "id": f"n{i}"}).encode() for i in range(2)]
    tar_file(
        tmp_path / "a.tar",
        [(f"{i}.{end}", [picture(i), about[i]][end == "json"]) for i in range(2) for end in ("png", "json")],
    )
    columns = {"id": "json.id", "text": "json.caption"}
    source = {"path": str(tmp_path / "a.tar"), "task": "text_to_image", "columns": columns, "streaming": streaming}
    mixture = MixtureArguments(sources=[{**source, "inversion_rate": 0, "label": "tars"}])
    rows = list(load_mixture(mixture))
    assert [(row["row_id"], row["error"]) for row in rows] == [("n0", None), ("n1", None)]
    if not streaming:
        assert MixtureRows(mixture)("tars", "n1")["messages"] == rows[1]["messages"]


def test_files_tell_their_format_by_their_names(tmp_path, streaming):
    Dataset.from_dict({"text": ["one"]}).to_parquet(tmp_path / "a.parquet")
    contents = {"jsonl": '{"text": "one"}', "json": '[{"text": "one"}]', "csv": "text\none\n", "txt": "one\n"}
    for suffix, content in contents.items():
        (tmp_path / f"a.{suffix}").write_text(content)
    for suffix in ("parquet", *contents):
        assert texts_and_errors({"path": str(tmp_path / f"a.{suffix}"), "task": "text"}, streaming) == (["one"], [])


def test_a_file_that_does_not_tell_its_format_is_not_looked_for_on_the_hub(tmp_path, streaming):
    path = tmp_path / "rows.tsv"
    path.write_text("caption\tother\nred\t1\n")
    source = {"path": str(path), "task": "text"}
    with pytest.raises(ValueError, match="rows.tsv does not tell its format by one of .*, as in format: csv"):
        texts_and_errors(source, streaming)
    source |= {"format": "csv", "options": {"sep": "\t"}, "columns": {"text": "caption"}}
    assert texts_and_errors(source, streaming) == (["red"], [])


def test_an_empty_file_is_named(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match="source .*a.jsonl cannot be read: it has no rows"):
        texts_and_errors({"path": str(tmp_path / "a.jsonl"), "task": "text"}, streaming)


def test_another_encoding_and_lists_of_objects(tmp_path, streaming):
    (tmp_path / "a.txt").write_bytes("zw\u00f6lf".encode("latin-1"))
    source = {"path": str(tmp_path / "a.txt"), "format": "text", "task": "text", "options": {"encoding": "latin-1"}}
    assert texts_and_errors(source, streaming) == (["zw\u00f6lf"], [])
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": None}], indent=1))
    good, errors = texts_and_errors({"path": str(tmp_path / "a.json"), "format": "json", "task": "text"}, streaming)
    assert good == ["one"] and len(errors) == 1
    (tmp_path / "b.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises((ValueError, OSError), match="source .*b.parquet cannot be read: .*Parquet"):
        texts_and_errors({"path": str(tmp_path / "b.parquet"), "format": "parquet", "task": "text"}, streaming)
