"""Recipe to pipeline by the command, and the trainer on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowPipeline
from nextflow_hf.modeling_nextflow.sampling_nextflow import scale_plan
from nextflow_hf.training.grpo import train as grpo
from nextflow_hf.training.grpo.config import NextFlowGRPOConfig
from nextflow_hf.training.rewards import OCRWord
from nextflow_hf.training.transformer.memory import load_config, sampling_bytes, training_memory


RECIPE = {
    "data": {"shapes": {"num_rows": 8, "edit_fraction": 0.5, "size": 16}},
    "rewards": [{"name": "shapes_checks", "weight": 0.5}, {"name": "clean_shapes"}],
    "training": {
        "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_generations": 4,
        "prefix_scales": 2, "mask_propagation": True, "use_cpu": True, "bf16": False, "save_steps": 1,
        "disable_tqdm": True, "logging_steps": 1,
    },
    "peft": {"r": 2, "target_modules": ["q_proj"]},
}  # fmt: skip


def test_command_trains_resumes_and_saves_a_pipeline(tmp_path):
    toy_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(RECIPE))
    command = ["--model", str(tmp_path / "model"), "--output-dir", str(tmp_path / "run")]
    command += ["--recipe", str(tmp_path / "toy.yaml"), "--set"]
    grpo.main([*command, "learning_rate=0.1", "max_steps=1"])
    grpo.main([*command, "learning_rate=0.1"])  # goes on with the second step
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "reward" in entry] == [1, 2]
    trained = NextFlowPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    trained.set_progress_bar_config(disable=True)
    assert trained("a red circle").images[0].size == (16, 16)
    names = {name for name, _ in trained.transformer.named_parameters()}
    assert names == {name for name, _ in toy_pipeline().transformer.named_parameters()}  # adapters are merged


def test_recipes_and_their_names(tmp_path):
    recipe = grpo.load_recipe("shapes_grpo")
    NextFlowGRPOConfig(str(tmp_path), use_cpu=True, **recipe["training"])
    for entry in recipe["rewards"]:
        assert callable(grpo.make_reward(entry["name"]))
    assert grpo.make_reward("clip", model_id="a/b", scaled=True).model_id == "a/b"
    with pytest.raises(FileNotFoundError, match="'nothing'.*shapes_grpo"):
        grpo.load_recipe("nothing")
    with pytest.raises(ValueError, match="'beauty'.*shapes_judge"):
        grpo.make_reward("beauty")
    with pytest.raises(ValueError, match="no options, got \\['strict'\\]"):
        grpo.make_reward("shapes_judge", strict=True)


class Reads:
    """An engine that reads "a" in one half of each image, which half depends on the image."""

    def __call__(self, image):
        is_left = np.asarray(image)[0, 0, 0] % 2
        return [OCRWord("a", 0.5, (0, 0, image.width / 2 if is_left else image.width, image.height))]


def test_the_papers_recipe_runs(tmp_path, monkeypatch):
    """On the toy: four scales in the place of eighteen, of which two are the prefix."""
    recipe = grpo.load_recipe("grpo_1024")
    numbers = recipe["training"]
    assert numbers["per_device_train_batch_size"] * 8 * numbers["gradient_accumulation_steps"] == 16 * 16
    config = NextFlowGRPOConfig(str(tmp_path), **{**numbers, "bf16": False, "use_cpu": True})
    # Printed in the paper; the rest are the defaults of the class.
    assert (config.num_generations, config.top_k, config.top_p, config.guidance_scale) == (16, 2, 0.9, 6)
    default = NextFlowGRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    for name in ("guidance_scale", "top_k", "top_p", "learning_rate", "adam_beta2", "weight_decay", "num_generations"):
        assert getattr(default, name) == getattr(config, name), name

    monkeypatch.setattr("nextflow_hf.training.rewards.ocr.RapidOCREngine", Reads)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "text": "a"}) + "\n" for p in "abcd"))
    recipe["data"]["data_files"] = str(tmp_path / "prompts.jsonl")
    toy_pipeline().save_pretrained(tmp_path / "model")
    overrides = {
        "max_steps": 4,
        "gradient_accumulation_steps": 4,
        "resolution": 16,
        "prefix_scales": 2,
        "use_cpu": True,
    }
    config = grpo.make_config(recipe, tmp_path, **overrides, bf16=False, report_to="none")
    trainer = grpo.make_trainer(tmp_path / "model", recipe, config)
    plan = scale_plan([(1, 1), (2, 2), (4, 4)], guidance_scale=config.guidance_scale, guidance_schedule="linear")
    assert [step.guidance_scale - 1 for step in plan] == [0, 2.5, 5]  # VAR: cfg * k / (K - 1)
    trainer.train()
    assert [entry["trains_suffix"] for entry in trainer.state.log_history if "reward" in entry] == [0, 0, 0, 1]


def test_the_papers_recipe_says_what_memory_it_takes():
    text = " ".join((grpo.RECIPES / "grpo_1024.yaml").read_text().replace("#", " ").split())
    config = load_config("7b")
    update = training_memory(config, dtype="float32", tokens=4096, loss_chunk_size=4096)
    grids = [(side, side) for side in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)]
    share = (4 * update.parameters + update.gradients + update.optimizer) / 8
    reference, whole = 4 * update.parameters / 8, 2 * 2 * 2 * config.vocab_size * config.hidden_size
    working, sampling = update.checkpoints + max(update.layer, update.logits), sampling_bytes(config, 8, grids)
    for name, size in (
        ("a share of 1/8,", share), ("the reference", reference), ("and their gradients,", whole),
        ("an update of 4,096 tokens", working), ("at a time with guidance", sampling),
    ):  # fmt: skip
        assert f"{name} {size / 1e9:.1f} GB" in text, (name, size / 1e9)
    assert f"The largest sum is {(share + reference + whole + max(working, sampling)) / 1e9:.0f} GB" in text


WORKER = """
import sys, json, pathlib, torch
sys.path.insert(0, {tests!r})
from test_grpo_trainer import Recording, history, low_codes, make_trainer

