"""A checkpoint that is there whole or not at all, whatever kills the process that writes it. For any `Trainer`.

`Trainer` writes into `checkpoint-N` file by file and resumes from the highest N. Here it writes into a folder that
nothing resumes from; the finished checkpoint is then flushed to the disk and moved to its place by one rename.
"""

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints


STAGING_FOLDER = "unfinished-checkpoint"
STATE_FILE = "trainer_state.json"


class StagedCheckpoint:
    """
    Context in which `trainer` writes its checkpoint into `folder`; at its end the checkpoint is moved to `run_dir`.

    Args:
        trainer (`Trainer` with [`StagedCheckpointsMixin`]): All processes of it must come here.
        run_dir (`str`): Where the checkpoints are.
    """

    def __init__(self, trainer: "StagedCheckpointsMixin", run_dir: str):
        self.trainer = trainer
        self.run_dir = run_dir
        self.folder = os.path.join(run_dir, STAGING_FOLDER)
        name = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        self.source, self.target = os.path.join(self.folder, name), os.path.join(run_dir, name)

    def __enter__(self) -> "StagedCheckpoint":
        if self.trainer.args.should_save:
            shutil.rmtree(self.folder, ignore_errors=True)  # of a process that was killed
        self.trainer.accelerator.wait_for_everyone()
        self.trainer._staged_checkpoint = self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        trainer = self.trainer
        trainer._staged_checkpoint = None
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):  # safetensors and torch have their own
            shutil.rmtree(self.folder, ignore_errors=True)  # what was written may be what fills the disk
            last = get_last_checkpoint(self.run_dir)
            raise OSError(
                f"{self.target} could not be written ({type(error).__name__}: {error}); the disk has "
                f"{shutil.disk_usage(self.run_dir).free / 1e9:.1f} GB free. "
                + (f"The last checkpoint, {last}, is complete" if last else "There is no checkpoint before it")
            ) from error
        if error is not None:
            return
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            self._move()
            rotate_checkpoints(
                output_dir=self.run_dir,
                save_total_limit=trainer.args.save_total_limit,
                best_model_checkpoint=trainer.state.best_model_checkpoint,
                use_mtime=True,
            )
        trainer.accelerator.wait_for_everyone()

    def _move(self) -> None:
        state = self.trainer.state
        if state.best_global_step == state.global_step:  # `Trainer` named it where it was written
            state.best_model_checkpoint = self.target
            state.save_to_json(os.path.join(self.source, STATE_FILE))
        for path in [*Path(self.source).rglob("*"), Path(self.source)]:
            _flush(path)
        if os.path.isdir(self.target):  # of an earlier run that went on from further back
            shutil.rmtree(self.target)
        os.replace(self.source, self.target)
        os.rmdir(self.folder)
        _flush(Path(self.run_dir))


class StagedCheckpointsMixin:
    """Before `Trainer` among the bases of a trainer: its checkpoints are written by [`StagedCheckpoint`]."""

    _staged_checkpoint: StagedCheckpoint | None = None

    def save_own_state(self, folder: str) -> None:
        """What a subclass has to keep besides what `Trainer` does; every process comes here, the folder exists."""

    def _get_output_dir(self, trial) -> str:
        # While a checkpoint is written this is where `Trainer` puts it.
        return super()._get_output_dir(trial) if self._staged_checkpoint is None else self._staged_checkpoint.folder

    def _save_checkpoint(self, model, trial) -> None:
        with StagedCheckpoint(self, super()._get_output_dir(trial)):
            os.makedirs(self._staged_checkpoint.source, exist_ok=True)
            self.save_own_state(self._staged_checkpoint.source)
            super()._save_checkpoint(model, trial)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The checkpoint to go on from, None at the first start."""
    return get_last_checkpoint(str(folder)) if os.path.isdir(folder) else None


__all__ = ["StagedCheckpoint", "StagedCheckpointsMixin", "last_checkpoint"]
