"""`NextFlowTrainer` and its collator: what is counted, what is logged, and that splitting a batch changes nothing."""

import json

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from toy import BOI, EOS, PAD, SQUARE, WIDE, grids_tensor, image_tokens, random_codes, toy_config, toy_model

from nextflow_hf.training.common.flops import training_flops
from nextflow_hf.training.data.collator import NextFlowDataCollator, PackingCollator
from nextflow_hf.training.data.messages import drop_condition
from nextflow_hf.training.transformer import trainer as trainer_module
from nextflow_hf.training.transformer.arguments import NextFlowTrainingArguments
from nextflow_hf.training.transformer.trainer import NextFlowTrainer


def text_to_image_row(schedule, seed: int) -> dict:
    ids = [5, 6 + seed, *image_tokens(schedule), EOS]
    codes, targets = random_codes(schedule, seed=seed), random_codes(schedule, seed=seed + 100)
    labels = [BOI if token == BOI else EOS if token == EOS else -100 for token in ids]
    grids = grids_tensor(schedule)
    return {
        "input_ids": ids,
        "labels": labels,
        "image_codes": codes.tolist(),
        "image_target_codes": targets.tolist(),
        "image_grids": grids.tolist(),
        "length": len(ids),
    }


def text_row() -> dict:
    return {
        "input_ids": [5, 6, 7, EOS],
        "labels": [-100, 6, 7, EOS],
        "image_codes": [],
        "image_target_codes": [],
        "image_grids": [],
        "length": 4,
    }


ROWS = [text_to_image_row(SQUARE, 0), text_to_image_row(WIDE, 1), text_row(), text_to_image_row(SQUARE, 2)]


def train(rows, tmp_path, data_collator=None, **arguments) -> NextFlowTrainer:
    args = NextFlowTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, save_steps=1,
        **{"train_sampling_strategy": "sequential", "max_steps": 2, "learning_rate": 1e-2, **arguments},
    )  # fmt: skip
    trainer = NextFlowTrainer(toy_model(), args, data_collator, train_dataset=rows)
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    return trainer


def test_collator_pads_right_and_keeps_reading_order():
    batch = NextFlowDataCollator(pad_token_id=PAD)(ROWS)
    assert batch["input_ids"].shape == (4, 34)
    assert batch["attention_mask"].sum(1).tolist() == [34, 18, 4, 34]
    assert batch["labels"][2].tolist() == [-100, 6, 7, EOS] + [-100] * 30
    assert torch.equal(batch["image_grids"], grids_tensor(SQUARE, WIDE, SQUARE))
    expected = torch.cat([torch.tensor(ROWS[i]["image_codes"]) for i in (0, 1, 3)])
    assert torch.equal(batch["image_codes"], expected)
    assert "attention_mask" not in NextFlowDataCollator(pad_token_id=PAD)([ROWS[0], ROWS[3]])
    assert set(NextFlowDataCollator(pad_token_id=PAD)([ROWS[2]])) == {"input_ids", "labels"}


def test_rows_of_processors_with_other_numbers_of_scales_make_one_batch():
    longer = {**ROWS[1], "image_grids": [[*grids, [0, 0]] for grids in ROWS[1]["image_grids"]]}
    model = toy_model()
    for collate in (NextFlowDataCollator(pad_token_id=PAD), PackingCollator(toy_config())):
        batch, other = collate([ROWS[0], ROWS[1]]), collate([ROWS[0], longer])
        assert other["image_grids"].shape[1] == batch["image_grids"].shape[1] + 1
        assert model(**other).loss == model(**batch).loss


