import os
import random

import numpy as np
import pytest
import torch


if not torch.accelerator.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton, and with it Liger, is imported
torch.set_num_threads(1)  # tiny models; the workers of pytest-xdist share the cores


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, and can ask for the seed it came from."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    """Folder of a toy pipeline."""
    from toy_pipeline import toy_pipeline

    folder = tmp_path_factory.mktemp("model") / "toy"
    toy_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def command_line(capsys, tmp_path, monkeypatch):
    """A `CommandLine` in a folder of its own."""
    from command_line import CommandLine

    monkeypatch.chdir(tmp_path)
    return CommandLine(capsys)
