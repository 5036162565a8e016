"""However a step is split over batches and processes, it is the same step: losses and weights, against one written
out by hand on all rows at once."""

import json
import os
from pathlib import Path

import pytest
import torch
from fsdp_on_cpu import CpuFsdpTrainer
from processes import in_processes
from safetensors.torch import load_file
from toy import SQUARE, TEXT, WIDE, toy_model
from toy_codes import row

from nextflow_hf.training.data.collator import NextFlowDataCollator
from nextflow_hf.training.transformer.arguments import NextFlowTrainingArguments
from nextflow_hf.training.transformer.trainer import NextFlowTrainer


# Step 1: one process of two has 67 supervised tokens and the other 3 + 3, of text alone. Step 2: 16 and 32 + 3 + 32.
ROWS = [
    row(SQUARE, prompt=[5, 6], seed=0),
    row(SQUARE, SQUARE, prompt=[7], seed=1),
    row(prompt=[5, 6, 7]),
    row(prompt=[8, 9, 10]),
    row(WIDE, prompt=[11], seed=2),
    row(prompt=[5, 12]),
    row(SQUARE, prompt=[13], seed=3),
    row(SQUARE, WIDE, SQUARE, prompt=[14], seed=4),
]
LEARNING_RATE, DECAY, CLIP, ALPHA = 0.5, 0.1, 0.7, 0.8


def weighted_sum(model, one: dict) -> tuple[torch.Tensor, float]:
    """Sum of the weighted cross-entropies of a row, code by code, and the weights' own sum."""
    config = model.config
    images = torch.tensor(one["image_codes"]), torch.tensor(one["image_grids"])
    inputs = {"image_codes": images[0], "image_grids": images[1]} if len(one["image_grids"]) else {}
    ids = one["input_ids"]
    logits = model(torch.tensor([ids]), skip_logits=False, **inputs).logits[0]
    total, weight_sum, place, codes, schedules = 0.0, 0.0, 0, list(one["image_target_codes"]), list(one["image_grids"])
    while place < len(ids):
        if ids[place] == config.boi_token_id:
            grids = [(height, width) for height, width in schedules.pop(0) if height]
            if place > 0 and one["labels"][place] != -100:  # the word before predicts that an image comes
                total, weight_sum = total - logits[place - 1].log_softmax(-1)[ids[place]], weight_sum + 1
            raw = [(height * width) ** -ALPHA for height, width in grids]
            cells = [height * width for height, width in grids]
            scale = sum(cells) / sum(w * n for w, n in zip(raw, cells))
            is_trained = one["labels"][place] != -100
            for w, n in zip(raw, cells):
                for _ in range(n):
                    code = codes.pop(0)
                    if is_trained:
                        total = total - w * scale * logits[place].log_softmax(-1)[TEXT + code]
                        weight_sum += w * scale
                    place += 1
        else:
            if place > 0 and one["labels"][place] != -100:
                total, weight_sum = total - logits[place - 1].log_softmax(-1)[ids[place]], weight_sum + 1
            place += 1
    assert not codes and not schedules
    return total, weight_sum