def test_accumulating_gradients_equals_one_big_batch(tmp_path):
    big = train(ROWS, tmp_path / "big", per_device_train_batch_size=4, max_steps=1)
    small = train(ROWS, tmp_path / "small", per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1)
    assert big.state.log_history[0]["loss"] == pytest.approx(small.state.log_history[0]["loss"], rel=1e-4)
    assert big.state.log_history[0]["grad_norm"] == pytest.approx(small.state.log_history[0]["grad_norm"], rel=1e-3)
    for (name, a), (_, b) in zip(big.model.named_parameters(), small.model.named_parameters()):
        # AdamW's first step is a sign: compare where the gradient is not rounding noise
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_supervised_tokens_are_counted_as_the_loss_sees_them(tmp_path):
    trainer = NextFlowTrainer(
        model=toy_model(), args=NextFlowTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    )
    batch = trainer.data_collator(ROWS)
    # each image row: <boi> is a text target, all codes, and the end of turn after <eoi>; the text row: three tokens
    expected = (1 + 30 + 1) + (1 + 14 + 1) + 3 + (1 + 30 + 1)
    assert int(trainer._get_num_items_in_batch([batch], torch.device("cpu"))) == expected


def test_losses_are_logged_by_modality_and_scale(tmp_path):
    logs = train(ROWS, tmp_path, per_device_train_batch_size=4).state.log_history[0]
    parts = {f"loss_scale_{k}" for k in range(1, 5)} | {"text_loss", "image_loss", "loss"}
    assert parts <= set(logs)
    model = toy_model().train()
    batch = NextFlowDataCollator(pad_token_id=PAD)(ROWS)
    out = model(**batch)
    image = (out.scale_losses[1:] * out.scale_counts[1:]).sum() / out.scale_counts[1:].sum()
    assert logs["text_loss"] == pytest.approx(out.scale_losses[0].item(), abs=1e-3)
    assert logs["image_loss"] == pytest.approx(image.item(), abs=1e-3)


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    rows = ROWS * 4
    whole = train(rows, tmp_path / "a", per_device_train_batch_size=2, max_steps=6)
    train(rows, tmp_path / "b", per_device_train_batch_size=2, max_steps=6, save_strategy="steps")
    resumed = train(
        rows, tmp_path / "b", per_device_train_batch_size=2, max_steps=6,
        resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"),
    )  # fmt: skip
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_rows_grouped_by_length_have_an_order_for_each_epoch_also_when_resumed(tmp_path, strategy):
    """At the end of an epoch and within one that is not the first; and whatever else takes random numbers."""
    rows = datasets.Dataset.from_list([one | {"row_id": str(index)} for index, one in enumerate(ROWS * 2 + ROWS[:2])])
    numbers = {"train_sampling_strategy": strategy, "length_column_name": "length", "max_steps": 12}
    numbers |= {"per_device_train_batch_size": 2, "save_strategy": "steps"}

    class Collator(NextFlowDataCollator):
        def __call__(self, batch):
            seen.append([row["row_id"] for row in batch])
            torch.rand(1)
            return super().__call__(batch)

    seen = []
    train(rows, tmp_path, Collator(pad_token_id=PAD), **numbers)
    whole = seen[:12]
    assert whole[:5] != whole[5:10]
    for step in (2, 5, 7, 10):
        seen = []
        train(
            rows,
            tmp_path,
            Collator(pad_token_id=PAD),
            **numbers,
            resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}",
        )
        assert seen[: 12 - step] == whole[step:], step
    seen = []
    train(rows, tmp_path / "other", Collator(pad_token_id=PAD), **numbers, seed=1)
    assert seen[:5] != whole[:5] and sorted(sum(seen[:5], [])) == sorted(sum(whole[:5], []))


