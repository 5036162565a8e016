"""`nextflow-hf train`: recipes and what is written over them, what a stage trains, adapters, samples."""

import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from fsdp_on_cpu import CpuFsdpTrainer
from PIL import Image
from processes import in_processes
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training_equivalence import FSDP2
from torch.utils.data import DataLoader
from toy import toy_config, toy_model
from toy_codes import extract_toy_codes, toy_rows
from toy_pipeline import toy_pipeline
from transformers.integrations import TrackioCallback, WandbCallback

from nextflow_hf import NextFlowConfig, NextFlowForCausalLM, cli
from nextflow_hf.commands.train import KINDS
from nextflow_hf.processing.scale_schedule_nextflow import ScaleSchedule
from nextflow_hf.training.common import processes, run
from nextflow_hf.training.common.flops import training_flops
from nextflow_hf.training.common.keys import document_keys
from nextflow_hf.training.common.recipe import RECIPES, load_recipe, override, parse_recipe, shipped_recipes
from nextflow_hf.training.data import packing
from nextflow_hf.training.data.streaming import RowStream
from nextflow_hf.training.transformer import callbacks, memory, train
from nextflow_hf.training.transformer.arguments import DataArguments, ModelArguments, NextFlowTrainingArguments
from nextflow_hf.training.transformer.callbacks import SampleImagesCallback
from nextflow_hf.training.transformer.freezing import set_trainable
from nextflow_hf.training.transformer.model_loading import load_model
from nextflow_hf.training.transformer.trainer import NextFlowTrainer


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A folder with a toy model's parts and codes of every task."""
    folder = tmp_path_factory.mktemp("toy")
    pipe = toy_pipeline()
    for name in ("transformer", "vision_tokenizer", "processor"):
        getattr(pipe, name).save_pretrained(folder / name)
    for task in ("text_to_image", "image_to_text", "edit", "interleaved", "text"):
        # Clean, so that some of the rows may be evaluated on.
        extract_toy_codes(
            folder / task, pipe.processor, pipe.vision_tokenizer, task=task, rows=6, purpose="evaluation"
        )
    return folder


def on_toys(toy: Path, name: str, output_dir: Path) -> list[str]:
    """A shipped recipe on the toy's parts and codes."""
    recipe = load_recipe("transformer", name)
    known = {path.name for path in toy.iterdir()}
    codes = [
        str(toy / (Path(folder).name if Path(folder).name in known else "text")) for folder in recipe["train_codes"]
    ]
    values = {
        "train_codes": codes, "eval_rows": 2, "output_dir": str(output_dir), "max_steps": 2, "warmup_steps": 0,
        "processor_name_or_path": str(toy / "processor"), "per_device_train_batch_size": 2, "global_batch_size": 2,
        "vision_tokenizer_name_or_path": str(toy / "vision_tokenizer"), "eval_steps": 2, "save_steps": 2,
        "sample_prompts": ["a"], "sample_settings": {"height": 16, "width": 16}, "logging_steps": 1,
        "model_name_or_path": str(toy / "transformer"), "eval_strategy": "steps", "dataloader_num_workers": 0,
        "pack_max_flops": None, "pack_max_length": None, "report_to": "none",
    }  # fmt: skip
    return ["transformer", name, *assignments(values)]


def assignments(values: dict) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]  # JSON is YAML


def parse(values: dict) -> tuple:
    return parse_recipe({"output_dir": "unused", **values}, train.GROUPS)


# --- recipes


PAPER = {  # table 2: learning rate, tokens in 1e12, level, millions of samples
    "alignment": (1e-3, 0.01, 256, {"image_to_text": 5, "text_to_image": 5}),
    "pretrain_256": (
        1e-4, 3.4, 256, {"text": 662, "text_to_image": 1891, "image_to_text": 520, "interleaved": 147}
    ),
    "pretrain_512": (1e-4, 1.8, 512, {"text": 700, "text_to_image": 345, "edit": 20, "interleaved": 5}),
    "pretrain_1024": (1e-4, 0.2, 1024, {"text": 47, "text_to_image": 10, "edit": 2, "interleaved": 0.5}),
    "continued_1024": (5e-5, 0.2, 1024, {"text": 47, "text_to_image": 9, "edit": 2}),
    "sft_1024": (1e-5, 0.02, 1024, {"text": 5, "text_to_image": 1, "edit": 0.1}),
}  # fmt: skip
SCALES = {256: 12, 512: 16, 1024: 18}
LONGEST = {256: 5, 512: 5, 1024: 3}  # images of a document (§5.4)


def document(task: str, level: int) -> tuple[int, float]:
    """Tokens and FLOPs of the mean document of a task, as benchmarks/packing.py assumes them."""
    images = {"text": 0, "edit": 2, "interleaved": LONGEST[level]}.get(task, 1)
    words = {"text": 357, "edit": 60, "interleaved": 400}.get(task, 120)
    return costs_of(words, images, level)


def costs_of(words: int, images: int, level: int) -> tuple[int, float]:
    grids = ScaleSchedule().grids((16, 16), SCALES[level])
    length = words + images * (sum(height * width for height, width in grids) + 1)
    return length, training_flops(NextFlowConfig(), length, [grids] * images)


