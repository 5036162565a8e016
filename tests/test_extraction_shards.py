"""Shards survive: kills, full disks, several processes and bad rows leave the files of a run that met none of them."""

import copy
import json
import logging
import os
import random
import resource
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from data_files import example_config, picture, write_example
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as Pillow
from processes import in_a_process
from tokenizers import Tokenizer, models
from toy_pipeline import toy_processor, toy_vision_tokenizer
from transformers import PreTrainedTokenizerFast

from nextflow_hf import cli
from nextflow_hf.training.data import shards
from nextflow_hf.training.data.encoding import ExtractionSettings
from nextflow_hf.training.data.extraction import extract_rows
from nextflow_hf.training.data.messages import BadRowError
from nextflow_hf.training.data.preview import preview_reconstruction
from nextflow_hf.training.data.shards import load_codes


NUM_ROWS = 7
PROCESSOR, TOKENIZER = toy_processor(), toy_vision_tokenizer()


def row(index: int, image: bytes | None = None) -> dict:
    image = picture(index, [(16, 16), (20, 12)][index % 2]) if image is None else image
    messages = [
        {"role": "user", "content": [{"type": "text", "text": f"draw {index}"}]},
        {"role": "assistant", "content": [{"type": "image", "text": None}]},
    ]
    return {"messages": messages, "images": [image], "source": "toy", "row_id": f"id {index}"}


ROWS = [row(index) for index in range(NUM_ROWS)]


def extract(folder, rows=ROWS, *, vision_tokenizer=TOKENIZER, **settings) -> None:
    settings = ExtractionSettings(**{"rows_per_shard": 2, "batch_size": 2, "decoding_threads": 1, **settings})
    extract_rows(rows, folder, processor=PROCESSOR, vision_tokenizer=vision_tokenizer, settings=settings)


def stream(rows: list[dict] = ROWS):
    """The rows as an `IterableDataset`."""
    part = {"type": Value("string"), "text": Value("string")}
    features = Features(
        {
            "messages": List({"role": Value("string"), "content": List(part)}),
            "images": List(Image(decode=False)),
            "source": Value("string"),
            "row_id": Value("string"),
        }
    )
    rows = [{**row, "images": [{"bytes": image, "path": None} for image in row["images"]]} for row in rows]
    return Dataset.from_list(rows, features=features).to_iterable_dataset()


def files(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in without}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    extract(folder)
    return files(folder)


def die_at_write(number: int, folder: Path) -> None:
    """An extraction whose machine stops before the file `number` gets its name."""
    replace, calls = os.replace, []

    def dying(source, target):
        if str(target).startswith(str(folder)):  # other libraries write, too
            calls.append(target)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    shards.os.replace = dying
    extract(folder)


def test_a_text_tokenizer_of_the_same_tokens_with_other_merges_is_another(tmp_path):
    vocabulary, manifests = {token: number for number, token in enumerate(["a", "b", "c", "ab", "bc"])}, []
    for merges in ([("a", "b")], [("b", "c")]):
        processor = copy.copy(PROCESSOR)
        bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="a")
        manifests.append({"processor": shards.describe_processor(processor)})
        processor.tokenizer(["abc", "a"], padding=True)  # which the tokenizer remembers
        assert {"processor": shards.describe_processor(processor)} == manifests[-1]
    shards.check_manifest(tmp_path, manifests[0], TOKENIZER)
    with pytest.raises(ValueError, match=r"other settings: \[\('processor.text_tokenizer_rules', "):
        shards.check_manifest(tmp_path, manifests[1], TOKENIZER)
    written = json.loads((tmp_path / "manifest.json").read_text())
    del written["processor"]["text_tokenizer_rules"]  # as older versions wrote it
    (tmp_path / "manifest.json").write_text(json.dumps(written))
    shards.check_manifest(tmp_path, manifests[0], TOKENIZER)


def test_a_kill_before_any_of_the_writes(whole, tmp_path):
    for number in range(1, len(whole) + 1):  # an uninterrupted run writes each of its files once
        folder = tmp_path / str(number)
        process = in_a_process(die_at_write, number, folder)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with pytest.raises(FileNotFoundError, match="not finished, run it again|extract the codes first"):
            load_codes(folder)
        extract(folder)
        assert {name: data for name, data in files(folder).items() if not name.startswith(".")} == whole
        assert len(load_codes(folder)) == NUM_ROWS


