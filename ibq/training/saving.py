"""What outlives a run's process: its checkpoints, from which it goes on, and its best weights."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

from ibq import dist
from ibq.config import UserError
from ibq.files import recover_folder
from ibq.meeting import number
from ibq.progress import say
from ibq.training.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    CheckpointWriter,
    TrainingState,
    find_checkpoint,
    load_checkpoint,
)
from ibq.training.metrics import RunLog
from ibq.training.run_data import RunData
from ibq.training.stopping import write_status
from ibq.training.task import Task

LEAD = "IBQ_WARNING_S"  # seconds before the limit at which the launcher has Slurm warn the ranks


class StoppedError(UserError):
    """The run has ended, but its last checkpoint could not be written."""


class Saver:
    """Saves a run, and takes it up again; every rank calls the same methods.

    `state` is the run's, which the steps change: a checkpoint holds it, and `resume` brings it back. `mark` is told
    what begins.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        task: Task,
        data: RunData,
        state: TrainingState,
        log: RunLog,
        total_steps: int,
        mark: Callable[[str], None],
    ):
        self.folder, self.config, self.total_steps = folder, config, total_steps
        self.unsaved = ""  # why the last checkpoint could not be written
        self._task, self._data, self._state, self._log, self._mark = task, data, state, log, mark
        self._writer = CheckpointWriter(folder / "checkpoints", config, data.device)
        self._saved: tuple[int, bool] | None = None  # step of the last checkpoint, and whether it waits for validation
        self._saving: tuple[int, bool] | None = None  # the same of the one that is being written
        self._began = 0.0  # when that was begun
        self._lead = number(LEAD) if LEAD in os.environ else None

    def resume(self) -> bool:
        """Continue from the last checkpoint; whether there is one."""
        self._mark("resume")
        if dist.is_main():
            recover_folder(self.folder / "best")
        path = find_checkpoint(self.folder / "checkpoints")
        if path is None:
            return False
        saved, tensors = load_checkpoint(path, self._task.engines)
        self._task.load_rank_tensors(tensors)
        self._log.means.load_tensors(tensors)
        saved.position = self._data.resume_position(saved)
        saved.order = self._state.order
        for field in fields(saved):
            setattr(self._state, field.name, getattr(saved, field.name))
        self._saved = self._now()
        self._log.bad_samples.resume(saved.step, saved.bad_samples)
        return True

    def _now(self) -> tuple[int, bool]:
        return self._state.step, self._state.validation_pending

    def is_saved(self) -> bool:
        """Whether the last checkpoint holds the state as it is."""
        return self._saved == self._now()

    def last_saved(self) -> str:
        """Where the next start goes on."""
        return "it begins anew" if self._saved is None else f"it goes on from step {self._saved[0]}"

    def prepare(self) -> None:
        """Take what checkpoints need, after a first step."""
        self._writer.prepare(self._task.engines)

    def save(self) -> None:
        """Write a checkpoint, or begin to."""
        self.finish()
        self._mark("save")
        self._log.reduce_bad_samples()
        self._state.bad_samples = dict(self._log.bad_samples.by_epoch)
        tensors = self._task.rank_tensors() | self._log.means.tensors()
        self._saving, self._began = self._now(), time.monotonic()
        with self._log.besides_steps():
            try:
                self._writer.save(self._task.engines, tensors, self._state)
            except CheckpointError as error:
                self._not_saved(str(error))
        if not self._writer.asynchronous:
            self.finish()

    def finish(self, wait: bool = True) -> None:
        """Put the checkpoint that is being written in its place, if it is ready or else `wait`."""
        with self._log.besides_steps():
            try:
                done = self._writer.wait() if wait else self._writer.poll()
            except CheckpointError as error:
                self._not_saved(str(error))
                return
        if done:
            self._saved, self.unsaved = self._saving, ""
            seconds = time.monotonic() - self._began
            write_status(self.folder, "running", self._saved[0], self.total_steps, save_seconds=seconds)
            self._compare_with_lead(seconds)

    def _compare_with_lead(self, seconds: float) -> None:
        """Say once if a checkpoint takes longer than what is left when the ranks are told of the time limit."""
        if self._lead is None or seconds <= self._lead:
            return
        if dist.is_main():
            say(
                f"WARNING: the checkpoint of step {self._saved[0]} took {seconds:.0f} s, but Slurm warns only "
                f"{self._lead} s before the limit: raise --signal=...@{self._lead} (launchers/slurm.py: --signal-s)"
            )
        self._lead = None

    def save_best(self, info: Mapping) -> bool:
        """Write the averaged weights as the best so far; whether they could be written."""
        self._mark("save best")
        try:
            self._task.save_pretrained(self.folder / "best", info)
        except CheckpointError as error:
            self._not_saved(f"{self.folder / 'best'}: {error}")
            return False
        return True

    def _not_saved(self, reason: str) -> None:
        """Say so, and go on or stop as the config says."""
        self.unsaved = reason
        what = f"the checkpoint of step {self._state.step} could not be written ({reason})"
        if self.config.on_error == "stop":
            raise StoppedError(f"{what}; make room and start the same command again: {self.last_saved()}")
        if dist.is_main():
            kept = "there is none yet" if self._saved is None else f"the one of step {self._saved[0]} is kept"
            say(f"WARNING: {what}; {kept}, training goes on and tries again at the next save")