@pytest.mark.parametrize("stage", PAPER)
def test_recipe_is_the_papers_row(stage):
    rate, tokens, level, samples = PAPER[stage]
    model, data, batch, args = parse({**load_recipe("transformer", stage), "use_cpu": True})
    assert args.learning_rate == rate and args.trainable == ("alignment" if stage == "alignment" else "all")
    assert model.config_overrides == {"scale_loss_alpha": 0.9 if level > 256 else 0.0}
    folders = {f"runs/7b/codes_{level}/{task}": weight for task, weight in samples.items()}
    assert dict(zip(data.train_codes, data.train_weights, strict=True)) == folders
    # 1,024 packs a step: the tokens are the paper's.
    documents = np.array([document(task, level) for task in samples])
    length, flops = np.array(list(samples.values())) @ documents
    assert args.max_steps * batch.global_batch_size * data.pack_max_flops * length / flops == pytest.approx(
        tokens * 1e12, rel=0.01
    )
    assert costs_of(2000, LONGEST[level], level)[1] <= data.pack_max_flops  # every document of the paper fits


def test_stages_start_from_one_another():
    stages = [load_recipe("transformer", stage) for stage in PAPER]
    for before, recipe in zip(stages, stages[1:]):
        assert recipe["model_name_or_path"] == before["output_dir"]


@pytest.mark.parametrize("name", shipped_recipes("transformer"))
def test_a_recipe_says_what_memory_it_takes(name):
    text = shipped_recipes("transformer")[name].read_text()
    size, gpus = re.search(r"# Memory: ([\d.]+) GB of each of (\d+) GPUs", text).groups()
    model, data, _, args = parse({**load_recipe("transformer", name), "use_cpu": True})
    config = memory.recipe_config(model)
    tokens = memory.micro_batch_tokens(config, data, args)
    estimate = memory.recipe_memory(config, model, args, tokens).sharded(int(gpus))
    assert estimate.total / 1e9 == pytest.approx(float(size), abs=0.06)
    assert estimate.fits(24 if "24gb" in name else 80)


def test_a_stage_before_its_predecessor_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    sources = {"model_name_or_path": "runs/7b/alignment", "processor_name_or_path": "here"}
    with pytest.raises(FileNotFoundError, match="model_name_or_path is 'runs/7b/alignment'.*the stage before"):
        load_model(ModelArguments(**sources))


@pytest.mark.parametrize("name", shipped_recipes("transformer"))
def test_a_recipe_runs(name, toy, tmp_path):
    recipe = load_recipe("transformer", name)
    # bitsandbytes' layers of four bits are too narrow in the toy for its own kernel of the CPU.
    evaluation = {"eval_strategy": "no", "eval_rows": 0, "sample_prompts": None} if recipe.get("use_peft") else {}
    assert cli.main(["train", *on_toys(toy, name, tmp_path), *assignments(evaluation)]) == 0
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert written["kind"] == "transformer" and written["model"] == str(toy / "transformer")
    assert written["recipe"]["learning_rate"] == recipe["learning_rate"] and written["recipe"]["max_steps"] == 2
    assert written["recipe"]["gradient_accumulation_steps"] == 1 and written["command"][:3] == [
        "nextflow-hf",
        "train",
        "transformer",
    ]
    assert Image.open(tmp_path / "loss.png").size == (960, 540)
    assert (tmp_path / "checkpoint-2").is_dir()
    if recipe.get("use_peft"):
        assert (tmp_path / "adapter_model.safetensors").exists()
    else:
        assert (tmp_path / "samples" / "step-0000002.png").exists()
        alpha = NextFlowForCausalLM.from_pretrained(tmp_path).config.scale_loss_alpha
        assert alpha == recipe["config_overrides"]["scale_loss_alpha"]