def test_a_kill_at_random_moments(whole, tmp_path):
    rng = random.Random(0)
    for life in range(40):
        process = in_a_process(extract, tmp_path)
        process.join(rng.uniform(0.05, 0.3) + 0.02 * life)
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    else:
        extract(tmp_path)  # on a slow machine
    assert {name: data for name, data in files(tmp_path).items() if not name.startswith(".")} == whole


def as_rank(rank: int, port: int, folder: Path, rows) -> None:
    PartialState._reset_state()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    extract(folder, rows)


@pytest.mark.parametrize("is_stream", [False, True])
def test_two_processes_write_the_files_of_one(whole, tmp_path, is_stream):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [in_a_process(as_rank, rank, port, tmp_path, stream() if is_stream else ROWS) for rank in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    different = ("manifest.json",) if is_stream else ()  # a stream's number of rows is not known
    assert files(tmp_path, without=different).items() <= whole.items()
    assert len(files(tmp_path)) == len(whole)


def test_a_stream_goes_on_where_it_was(whole, tmp_path):
    assert in_a_process_until_killed(tmp_path) == -signal.SIGKILL
    assert not (tmp_path / "index.json").exists() and len(list(tmp_path.glob("*.parquet"))) == 2
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-00000*")}
    extract(tmp_path, stream())
    assert files(tmp_path, without=("manifest.json",)).items() <= whole.items()
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-00000*")}


def in_a_process_until_killed(folder: Path) -> int:
    def run():
        shards.write_json = lambda path, value, write=shards.write_json: (
            os.kill(os.getpid(), signal.SIGKILL) if path.name == "shard-00001.json" else write(path, value)
        )
        extract(folder, stream())

    process = in_a_process(run)
    process.join()
    return process.exitcode


def with_a_full_disk(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # the manifest fits, a shard does not
    extract(folder)


def test_a_full_disk_leaves_no_half_shard(whole, tmp_path):
    assert 3000 < len(whole["shard-00000.parquet"]) and len(whole["manifest.json"]) < 3000
    process = in_a_process(with_a_full_disk, tmp_path)
    process.join()
    assert process.exitcode == 1  # an error, not a silent end
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    extract(tmp_path)
    assert files(tmp_path) == whole


def test_codes_depend_on_no_other_row(whole, tmp_path):
    """Neither the batch nor the rows left out beside it."""
    extract(tmp_path / "one", batch_size=1)
    assert files(tmp_path / "one") == whole
    damaged = [{**row, "error": "gone"} if index in (0, 3) else row for index, row in enumerate(ROWS)]
    extract(tmp_path / "some", damaged, on_bad_row="skip")
    some, every = load_codes(tmp_path / "some"), shard_rows(whole, tmp_path)
    assert list(some["row_id"]) == [f"id {index}" for index in range(NUM_ROWS) if index not in (0, 3)]
    for row in some:
        assert row["image_codes"].tolist() == every[str(row["row_id"])]


def shard_rows(whole: dict[str, bytes], folder: Path) -> dict[str, list[int]]:
    copy = folder / "copy"
    copy.mkdir()
    for name, data in whole.items():
        (copy / name).write_bytes(data)
    return {str(row["row_id"]): row["image_codes"].tolist() for row in load_codes(copy)}


def bad_rows() -> list[dict]:
    rows = [dict(row) for row in ROWS]
    rows[0] = {**rows[0], "images": [str(Path("nowhere.png"))]}
    rows[1] = row(1, image=picture(1)[:200])
    rows[2] = row(2, image=picture(2, (200, 4)))
    rows[3] = {**rows[3], "images": []}
    rows[4] = {**rows[4], "messages": [{**rows[4]["messages"][0], "content": "long " * 200}, rows[4]["messages"][1]]}
    rows[5] = {**rows[5], "error": "a text is empty"}
    return rows


def test_bad_rows_are_left_out_and_reported(whole, tmp_path, caplog):
    extract(tmp_path, bad_rows(), on_bad_row="skip")
    assert "1 rows in 4 shards, 6 bad rows left out" in caplog.text
    assert list(load_codes(tmp_path)["row_id"]) == ["id 6"]
    report = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [(entry["number"], entry["source"], entry["row_id"]) for entry in report] == [
        (index, "toy", f"id {index}") for index in range(6)
    ]
    causes = ["nowhere.png", "truncated, corrupt", "aspect ratio of 4 x 200", "1 image", "tokens", "a text is empty"]
    for cause, entry in zip(causes, report, strict=True):
        assert cause in entry["reason"]


class Rows(list):
    """Of which one cannot even be read."""

    def __getitem__(self, number: int) -> dict:
        if number == 6:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        return super().__getitem__(number)


def foreign_rows() -> Rows:
    """Rows whose errors are none of ours."""
    rows = Rows(dict(row) for row in ROWS)
    rows[0]["messages"] = [None, ROWS[0]["messages"][1]]
    rows[1]["messages"] = [{"role": "user", "content": [None]}, ROWS[1]["messages"][1]]
    rows[2]["images"] = [3]
    rows[3]["images"] = ["nosuchfs://a/b.png"]
    rows[4] = None
    return rows


def test_whatever_a_row_raises_is_skipped_and_named(tmp_path, caplog):
    extract(tmp_path / "skip", foreign_rows(), on_bad_row="skip", allow_private_addresses=True)
    assert list(load_codes(tmp_path / "skip")["row_id"]) == ["id 5"]
    report = [json.loads(line) for line in (tmp_path / "skip" / "bad_rows.jsonl").read_text().splitlines()]
    assert [entry["number"] for entry in report] == [0, 1, 2, 3, 4, 6]
    causes = [
        "NoneType",
        "NoneType",
        "is a int, expected a PIL image",
        "nosuchfs",
        "a row is None",
        "UnicodeDecodeError",
    ]
    for cause, entry in zip(causes, report, strict=True):
        assert cause in entry["reason"]
    assert "1 bad rows: a row is None, expected a dictionary" in caplog.text
    for number, row in enumerate(foreign_rows()[:5]):
        with pytest.raises(BadRowError, match=rf"row '(id )?{number if row else 0}' of .*: .*Mend or remove it"):
            extract(tmp_path / str(number), [row])


def test_failures_of_the_encoder_are_no_bad_rows(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(TOKENIZER, "encode", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):
        extract(tmp_path, on_bad_row="skip")


def test_a_stream_that_breaks_off_is_an_error(tmp_path):
    def rows():
        yield from ROWS[:3]
        raise OSError("connection lost")

    broken = IterableDataset.from_generator(rows)
    with pytest.raises(BadRowError, match="the stream breaks off after 3 rows: OSError: connection lost"):
        extract(tmp_path, broken, on_bad_row="skip")


def test_bad_rows_are_counted_by_their_kind(tmp_path, caplog):
    rows = [*ROWS[:1], row(1, image=b"x"), row(2, image=b"longer"), {**row(3), "images": ["nowhere.png"]}]
    extract(tmp_path, rows, on_bad_row="skip")
    assert "2 bad rows: the image file of ... bytes is truncated, corrupt or not an image" in caplog.text
    assert "1 bad rows: the image file ... does not exist" in caplog.text


def test_a_bad_row_stops_and_another_run_may_leave_it_out(tmp_path):
    rows = [*ROWS[:2], row(2, image=b"no image"), *ROWS[3:]]
    with pytest.raises(BadRowError, match=r"row 'id 2' of source 'toy' \(number 2 .* not an image"):
        extract(tmp_path, rows)
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == ["shard-00000.parquet"]
    extract(tmp_path, rows, on_bad_row="skip")
    assert len(load_codes(tmp_path)) == NUM_ROWS - 1


def test_a_decompression_bomb_is_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadRowError, match="looks like a decompression bomb and was not decoded"):
        extract(tmp_path)


def test_codes_out_of_range_are_a_bad_row(tmp_path, monkeypatch):
    encode = TOKENIZER.encode

    def broken(*arguments, **options):
        output = encode(*arguments, **options)
        output.image_codes[0] = 24
        return output

    monkeypatch.setattr(TOKENIZER, "encode", broken)
    with pytest.raises(BadRowError, match=r"its codes are in \[\d+, 24\], expected \[0, 23\]"):
        extract(tmp_path)


def test_all_rows_bad_is_no_data_set(tmp_path):
    extract(tmp_path, bad_rows()[:3], on_bad_row="skip")
    with pytest.raises(ValueError, match="has no rows: all 3 were bad"):
        load_codes(tmp_path)


def test_damaged_shards_and_other_tokenizers_are_refused(tmp_path):
    extract(tmp_path)
    fingerprint = TOKENIZER.get_codes_fingerprint()
    for tokenizer in (TOKENIZER, fingerprint, toy_vision_tokenizer().bfloat16()):
        assert len(load_codes(tmp_path, vision_tokenizer=tokenizer)) == NUM_ROWS
    other = toy_vision_tokenizer()
    other.quantizer.semantic_codebook.weight.data[0] += 0.1
    for tokenizer in (other, "0123"):
        with pytest.raises(ValueError, match=f"holds codes of the vision tokenizer {fingerprint}, expected those of"):
            load_codes(tmp_path, vision_tokenizer=tokenizer)

    path = tmp_path / "shard-00001.parquet"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="shard-00001.parquet has the checksum .* it is damaged; remove"):
        load_codes(tmp_path)
    path.with_suffix(".json").unlink()
    (tmp_path / "index.json").unlink()
    extract(tmp_path)  # as the message says
    assert len(load_codes(tmp_path)) == NUM_ROWS
    path.unlink()
    with pytest.raises(FileNotFoundError, match="shard-00001.parquet is gone"):
        load_codes(tmp_path)


def test_streamed_codes_are_the_same(tmp_path):
    extract(tmp_path)
    for ours, theirs in zip(load_codes(tmp_path), load_codes(tmp_path, streaming=True), strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_share_of_the_samples_that_is_corrected(tmp_path):
    rows = [row(index) for index in range(24)]
    extract(tmp_path, rows, self_correction_samples=0.5, rows_per_shard=24)
    corrected = [row["image_codes"].tolist() != row["image_target_codes"].tolist() for row in load_codes(tmp_path)]
    assert 6 <= sum(corrected) <= 18  # 2.4 standard deviations of a fair coin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_row": "ignore"}, "on_bad_row is 'ignore'"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"text_drop_rate": 1.5}, "text_drop_rate is 1.5, expected 0 to 1"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExtractionSettings(**options)


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The files of the example and a model, as a user has them."""
    folder = tmp_path_factory.mktemp("example")
    write_example(folder)
    PROCESSOR.save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model" / "vision_tokenizer")
    (folder / "data.yaml").write_text(json.dumps(example_config()))  # JSON is YAML
    return folder


def test_the_example_through_the_command(example, monkeypatch):
    monkeypatch.chdir(example)
    assert cli.main(["extract", "data.yaml", "num_rows=60", "dtype=float32", "text_drop_rate=0"]) == 0
    codes = load_codes("codes", vision_tokenizer=TOKENIZER)
    assert {str(source) for source in codes["source"]} == {source["path"] for source in example_config()["sources"]}
    assert (example / "codes" / "bad_rows.jsonl").read_text() == ""
    manifest = json.loads((example / "codes" / "manifest.json").read_text())
    assert manifest["vision_tokenizer"]["self_correction_ratio"] == 0.6
    assert manifest["origin"]["vision_tokenizer"] == "model" and manifest["data"]["num_rows"] == 60
    for row in codes:
        # Scales of 1, 2, 3 and 4 cells a side; the tar files are read at the level of 12 pixels.
        scales = [3 if "tar" in str(row["source"]) else 4] * len(row["image_grids"])
        assert [int((grids[:, 0] > 0).sum()) for grids in row["image_grids"]] == scales
    command = ["extract", "data.yaml", "num_rows=60", "dtype=float32", "text_drop_rate=0"]
    with pytest.raises(ValueError, match=r"other settings: .*data.data_seed.*self_correction_ratio"):
        cli.main([*command, "data_seed=1", "self_correction_ratio=0.5", "--debug"])


def test_an_image_of_the_preview_that_no_bucket_fits_is_one_bad_row(example, tmp_path, monkeypatch):
    monkeypatch.chdir(example)
    for name, size in (("a", (16, 16)), ("b", (100, 1))):
        Pillow.new("RGB", size).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    source = {"path": str(tmp_path), "task": "text_to_image"}
    (tmp_path / "data.yaml").write_text(json.dumps({"model": "model", "sources": [source], "on_bad_row": "skip"}))
    command = ["extract", str(tmp_path / "data.yaml"), f"output_dir={tmp_path / 'codes'}"]
    assert cli.main([*command, "resolution=5"]) == 2 and not (tmp_path / "codes").exists()
    assert cli.main(command) == 0 and len(load_codes(tmp_path / "codes")) == 1
    assert json.loads((tmp_path / "codes" / "bad_rows.jsonl").read_text())["row_id"] == "b.png"


def test_the_command_shows_what_the_tokenizer_makes_of_the_images(example, tmp_path, monkeypatch, caplog):
    """PSNR as computed here, a sheet of originals beside reconstructions, and a warning below the threshold."""
    monkeypatch.chdir(example)
    monkeypatch.setattr(logging.getLogger("nextflow_hf"), "propagate", True)
    source = {"path": "data/captioned_folder", "task": "text_to_image"}
    (tmp_path / "data.yaml").write_text(json.dumps({"model": "model", "sources": [source]}))
    command = ["extract", str(tmp_path / "data.yaml"), f"output_dir={tmp_path / 'codes'}"]
    assert cli.main([*command, "warn_psnr=99", "preview_images=2"]) == 0
    numbers = json.loads((tmp_path / "codes" / "reconstructions.json").read_text())
    expected = []
    for index in range(2):
        inputs = PROCESSOR.image_processor(Pillow.open(f"data/captioned_folder/{index}.png"), return_tensors="pt")
        codes = TOKENIZER.encode(inputs["pixel_values"], inputs["image_grids"]).image_codes
        decoded = TOKENIZER.decode(codes, inputs["image_grids"])
        expected.append(-10 * np.log10(((decoded - inputs["pixel_values"]) / 2).square().mean().item()))
    assert numbers["psnr_of_images"] == pytest.approx(expected, abs=0.01)
    assert numbers["psnr"] == pytest.approx(np.mean(expected), abs=0.01) and numbers["warn_psnr"] == 99
    with Pillow.open(tmp_path / "codes" / "reconstructions.png") as sheet:
        assert sheet.size == (4 * 256, 256)
    assert "That is below warn_psnr=99" in caplog.text and "train tokenizer" in caplog.text


def test_texts_alone_are_not_all_read_for_an_image_to_show(tmp_path):
    read = []
    rows = (read.append(n) or {"error": None, "resolution": None, "images": []} for n in range(100))
    parts = {"processor": PROCESSOR, "vision_tokenizer": TOKENIZER, "settings": ExtractionSettings(rows_per_shard=10)}
    assert preview_reconstruction(rows, tmp_path, **parts) is None and len(read) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [({"output": "x"}, r"output is unknown.*\['output_dir'\]"), ({"output_dir": None}, "got no output_dir")],
)
def test_wrong_files_are_refused(example, tmp_path, options, message):
    (tmp_path / "bad.yaml").write_text(json.dumps({**example_config(), **options}))
    with pytest.raises(ValueError, match=message):
        cli.main(["extract", str(tmp_path / "bad.yaml"), "--debug"])


def test_no_row_left_is_a_failure(example, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(example)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"junk")
    (tmp_path / "bad" / "a.txt").write_text("red")
    source = {"path": str(tmp_path / "bad"), "format": "captioned_folder", "task": "text_to_image"}
    (tmp_path / "data.yaml").write_text(json.dumps({**example_config(), "sources": [source]}))
    command = ["extract", str(tmp_path / "data.yaml"), f"output_dir={tmp_path / 'codes'}"]
    assert [cli.main(command) for _ in range(2)] == [1, 1]  # the second finds it finished
    manifest = json.loads((tmp_path / "codes" / "manifest.json").read_text())
    assert manifest["vision_tokenizer"]["dtype"] == "float32"
    assert cli.main([*command, "dtype=bfloat16"]) == 2
    said = capfd.readouterr().err
    assert "written with other settings" in said and "vision_tokenizer.dtype" in said


def test_a_saved_pipeline_is_a_model_too(example, tmp_path, monkeypatch):
    """Its processor is in a folder of its own, that of a Hub repository at the root."""
    monkeypatch.chdir(example)
    PROCESSOR.save_pretrained(tmp_path / "pipe" / "processor")
    TOKENIZER.save_pretrained(tmp_path / "pipe" / "vision_tokenizer")
    outputs = [str(tmp_path / name) for name in ("one", "two")]
    for model, output in zip(("model", str(tmp_path / "pipe")), outputs):
        cli.main(["extract", "data.yaml", "num_rows=4", f"model={model}", f"output_dir={output}"])
    one, two = map(load_codes, outputs)
    assert all(np.array_equal(one[index][name], two[index][name]) for index in range(4) for name in one[0])
