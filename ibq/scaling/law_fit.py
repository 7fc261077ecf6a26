"""What training runs say of their scaling laws: constants with intervals, the compute frontier, predictions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ibq.reports.figures import short_number
from ibq.scaling.power_law import Fit, Frontier, PowerLaw, bootstrap, constant_names, fit, interval, prediction_interval

SAME_BUDGET = 0.02  # budgets of runs that differ by less, relatively, count as one
MIN_SIZES, MIN_BUDGETS, MIN_RUNS = 3, 3, 6  # for L(N, D)
MIN_SIZES_ALONE = 4  # for L(N)
ASSUMED_FLOPS = 6.0  # of a parameter and token, where no run says
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Finished runs; arrays with one element a run."""

    names: tuple[str, ...]
    parameters: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray
    flops: np.ndarray  # NaN where not known
    held_out: np.ndarray  # bool

    def __len__(self) -> int:
        return len(self.names)

    def chosen(self, mask: np.ndarray) -> "Runs":
        """Some of them."""
        names = tuple(name for name, wanted in zip(self.names, mask, strict=True) if wanted)
        arrays = {n: getattr(self, n)[mask] for n in ("parameters", "tokens", "losses", "flops", "held_out")}
        return Runs(names=names, **arrays)

    @property
    def sizes(self) -> list[float]:
        """The different numbers of parameters."""
        return sorted(set(self.parameters.tolist()))

    def budgets(self) -> list[np.ndarray]:
        """Masks of the runs with the same number of tokens, in ascending order of that."""
        masks: list[np.ndarray] = []
        left = np.ones(len(self), bool)
        while left.any():
            least = self.tokens[left].min()
            masks.append(left & (self.tokens <= least * (1 + SAME_BUDGET)))
            left &= ~masks[-1]
        return masks


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a fit is made."""

    delta: float = 1e-3  # of the Huber loss of log L
    resamples: int = 500
    level: float = 0.95  # of the intervals
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A run that the fit has not seen."""

    name: str
    parameters: float
    tokens: float
    measured: float
    predicted: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        """Whether the measured loss lies in the interval."""
        return self.low <= self.measured <= self.high

    @property
    def error(self) -> float:
        """Predicted over measured loss, less 1."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, kw_only=True)
class LawFit:
    """A fitted law with intervals; `runs` are those that it was fitted to."""

    name: str
    runs: Runs
    fit: Fit
    resampled: Sequence[PowerLaw]
    intervals: dict[str, Interval]
    predictions: Sequence[Prediction]
    tokens: float | None = None  # of L(N): the budget that all its runs share

    @property
    def constants(self) -> dict[str, float]:
        """E, A, alpha[, B, beta]."""
        values = self.fit.law.constants
        return dict(zip(constant_names(len(values) // 2), values, strict=True))

    @property
    def predictors(self) -> int:
        """1 for L(N), 2 for L(N, D)."""
        return len(self.fit.law.exponents)


@dataclass(frozen=True, kw_only=True)
class FrontierFit:
    """The compute frontier of L(N, D), with intervals of its exponents."""

    frontier: Frontier
    measured: bool  # whether the FLOPs are those of the runs, or 6 N D was assumed
    spread: Interval  # least and largest FLOPs / (N D) of the runs
    a: Interval
    b: Interval


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """All that the runs say."""

    runs: Runs
    settings: Settings
    joint: LawFit | None = None  # L(N, D)
    all_runs: PowerLaw | None = None  # L(N, D) of the held-out runs too
    frontier: FrontierFit | None = None
    by_size: list[LawFit] = field(default_factory=list)  # L(N) at each budget with enough sizes

    @property
    def fitted(self) -> Runs:
        """The runs that are not held out."""
        return self.runs.chosen(~self.runs.held_out)


def analyse(runs: Runs, settings: Settings, tick: Callable[[], None] = lambda: None) -> Analysis:
    """Fit what the runs allow; `tick` is called after every one of the bootstrap's fits, see `fits_to_do`."""
    held, seen = runs.chosen(runs.held_out), runs.chosen(~runs.held_out)
    joint = frontier = everything = None
    if allows_joint(seen):
        joint = _law_fit("L(N, D)", seen, held, settings, tick, predictors=2)
        frontier = _frontier(joint, runs, settings)
        if len(held):
            everything = fit(_predictors(runs, 2), runs.losses, settings.delta).law
    by_size = [
        _law_fit(f"L(N) at {short_number(tokens)} tokens", group, matching, settings, tick, predictors=1)
        for tokens, group, matching in budgets_to_fit(runs)
    ]
    return Analysis(runs=runs, settings=settings, joint=joint, all_runs=everything, frontier=frontier, by_size=by_size)


