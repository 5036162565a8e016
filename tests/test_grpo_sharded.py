"""`NextFlowGRPOTrainer` on two processes, whole (DDP) or sharded (FSDP2, ZeRO-3), against one process."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import DistributedType, PartialState
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from peft import LoraConfig, PeftModel
from PIL import Image
from processes import in_processes
from test_grpo_trainer import Recording, history, make_trainer
from test_training_equivalence import FSDP2
from torch.distributed.fsdp import FSDPModule
from toy_pipeline import CODES, toy_pipeline

from nextflow_hf import NextFlowForCausalLM


RED = Image.new("RGB", (16, 16), "red")
TEXTS = Dataset.from_list([{"prompt": text} for text in ("a", "bcdefgh", "ij", "k")])
# In this order the first process samples images of two shapes, the second of one: it has fewer passes.
FEATURES = Features({"prompt": Value("string"), "images": List(ImageFeature())})
EDITS = Dataset.from_list(
    [
        {"prompt": text, "images": [RED.resize(size)]}
        for text, size in zip("abcd", [(16, 16), (32, 8), (16, 16), (16, 16)])
    ],
    features=FEATURES,
)
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}
ZERO3 |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
ZERO3 |= {"zero_allow_untested_optimizer": True}


class OnCpu(Recording):
    """FSDP2 and DeepSpeed on CPU processes: accelerate looks for FSDP beside accelerators alone."""

    def __init__(self, *args, **kwargs):
        if os.environ.get("ACCELERATE_USE_FSDP"):
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(*args, **kwargs)
        assert self.is_fsdp_enabled == bool(os.environ.get("ACCELERATE_USE_FSDP"))


def mean_code(images, codes, report_masks=None, **columns) -> list[float]:
    if report_masks is not None:  # a half of every image, which half depends on the image
        masks = [np.zeros((image.height, image.width), bool) for image in images]
        for mask, row in zip(masks, codes):
            mask[:, : mask.shape[1] // (1 + int(row[0]) % 2)] = True
        report_masks(masks)
    return [row.float().mean().item() / CODES for row in codes]


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of what a training leaves: a model, or an adapter of the toy."""
    if (folder / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(toy_pipeline().transformer, folder).merge_and_unload()
    else:
        model = NextFlowForCausalLM.from_pretrained(folder)
    return dict(model.named_parameters())


def run(folder: Path, count: int, rows: Dataset = TEXTS, **numbers) -> dict:
    """One update on 8 samples of two prompts, of plain gradient descent: the weights move as the gradient says."""
    settings = {
        "per_device_train_batch_size": 8 // count, "num_generations": 4, "optim": "sgd", "learning_rate": 0.5,
        "weight_decay": 0.0, "max_grad_norm": 0.0, "beta": 0.1, "guidance_scale": 2.0, "top_k": 6, "top_p": 0.9,
        "vmr_num_suffixes": 2, "log_probs_chunk_size": 7, "trainer_class": OnCpu, **numbers,
    }  # fmt: skip
    trainer = make_trainer(folder, mean_code, rows, **settings)
    trainer.train()
    assert isinstance(trainer.model_wrapped, FSDPModule) == trainer.is_fsdp_enabled
    batch, inputs = trainer.generated[0]
    advantages = batch["advantages"].view(8 // count, -1).expand_as(batch["targets"])
    trainer.save_model(str(folder / "saved"))
    return {
        "prompts": [row["prompt"] for row in inputs],
        "codes": [codes.tolist() for codes in batch["image_codes"]],
        # Of the trained tokens: a process pads to its own longest row.
        "advantages": [row[is_code].tolist() for row, is_code in zip(advantages, batch["targets"] >= 0)],
        "saved": folder / "saved",
        "memory": history(trainer, "peak_memory_gb/rollout"),
        "reward": history(trainer, "reward"),
    }


CASES = {
    "plain": {},
    "thinking": {"max_thinking_tokens": 3, "rollout_batch_size": 3},
    "edits": {"rows": EDITS, "num_generations": 2, "shuffle_dataset": False, "mask_propagation": True},
    "suffix": {"max_steps": 2, "prefix_updates_per_suffix": 1},
    "adapter": {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)},
}
KINDS = {
    "ddp": ({}, {}),
    "fsdp2": (FSDP2, {}),
    "zero3": ({"DS_ACCELERATOR": "cpu"}, {"deepspeed": ZERO3}),
}
no_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def check(one: dict, parts: list[dict]) -> None:
    for name in ("prompts", "codes"):
        assert [entry for part in parts for entry in part[name]] == one[name]
    advantages = [entry for part in parts for entry in part["advantages"]]
    for got, expected in zip(advantages, one["advantages"]):
        assert got == pytest.approx(expected, abs=1e-4)
    start = dict(toy_pipeline().transformer.named_parameters())
    weights, together = saved_weights(one["saved"]), saved_weights(parts[0]["saved"])
    assert max((weight - start[name]).abs().max() for name, weight in weights.items()) > 1e-3
    for name, expected in weights.items():
        torch.testing.assert_close(together[name], expected, atol=1e-5, rtol=1e-5, msg=name)
    assert parts[0]["memory"][0] > 0.01 and parts[0]["reward"] == pytest.approx(one["reward"])


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[dict, dict]:
    """Settings, and what one process makes of them."""
    numbers, folder = CASES[request.param], tmp_path_factory.mktemp("one")
    return numbers, *in_processes(lambda: run(folder, 1, **numbers), count=1)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero3", marks=no_deepspeed)])
def test_two_processes_equal_one(kind, case, tmp_path):
    numbers, one = case
    environment, options = KINDS[kind]
    check(one, in_processes(lambda: run(tmp_path, 2, **numbers, **options), **environment))


def test_fsdp2_that_recomputes_equals_one_process(tmp_path):
    """As recipes/accelerate/fsdp2.yaml says; the trainer's own recomputation is TRL's default."""
    (one,) = in_processes(lambda: run(tmp_path, 1), count=1)
    recomputing = {**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    check(one, in_processes(lambda: run(tmp_path, 2, gradient_checkpointing=True), **recomputing))


def test_log_probabilities_are_not_rounded_to_bf16(tmp_path):
    """Not where they leave the sharded model: in bf16 those near -3 have steps of 0.016."""

    def work():
        numbers = {"num_iterations": 2, "num_generations": 4, "per_device_train_batch_size": 4, "beta": 0.1}
        trainer = make_trainer(tmp_path, mean_code, TEXTS, trainer_class=OnCpu, bf16=True, **numbers)
        trainer.train()
        batch = trainer.generated[0][0]
        return [batch[name][batch["targets"] >= 0].tolist() for name in ("old_per_token_logps", "ref_per_token_logps")]

    for logps in in_processes(work, **FSDP2)[0]:
        logps = torch.tensor(logps)
        assert (logps != logps.bfloat16().float()).float().mean() > 0.9


def test_sharded_checkpoints_and_what_is_saved(tmp_path):
    """A run that is resumed inside a window of rollouts equals an uninterrupted one; what is saved loads as usual."""
    numbers = {"num_iterations": 2, "num_generations": 4, "per_device_train_batch_size": 4, "save_strategy": "steps"}
    numbers |= {"save_steps": 1, "trainer_class": OnCpu, "max_steps": 3}

    def work(folder, resume_from=None):
        trainer = make_trainer(tmp_path / folder, mean_code, TEXTS, **numbers)
        trainer.train(resume_from_checkpoint=resume_from)
        trainer.save_model(str(tmp_path / folder))

    in_processes(lambda: work("whole"), **FSDP2)
    in_processes(lambda: work("resumed", str(tmp_path / "whole" / "checkpoint-1")), **FSDP2)
    whole, resumed = (NextFlowForCausalLM.from_pretrained(tmp_path / folder) for folder in ("whole", "resumed"))
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
    config = json.loads((tmp_path / "whole" / "checkpoint-1" / "config.json").read_text())
    assert config["architectures"] == ["NextFlowForCausalLM"]
    assert not list((tmp_path / "whole").rglob("_fsdp*.py"))


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero3", marks=no_deepspeed)])
def test_a_sharded_reference_that_follows_is_resumed(tmp_path, kind):
    environment, options = KINDS[kind]
    numbers = {"num_generations": 4, "per_device_train_batch_size": 4, "max_steps": 3, "beta": 0.1, **options}
    numbers |= {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.7}
    numbers |= {"save_strategy": "steps", "save_steps": 2, "trainer_class": OnCpu}

    def work(resume_from=None):
        trainer = make_trainer(tmp_path, mean_code, TEXTS, **numbers)
        trainer.train(resume_from_checkpoint=resume_from)
        return history(trainer, "kl")

    (whole, _), (resumed, _) = (
        in_processes(work, *start, **environment) for start in ((), (str(tmp_path / "checkpoint-2"),))
    )
    assert len(whole) == 3 and resumed == whole
