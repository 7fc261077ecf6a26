"""The training loop of both stages: it knows tasks, never models."""

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ibq import dist
from ibq.config import UserError
from ibq.engine.base import Engine
from ibq.engine.heartbeat import Heartbeat, HeartbeatConfig
from ibq.files import recover_folder, write_text
from ibq.progress import progress_bar, say
from ibq.training import provenance
from ibq.training.bad_samples import BadSamples
from ibq.training.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    CheckpointWriter,
    TrainingState,
    find_checkpoint,
    load_checkpoint,
)
from ibq.training.metrics import MetricLogger, RunningMeans, Stopwatch, peak_memory_gib
from ibq.training.run_data import RunData
from ibq.training.startup import StartUp
from ibq.training.stopping import StopSignals, write_status

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch and rhythm of a run."""

    epochs: int | None = None  # give either epochs or max_steps
    max_steps: int | None = None
    batch_size: int = 256  # global
    micro_batch: int = 4  # per rank; accumulation follows from the world size
    log_every: int = 50
    validate_every: int | None = 5_000  # and at the end; null never validates, and keeps no best weights
    validation_images: int | None = None  # the first so many; None takes all
    max_bad_steps: int = 20  # skipped steps (non-finite loss or gradient) in a row before the run stops

    def __post_init__(self):
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("epochs: give exactly one of `epochs` and `max_steps`")
        for name in ("epochs", "max_steps", "batch_size", "micro_batch", "log_every", "validate_every",
                     "validation_images", "max_bad_steps"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")

    def validates_after(self, step: int, total_steps: int) -> bool:
        """Whether the run validates after so many steps."""
        return self.validate_every is not None and (step % self.validate_every == 0 or step == total_steps)

    def total_steps(self, steps_per_epoch: float) -> int:
        """Optimizer steps of the whole run: enough for every sample of every epoch."""
        return self.max_steps if self.max_steps is not None else math.ceil(self.epochs * steps_per_epoch)


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """One step of a task: detached scalars, and whether the update was skipped because something was not finite."""

    metrics: dict[str, Tensor]
    skipped: bool


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A task's figures on the validation set; the checkpoint with the highest score is the best."""

    metrics: dict[str, float]
    score: float
    images: dict[str, Tensor] = field(default_factory=dict)  # uint8 grids [rows, columns, 3, H, W]


