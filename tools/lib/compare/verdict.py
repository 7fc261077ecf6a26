"""Whether a run's curve goes where those of the references go."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ibq.config import UserError
from tools.lib.compare.references import TrainedRun

# What is judged, where run and references have it; the rest is only drawn.
JUDGED = ("loss/total", "loss/l1", "validation/psnr", "validation/nll", "codebook/usage")
RECENT, LEAST_POINTS = 0.1, 5  # share of the steps, and rows of the log, of which the last values are the mean
PLACES = 60  # of the band along the steps

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A metric of the run and of the references at the last step that all have; means of the last tenth of it."""

    metric: str
    step: int
    value: float
    expected: float
    margin: float  # NaN where nothing tells it

    @property
    def words(self) -> str:
        """Within, or how far off."""
        off = self.value - self.expected
        if math.isnan(self.margin):
            return f"{off:+.4g} (one reference with too few points: no band)"
        if abs(off) <= self.margin:
            return "within"
        return f"{'above' if off > 0 else 'below'} by {abs(off):.4g}"


def judge(run: TrainedRun, references: Sequence[TrainedRun]) -> list[Verdict]:
    """What there is to say of the run; UserError where it shares no step with the references."""
    found = []
    for metric in JUDGED:
        curve, others = run.curve(metric), [one.curve(metric) for one in references]
        others = [one for one in others if one]
        if curve and others and (end := last_common([curve, *others])):
            expected, margin = band_at(others, end, metric)
            found.append(
                Verdict(
                    metric=metric,
                    step=int(end),
                    value=level(curve, end, span(curve, others, end, metric)),
                    expected=expected,
                    margin=margin,
                )
            )
    if not any(one.metric == "loss/total" for one in found):
        raise UserError(f"{run.name}: has logged no step yet that a reference has logged; wait, and compare again")
    return found


def last_common(curves: Sequence[Points]) -> float | None:
    """The last step that all curves have reached; None where one begins after another ends."""
    end = min(curve[-1][0] for curve in curves)
    return end if all(curve[0][0] <= end for curve in curves) else None


def span(curve: Points, others: Sequence[Points], end: float, metric: str) -> float:
    """Steps before `end` that are taken together: 0 for validations, else the same for all curves."""
    if metric.startswith("validation/"):
        return 0.0
    gaps = [(some[-1][0] - some[0][0]) / max(len(some) - 1, 1) for some in (curve, *others)]
    return max(RECENT * end, (LEAST_POINTS - 1) * max(gaps))


def level(curve: Points, end: float, steps: float) -> float:
    """Mean of the values of the last steps up to `end`."""
    before = [(step, value) for step, value in curve if step <= end]
    return float(np.mean([value for step, value in before if step >= min(end - steps, before[-1][0])]))


def wobble(curve: Points, end: float) -> float:
    """Standard deviation of the last values up to `end` from a smooth curve; NaN for less than three.

    Second differences do not see a slope, and have 6 times the variance of independent values.
    """
    recent = [value for step, value in curve if step <= end][-LEAST_POINTS:]
    return float(np.sqrt(np.mean(np.diff(recent, 2) ** 2) / 6)) if len(recent) > 2 else math.nan


def band_at(others: Sequence[Points], end: float, metric: str, curve: Points = ()) -> tuple[float, float]:
    """(mean of the references, how far from it a run of theirs may be): twice the standard deviation of a new run.

    That is the deviation among the references or that of one reference from a smooth curve, whichever is more.
    """
    steps = span(curve or others[0], others, end, metric)
    levels = [level(one, end, steps) for one in others]
    deviations = [found for one in others if not math.isnan(found := wobble(one, end))]
    own = [float(np.mean(deviations))] if deviations else []
    among = [float(np.std(levels, ddof=1))] if len(levels) > 1 else []
    spread = max([*own, *among], default=math.nan)
    return float(np.mean(levels)), 2 * spread * math.sqrt(1 + 1 / len(levels))


def band(others: Sequence[Points], metric: str) -> np.ndarray | None:
    """[4, n]: step, mean, lowest and highest expected value, as far as all references go."""
    others = [one for one in others if one]
    if not others or (end := last_common(others)) is None:
        return None
    steps = sorted({step for one in others for step, _ in one if max(o[0][0] for o in others) <= step <= end})
    steps = steps[:: math.ceil(len(steps) / PLACES)][:-1] + steps[-1:] if len(steps) > PLACES else steps
    rows = []
    for step in steps:
        middle = float(np.mean([one_at(one, step) for one in others]))
        margin = band_at(others, step, metric)[1]
        rows.append((step, middle, middle - margin, middle + margin))
    found = np.array(rows).T
    found[2:] = np.where(np.isnan(found[2:]), found[1], found[2:])
    return found


def one_at(curve: Points, step: float) -> float:
    """A curve's value at a step, between two of its points."""
    x, y = np.array(curve).T
    return float(np.interp(step, x, y))


def as_lines(verdicts: Sequence[Verdict], names: Mapping[str, str]) -> list[str]:
    """The terminal's table, under heads that say what is compared."""
    lines = [f"{'':18} {'at step':>8} {names['run']:>12} {names['references']:>22}"]
    for one in verdicts:
        expected = f"{one.expected:.4g}" + ("" if math.isnan(one.margin) else f" ± {one.margin:.2g}")
        lines.append(f"{one.metric:18} {one.step:>8,} {one.value:>12.4g} {expected:>22}  {one.words}")
    return lines
