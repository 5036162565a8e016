"""The Makefiles of examples/: one public command a stage, a mark when it has ended well, and nothing done twice."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml


SHAPES = Path(__file__).parents[1] / "examples" / "shapes"
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(tmp_path: Path, *arguments: str, nextflow: str = "true") -> subprocess.CompletedProcess:
    folders = [f"DATA={tmp_path / 'data'}", f"RUN={tmp_path / 'run'}", f"NEXTFLOW={nextflow}"]
    return subprocess.run(["make", "-C", SHAPES, *folders, *arguments], capture_output=True, text=True, check=False)


def commands(output: str) -> list[str]:
    return re.findall(r"^STAGE (\S+ \S+)", output, flags=re.MULTILINE)


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_every_stage_is_one_command_and_is_done_once(tmp_path, size):
    planned = commands(make(tmp_path, "-n", f"SIZE={size}", "all", nextflow="STAGE").stdout)
    assert planned[:3] == ["world shapes", "train text_tokenizer", "train teacher"]
    assert planned.index("train tokenizer") < planned.index("train transformer") < planned.index("train grpo")
    assert make(tmp_path, f"SIZE={size}", "all").returncode == 0
    assert commands(make(tmp_path, "-n", f"SIZE={size}", "all", nextflow="STAGE").stdout) == []
    (tmp_path / "run" / "done" / "transformer_mixture").unlink()
    left = commands(make(tmp_path, "-n", "model", nextflow="STAGE").stdout)
    assert [command.split()[0] for command in left] == ["train", "export", "evaluate"]


def test_a_stage_that_fails_leaves_no_mark(tmp_path):
    assert make(tmp_path, nextflow="false").returncode != 0
    assert not list(tmp_path.rglob("done/*"))


def test_recipes_are_those_that_the_makefile_names():
    named = set(re.findall(r"\$\(RECIPES\)/(\w+)\.yaml", (SHAPES / "Makefile").read_text()))
    assert named == {path.stem for path in (SHAPES / "recipes").glob("*.yaml")}
    for path in (SHAPES / "recipes").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["output_dir"].startswith("runs/shapes/")
