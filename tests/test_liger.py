"""`use_liger_kernel=True`: the kernels reach every part of the transformer, and train as the plain modules do.

On CUDA these are Liger's kernels, elsewhere the same in Triton's interpreter (conftest.py turns it on). Where Liger is
not installed a stand-in takes its names (liger_stand_in/), which shows the wiring and not the kernels. For these

    pip install -e ".[test,liger]" && pytest tests/test_liger.py
"""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.integrations.liger
from peft import LoraConfig, get_peft_model
from toy import BOI, CODES, EOS, PAD, SQUARE, TEXT, WIDE, grids_tensor, image_tokens, random_codes, toy_model
from transformers import TrainingArguments
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from nextflow_hf.modeling_nextflow.loss_nextflow import weighted_cross_entropy
from nextflow_hf.training.transformer.liger import apply_liger_kernel_to_nextflow, liger_weighted_cross_entropy
from nextflow_hf.training.transformer.trainer import NextFlowTrainer


INSTALLED = importlib.util.find_spec("liger_kernel") is not None
STAND_IN = Path(__file__).parent / "liger_stand_in"
METADATA = "Metadata-Version: 2.1\nName: liger-kernel\nVersion: {}\n"


def let_the_interpreter_run_liger() -> None:
    """Two gaps of Triton's interpreter: it passes numbers to kernels as plain floats, and has no `libdevice.rsqrt`."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats_too(argument):
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.core.tensor(handle, tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = convert_floats_too
    rms_norm = importlib.import_module("liger_kernel.ops.rms_norm")
    rms_norm.rsqrt = lambda value: tl.rsqrt(value)  # looked up late: the interpreter replaces it at every launch


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder with the stand-in's version; with the stand-in's own, what `sys.path` needs."""
    folder = tmp_path_factory.mktemp("metadata")
    (folder / "liger_kernel-0.8.2.dist-info").mkdir()
    (folder / "liger_kernel-0.8.2.dist-info" / "METADATA").write_text(METADATA.format("0.8.2"))
    return folder


@pytest.fixture(scope="module")
def liger(stand_in):
    """(device, liger_kernel_config) of the kernels that can run here."""
    if INSTALLED and torch.cuda.is_available():
        yield "cuda", {}
    elif INSTALLED:
        let_the_interpreter_run_liger()
        yield "cpu", {}
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(STAND_IN))
            patch.syspath_prepend(str(stand_in))
            patch.setattr(transformers.integrations.liger, "is_liger_kernel_available", lambda: True)
            yield "cpu", {}
        for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
            del sys.modules[name]


def inputs(device: str) -> dict[str, torch.Tensor]:
    """Two rows with an image each, text around it, and padding."""
    rows = [[5, 6, *image_tokens(SQUARE), 7, EOS], [8, 9, *image_tokens(WIDE), 10, 11, EOS]]
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    supervised = (ids == BOI) | (ids == EOS) | (ids == 7) | (ids == 11)
    batch = {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": torch.where(supervised, ids, -100),
        "image_codes": random_codes(SQUARE, WIDE),
        "image_grids": grids_tensor(SQUARE, WIDE),
    }
    return {name: value.to(device) for name, value in batch.items()}


@pytest.mark.parametrize("qk_norm", [False, True], ids=["qwen2.5", "qwen3"])
@pytest.mark.parametrize("joint", [False, True], ids=["codes", "joint"])
def test_kernels_train_as_the_plain_modules_do(liger, qk_norm, joint):
    device, kernels = liger
    outputs, gradients = [], []
    for with_liger in (False, True):
        model = toy_model(qk_norm=qk_norm, joint_image_loss=joint).to(device).train()
        if with_liger:
            transformers.integrations.liger.apply_liger_kernel(model, kernels)
        outputs.append(model(**inputs(device)))
        outputs[-1].loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert outputs[1].logits is None
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[0].scale_losses, outputs[1].scale_losses, atol=1e-4, rtol=1e-4)
    assert torch.equal(outputs[0].scale_counts, outputs[1].scale_counts)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_liger_loss_is_ours(liger, precision):
    device, _ = liger
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    targets = torch.cat([torch.randint(50, (6,)), torch.randint(30, 48, (10,))]).to(device)
    token_weights = torch.logspace(-0.7, 2.5, 16, device=device)
    arguments = {"parts": [(6, slice(0, 50)), (10, slice(30, 48))], "chunk_size": 8}
    results = []
    for cross_entropy in (weighted_cross_entropy, liger_weighted_cross_entropy):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(16, 16, generator=generator).to(device, dtype).requires_grad_()
        weight = torch.randn(50, 16, generator=generator).to(device, dtype).requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
            total, losses = cross_entropy(hidden, weight, targets, token_weights, **arguments)
        (total / 16).backward()
        results.append((total.detach(), losses, hidden.grad, weight.grad))
    tolerance = 1e-4 if precision == "float32" else 3e-2
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).float().norm() <= tolerance * ours.float().norm()


def test_liger_loss_of_no_token_has_gradients_of_zero(liger):
    device, _ = liger
    hidden = torch.zeros(0, 16, device=device, requires_grad=True)
    weight = torch.ones(50, 16, device=device, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long, device=device)
    parts = [(0, slice(0, 50)), (0, slice(30, 48))]
    total, losses = liger_weighted_cross_entropy(hidden, weight, none, none.float(), parts=parts, chunk_size=8)
    total.backward()
    assert total == 0 and len(losses) == 0 and not weight.grad.any()


