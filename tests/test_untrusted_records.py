"""A record in an image is data from anywhere: it is used or refused in one line, and never asks for anything."""

import json
import random
import socket
import zlib
from pathlib import Path

import pytest
from command_line import save_picture, use_pipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowPipeline, cli
from nextflow_hf.commands.records import ARGUMENTS, CHUNK, check_record, read_record, sha256


PLAIN = {
    "format": 1,
    "command": "generate",
    "arguments": {
        "model": "nextflow-shapes",
        "device": "cpu",
        "dtype": "float32",
        "prompt": "a",
        "seed": 7,
        "guidance_scale": 3.0,
        "guidance_schedule": "constant",
        "temperature": [1.0, 1.0, 0.5, 0.5],
        "top_k": 8,
        "top_p": 1.0,
        "think": False,
    },
    "weights": {},
    "environment": {"torch": "2.0"},
    "batch": {"seeds": [7], "index": 0},
    "results": {},
}
HOSTILE = [
    None, True, -1, 0, 1.5, 10**30, 1e308, "", "load", "\x1b[2J", "\ud800", "\x00", "a" * 200_000, [], {}, [[]],
    [7] * 5000, [1.0] * 100, {"path": "/dev/zero", "sha256": "0" * 64}, {"path": 1, "sha256": None}, "evil/model",
    "http://127.0.0.1:9/a.png", "//host/share", [{"role": "user", "content": [{"type": "image", "url": "http://a"}]}],
]  # fmt: skip


def write(path: Path, record, *, raw: str | None = None) -> Path:
    chunks = PngInfo()
    chunks.add_text(CHUNK, json.dumps(record) if raw is None else raw, zip=True)
    Image.new("RGB", (16, 16)).save(path, pnginfo=chunks)
    return path


def with_argument(name: str, value) -> dict:
    return {**PLAIN, "arguments": {**PLAIN["arguments"], name: value}}


@pytest.fixture(autouse=True)
def untrusted(command_line):
    command_line.trusts_images = False


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a record made a request: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def sizes(monkeypatch, no_network):
    """Images that the pipeline was asked for at once, call by call; it is the toy, whatever a command names."""
    asked, call = [], NextFlowPipeline.__call__
    use_pipeline(monkeypatch, toy_pipeline())

    def counted(self, *args, **kwargs):
        asked.append(kwargs["num_images_per_prompt"])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(NextFlowPipeline, "__call__", counted)
    return asked


def mutated(record: dict, rng: random.Random) -> dict:
    """`record` with one to three values replaced, removed or put under other names, at any depth."""
    record = json.loads(json.dumps(record))
    for _ in range(rng.randint(1, 3)):
        place = record
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = rng.choice(keys) if keys else None
            if key is None or not isinstance(place[key], (dict, list)) or rng.random() < 0.3:
                break
            place = place[key]
        if key is None:
            continue
        kind = rng.random()
        if kind < 0.15:
            del place[key]
        elif kind < 0.3 and isinstance(place, dict):
            place[rng.choice([*ARGUMENTS, "trust", "path"])] = rng.choice(HOSTILE)
        else:
            place[key] = rng.choice(HOSTILE)
    return record


def test_random_records_give_an_image_or_one_line(command_line, sizes, tmp_path, capsys):
    """Never a traceback, a request, or more images than the user's batch."""
    rng, statuses = random.Random(0), []
    for index in range(150):
        write(tmp_path / "a.png", mutated(PLAIN, rng))
        for argv in (["generate", "--from-image", "a.png", "--output", "b.png", "--quiet"], ["info", "a.png"]):
            capsys.readouterr()
            status = cli.main(argv)
            errors = capsys.readouterr().err
            statuses.append(status)
            assert status in (0, 1, 2) and "Traceback" not in errors, (index, errors)
            assert errors.count("\n") == (status != 0) and len(errors) < 2000, (index, errors)
    assert {0, 2} <= set(statuses) and set(sizes) == {1}


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_every_option_of_a_record_has_a_type_and_bounds(name):
    for value in (None, {"a": 1}, 10**30, float("nan"), [None] * 5000, "\ud800", "\x00" * 300_000):
        with pytest.raises(ValueError, match=rf"^arguments.{name} is .*, expected ") as error:
            check_record(with_argument(name, value))
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_every_recorded_option_is_in_the_table():
    from nextflow_hf.commands import chat, frames, images, interleave, reconstruct

    recorded = {name for module in (chat, images, frames, interleave, reconstruct) for name in module.RECORDED}
    assert recorded == set(ARGUMENTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ("1" * 5000, "cannot be used"),
        (" " * (2**20 - 10) + "{", "cannot be used"),
        (json.dumps({**PLAIN, "weights": {"transformer": 1}}), "weights is {'transformer': 1}, expected an object"),
        (json.dumps({**PLAIN, "environment": 3}), "environment is 3, expected an object"),
        (json.dumps({**PLAIN, "batch": {"seeds": [1], "index": -1}}), "batch is {"),
        (json.dumps({**PLAIN, "format": True}), "format is True"),
        (json.dumps(with_argument("guidance_scale", float("nan"))), "arguments.guidance_scale is nan"),
        (json.dumps(with_argument("dtype", "load")), "arguments.dtype is 'load', expected one of auto, float32"),
    ],
)
def test_what_is_no_record_is_one_line(command_line, tmp_path, text, message):
    write(tmp_path / "a.png", None, raw=text)
    for run in (["info", "a.png"], ["generate", "--from-image", "a.png"]):
        errors = command_line.mistake(*run)
        assert message in errors and errors.count("\n") == 1 and "a.png" in errors