def test_list_says_what_recipes_need(capsys):
    assert cli.main(["train", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"{kind} {name}\n" in text for kind in KINDS for name in shipped_recipes(kind))
    entry = text.split("transformer sft_1024_24gb\n")[1].split("\ntransformer ")[0]
    assert "model_name_or_path=runs/7b/continued_1024" in entry and "Memory: 19.7 GB" in entry
    assert "train_codes=['runs/7b/codes_1024/text'" in entry
    assert cli.main(["train", "grpo", "--list"]) == 0
    assert "transformer" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_a_meaning(kind, capsys):
    module = importlib.import_module(f"nextflow_hf.training.{KINDS[kind][0]}")
    keys = [key for group in module.GROUPS for key in document_keys(group)]
    assert [key.name for key in keys if not key.meaning] == []
    assert len({key.name for key in keys}) == len(keys)  # a key is of one group
    assert cli.main(["train", kind, "--help"]) == 0
    assert f"\n  {keys[-1]}"[3:] in capsys.readouterr().out


def test_a_dry_run_says_what_would_be_and_writes_nothing(toy, tmp_path, capsys, monkeypatch):
    for module in (run, train):
        monkeypatch.setattr(module, "world_size", lambda: 4)
    values = {"pack_max_length": 100, "max_steps": 10, "global_batch_size": 64}
    assert cli.main(["train", *on_toys(toy, "sft_1024", tmp_path / "run"), *assignments(values), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text.split("\n\n")[0])["gradient_accumulation_steps"] == 8
    assert "batch   64 rows a step: 2 at once x 4 processes x 8 accumulated" in text and "steps   10" in text
    assert f"{toy / 'edit'}: 6 rows" in text and "200 in a micro-batch, 6,400 in a step, 6.4e+04 in all" in text
    assert "memory  0.0 GB" in text and not (tmp_path / "run").exists()
    assert cli.main(["train", "transformer", "sft_1024", "gradient_accumulation_steps=2", "--dry-run"]) == 0
    assert "8 rows a step: 1 at once x 4 processes x 2 accumulated; the recipe's global_batch_size is 1,024" in (
        capsys.readouterr().out
    )


def test_the_batch_is_one_of_all_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert run.accumulation_steps(1024, 4, "r") == 32
    for total in (12, 33):
        with pytest.raises(
            ValueError, match=r"r: global_batch_size is \d\d, expected a multiple of .* 4 x 8 processes = 32"
        ):
            run.accumulation_steps(total, 4, "r")
    with pytest.raises(ValueError, match="expected a multiple of per_device_train_batch_size 0"):
        run.accumulation_steps(32, 0, "r")


def test_what_a_machine_cannot_do_is_said(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    capability = "AVX512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    recipe = {"attn_implementation": "flex_attention", "use_liger_kernel": True, "bf16": True}
    said = run.fall_back(recipe)
    assert recipe == {"attn_implementation": "sdpa", "use_liger_kernel": False, "bf16": True, "use_cpu": True}
    assert len(said) == 3 and "'sdpa' instead of 'flex_attention'" in said[1]
    capability = "AVX2"
    assert run.fall_back(recipe) == ["this CPU has no instructions for bfloat16: bf16 is False instead of True"]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(processes, "is_torch_bf16_gpu_available", lambda: False)
    recipe = {"attn_implementation": "flex_attention", "bf16": True}
    assert run.fall_back(recipe) == ["this GPU has no instructions for bfloat16: bf16 is False instead of True"]
    assert recipe == {"attn_implementation": "flex_attention", "bf16": False}
    recipe = {"bf16": True}
    assert len(run.fall_back(recipe, ["bf16", "frozen_dtype"])) == 2
    assert recipe == {"bf16": False, "frozen_dtype": "float32"}  # else a LoRA would train in bfloat16


def test_fresh_begins_anew_and_deletes_nothing(toy, tmp_path, caplog, capsys):
    arguments = [*on_toys(toy, "sft_1024", tmp_path / "run"), "sample_prompts=null", "eval_strategy=no", "eval_rows=0"]
    assert cli.main(["train", *arguments]) == 0
    first = load_file(tmp_path / "run" / "model.safetensors")
    assert cli.main(["train", *arguments, "max_steps=3"]) == 0
    shutil.copytree(toy / "transformer", tmp_path / "other")
    assert cli.main(["train", *arguments, "max_steps=4", f"model_name_or_path={tmp_path / 'other'}"]) == 2
    assert f"from {toy / 'transformer'}, but the recipe is of kind transformer from" in capsys.readouterr().err
    assert cli.main(["train", *arguments, "max_steps=4", "learning_rate=0.5", "--resume"]) == 2
    assert "learning_rate is 0.5, but the checkpoints in" in capsys.readouterr().err
    assert "resuming from" in caplog.text and (tmp_path / "run" / "checkpoint-3").is_dir()
    assert cli.main(["train", *arguments, "--fresh"]) == 0
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    (old,) = tmp_path.glob("run.old-*")
    assert (old / "checkpoint-3").is_dir() and not (tmp_path / "run" / "checkpoint-3").exists()
    assert cli.main(["train", *arguments, "--resume", "max_steps=3"]) == 0


def test_overrides_are_yaml():
    recipe = {"learning_rate": "1e-4", "train_codes": ["a"], "model_name_or_path": "m", "use_cpu": True, "bf16": True}
    override(recipe, "config_overrides.scale_loss_alpha=5e-1")
    override(recipe, "train_codes=[b, c]")
    override(recipe, "max_steps=7")
    model, data, _, args = parse(recipe)
    assert (args.learning_rate, args.max_steps, args.bf16) == (1e-4, 7, True)
    assert data.train_codes == ["b", "c"] and model.config_overrides == {"scale_loss_alpha": 0.5}


BASE = {"train_codes": ["a"], "model_name_or_path": "m", "use_cpu": True}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rat": 1}, "learning_rate"),
        ({"train_codes": []}, "train_codes is empty"),
        ({"train_weights": [1, 2]}, "2 entries for 1 folders"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"load_in_4bit": True}, "need use_peft"),
        ({"load_in_4bit": True, "load_in_8bit": True, "use_peft": True}, "at most one"),
        ({"accelerator_config": {"split_batches": True}}, "batches cannot be cut"),
        ({"eval_codes": ["b"], "eval_rows": 3}, "pass one of the two"),
    ],
)
def test_bad_recipes_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        parse({**BASE, **keys})


def test_codes_of_two_tokenizers_are_refused(toy, tmp_path):
    pipe = toy_pipeline()
    with torch.no_grad():
        for parameter in pipe.vision_tokenizer.parameters():
            parameter += 1
    extract_toy_codes(tmp_path / "other", pipe.processor, pipe.vision_tokenizer, rows=2)
    with pytest.raises(ValueError, match="different vision tokenizers"):
        train.check_same_codes([str(toy / "text"), str(tmp_path / "other")])
    with pytest.raises(FileNotFoundError, match=f"no index.json in {tmp_path}: extract the codes first"):
        train.check_same_codes([str(toy / "text"), str(tmp_path)])


def test_weights_mix_the_folders(toy):
    one, two = str(toy / "text"), str(toy / "text_to_image")
    rows = train.load_rows([one, two], [1, 9], seed=0)
    images = np.mean([len(row["image_grids"]) > 0 for row in rows])
    assert len(rows) > 12 and images > 0.75
    assert len(train.load_rows([one, two])) == 12


