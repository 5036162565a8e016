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
from huggingface_hub.errors import StrictDataclassFieldValidationError
from processes import in_processes
from safetensors import SafetensorError
from toy_commands import ToyCommand, files_of, toy_commands
from transformers import TrainerState

from nextflow_hf import cli
from nextflow_hf.commands import convert, extract, train
from nextflow_hf.training.common import checkpoints
from nextflow_hf.training.data import extraction
from nextflow_hf.training.data.images import NextFlowImageDataset


TRAININGS = ("transformer", "tokenizer", "decoder", "grpo")
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


def steps_of(output: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))


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
        assert f"{whole[name]} is finished after" in caplog.text


@pytest.mark.parametrize("name", TRAININGS)
def test_a_kill_before_the_final_save_costs_no_step(name, commands, whole, tmp_path):
    output = tmp_path / "killed"
    shutil.copytree(whole[name], output)
    for path in output.iterdir():  # all but the checkpoints is lost
        if path.is_file():
            path.unlink()
        elif not path.name.startswith("checkpoint-"):
            shutil.rmtree(path)
    before = {str(path): files_of(path) for path in output.rglob("checkpoint-*")}
    assert commands[name].run(output) == 0
    assert commands[name].result(output) == commands[name].result(whole[name])
    assert before == {str(path): files_of(path) for path in output.rglob("checkpoint-*")}


def test_augmentation_goes_on_in_a_later_epoch(commands, whole, tmp_path):
    """Twelve images are six steps: the ninth is in the second epoch."""
    commands["tokenizer"].run(tmp_path / "all", "save_total_limit=9")
    shutil.copytree(tmp_path / "all" / "checkpoint-8", tmp_path / "again" / "checkpoint-8")
    assert commands["tokenizer"].run(tmp_path / "again") == 0
    expected = commands["tokenizer"].result(whole["tokenizer"])
    assert commands["tokenizer"].result(tmp_path / "again") == expected


def test_augmentation_changes_with_the_epoch_on_several_processes(commands, tmp_path):
    def work() -> set[int]:
        epochs, load = set(), NextFlowImageDataset._pixels

        def note(self, item, index):
            epochs.add(int(self.images.epoch[0]))
            return load(self, item, index)

        NextFlowImageDataset._pixels = note
        commands["tokenizer"].run(tmp_path / "two", "max_steps=5")
        return epochs

    assert in_processes(work) == [{0, 1}] * 2


def test_more_steps_go_on(commands, whole, tmp_path):
    output = tmp_path / "more"
    shutil.copytree(whole["transformer"], output)
    (output / "notes.txt").write_text("mine")
    assert commands["transformer"].run(output, "max_steps=15") == 0
    state = json.loads((output / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, 16))
    seconds = [entry["train_seconds"] for entry in state["log_history"]]
    assert seconds == sorted(seconds) and seconds[-1] > 0
    assert steps_of(output) == [14, 15] and (output / "notes.txt").read_text() == "mine"
    assert commands["transformer"].result(output) != commands["transformer"].result(whole["transformer"])
    # A shorter training is finished, too.
    before = files_of(output)
    assert commands["transformer"].run(output) == 0 and files_of(output) == before


def test_seconds_are_those_of_all_starts_and_unknown_where_an_older_version_began(monkeypatch):
    times = iter([10.0, 15.0, 100.0, 103.0, 200.0])
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: next(times))
    clock, state = checkpoints._Clock(), TrainerState()
    for step in (0, 4):
        state.global_step = step
        clock.on_train_begin(None, state, None)
        state.log_history.append({"step": step + 1})
        clock.on_log(None, state, None)
    assert state.log_history == [{"step": 1, "train_seconds": 5.0}, {"step": 5, "train_seconds": 8.0}]
    state.log_history = [{"step": 5}]
    clock.on_train_begin(None, state, None)
    clock.on_log(None, state, None)
    assert state.log_history == [{"step": 5}]


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
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

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
        assert f"stopped by {number.name} after step 3 of" in log and steps_of(output)[-1] == 3
        assert f"{output / 'checkpoint-3'} is complete" in log
    assert commands[name].run(output) == 0
    assert commands[name].result(output) == commands[name].result(whole[name])


def test_a_signal_to_one_process_stops_all(commands, tmp_path):
    def work() -> int:
        if os.environ["RANK"] == "1":
            signalled(signal.SIGTERM)()
        with pytest.raises(SystemExit) as stop:
            commands["transformer"].run(tmp_path / "two", "use_peft=false", "--debug")
        return stop.value.code

    assert in_processes(work) == [143, 143] and steps_of(tmp_path / "two")[-1] == 3


