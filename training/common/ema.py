"""For any `Trainer`: methods around each step, and an average of the weights that is evaluated and saved."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from transformers import Trainer, TrainerCallback

from .checkpoints import StagedCheckpointsMixin
from .finite_steps import FiniteStepsMixin
from .processes import seed_process


class StepCallback(TrainerCallback):
    """
    Calls the trainer's methods of the same names, without arguments: `Trainer` itself has none around a step. When a
    training begins it gives each process random numbers of its own.

    Args:
        trainer (`Trainer` with [`AveragedWeightsMixin`]): Its `args`, `state` and `control` are those of the event.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, *_, **__) -> None:
        seed_process(args)  # for noise

    def on_epoch_begin(self, *_, **__) -> None:
        self.trainer.on_epoch_begin()

    def on_step_begin(self, *_, **__) -> None:
        self.trainer.on_step_begin()

    def on_optimizer_step(self, *_, **__) -> None:
        self.trainer.on_optimizer_step()

    def on_step_end(self, *_, **__) -> None:
        self.trainer.on_step_end()


class AveragedWeightsMixin(FiniteStepsMixin, StagedCheckpointsMixin):
    """
    Before `Trainer` among the bases of a trainer: where `args.ema_decay` is set, `ema` is an exponential moving
    average of the weights. A saved model has the average, a checkpoint the raw weights with the average beside them.
    """

    state_name: str  # file in a checkpoint with what `own_state` returns

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ema = None
        if self.args.ema_decay is not None:
            if not 0 <= self.args.ema_decay < 1:
                raise ValueError(f"ema_decay is {self.args.ema_decay}, expected at least 0 and less than 1")
            parameters = self.averaged_parameters
            # With warmup: a fixed decay would hold on to the initial weights for thousands of steps.
            self.ema = EMAModel(parameters, decay=self.args.ema_decay, use_ema_warmup=True, power=0.75)
        self.add_callback(StepCallback(self))

    @property
    def averaged_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of the moving average, in a fixed order."""
        return list(self.accelerator.unwrap_model(self.model).parameters())

    def on_epoch_begin(self) -> None:
        """Called before each epoch."""

    def on_step_begin(self) -> None:
        """Called before each step of the optimizer."""

    def on_optimizer_step(self) -> None:
        """Called after the optimizer's step, before gradients are cleared."""

    def on_step_end(self) -> None:
        """Called after each step; a subclass changes weights before it calls this."""
        if self.ema is not None:
            self.ema.step(self.averaged_parameters)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with the averaged weights, where there is an average."""
        if self.ema is None:
            yield
            return
        parameters = self.averaged_parameters
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the averaged weights where there are some; a checkpoint (an internal call) has the raw ones."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        with self.averaged_weights():
            super().save_model(output_dir)

    def _load_best_model(self) -> None:
        # With its average, which is what was evaluated, and in whatever format a subclass saves.
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides what `Trainer` does, as `torch.load(weights_only=True)` reads it."""
        return {"ema": None if self.ema is None else self.ema.state_dict()}

    def load_own_state(self, state: dict[str, Any], path: str) -> None:
        """
        Continue from the [`~AveragedWeightsMixin.own_state`] of the file `path`. Raises `ValueError` where the average
        was begun or left out since.
        """
        if (state["ema"] is None) != (self.ema is None):
            held = "no average" if state["ema"] is None else "an average"
            raise ValueError(f"{path} has {held} of the weights (ema), but ema_decay is {self.args.ema_decay}")
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.args.device)

    def save_own_state(self, folder: str) -> None:
        """Write what [`~AveragedWeightsMixin.own_state`] returns into a checkpoint."""
        if self.args.should_save:
            torch.save(self.own_state(), os.path.join(folder, self.state_name))

    def load_weights(self, folder: str, model: torch.nn.Module | None) -> None:
        """The raw weights of a checkpoint; a subclass whose model is saved in another format overrides this."""
        super()._load_from_checkpoint(folder, model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.load_weights(resume_from_checkpoint, model)
        path = os.path.join(resume_from_checkpoint, self.state_name)
        # By its kind: PyTorch restores nothing to "cpu:0", the device of several processes on CPUs.
        state = torch.load(path, weights_only=True, map_location=self.args.device.type)
        self.load_own_state(state, path)