@pytest.mark.parametrize("limits", [{"pack_max_length": 150}, {"pack_max_flops": 3e7}])
def test_packs_train_as_padded_rows_do(limits, toy, tmp_path):
    """One step of all rows at once, packed and padded: the same loss and the same weights after it."""
    results = []
    for name, keys in (("padded", {}), ("packed", limits)):
        output_dir = tmp_path / name
        keys = {**keys, "max_steps": 1, "bf16": False, "eval_strategy": "no", "eval_rows": 0, "sample_prompts": None}
        keys |= {"per_device_train_batch_size": 64, "train_weights": None, "save_strategy": "no"}
        keys |= {"optim": "sgd", "learning_rate": 0.1}  # AdamW's first step makes signs of gradients that are noise
        keys |= {"global_batch_size": 64}
        assert cli.main(["train", *on_toys(toy, "pretrain_512", output_dir), *assignments(keys)]) == 0
        state = json.loads((output_dir / "trainer_state.json").read_text())
        results.append((state["log_history"][0], load_file(output_dir / "model.safetensors")))
    (padded, padded_weights), (packed, packed_weights) = results
    assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
    assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)
    for name, weight in padded_weights.items():
        torch.testing.assert_close(packed_weights[name], weight, atol=1e-6, rtol=1e-4)


def test_what_padding_costs_is_said(toy, caplog):
    rows = train.load_rows([toy / "text", toy / "interleaved"])
    args = parse({**BASE, "per_device_train_batch_size": 6})[-1]
    train.report_padding(rows, toy_config(), args)
    lengths = np.array([rows[index]["length"] for index in np.random.default_rng(args.seed).permutation(12)])
    batches = lengths.reshape(2, 6)
    share = 1 - lengths.sum() / (batches.max(axis=1).sum() * 6)
    assert f"in batches of 6 rows in random order, {share:.1%} of the tokens are padding" in caplog.text
    caplog.clear()
    train.report_padding(rows, toy_config(), replace(args, train_sampling_strategy="group_by_length"))
    assert not caplog.text


def test_what_padding_costs_by_length_is_said(toy, caplog, monkeypatch):
    monkeypatch.setattr(train, "SAMPLED_ROWS", 4)  # fewer than a step has
    rows = train.load_rows([toy / "text", toy / "interleaved"])
    shares = []
    for steps, batch_size in ((1, 12), (12, 1)):
        caplog.clear()
        keys = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps}
        args = parse({**BASE, **keys, "train_sampling_strategy": "batch_rebalance"})[-1]
        train.report_padding(rows, toy_config(), args)
        said = f"in steps of {steps} batches of about {batch_size} rows by length, "
        assert said in caplog.text and "more gradient_accumulation_steps" in caplog.text
        shares.append(float(caplog.text.split(said)[1].split("%")[0]))
    lengths = np.array(rows["length"])
    assert shares[0] == pytest.approx(100 - 100 * lengths.mean() / lengths.max(), abs=0.06) and shares[1] == 0


def test_packs_that_cannot_be(toy, tmp_path, caplog):
    arguments = on_toys(toy, "pretrain_512", tmp_path)
    with pytest.raises(ValueError, match='fit into no pack.*on_long_row="skip"'):
        cli.main(["train", *arguments, "pack_max_length=50", "--debug"])
    assert cli.main(["train", *arguments, "pack_max_length=50", "on_long_row=skip"]) == 0
    assert "rows fit into no pack and are left out: ['" in caplog.text
    for strategy in ("group_by_length", "batch_rebalance"):
        arguments = on_toys(toy, "pretrain_512", tmp_path / strategy)
        grouped = ["pack_max_length=500", f"train_sampling_strategy={strategy}", "--debug"]
        with pytest.raises(ValueError, match=f"'{strategy}', but packs have no length"):
            cli.main(["train", *arguments, *grouped])


def train_blocks(output_dir: Path, toy: Path, checkpoint: str | None = None, **changes) -> list[float]:
    return train_stream(output_dir, toy, checkpoint, **{"streaming": False, "pack_window": 3, **changes})


def test_packs_planned_block_by_block_go_on_and_are_the_same_for_two_processes(toy, tmp_path, monkeypatch):
    for module in (train, packing):
        monkeypatch.setattr(module, "WINDOWS_AT_ONCE", 1)  # blocks of three rows
    losses = train_blocks(tmp_path / "whole", toy)
    assert len(losses) == 4 and len(set(losses)) == 4 and (tmp_path / "whole" / "packs.json").is_file()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    for output_dir in (tmp_path / "whole", tmp_path / "on"):  # with the counts of the blocks behind it, and without
        assert train_blocks(output_dir, toy, checkpoint) == losses
    whole, resumed = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "on"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    options = {"max_steps": 3, "save_strategy": "no", "per_device_train_batch_size": 2}
    one = train_blocks(tmp_path / "one", toy, **options)
    options["per_device_train_batch_size"] = 1
    two, other = in_processes(lambda: train_blocks(tmp_path / "two", toy, **options))
    assert two == other == pytest.approx(one, rel=1e-5)


# --- streams


