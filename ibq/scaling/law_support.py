"""Whether runs support the scaling laws fitted to them: what speaks against it, in plain words."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ibq.reports.figures import short_number
from ibq.scaling.law_fit import MIN_BUDGETS, MIN_RUNS, MIN_SIZES, MIN_SIZES_ALONE, Analysis, LawFit, Runs, allows_joint

WIDE_EXPONENT, LEAST_EXPONENT = 3.0, 0.03  # an interval's ends differ by more than this factor; a lower end below this
WIDE_FLOOR = 0.25  # of the lowest loss
LARGE_RESIDUAL, LARGE_SHARE = 0.05, 0.25  # root mean square of log residuals; as a share of the log losses' spread
PATTERN, PATTERN_RUNS = 0.75, 10  # correlation of residuals with log N x log D, of at least so many runs
NARROW_SIZES, NARROW_BUDGETS = 10.0, 4.0  # factors between the least and the largest
FREE, MANY_FREE = 2, 5  # runs more than constants: fewer test nothing, fewer than many little
SMALL_RESIDUAL = 1e-3  # of log L, that no pattern is looked for in
RISE = 0.01  # of the loss, that is no noise any more


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that speaks against a law, or (not `serious`) that one should know."""

    law: str
    code: str
    text: str
    serious: bool = True


def findings(analysis: Analysis) -> list[Finding]:
    """All findings; none that is serious: the runs support the laws."""
    seen = analysis.fitted
    found = list(_too_few(seen, analysis))
    laws = [law for law in (analysis.joint, *analysis.by_size) if law is not None]
    for law in laws:
        found += _about_runs(law)
        found += _about_constants(law)
        found += _about_errors(law)
    return found + list(_about_frontier(analysis)) + list(_rising(seen))


def supported(found: list[Finding], law: str) -> bool:
    """Whether nothing serious speaks against a law."""
    return not any(finding.serious and finding.law == law for finding in found)


def _too_few(runs: Runs, analysis: Analysis) -> Iterator[Finding]:
    if not allows_joint(runs):
        sizes, budgets = (len(runs.sizes), len(runs.budgets())) if len(runs) else (0, 0)
        text = (
            f"no fit of L(N, D): {len(runs)} runs of {sizes} sizes and {budgets} token budgets; it needs at least "
            f"{MIN_RUNS} runs of {MIN_SIZES} sizes and {MIN_BUDGETS} budgets"
        )
        yield Finding(law="L(N, D)", code="too_few", text=text)
    if not analysis.by_size:
        text = f"no fit of L(N): no token budget has runs of {MIN_SIZES_ALONE} sizes"
        yield Finding(law="L(N)", code="too_few", text=text)


def _about_runs(law: LawFit) -> Iterator[Finding]:
    runs, constants = law.runs, len(law.constants)
    free = len(runs) - constants
    if free < MANY_FREE:
        text = f"{len(runs)} runs for {constants} constants, {free} more than needed, hardly test the law"
        yield Finding(law=law.name, code="few_runs", text=text, serious=free < FREE)
    spans = {"sizes": (runs.parameters, NARROW_SIZES)}
    if law.predictors == 2:
        spans["token budgets"] = (runs.tokens, NARROW_BUDGETS)
    for name, (values, least) in spans.items():
        factor = values.max() / values.min()
        if factor < least:
            text = f"the {name} differ by a factor of {factor:.3g} only; {least:g} or more tell a power law from others"
            yield Finding(law=law.name, code="narrow", text=text)


