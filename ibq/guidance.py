"""Classifier-free guidance (arXiv 2207.12598) whose strength changes over the image's codes."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "power-cosine", "interval"]
SCHEDULES = ("constant", "linear", "cosine", "power-cosine", "interval")


def guidance_scales(
    schedule: Schedule, scale: float, tokens: int, *, power: float = 2.75, interval: tuple[float, float] = (0.0, 1.0)
) -> list[float]:
    """The scale s of each of `tokens` codes, for logits uncond + s (cond - uncond).

    With t = i / (tokens - 1) from 0 to 1 for code i:

        constant       s
        linear         1 + (s - 1) t
        cosine         1 + (s - 1) (1 - cos(pi t)) / 2
        power-cosine   1 + (s - 1) (1 - cos(pi t^power)) / 2     (MDTv2, arXiv 2303.14389)
        interval       s where interval[0] <= t <= interval[1], else 1     (arXiv 2404.07724)

    Errors: ValueError for a schedule that does not exist, a power that is not positive, an interval outside [0, 1].
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"guidance_schedule: {schedule!r} does not exist; use one of {', '.join(SCHEDULES)}")
    if not 0 < power < math.inf:
        raise ValueError(f"guidance_power: {power} is not positive; MDTv2 takes 4, RAR 2.75 for its smallest model")
    first, last = interval
    if not 0.0 <= first <= last <= 1.0:
        raise ValueError(f"guidance_interval: {first} to {last} is no part of the image; use 0 <= first <= last <= 1")
    times = [i / max(tokens - 1, 1) for i in range(tokens)]
    return [1.0 + (scale - 1.0) * _share(schedule, t, power, first, last) for t in times]


def _share(schedule: Schedule, t: float, power: float, first: float, last: float) -> float:
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return t
        case "cosine":
            return (1 - math.cos(math.pi * t)) / 2
        case "power-cosine":
            return (1 - math.cos(math.pi * t**power)) / 2
        case "interval":
            return float(first <= t <= last)