def stream_values(toy: Path) -> dict:
    """Nothing evaluated, packs of a few rows, few rows at a time."""
    folders = [str(toy / task) for task in ("text_to_image", "text")]
    return {
        "model_name_or_path": str(toy / "transformer"), "train_codes": folders, "train_weights": [2, 1],
        "streaming": True, "pack_max_length": 150, "pack_window": 5, "shuffle_buffer": 4, "use_cpu": True,
        "max_steps": 4, "optim": "sgd", "learning_rate": 0.1, "logging_steps": 1, "save_steps": 2, "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip


def train_stream(output_dir: Path, toy: Path, checkpoint: str | None = None, **changes) -> list[float]:
    values = {**stream_values(toy), "output_dir": str(output_dir), **changes}
    trainer = train.train(*parse(values), checkpoint=checkpoint)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("packed", [True, False])
def test_a_stream_trains_goes_on_and_does_not_end(packed, toy, tmp_path):
    changes = {} if packed else {"pack_max_length": None, "per_device_train_batch_size": 4}
    losses = train_stream(tmp_path / "whole", toy, **changes)
    # Twelve rows make fewer than four steps: the stream begins again, in another order.
    assert len(losses) == 4 and len(set(losses)) == 4
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    assert train_stream(tmp_path / "on", toy, checkpoint, **changes) == losses
    whole, resumed = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "on"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_stream_is_the_same_for_two_processes(toy, tmp_path):
    options = {"max_steps": 3, "save_strategy": "no"}
    losses = train_stream(tmp_path / "one", toy, per_device_train_batch_size=2, **options)
    two, other = in_processes(lambda: train_stream(tmp_path / "two", toy, per_device_train_batch_size=1, **options))
    assert two == other == pytest.approx(losses, rel=1e-5)
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=2e-6, rtol=1e-4)


def test_a_stream_has_the_rows_and_the_shares_of_a_mixture(toy):
    folders = [toy / "text_to_image", toy / "text"]
    by_number = sorted(str(row["input_ids"].tolist()) for row in train.load_rows(folders))

    def ids(stream: RowStream, count: int) -> list[str]:
        return [str(row["input_ids"].tolist()) for row in itertools.islice(stream, count)]

    plain = ids(RowStream(folders, shuffle_buffer=1), 24)
    assert sorted(plain[:12]) == sorted(plain[12:]) == by_number  # every row once, and again
    shuffled = ids(RowStream(folders, shuffle_buffer=3), 24)
    assert shuffled != plain and shuffled == ids(RowStream(folders, shuffle_buffer=3), 24)
    assert shuffled != ids(RowStream(folders, shuffle_buffer=3, seed=1), 24)
    rows = itertools.islice(RowStream(folders, [9, 1], shuffle_buffer=3), 200)
    assert np.mean([len(row["image_grids"]) > 0 for row in rows]) == pytest.approx(0.9, abs=0.07)
    with pytest.raises(ValueError, match="expected those of 0123"):
        RowStream(folders, vision_tokenizer="0123")


@pytest.mark.parametrize("workers", [2, 3])  # as many files as workers, and fewer
def test_workers_share_a_stream(workers, toy):
    folders = [toy / "text_to_image", toy / "text"]
    loader = DataLoader(RowStream(folders, shuffle_buffer=1), batch_size=None, num_workers=workers)
    rows = [str(row["input_ids"].tolist()) for row in itertools.islice(loader, 12)]
    assert sorted(rows) == sorted(str(row["input_ids"].tolist()) for row in train.load_rows(folders))


def test_rows_that_fit_into_no_pack_end_a_training_before_it_begins(toy, tmp_path, monkeypatch):
    long = {"pack_max_length": 8, "on_long_row": "skip"}
    with pytest.raises(ValueError, match="no row fits into a pack of max_length=8, max_flops=None"):
        train_stream(tmp_path, toy, **long)
    with pytest.raises(ValueError, match="there is no pack: no row fits into one"):
        train_stream(tmp_path, toy, streaming=False, **long)
    monkeypatch.setattr(train, "WINDOWS_AT_ONCE", 0)  # block by block
    with pytest.raises(ValueError, match="there is no pack: no row fits into one"):
        train_stream(tmp_path, toy, streaming=False, **long)


@pytest.mark.parametrize("workers", [2, 7])
def test_every_worker_comes_to_every_row_of_one_file(workers, toy, monkeypatch):
    worker = SimpleNamespace(id=workers - 1, num_workers=workers)
    monkeypatch.setattr("nextflow_hf.training.data.streaming.get_worker_info", lambda: worker)
    rows = itertools.islice(RowStream([toy / "text"], shuffle_buffer=1), 6)
    assert len({row["row_id"] for row in rows}) == 6


def test_streams_that_cannot_be(toy, tmp_path):
    values = stream_values(toy)
    with pytest.raises(ValueError, match="a stream has no last rows: name eval_codes"):
        parse({**values, "eval_rows": 2})
    with pytest.raises(ValueError, match="a stream has no end"):
        train_stream(tmp_path, toy, max_steps=-1)


def test_rows_to_evaluate_on_are_clean(toy, tmp_path, caplog):
    pipe = toy_pipeline()
    options = {"text_drop_rate": 0.5, "self_correction_samples": 0.3}
    mixed = extract_toy_codes(tmp_path / "mixed", pipe.processor, pipe.vision_tokenizer, rows=30, **options)
    corrected = extract_toy_codes(tmp_path / "corrected", pipe.processor, pipe.vision_tokenizer, task="edit", rows=6)
    rows = train.load_rows([mixed])
    is_clean = list(rows["is_clean"])
    assert 5 < sum(is_clean) < 25
    for row in rows:
        equal = row["image_codes"].tolist() == row["image_target_codes"].tolist()
        assert equal or not row["is_clean"]
    (training,), evaluation = train.load_sources(DataArguments(train_codes=[str(mixed)], eval_rows=4), 0)
    first = np.flatnonzero(is_clean)[-4]
    assert list(training["row_id"]) == [str(number) for number in range(first)]
    assert list(evaluation["row_id"]) == [str(number) for number in np.flatnonzero(is_clean)[-4:]]
    with pytest.raises(ValueError, match="has 0 rows of 6 without dropout and self-correction, .* purpose=evaluation"):
        train.load_sources(DataArguments(train_codes=[str(corrected)], eval_rows=4), 0)
    for folder, warned in ((toy / "edit", False), (corrected, True)):
        caplog.clear()
        train.load_sources(DataArguments(train_codes=[str(mixed)], eval_codes=[str(folder)]), 0)
        assert ("6 of 6 rows of eval_codes were extracted with prompt dropout" in caplog.text) == warned


