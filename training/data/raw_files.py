"""Rows as their files have them, so that one broken row is one bad row and not the end of its file.

Lines of JSON and of text, members of tar files and captions beside images come as bytes and paths; the `decode` of
[`RawRows`] turns them into the values of a row, and raises what is wrong with that row. Where a tar file breaks off,
one row with an error stands for the rest. What has no rows of its own (parquet, arrow, CSV, a JSON list) is read by
`datasets` alone: a file of these that is damaged is an error of the whole source. Knows no tasks.
"""

import glob
import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec
from datasets import Dataset, Features, IterableDataset, Value
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from .messages import BadRowError


ERROR = "__error__"
# Format -> pattern of its files below a folder; None where a whole folder is read.
FORMATS = {
    "parquet": "*.parquet", "webdataset": "*.tar", "json": "*.json*", "csv": "*.csv", "text": "*.txt",
    "arrow": None, "imagefolder": None, "captioned_folder": None, "disk": None,
}  # fmt: skip
_SUFFIXES = {
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".txt": "text",
}
# A character for each byte: whether a line is UTF-8 is found out line by line.
_BYTES = "latin-1"
_LOOKED_AT = 100  # rows whose names are the columns of a file of JSON
_EXTENSIONS = {f".{name}" for name in ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")}


@dataclass
class RawRows:
    """Rows, what makes values of one, and the names that these have."""

    rows: Dataset | IterableDataset
    decode: Callable[[dict[str, Any]], dict[str, Any]]
    names: list[str]


def open_raw_rows(
    path: str,
    format: str | None,
    *,
    name: str | None,
    split: str,
    revision: str | None,
    streaming: bool,
    options: dict[str, Any],
) -> RawRows:
    """The rows of a source, by the library that knows its format. Arguments are those of [`DataSource`]."""
    path, how = os.path.expanduser(path), {"split": split, "streaming": streaming}
    format = format or _guess_format(Path(path))
    if format is None and os.path.isfile(path):
        raise ValueError(f"{path} does not tell its format by one of {list(_SUFFIXES)}: set format, as in format: csv")
    if format == "captioned_folder":
        return _open_captioned_folder(Path(path))
    pattern = FORMATS.get(format)
    files = os.path.join(glob.escape(path), "**", pattern) if pattern and os.path.isdir(path) else path
    if format == "webdataset":
        return _open_tar_files(files, options, **how)
    if format == "text":
        rows = _open_text({split: files}, **how, **options)
        return RawRows(rows, dict if "encoding" in options else _text, ["text"])  # UTF-8 unless they say another
    if format == "json" and not options and _is_json_lines(files):
        return _open_json_lines(files, **how)
    if format == "disk":
        rows = datasets.load_from_disk(path)
        rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        rows = rows.to_iterable_dataset() if streaming else rows
    elif format is None:
        rows = datasets.load_dataset(path, name, revision=revision, **how, **options)
    elif format == "imagefolder":
        rows = datasets.load_dataset(format, data_dir=path, **how, **options)
    else:
        rows = datasets.load_dataset(format, data_files={split: files}, **how, **options)
    return RawRows(rows, dict, rows.column_names or list(next(iter(rows.take(1)), ())))


def _open_json_lines(files: str, split: str, streaming: bool) -> RawRows:
    """Files of one JSON object a line."""
    rows = _open_text({split: files}, split=split, streaming=streaming)
    names = {}
    for row in itertools.islice(rows, _LOOKED_AT):
        try:
            names |= dict.fromkeys(_json_object(row))
        except ValueError:  # for whoever reads it as a row
            continue
    return RawRows(rows, _json_object, list(names))


def _is_json_lines(files: str) -> bool:
    """Whether the first file is of one object a line, and not one list of objects."""
    for file in fsspec.open_files(files, "rb", compression="infer")[:1]:
        with file as opened:
            return opened.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    return False


def _open_tar_files(files: str, options: dict[str, Any], split: str, streaming: bool) -> RawRows:
    """Files of webdataset."""
    builder = _TarFiles(data_files={split: files}, hash="1", **options)
    if streaming:
        rows = builder.as_streaming_dataset(split)
    else:
        builder.download_and_prepare()
        rows = builder.as_dataset(split)
    return RawRows(rows, _members, [name for name in rows.column_names if name != ERROR])


def _open_captioned_folder(folder: Path) -> RawRows:
    """Images below `folder` with the text of the `.txt` beside each."""
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _EXTENSIONS)
    if not images:
        raise FileNotFoundError(f"no images in {folder.absolute()}, expected some of {sorted(_EXTENSIONS)}")
    columns = {
        "id": [path.relative_to(folder).as_posix() for path in images],
        "image": [str(path) for path in images],
        "text": [str(path.with_suffix(".txt")) for path in images],
    }
    features = Features({name: Value("string") for name in columns})
    return RawRows(Dataset.from_dict(columns, features=features), _caption, list(columns))


