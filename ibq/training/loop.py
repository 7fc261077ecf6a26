"""The training loop of both stages: it knows tasks, never models."""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ibq import dist
from ibq.config import UserError, require_least
from ibq.data.counts import BadSample
from ibq.data.order import MicroBatch
from ibq.engine.heartbeat import Heartbeat
from ibq.files import write_text
from ibq.progress import progress_bar, say
from ibq.training import provenance
from ibq.training.checkpoint import CheckpointConfig, TrainingState
from ibq.training.metrics import RunLog
from ibq.training.run_data import RunData
from ibq.training.saving import Saver, StoppedError
from ibq.training.start_from.run import Start
from ibq.training.startup import StartUp
from ibq.training.stopping import StopSignals, write_status
from ibq.training.task import Batch, StepOutcome, Task, Validation
from ibq.training.writers import LogConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch and rhythm of a run."""

    epochs: int | None = None  # give either epochs or max_steps
    max_steps: int | None = None
    batch_size: int = 256  # global
    micro_batch: MicroBatch = 4  # per rank; accumulation follows from the world size; auto: what fits
    log_every: int = 50
    validate_every: int | None = 5_000  # and at the end; null never validates, and keeps no best weights
    validation_images: int | None = None  # the first so many; None takes all
    max_bad_steps: int = 20  # skipped steps (non-finite loss or gradient) in a row before the run stops

    def __post_init__(self):
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("epochs: give exactly one of `epochs` and `max_steps`")
        numbers = [name for name, value in vars(self).items() if value != "auto"]
        require_least(self, **dict.fromkeys(numbers, 1))

    def validates_after(self, step: int, total_steps: int) -> bool:
        """Whether the run validates after so many steps."""
        return self.validate_every is not None and (step % self.validate_every == 0 or step == total_steps)

    def total_steps(self, steps_per_epoch: float) -> int:
        """Optimizer steps of the whole run: enough for every sample of every epoch."""
        return self.max_steps if self.max_steps is not None else math.ceil(self.epochs * steps_per_epoch)


class BadStepsError(UserError):
    """Too many steps in a row were not finite."""


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
    log_config: LogConfig,
    heart: Heartbeat,
    config_text: str,
    total_steps: int,
    seed: int,
    device: torch.device,
    title: str,
    start_up: StartUp,
    start: Start,
) -> int:
    """Train from the last checkpoint in `folder`, or from `start`, to `total_steps`; the exit code.

    A signal (see CheckpointConfig) ends the run after the step: it saves once, and the same command goes on from there.
    A rank that dies or hangs ends all within a bounded time, and `status.json` names it.
    """
    if config.validate_every is not None:
        data.check_validation()
    state, signals = TrainingState(order=data.describe()), StopSignals(checkpoint.signal)

    def write_failure(reason: str) -> None:  # on one rank, not always 0, and beside a main thread that waits
        write_status(folder, "failed", state.step, total_steps, reason, any_rank=True)

    def mark(phase: str) -> None:
        heart.mark(state.step, phase)

    heart.on_failure = write_failure
    log = RunLog(folder, data, state, device, mark)
    saver = Saver(folder, checkpoint, task, data, state, log, total_steps, mark)
    run = _Run(task=task, data=data, config=config, state=state, log=log, saver=saver, signals=signals, mark=mark)
    with signals.noted():
        with start_up.part("checkpoint"):
            if saver.resume():
                start.go_on(folder)
            else:
                mark("first weights")
                start.begin(task, folder, device)
            run.origin = start.origin
        with start_up.part("log"):
            log.open(log_config, config_text)
        if dist.is_main():
            write_text(folder / "config.yaml", config_text)
        if state.step < total_steps or state.validation_pending:
            provenance.record_start(folder)
            write_status(folder, "running", state.step, total_steps)
        try:
            with contextlib.closing(log):
                _steps(run, total_steps, seed, title, start_up)
        except BaseException as error:
            write_status(folder, "failed", state.step, total_steps, heart.explain(error))
            raise
        heart.stop()
    if saver.unsaved:
        reason = f"the checkpoint of step {state.step} could not be written ({saver.unsaved})"
        write_status(folder, "failed", state.step, total_steps, reason)
        raise StoppedError(f"{reason}; make room and start the same command again: {saver.last_saved()}")
    ended, reason = ("stopped", signals.name) if signals.agreed else ("finished", "")
    write_status(folder, ended, state.step, total_steps, reason, pictures=log.count_pictures())
    return signals.exit_code if signals.agreed else 0


def _steps(run: "_Run", total_steps: int, seed: int, title: str, start_up: StartUp) -> None:
    """The steps that are left, with what happens between them."""
    task, state, config, log, saver = run.task, run.state, run.config, run.log, run.saver
    batches = run.data.training(state.position, total_steps - state.step, log.bad_samples.report)
    progress = progress_bar(title, total_steps, "step", initial=state.step, disable=not dist.is_main())
    with contextlib.closing(batches), progress:
        with start_up.part("validation"):
            run.validate_if_due()
        start_up.enter("first batch")
        while state.step < total_steps and not run.signals.agree():
            seed_step(seed, state.step)
            with log.stopwatch.part("data"):
                batch = next(batches)
            if not start_up.done:
                start_up.enter("first step")
            run.count(task.step(state.step, batch, log.stopwatch))
            if not start_up.done:
                log.note_start(start_up)
                saver.prepare()
            progress.update()
            last = state.step == total_steps
            if state.step % config.log_every == 0 or last:
                log.steps(config.batch_size, task.interval_metrics)
                progress.set_postfix_str(log.summary(), refresh=False)
            state.validation_pending = config.validates_after(state.step, total_steps)
            run.validate_if_due()
            if state.step % saver.config.save_every == 0 or last:
                saver.save()
            saver.finish(wait=False)
        saver.finish()
        if not saver.is_saved():
            saver.save()
            saver.finish()


@dataclass(kw_only=True)
class _Run:
    """What the loop works with: the task and its data, where the run stands, and who tells of it and saves it."""

    task: Task
    data: RunData
    config: TrainingConfig
    state: TrainingState
    log: RunLog
    saver: Saver
    signals: StopSignals
    mark: Callable[[str], None]  # is told what begins, as a sign of life
    origin: Mapping = field(default_factory=dict)  # of the first weights
    bad_in_a_row: int = 0

    def count(self, outcome: StepOutcome) -> None:
        """Count a step that is done; stop after too many bad ones in a row."""
        self.state.step += 1
        self.state.position += self.config.batch_size
        self.bad_in_a_row = self.bad_in_a_row + 1 if outcome.skipped else 0
        if not outcome.skipped:
            self.log.means.add(outcome.metrics)
            return
        self.state.bad_steps += 1
        values = {name: float(value) for name, value in outcome.metrics.items()}
        culprits = [name for name, value in values.items() if not math.isfinite(value)]
        where = f"step {self.state.step - 1}: not finite: {', '.join(culprits) or 'gradients'}"
        if dist.is_main():
            say(f"skipped {where}")
        self.log.bad_step()
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise BadStepsError(
                f"stopped after {self.bad_in_a_row} bad steps in a row, the last at {where}; "
                "lower the learning rate or look at the data of these steps"
            )

    def validate_if_due(self) -> None:
        """Evaluate if this step wants it, unless a signal comes: then it waits for the next start."""
        if not self.state.validation_pending or self.signals.agree():
            return
        with self.log.besides_steps():
            self.mark("validation")
            bad: list[BadSample] = []
            batches = self.data.validation(bad.extend)
            result = self.task.validate(itertools.takewhile(self._goes_on, batches))
            if not self.signals.agree():
                self.log.bad_samples.validation(self.state.step, bad)
                self._keep(result)
                self.state.validation_pending = False

    def _goes_on(self, _batch: Batch) -> bool:
        """Whether the validation takes its next batch."""
        self.mark("validation")
        return not self.signals.received

    def _keep(self, result: Validation) -> None:
        """Log a validation, and keep the weights if they are the best so far."""
        state = self.state
        self.log.validation(result.metrics, result.images)
        if math.isfinite(result.score) and (state.best_score is None or result.score > state.best_score):
            info = {"step": state.step, "score": result.score, "metrics": result.metrics}
            info |= {**self.data.provenance, **self.origin}
            if self.saver.save_best(info):
                state.best_score, state.best_step = result.score, state.step
        self.log.note_best()
