"""Learning-rate and weight-decay schedules as pure functions of the step or epoch, and their configs.

Source: the public reference code of IBQ (arXiv 2412.02692), whose AR schedule follows VAR (arXiv 2404.02905).
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ibq.engine.base import GroupHyper

PEAK_FRACTION = 0.05  # of the steps after warm-up that the AR schedule stays at its peak


class ScheduleValues(NamedTuple):
    """Learning rate and weight decay of one step, for every parameter group."""

    lr: float
    weight_decay: float


def ar_schedule(
    step: int,
    *,
    peak_lr: float,
    warmup_steps: float,
    max_steps: int,
    warmup_start: float = 0.005,
    end: float = 0.01,
    weight_decay: float,
    end_weight_decay: float,
) -> ScheduleValues:
    """Learning rate and weight decay of the AR transformer at optimizer step `step`, counted from 0.

    Linear warm-up from `warmup_start` x peak, the peak for 5 % of the remaining steps, then linear decay to
    `end` x peak at the last step. The weight decay goes along a half cosine to `end_weight_decay`; 0 keeps it
    constant. `warmup_steps` is rounded. Steps after the last keep its values; a warm-up longer than
    the training is cut off. Raises ValueError for impossible step counts.
    """
    rate = linear_decay(
        step,
        warmup_steps=round(warmup_steps),
        max_steps=max_steps,
        warmup_start=warmup_start,
        plateau=PEAK_FRACTION,
        end=end,
    )
    last = max_steps - 1
    final = end_weight_decay or weight_decay
    share = 0.5 + 0.5 * math.cos(math.pi * min(step, last) / max(1, last))
    return ScheduleValues(lr=peak_lr * rate, weight_decay=final + (weight_decay - final) * share)


def linear_decay(
    step: int, *, warmup_steps: int, max_steps: int, warmup_start: float, plateau: float, end: float
) -> float:
    """Multiplier: from `warmup_start` linearly to 1, 1 for a share of the steps that are left, then linearly to `end`.

    That is its value at the last step, and after it. The transformers' (VAR, arXiv 2404.02905) stays at 1 for 5% of
    them, that of FVQ's tokenizers (arXiv 2509.10140, public code) for 30%. ValueError for impossible step counts.
    """
    _check_steps(step, warmup_steps, max_steps)
    last = max_steps - 1
    step = min(step, last)
    if step < warmup_steps:
        return warmup_start + (1 - warmup_start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, last - warmup_steps)
    return end + (1 - end) * min(1.0, (1 - progress) / (1 - plateau))


def multi_step_lr(epoch: int, base_lr: float, drop_epochs: Collection[int], drop_rate: float) -> float:
    """The tokenizer's learning rate during `epoch`, counted from 0: x `drop_rate` from each drop epoch on."""
    return base_lr * drop_rate ** sum(drop <= epoch for drop in set(drop_epochs))


def linear_warmup(step: int, *, warmup_steps: int) -> float:
    """Multiplier of the learning rate: from 0 at step 0 linearly to 1 at `warmup_steps`, then 1."""
    return step / warmup_steps if step < warmup_steps else 1.0


def linear_warmup_cosine(step: int, *, warmup_steps: int, max_steps: int, minimum: float = 0.0) -> float:
    """Multiplier: linear warm-up, then a half cosine to 0 at `max_steps`; never below `minimum`."""
    _check_steps(step, warmup_steps, max_steps)
    if step < warmup_steps:
        return step / warmup_steps
    progress = (min(step, max_steps) - warmup_steps) / max(1, max_steps - warmup_steps)
    return max(0.5 * (1 + math.cos(math.pi * progress)), minimum)


def annealed(step: float, *, start: float, end: float) -> float:
    """1 before `start`, from there linearly to 0 at `end` (RAR, arXiv 2411.00776, section 3.2)."""
    return 1.0 if step < start else 0.0 if step >= end else (end - step) / (end - start)


def _check_steps(step: int, warmup_steps: int, max_steps: int) -> None:
    if step < 0:
        raise ValueError(f"step: {step} is negative; count steps from 0")
    if max_steps < 1:
        raise ValueError(f"max_steps: {max_steps} is no training; give at least 1")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: {warmup_steps} is negative; give 0 for no warm-up")


# --- Configs ---


