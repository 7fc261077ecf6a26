"""The training loop of both stages: it knows tasks, never models."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ibq import dist
from ibq.config import UserError
from ibq.engine.base import Engine
from ibq.files import recover_folder
from ibq.progress import progress_bar, say
from ibq.training.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from ibq.training.metrics import Interval, MetricLogger, Stopwatch, peak_memory_gib

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch and rhythm of a run."""

    epochs: int | None = None  # give either epochs or max_steps
    max_steps: int | None = None
    batch_size: int = 256  # global
    micro_batch: int = 4  # per rank; accumulation follows from the world size
    log_every: int = 50
    validate_every: int = 5_000
    validation_images: int | None = None  # the first so many; None takes all
    save_every: int = 5_000
    keep_checkpoints: int = 2
    max_bad_steps: int = 20  # skipped steps (non-finite loss or gradient) in a row before the run stops

    def __post_init__(self):
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("epochs: give exactly one of `epochs` and `max_steps`")
        for name in ("epochs", "max_steps", "batch_size", "micro_batch", "log_every", "validate_every", "save_every",
                     "validation_images", "keep_checkpoints", "max_bad_steps"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps if self.max_steps is not None else self.epochs * steps_per_epoch


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
        """State that each rank keeps for itself, for the checkpoint."""

    def load_rank_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore it."""

    def save_pretrained(self, folder: Path, info: Mapping) -> None:
        """Write the averaged weights for use, and where they come from."""


class BadStepsError(UserError):
    """Too many steps in a row were not finite."""


def seed_step(seed: int, step: int) -> None:
    """Make the random numbers of a step (dropout) a function of seed, step and rank: nothing to save or restore."""
    torch.manual_seed(hash((seed, step, dist.rank())) & 0x7FFF_FFFF_FFFF_FFFF)


def train(
    task: Task,
    *,
    folder: Path,
    config: TrainingConfig,
    total_steps: int,
    seed: int,
    device: torch.device,
    training_batches: Callable[[int, int], Iterator[list[Batch]]],
    validation_batches: Callable[[], Iterable[Batch]],
    title: str,
) -> None:
    """Train from the last checkpoint in `folder`, or from the start, to `total_steps`.

    `training_batches(start, stop)` gives one list of micro-batches a step.
    """
    run = _Run(task, folder, config, device)
    run.resume()
    stopwatch, interval = Stopwatch(device), Interval(device)
    batches = training_batches(run.step, total_steps)
    progress = progress_bar(title, total_steps, "step", initial=run.step, disable=not dist.is_main())
    started, since = time.perf_counter(), run.step
    with progress, contextlib.closing(run.logger):
        while run.step < total_steps:
            seed_step(seed, run.step)
            with stopwatch.part("data"):
                batch = next(batches)
            outcome = task.step(run.step, batch, stopwatch)
            run.step += 1
            run.count_bad(outcome)
            if not outcome.skipped:
                interval.add(outcome.metrics)
            progress.update()
            last = run.step == total_steps
            if run.step % config.log_every == 0 or last:
                steps = run.step - since
                rate = {"seconds/step": (time.perf_counter() - started - run.aside) / steps}
                run.log(interval.means() | stopwatch.means(steps) | rate, config.batch_size)
                progress.set_postfix_str(run.summary())
                started, since, run.aside = time.perf_counter(), run.step, 0.0
            if run.step % config.validate_every == 0 or last:
                with run.besides_steps():
                    run.validate(validation_batches())
            if run.step % config.save_every == 0 or last:
                with run.besides_steps():
                    run.save()


class _Run:
    """The state of one run: its step, its best score, its files."""

    def __init__(self, task: Task, folder: Path, config: TrainingConfig, device: torch.device):
        self.task, self.folder, self.config, self.device = task, folder, config, device
        self.step = 0
        self.best_score: float | None = None
        self.bad_steps = 0
        self.bad_in_a_row = 0
        self.aside = 0.0  # seconds since the last log that are no part of the steps
        self._summary: dict[str, float] = {}
        self.logger: MetricLogger

    def resume(self) -> None:
        """Continue from the last checkpoint, if there is one."""
        if dist.is_main():
            recover_folder(self.folder / "best")
        path = latest_checkpoint(self.folder / "checkpoints")
        if path is not None:
            state, tensors = load_checkpoint(path, self.task.engines)
            self.task.load_rank_tensors(tensors)
            self.step, self.best_score, self.bad_steps = state.step, state.best_score, state.bad_steps
        self.logger = MetricLogger(self.folder, self.step)

    @contextlib.contextmanager
    def besides_steps(self) -> Iterator[None]:
        """What happens in this context does not count in the time per step."""
        start = time.perf_counter()
        yield
        self.aside += time.perf_counter() - start

    def save(self) -> None:
        """Write a checkpoint."""
        state = TrainingState(step=self.step, best_score=self.best_score, bad_steps=self.bad_steps)
        folder = self.folder / "checkpoints"
        save_checkpoint(folder, self.task.engines, self.task.rank_tensors(), state, self.config.keep_checkpoints)

    def count_bad(self, outcome: StepOutcome) -> None:
        """Count skipped steps; stop after too many in a row."""
        self.bad_in_a_row = self.bad_in_a_row + 1 if outcome.skipped else 0
        if not outcome.skipped:
            return
        self.bad_steps += 1
        values = {name: float(value) for name, value in outcome.metrics.items()}
        culprits = [name for name, value in values.items() if not math.isfinite(value)]
        where = f"step {self.step - 1}: not finite: {', '.join(culprits) or 'gradients'}"
        if dist.is_main():
            say(f"skipped {where}")
        self.logger.scalars(self.step, {"bad_steps": self.bad_steps})
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise BadStepsError(
                f"stopped after {self.bad_in_a_row} bad steps in a row, the last at {where}; "
                "lower the learning rate or look at the data of these steps"
            )

    def log(self, values: dict[str, float], batch_size: int) -> None:
        """Log an interval's means with rates, memory and the task's own figures."""
        images = batch_size / values["seconds/step"]
        values["images_per_second"] = images
        values["peak_memory_gib"] = peak_memory_gib(self.device)
        values["bad_steps"] = self.bad_steps
        values |= self.task.interval_metrics(self.step)
        if "tokens_per_image" in values:
            values["tokens_per_second"] = images * values.pop("tokens_per_image")
        self.logger.scalars(self.step, values)
        self._summary |= {"loss": values.get("loss/total", math.nan)}

    def validate(self, batches: Iterable[Batch]) -> None:
        """Evaluate, and keep the weights if they are the best so far."""
        result = self.task.validate(batches)
        self.logger.scalars(self.step, {f"validation/{name}": value for name, value in result.metrics.items()})
        for name, rows in result.images.items():
            self.logger.images(self.step, name, rows)
        if math.isfinite(result.score) and (self.best_score is None or result.score > self.best_score):
            self.best_score = result.score
            if dist.is_main():
                info = {"step": self.step, "score": result.score, "metrics": result.metrics}
                self.task.save_pretrained(self.folder / "best", info)
        self._summary["best"] = math.nan if self.best_score is None else self.best_score
        dist.barrier()

    def summary(self) -> str:
        """The few figures beside the progress bar."""
        return " ".join(f"{name} {value:.3f}" for name, value in self._summary.items())