def test_chunks_that_unpack_to_much_are_not_read(command_line, tmp_path):
    path = write(tmp_path / "a.png", PLAIN)
    packed = CHUNK.encode() + b"\0\0" + zlib.compress(b" " * 2**27)
    chunk = len(packed).to_bytes(4, "big") + b"zTXt" + packed + zlib.crc32(b"zTXt" + packed).to_bytes(4, "big")
    data = path.read_bytes()
    path.write_bytes(data[:33] + chunk + data[33:])  # behind the header
    assert path.stat().st_size < 2**18
    assert "a.png cannot be read" in command_line.mistake("info", "a.png")


def test_an_image_that_unpacks_to_much_is_not_repeated(command_line, sizes, tmp_path):
    chunks = PngInfo()
    chunks.add_text(CHUNK, json.dumps(PLAIN))
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png", pnginfo=chunks)
    assert "100000000 pixels" in command_line.mistake("generate", "--from-image", "a.png")


def test_no_more_images_at_once_than_the_batch_size(command_line, sizes, tmp_path):
    write(tmp_path / "a.png", {**PLAIN, "batch": {"seeds": [7] * 12, "index": 3}})
    said = command_line.mistake("generate", "--from-image", "a.png")
    assert "is one of 12 images that were sampled at once, more than --batch-size 8: pass --batch-size 12" in said
    assert sizes == []
    command_line.run("generate", "--from-image", "a.png", "--batch-size", 12, "--output", "b.png", status=1)
    command_line.run("generate", "--from-image", "a.png", "--num-images", 1, "--output", "c.png")
    assert sizes == [12, 1]


@pytest.mark.parametrize(
    "named", [{"model": "somebody/model"}, {"model": "/folder"}, {"lora": ["some/lora"]}, {"revision": "main"}]
)
def test_a_record_does_not_choose_the_weights(command_line, sizes, tmp_path, monkeypatch, named):
    """Not from the Hub, and not from a folder, unless the user says so."""
    write(tmp_path / "a.png", {**PLAIN, "arguments": {**PLAIN["arguments"], **named}})
    loaded = []

    def load(args):
        args.loaded_dtype = "float32"
        return toy_pipeline()

    monkeypatch.setattr(
        "nextflow_hf.commands.loading.load_pipeline", lambda args: loaded.append(vars(args)) or load(args)
    )
    said = command_line.mistake("generate", "--from-image", "a.png")
    (name,), (value,) = named, named.values()
    assert f"a.png was made with --{name} {value!r}: pass the ones to use, or --allow-model" in said and not loaded
    command_line.run("generate", "--from-image", "a.png", "--allow-model", "--output", "b.png", status=1)
    assert loaded.pop()[name] == value


def test_a_revision_is_one_of_the_recorded_model_alone(command_line, sizes, tmp_path, monkeypatch):
    arguments = {**PLAIN["arguments"], "model": "somebody/model", "revision": "v2"}
    write(tmp_path / "a.png", {**PLAIN, "arguments": arguments})
    loaded = []

    def load(args):
        args.loaded_dtype = "float32"
        loaded.append(args.revision)
        return toy_pipeline()

    monkeypatch.setattr("nextflow_hf.commands.loading.load_pipeline", load)
    run = ["generate", "--from-image", "a.png", "--output", "b.png", "--model"]
    assert "--revision 'v2': pass" in command_line.mistake(*run, "somebody/model") and not loaded
    command_line.run(*run, "toy/other", status=1)
    assert loaded == [None] and "revision" not in read_record(tmp_path / "b.png").arguments


def test_a_record_opens_no_file_but_the_one_with_its_hash(command_line, sizes, tmp_path):
    other = save_picture(tmp_path / "other.png")
    content = [{"type": "image", "image": {"path": str(other), "sha256": "0" * 64}}, {"type": "text", "text": "a"}]
    for arguments in (
        {"image": [{"path": str(other), "sha256": "0" * 64}]},
        {"messages": [{"role": "user", "content": content}]},
    ):
        write(tmp_path / "a.png", {**PLAIN, "arguments": {**PLAIN["arguments"], **arguments}})
        assert "other.png is not what a.png was made from" in command_line.mistake("generate", "--from-image", "a.png")
    for content in (
        [{"type": "image", "url": "http://127.0.0.1:9/a.png"}],
        [{"type": "image", "image": "http://127.0.0.1:9/a.png"}],
        [{"type": "image", "path": str(other)}],
        [{"type": "image", "image": str(other)}],
        [{"type": "image", "base64": "aaaa"}],
        [{"type": "video", "video": "http://127.0.0.1:9/a.mp4"}],
    ):
        write(tmp_path / "a.png", with_argument("messages", [{"role": "user", "content": content}]))
        assert "arguments.messages is" in command_line.mistake("generate", "--from-image", "a.png")
    for path in ("/dev/zero", "/proc/self/mem", str(tmp_path)):  # no regular files, or of no size: not read
        write(tmp_path / "a.png", with_argument("mask_image", {"path": path, "sha256": "0" * 64}))
        command_line.mistake("generate", "--from-image", "a.png")
    assert sizes == []


def test_a_file_that_is_too_large_to_be_an_image_is_not_read(tmp_path, command_line, sizes):
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(2**28 + 1)
    write(tmp_path / "a.png", with_argument("mask_image", {"path": str(large), "sha256": sha256(large)}))
    assert "is missing" in command_line.mistake("generate", "--from-image", "a.png")


def test_what_commands_write_can_be_read(tmp_path):
    """The plain record of these tests is one."""
    assert read_record(write(tmp_path / "a.png", PLAIN)).arguments == PLAIN["arguments"]
