"""Figures over seeds: the mean of a run's repetitions, and how far it may be from that of all seeds."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from ibq.reports.figures import as_number

CONFIDENCE = 0.95
Figures = Mapping[str, float]


def interval(values: Sequence[float]) -> float:
    """Half width of the 95% confidence interval of the mean of values [n], by Student's t with n - 1 degrees.

    NaN for fewer than two values.
    """
    if len(values) < 2:
        return math.nan
    from scipy.special import stdtrit  # slow to import, and not needed by every sweep

    return float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * stdev(values) / math.sqrt(len(values))


def over_seeds(rows: Sequence[Figures]) -> tuple[dict[str, float], dict[str, float]]:
    """The means of the figures that all rows have, and the half widths of their intervals."""
    names = [name for name in rows[0] if all(math.isfinite(as_number(row.get(name))) for row in rows)]
    values = {name: [float(row[name]) for row in rows] for name in names}
    return {name: fmean(found) for name, found in values.items()}, {name: interval(values[name]) for name in names}


def mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean of the curves [(step, value)] at the steps that all of them have."""
    first, *others = (dict(curve) for curve in curves)
    steps = [step for step in first if all(step in other for other in others)]
    return [(step, fmean(curve[step] for curve in (first, *others))) for step in steps]
