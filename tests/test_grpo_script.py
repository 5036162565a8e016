"""Recipe to pipeline by the command, and the trainer on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from toy_pipeline import toy_pipeline

from nextflow_hf import NextFlowPipeline
from nextflow_hf.training import grpo
from nextflow_hf.training.grpo_config import NextFlowGRPOConfig


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
