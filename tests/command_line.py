"""`nextflow-hf` in this process; conftest.py has it as a fixture, and a toy model for it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nextflow_hf import NextFlowPipeline, cli


class CommandLine:
    """Runs commands in a folder of their own."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.capsys = capsys
        self.errors = ""
        self.trusts_images = True  # a record's model lies in a folder of the test

    def run(self, *argv: Any, status: int = 0) -> str:
        """Standard output; `errors` then has the other."""
        self.capsys.readouterr()
        trust = ["--allow-model"] if self.trusts_images and "--from-image" in argv else []
        try:
            returned = cli.main([str(one) for one in (*argv, *trust)])
        except SystemExit as stop:  # argparse's, on a mistake
            returned = stop.code
        captured = self.capsys.readouterr()
        self.errors = captured.err
        assert returned == status, captured.err
        return captured.out

    def json(self, *argv: Any, status: int = 0) -> dict[str, Any]:
        """Standard output of `--json`, all of it."""
        return json.loads(self.run(*argv, "--json", status=status))

    def mistake(self, *argv: Any) -> str:
        """What is said of a mistake: one message, no traceback."""
        assert self.run(*argv, status=2) == ""
        assert "Traceback" not in self.errors
        return self.errors


def pixels(path: str | Path) -> tuple[tuple[int, int], bytes]:
    with Image.open(path) as image:
        return image.size, image.convert("RGB").tobytes()


def save_picture(path: Path, seed: int = 0, size: tuple[int, int] = (16, 16)) -> Path:
    """Noise of (width, height)."""
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(array).save(path)
    return path


def use_pipeline(monkeypatch: pytest.MonkeyPatch, pipe: NextFlowPipeline) -> None:
    """Let commands load this one, whatever they are told."""
    monkeypatch.setattr(NextFlowPipeline, "from_pretrained", classmethod(lambda cls, *args, **kwargs: pipe))