# --- launchers


no_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.parametrize(
    "config",
    ["ddp", "fsdp2", *(pytest.param(f"deepspeed_zero{stage}", marks=no_deepspeed) for stage in (2, 3))],
)
def test_accelerate_launch(config, toy, tmp_path):
    on_cpu = [str(Path(__file__).with_name("fsdp_on_cpu.py"))]
    script = on_cpu if config == "fsdp2" else ["-m", "nextflow_hf.cli"]
    recipe_file = str(tmp_path / "recipe.yaml")
    arguments = [
        "train",
        "transformer",
        recipe_file,
        f"output_dir={tmp_path / 'two'}",
        "per_device_train_batch_size=1",
    ]
    recipe = {
        "model_name_or_path": str(toy / "transformer"), "train_codes": [str(toy / "edit"), str(toy / "text")],
        "output_dir": str(tmp_path / "one"), "max_steps": 2, "per_device_train_batch_size": 2, "optim": "sgd",
        "global_batch_size": 2,
        "learning_rate": 0.1, "seed": 3, "train_sampling_strategy": "sequential", "report_to": "none",
        "disable_tqdm": True, "logging_steps": 1, "gradient_checkpointing": True,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    configuration = RECIPES / "accelerate" / f"{config}.yaml"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration),
        "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", *script, *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert cli.main(["train", "transformer", recipe_file]) == 0
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    start = load_file(toy / "transformer" / "model.safetensors")
    assert one.keys() == two.keys()
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-2
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("config", ["deepspeed_zero2", "deepspeed_zero3", "ddp", "fsdp2"])
def test_accelerate_reads_the_configs(config):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(RECIPES / "accelerate" / f"{config}.yaml"))
    assert loaded.num_processes == 8 and loaded.mixed_precision == "bf16"


