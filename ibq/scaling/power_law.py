"""Scaling laws of the loss: L(N) = E + A / N^alpha and L(N, D) = E + A / N^alpha + B / D^beta.

N parameters, D tokens, L loss in nats. Fitted as in the third approach of Hoffmann et al. (arXiv 2203.15556, eqs. 2
and 3): log L is compared with the log-sum-exp of log E, log A - alpha log N and log B - beta log D,

    minimize  sum_i  Huber_delta( LSE(e, a - alpha log N_i, b - beta log D_i) - log L_i ),   delta = 1e-3,

by L-BFGS from many starts. Besiroglu et al. (arXiv 2404.10102) found that a mean instead of the sum lets the optimizer
stop early and the intervals come out too narrow; here the loss is a sum in units of delta^2, the tolerances are those
of float64, the logarithms are centred at the geometric means of N and D, and delta comes down in steps, so that the
kinks of a small delta do not hold the optimizer up.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

EXPONENTS = (0.005, 4.0)  # bounds
FLOOR_RANGE, TERM_RANGE = 12.0, 14.0  # how far below the lowest loss the logarithm of a part may fall
DELTAS = (0.1, 0.01)  # of the Huber loss, before the wanted one
STARTS = 16  # of the grid's, the best
START_FLOORS, START_SHARES, START_EXPONENTS = (0.05, 0.3, 0.6, 0.9), (0.2, 0.5, 0.8), (0.1, 0.3, 0.7, 1.5)
ITERATIONS, RESAMPLE_ITERATIONS = 1000, 150  # of L-BFGS at each delta
CLOSE = 1e-3  # to a bound, in units of the parametrization


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """L = floor + sum_k coefficients[k] / x_k^exponents[k]."""

    floor: float
    coefficients: tuple[float, ...]
    exponents: tuple[float, ...]

    def __call__(self, *values: np.ndarray | float) -> np.ndarray:
        """The loss for N, or for N and D."""
        parts = zip(self.coefficients, self.exponents, values, strict=True)
        return self.floor + sum(c * np.asarray(x, np.float64) ** -g for c, g, x in parts)

    @property
    def constants(self) -> tuple[float, ...]:
        """E, A, alpha[, B, beta]."""
        pairs = zip(self.coefficients, self.exponents, strict=True)
        return (self.floor, *itertools.chain.from_iterable(pairs))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law, and how well it fits."""

    law: PowerLaw
    objective: float  # sum of Huber losses, in units of delta^2
    residuals: np.ndarray  # log of measured over fitted loss, of all points
    theta: np.ndarray  # the law in the parameters of its problem
    bounds: tuple[str, ...]  # constants that lie at a bound: "E", "A", "alpha", "B", "beta"


def constant_names(predictors: int) -> tuple[str, ...]:
    """Names of the constants of a law with so many predictors, in the order of `PowerLaw.constants`."""
    return ("E", "A", "alpha", "B", "beta")[: 1 + 2 * predictors]


# --- The objective ---


