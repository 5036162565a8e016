"""Trainings that may be killed or stopped at any moment: the same command resumes them. For any `Trainer`.

`Trainer` writes into `checkpoint-N` file by file and resumes from the highest N. Here it writes into a folder that
nothing resumes from; the finished checkpoint is then flushed to the disk and moved to its place by one rename.
`trainer_state.json` beside the checkpoints is written last: a run that has it is finished.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

from ...atomic import flush, flush_tree, replaced_folder, write_file
from .loss_plot import PLOT_FILE, LossPlotCallback
from .processes import ProcessesMixin


logger = logging.get_logger(__name__)

STAGING_FOLDER = "unfinished-checkpoint"
STATE_FILE = "trainer_state.json"
SECONDS = "train_seconds"


class StagedCheckpointsMixin(ProcessesMixin):
    """
    Before `Trainer` among the bases of a trainer: its checkpoints are written beside their place and moved there, a
    saved model replaces an older one as a whole, and nothing is trained after the last step. What is resumed reads the
    rows in the order that it had ([`ProcessesMixin`]).
    """

    _staging_folder: str | None = None  # while a checkpoint is written

    def save_own_state(self, folder: str) -> None:
        """Write what a subclass keeps besides what `Trainer` does. Every process calls this; the folder exists."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer`'s method; the result replaces an older one as a whole."""
        if _internal_call:  # into a checkpoint
            super().save_model(output_dir, _internal_call=True)
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        with replaced_folder(folder, writes=self.args.should_save, wait=self.accelerator.wait_for_everyone) as staging:
            super().save_model(str(staging))

    def save_state(self) -> None:
        """`Trainer`'s method, whose file replaces an older one as a whole."""
        if self.is_world_process_zero():
            write_file(Path(self.args.output_dir, STATE_FILE), self.state.save_to_json)

    def _get_output_dir(self, trial) -> str:
        return self._staging_folder or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        with self._staged(super()._get_output_dir(trial)) as folder:
            os.makedirs(folder, exist_ok=True)
            self.save_own_state(folder)
            super()._save_checkpoint(model, trial)

    @contextmanager
    def _staged(self, run_dir: str) -> Iterator[str]:
        """The folder that the checkpoint of this step is written into, and is moved from to its place at the end."""
        staging, wait = os.path.join(run_dir, STAGING_FOLDER), self.accelerator.wait_for_everyone
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        source, target = os.path.join(staging, name), os.path.join(run_dir, name)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
        wait()
        # From here on `Trainer` writes there: `_get_output_dir` names it.
        self._staging_folder = staging
        try:
            yield source
        except (OSError, RuntimeError, SafetensorError) as error:  # safetensors and torch have their own
            shutil.rmtree(staging, ignore_errors=True)  # what was written may be what fills the disk
            last = get_last_checkpoint(run_dir)
            raise OSError(
                f"{target} could not be written ({type(error).__name__}: {error}); the disk has "
                f"{shutil.disk_usage(run_dir).free / 1e9:.1f} GB free. "
                + (f"The last checkpoint, {last}, is complete" if last else "There is no checkpoint before it")
            ) from error
        finally:
            self._staging_folder = None
        wait()
        if self.args.should_save:
            # Only now that every process has written its part.
            self._move_checkpoint(source, target)
            shutil.rmtree(staging)
            # Only now that the new checkpoint is in its place, so that one is always there.
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        wait()

    def _move_checkpoint(self, source: str, target: str) -> None:
        if self.state.best_global_step == self.state.global_step:  # `Trainer` named it where it was written
            self.state.best_model_checkpoint = target
            self.state.save_to_json(os.path.join(source, STATE_FILE))
        # To the disk before the rename: after a power failure a name may be there without the data.
        flush_tree(Path(source))
        if os.path.isdir(target):  # this run was resumed from further back
            os.rename(target, os.path.join(os.path.dirname(source), "replaced"))
        os.rename(source, target)
        flush(Path(target).parent)

    def _run_epoch(self, *args, **kwargs) -> None:
        # `Trainer` looks for the end after a step only, and would train on from the checkpoint of the last one.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The checkpoint to resume from; `None` at the first start."""
    return get_last_checkpoint(str(folder)) if os.path.isdir(folder) else None


def is_finished(args: TrainingArguments) -> bool:
    """Whether the run in `args.output_dir` has made all steps and has saved its result; if so, says it."""
    path = Path(args.output_dir, STATE_FILE)
    if not path.is_file():
        return False
    state = TrainerState.load_from_json(str(path))
    is_finished = state.global_step >= args.max_steps if args.max_steps > 0 else state.epoch >= args.num_train_epochs
    if is_finished and args.process_index == 0:
        logger.warning(f"{args.output_dir} is finished after {state.global_step} steps: nothing to do")
    return is_finished


def train_to_the_end(trainer: Trainer, checkpoint: str | None, save: Callable[[], None]) -> None:
    """
    Train from `checkpoint` on, `save` the result, and note that the run is finished, for [`is_finished`].

    SIGTERM or Ctrl-C during the training ends it after a step, by `SystemExit` with the status that a shell gives,
    and a checkpoint that the same command resumes from. A second one of the same kind ends it at once.
    """
    callback = _StopOnSignal(trainer)
    trainer.add_callback(callback)
    trainer.add_callback(LossPlotCallback)
    trainer.add_callback(_Clock)
    with callback.handlers():
        trainer.train(resume_from_checkpoint=checkpoint)
    state = trainer.state
    if callback.signal and state.global_step < state.max_steps:
        if trainer.is_world_process_zero():
            logger.warning(
                f"stopped by {signal.Signals(callback.signal).name} after step {state.global_step} of "
                f"{state.max_steps}; {last_checkpoint(trainer.args.output_dir)} is complete, and the same command "
                "goes on from it"
            )
        raise SystemExit(128 + callback.signal)
    if state.global_step == 0:
        raise ValueError(
            "no step was made: there is no whole batch, and dataloader_drop_last leaves out a smaller one"
        )
    # The state comes last: with it the run counts as finished.
    save()
    trainer.save_state()
    if trainer.is_world_process_zero():
        logger.warning(f"{trainer.args.output_dir} is finished; its losses are plotted in {PLOT_FILE} there")


class _Clock(TrainerCallback):
    """Logs `train_seconds`: the duration of the training so far, over all its starts, without lost steps."""

    def on_train_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        before = 0.0 if state.global_step == 0 else next((e.get(SECONDS) for e in state.log_history[-1:]), None)
        # A run that was begun without this clock has no sum.
        self.began = None if before is None else time.perf_counter() - before

    def on_log(self, args, state: TrainerState, control: TrainerControl, logs=None, **kwargs) -> None:
        if self.began is not None:
            state.log_history[-1][SECONDS] = round(time.perf_counter() - self.began, 1)


class _StopOnSignal(TrainerCallback):
    """
    Saves and stops after the step in which a signal came, of whichever process.

    transformers' `enable_jit_checkpoint` waits three seconds, saves between the backward pass and the optimizer's step
    (which then reads its random numbers twice), and lets each process decide for itself.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.signal = 0

    @contextmanager
    def handlers(self):
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        self._previous = previous
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        # Not with several: launchers forward a signal that the terminal has sent to every process, which is no second.
        if self.trainer.args.world_size == 1:
            signal.signal(number, self._previous[number])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.world_size > 1:
            # Signals reach processes at different times. If one stopped alone, the others would wait for it forever.
            everyone = self.trainer.accelerator.gather(torch.tensor([self.signal], device=args.device))
            self.signal = int(everyone.max())
        if self.signal:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.signal:
            control.should_training_stop = True
