"""Every training by its command in two processes: step by step the losses of one process with as large a batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import in_processes
from toy_commands import toy_commands

from nextflow_hf.commands import train
from nextflow_hf.training.data.text_tokenizer import train_text_tokenizer


BATCH = {"global_batch_size": 4, "per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "no"}
BATCH |= {"optim": "sgd"}  # Adam makes whole steps of gradients that are rounding
TEACHER = {
    "text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 1}, "num_eval": 4,
    "image_processor": {"patch_size": 4, "resolution": 16, "max_pixels": 4096}, "learning_rate": 0.01,
    "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip
CHANGES = {
    "transformer": {"lora_dropout": 0.0},  # its random numbers are those of a process
    "tokenizer": {"continuous_steps": 1, "adversarial_loss_weight": 0.1},
    "teacher": {},
    "grpo": {"global_batch_size": 8, "max_steps": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    toy_commands(folder)
    recipe = yaml.safe_load((folder / "tokenizer.yaml").read_text())
    train_text_tokenizer([f"picture {index}" for index in range(12)], 300).save_pretrained(folder / "text")
    source = {"path": str(folder / "captioned"), "format": "captioned_folder", "task": "text_to_image"}
    (folder / "images.yaml").write_text(yaml.safe_dump({"sources": [source]}))
    teacher = {**TEACHER, "data": str(folder / "images.yaml"), "text_tokenizer_name_or_path": str(folder / "text")}
    teacher["image_processor"] = recipe["image_processor"]
    (folder / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    return folder


def command(folder: Path, kind: str, output_dir: Path, processes: int = 2) -> list[str]:
    values = {**BATCH, **CHANGES[kind], "output_dir": str(output_dir)}
    # Each process counts its own: samples of a step, which are one batch, and batches to begin the codebook from.
    per_process = {"grpo": {"per_device_train_batch_size": 8}, "tokenizer": {"codebook_init_batches": 4}}
    values |= {name: count // processes for name, count in per_process.get(kind, {}).items()}
    return [kind, str(folder / f"{kind}.yaml"), *(f"{key}={json.dumps(value)}" for key, value in values.items())]


def steps_of(output_dir: Path) -> list[dict[str, float]]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "reward", "text_loss", "image_loss", "reconstruction_loss", "adversarial_loss")
    return [{name: entry[name] for name in names if name in entry} for entry in history if "loss" in entry]


@pytest.mark.process
@pytest.mark.parametrize("kind", CHANGES)
def test_two_processes_train_as_one(kind, folder, tmp_path):
    assert train.main(command(folder, kind, tmp_path / "one", 1)) == 0
    arguments = command(folder, kind, tmp_path / "two")
    assert in_processes(lambda: train.main(arguments)) == [0, 0]
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert len(one) == {**BATCH, **CHANGES[kind]}["max_steps"] == len(two)
    for expected, got in zip(one, two):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len({entry["loss"] for entry in one}) == len(one)  # the weights move


@pytest.mark.process
def test_torchrun_starts_the_command(folder, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = command(folder, "teacher", tmp_path / "two")
    result = subprocess.run([*launcher, "-m", "nextflow_hf.cli", "train", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(steps_of(tmp_path / "two")) == 4