def test_every_part_uses_its_kernel(liger):
    if INSTALLED:
        pytest.skip("Liger's own kernels count no calls")
    from liger_kernel.transformers import calls

    def run(**kernels) -> dict[str, int]:
        model = toy_model(qk_norm=True, joint_image_loss=False).train()
        transformers.integrations.liger.apply_liger_kernel(model, kernels)
        calls.clear()
        model(**inputs("cpu"))
        return {name: calls.count(name) for name in set(calls)}

    # Two layers: two norms and those of queries and keys each, and the last norm. One loss for text, one for codes.
    everything = {"rms_norm": 9, "rope": 2, "swiglu": 2}
    losses = {f"fused_linear_cross_entropy of {rows} rows": 1 for rows in (TEXT + CODES + 2, CODES)}
    assert run() == {**everything, **losses}
    assert run(fused_linear_cross_entropy=False) == everything
    for name in everything:
        assert run(**{name: False}) == {key: n for key, n in {**everything, **losses}.items() if key != name}


def test_only_the_instance_changes(liger):
    rotary, model, other = modeling_qwen2.apply_rotary_pos_emb, toy_model(), toy_model()
    transformers.integrations.liger.apply_liger_kernel(model, None)
    assert modeling_qwen2.apply_rotary_pos_emb is rotary
    assert "weighted_cross_entropy" not in vars(other)
    assert not [name for name, module in other.named_modules() if "forward" in vars(module)]
    assert [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_an_adapted_model_gets_them_too(liger):
    device, kernels = liger
    model = get_peft_model(toy_model(), LoraConfig(r=2, init_lora_weights=False)).to(device).train()
    plain = model(**inputs(device)).loss
    transformers.integrations.liger.apply_liger_kernel(model, kernels)
    assert model.get_base_model().weighted_cross_entropy is liger_weighted_cross_entropy
    torch.testing.assert_close(model(**inputs(device)).loss, plain, atol=1e-5, rtol=1e-5)


def test_trainer_takes_use_liger_kernel(liger, tmp_path):
    device, kernels = liger
    ids = [5, 6, *image_tokens(SQUARE), EOS]
    row = {
        "input_ids": ids,
        "labels": [token if token in (BOI, EOS) else -100 for token in ids],
        "image_codes": random_codes(SQUARE).tolist(),
        "image_target_codes": random_codes(SQUARE, seed=1).tolist(),
        "image_grids": grids_tensor(SQUARE).tolist(),
    }
    logs = []
    for use_liger_kernel in (False, True):
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, logging_steps=1, learning_rate=1e-2, use_cpu=device == "cpu",
            per_device_train_batch_size=2, per_device_eval_batch_size=2, report_to="none", disable_tqdm=True,
            save_strategy="no", use_liger_kernel=use_liger_kernel, liger_kernel_config=kernels,
            label_names=["labels"],
        )  # fmt: skip
        trainer = NextFlowTrainer(model=toy_model(), args=args, train_dataset=[row] * 4, eval_dataset=[row] * 2)
        trainer.train()
        assert ("weighted_cross_entropy" in vars(trainer.model)) == use_liger_kernel
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        logs.append([*losses, trainer.evaluate()["eval_loss"]])
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)


@pytest.mark.parametrize("order", ["import nextflow_hf", "import liger_kernel.transformers.monkey_patch, nextflow_hf"])
def test_liger_knows_the_model_type_in_every_order_of_imports(order, stand_in):
    code = f"""
{order}
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
from nextflow_hf.training.transformer.liger import apply_liger_kernel_to_nextflow
assert MODEL_TYPE_TO_APPLY_LIGER_FN[nextflow_hf.NextFlowConfig.model_type] is apply_liger_kernel_to_nextflow
"""
    path = [*([] if INSTALLED else [str(STAND_IN), str(stand_in)]), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("attention", [Qwen2Attention, Qwen3Attention])
def test_attention_names_its_rotary_embedding(attention):
    """What the rotary kernel takes the place of, in transformers."""
    assert "apply_rotary_pos_emb" in attention.forward.__code__.co_names


@pytest.mark.skipif(not INSTALLED, reason="liger-kernel is not installed")
def test_liger_has_what_is_used_of_it():
    from liger_kernel.transformers import LigerSwiGLUMLP, functional, liger_rotary_pos_emb, monkey_patch

    assert isinstance(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN, dict)
    assert callable(monkey_patch._patch_rms_norm_module) and callable(monkey_patch._patch_swiglu_module)
    assert "forward" in vars(LigerSwiGLUMLP)
    assert list(inspect.signature(liger_rotary_pos_emb).parameters)[:4] == ["q", "k", "cos", "sin"]
    parameters = inspect.signature(functional.liger_fused_linear_cross_entropy).parameters
    assert list(parameters)[:3] == ["input", "weight", "target"]
    assert {"reduction", "accum_dtype"} <= set(parameters)


REFUSED = {
    "no model": ({"model": None}, ValueError, "pass model"),
    "all logits": ({"cross_entropy": True}, ValueError, "fused_linear_cross_entropy=True"),
    "another activation": ({"model": {"hidden_act": "gelu"}}, ValueError, "'silu', got 'gelu': pass swiglu=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_liger_cannot_do_is_refused(liger, case):
    arguments, error, message = REFUSED[case]
    overrides = arguments.get("model", {})
    model = None if overrides is None else toy_model(**overrides)
    with pytest.raises(error, match=message):
        apply_liger_kernel_to_nextflow(**{**arguments, "model": model})


def test_kernels_need_a_gpu(liger, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="need a GPU, and there is none: leave use_liger_kernel out"):
        apply_liger_kernel_to_nextflow(model=toy_model())


def test_a_liger_without_the_right_gradient_is_refused(liger, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.8.1")
    with pytest.raises(ImportError, match="0.8.1 .* install liger-kernel>=0.8.2"):
        apply_liger_kernel_to_nextflow(model=toy_model())