def allows_joint(runs: Runs) -> bool:
    """Whether there are enough sizes, budgets and runs for L(N, D)."""
    enough = len(runs.sizes) >= MIN_SIZES and len(runs.budgets()) >= MIN_BUDGETS if len(runs) else False
    return enough and len(runs) >= MIN_RUNS


def budgets_to_fit(runs: Runs) -> list[tuple[float, Runs, Runs]]:
    """(tokens, runs to fit, held-out runs) of each budget with enough sizes for L(N)."""
    found = []
    for mask in runs.budgets():
        group, held = runs.chosen(mask & ~runs.held_out), runs.chosen(mask & runs.held_out)
        if len(group) and len(group.sizes) >= MIN_SIZES_ALONE:
            found.append((float(np.median(group.tokens)), group, held))
    return found


def fits_to_do(runs: Runs, settings: Settings) -> int:
    """How often `analyse` calls its `tick`."""
    laws = allows_joint(runs.chosen(~runs.held_out)) + len(budgets_to_fit(runs))
    return laws * settings.resamples


def _predictors(runs: Runs, count: int) -> np.ndarray:
    return np.stack([runs.parameters, runs.tokens][:count], axis=1)


def _law_fit(
    name: str, runs: Runs, held: Runs, settings: Settings, tick: Callable[[], None], *, predictors: int
) -> LawFit:
    rng, x = np.random.default_rng(settings.seed), _predictors(runs, predictors)
    found = fit(x, runs.losses, settings.delta)
    resampled = bootstrap(x, runs.losses, settings.resamples, rng, settings.delta, tick, found)
    constants = np.array([law.constants for law in resampled])
    names = constant_names(predictors)
    predictions = []
    for number, values in enumerate(_predictors(held, predictors) if len(held) else ()):
        likely = np.array([law(*values) for law in resampled])
        low, high = prediction_interval(likely, found.residuals, settings.level, len(names), rng)
        predictions.append(
            Prediction(
                name=held.names[number],
                parameters=float(held.parameters[number]),
                tokens=float(held.tokens[number]),
                measured=float(held.losses[number]),
                predicted=float(found.law(*values)),
                low=low,
                high=high,
            )
        )
    return LawFit(
        name=name,
        runs=runs,
        fit=found,
        resampled=resampled,
        intervals={n: interval(constants[:, i], settings.level, len(runs), len(names)) for i, n in enumerate(names)},
        predictions=predictions,
        tokens=float(np.median(runs.tokens)) if predictors == 1 else None,
    )


def _frontier(joint: LawFit, runs: Runs, settings: Settings) -> FrontierFit:
    known = np.isfinite(runs.flops)
    ratios = (runs.flops / (runs.parameters * runs.tokens))[known] if known.any() else np.array([ASSUMED_FLOPS])
    k = float(np.exp(np.mean(np.log(ratios))))
    each = np.array([Frontier(law=law, flops_per_nd=k).exponents for law in joint.resampled])
    a, b = (interval(each[:, i], settings.level, len(joint.runs), 5) for i in range(2))
    spread = (float(ratios.min()), float(ratios.max()))
    frontier = Frontier(law=joint.fit.law, flops_per_nd=k)
    return FrontierFit(frontier=frontier, measured=bool(known.any()), spread=spread, a=a, b=b)