def objective(
    theta: np.ndarray, x: np.ndarray, y: np.ndarray, weights: np.ndarray, delta: float
) -> tuple[float, np.ndarray]:
    """(sum of Huber losses / delta^2, gradient) at theta = (e, c_1 .. c_K, g_1 .. g_K).

    x [n, K]: logarithms of the predictors; y [n]: of the losses. The model is LSE(e, c_k - g_k x_k).
    """
    count = x.shape[1]
    # A minimum asks for thousands of these, on few points: what takes time is the number of NumPy's calls.
    shares = np.empty((count + 1, len(y)))
    shares[0] = theta[0]
    np.subtract(theta[1 : count + 1, None], x.T * theta[count + 1 :, None], out=shares[1:])
    top = np.maximum.reduce(shares)
    shares -= top
    np.exp(shares, out=shares)
    total = np.add.reduce(shares)
    residual = (top + np.log(total) - y) / delta
    clipped = np.minimum(np.maximum(residual, -1.0), 1.0)
    pull = weights * clipped
    value = pull @ (residual - 0.5 * clipped)  # residual^2 / 2 within 1, else |residual| - 1/2
    shares *= pull / (delta * total)  # d value / d parts
    return float(value), np.concatenate([np.add.reduce(shares, 1), -np.einsum("kn,nk->k", shares[1:], x)])


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The data of a fit, centred, and the bounds of its parameters."""

    x: np.ndarray
    y: np.ndarray
    centre: np.ndarray
    bounds: tuple[tuple[float, float], ...]
    delta: float

    @classmethod
    def of(cls, predictors: np.ndarray, losses: np.ndarray, delta: float) -> "Problem":
        """For predictors [n, K] and losses [n], all positive."""
        logs, y = np.log(predictors), np.log(losses)
        centre, count = logs.mean(0), logs.shape[1]
        low, high = y.min(), y.max()
        bounds = ((low - FLOOR_RANGE, low), *[(low - TERM_RANGE, high + 2.0)] * count, *[EXPONENTS] * count)
        return cls(x=logs - centre, y=y, centre=centre, bounds=bounds, delta=delta)

    def starts(self, weights: np.ndarray, count: int) -> list[np.ndarray]:
        """The best of a grid of starts."""
        terms, low, mean = self.x.shape[1], math.exp(self.y.min()), math.exp(self.y.mean())
        shares = [(1.0,)] if terms == 1 else [(share, 1 - share) for share in START_SHARES]
        grid = []
        for part, split in itertools.product(START_FLOORS, shares):
            rest = max(mean - part * low, 1e-3 * mean)
            for exponents in itertools.product(START_EXPONENTS, repeat=terms):
                grid.append(np.array([math.log(part * low), *(math.log(rest * s) for s in split), *exponents]))
        values = [objective(theta, self.x, self.y, weights, DELTAS[0])[0] for theta in grid]
        return [grid[index] for index in np.argsort(values, kind="stable")[:count]]

    def solve(
        self, starts: Sequence[np.ndarray], weights: np.ndarray, *, quick: bool = False
    ) -> tuple[float, np.ndarray]:
        """(objective, theta) of the best end of L-BFGS from these starts; `quick` for the many fits to resamples."""
        return min((self._descend(start, weights, quick) for start in starts), key=lambda end: end[0])

    def _descend(self, theta: np.ndarray, weights: np.ndarray, quick: bool) -> tuple[float, np.ndarray]:
        from scipy.optimize import minimize  # slow to import: --help should not wait for it

        value, iterations = math.inf, RESAMPLE_ITERATIONS if quick else ITERATIONS
        larger = [delta for delta in DELTAS if delta > self.delta]
        for delta in (*larger[-1:], self.delta) if quick else (*larger, self.delta, self.delta):
            found = minimize(
                objective,
                theta,
                (self.x, self.y, weights, delta),
                method="L-BFGS-B",
                jac=True,
                bounds=self.bounds,
                options={"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 20, "ftol": 1e-14, "gtol": 1e-10},
            )
            theta, value = found.x, float(found.fun)
        return value, theta

    def law(self, theta: np.ndarray) -> PowerLaw:
        """The law of a parameter vector, not centred any more."""
        count = self.x.shape[1]
        exponents = theta[count + 1 :]
        logs = theta[1 : count + 1] + exponents * self.centre
        return PowerLaw(
            floor=math.exp(theta[0]),
            coefficients=tuple(float(value) for value in np.exp(logs)),
            exponents=tuple(float(value) for value in exponents),
        )

    def at_bounds(self, theta: np.ndarray) -> tuple[str, ...]:
        """The constants that lie at a bound."""
        count = self.x.shape[1]
        order = [0, *itertools.chain.from_iterable((1 + k, 1 + count + k) for k in range(count))]
        names = zip(constant_names(count), order, strict=True)
        return tuple(
            name for name, i in names if min(theta[i] - self.bounds[i][0], self.bounds[i][1] - theta[i]) < CLOSE
        )


def fit(predictors: np.ndarray, losses: np.ndarray, delta: float = 1e-3) -> Fit:
    """Fit a law to predictors [n, K] (N, or N and D) and losses [n]; ValueError for what has no logarithm."""
    predictors, losses = _checked(predictors, losses)
    problem = Problem.of(predictors, losses, delta)
    weights = np.ones(len(losses))
    value, theta = problem.solve(problem.starts(weights, STARTS), weights)
    law = problem.law(theta)
    residuals = np.log(losses) - np.log(law(*predictors.T))
    return Fit(law=law, objective=value, residuals=residuals, theta=theta, bounds=problem.at_bounds(theta))


def _checked(predictors: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predictors, losses = np.asarray(predictors, np.float64), np.asarray(losses, np.float64)
    for name, values in (("predictors", predictors), ("losses", losses)):
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(f"{name}: must all be finite and positive, for their logarithm is taken")
    least = 1 + 2 * predictors.shape[1]
    if len(losses) < least:
        raise ValueError(f"losses: {len(losses)} points cannot determine {least} constants; give more")
    return predictors, losses


# --- Intervals ---


def bootstrap(
    predictors: np.ndarray,
    losses: np.ndarray,
    count: int,
    rng: np.random.Generator,
    delta: float = 1e-3,
    tick: Callable[[], None] = lambda: None,
    found: Fit | None = None,
) -> list[PowerLaw]:
    """Laws fitted to `count` resamples of the runs; `tick` is called after each, `found` is the fit to the runs.

    A resample that has fewer than three values of a predictor, or fewer runs than constants, determines no law and is
    drawn again. ValueError where the runs themselves are too few.
    """
    predictors, losses = _checked(predictors, losses)
    if any(len(set(column)) < 3 for column in predictors.T.tolist()):
        raise ValueError("predictors: fewer than three different values; give runs of more sizes and budgets")
    problem = Problem.of(predictors, losses, delta)
    ones = np.ones(len(losses))
    best = (found or fit(predictors, losses, delta)).theta
    (start,) = problem.starts(ones, 1)
    laws = []
    while len(laws) < count:
        weights = rng.multinomial(len(losses), ones / len(losses)).astype(np.float64)
        drawn = predictors[weights > 0]
        if len(drawn) < len(best) or any(len(set(column)) < 3 for column in drawn.T.tolist()):
            continue
        _, theta = problem.solve([best, start], weights, quick=True)
        laws.append(problem.law(theta))
        tick()
    return laws


def interval(samples: np.ndarray, level: float, points: int, constants: int) -> tuple[float, float]:
    """Bootstrap percentiles that contain a quantity with probability `level`, widened for few points.

    The plain percentiles are too narrow by sqrt((n - p) / n) and by a normal's quantile in place of Student's: the
    expanded percentile interval of Hesterberg (arXiv 1411.5279), here with p fitted constants.
    """
    from scipy.stats import norm, t  # slow to import, as above

    free = max(points - constants, 1)
    tail = norm.cdf(-math.sqrt(points / free) * t.ppf(0.5 + level / 2, free))
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def prediction_interval(
    predictions: np.ndarray, residuals: np.ndarray, level: float, constants: int, rng: np.random.Generator
) -> tuple[float, float]:
    """An interval for the loss of one new run: predictions of resampled laws, each times a resampled residual."""
    points = len(residuals)
    noise = rng.choice(residuals - residuals.mean(), len(predictions)) * math.sqrt(points / max(points - constants, 1))
    return interval(predictions * np.exp(noise), level, points, constants)


# --- The compute frontier ---


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The best use of C = k N D FLOPs (arXiv 2203.15556, eq. 4): N = G (C / k)^a, D = (C / k)^b / G.

    a = beta / (alpha + beta), b = alpha / (alpha + beta), G = (alpha A / (beta B))^(1 / (alpha + beta)).
    """

    law: PowerLaw
    flops_per_nd: float  # k

    @property
    def exponents(self) -> tuple[float, float]:
        """(a, b)."""
        alpha, beta = self.law.exponents
        return beta / (alpha + beta), alpha / (alpha + beta)

    @property
    def scale(self) -> float:
        """G."""
        alpha, beta = self.law.exponents
        a, b = self.law.coefficients
        return math.exp((math.log(alpha * a) - math.log(beta * b)) / (alpha + beta))

    def best(self, flops: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(N, D, loss) that so many FLOPs reach at best."""
        ratio = np.asarray(flops, np.float64) / self.flops_per_nd
        n, d = self.scale * ratio ** self.exponents[0], ratio ** self.exponents[1] / self.scale
        return n, d, self.law(n, d)
