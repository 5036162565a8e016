"""benchmarks/capabilities.py: every capability runs, each in a process of its own, and comes out as a row."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from toy_pipeline import toy_pipeline


PATH = Path(__file__).parents[1] / "benchmarks" / "capabilities.py"
SPEC = importlib.util.spec_from_file_location("capabilities", PATH)
capabilities = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(capabilities)


@pytest.fixture(scope="module")
def pipe():
    return toy_pipeline()


@pytest.mark.parametrize("name", [name for name in capabilities.CAPABILITIES if name != "diffusion decoder"])
def test_a_capability(pipe, name):
    result = capabilities.measure_one(name, pipe, repeats=1, max_new_tokens=6)
    assert result["first"] > 0 and result["warm"] > 0
    assert result["peak"] >= result["loaded"] > 10e6  # of bytes: a process with torch in it
    assert result["of"] == "the whole process"


def test_what_each_capability_gives(pipe):
    """A row of the table is of what its words say."""
    image = capabilities.plain_image(pipe)
    assert image.size == (16, 16)
    given = {name: capabilities.work_of(name, pipe, image, 6) for name in capabilities.CAPABILITIES}
    assert len(given["batch of 4"]().images) == 4
    assert given["think"]().thoughts is not None
    assert isinstance(given["chat"](), str)
    assert len(given["frames"]().frames) == 3
    assert len(given["preview"]()) == 4
    assert {part["type"] for part in given["interleave"]()} <= {"text", "image"}
    codes, _ = pipe.encode_images(image)
    kept = given["keep scales"]().image_codes
    assert kept[:5].equal(codes[:5]) and not kept.equal(codes)  # two of four scales
    part = given["regional edit"]().image_codes[14:].view(4, 4)
    assert part[:, 2:].equal(codes[14:].view(4, 4)[:, 2:]) and not part[:, :2].equal(codes[14:].view(4, 4)[:, :2])
    assert given["reconstruct"]().image_codes.equal(codes)


def test_the_command_makes_one_table(model_folder, tmp_path, monkeypatch, capsys):
    run = ["--model", model_folder, "--only", "text-to-image", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["capabilities.py", *run, "--output", str(tmp_path / "numbers.json")])
    capabilities.main()
    printed = capsys.readouterr().out
    facts, table = printed.split("\n\n")
    assert f"- model: {model_folder}, " in facts and "- images: 16 x 16 pixels, 30 codes" in facts
    assert "torch " in facts and "- device: " in facts
    head, rule, row = table.strip().splitlines()
    assert {line.count("|") for line in (head, rule, row)} == {8}
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert row.startswith("| text-to-image | one image | ")
    assert f"| {numbers['text-to-image']['warm']:.3f} |" in row


def test_what_a_model_lacks_is_a_row(pipe):
    lacking = capabilities.measure_one("diffusion decoder", pipe, repeats=1, max_new_tokens=6)
    rows = capabilities.table({"diffusion decoder": lacking}).splitlines()
    assert len(rows) == 3 and rows[2] == "| diffusion decoder | this model has none | | | | | |"


def test_a_failure_is_not_hidden(tmp_path):
    with pytest.raises(RuntimeError, match="text-to-image failed with status 1"):
        capabilities.run_one("text-to-image", ["--model", str(tmp_path / "none")])