@pytest.mark.parametrize("changes", [{"trainable": "alignment"}, {"use_peft": True, "lora_train_image_parts": True}])
def test_zero3_trains_no_rows_of_the_head(changes, monkeypatch):
    monkeypatch.setattr(train, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 shards the head, .*: use deepspeed_zero2.yaml"):
        train.train(*parse({**BASE, **changes}))


# --- what a stage trains


def train_toys(output_dir: Path, trainer_class=NextFlowTrainer, *, trainable="alignment", **arguments) -> None:
    values = {
        "output_dir": str(output_dir), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 3,
        "learning_rate": 1e-2, "weight_decay": 0.5, "per_device_train_batch_size": 2, "save_steps": 1,
        "lr_scheduler_type": "constant", "trainable": trainable,
    }  # fmt: skip
    args = NextFlowTrainingArguments(**{**values, **arguments})
    model = toy_model()
    set_trainable(model, args.trainable)
    trainer = trainer_class(model, args, train_dataset=toy_rows(8))
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    trainer.save_model(str(output_dir))


def check_alignment(folder: Path) -> dict[str, torch.Tensor]:
    trained = load_file(folder / "model.safetensors")
    start = toy_model().state_dict()
    assert trained.keys() == start.keys()
    for name, weight in start.items():
        changed = (trained[name] != weight).reshape(len(weight), -1).any(1)
        if name == "lm_head.weight":
            rows = toy_config().image_vocabulary
            assert changed[rows].all() and changed.sum() == rows.stop - rows.start
        else:
            assert changed.any() == name.startswith("model.connector."), name
    return trained


def test_alignment_changes_connector_and_image_rows_bit_by_bit_nothing_else(tmp_path):
    train_toys(tmp_path / "whole")
    whole = check_alignment(tmp_path / "whole")
    check_alignment(tmp_path / "whole" / "checkpoint-1")
    train_toys(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    resumed = load_file(tmp_path / "resumed" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_alignment_is_adamw_of_these_rows_alone(tmp_path):
    """Against AdamW on a copy of the rows: decay, moments and clipping see no other."""
    train_toys(tmp_path, max_steps=1, max_grad_norm=0.1, train_sampling_strategy="sequential")
    trained = load_file(tmp_path / "model.safetensors")
    model, rows = toy_model().train(), toy_config().image_vocabulary
    trainer = NextFlowTrainer(
        model, NextFlowTrainingArguments(output_dir=str(tmp_path / "x"), use_cpu=True, report_to="none")
    )
    model(**{k: v for k, v in trainer.data_collator(toy_rows(2)).items() if k != "row_ids"}).loss.backward()
    head = model.lm_head.weight[rows].detach().clone().requires_grad_()
    head.grad = model.lm_head.weight.grad[rows].clone()
    connector = list(model.model.connector.parameters())
    torch.nn.utils.clip_grad_norm_([head, *connector], 0.1)
    decayed = [head, *(parameter for parameter in connector if parameter.ndim > 1)]
    plain = [parameter for parameter in connector if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": plain, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-2).step()
    torch.testing.assert_close(trained["lm_head.weight"][rows], head.detach(), atol=1e-5, rtol=1e-4)
    weight = model.model.connector.linear_2.weight.detach()
    torch.testing.assert_close(trained["model.connector.linear_2.weight"], weight, atol=1e-5, rtol=1e-4)


def test_alignment_under_fsdp2(tmp_path):
    in_processes(lambda: train_toys(tmp_path, CpuFsdpTrainer, per_device_train_batch_size=1), **FSDP2)
    check_alignment(tmp_path)


def test_alignment_needs_a_head_of_its_own():
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        set_trainable(toy_model(tie_word_embeddings=True), "alignment")
    with pytest.raises(ValueError, match="expected one of"):
        set_trainable(toy_model(), "head")


@pytest.mark.parametrize(
    "flags",
    [{}, {"lora_train_image_parts": True}, {"load_in_4bit": True, "dtype": "bfloat16"}],
    ids=["lora", "lora and image parts", "qlora"],
)
def test_one_flag_trains_an_adapter(flags, toy, tmp_path):
    values = {"use_peft": True, "eval_strategy": "no", "eval_rows": 0, "sample_prompts": None, "bf16": False, **flags}
    assert cli.main(["train", *on_toys(toy, "sft_1024", tmp_path), *assignments(values)]) == 0
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any("lora_B" in name and weight.abs().max() > 0 for name, weight in saved.items())
    assert any("connector" in name for name in saved) == bool(flags.get("lora_train_image_parts"))
    assert not (tmp_path / "model.safetensors").exists()


def test_an_adapter_is_a_start_as_a_model_is(toy, tmp_path):
    """The next stage goes on with it, or with all the weights that it is merged into."""
    values = {
        **stream_values(toy), "streaming": False, "pack_max_length": None, "max_steps": 2, "use_peft": True,
        "lora_dropout": 0.0, "save_strategy": "no",
    }  # fmt: skip
    first = train.train(*parse({**values, "output_dir": str(tmp_path / "first")})).model
    values |= {"model_name_or_path": str(tmp_path / "first"), "output_dir": str(tmp_path / "second")}
    model_args = parse(values)[0]
    batch = NextFlowTrainer(first, parse(values)[-1]).data_collator(toy_code_rows(toy))
    batch = {name: value for name, value in batch.items() if name != "row_ids"}
    expected = first.eval()(**batch).loss
    again = load_model(model_args)
    torch.testing.assert_close(again.eval()(**batch).loss, expected)
    trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in first.named_parameters() if parameter.requires_grad}
    model_args.use_peft = False
    merged = load_model(model_args)
    torch.testing.assert_close(merged.eval()(**batch).loss, expected, atol=1e-5, rtol=1e-5)
    assert type(merged) is NextFlowForCausalLM and all(p.requires_grad for p in merged.parameters())
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    train.train(*parse({**values, "use_peft": False}))
    assert (tmp_path / "second" / "model.safetensors").exists()
    with pytest.raises(ValueError, match=r"is an adapter with \{'lora_r': 16\}, expected \{'lora_r': 8\}"):
        load_model(parse({**values, "lora_r": 8})[0])
    other = {"lora_dropout": 0.1, "lora_train_image_parts": True, "lora_target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match=r"'lora_dropout': 0\.0, 'lora_train_image_parts': False, 'lora_target_m"):
        load_model(parse({**values, **other})[0])
    with pytest.raises(ValueError, match="eval_strategy is 'steps', which needs eval_codes or eval_rows"):
        refused = {"eval_strategy": "steps", "output_dir": str(tmp_path / "third")}
        train.train(*parse({**values, **refused}))
    with pytest.raises(ValueError, match="use_muon is for the decoder's matrices"):
        refused = {"use_muon": True, "optim": "adamw_torch", "output_dir": str(tmp_path / "third")}
        train.train(*parse({**values, **refused}))


def toy_code_rows(toy: Path) -> list[dict]:
    return [train.load_rows([toy / "edit"])[index] for index in range(4)]


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_an_adapter_costs_no_float32_copy_of_its_base(bits, toy):
    flags = {} if bits is None else {f"load_in_{bits}bit": True}
    recipe = {"model_name_or_path": str(toy / "transformer"), "train_codes": ["a"], "use_cpu": True, "use_peft": True}
    model_args, _, _, args = parse({**recipe, "bf16": True, "lora_train_image_parts": True, **flags})
    model = load_model(model_args, in_bfloat16=args.bf16)
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert frozen <= {torch.bfloat16, torch.uint8, torch.int8} and torch.bfloat16 in frozen
    assert set(trained.values()) == {torch.float32}, trained
    model_args.use_peft = False
    if bits is None:
        assert {parameter.dtype for parameter in load_model(model_args, in_bfloat16=True).parameters()} == {
            torch.float32
        }


# --- samples


def sampling_trainer(output_dir: Path, pipe, **arguments) -> NextFlowTrainer:
    codes = extract_toy_codes(output_dir / "codes", pipe.processor, pipe.vision_tokenizer, rows=8)
    args = NextFlowTrainingArguments(
        output_dir=str(output_dir), use_cpu=True, disable_tqdm=True, max_steps=4, eval_strategy="steps", eval_steps=2,
        save_strategy="no", logging_steps=1, learning_rate=0.03, **{"report_to": "none", **arguments},
    )  # fmt: skip
    rows = train.load_rows([str(codes)])
    return NextFlowTrainer(pipe.transformer, args, train_dataset=rows, eval_dataset=rows)


def callback(trainer, pipe) -> SampleImagesCallback:
    return SampleImagesCallback(trainer, pipe.vision_tokenizer, pipe.processor, prompts=["a", "b"], seed=5)


def test_samples_are_the_pipelines_and_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    pipe = toy_pipeline()
    trainer = sampling_trainer(tmp_path / "with", pipe, report_to="tensorboard")
    trainer.add_callback(callback(trainer, pipe))
    trainer.train()
    plain = sampling_trainer(tmp_path / "without", toy_pipeline())
    plain.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (trainer, plain)]
    assert losses[0] == losses[1]
    files = sorted((tmp_path / "with" / "samples").iterdir())
    assert [file.name for file in files] == ["step-0000002.png", "step-0000004.png"]
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = pipe(["a", "b"], generator=generators).images  # the model is the trained one
    drawn = np.asarray(Image.open(files[1]))
    np.testing.assert_array_equal(drawn, np.concatenate([np.asarray(image) for image in expected], axis=1))
    assert (np.asarray(Image.open(files[0])) != drawn).any()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert {"samples/0: a", "samples/1: b"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Images("samples/0: a")] == [2, 4]
    assert "eval/loss_scale_2" in events.Tags()["scalars"]


class StubTracker:
    """The part of wandb's and of trackio's public interface that is used."""

    def __init__(self):
        self.logged = []

    def log(self, values: dict) -> None:
        self.logged.append(values)

    @staticmethod
    def Image(value, caption=None):
        return (value.size, caption)


@pytest.mark.parametrize(("name", "kind"), [("wandb", WandbCallback), ("trackio", TrackioCallback)])
def test_samples_go_to_trackers(name, kind, tmp_path, monkeypatch):
    tracker = StubTracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    pipe = toy_pipeline()
    trainer = sampling_trainer(tmp_path, pipe)
    integration = kind.__new__(kind)  # its constructor wants the library
    trainer.callback_handler.callbacks.append(integration)
    callback(trainer, pipe).on_evaluate(trainer.args, trainer.state, trainer.control)
    picture = ((16, 16), "a"), ((16, 16), "b")
    assert tracker.logged == [{"samples/0": picture[0], "samples/1": picture[1], "train/global_step": 0}]


def test_samples_under_fsdp2(tmp_path):
    def work() -> None:
        pipe = toy_pipeline()
        output_dir = tmp_path / "run"
        args = NextFlowTrainingArguments(
            output_dir=str(output_dir), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1,
            eval_strategy="steps", eval_steps=1, save_strategy="no", per_device_train_batch_size=1,
        )  # fmt: skip
        rows = train.load_rows([str(tmp_path / "codes")])
        trainer = CpuFsdpTrainer(pipe.transformer, args, train_dataset=rows, eval_dataset=rows)
        trainer.add_callback(callback(trainer, pipe))
        trainer.train()
        trainer.save_model(str(output_dir))

    pipe = toy_pipeline()
    extract_toy_codes(tmp_path / "codes", pipe.processor, pipe.vision_tokenizer, rows=4)
    in_processes(work, **FSDP2)
    pipe.transformer = NextFlowForCausalLM.from_pretrained(tmp_path / "run")
    pipe.register_modules(transformer=pipe.transformer.eval())
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = pipe(["a", "b"], generator=generators).images
    drawn = np.asarray(Image.open(tmp_path / "run" / "samples" / "step-0000001.png"))
    np.testing.assert_array_equal(drawn, np.concatenate([np.asarray(image) for image in expected], axis=1))


def test_no_prompts_and_no_parts(tmp_path):
    pipe = toy_pipeline()
    with pytest.raises(ValueError, match="prompts is empty"):
        callbacks.SampleImagesCallback(None, pipe.vision_tokenizer, pipe.processor, prompts=[])
    parts = {"vision_tokenizer": pipe.vision_tokenizer, "processor": pipe.processor}
    with pytest.raises(ValueError, match="sample_settings: got an unexpected keyword argument 'guidance'"):
        callbacks.SampleImagesCallback(None, **parts, prompts=["a"], settings={"guidance": 3})
    *_, args = parse({**BASE, "sample_prompts": ["a"]})
    model_args = parse(BASE)[0]
    with pytest.raises(ValueError, match="they make images of codes"):
        train.sampling_callback(None, model_args, args)


def test_a_source_of_weight_0_is_not_read():
    first, second = (datasets.Dataset.from_dict({"row": [*range(start, start + 3)]}) for start in (0, 10))
    assert sorted(train.mix_rows([first, second], [2.0, 0.0])["row"]) == [0, 1, 2]
    assert {*train.mix_rows([first, second], [1.0, 1.0])["row"]} == {0, 1, 2, 10, 11, 12}


def test_a_head_that_is_untied_begins_as_the_embedding_and_one_of_its_own_is_not_tied(tmp_path):
    for tied in (False, True):
        toy_model(tie_word_embeddings=tied).save_pretrained(tmp_path / str(tied))

    def load(folder: str, tie: bool) -> NextFlowForCausalLM:
        overrides = {"tie_word_embeddings": tie}
        return load_model(ModelArguments(model_name_or_path=str(tmp_path / folder), config_overrides=overrides))

    with pytest.raises(ValueError, match="the head of .*False has weights of its own: leave it out"):
        load("False", True)
    untied = load("True", False)
    head, embedding = untied.lm_head.weight, untied.model.embed_tokens.weight
    assert head is not embedding and torch.equal(head, embedding)
    with torch.no_grad():
        head.add_(1)
    untied.save_pretrained(tmp_path / "trained")
    again = load("trained", False)
    assert torch.equal(again.lm_head.weight, head) and torch.equal(again.model.embed_tokens.weight, embedding)


def test_overrides_change_the_config_and_leave_the_generation_config_alone(tmp_path):
    toy_model().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    overrides = {"scale_loss_alpha": 0.25, "initializer_range": 0.5}
    model = load_model(ModelArguments(model_name_or_path=str(tmp_path), config_overrides=overrides))
    assert (model.config.scale_loss_alpha, model.config.initializer_range) == (0.25, 0.5)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == saved