# --- mistakes


MISTAKES = {
    "train": [
        ["transformers", "nosuch"],
        ["transformer"],
        ["transformer", "nosuch"],
        ["transformer", "{toys}/nowhere.yaml"],
        ["transformer", "{toys}/broken.yaml"],
        ["transformer", "{toys}/list.yaml"],
        ["transformer", "{toys}/transformer.yaml", "learning_rat=1"],
        ["transformer", "{toys}/transformer.yaml", "learning_rate=fast"],
        ["transformer", "{toys}/transformer.yaml", "max_steps"],
        ["transformer", "{toys}/transformer.yaml", "max_steps=[1"],
        ["transformer", "{toys}/transformer.yaml", "global_batch_size=3"],
        ["transformer", "{toys}/transformer.yaml", "global_batch_size=4", "per_device_train_batch_size=0"],
        ["transformer", "{toys}/transformer.yaml", "dataloader_drop_last=true", "per_device_train_batch_size=100"],
        ["transformer", "{toys}/transformer.yaml", "pack_max_length=10", "on_long_row=skip"],
        ["transformer", "{toys}/transformer.yaml", "--resume"],
        ["transformer", "{toys}/transformer.yaml", "resume_from_checkpoint=false"],
        ["transformer", "{toys}/transformer.yaml", "train_codes=[{toys}/nowhere]"],
        ["transformer", "{toys}/transformer.yaml", "model_name_or_path={toys}/nowhere"],
        ["transformer", "{toys}/transformer.yaml", "model_name_or_path={toys}/pictures"],
        ["transformer", "{toys}/transformer.yaml", "model_name_or_path={toys}/cut/transformer"],
        ["transformer", "{toys}/transformer.yaml", "config_overrides.nothing=1"],
        ["transformer", "{toys}/transformer.yaml", "config_overrides.max_scales=1.5"],
        ["tokenizer", "nosuch"],
        ["tokenizer", "pixel"],
        ["tokenizer", "{toys}/broken.yaml"],
        ["tokenizer", "{toys}/tokenizer.yaml", "data={toys}/nowhere"],
        ["tokenizer", "{toys}/tokenizer.yaml", "vision_tokenizer_name_or_path={toys}/pictures"],
        ["tokenizer", "{toys}/tokenizer.yaml", "stage=first"],
        ["tokenizer", "{toys}/tokenizer.yaml", "config_overrides.nothing=1"],
        ["tokenizer", "{toys}/tokenizer.yaml", "vision_tokenizer_name_or_path={toys}/cut/vision_tokenizer"],
        ["tokenizer", "{toys}/tokenizer.yaml", "save_steps=often"],
        ["tokenizer", "{toys}/tokenizer.yaml", "image_processor.resoluton=16"],
        ["tokenizer", "{toys}/tokenizer.yaml", "merge_codes=1000000"],
        ["decoder", "nosuch"],
        ["decoder", "{toys}/transformer.yaml"],
        ["decoder", "{toys}/decoder.yaml", "data={toys}/nowhere.yaml"],
        ["decoder", "{toys}/decoder.yaml", "codes={toys}/nowhere"],
        ["decoder", "{toys}/decoder.yaml", "model={toys}/pictures"],
        ["decoder", "{toys}/decoder.yaml", "max_step=1"],
        ["decoder", "{toys}/decoder.yaml", "base_model={toys}/pictures"],
        ["decoder", "{toys}/decoder.yaml", "base_model=null"],
        ["decoder", "{toys}/decoder.yaml", "base_model=null", "denoiser_config={{class: UNet2DConditionModel, a: 1}}"],
        ["decoder", "{toys}/decoder.yaml", "upscale_factor=3"],
        ["grpo", "nosuch"],
        ["grpo", "{toys}/transformer.yaml"],
        ["grpo", "{toys}/grpo.yaml", "model={toys}/pictures"],
        ["grpo", "{toys}/grpo.yaml", "model={toys}/nowhere"],
        ["grpo", "{toys}/grpo.yaml", "max_step=1"],
        ["grpo", "{toys}/grpo.yaml", "learning_rate=fast"],
        ["grpo", "{toys}/grpo.yaml", "num_generations=0"],
        ["grpo", "{toys}/grpo.yaml", "rewards=[toy_commands:one_number]"],
        ["grpo", "{toys}/grpo.yaml", "rewards=3"],
        ["grpo", "{toys}/grpo.yaml", "rewards=[]"],
        ["grpo", "{toys}/grpo.yaml", "rewards=[brightness]"],
        ["grpo", "{toys}/grpo.yaml", "rewards=[no_such_module:reward]"],
        ["grpo", "{toys}/grpo.yaml", "rewards=[toy_commands:darkness]"],
        ["grpo", "{toys}/grpo.yaml", "prompts={toys}/nowhere.txt"],
        ["grpo", "{toys}/grpo.yaml", "prompts={toys}/blank.txt"],
        ["grpo", "{toys}/grpo.yaml", "prompts={toys}/broken.jsonl"],
        ["grpo", "{toys}/grpo.yaml", "prompts={toys}/null.jsonl"],
        ["grpo", "{toys}/grpo.yaml", "model={toys}/cut"],
    ],
    "extract": [
        [],
        ["{toys}/nowhere.yaml"],
        ["{toys}/broken.yaml"],
        ["{toys}/transformer.yaml"],
        ["{toys}/data.yaml", "output_dir={toys}/new", "batch_size=many"],
        ["{toys}/data.yaml", "output_dir={toys}/new", "batch_size=0"],
        ["{toys}/data.yaml", "output_dir={toys}/new", "model={toys}/pictures"],
        ["{toys}/data.yaml", "output_dir={toys}/data.yaml"],
        ["{toys}/data.yaml", "output_dir={toys}/new", "model={toys}/cut"],
    ],
    "convert": [
        ["tokenflow", "{toys}/nowhere.pt", "{toys}/new"],
        ["tokenflow", "{toys}/transformer.yaml", "{toys}/new"],
        ["tokenflow", "{toys}/broken.pt", "{toys}/new"],
        ["tokenflow", "{toys}/broken.safetensors", "{toys}/new"],
        ["tokenflow", "{toys}/model", "{toys}/model"],
        ["qwen", "{toys}/nowhere", "{toys}/new", "--vision-tokenizer", "{toys}/model/vision_tokenizer"],
        ["qwen", "{toys}/pictures", "{toys}/new", "--vision-tokenizer", "{toys}/model/vision_tokenizer"],
        ["qwen", "{toys}/model", "{toys}/new", "--vision-tokenizer", "{toys}/pictures"],
    ],
}
MAINS = {"train": train.main, "extract": extract.main, "convert": convert.main}