def _about_constants(law: LawFit) -> Iterator[Finding]:
    for name in law.fit.bounds:
        text = {
            "E": "E lies at a bound: the runs show no floor of the loss, or nothing above it",
            "A": "A lies at a bound: the loss does not depend on the size as the law says",
            "B": "B lies at a bound: the loss does not depend on the tokens as the law says",
        }.get(name, f"{name} lies at a bound of {law.constants[name]:.3g}: no power law with a sensible exponent fits")
        yield Finding(law=law.name, code=f"bound_{name}", text=text)
    for name in ("alpha", "beta")[: law.predictors]:
        low, high = law.intervals[name]
        if low < LEAST_EXPONENT or high > WIDE_EXPONENT * low:
            text = f"{name} is not determined: anything from {low:.3g} to {high:.3g} is possible"
            yield Finding(law=law.name, code=f"wide_{name}", text=text)
    low, high = law.intervals["E"]
    if high - low > WIDE_FLOOR * law.runs.losses.min():
        text = (
            f"E is not determined: anything from {low:.3g} to {high:.3g} is possible, so the law says little of runs "
            "much larger than these"
        )
        yield Finding(law=law.name, code="wide_E", text=text)


def _about_errors(law: LawFit) -> Iterator[Finding]:
    size = float(np.sqrt(np.mean(law.fit.residuals**2)))
    spread = float(np.std(np.log(law.runs.losses)))
    if size > LARGE_RESIDUAL or size > LARGE_SHARE * spread:
        text = f"the law misses the runs by {size:.1%} on average, where their losses differ by {spread:.1%}"
        yield Finding(law=law.name, code="residuals", text=text)
    if law.predictors == 2 and len(law.runs) >= PATTERN_RUNS:
        yield from _about_pattern(law)
    outside = [prediction for prediction in law.predictions if not prediction.inside]
    for prediction in outside:
        text = (
            f"held-out run {prediction.name} gave {prediction.measured:.4f}, outside of the predicted "
            f"{prediction.predicted:.4f} ({prediction.low:.4f} to {prediction.high:.4f})"
        )
        yield Finding(law=law.name, code="held_out", text=text)


def _about_pattern(law: LawFit) -> Iterator[Finding]:
    """Residuals that go with the product of size and tokens: a sum of two powers has no such term."""
    sizes, tokens = (
        np.log(values / np.exp(np.log(values).mean())) for values in (law.runs.parameters, law.runs.tokens)
    )
    product, residuals = sizes * tokens, law.fit.residuals
    if not product.std() or residuals.std() < SMALL_RESIDUAL:
        return
    found = float(np.corrcoef(product, residuals)[0, 1])
    if abs(found) > PATTERN:
        more = "more" if found < 0 else "less"
        text = (
            f"larger models gain {more} from tokens than a sum of two powers allows: what the law misses follows size "
            f"x tokens (correlation {found:.2f})"
        )
        yield Finding(law=law.name, code="pattern", text=text)


def _about_frontier(analysis: Analysis) -> Iterator[Finding]:
    found = analysis.frontier
    if found is None:
        return
    if not found.measured:
        text = "no run gives its FLOPs: the frontier assumes 6 FLOPs a parameter and token"
        yield Finding(law="L(N, D)", code="assumed_flops", text=text, serious=False)
    flops = found.frontier.flops_per_nd * analysis.runs.parameters * analysis.runs.tokens
    sizes, tokens, _ = found.frontier.best(flops)
    runs = analysis.runs
    inside = (sizes >= runs.parameters.min()) & (sizes <= runs.parameters.max())
    inside &= (tokens >= runs.tokens.min()) & (tokens <= runs.tokens.max())
    if not inside.any() or not math.isfinite(found.frontier.scale):
        text = "the compute frontier lies outside of the sizes and budgets that were run: it is an extrapolation"
        yield Finding(law="L(N, D)", code="frontier_outside", text=text)


def _rising(runs: Runs) -> Iterator[Finding]:
    """Budgets at which more parameters made the loss higher."""
    for mask in runs.budgets() if len(runs) else ():
        group = runs.chosen(mask)
        order = np.argsort(group.parameters, kind="stable")
        losses = group.losses[order]
        worse = [i for i in range(1, len(losses)) if losses[i] > losses[:i].min() * (1 + RISE)]
        if worse:
            names = ", ".join(group.names[order[i]] for i in worse)
            tokens = short_number(float(np.median(group.tokens)))
            text = (
                f"at {tokens} tokens {names} lost to smaller models: overfitting or a bad learning rate, which the law "
                "does not know"
            )
            yield Finding(law="L(N, D)", code="rising", text=text, serious=False)
