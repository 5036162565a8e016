"""What stops a training, and what is left then: bad numbers, a full disk, a kill."""

import functools
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import in_a_process, in_processes
from safetensors.torch import load_file
from toy import toy_model
from toy_codes import extract_toy_codes, toy_rows
from toy_pipeline import toy_pipeline
from transformers.trainer_utils import get_last_checkpoint

from nextflow_hf import NextFlowForCausalLM
from nextflow_hf.commands.train import main
from nextflow_hf.training.common.finite_steps import NotFiniteError
from nextflow_hf.training.transformer.arguments import NextFlowTrainingArguments
from nextflow_hf.training.transformer.trainer import NextFlowTrainer


def make_trainer(output_dir: Path, model=None, rows=None, **arguments) -> NextFlowTrainer:
    values = {
        "output_dir": str(output_dir), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "learning_rate": 1e-2, "max_steps": 3, "train_sampling_strategy": "sequential", "save_strategy": "no",
        "per_device_train_batch_size": 2,
    }  # fmt: skip
    args = NextFlowTrainingArguments(**{**values, **arguments})
    return NextFlowTrainer(model or toy_model(), args, train_dataset=rows or toy_rows(16))


def weights_of(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


# --- bad numbers


def poison(model, row: dict, value: float = float("nan")) -> None:
    """The loss of this row is `value` from the second step on; all others are what they were."""
    forward, calls = model.forward, []

    @functools.wraps(forward)  # `Trainer` reads the names of its arguments
    def poisoned(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        calls.append(1)
        if torch.equal(kwargs["input_ids"][0], torch.tensor(row["input_ids"])):
            outputs.loss = outputs.loss * value if value != value else outputs.loss + value
        return outputs

    model.forward = poisoned


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_weights_change(value, tmp_path):
    rows = toy_rows(16)
    trainer = make_trainer(tmp_path, rows=rows, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    poison(trainer.model, rows[3], value)
    reference = make_trainer(tmp_path / "one", rows=rows, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    reference.args.max_steps = 1  # a schedule's first step has the same learning rate, however many follow
    reference.train()
    with pytest.raises(NotFiniteError, match="loss of step 2 is not finite") as raised:
        trainer.train()
    path = tmp_path / "bad-batch-step2-rank0-1.safetensors"
    assert str(path) in str(raised.value)
    assert [file.name for file in sorted(tmp_path.glob("bad-batch-*"))] == [path.with_suffix(".json").name, path.name]
    batch = load_file(path)
    assert batch["input_ids"].tolist() == [rows[3]["input_ids"]]
    notes = json.loads(path.with_suffix(".json").read_text())
    assert notes["step"] == 2 and notes["row_ids"] == ["row-3"] and notes["loss"] in ("nan", "inf")
    assert trainer.state.global_step == 1
    assert all(torch.equal(*pair) for pair in zip(weights_of(trainer.model), weights_of(reference.model)))
    # The saved batch is one: the model takes it as it is.
    model = toy_model()
    assert model(**batch).loss.isfinite()


def test_a_gradient_that_is_no_number_stops_too(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights_of(trainer.model)
    with pytest.raises(NotFiniteError, match=r"gradient \(norm (nan|inf)\) of step 1"):
        trainer.train()
    assert all(torch.equal(old, new) for old, new in zip(before, weights_of(trainer.model)))
    assert (tmp_path / "bad-batch-step1-rank0-0.safetensors").exists()


def test_all_processes_stop_when_one_has_a_bad_batch(tmp_path):
    rows = toy_rows(16)

    def work() -> str:
        trainer = make_trainer(tmp_path, rows=rows, per_device_train_batch_size=1, max_grad_norm=0.0)
        poison(trainer.model, rows[3])
        with pytest.raises(NotFiniteError) as raised:
            trainer.train()
        assert trainer.state.global_step == 1
        return str(raised.value)

    first, second = in_processes(work)
    assert first == second and "bad-batch-step2-rank1-0.safetensors" in first
    assert len(list(tmp_path.glob("bad-batch-*.safetensors"))) == 1


def test_a_code_out_of_range_names_its_rows(tmp_path):
    rows = toy_rows(4)
    rows[1]["image_codes"][0] = 24
    with pytest.raises(ValueError, match=r"image_codes must lie in \[0, 24\), got 0 to 24") as raised:
        make_trainer(tmp_path, rows=rows, per_device_train_batch_size=2).train()
    assert raised.value.__notes__ == ["It was raised by a batch of the rows ['row-0', 'row-1']"]


# --- checkpoints


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, sizes = trainer._save_optimizer_and_scheduler, []

    def save_on_a_full_disk(folder):
        if trainer.state.global_step == 2:  # the weights are written, the optimizer does not fit
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        save(folder)
        sizes.append(os.path.getsize(os.path.join(folder, "optimizer.pt")))

    trainer._save_optimizer_and_scheduler = save_on_a_full_disk
    try:
        with pytest.raises(OSError, match="checkpoint-2 could not be written.*checkpoint-1, is complete"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sizes[0] > 40_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_a_checkpoint_has_its_name_when_it_is_complete(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    seen = []

    def die(folder):
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        raise KeyboardInterrupt  # a signal in the middle of saving

    monkeypatch.setattr(trainer, "_save_rng_state", die)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert seen == [["unfinished-checkpoint"]]
    assert get_last_checkpoint(str(tmp_path)) is None
    # The next run clears away what is left.
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]
    assert isinstance(NextFlowForCausalLM.from_pretrained(tmp_path / "checkpoint-1"), NextFlowForCausalLM)


def test_the_best_checkpoint_is_named_where_it_ends_up(tmp_path):
    args = NextFlowTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=3, learning_rate=1e-2,
        eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True, save_total_limit=1,
    )  # fmt: skip
    trainer = NextFlowTrainer(toy_model(), args, train_dataset=toy_rows(4), eval_dataset=toy_rows(4))
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    saved = json.loads((Path(best) / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == best
    assert not (tmp_path / "unfinished-checkpoint").exists()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """With everything that draws at random: the order of rows, an adapter's dropout, samples at evaluation."""
    folder = tmp_path_factory.mktemp("recipe")
    pipe = toy_pipeline()
    for name in ("transformer", "vision_tokenizer", "processor"):
        getattr(pipe, name).save_pretrained(folder / name)
    codes = extract_toy_codes(folder / "codes", pipe.processor, pipe.vision_tokenizer, rows=20, purpose="evaluation")
    keys = {
        "model_name_or_path": str(folder / "transformer"),
        "processor_name_or_path": str(folder / "processor"),
        "vision_tokenizer_name_or_path": str(folder / "vision_tokenizer"),
        "train_codes": [str(codes)], "eval_rows": 4, "sample_prompts": ["red"],
        "use_peft": True, "lora_dropout": 0.3,
        "max_steps": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "logging_steps": 1, "learning_rate": 0.01,
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def curve(output_dir: Path) -> list[dict]:
    """Everything that was logged but times."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    clocks = ("runtime", "second", "preparation_time", "train_loss", "flos", "flops")
    return [{k: v for k, v in entry.items() if not any(clock in k for clock in clocks)} for entry in history]


def test_killed_anywhere_and_resumed_it_is_the_uninterrupted_run(recipe, tmp_path):
    def run(output_dir: Path) -> multiprocessing.Process:
        command = ["transformer", str(recipe), f"output_dir={output_dir}"]
        return in_a_process(main, command)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole).join()
    rng, kills = random.Random(time.time_ns()), 0
    for after in rng.sample(range(2, 12, 2), 2):
        process = run(killed)
        while process.is_alive() and not (killed / f"checkpoint-{after}").exists():
            time.sleep(0.002)
        time.sleep(0.3 * rng.random())
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        last = get_last_checkpoint(str(killed))
        assert json.loads((Path(last) / "trainer_state.json").read_text())["global_step"] >= after
    assert kills > 0 or (killed / "adapter_model.safetensors").exists()
    run(killed).join()
    assert curve(killed) == curve(whole)
    assert len([entry for entry in curve(whole) if "loss" in entry]) == 12
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()
    assert sorted(path.name for path in (whole / "samples").iterdir()) == [
        f"step-{step:07d}.png" for step in (4, 8, 12)
    ]