def reward(codes, **columns):
    return low_codes(codes)

trainer = make_trainer(
    sys.argv[1], reward, max_steps=2, per_device_train_batch_size=2, num_generations=4, vmr_num_suffixes=2,
    prefix_updates_per_suffix=1, gradient_checkpointing=True, beta=0.1, trainer_class=Recording,
    log_completions=True, num_completions_to_print=0,
)
trainer.train()
batches = [batch for batch, _ in trainer.generated]
suffix_inputs = [codes.tolist() for codes in batches[1]["image_codes"]]
rank = trainer.accelerator.process_index
pathlib.Path(sys.argv[1], f"result-{{rank}}.json").write_text(json.dumps({{
    "world": trainer.accelerator.num_processes,
    "rewards": history(trainer, "reward") if trainer.is_world_process_zero() else None,
    "advantages": [batch["advantages"].tolist() for batch in batches],
    "prefixes": [codes[:5] for codes in suffix_inputs],
    "parameters": sum(p.double().abs().sum().item() for p in trainer.pipeline.transformer.parameters()),
}}))
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_share_groups_and_agree(tmp_path):
    """Each process has half of the one group of four: baseline, shared prefix and update are those of the group."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(tests=str(Path(__file__).parent)))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no"]
    launcher += ["--config_file", str(grpo.RECIPES / "accelerate" / "ddp.yaml"), "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(
        [*launcher, str(worker), str(tmp_path / "run")], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    first, second = (json.loads((tmp_path / "run" / f"result-{rank}.json").read_text()) for rank in range(2))
    assert first["world"] == second["world"] == 2
    assert first["parameters"] == second["parameters"]
    for mine, theirs in zip(first["advantages"], second["advantages"]):
        group = torch.tensor(mine + theirs)
        assert group.sum().item() == pytest.approx(0, abs=1e-5) and group.std().item() == pytest.approx(1, abs=1e-2)
    assert first["prefixes"][0] == first["prefixes"][1] == second["prefixes"][0] == second["prefixes"][1]
    assert len(first["rewards"]) == 2
