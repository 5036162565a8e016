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
from datasets import Dataset
from PIL import Image
from toy_commands import brightness
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowConfig, NextFlowPipeline, cli
from nextflow_hf.modeling_nextflow.sampling_nextflow import scale_plan
from nextflow_hf.training.common.import_path import import_object
from nextflow_hf.training.common.recipe import RECIPES, load_recipe
from nextflow_hf.training.common.run import resolve
from nextflow_hf.training.grpo import train as grpo
from nextflow_hf.training.grpo.config import NextFlowGRPOConfig
from nextflow_hf.training.rewards import OCRWord
from nextflow_hf.training.transformer.memory import training_memory


RECIPE = {
    "rewards": ["toy_commands:brightness", "test_grpo_script:Redness"], "reward_weights": [0.5, 1.0],
    "reward_options": {"test_grpo_script:Redness": {"scale": 2.0}}, "use_peft": True, "lora_r": 2,
    "lora_target_modules": ["q_proj"], "max_steps": 2, "per_device_train_batch_size": 4, "global_batch_size": 4,
    "num_generations": 4, "prefix_scales": 2, "use_cpu": True, "bf16": False, "save_steps": 1,
    "disable_tqdm": True, "logging_steps": 1,
}  # fmt: skip


class Redness:
    """A reward with options; those of the data set's columns come by name."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, images, wanted, **columns) -> list[float]:
        assert set(wanted) <= {"red", "blue"}
        return [self.scale * float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def test_command_trains_resumes_and_saves_an_adapter(tmp_path):
    toy_pipeline().save_pretrained(tmp_path / "model")
    rows = [{"prompt": prompt, "wanted": color} for prompt in "abcd" for color in ("red", "blue")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {**RECIPE, "model": str(tmp_path / "model"), "prompts": str(tmp_path / "prompts.jsonl")}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    command = ["train", "grpo", str(tmp_path / "toy.yaml"), f"output_dir={tmp_path / 'run'}", "learning_rate=0.1"]
    assert cli.main([*command, "max_steps=1"]) == 0
    assert cli.main(command) == 0  # goes on with the second step
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "reward" in entry] == [1, 2]
    run = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (run["kind"], run["model"]) == ("grpo", str(tmp_path / "model"))
    assert Image.open(tmp_path / "run" / "loss.png").size == (960, 540)
    trained = NextFlowPipeline.from_pretrained(tmp_path / "model")
    trained.load_lora_weights(tmp_path / "run")
    trained.set_progress_bar_config(disable=True)
    assert trained("a").images[0].size == (16, 16)


def test_rewards_are_named_by_import_path(tmp_path, monkeypatch):
    assert grpo.make_reward("toy_commands:brightness") is brightness
    assert grpo.make_reward("test_grpo_script:Redness").scale == 1.0
    clip = grpo.make_reward("nextflow_hf.training.rewards.preference:CLIPReward", {"model_id": "a/b", "scaled": True})
    assert clip.model_id == "a/b"
    for name in ("text_rendering_1024", "preference_1024"):
        for path in load_recipe("grpo", name)["rewards"]:
            assert callable(import_object(path))
    for path, options, message in (
        ("beauty", None, "no import path, expected module:name"),
        ("no_such:reward", None, "no module 'no_such'"),
        ("toy_commands:darkness", None, "has no 'darkness', but .*'brightness'"),
        ("toy_commands:TRAINING", None, "is dict, expected a function or a class"),
        ("test_grpo_script:Redness", {"scael": 1}, "the reward test_grpo_script:Redness: .*scael"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo.make_reward(path, options)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_rewards.py").write_text("def zero(images, **columns):\n    return [0.0] * len(images)\n")
    assert grpo.make_reward("my_own_rewards:zero")(images=[1, 2]) == [0.0, 0.0]


def test_prompts_come_from_files(tmp_path):
    rows = [{"prompt": "a b", "text": "x"}, {"prompt": "c", "text": "y"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.txt").write_text("a b\n\nc\n")
    for name in ("rows.jsonl", "rows.parquet"):
        assert grpo.read_prompts(str(tmp_path / name)).to_list() == rows
    assert grpo.read_prompts(str(tmp_path / "rows.txt")).to_list() == [{"prompt": "a b"}, {"prompt": "c"}]
    sources = [{"path": str(tmp_path / "rows.jsonl"), "task": "prompt", "format": "json", "extra_columns": ["text"]}]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"sources": sources}))
    described = grpo.read_prompts(str(tmp_path / "data.yaml"))
    assert [{name: row[name] for name in ("prompt", "text")} for row in described] == rows
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"has the columns \['text'\], expected 'prompt'"):
        grpo.read_prompts(str(tmp_path / "other.jsonl"))


class Reads:
    """An engine that reads "a" in one half of each image, which half depends on the image."""

    def __call__(self, image):
        is_left = np.asarray(image)[0, 0, 0] % 2
        return [OCRWord("a", 0.5, (0, 0, image.width / 2 if is_left else image.width, image.height))]


def test_the_papers_recipe_runs(tmp_path, monkeypatch):
    """On the toy: four scales in the place of eighteen, of which two are the prefix."""
    recipe = load_recipe("grpo", "text_rendering_1024")
    numbers = {name: recipe[name] for name in recipe if name in NextFlowGRPOConfig.__dataclass_fields__}
    assert recipe["global_batch_size"] == 16 * 16
    config = NextFlowGRPOConfig(**{**numbers, "bf16": False, "use_cpu": True})
    # Printed in the paper; the rest are the defaults of the class.
    assert (config.num_generations, config.top_k, config.top_p, config.guidance_scale) == (16, 2, 0.9, 6)
    default = NextFlowGRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    for name in ("guidance_scale", "top_k", "top_p", "learning_rate", "adam_beta2", "weight_decay", "num_generations"):
        assert getattr(default, name) == getattr(config, name), name

    monkeypatch.setattr("nextflow_hf.training.rewards.ocr.RapidOCREngine", Reads)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "text": "a"}) + "\n" for p in "abcd"))
    toy_pipeline().save_pretrained(tmp_path / "model")
    recipe |= {
        "max_steps": 4, "global_batch_size": 16, "resolution": 16, "prefix_scales": 2, "use_cpu": True, "bf16": False,
        "report_to": "none", "model": str(tmp_path / "model"), "prompts": str(tmp_path / "prompts.jsonl"),
        "output_dir": str(tmp_path),
    }  # fmt: skip
    _, (args, _, config), _ = resolve(recipe, grpo.GROUPS)
    assert config.gradient_accumulation_steps == 4
    trainer = grpo.make_trainer(args, config)
    plan = scale_plan([(1, 1), (2, 2), (4, 4)], guidance_scale=config.guidance_scale, guidance_schedule="linear")
    assert [step.guidance_scale - 1 for step in plan] == [0, 2.5, 5]  # VAR: cfg * k / (K - 1)
    trainer.train()
    assert [entry["trains_suffix"] for entry in trainer.state.log_history if "reward" in entry] == [0, 0, 0, 1]


def sampling_bytes(config: NextFlowConfig, images: int, grids: list[tuple[int, int]]) -> float:
    """Keys and values of two rows an image; logits of the last scale, in bfloat16, in fp32 and guided."""
    cells = [height * width for height, width in grids]
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    logits = (2 * 2 + 2 * 4 + 4) * config.codebook_size
    return images * (2 * sum(cells) * cache + cells[-1] * logits)


def test_the_papers_recipe_says_what_memory_it_takes():
    text = " ".join((RECIPES / "grpo" / "text_rendering_1024.yaml").read_text().replace("#", " ").split())
    config = NextFlowConfig()
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
from nextflow_hf.commands.train import leave_processes
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
leave_processes()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_share_groups_and_agree(tmp_path):
    """Each process has half of the one group of four: baseline, shared prefix and update are those of the group."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(tests=str(Path(__file__).parent)))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no"]
    launcher += ["--config_file", str(RECIPES / "accelerate" / "ddp.yaml"), "--main_process_port", "0"]
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