class Task(Protocol):
    """What is trained."""

    engines: dict[str, Engine]

    def step(self, step: int, batches: list[Batch], stopwatch: Stopwatch) -> StepOutcome:
        """Train on the micro-batches of one step."""

    def interval_metrics(self, step: int) -> dict[str, float]:
        """Figures over the steps since the last call; every rank calls it."""

    def validate(self, batches: Iterable[Batch]) -> Validation:
        """Evaluate with averaged weights; every rank calls it."""

    def rank_tensors(self) -> dict[str, Tensor]:
        """State that each rank keeps for itself, for the checkpoint; `own/...` is for the very rank that kept it."""

    def load_rank_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore it."""

    def save_pretrained(self, folder: Path, info: Mapping) -> None:
        """Write the averaged weights for use, and where they come from."""


class BadStepsError(UserError):
    """Too many steps in a row were not finite."""


class StoppedError(UserError):
    """The run has ended, but its last checkpoint could not be written."""


def seed_step(seed: int, step: int) -> None:
    """Make the random numbers of a step (dropout) a function of seed, step and data: nothing to save or restore."""
    state = np.random.SeedSequence([seed, step, dist.data_rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


def train(
    task: Task,
    data: RunData,
    *,
    folder: Path,
    config: TrainingConfig,
    checkpoint: CheckpointConfig,
    heartbeat: HeartbeatConfig,
    config_text: str,
    total_steps: int,
    seed: int,
    device: torch.device,
    title: str,
    start_up: StartUp,
) -> int:
    """Train from the last checkpoint in `folder`, or from the start, to `total_steps`; the exit code.

    A signal (see CheckpointConfig) ends the run after the step: it saves once, and the same command goes on from there.
    A rank that dies or hangs ends all within a bounded time, and `status.json` names it.
    """
    signals = StopSignals(checkpoint.signal)
    run = _Run(task, data, folder, config, checkpoint, heartbeat, device, signals, total_steps)
    with signals.noted(), run.heartbeat:
        with start_up.part("checkpoint"):
            run.resume()
        with start_up.part("log"):
            run.open_log()
        if dist.is_main():
            write_text(folder / "config.yaml", config_text)
        if run.state.step < total_steps or run.state.validation_pending:
            provenance.record_start(folder)
            write_status(folder, "running", run.state.step, total_steps)
        try:
            _steps(run, total_steps, seed, title, start_up)
        except BaseException as error:
            write_status(folder, "failed", run.state.step, total_steps, run.heartbeat.explain(error))
            raise
    if run.unsaved:
        reason = f"the checkpoint of step {run.state.step} could not be written ({run.unsaved})"
        write_status(folder, "failed", run.state.step, total_steps, reason)
        raise StoppedError(f"{reason}; make room and start the same command again: {run.last_saved()}")
    if signals.agreed:
        write_status(folder, "stopped", run.state.step, total_steps, signals.name)
        return signals.exit_code
    write_status(folder, "finished", run.state.step, total_steps)
    return 0


def _steps(run: "_Run", total_steps: int, seed: int, title: str, start_up: StartUp) -> None:
    """The steps that are left, with what happens between them."""
    state, config = run.state, run.config
    batches = run.data.training(state.position, total_steps - state.step, run.bad_samples.report)
    progress = progress_bar(title, total_steps, "step", initial=state.step, disable=not dist.is_main())
    with contextlib.closing(batches), progress:
        with start_up.part("validation"):
            run.validate_if_due()
        start_up.enter("first batch")
        while state.step < total_steps and not run.signals.agree():
            seed_step(seed, state.step)
            with run.stopwatch.part("data"):
                batch = next(batches)
            start_up.enter("first step")
            outcome = run.task.step(state.step, batch, run.stopwatch)
            run.count(outcome)
            if not start_up.done:
                run.note_start(start_up)
            progress.update()
            last = state.step == total_steps
            if state.step % config.log_every == 0 or last:
                run.log()
                progress.set_postfix_str(run.summary(), refresh=False)
            state.validation_pending = config.validates_after(state.step, total_steps)
            run.validate_if_due()
            if state.step % run.checkpoint.save_every == 0 or last:
                run.save()
            run.finish_save(wait=False)
        run.finish_save()
        if not run.is_saved():
            run.save()
            run.finish_save()


class _Run:
    """The state of one run: its step, its best score, its files."""

    def __init__(
        self,
        task: Task,
        data: RunData,
        folder: Path,
        config: TrainingConfig,
        checkpoint: CheckpointConfig,
        heartbeat: HeartbeatConfig,
        device: torch.device,
        signals: StopSignals,
        total_steps: int,
    ):
        self.total_steps = total_steps
        self.task, self.data, self.folder, self.device, self.signals = task, data, folder, device, signals
        self.config, self.checkpoint = config, checkpoint
        self.state = TrainingState(order=data.describe())
        self.heartbeat = Heartbeat(heartbeat, dist.rank(), dist.world_size(), self.write_failure)
        self.stopwatch, self.means = Stopwatch(device, entered=self.mark), RunningMeans(device)
        self.bad_samples = BadSamples(folder, data.order.size, data.max_bad_fraction)
        self.bad_in_a_row = 0
        self._saved: tuple[int, bool] | None = None  # step of the last checkpoint, and whether it waits for validation
        self._saving: tuple[int, bool] | None = None  # the same of the one that is being written
        self._writer = CheckpointWriter(folder / "checkpoints", checkpoint)
        self.unsaved = ""  # why the last checkpoint could not be written
        self._since, self._started = 0, time.perf_counter()  # of the interval between two logs
        self._aside = 0.0  # seconds of it that are no part of the steps
        self._summary: dict[str, float] = {}
        self.logger: MetricLogger

    def mark(self, phase: str) -> None:
        """Note what the main thread does now, as a sign of progress."""
        self.heartbeat.mark(self.state.step, phase)

    def write_failure(self, reason: str) -> None:
        """Say in `status.json` why the run fails; on one rank, not always 0, and beside a main thread that waits."""
        write_status(self.folder, "failed", self.state.step, self.total_steps, reason, any_rank=True)

    def resume(self) -> None:
        """Continue from the last checkpoint, if there is one."""
        self.mark("resume")
        if dist.is_main():
            recover_folder(self.folder / "best")
        path = find_checkpoint(self.folder / "checkpoints")
        if path is not None:
            saved, tensors = load_checkpoint(path, self.task.engines)
            self.task.load_rank_tensors(tensors)
            self.means.load_tensors(tensors)
            saved.position = self.data.resume_position(saved)
            saved.order = self.state.order
            self.state, self._saved = saved, (saved.step, saved.validation_pending)
            self.bad_samples.resume(saved.step, saved.bad_samples)

    def open_log(self) -> None:
        """Go on with the log where the checkpoint is."""
        self.logger = MetricLogger(self.folder, self.state.step)
        self._since, self._started = self.state.step, time.perf_counter()

    def is_saved(self) -> bool:
        """Whether the last checkpoint holds the state as it is."""
        return self._saved == (self.state.step, self.state.validation_pending)

    def last_saved(self) -> str:
        """Where the next start goes on."""
        return "it begins anew" if self._saved is None else f"it goes on from step {self._saved[0]}"

    @contextlib.contextmanager
    def _besides_steps(self) -> Iterator[None]:
        """What happens in this context does not count in the time per step."""
        start = time.perf_counter()
        yield
        self._aside += time.perf_counter() - start

    def save(self) -> None:
        """Write a checkpoint, or begin to."""
        self.finish_save()
        self.mark("save")
        self.bad_samples.reduce(self.state.step, self.state.position)
        self.state.bad_samples = dict(self.bad_samples.by_epoch)
        tensors = self.task.rank_tensors() | self.means.tensors()
        self._saving = (self.state.step, self.state.validation_pending)
        with self._besides_steps():
            try:
                self._writer.save(self.task.engines, tensors, self.state)
            except CheckpointError as error:
                self._not_saved(str(error))
        if not self.checkpoint.asynchronous:
            self.finish_save()

    def finish_save(self, wait: bool = True) -> None:
        """Put the checkpoint that is being written in its place, if it is ready or else `wait`."""
        with self._besides_steps():
            try:
                done = self._writer.wait() if wait else self._writer.poll()
            except CheckpointError as error:
                self._not_saved(str(error))
                return
        if done:
            self._saved, self.unsaved = self._saving, ""
            write_status(self.folder, "running", self._saved[0], self.total_steps)

    def _not_saved(self, reason: str) -> None:
        """Say so, and go on or stop as the config says."""
        self.unsaved = reason
        what = f"the checkpoint of step {self.state.step} could not be written ({reason})"
        if self.checkpoint.on_error == "stop":
            raise StoppedError(f"{what}; make room and start the same command again: {self.last_saved()}")
        if dist.is_main():
            kept = "there is none yet" if self._saved is None else f"the one of step {self._saved[0]} is kept"
            say(f"WARNING: {what}; {kept}, training goes on and tries again at the next save")

    def count(self, outcome: StepOutcome) -> None:
        """Count a step that is done; stop after too many bad ones in a row."""
        self.state.step += 1
        self.state.position += self.config.batch_size
        self.bad_in_a_row = self.bad_in_a_row + 1 if outcome.skipped else 0
        if not outcome.skipped:
            self.means.add(outcome.metrics)
            return
        self.state.bad_steps += 1
        values = {name: float(value) for name, value in outcome.metrics.items()}
        culprits = [name for name, value in values.items() if not math.isfinite(value)]
        where = f"step {self.state.step - 1}: not finite: {', '.join(culprits) or 'gradients'}"
        if dist.is_main():
            say(f"skipped {where}")
        self.logger.scalars(self.state.step, {"bad_steps": self.state.bad_steps})
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise BadStepsError(
                f"stopped after {self.bad_in_a_row} bad steps in a row, the last at {where}; "
                "lower the learning rate or look at the data of these steps"
            )

    def note_start(self, start_up: StartUp) -> None:
        """Say how long it took until the first step was done."""
        with self._besides_steps():
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # once: until now the step may only have been queued
            start_up.finish(self.folder)

    def log(self) -> None:
        """Log an interval's means with rates, memory and the task's own figures."""
        self.mark("log")
        self.bad_samples.reduce(self.state.step, self.state.position)
        steps = self.state.step - self._since
        seconds = (time.perf_counter() - self._started - self._aside) / steps
        values = self.means.means() | self.stopwatch.means(steps) | {"seconds/step": seconds}
        images = self.config.batch_size / seconds
        values["images_per_second"] = images
        values["peak_memory_gib"] = peak_memory_gib(self.device)
        values["bad_steps"] = self.state.bad_steps
        values["data/bad_samples"] = self.bad_samples.total
        if self.data.order.size:
            values["data/epoch"] = self.state.position / self.data.order.size
        values |= self.task.interval_metrics(self.state.step)
        if "tokens_per_image" in values:
            values["tokens_per_second"] = images * values.pop("tokens_per_image")
        self.logger.scalars(self.state.step, values)
        self._summary |= {"loss": values.get("loss/total", math.nan)}
        self._since, self._started, self._aside = self.state.step, time.perf_counter(), 0.0

    def validate_if_due(self) -> None:
        """Evaluate if this step wants it, unless a signal comes: then it waits for the next start."""
        if not self.state.validation_pending or self.signals.agree():
            return
        with self._besides_steps():
            self.mark("validation")
            batches = self.data.validation(self._name_bad)
            result = self.task.validate(itertools.takewhile(self._goes_on, batches))
            if not self.signals.agree():
                self._keep(result)
                self.state.validation_pending = False

    def _goes_on(self, _batch: Batch) -> bool:
        """Whether the validation takes its next batch."""
        self.mark("validation")
        return not self.signals.received

    def _name_bad(self, samples) -> None:
        for sample in samples:
            say(f"left out of the validation: shard {sample.shard}, image {sample.key!r}: {sample.reason}")

    def _keep(self, result: Validation) -> None:
        """Log a validation, and keep the weights if they are the best so far."""
        state = self.state
        self.logger.scalars(state.step, {f"validation/{name}": value for name, value in result.metrics.items()})
        for name, rows in result.images.items():
            self.logger.images(state.step, name, rows)
        if math.isfinite(result.score) and (state.best_score is None or result.score > state.best_score):
            info = {"step": state.step, "score": result.score, "metrics": result.metrics, **self.data.provenance}
            if self._save_best(info):
                state.best_score, state.best_step = result.score, state.step
        self._summary["best"] = math.nan if state.best_score is None else state.best_score

    def _save_best(self, info: Mapping) -> bool:
        self.mark("save best")
        try:
            self.task.save_pretrained(self.folder / "best", info)
        except CheckpointError as error:
            self._not_saved(f"{self.folder / 'best'}: {error}")
            return False
        return True

    def summary(self) -> str:
        """The few figures beside the progress bar."""
        return " ".join(f"{name} {value:.3f}" for name, value in self._summary.items())
