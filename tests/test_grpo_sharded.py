"""`NextFlowGRPOTrainer` on two processes, whole (DDP) or sharded (FSDP2, ZeRO-3), against one process."""

import json
import math
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig
from processes import in_processes
from safetensors.torch import load_file
from test_grpo_trainer import Recording, history, low_codes, make_trainer
from test_training_equivalence import FSDP2
from toy_pipeline import CODES

from nextflow_hf import NextFlowPipeline
from nextflow_hf.training.grpo import save_pipeline
from nextflow_hf.training.sharding import gather_policy


# Of two shapes and lengths: a process has more passes than the other.
ROWS = [{"prompt": text} for text in ("a", "bcdefgh", "ij", "k")]


class OnCpu(Recording):
    """FSDP2 and DeepSpeed on CPU processes: accelerate looks for FSDP beside accelerators alone."""

    def __init__(self, *args, **kwargs):
        if os.environ.get("ACCELERATE_USE_FSDP"):
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(*args, **kwargs)


def mean_code(codes, report_masks=None, **columns) -> list[float]:
    return [row.float().mean().item() / CODES for row in codes]


def run(folder: Path, count: int, **numbers) -> dict:
    """One update on 8 samples of two prompts, of plain gradient descent: the weights move as the gradient says."""
    settings = {
        "per_device_train_batch_size": 8 // count, "num_generations": 4, "optim": "sgd", "learning_rate": 0.5,
        "weight_decay": 0.0, "max_grad_norm": 0.0, "beta": 0.1, "guidance_scale": 2.0, "top_k": 6, "top_p": 0.9,
        "vmr_num_suffixes": 2, "log_probs_chunk_size": 7, "trainer_class": OnCpu, **numbers,
    }  # fmt: skip
    trainer = make_trainer(folder, mean_code, Dataset.from_list(ROWS), **settings)
    trainer.train()
    (batch, inputs), *_ = trainer.generated
    model = gather_policy(trainer.accelerator, trainer.model_wrapped)
    return {
        "prompts": [row["prompt"] for row in inputs],
        "codes": [codes.tolist() for codes in batch["image_codes"]],
        "advantages": batch["advantages"].tolist(),
        "weights": None if model is None else {n: p.detach().clone().numpy() for n, p in model.named_parameters()},
        "memory": history(trainer, "peak_memory_gb/rollout"),
        "reward": history(trainer, "reward"),
    }


CASES = {
    "plain": {},
    "thinking": {"max_thinking_tokens": 3, "rollout_batch_size": 3},
    "suffix": {"max_steps": 2, "prefix_updates_per_suffix": 1},
    "adapter": {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)},
}
ENVIRONMENTS = {"ddp": {}, "fsdp2": FSDP2}


def check(one: dict, parts: list[dict]) -> None:
    for name in ("prompts", "codes"):
        assert [entry for part in parts for entry in part[name]] == one[name]
    torch.testing.assert_close(
        torch.tensor([entry for part in parts for entry in part["advantages"]]), torch.tensor(one["advantages"])
    )
    moved = 0.0
    for name, expected in one["weights"].items():
        torch.testing.assert_close(
            torch.from_numpy(parts[0]["weights"][name]), torch.from_numpy(expected), atol=1e-5, rtol=1e-5, msg=name
        )
    assert parts[0]["memory"][0] > 0.01 and parts[0]["reward"] == pytest.approx(one["reward"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_two_processes_equal_one(kind, case, tmp_path):
    torch.manual_seed(0)
    (one,) = in_processes(lambda: run(tmp_path / "one", 1, **CASES[case]), count=1)
    parts = in_processes(lambda: run(tmp_path / "two", 2, **CASES[case]), **ENVIRONMENTS[kind])
    check(one, parts)
