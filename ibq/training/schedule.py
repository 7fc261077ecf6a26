"""Learning-rate and weight-decay schedules as pure functions of the step or epoch.

Source: the public reference code of IBQ (arXiv 2412.02692), whose AR schedule follows VAR (arXiv 2404.02905).
"""

import math
from collections.abc import Collection
from typing import NamedTuple

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
    warmup_steps = round(warmup_steps)
    _check_steps(step, warmup_steps, max_steps)
    last = max_steps - 1
    step = min(step, last)
    if step < warmup_steps:
        lr = peak_lr * (warmup_start + (1 - warmup_start) * step / warmup_steps)
    else:
        progress = (step - warmup_steps) / max(1, last - warmup_steps)
        remaining = min(1.0, (1 - progress) / (1 - PEAK_FRACTION))
        lr = peak_lr * (end + (1 - end) * remaining)
    final = end_weight_decay or weight_decay
    share = 0.5 + 0.5 * math.cos(math.pi * step / max(1, last))
    return ScheduleValues(lr=lr, weight_decay=final + (weight_decay - final) * share)


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


def _check_steps(step: int, warmup_steps: int, max_steps: int) -> None:
    if step < 0:
        raise ValueError(f"step: {step} is negative; count steps from 0")
    if max_steps < 1:
        raise ValueError(f"max_steps: {max_steps} is no training; give at least 1")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: {warmup_steps} is negative; give 0 for no warm-up")
