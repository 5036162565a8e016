"""The average of the weights that trainers share: saved, resumed, and stepped after what a trainer does itself."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from nextflow_hf.training.common.ema import AveragedWeightsMixin


class Line(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.post_init()

    def forward(self, x):
        return {"loss": (self.weight * x).square().mean()}


@dataclass
class Arguments(TrainingArguments):
    ema_decay: float | None = None


class LineTrainer(AveragedWeightsMixin, Trainer):
    state_name = "line.pt"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.events = []

    def on_epoch_begin(self):
        self.events.append("epoch")

    def on_step_begin(self):
        self.events.append(f"begin {self.state.global_step}")

    def on_optimizer_step(self):
        self.events.append("optimizer")

    def on_step_end(self):
        self.events.append(f"end {self.state.global_step}")
        super().on_step_end()


@pytest.fixture
def make_trainer(tmp_path):
    def make(name: str, ema_decay: float | None = 0.5, eval_dataset=None, **options) -> LineTrainer:
        options = {"save_steps": 2, **options}
        args = Arguments(
            str(tmp_path / name), max_steps=4, learning_rate=0.1, ema_decay=ema_decay, use_cpu=True,
            per_device_train_batch_size=1, report_to="none", disable_tqdm=True, **options,
        )  # fmt: skip
        torch.manual_seed(0)
        rows = [{"x": torch.randn(3)} for _ in range(4)]
        return LineTrainer(Line(PretrainedConfig()), args, train_dataset=rows, eval_dataset=eval_dataset)

    return make


def test_the_trainer_is_called_around_each_step(make_trainer):
    trainer = make_trainer("run")
    trainer.train()
    steps = [[f"begin {step}", "optimizer", f"end {step + 1}"] for step in range(4)]
    assert trainer.events == ["epoch", *sum(steps, [])]


def test_the_average_is_saved_and_goes_on_from_a_checkpoint(make_trainer, tmp_path):
    whole, again = make_trainer("whole"), make_trainer("again")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    (average,), (resumed,) = whole.ema.shadow_params, again.ema.shadow_params
    assert torch.equal(average, resumed) and not torch.equal(average, whole.model.weight.data)
    raw = whole.model.weight.clone()
    whole.save_model()
    assert torch.equal(load_file(tmp_path / "whole/model.safetensors")["weight"], average)
    assert torch.equal(load_file(tmp_path / "whole/checkpoint-4/model.safetensors")["weight"], raw)
    assert torch.equal(whole.model.weight, raw)


def test_the_best_model_is_the_average_that_was_evaluated(make_trainer, tmp_path, monkeypatch):
    evaluated = {}

    def evaluate(trainer, *args, **kwargs):
        step = trainer.state.global_step
        with trainer.averaged_weights():
            evaluated[step] = trainer.model.weight.detach().clone()
        return {"eval_loss": float(step != 2)}

    monkeypatch.setattr(LineTrainer, "_evaluate", evaluate)
    trainer = make_trainer(
        "best", save_steps=1, eval_steps=1, eval_strategy="steps", load_best_model_at_end=True, eval_dataset=[]
    )
    trainer.train()
    trainer.save_model()
    assert trainer.state.best_global_step == 2
    assert torch.equal(load_file(tmp_path / "best/model.safetensors")["weight"], evaluated[2])


@pytest.mark.parametrize("saved, wanted", [(0.5, None), (None, 0.5)])
def test_a_checkpoint_with_another_average_is_refused(make_trainer, tmp_path, saved, wanted):
    make_trainer("saved", saved).train()
    with pytest.raises(ValueError, match=f"of the weights .ema., but ema_decay is {wanted}"):
        make_trainer("other", wanted).train(resume_from_checkpoint=str(tmp_path / "saved/checkpoint-2"))


@pytest.mark.parametrize("decay", [1.5, -0.1, float("nan")])
def test_an_average_that_would_grow_is_refused(make_trainer, decay):
    with pytest.raises(ValueError, match="ema_decay is .*, expected at least 0 and less than 1"):
        make_trainer("run", decay)