@pytest.fixture(scope="module")
def by_hand() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of two steps of plain gradient descent."""
    model = toy_model(scale_loss_alpha=ALPHA).train()
    losses = []
    for step in range(2):
        sums = [weighted_sum(model, one) for one in ROWS[4 * step : 4 * step + 4]]
        loss = sum(total for total, _ in sums) / sum(weight for _, weight in sums)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is None:
                    continue
                is_decayed = "norm" not in name and "bias" not in name
                parameter -= LEARNING_RATE * (parameter.grad + DECAY * is_decayed * parameter)
                parameter.grad = None
        losses.append(loss.item())
    return losses, {name: tensor.detach() for name, tensor in model.state_dict().items()}


def train(output_dir: Path, trainer_class: type = NextFlowTrainer, **arguments) -> list[dict]:
    values = {
        "output_dir": str(output_dir), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "optim": "sgd", "learning_rate": LEARNING_RATE, "weight_decay": DECAY, "max_grad_norm": CLIP, "max_steps": 2,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "save_strategy": "no",
    }  # fmt: skip
    args = NextFlowTrainingArguments(**{**values, **arguments})
    trainer = trainer_class(toy_model(scale_loss_alpha=ALPHA), args, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    trainer.save_model(str(output_dir))
    return trainer.state.log_history


def check(output_dir: Path, history: list[dict], by_hand) -> None:
    losses, weights = by_hand
    assert [entry["loss"] for entry in history if "loss" in entry] == pytest.approx(losses, rel=1e-5)
    saved = load_file(output_dir / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name], weight, atol=2e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_accumulating(batch, accumulation, by_hand, tmp_path):
    history = train(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    check(tmp_path, history, by_hand)


def test_two_processes_with_unequal_shares(by_hand, tmp_path):
    def work():
        return train(tmp_path / os.environ["RANK"], per_device_train_batch_size=2)

    first, second = in_processes(work)
    check(tmp_path / "0", first, by_hand)
    parts = [{k: v for k, v in entry.items() if "loss" in k} for entry in first]
    assert parts == [{k: v for k, v in entry.items() if "loss" in k} for entry in second]


def test_processes_drop_out_places_of_their_own_and_read_rows_of_their_own(tmp_path):
    def work() -> tuple[list, list]:
        dropped, read = [], []
        model, dropout = toy_model(), torch.nn.Dropout()
        model.model.layers[0].register_forward_hook(lambda *_: dropped.append(dropout(torch.ones(32)).tolist()))

        class Collator(NextFlowDataCollator):
            def __call__(self, rows):
                read.extend(one["row_id"] for one in rows)
                return super().__call__(rows)

        args = NextFlowTrainingArguments(
            output_dir=str(tmp_path / os.environ["RANK"]), use_cpu=True, report_to="none", disable_tqdm=True,
            num_train_epochs=2, save_strategy="no", per_device_train_batch_size=1,
        )  # fmt: skip
        rows = [{**one, "row_id": str(index)} for index, one in enumerate(ROWS)]
        trainer = NextFlowTrainer(model, args, Collator(model.config.pad_token_id), train_dataset=rows)
        trainer.train()
        trainer.train()
        return dropped, read

    (first, of_first), (second, of_second) = in_processes(work)
    assert all(one != other for one, other in zip(first, second, strict=True))
    for start in range(0, 16, 4):  # in each epoch one order for both, of which each takes its part
        assert {*of_first[start : start + 4], *of_second[start : start + 4]} == {str(index) for index in range(8)}


def test_two_processes_that_accumulate(by_hand, tmp_path):
    def work():
        return train(tmp_path / os.environ["RANK"], per_device_train_batch_size=1, gradient_accumulation_steps=2)

    check(tmp_path / "0", in_processes(work)[0], by_hand)


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def test_fsdp2_in_two_processes(by_hand, tmp_path):
    def work():
        return train(
            tmp_path, CpuFsdpTrainer, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            save_strategy="steps", save_steps=1,
        )  # fmt: skip

    check(tmp_path, in_processes(work, **FSDP2)[0], by_hand)
    # What is saved knows nothing of FSDP: neither the class nor its code.
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["NextFlowForCausalLM"]
        assert not list(folder.glob("_fsdp*")) and load_file(folder / "model.safetensors")


IMAGES = ["image_codebook", "connector", "scale_embedding"]


@pytest.mark.parametrize("rows", [ROWS[2:4], ROWS[:1], ROWS[:4], ROWS[7:]], ids=["text", "one", "mixed", "several"])
def test_every_batch_calls_the_same_modules(rows, monkeypatch):
    """Where weights are sharded, a call gathers them, and all processes must: DeepSpeed's ZeRO-3."""
    plain = toy_model(scale_loss_alpha=ALPHA).train()
    batch = {k: v for k, v in NextFlowDataCollator(pad_token_id=0)(rows).items() if k != "row_ids"}
    expected = plain(**batch)
    expected.loss.backward()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model, calls = toy_model(scale_loss_alpha=ALPHA).train(), []
    model.loss_chunk_size = 5
    for name, module in model.named_modules():
        if name.split(".")[-1] in (*IMAGES, "embed_tokens", "lm_head"):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name.split(".")[-1]))
    outputs = model(**batch)
    assert calls == ["embed_tokens", *IMAGES, "lm_head"]
    outputs.loss.backward()
    assert "forward" not in vars(model.lm_head)
    torch.testing.assert_close(outputs.loss, expected.loss)
    for (name, parameter), (_, other) in zip(model.named_parameters(), plain.named_parameters()):
        other = torch.zeros_like(parameter) if other.grad is None else other.grad
        torch.testing.assert_close(parameter.grad, other, msg=lambda m, name=name: f"{name}: {m}")


def test_evaluation_weighs_tokens_and_not_batches(tmp_path):
    def evaluate(**arguments) -> dict:
        args = NextFlowTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **arguments
        )
        model = toy_model(scale_loss_alpha=ALPHA)
        return NextFlowTrainer(model, args, eval_dataset=ROWS).evaluate()

    model = toy_model(scale_loss_alpha=ALPHA)
    with torch.no_grad():
        sums = [weighted_sum(model, one) for one in ROWS]
    expected = (sum(total for total, _ in sums) / sum(weight for _, weight in sums)).item()
    whole, split = evaluate(per_device_eval_batch_size=8), evaluate(per_device_eval_batch_size=3)
    two = in_processes(lambda: evaluate(per_device_eval_batch_size=2))[1]
    names = {"eval_loss", "eval_text_loss", "eval_image_loss", *(f"eval_loss_scale_{k}" for k in range(1, 5))}
    for metrics in (whole, split, two):
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert names <= set(metrics)
        assert {name: metrics[name] for name in names} == pytest.approx(
            {name: whole[name] for name in names}, abs=2e-4
        )
