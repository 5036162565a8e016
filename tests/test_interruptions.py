"""Every command that trains or extracts: the same command is the same run, whatever happens to it, and then ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import in_processes
from safetensors import SafetensorError
from toy_commands import ToyCommand, files_of, toy_commands

from nextflow_hf import cli
from nextflow_hf.commands import convert, extract
from nextflow_hf.training.common import checkpoints
from nextflow_hf.training.data import extraction
from nextflow_hf.training.data.images import NextFlowImageDataset
from nextflow_hf.training.diffusion_decoder import train as train_decoder
from nextflow_hf.training.grpo import train as grpo
from nextflow_hf.training.transformer import train
from nextflow_hf.training.vision_tokenizer import train as train_tokenizer


TRAININGS = ("train", "train-tokenizer", "train-decoder", "grpo")
COMMANDS = ("extract", *TRAININGS)


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, ToyCommand]:
    return toy_commands(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory) -> dict[str, Path]:
    """The folder of an uninterrupted run of each command; tests copy it, or leave it as it is."""
    folders = {name: tmp_path_factory.mktemp("whole") / name for name in COMMANDS}
    for name, folder in folders.items():
        assert commands[name].run(folder) == 0
    return folders


def run_folder(name: str, output: Path) -> Path:
    """Where the checkpoints are."""
    return output / "base_run" if name == "train-decoder" else output


def steps_of(name: str, output: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in run_folder(name, output).glob("checkpoint-*"))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_seed_is_set_before_anything_random_is_made(name, commands, whole, tmp_path):
    commands[name].run(tmp_path / "again")
    assert len(commands[name].result(whole[name])) > 0
    assert commands[name].result(tmp_path / "again") == commands[name].result(whole[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_finished_run_says_so_and_changes_nothing(name, commands, whole, caplog):
    before = files_of(whole[name])
    assert commands[name].run(whole[name]) == 0
    assert files_of(whole[name]) == before
    if name in TRAININGS:
        assert f"{run_folder(name, whole[name])} is finished after" in caplog.text


@pytest.mark.parametrize("name", TRAININGS)
def test_a_kill_before_the_final_save_costs_no_step(name, commands, whole, tmp_path):
    output = tmp_path / "killed"
    shutil.copytree(whole[name], output)
    for path in output.iterdir():  # all but the checkpoints is lost
        if not path.name.endswith("_run"):
            if path.is_file():
                path.unlink()
            elif not path.name.startswith("checkpoint-"):
                shutil.rmtree(path)
    for state in output.glob("*_run/trainer_state.json"):
        state.unlink()
    before = {str(path): files_of(path) for path in output.rglob("checkpoint-*")}
    assert commands[name].run(output) == 0
    assert commands[name].result(output) == commands[name].result(whole[name])
    assert before == {str(path): files_of(path) for path in output.rglob("checkpoint-*")}


def test_augmentation_goes_on_in_a_later_epoch(commands, whole, tmp_path):
    """Twelve pictures are six steps: the ninth is in the second epoch."""
    commands["train-tokenizer"].run(tmp_path / "all", "--override", "save_total_limit=9")
    shutil.copytree(tmp_path / "all" / "checkpoint-8", tmp_path / "again" / "checkpoint-8")
    assert commands["train-tokenizer"].run(tmp_path / "again") == 0
    expected = commands["train-tokenizer"].result(whole["train-tokenizer"])
    assert commands["train-tokenizer"].result(tmp_path / "again") == expected


def test_augmentation_changes_with_the_epoch_on_several_processes(commands, tmp_path):
    def work() -> set[int]:
        epochs, load = set(), NextFlowImageDataset._pixels

        def note(self, item, index):
            epochs.add(int(self.images.epoch[0]))
            return load(self, item, index)

        NextFlowImageDataset._pixels = note
        commands["train-tokenizer"].run(tmp_path / "two", "--override", "max_steps=5")
        return epochs

    assert in_processes(work) == [{0, 1}] * 2


def test_more_steps_go_on(commands, whole, tmp_path):
    output = tmp_path / "more"
    shutil.copytree(whole["train"], output)
    (output / "notes.txt").write_text("mine")
    assert commands["train"].run(output, "--override", "max_steps=15") == 0
    state = json.loads((output / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, 16))
    assert steps_of("train", output) == [14, 15] and (output / "notes.txt").read_text() == "mine"
    assert commands["train"].result(output) != commands["train"].result(whole["train"])
    # A shorter training is finished, too.
    before = files_of(output)
    assert commands["train"].run(output) == 0 and files_of(output) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_once(name, commands, whole, tmp_path):
    output = tmp_path / "killed"
    process = commands[name].start(output)
    while process.is_alive() and not (any(output.rglob("checkpoint-*")) or any(output.glob("shard-*"))):
        time.sleep(0.001)
    time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert commands[name].run(output) == 0
    assert commands[name].result(output) == commands[name].result(whole[name])


def signalled(number: signal.Signals):
    """The command gets a signal in its third step, or at its second shard."""

    def prepare() -> None:
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), number)

        checkpoints._StopOnSignal.on_step_begin = on_step_begin
        write_shard = extraction.write_shard

        def write(folder, shard, *args, **kwargs):
            if shard == 1:
                os.kill(os.getpid(), number)
            write_shard(folder, shard, *args, **kwargs)

        extraction.write_shard = write

    return prepare


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_ends_a_step_and_leaves_a_checkpoint(name, number, commands, whole, tmp_path):
    output = tmp_path / "stopped"
    process = commands[name].start(output, signalled(number))
    process.join()
    assert process.exitcode == 128 + number
    log = output.with_suffix(".log").read_text()
    assert "Traceback" not in log
    if name == "extract":
        assert "keeps the shards that are written, and the same command goes on" in log
    else:
        assert f"stopped by {number.name} after step 3 of" in log and steps_of(name, output)[-1] == 3
        assert f"{run_folder(name, output) / 'checkpoint-3'} is complete" in log
    assert commands[name].run(output) == 0
    assert commands[name].result(output) == commands[name].result(whole[name])


def test_a_signal_to_one_process_stops_all(commands, tmp_path):
    def work() -> int:
        if os.environ["RANK"] == "1":
            signalled(signal.SIGTERM)()
        with pytest.raises(SystemExit) as stop:
            commands["train"].run(tmp_path / "two", "--override", "use_peft=false", "--debug")
        return stop.value.code

    assert in_processes(work) == [143, 143] and steps_of("train", tmp_path / "two")[-1] == 3


# --- mistakes


MISTAKES = {
    "train": [
        ["nosuch"],
        ["{toys}/nowhere.yaml"],
        ["{toys}/broken.yaml"],
        ["{toys}/list.yaml"],
        ["{toys}/train.yaml", "--override", "learning_rat=1"],
        ["{toys}/train.yaml", "--override", "learning_rate=fast"],
        ["{toys}/train.yaml", "--override", "max_steps"],
        ["{toys}/train.yaml", "--override", "max_steps=[1"],
        ["{toys}/train.yaml", "--override", "train_codes=[{toys}/nowhere]"],
        ["{toys}/train.yaml", "--override", "model_name_or_path={toys}/nowhere"],
        ["{toys}/train.yaml", "--override", "model_name_or_path={toys}/pictures"],
        ["{toys}/train.yaml", "--override", "model_name_or_path={toys}/cut/transformer"],
        ["{toys}/train.yaml", "--override", "config_overrides.nothing=1"],
        ["{toys}/train.yaml", "--max_stepz", "3"],
    ],
    "extract": [
        [],
        ["{toys}/nowhere.yaml"],
        ["{toys}/broken.yaml"],
        ["{toys}/train.yaml"],
        ["{toys}/data.yaml", "output_dir={toys}/new", "batch_size=many"],
        ["{toys}/data.yaml", "output_dir={toys}/new", "batch_size=0"],
        ["{toys}/data.yaml", "output_dir={toys}/new", "model={toys}/pictures"],
        ["{toys}/data.yaml", "output_dir={toys}/data.yaml"],
        ["{toys}/data.yaml", "output_dir={toys}/new", "model={toys}/cut"],
    ],
    "train-tokenizer": [
        ["nosuch"],
        ["{toys}/broken.yaml"],
        ["{toys}/tokenizer.yaml", "--override", "data={toys}/nowhere"],
        ["{toys}/tokenizer.yaml", "--override", "vision_tokenizer_name_or_path={toys}/pictures"],
        ["{toys}/tokenizer.yaml", "--override", "stage=first"],
        ["{toys}/tokenizer.yaml", "--override", "config_overrides.nothing=1"],
        ["{toys}/tokenizer.yaml", "--override", "vision_tokenizer_name_or_path={toys}/cut/vision_tokenizer"],
        ["{toys}/tokenizer.yaml", "--override", "save_steps=often"],
    ],
    "train-decoder": [
        ["--recipe", "nosuch", "--data", "{toys}/data.yaml"],
        ["--recipe", "{toys}/train.yaml", "--data", "{toys}/data.yaml"],
        ["--recipe", "{toys}/decoder.yaml", "--data", "{toys}/nowhere.yaml"],
        ["--recipe", "{toys}/decoder.yaml", "--data", "{toys}/data.yaml", "--codes", "{toys}/nowhere"],
        ["--recipe", "{toys}/decoder.yaml", "--data", "{toys}/data.yaml", "--model", "{toys}/pictures"],
        ["--recipe", "{toys}/bad_decoder.yaml", "--data", "{toys}/data.yaml"],
        ["--recipe", "{toys}/bad_denoiser.yaml", "--data", "{toys}/data.yaml"],
        ["--recipe", "{toys}/bad_stages.yaml", "--data", "{toys}/data.yaml"],
        ["--recipe", "{toys}/bad_parts.yaml", "--data", "{toys}/data.yaml"],
    ],
    "grpo": [
        ["--model", "{toys}/model", "--recipe", "nosuch"],
        ["--model", "{toys}/model", "--recipe", "{toys}/train.yaml"],
        ["--model", "{toys}/pictures", "--recipe", "{toys}/grpo.yaml"],
        ["--model", "{toys}/nowhere", "--recipe", "{toys}/grpo.yaml"],
        ["--model", "{toys}/model", "--recipe", "{toys}/grpo.yaml", "--set", "max_step=1"],
        ["--model", "{toys}/model", "--recipe", "{toys}/grpo.yaml", "--set", "learning_rate=fast"],
        ["--model", "{toys}/model", "--recipe", "{toys}/bad_reward.yaml"],
        ["--model", "{toys}/model", "--recipe", "{toys}/bad_rewards.yaml"],
        ["--model", "{toys}/model", "--recipe", "{toys}/bad_peft.yaml"],
        ["--model", "{toys}/cut", "--recipe", "{toys}/grpo.yaml"],
    ],
    "convert": [
        ["tokenflow", "{toys}/nowhere.pt", "{toys}/new"],
        ["tokenflow", "{toys}/train.yaml", "{toys}/new"],
        ["tokenflow", "{toys}/broken.pt", "{toys}/new"],
        ["tokenflow", "{toys}/broken.safetensors", "{toys}/new"],
        ["tokenflow", "{toys}/model", "{toys}/model"],
        ["qwen", "{toys}/nowhere", "{toys}/new", "--vision-tokenizer", "{toys}/model/vision_tokenizer"],
        ["qwen", "{toys}/pictures", "{toys}/new", "--vision-tokenizer", "{toys}/model/vision_tokenizer"],
        ["qwen", "{toys}/model", "{toys}/new", "--vision-tokenizer", "{toys}/pictures"],
    ],
}
MAINS = {
    "train": train.main, "extract": extract.main, "train-tokenizer": train_tokenizer.main,
    "train-decoder": train_decoder.main, "grpo": grpo.main, "convert": convert.main,
}  # fmt: skip


@pytest.fixture(scope="module")
def toys(commands, tmp_path_factory) -> Path:
    """The folder of the toys, with recipes that are wrong in one thing."""
    folder = tmp_path_factory.getbasetemp() / "toys0"
    (folder / "broken.yaml").write_text("a: [1\nb: {")
    (folder / "list.yaml").write_text("- 1\n")
    for name in ("broken.pt", "broken.safetensors"):
        (folder / name).write_bytes(b"no weights at all")
    decoder, policy = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("decoder", "grpo"))
    wrong = {
        "bad_decoder": {**decoder, "training": {**decoder["training"], "max_step": 1}},
        "bad_denoiser": {**decoder, "base_model": str(folder / "pictures")},
        "bad_stages": {**decoder, "stages": {"base": 3}},
        "bad_parts": {**decoder, "decoder": {"nothing": 1}},
        "bad_reward": {**policy, "rewards": [{"weight": 1.0}]},
        "bad_rewards": {**policy, "rewards": 3},
        "bad_peft": {**policy, "peft": {"rank": 2}},
    }
    for name, recipe in wrong.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copytree(folder / "model", folder / "cut")
    for weights in (folder / "cut").rglob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:2000])
    return folder


CASES = [(name, argv) for name, mistakes in MISTAKES.items() for argv in mistakes]


@pytest.mark.parametrize(("name", "argv"), CASES, ids=[f"{name}-{index}" for index, (name, _) in enumerate(CASES)])
def test_a_mistake_is_one_line_and_status_2(name, argv, toys, tmp_path, capfd):
    argv = [word.format(toys=toys) for word in argv]
    if name in ("train", "train-tokenizer"):
        argv += ["--override", f"output_dir={tmp_path}"]
    if name in ("train-decoder", "grpo"):
        argv += ["--output-dir", str(tmp_path)]
    assert MAINS[name](argv) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("nextflow-hf ")]
    assert len(lines) == 1 and lines[0].startswith(f"nextflow-hf {name}: ")
    assert lines[0].endswith(" (--debug shows the traceback)")
    with pytest.raises((ValueError, OSError, SafetensorError)):
        MAINS[name]([*argv, "--debug"])


def test_commands_by_module_too(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "nextflow_hf.training.transformer.train", "nosuch"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("nextflow-hf train: nosuch is no file and no shipped recipe")


def test_the_command_line_has_the_same_status(capsys):
    assert cli.main(["train", "nosuch"]) == 2
    assert capsys.readouterr().err.startswith("nextflow-hf train: nosuch is no file")
