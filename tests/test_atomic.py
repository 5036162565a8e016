"""Files and folders that are whole at every moment: a death at any system call leaves the old one or the new one."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import in_a_process
from test_training_failures import make_trainer
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowForCausalLM, NextFlowPipeline, atomic
from nextflow_hf.hub_cards.cards import create_card
from nextflow_hf.hub_cards.export import export_pipeline
from nextflow_hf.training.transformer.trainer import NextFlowTrainer


OLD = {
    "config.json": "old", "model-00001-of-00002.safetensors": "old", "model-00002-of-00002.safetensors": "old",
    "model.safetensors.index.json": "old", "notes.txt": "mine", "checkpoint-2/model.safetensors": "step 2",
    "vision/config.json": "old", "vision/model.safetensors": "old", "vision/table.md": "mine",
}  # fmt: skip
NEW = {
    "config.json": "new",
    "model.safetensors": "new",
    "vision/config.json": "new",
    "vision/model.safetensors": "new",
}
STAYS = {"notes.txt": "mine", "checkpoint-2/model.safetensors": "step 2", "vision/table.md": "mine"}


def test_containers_whose_processes_have_one_number_write_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)

    def while_another_does(temporary: Path) -> None:
        temporary.write_text("mine")
        atomic.write_text(tmp_path / "file.json", "the other's")

    atomic.write_file(tmp_path / "file.json", while_another_does)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    """Without what a dead process leaves, which nothing reads."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in paths.items() if not name.startswith(".unfinished")}


def dies_at(call: int, work: Callable[[], None]) -> bool:
    """Whether `work`, in a process of its own, was killed before its system call of that number."""

    def run() -> None:
        calls = []

        def dying(function):
            def wrapped(*args, **kwargs):
                calls.append(function)
                if len(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapped

        for name in ("replace", "rename", "link", "unlink", "rmdir", "mkdir", "open", "fsync"):
            setattr(os, name, dying(getattr(os, name)))
        work()
        os._exit(0)

    process = in_a_process(run)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def replace(folder: Path, **options) -> None:
    with atomic.replaced_folder(folder, **options) as staging:
        put(staging, NEW)


@pytest.mark.parametrize("old", [None, {}, STAYS, OLD], ids=["missing", "empty", "without a model", "with a model"])
def test_a_folder_is_the_old_or_the_new_one(old, tmp_path):
    after = NEW if old is None else {**{name: text for name, text in old.items() if name in STAYS}, **NEW}
    seen = []
    for call in range(1, 500):
        folder = tmp_path / str(call) / "folder"
        if old is not None:
            folder.mkdir(parents=True)
            put(folder, old)
        died = dies_at(call, lambda folder=folder: replace(folder))
        found = contents(folder)
        if old == OLD:
            assert found in (old, after)
        elif "config.json" not in found:  # nothing loads it
            assert found.items() <= after.items()
        else:
            assert found == after
        seen.append(found == after)
        replace(folder)  # the next process clears up
        assert contents(folder) == after and not any(tmp_path.rglob("*unfinished*"))
        if not died:
            break
    assert call > 10 and seen[-1] and not seen[0]


def test_times_and_links_of_what_stays(tmp_path):
    put(tmp_path / "folder", OLD)
    (tmp_path / "folder" / "last").symlink_to("checkpoint-2")
    os.utime(tmp_path / "folder" / "checkpoint-2", (1000, 1000))
    replace(tmp_path / "folder", without=["notes.txt"])
    assert (tmp_path / "folder" / "checkpoint-2").stat().st_mtime == 1000
    assert (tmp_path / "folder" / "last").is_symlink() and not (tmp_path / "folder" / "notes.txt").exists()


def test_an_error_leaves_everything(tmp_path):
    put(tmp_path / "folder", OLD)
    with pytest.raises(RuntimeError), atomic.replaced_folder(tmp_path / "folder") as staging:
        put(staging, NEW)
        raise RuntimeError
    assert contents(tmp_path / "folder") == OLD and [path.name for path in tmp_path.iterdir()] == ["folder"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file is a file, expected a folder"):
        replace(tmp_path / "file")


@pytest.mark.parametrize("why", ["working directory", "no exchange", "mounted", "no links"])
def test_where_folders_cannot_be_exchanged(why, tmp_path, monkeypatch):
    put(tmp_path / "folder", OLD)
    if why == "working directory":
        monkeypatch.chdir(tmp_path / "folder" / "vision")
    if why == "no exchange":
        monkeypatch.setattr(atomic, "_RENAME_EXCHANGE", 1 << 20)  # no flag of this system
    if why == "mounted":
        rename = os.rename
        monkeypatch.setattr(os, "rename", lambda a, b: exec("raise OSError") if ".folder" in str(b) else rename(a, b))
    if why == "no links":
        monkeypatch.setattr(os, "link", lambda *args, **kwargs: exec("raise OSError"))
    replace(tmp_path / "folder")
    assert contents(tmp_path / "folder") == {**STAYS, **NEW}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert Path.cwd().exists()


def test_a_file_is_the_old_or_the_new_one(tmp_path):
    for call in range(1, 20):
        path = tmp_path / str(call) / "table.json"
        path.parent.mkdir()
        path.write_text("old")
        died = dies_at(call, lambda path=path: atomic.write_json(path, ["new"]))
        assert path.read_text() in ("old", '[\n  "new"\n]\n')
        if not died:
            break
    assert call > 3 and path.read_text() != "old" and len(list(path.parent.iterdir())) == 1


def test_pipes_and_links_are_written_through(tmp_path):
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    atomic.write_text(tmp_path / "link.txt", "text")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    atomic.write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text"


# --- who uses it


def changed(pipe: NextFlowPipeline) -> NextFlowPipeline:
    for module in (pipe.transformer, pipe.vision_tokenizer):
        for parameter in module.parameters():
            parameter.data += 1
    return pipe


def save_by_trainer(pipe: NextFlowPipeline, folder: Path) -> None:
    from nextflow_hf.training.transformer.arguments import NextFlowTrainingArguments

    args = NextFlowTrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    NextFlowTrainer(pipe.transformer, args).save_model()


def export(pipe: NextFlowPipeline, folder: Path) -> None:
    export_pipeline(pipe, folder, create_card("model", repo_id="toy/nextflow"))


@pytest.mark.parametrize("save", [save_by_trainer, export])
def test_a_death_while_weights_are_written_leaves_the_old_model(save, tmp_path, monkeypatch):
    save(toy_pipeline(), tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}
    pipe = changed(toy_pipeline())

    def die() -> None:
        write = NextFlowForCausalLM.save_pretrained

        def half(self, folder, *args, **kwargs):
            write(self, folder, *args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        NextFlowForCausalLM.save_pretrained = half
        save(pipe, tmp_path / "model")

    process = in_a_process(die)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert all(path.read_bytes() == data for path, data in before.items())
    save(pipe, tmp_path / "model")
    loaded = NextFlowForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.lm_head.weight, pipe.transformer.lm_head.weight)
    assert not any(tmp_path.rglob("*unfinished*"))


def test_a_checkpoint_of_an_earlier_run_is_never_half_removed(tmp_path, monkeypatch):
    """A run that went on from further back writes `checkpoint-N` again."""
    make_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-2" / "of-the-old-one").write_text("x")

    def die(folder, *args, **kwargs) -> None:
        if Path(folder).is_dir():
            next(path for path in Path(folder).rglob("*") if path.is_file()).unlink()
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert names == {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
