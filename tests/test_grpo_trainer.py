"""`NextFlowGRPOTrainer` on a toy pipeline: its loss against a slow statement of it, and what of TRL carries over."""

import ast
import asyncio
import functools
import inspect
import math
import os

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from toy_pipeline import CODES, TEXT_VOCAB, toy_pipeline
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback
from trl import GRPOConfig, GRPOTrainer

from nextflow_hf.training.common.checkpoints import last_checkpoint
from nextflow_hf.training.common.finite_steps import NotFiniteError
from nextflow_hf.training.grpo import trainer as grpo_trainer
from nextflow_hf.training.grpo import trl_contract as grpo_contract
from nextflow_hf.training.grpo.config import REFUSED, SUPPORTED, refusal
from nextflow_hf.training.grpo.objective import clipped_loss, group_advantages, group_advantages_by_function
from nextflow_hf.training.grpo.trainer import NextFlowGRPOConfig, NextFlowGRPOTrainer


def low_codes(codes, **columns) -> list[float]:
    """Share of codes in the lower half of the codebook: easy to learn."""
    return [(row < CODES // 2).float().mean().item() for row in codes]


def make_trainer(tmp_path, rewards=low_codes, rows=None, parts=None, trainer_class=NextFlowGRPOTrainer, **numbers):
    pipeline = toy_pipeline()
    peft_config, model = numbers.pop("peft_config", None), numbers.pop("model", None) or pipeline.transformer
    eval_dataset = numbers.pop("eval_dataset", None)
    arguments = {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 4, "max_steps": 1,
        "learning_rate": 1e-2, "prefix_scales": 2, "guidance_scale": 1.5, "top_k": 0, "top_p": 1.0, "bf16": False,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
        "gradient_checkpointing": False, "lr_scheduler_type": "constant", **numbers,
    }  # fmt: skip
    rows = rows if rows is not None else Dataset.from_list([{"prompt": text} for text in "abcdefgh"])
    return trainer_class(
        model,
        rewards,
        NextFlowGRPOConfig(str(tmp_path), **arguments),
        rows,
        eval_dataset,
        pipeline.processor,
        peft_config=peft_config,
        vision_tokenizer=pipeline.vision_tokenizer,
    )


def history(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Recording(NextFlowGRPOTrainer):
    """Keeps what the two steps made: generated batches, and the inputs of the loss with the loss."""

    def __init__(self, *args, **kwargs):
        self.generated, self.losses = [], []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.generated.append(({**batch}, inputs))
        return batch

    def _compute_loss(self, model, inputs):
        state = {name: value.detach().clone() for name, value in self.pipeline.transformer.state_dict().items()}
        loss = super()._compute_loss(model, inputs)
        self.losses.append((inputs, state, loss.item() * self.current_gradient_accumulation_steps))
        return loss


def test_training_raises_the_reward(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=8, prefix_scales=None)
    trainer.train()
    rewards = history(trainer, "reward")
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.12
    logged = trainer.state.log_history[0]
    names = {"reward_std", "rewards/low_codes/mean", "entropy", "clip_ratio", "sampling_gap", "frac_reward_zero_std"}
    assert names | {f"scale_{k}/entropy" for k in range(1, 5)} <= set(logged)
    assert abs(logged["sampling_gap"]) < 0.5 and logged["rewards/failed"] == 0


def policy_log_probs(trainer, model, state, batch, row: int) -> torch.Tensor:
    """Log-probabilities of what a row teaches, codes among codes and text among text, from full logits."""
    model.load_state_dict(state)
    length = int(batch["attention_mask"][row].sum())
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"][row : row + 1, :length],
            image_codes=batch["image_codes"][row],
            image_grids=batch["image_grids"][row],
        ).logits[0]
    targets = batch["targets"][row, :length]
    config = model.config
    text = {*range(TEXT_VOCAB), config.boi_token_id} - {
        config.image_token_id,
        config.pad_token_id,
        config.eos_token_id,
    }
    logps = []
    for place in (targets >= 0).nonzero()[:, 0].tolist():
        target = targets[place].item()
        is_code = TEXT_VOCAB <= target < TEXT_VOCAB + CODES
        rivals = list(range(TEXT_VOCAB, TEXT_VOCAB + CODES)) if is_code else sorted(text)
        logps.append((logits[place, rivals] / trainer.temperature).log_softmax(-1)[rivals.index(target)])
    return torch.stack(logps)


@pytest.mark.parametrize(
    ("high", "delta", "corrects"), [(None, None, True), (0.01, 1.02, False)], ids=["usual", "bounded"]
)
def test_loss_is_the_stated_one_off_policy(tmp_path, high, delta, corrects):
    trainer = make_trainer(
        tmp_path, max_steps=3, num_iterations=3, beta=0.3, temperature=0.9, epsilon=0.05, trainer_class=Recording,
        epsilon_high=high, delta=delta, use_bias_correction_kl=corrects,
    )  # fmt: skip
    start = {name: value.clone() for name, value in trainer.pipeline.transformer.state_dict().items()}
    trainer.train()
    assert len(trainer.generated) == 1 and len(trainer.losses) == 3
    clipped, model = [], toy_pipeline().transformer
    for batch, state, loss in trainer.losses:
        total = 0.0
        for row in range(8):
            new = policy_log_probs(trainer, model, state, batch, row)
            old = policy_log_probs(trainer, model, start, batch, row)  # both as before training: old and reference
            k = [1.0] + [4**-0.6] * 4
            advantage = batch["advantages"][row].item()
            for p, q, weight in zip(new.tolist(), old.tolist(), k):
                ratio = math.exp(p - q)
                bounded = min(max(ratio, 0.95), 1 + (0.05 if high is None else high))
                clipped.append(bounded * advantage < ratio * advantage)
                policy = -min(min(ratio, delta or math.inf) * advantage, bounded * advantage)
                divergence = (math.exp(q - p) - (q - p) - 1) * (ratio if corrects else 1)
                total += weight / sum(k) * (policy + 0.3 * divergence) / 8
        assert loss == pytest.approx(total, rel=1e-3, abs=1e-5)
    assert any(clipped) and not all(clipped)
    kl = history(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-4


def test_thought_and_image_share_one_advantage_and_have_bounds_of_their_own(tmp_path):
    """The loss of UniGRPO: the mean over the codes of the prefix plus the weighted mean over the thought."""

    def reward(thoughts, codes, **columns):  # what is thought decides as well as what is seen
        return [len(set(text)) / 4 + low for text, low in zip(thoughts, low_codes(codes))]

    trainer = make_trainer(
        tmp_path, reward, max_steps=3, num_iterations=3, max_thinking_tokens=4, beta=0.3, epsilon=0.05,
        thinking_beta=0.7, thinking_epsilon=0.02, thinking_weight=0.5, trainer_class=Recording,
    )  # fmt: skip
    start = {name: value.clone() for name, value in trainer.pipeline.transformer.state_dict().items()}
    trainer.train()
    model, clipped = toy_pipeline().transformer, {True: [], False: []}
    for batch, state, loss in trainer.losses:
        assert batch["advantages"].shape == (8,)
        total = 0.0
        for row in range(8):
            new = policy_log_probs(trainer, model, state, batch, row)
            old = policy_log_probs(trainer, model, start, batch, row)
            count = len(new) - 5  # of the thought; the prefix has a scale of one code and one of four
            assert 1 <= count <= 4
            k = [1.0] + [4**-0.6] * 4
            weights = [0.5 / count] * count + [weight / sum(k) for weight in k]
            advantage = batch["advantages"][row].item()
            for place, (p, q, weight) in enumerate(zip(new.tolist(), old.tolist(), weights, strict=True)):
                is_text = place < count
                epsilon, beta = (0.02, 0.7) if is_text else (0.05, 0.3)
                ratio = math.exp(p - q)
                bounded = min(max(ratio, 1 - epsilon), 1 + epsilon)
                clipped[is_text].append(bounded * advantage < ratio * advantage)
                divergence = (math.exp(q - p) - (q - p) - 1) * ratio
                total += weight * (-min(ratio * advantage, bounded * advantage) + beta * divergence) / 8
        assert loss == pytest.approx(total, rel=1e-3, abs=1e-5)
    assert any(clipped[True]) and any(clipped[False])
    assert history(trainer, "text/kl")[2] > 1e-5
    # The policy was asked to think, as by `pipe(prompt, think=True)`.
    asked = trainer.pipeline.processor.tokenizer.decode(trainer.generated[0][0]["input_ids"][0])
    assert "think first" in asked


def test_numbers_of_a_thought_need_one(tmp_path):
    with pytest.raises(ValueError, match="thinking_beta is 0.1 without max_thinking_tokens"):
        make_trainer(tmp_path, thinking_beta=0.1)


def test_advantages_are_those_of_the_groups(tmp_path):
    trainer = make_trainer(tmp_path, trainer_class=Recording)
    trainer.train()
    ((batch, inputs),) = trainer.generated
    assert [row["prompt"] for row in inputs[:4]] == [inputs[0]["prompt"]] * 4
    rewards = torch.tensor([trainer.state.log_history[0]["reward"]])
    assert batch["advantages"].view(2, 4).sum(1).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert batch["advantages"].view(2, 4).std(1).tolist() == pytest.approx([1, 1], abs=1e-2)
    assert 0 < rewards < 1


def test_rewards_get_what_they_are_promised(tmp_path):
    calls = {}

    def plain(images, codes, prompts, source_images, category, log_metric, trainer_state, **rest):
        calls["plain"] = (images, codes, prompts, source_images, category, trainer_state.global_step, rest)
        log_metric("my_metric", 3.0)
        return [float(index % 4) for index in range(len(images))]

    class Slow:
        async def __call__(self, images, **columns):
            await asyncio.sleep(0)
            calls["slow"] = (images, columns)
            return [1.0 if index % 4 == 0 else None for index in range(len(images))]

    features = Features({"prompt": Value("string"), "images": List(Image()), "category": Value("string")})
    picture = PILImage.new("RGB", (16, 16), "red")
    rows = [{"prompt": "paint it blue", "images": [picture], "category": "edit"}] * 4
    trainer = make_trainer(
        tmp_path, [functools.partial(plain), Slow()], Dataset.from_list(rows, features=features),
        reward_weights=[1.0, 0.5], trainer_class=Recording, guidance_scale=2.0,
    )  # fmt: skip
    trainer.train()
    images, codes, prompts, sources, category, step, rest = calls["plain"]
    assert len(images) == 8 and all(image.size == (16, 16) for image in images)
    assert all(row.shape == (30,) for row in codes) and step == 0
    assert prompts == ["paint it blue"] * 8 and category == ["edit"] * 8
    assert [[np.asarray(p)[0, 0].tolist() for p in row] for row in sources] == [[[255, 0, 0]]] * 8
    assert rest["completions"][0][0]["content"][0]["image"] is images[0]
    assert calls["slow"][0] == images and "report_masks" not in rest
    # The slow one applies to one of each group only: the others have no comparable sum and are left out.
    advantages = trainer.generated[0][0]["advantages"].view(2, 4)
    assert (advantages == 0).all()
    assert trainer.state.log_history[0]["my_metric"] == 3
    assert trainer.state.log_history[0]["reward"] == pytest.approx(0.5)


def test_rewards_get_source_images_that_rows_name_by_their_paths(tmp_path):
    PILImage.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    seen = []

    def reward(source_images, **columns):
        seen.extend(one.getpixel((0, 0)) for row in source_images for one in row)
        return [float(index % 4) for index in range(len(source_images))]

    rows = Dataset.from_list([{"prompt": "paint it blue", "images": [str(tmp_path / "red.png")]}] * 4)
    make_trainer(tmp_path, reward, rows).train()
    assert seen == [(255, 0, 0)] * 8


def test_a_failing_reward_is_reported_with_its_sample_and_left_out(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("nextflow_hf.training.rewards.checks.logger.warning", messages.append)

    def breaks(prompts, **columns):
        return [math.nan if index == 2 else float(index % 4) for index in range(len(prompts))]

    trainer = make_trainer(tmp_path, [breaks, low_codes], reward_weights=[1.0, 0.0], trainer_class=Recording)
    trainer.train()
    ((batch, inputs),) = trainer.generated
    assert len(messages) == 1 and "'breaks'" in messages[0] and "sample 2" in messages[0]
    assert repr(inputs[2]["prompt"]) in messages[0]
    spread = torch.tensor([0.0, 1.0, 3.0])
    expected = ((spread - spread.mean()) / (spread.std() + 1e-4)).tolist()
    got = batch["advantages"].tolist()
    assert [got[0], got[1], got[3]] == pytest.approx(expected, rel=1e-3) and got[2] == 0
    assert trainer.state.log_history[0]["rewards/failed"] == 1

    def hopeless(prompts, **columns):
        return [math.nan] * len(prompts)

    with pytest.raises(ValueError, match="no sample of the generation batch has a reward"):
        make_trainer(tmp_path, hopeless).train()
    with pytest.raises(ZeroDivisionError):  # an exception is not swallowed
        make_trainer(tmp_path, lambda **columns: 1 / 0).train()


def test_a_loss_that_is_no_number_stops_before_the_weights_change(tmp_path, monkeypatch):
    monkeypatch.setattr(
        grpo_trainer, "clipped_loss", lambda *args, **options: clipped_loss(*args, **options) * math.nan
    )
    trainer = make_trainer(tmp_path)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(NotFiniteError, match="the loss of step 1 is not finite"):
        trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_groups_without_a_difference_teach_nothing(tmp_path):
    sizes = []

    def all_alike(images, **columns):
        sizes.extend(image.size for image in images)
        return [0.3] * len(images)

    trainer = make_trainer(tmp_path, all_alike, weight_decay=0.0, aspect_ratio="8:2")
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert history(trainer, "frac_reward_zero_std") == [1.0]
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert sizes == [(32, 8)] * 8


def test_rewards_may_be_normalised_before_they_are_summed(tmp_path):
    """One reward a thousand times the other counts as much as it."""
    small, large = [0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 1.0, 2.0], [5e3, 1e3, 0.0, 2e3, 1e3, 3e3, 0.0, 0.0]

    def first(images, **columns):
        return small

    def second(images, **columns):
        return large

    advantages = {}
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        trainer = make_trainer(
            tmp_path, [first, second], multi_objective_aggregation=aggregation, trainer_class=Recording
        )
        trainer.train()
        advantages[aggregation] = trainer.generated[0][0]["advantages"]
    total = torch.tensor(small) + torch.tensor(large)
    torch.testing.assert_close(advantages["sum_then_normalize"], group_advantages(total, 4)[0])
    rewards = torch.tensor([small, large]).T
    expected = group_advantages_by_function(rewards, torch.ones(2), 4)[0]
    torch.testing.assert_close(advantages["normalize_then_sum"], expected)


def test_a_group_whose_reward_failed_is_left_out_however_rewards_are_summed(tmp_path):
    def fails_at_first(images, **columns):
        return [math.nan] * 4 + [0.0, 1.0, 2.0, 3.0]

    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        trainer = make_trainer(
            tmp_path, [low_codes, fails_at_first], multi_objective_aggregation=aggregation, trainer_class=Recording
        )
        trainer.train()
        advantages = trainer.generated[0][0]["advantages"]
        assert advantages[:4].eq(0).all() and advantages[4:].ne(0).any(), aggregation


def test_accumulating_gradients_equals_one_big_batch(tmp_path):
    numbers = {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": 0.0, "beta": 0.1}
    big = make_trainer(tmp_path, per_device_train_batch_size=8, **numbers)
    start = [parameter.clone() for parameter in big.model.parameters()]
    big.train()
    small = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **numbers)
    small.train()
    assert history(big, "reward") == pytest.approx(history(small, "reward"))
    moved = 0.0
    for origin, a, b in zip(start, big.model.parameters(), small.model.parameters()):
        torch.testing.assert_close(a - origin, b - origin, atol=1e-6, rtol=1e-3)
        moved += (a - origin).abs().sum().item()
    assert moved > 0


@pytest.mark.parametrize(
    "window, turns",
    [
        ({}, [0, 1, 0, 1]),
        # A checkpoint may lie inside a window: its rollouts are learnt from twice, or in two updates.
        ({"num_iterations": 2}, [0, 1]),
        ({"steps_per_generation": 2, "num_iterations": 2, "mask_propagation": True}, [0]),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2, "num_iterations": 1}, [0, 1]),
    ],
    ids=["plain", "iterations", "steps", "across"],
)
def test_resumed_training_equals_uninterrupted_training(tmp_path, window, turns):
    numbers = {"max_steps": 4, "prefix_updates_per_suffix": 1, "vmr_num_suffixes": 2, **window}
    numbers |= {"beta": 0.1, "max_thinking_tokens": 2, "thinking_beta": 0.2, "thinking_epsilon": 0.1}
    whole = make_trainer(tmp_path, **numbers, save_strategy="steps", save_steps=1)
    whole.train()
    assert history(whole, "trains_suffix") == turns
    for step in (1, 2, 3):
        checkpoint = tmp_path / f"checkpoint-{step}"
        resumed = make_trainer(tmp_path, **numbers)
        torch.manual_seed(step)  # the checkpoint says how chance goes on
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert history(whole, "reward") == history(resumed, "reward")
        for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
            assert torch.equal(a, b), step
        assert {"preprocessor_config.json", "processor_config.json"} & set(os.listdir(checkpoint))


def test_resuming_with_another_window_is_said(tmp_path, caplog):
    make_trainer(tmp_path, num_iterations=3, save_strategy="steps", save_steps=1).train()
    resumed = make_trainer(tmp_path, num_iterations=2, max_steps=2)
    with caplog.at_level("WARNING", logger="nextflow_hf"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "has the window (1, 3), expected (1, 2)" in caplog.text and resumed.state.global_step == 2


def test_rollouts_do_not_depend_on_their_batch(tmp_path):
    """A sample has randomness of its own, however many are sampled together."""
    numbers = {"vmr_num_suffixes": 2, "max_thinking_tokens": 3, "trainer_class": Recording}
    batches = []
    for size in (None, 3):
        trainer = make_trainer(tmp_path, rollout_batch_size=size, **numbers)
        torch.manual_seed(0 if size is None else 1)
        trainer.train()
        batches.append(trainer.generated[0][0])
    assert all(map(torch.equal, batches[0]["image_codes"], batches[1]["image_codes"]))
    torch.testing.assert_close(batches[0]["advantages"], batches[1]["advantages"])


def test_a_checkpoint_that_was_not_finished_is_none(tmp_path, monkeypatch):
    """Killed while the second is written, training goes on from the first."""
    numbers = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, **numbers)
    save = trainer._save_optimizer_and_scheduler

    def dies(folder):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        save(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    resumed = make_trainer(tmp_path, **numbers)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert len(history(resumed, "reward")) == 2 and last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_middle_returns_and_turns_of_the_suffix(tmp_path):
    """Prefix turn: the value of every prefix from its two suffixes. Suffix turn: groups share their prefix."""
    seen = []

    def reward(codes, **columns):
        seen.append(torch.stack(list(codes)))
        return low_codes(codes)

    trainer = make_trainer(
        tmp_path, reward, max_steps=2, vmr_num_suffixes=2, vmr_eta=0.5, prefix_updates_per_suffix=1,
        trainer_class=Recording,
    )  # fmt: skip
    trainer.train()
    first, second, shared = seen
    assert torch.equal(first[:, :5], second[:, :5]) and not torch.equal(first, second)
    values = []
    for one, other in zip(low_codes(first), low_codes(second)):
        values.append(0.5 * math.log((math.exp(one / 0.5) + math.exp(other / 0.5)) / 2))
    values = torch.tensor(values).view(2, 4)
    expected = (values - values.mean(1, keepdim=True)) / (values.std(1, keepdim=True) + 1e-4)
    prefix_batch, suffix_batch = (batch for batch, _ in trainer.generated)
    torch.testing.assert_close(prefix_batch["advantages"].view(2, 4), expected, rtol=1e-3, atol=1e-3)
    assert set(prefix_batch["scale_ids"].unique().tolist()) == {0, 1, 2}

    groups = shared.view(2, 4, 30)
    assert (groups[:, :, :5] == groups[:, :1, :5]).all() and not (groups == groups[:, :1]).all()
    assert set(suffix_batch["scale_ids"].unique().tolist()) == {0, 3, 4}
    assert suffix_batch["loss_weights"].sum(1).tolist() == pytest.approx([1] * 8)
    with pytest.raises(ValueError, match="`prefix_scales` is 4 of 4"):
        make_trainer(tmp_path, vmr_num_suffixes=2, prefix_scales=4).train()


def test_masks_of_rewards_gate_the_codes(tmp_path):
    def looks_at_the_corner(images, report_masks, **columns):
        masks = [np.zeros((16, 16), dtype=bool) for _ in images]
        for mask in masks:
            mask[:4, :4] = True
        report_masks([*masks[:-1], None])
        return [float(index) for index in range(len(images))]

    trainer = make_trainer(tmp_path, looks_at_the_corner, mask_propagation=True, trainer_class=Recording)
    trainer.train()
    batch = trainer.generated[0][0]
    weights = [row[row > 0].tolist() for row in batch["loss_weights"]]
    k = [1.0] + [4**-0.6] * 4
    assert weights[0] == pytest.approx([1 / sum(k), k[1] / sum(k)])  # 1x1, and the first of 2x2
    assert weights[-1] == pytest.approx([value / sum(k) for value in k])
    # The rewards are gated, too: where the last sample alone has a mask, there is nothing to compare it with.
    codes = [row[targets >= 0].tolist() for row, targets in zip(batch["advantages"], batch["targets"])]
    values = torch.arange(4.0)
    for row, value in zip(codes, ((values - values.mean()) / (values.std() + 1e-4)).tolist() * 2):
        assert row == pytest.approx([value, value, 0, 0, 0], rel=1e-4)


def test_adapters_are_trained_and_the_reference_is_without(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    trainer = make_trainer(
        tmp_path, peft_config=lora, beta=0.1, max_steps=3, learning_rate=5e-2, gradient_checkpointing=True
    )
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora" not in n}
    trainer.train()
    kl = history(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-5
    assert all(torch.equal(base[n], p) for n, p in trainer.model.named_parameters() if "lora" not in n)
    assert any(p.abs().sum() > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)

    # An adapter that was there before is the reference, not the bare model.
    trained = get_peft_model(toy_pipeline().transformer, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    trainer = make_trainer(tmp_path, model=trained, beta=0.1)
    trainer.train()
    assert history(trainer, "kl") == [pytest.approx(0, abs=1e-6)]
    with pytest.raises(ValueError, match="`sync_ref_model` needs"):
        make_trainer(tmp_path, peft_config=lora, beta=0.1, sync_ref_model=True)


def test_thinking_evaluation_and_logged_completions(tmp_path):
    eval_rows = Dataset.from_list([{"prompt": "x"}, {"prompt": "y"}])
    written = {}

    class Board:
        def add_image(self, tag, array, step, dataformats):
            written[tag] = (array.shape, step, dataformats)

    trainer = make_trainer(
        tmp_path, max_steps=2, max_thinking_tokens=3, bf16=True, gradient_checkpointing=True, log_completions=True,
        num_completions_to_print=0, eval_dataset=eval_rows, eval_strategy="steps", eval_steps=2,
        num_generations_eval=2, per_device_eval_batch_size=4, trainer_class=Recording, rollout_batch_size=3,
    )  # fmt: skip
    board = TensorBoardCallback.__new__(TensorBoardCallback)
    board.tb_writer = Board()
    board.on_train_begin = board.on_log = board.on_train_end = lambda *args, **kwargs: None  # it has no real board
    trainer.add_callback(board)
    trainer.train()
    assert written["completions/0"] == ((16, 16, 3), 2, "HWC") and len(written) == 8
    assert len(history(trainer, "eval_reward")) == 1 and "text/entropy" in trainer.state.log_history[0]
    batch = trainer.generated[0][0]
    text = (batch["targets"] >= 0) & (batch["targets"] < TEXT_VOCAB)
    assert text.any() and (batch["loss_weights"][text] > 0).all()
    assert (batch["loss_weights"] * text).sum(1).tolist() == pytest.approx([1] * 8)
    assert (batch["loss_weights"] * ~text).sum(1).tolist() == pytest.approx([1] * 8)
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert len(table) == 8 and {"prompt", "completion", "low_codes", "advantage"} <= set(table.columns)


def test_a_number_that_trl_adds_is_refused_until_somebody_looked_at_it():
    of_trl = set(GRPOConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)
    assert SUPPORTED - of_trl <= {"wandb_log_unique_prompts"}  # older than 1.16
    assert not SUPPORTED & set(REFUSED)
    unknown = {name for name in of_trl if refusal(name) == refusal("a new one")}
    assert unknown == set()
    assert "not known" in refusal("a new one") and refusal("beta") is None


def test_value_of_a_prefix_needs_totals_and_a_prefix(tmp_path):
    numbers = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "vmr_num_suffixes": 2}
    with pytest.raises(ValueError, match="normalize_then_sum"):
        NextFlowGRPOConfig(**numbers, multi_objective_aggregation="normalize_then_sum")
    with pytest.raises(ValueError, match="`prefix_scales`"):
        NextFlowGRPOConfig(**numbers, prefix_scales=None)


@pytest.mark.parametrize(
    "name", ["tools", "rollout_func", "environment_factory", "quantization_config", "reward_processing_classes"]
)
def test_refused_arguments_are_named(name):
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        NextFlowGRPOTrainer(None, low_codes, **{name: object()})


def test_wrong_parts_are_named(tmp_path):
    pipeline = toy_pipeline()
    with pytest.raises(TypeError, match="`processing_class` is NoneType, expected NextFlowProcessor"):
        NextFlowGRPOTrainer(pipeline.transformer, low_codes)
    with pytest.raises(TypeError, match="`vision_tokenizer` is NoneType"):
        NextFlowGRPOTrainer(pipeline.transformer, low_codes, processing_class=pipeline.processor)
    with pytest.raises(TypeError, match="a reward is Linear"):
        make_trainer(tmp_path, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="low_codes', 'low_codes"):
        make_trainer(tmp_path, [low_codes, low_codes])


def test_a_reference_that_follows(tmp_path):
    """With `sync_ref_model` the reference becomes the policy after every second step, and the KL starts anew."""
    numbers = {"beta": 0.1, "max_steps": 4, "sync_ref_model": True, "ref_model_sync_steps": 2}
    trainer = make_trainer(tmp_path, **numbers, ref_model_mixup_alpha=1.0)
    trainer.train()
    kl = history(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-5 and kl[3] > 1e-5


def test_a_reference_that_follows_is_resumed(tmp_path, caplog):
    numbers = {"beta": 0.1, "max_steps": 4, "sync_ref_model": True, "ref_model_sync_steps": 2}
    numbers |= {"ref_model_mixup_alpha": 0.7}
    whole = make_trainer(tmp_path, **numbers, save_strategy="steps", save_steps=1)
    whole.train()
    for step in (2, 3):
        resumed = make_trainer(tmp_path, **numbers)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert history(whole, "kl") == history(resumed, "kl"), step
    os.remove(tmp_path / "checkpoint-3" / "reference.pt")  # as in checkpoints of version 0.1
    with caplog.at_level("WARNING", logger="nextflow_hf"):
        make_trainer(tmp_path, **numbers).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "reference.pt is missing" in caplog.text


def test_a_repository_brings_all_parts(tmp_path, caplog):
    toy_pipeline().save_pretrained(tmp_path / "model")
    numbers = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "report_to": "none"}
    args = NextFlowGRPOConfig(**numbers, model_init_kwargs={"dtype": "bfloat16"})
    rows = Dataset.from_list([{"prompt": "a"}])
    trainer = NextFlowGRPOTrainer(str(tmp_path / "model"), low_codes, args, rows)
    assert trainer.model.dtype == torch.bfloat16 and args.model_init_kwargs == {"dtype": "bfloat16"}
    assert "ignored" not in caplog.text  # as TRL says of options for a model that is there already
    trainer = NextFlowGRPOTrainer(str(tmp_path / "model"), low_codes, NextFlowGRPOConfig(**numbers), rows)
    assert trainer.model.dtype == torch.float32
    with pytest.raises(ValueError, match="`model_init_kwargs`"):
        make_trainer(tmp_path, model_init_kwargs={"dtype": "bfloat16"})


def test_a_reward_by_its_hub_id(tmp_path):
    trainer = make_trainer(tmp_path, ["openai/clip-vit-base-patch32", low_codes])
    assert trainer.reward_func_names == ["clip-vit-base-patch32", "low_codes"]


def test_fsdp_of_version_1_is_refused(tmp_path, monkeypatch):
    made = GRPOTrainer.__init__

    def sharded(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(GRPOTrainer, "__init__", sharded)
    with pytest.raises(ValueError, match="`fsdp`"):
        make_trainer(tmp_path)


def test_columns_cannot_hide_what_rewards_are_told(tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "codes": 1}] * 8)
    with pytest.raises(ValueError, match=r"columns \['codes'\]"):
        make_trainer(tmp_path, rows=rows).train()


@pytest.mark.parametrize(
    "rows, match",
    [
        ([{"text": "a"}], "`prompt` of sample 0 is missing, .*{'text': 'a'}"),
        ([{"prompt": None, "id": 3}, {"prompt": "b", "id": 4}], "`prompt` of sample 0 is None, .*{'id': 3}"),
        ([{"prompt": 5}], "`prompt` of sample 0 is 5, expected a text or messages"),
        ([{"prompt": []}], r"`prompt` of sample 0 is \[\]"),
        ([{"prompt": ["a", "b"]}], r"`prompt` of sample 0 is \['a', 'b'\]"),
        ([{"prompt": [{"role": "user"}]}], r"`prompt` of sample 0 is \[{'role': 'user'}\]"),
        ([{"prompt": [{"role": "user", "content": None}]}], "'content': None"),
    ],
)
def test_rows_without_a_prompt_are_named(tmp_path, rows, match):
    with pytest.raises(ValueError, match=match) as error:
        make_trainer(tmp_path, rows=Dataset.from_list(rows * 8), shuffle_dataset=False).train()
    assert "\n" not in str(error.value)


def test_the_reward_that_raises_is_named(tmp_path):
    def breaks(images, **columns):
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as error:
        make_trainer(tmp_path, breaks).train()
    assert error.value.__notes__ == ["It was raised by the reward 'breaks'"]
    with pytest.raises(ValueError, match="the reward 'breaks' returned float, expected a list"):
        make_trainer(tmp_path, functools.wraps(breaks)(lambda **columns: 1.0)).train()


@pytest.mark.parametrize(
    "shape, match", [((3,), r"shape \(3,\), expected \(height"), ((4, 4), r"shape \(4, 4\), expected \(8, 8\) as")]
)
def test_masks_of_another_shape_are_named(tmp_path, shape, match):
    def reports(images, report_masks, **columns):
        if len(shape) == 2:
            report_masks([None, *[np.ones((8, 8))] * 7])
        report_masks([None, *[np.ones(shape)] * 7])

    with pytest.raises(ValueError, match=f"the mask of sample 1 has the {match}"):
        make_trainer(tmp_path, reports, mask_propagation=True).train()


def test_contract_with_the_installed_trl(monkeypatch, tmp_path):
    grpo_contract.check_trl_methods()
    for name in grpo_contract.METHODS:
        with monkeypatch.context() as patch:
            patch.setattr(GRPOTrainer, name, lambda self, something_else: None)
            with pytest.raises(ImportError, match=f"GRPOTrainer.{name} with the parameters"):
                grpo_contract.check_trl_methods()

    class Moved:
        pass

    with pytest.raises(ImportError, match="Moved._generate_and_score_completions with the parameters None"):
        grpo_contract.check_trl_methods(Moved)
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert [name for name in grpo_contract.ATTRIBUTES if not hasattr(trainer, name)] == []
    del trainer._pending_metrics
    with pytest.raises(ImportError, match="without \\['_pending_metrics'\\]"):
        grpo_contract.check_trl_attributes(trainer)


def test_all_that_is_private_in_trl_is_in_the_contract():
    """Attributes of `self` in our trainer that neither ours nor transformers' defines."""
    tree = ast.parse(inspect.getsource(grpo_trainer))
    of_self = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    ]  # fmt: skip
    ours = set(vars(NextFlowGRPOTrainer)) | {"_train_sampler", "pipeline", "reward_calls", "watch"}
    transformers = {
        "accelerator",
        "add_callback",
        "args",
        "callback_handler",
        "is_deepspeed_enabled",
        "is_fsdp_enabled",
    }
    transformers |= {"model", "model_wrapped", "state"}
    used = {node.attr for node in of_self} - ours - transformers
    assert used == {*grpo_contract.ATTRIBUTES, "_calculate_rewards"}