@dataclass(frozen=True, kw_only=True)
class MultiStepScheduleConfig:
    """Learning rate of both networks: constant, with drops after some epochs; the paper's."""

    kind: Literal["multi_step"] = "multi_step"
    warmup_steps: int = 0
    drop_epochs: tuple[int, ...] = ()  # epochs (from 1) after which the rate is multiplied by drop_rate
    drop_rate: float = 0.1

    def __post_init__(self):
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: must not be negative, got {self.warmup_steps}; 0 means no warm-up")
        if min(self.drop_epochs, default=1) < 1 or sorted(set(self.drop_epochs)) != list(self.drop_epochs):
            raise ValueError(f"drop_epochs: must be epochs from 1 in ascending order, got {list(self.drop_epochs)}")
        if not 0 < self.drop_rate <= 1:
            raise ValueError(f"drop_rate: must lie in (0, 1], got {self.drop_rate}; 0.1 divides the rate by ten")

    def learning_rate(self, peak: float, step: int, steps_per_epoch: float, _total_steps: int) -> float:
        """The learning rate of a step, from 0."""
        rate = multi_step_lr(int(step // steps_per_epoch), peak, self.drop_epochs, self.drop_rate)
        return rate * linear_warmup(step, warmup_steps=self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class CosineScheduleConfig:
    """Learning rate of both networks: warm-up, then a cosine to `end` x peak."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: int = 0
    end: float = 0.0  # last learning rate as a share of the peak

    def __post_init__(self):
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: must not be negative, got {self.warmup_steps}; 0 means no warm-up")
        if not 0 <= self.end <= 1:
            raise ValueError(f"end: must lie in [0, 1], got {self.end}; it is a share of the peak")

    def learning_rate(self, peak: float, step: int, _steps_per_epoch: float, total_steps: int) -> float:
        """The learning rate of a step, from 0."""
        return peak * linear_warmup_cosine(
            step, warmup_steps=self.warmup_steps, max_steps=total_steps, minimum=self.end
        )


@dataclass(frozen=True, kw_only=True)
class LinearScheduleConfig:
    """Learning rate of both networks: warm-up, a plateau, a linear decay: FVQ's learning annealing."""

    kind: Literal["linear"] = "linear"
    warmup_epochs: float = 0.0
    warmup_start: float = 0.005  # first learning rate as a share of the peak
    plateau: float = 0.3  # share of the steps after the warm-up that stay at the peak
    end: float = 0.01  # last learning rate as a share of the peak

    def __post_init__(self):
        if not 0 <= self.warmup_epochs < math.inf:
            raise ValueError(f"warmup_epochs: must be finite and not negative, got {self.warmup_epochs}; 0: no warm-up")
        for name in ("warmup_start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must lie in [0, 1], got {getattr(self, name)}; it is a share of the peak")
        if not 0 <= self.plateau < 1:
            raise ValueError(f"plateau: must lie in [0, 1), got {self.plateau}; it is a share of the steps")

    def learning_rate(self, peak: float, step: int, steps_per_epoch: float, total_steps: int) -> float:
        """The learning rate of a step, from 0."""
        return peak * linear_decay(
            step,
            warmup_steps=round(self.warmup_epochs * steps_per_epoch),
            max_steps=total_steps,
            warmup_start=self.warmup_start,
            plateau=self.plateau,
            end=self.end,
        )


TokenizerScheduleConfig = MultiStepScheduleConfig | CosineScheduleConfig | LinearScheduleConfig


@dataclass(frozen=True, kw_only=True)
class ARScheduleConfig:
    """The reference's schedule: linear warm-up, 5% plateau, linear decay; weight decay on a cosine of its own."""

    warmup_epochs: float | None = None  # give either; both None means no warm-up
    warmup_steps: int | None = None
    warmup_start: float = 0.005  # first learning rate as a share of the peak
    end: float = 0.01  # last learning rate as a share of the peak
    end_weight_decay: float = 0.0  # 0 keeps the weight decay constant
    decay_all_parameters: bool = True  # the reference's schedule also decays norms and biases

    def __post_init__(self):
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("warmup_epochs: give either `warmup_epochs` or `warmup_steps`, not both")
        for name in ("warmup_epochs", "warmup_steps"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"{name}: must be finite and not negative, got {getattr(self, name)}; 0: no warm-up")
        for name in ("warmup_start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must lie in [0, 1], got {getattr(self, name)}; it is a share of the peak")
        if not 0 <= self.end_weight_decay < math.inf:
            given = self.end_weight_decay
            raise ValueError(f"end_weight_decay: must be finite and not negative, got {given}; 0 keeps it constant")

    def warmup(self, steps_per_epoch: float) -> int:
        """Warm-up in steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round((self.warmup_epochs or 0) * steps_per_epoch)

    def hyper(
        self, step: int, *, peak: float, weight_decay: float, steps_per_epoch: float, total_steps: int
    ) -> dict[str, GroupHyper]:
        """Learning rate and weight decay of both parameter groups at a step, from 0."""
        rate, decay = ar_schedule(
            step,
            peak_lr=peak,
            warmup_steps=self.warmup(steps_per_epoch),
            max_steps=total_steps,
            warmup_start=self.warmup_start,
            end=self.end,
            weight_decay=weight_decay,
            end_weight_decay=self.end_weight_decay,
        )
        return {
            "decay": GroupHyper(learning_rate=rate, weight_decay=decay),
            "no_decay": GroupHyper(learning_rate=rate, weight_decay=decay if self.decay_all_parameters else 0.0),
        }


@dataclass(frozen=True, kw_only=True)
class OrderAnnealingConfig:
    """For `model.order: random`: all images are in random order before `start`, then fewer and fewer to `end`.

    From there on the share `last` is. The default is RAR's, 200 and 300 of 400 epochs, as shares of the run, and none
    at the end. Models that are to fill in any part of an image (`ibq/editing.py`) want more than none.
    """

    unit: Literal["epochs", "steps", "run"] = "run"  # run: shares of it
    start: float = 0.5
    end: float = 0.75
    last: float = 0.0

    def __post_init__(self):
        if not 0 <= self.start <= self.end < math.inf:
            raise ValueError(f"start: must lie between 0 and end, got {self.start} and {self.end}")
        if self.unit == "run" and self.end > 1:
            raise ValueError(f"end: {self.end} is no share of the run; use at most 1, or set unit to epochs or steps")
        if not 0 <= self.last <= 1:
            raise ValueError(f"last: must lie in [0, 1], got {self.last}; it is a share of the images")

    def random_share(self, step: int, *, steps_per_epoch: float, total_steps: int) -> float:
        """The probability with which an image is in random order at a step, from 0."""
        steps = {"epochs": steps_per_epoch, "steps": 1, "run": total_steps}[self.unit]
        return self.last + (1 - self.last) * annealed(step, start=self.start * steps, end=self.end * steps)