def test_drop_condition_keeps_what_is_trained_on():
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "make it red"}]},
            {"role": "assistant", "content": [{"type": "image"}]},
        ],
        "images": ["source", "target"],
    }
    outcomes = {}
    for seed in range(2000):
        messages, images = drop_condition(row, np.random.default_rng(seed), text_rate=0.2, image_rate=0.1)
        key = json.dumps([messages[0]["content"], images])
        outcomes[key] = outcomes.get(key, 0) + 1
        assert messages[1] == row["messages"][1] and images[-1] == "target"
    kept = json.dumps([row["messages"][0]["content"], row["images"]])
    no_text = json.dumps([[{"type": "image"}], ["source", "target"]])
    nothing = json.dumps([[], ["target"]])
    assert set(outcomes) == {kept, no_text, nothing}
    assert outcomes[kept] / 2000 == pytest.approx(0.7, abs=0.04)
    assert outcomes[no_text] / 2000 == pytest.approx(0.2, abs=0.03)
    del row["messages"][0]["content"][0], row["images"][0]  # without an image of the user, `text_rate` alone counts
    rngs = map(np.random.default_rng, range(2000))
    dropped = sum(not drop_condition(row, rng, text_rate=0.2, image_rate=0.1)[0][0]["content"] for rng in rngs)
    assert dropped / 2000 == pytest.approx(0.2, abs=0.03)


# ---- how layers compute


def step_of(rows, tmp_path, **arguments) -> tuple[dict, dict, NextFlowTrainer]:
    """The first log and the weights after a step of plain gradient descent."""
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 4, **arguments}
    trainer = train(rows, tmp_path, **options)
    return trainer.state.log_history[0], dict(trainer.model.named_parameters()), trainer


MIXED = [text_to_image_row(SQUARE, 0), text_row(), text_to_image_row(WIDE, 1), text_row()]


def test_layers_are_compiled_whole_and_once(tmp_path):
    """No branch on values and no wait for the device inside a layer: it would break the graph."""
    logs, weights, _ = step_of(MIXED, tmp_path)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled_logs, compiled, trainer = step_of(MIXED, tmp_path, **options)
    counts = torch._dynamo.utils.counters
    assert counts["stats"]["unique_graphs"] == 1 and not counts["graph_break"]  # of all layers, and of nothing else
    assert compiled_logs["loss"] == pytest.approx(logs["loss"], rel=1e-5)
    torch.testing.assert_close(compiled, weights, atol=1e-6, rtol=1e-5)
    trainer.save_model(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(weights)


def test_selective_recomputation_repeats_the_wide_products_alone(tmp_path, monkeypatch):
    work, losses = {}, {}
    choices = {"none": {}, "all": {"activation_checkpointing": True}}
    choices["some"] = {**choices["all"], "selective_recomputation": True}
    for name, options in choices.items():
        with FlopCounterMode(display=False) as counter:
            logs, weights, trainer = step_of(MIXED, tmp_path, **options)
        work[name], losses[name] = counter.get_total_flops(), (logs["loss"], weights)
    config = trainer.model.config
    tokens = 4 * max(len(row["input_ids"]) for row in MIXED)
    wide = 2 * tokens * config.num_hidden_layers * 2 * config.hidden_size * config.intermediate_size
    assert work["some"] - work["none"] == wide and work["all"] - work["none"] > 1.5 * wide
    for loss, weights in losses.values():
        assert loss == losses["none"][0]
        torch.testing.assert_close(weights, losses["none"][1], atol=0, rtol=0)
    with pytest.raises(ValueError, match="selective_recomputation says what activation_checkpointing keeps"):
        NextFlowTrainingArguments(str(tmp_path), use_cpu=True, selective_recomputation=True)


@pytest.mark.parametrize("packed", [False, True])
def test_work_and_its_speed_are_logged(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "peak_flops", lambda device: 1e9)
    collator = PackingCollator(toy_config()) if packed else None
    rows = [MIXED[:2], MIXED[2:]] if packed else MIXED
    size = 1 if packed else 2
    logs, _, trainer = step_of(rows, tmp_path, data_collator=collator, max_steps=2, per_device_train_batch_size=size)
    expected = sum(training_flops(toy_config(), len(row["input_ids"]), row["image_grids"]) for row in MIXED)
    assert trainer.state.total_flos == pytest.approx(expected, rel=1e-9)
    assert logs["tflops"] > 0 and logs["mfu"] == pytest.approx(logs["tflops"] * 1e3, rel=0.01)
