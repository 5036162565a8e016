"""TRL's `SFTTrainer` and transformers' own `Trainer` train our objective, or refuse what would be another one."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from test_trainer import ROWS
from toy import PAD, toy_model
from toy_pipeline import toy_pipeline
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from nextflow_hf import NextFlowForConditionalGeneration
from nextflow_hf.modeling_nextflow import modeling_nextflow
from nextflow_hf.training.data.collator import NextFlowDataCollator
from nextflow_hf.training.transformer.adapters import VISION_TOKENIZER
from nextflow_hf.training.transformer.trainer import NextFlowTrainer


OPTIONS = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "max_steps": 1,
    "per_device_train_batch_size": 2, "save_strategy": "no", "bf16": False,
    "train_sampling_strategy": "sequential",
}  # fmt: skip
COLORS = ["red", "blue", "green", "black"]
LORA = {
    "target_modules": ["q_proj", "connector.linear_1"], "init_lora_weights": False,
    "exclude_modules": VISION_TOKENIZER,
}  # fmt: skip


def gradients_of(trainer: type[Trainer]) -> type[Trainer]:
    """The trainer, which keeps the gradients of its last step as they are before they are clipped."""

    class Recording(trainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            self.gradients = {
                name.removeprefix("base_model.model."): parameter.grad.clone()
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None
            }
            return loss

    return Recording


@pytest.fixture(scope="module")
def pipe():
    return toy_pipeline()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    pipe.transformer.save_pretrained(folder)
    pipe.processor.save_pretrained(folder)
    pipe.vision_tokenizer.save_pretrained(folder / "vision_tokenizer")
    return folder


def vision_rows(kind: str) -> Dataset:
    rows = []
    for index, color in enumerate(COLORS):
        user = [{"role": "user", "content": "what is it" + "?" * index}]
        assistant = [{"role": "assistant", "content": f"it is {color}"}]
        messages = (
            {"prompt": user, "completion": assistant} if kind == "completion" else {"messages": user + assistant}
        )
        rows.append({**messages, "images": [Image.new("RGB", (16, 16), color)]})
    return Dataset.from_list(rows)


def sft(folder, pipe, tmp_path, rows, *, peft_config=None, trainer_options=None, **options) -> SFTTrainer:
    torch.manual_seed(0)
    return gradients_of(SFTTrainer)(
        model=NextFlowForConditionalGeneration.from_pretrained(folder),
        args=SFTConfig(output_dir=str(tmp_path), **{**OPTIONS, **options}),
        train_dataset=rows,
        processing_class=pipe.processor,
        peft_config=peft_config,
        **(trainer_options or {}),
    )


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["all", "assistant", "completion"])
def test_sft_with_images_equals_our_trainer_on_the_same_rows(folder, pipe, tmp_path, kind, adapter):
    peft_config = LoraConfig(**LORA) if adapter else None
    theirs = sft(
        folder, pipe, tmp_path, vision_rows(kind), peft_config=peft_config, assistant_only_loss=kind == "assistant"
    )
    weights = {name: value.clone() for name, value in theirs.model.state_dict().items()}
    theirs.train()
    model = NextFlowForConditionalGeneration.from_pretrained(folder)
    model = get_peft_model(model, LoraConfig(**LORA)) if adapter else model
    model.load_state_dict(weights)
    ours = gradients_of(NextFlowTrainer)(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), remove_unused_columns=False, **OPTIONS),
        data_collator=theirs.data_collator,
        train_dataset=vision_rows(kind),
    )
    ours.train()
    logs, own = theirs.state.log_history[0], ours.state.log_history[0]
    assert logs["loss"] == pytest.approx(own["loss"], rel=1e-6)
    assert ("image_loss" in own) == (kind == "all")  # elsewhere images are read, not drawn
    assert theirs.gradients.keys() == ours.gradients.keys() and any("lora" in n for n in ours.gradients) == adapter
    for name, gradient in ours.gradients.items():
        torch.testing.assert_close(theirs.gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_sft_refuses_an_adapter_of_the_frozen_vision_tokenizer(folder, pipe, tmp_path):
    for config in (LoraConfig(r=2), LoraConfig(r=2, target_modules=["q_proj"])):
        trainer = sft(folder, pipe, tmp_path, vision_rows("all"), peft_config=config)
        with pytest.raises(ValueError, match=r"parameters of the frozen .*lora_A.* exclude_modules=") as error:
            trainer.train()
        assert VISION_TOKENIZER in str(error.value)


@pytest.mark.parametrize("joint", [False, True])
def test_sft_reports_entropy_and_accuracy_of_what_is_predicted(folder, pipe, tmp_path, joint):
    trainer = sft(folder, pipe, tmp_path, vision_rows("all"))
    model = trainer.model.eval()
    model.config.joint_image_loss = joint
    batch = next(iter(trainer.get_train_dataloader()))
    scores = model(**batch, fused_lm_head=True)
    codes = model.get_image_tokens(batch["pixel_values"], batch["image_grids"])
    targets, weights, scale = model.get_targets(batch["input_ids"], batch["labels"], codes, batch["image_grids"])
    logits = model(**batch).logits
    first, last = model.config.text_vocab_size, model.config.text_vocab_size + model.config.codebook_size
    is_code = (scale > 0)[..., None] & (not joint)
    outside = (torch.arange(logits.shape[-1]) < first) | (torch.arange(logits.shape[-1]) >= last)
    log_probs = logits.masked_fill(is_code & outside, -torch.inf).log_softmax(-1)
    mask = targets != -100
    assert torch.equal(scores.label_mask, mask) and len(set(scale[mask].tolist())) == 5
    expected = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * weights
    torch.testing.assert_close(scores.log_probs, expected.where(mask, torch.zeros(())))
    entropy = torch.distributions.Categorical(probs=log_probs.exp()).entropy()
    torch.testing.assert_close(scores.entropy, entropy.where(mask, torch.zeros(())), rtol=1e-4, atol=1e-4)
    assert torch.equal(scores.is_top1.bool(), (log_probs.argmax(-1) == targets) & mask)
    torch.testing.assert_close(scores.loss, model(**batch).loss)


@pytest.mark.parametrize(
    ("options", "trainer_options", "named"),
    [
        ({"loss_type": "dft"}, {}, "loss_type='nll'"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
        ({}, {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.mean()}, "compute_loss_func"),
    ],
    ids=["dft", "label_smoothing_factor", "compute_loss_func"],
)
def test_sft_with_another_loss_is_refused_by_name(folder, pipe, tmp_path, options, trainer_options, named):
    trainer = sft(folder, pipe, tmp_path, vision_rows("all"), trainer_options=trainer_options, **options)
    with pytest.raises(ValueError, match=named):
        trainer.train()


def test_sft_cuts_no_image_in_two(folder, pipe, tmp_path):
    with pytest.raises(ValueError, match="nothing is cut from a row with images"):
        sft(folder, pipe, tmp_path, vision_rows("all"), max_length=20).train()


def test_sft_on_the_transformer_alone_asks_for_the_class_with_a_tokenizer(pipe, tmp_path):
    trainer = SFTTrainer(
        model=pipe.transformer,
        args=SFTConfig(output_dir=str(tmp_path), **OPTIONS),
        train_dataset=vision_rows("all"),
        processing_class=pipe.processor,
    )
    with pytest.raises(ValueError, match="NextFlowForConditionalGeneration"):
        trainer.train()


def test_sft_packs_text(folder, pipe, tmp_path):
    rows = Dataset.from_list([{"text": "a red dog"}, {"text": "two"}, {"text": "three cats"}])
    losses = []
    for options in ({"per_device_train_batch_size": 3}, {"packing": True, "max_length": 64}):
        trainer = sft(folder, pipe, tmp_path, rows, gradient_checkpointing=False, **options)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_sft_evaluates_the_same_loss(folder, pipe, tmp_path):
    trainer = sft(folder, pipe, tmp_path, vision_rows("all"), trainer_options={"eval_dataset": vision_rows("all")})
    batch = trainer.data_collator(list(vision_rows("all")))
    expected = trainer.model.eval()(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


# --- transformers' own trainer


def plain(kind: type[Trainer], tmp_path, **options) -> Trainer:
    args = TrainingArguments(output_dir=str(tmp_path), **{**OPTIONS, **options})
    collator = NextFlowDataCollator(pad_token_id=PAD)
    return gradients_of(kind)(
        model=toy_model(), args=args, data_collator=collator, train_dataset=ROWS, eval_dataset=ROWS
    )


def test_the_plain_trainer_has_our_loss(tmp_path):
    logs, gradients = [], []
    for kind in (NextFlowTrainer, Trainer):
        trainer = plain(kind, tmp_path, per_device_train_batch_size=4)
        trainer.train()
        logs.append(trainer.state.log_history[0])
        gradients.append(trainer.gradients)
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_the_plain_trainer_accumulates_means_of_micro_batches(tmp_path):
    trainer = plain(Trainer, tmp_path, gradient_accumulation_steps=2)
    model, collator = toy_model().train(), NextFlowDataCollator(pad_token_id=PAD)
    loss = sum(model(**collator(rows)).loss for rows in (ROWS[:2], ROWS[2:])) / 2
    loss.backward()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trainer.gradients[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_the_plain_trainer_evaluates(tmp_path):
    """transformers takes every parameter of `forward` with "label" in its name as one that each batch must have."""
    trainer = plain(Trainer, tmp_path, per_device_eval_batch_size=4)
    expected = toy_model()(**NextFlowDataCollator(pad_token_id=PAD)(ROWS)).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_the_plain_trainer_keeps_the_columns_of_the_objective(folder, tmp_path):
    """Self-correction's targets are a column, which transformers drops where `forward` does not name it."""
    for model in (toy_model(), NextFlowForConditionalGeneration.from_pretrained(folder)):
        trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), **OPTIONS))
        trainer._set_signature_columns_if_needed()
        assert set(ROWS[0]) - {"length"} <= set(trainer._signature_columns)


def test_a_loss_made_of_logits_is_warned_of(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(modeling_nextflow.logger, "warning_once", warnings.append)
    plain(Trainer, tmp_path).train()
    assert not warnings
    plain(Trainer, tmp_path, label_smoothing_factor=0.1).train()
    assert "label_smoothing_factor" in warnings[0]
