"""`NextFlowTrainer` and its collator: what is counted, what is logged, and that splitting a batch changes nothing."""

import json

import numpy as np
import pytest
import torch
from toy import BOI, EOS, PAD, SQUARE, WIDE, grids_tensor, image_tokens, random_codes, toy_model
from transformers import TrainingArguments

from nextflow_hf.training.data.collator import NextFlowDataCollator
from nextflow_hf.training.data.messages import drop_condition
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


def train(rows, tmp_path, **arguments) -> NextFlowTrainer:
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, save_steps=1,
        learning_rate=1e-2, train_sampling_strategy="sequential", **{"max_steps": 2, **arguments},
    )  # fmt: skip
    trainer = NextFlowTrainer(model=toy_model(), args=args, train_dataset=rows)
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
        model=toy_model(), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
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