@pytest.fixture(scope="module")
def toys(commands, tmp_path_factory) -> Path:
    """The folder of the toys, with recipes that are wrong in one thing."""
    folder = tmp_path_factory.getbasetemp() / "toys0"
    (folder / "broken.yaml").write_text("a: [1\nb: {")
    (folder / "list.yaml").write_text("- 1\n")
    for name, text in (
        ("blank.txt", "\n \n"),
        ("broken.jsonl", "{bad\n"),
        ("null.jsonl", '{"prompt": "a"}\n{"prompt": null}\n'),
    ):
        (folder / name).write_text(text)
    for name in ("broken.pt", "broken.safetensors"):
        (folder / name).write_bytes(b"no weights at all")
    shutil.copytree(folder / "model", folder / "cut")
    for weights in (folder / "cut").rglob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:2000])
    return folder


CASES = [(name, argv) for name, mistakes in MISTAKES.items() for argv in mistakes]


@pytest.mark.parametrize(("name", "argv"), CASES, ids=[f"{name}-{index}" for index, (name, _) in enumerate(CASES)])
def test_a_mistake_is_one_line_and_status_2(name, argv, toys, tmp_path, capfd):
    argv = [word.format(toys=toys) for word in argv]
    if name == "train" and len(argv) > 1:
        argv.append(f"output_dir={tmp_path}")
    assert MAINS[name](argv) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("nextflow-hf ")]
    assert len(lines) == 1 and lines[0].startswith(f"nextflow-hf {name}: ")
    assert lines[0].endswith(" (--debug shows the traceback)")
    with pytest.raises((ValueError, OSError, SafetensorError, StrictDataclassFieldValidationError)):
        MAINS[name]([*argv, "--debug"])


def test_an_unknown_option_is_one_line_and_status_2(toys, capsys):
    with pytest.raises(SystemExit, match="2"):
        MAINS["train"](["transformer", f"{toys}/transformer.yaml", "--max_stepz", "3"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "nextflow-hf train: unrecognized arguments: --max_stepz 3"


def test_commands_by_module_too(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "nextflow_hf.cli", "train", "transformer", "nosuch"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()  # nothing of other libraries, either
    assert line.startswith("nextflow-hf train: nosuch is no file and no recipe of transformer")


def test_the_command_line_has_the_same_status(capsys):
    assert cli.main(["train", "transformer", "nosuch"]) == 2
    assert capsys.readouterr().err.startswith("nextflow-hf train: nosuch is no file")