def _guess_format(folder: Path) -> str | None:
    """The format of a file by its name, or of a folder that `datasets` would not tell or would take for another."""
    if not folder.is_dir():
        return _SUFFIXES.get(folder.suffix.lower())
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "disk"
    first = next((path for path in sorted(folder.glob("*")) if path.suffix.lower() in _EXTENSIONS), None)
    first = first or next((path for path in folder.rglob("*") if path.suffix.lower() in _EXTENSIONS), None)
    return "captioned_folder" if first is not None and first.with_suffix(".txt").is_file() else None


def _open_text(files: dict[str, str], **options: Any) -> Dataset | IterableDataset:
    features = Features({"text": Value("string")})  # a stream of texts does not know its columns
    rows = datasets.load_dataset("text", data_files=files, features=features, **{"encoding": _BYTES, **options})
    return rows.filter(lambda lines: [bool(line.strip()) for line in lines], input_columns="text", batched=True)


def _json_object(values: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(values["text"].encode(_BYTES))
    if not isinstance(found, dict):
        raise BadRowError(f"a line of JSON is a {type(found).__name__}, expected an object")
    return found


def _text(values: dict[str, Any]) -> dict[str, Any]:
    return {"text": values["text"].encode(_BYTES).decode("utf-8-sig")}


def _members(values: dict[str, Any]) -> dict[str, Any]:
    # `values` stay as they are: a row whose id lies in a member is decoded for its name, too.
    if (error := values.get(ERROR)) is not None:
        raise BadRowError(error)
    members = {name: value for name, value in values.items() if name != ERROR}
    return {name: _member(name, value) if isinstance(value, bytes) else value for name, value in members.items()}


def _member(name: str, value: bytes) -> Any:
    return WebDataset.DECODERS.get(name.rpartition(".")[2].lower(), bytes)(value)


def _caption(values: dict[str, Any]) -> dict[str, Any]:
    if "text" not in values:
        return dict(values)
    path = Path(values["text"])
    if not path.is_file():
        raise BadRowError(f"the image {values['image']!r} has no caption, expected it in {path.name!r} beside it")
    try:
        return {**values, "text": path.read_text(encoding="utf-8-sig").strip()}  # Windows begins a file with a mark
    except UnicodeDecodeError as error:
        raise BadRowError(f"the caption {str(path)!r} is not UTF-8, save it as such: {error}") from error


class _TarFiles(WebDataset):
    """Rows with undecoded members; where a file breaks off, one with an error."""

    DECODERS = {}

    @classmethod
    def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator: Any) -> Iterator[dict[str, Any]]:
        row = {}
        try:
            for row in super()._get_pipeline_from_tar(tar_path, tar_iterator):
                yield {**row, ERROR: None}
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
            last = row.get("__key__")
            cause = f"the rest of {tar_path} after {last!r} cannot be read: {error}"
            yield {**dict.fromkeys(row), "__key__": f"{tar_path} after {last}", "__url__": tar_path, ERROR: cause}

    def _split_generators(self, dl_manager: Any) -> list:
        read = self._get_pipeline_from_tar

        def read_alike(*archive: Any) -> list[dict[str, Any]]:
            """The first rows, whose names are the columns: `datasets` takes them only if all have all of these."""
            rows = list(itertools.islice(read(*archive), self.NUM_EXAMPLES_FOR_FEATURES_INFERENCE))
            names = dict.fromkeys(name for row in rows for name in row)
            return [{**names, **row} for row in rows]

        self._get_pipeline_from_tar = read_alike
        splits = super()._split_generators(dl_manager)
        del self._get_pipeline_from_tar
        self.info.features[ERROR] = Value("string")  # known from rows without one
        return splits
