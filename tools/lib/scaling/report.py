"""What a fit of scaling laws has found, as text for the terminal and as JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ibq.reports.figures import short_number
from ibq.scaling.law_fit import Analysis, FrontierFit, LawFit, Prediction
from ibq.scaling.law_support import Finding, supported
from ibq.scaling.power_law import constant_names

FORMULAS = {1: "L(N) = E + A / N^alpha", 2: "L(N, D) = E + A / N^alpha + B / D^beta"}
FRONTIER_POINTS = 5  # of the table


def as_text(analysis: Analysis, found: Sequence[Finding], columns: Mapping[str, str]) -> list[str]:
    """Lines for the terminal."""
    runs, seen = analysis.runs, analysis.fitted
    held = [name for name, out in zip(runs.names, runs.held_out, strict=True) if out]
    sizes, tokens = seen.sizes, seen.tokens
    lines = [
        f"{len(seen)} runs of {len(sizes)} sizes ({short_number(sizes[0])} to {short_number(sizes[-1])} "
        f"{columns['size'].replace('_', ' ')}) and {len(seen.budgets())} budgets ({short_number(tokens.min())} to "
        f"{short_number(tokens.max())} tokens); loss: {columns['loss']}",
        f"held out: {', '.join(held) or 'none'}; intervals: {analysis.settings.level:.0%}, from fits to "
        f"{analysis.settings.resamples} resamples of the runs",
    ]
    if analysis.joint is not None:
        lines += ["", *_law_lines(analysis.joint)]
        if analysis.frontier is not None:
            lines += ["", *_frontier_lines(analysis.frontier, analysis)]
    for law in analysis.by_size:
        lines += ["", *_law_lines(law)]
    serious = [finding for finding in found if finding.serious]
    if serious:
        lines += ["", "WARNING: the runs do not support the fit where it says so here"]
        lines += [f"- {finding.law}: {finding.text}" for finding in serious]
    else:
        lines += ["", "Nothing speaks against these fits."]
    notes = [finding for finding in found if not finding.serious]
    return [*lines, *(["", "Notes"] if notes else []), *(f"- {finding.law}: {finding.text}" for finding in notes)]


def _law_lines(law: LawFit) -> Iterator[str]:
    at = "" if law.tokens is None else f" at {short_number(law.tokens)} tokens"
    error = np.sqrt(np.mean(law.fit.residuals**2))
    yield f"{FORMULAS[law.predictors]}{at}: {len(law.runs)} runs, off by {error:.2%} on average"
    for name, value in law.constants.items():
        low, high = law.intervals[name]
        yield f"  {name:<5} {value:>10.4g}   {low:.4g} to {high:.4g}"
    for prediction in law.predictions:
        yield f"  {_prediction(prediction)}"


def _prediction(prediction: Prediction) -> str:
    return (
        f"held-out {prediction.name}: predicted {prediction.predicted:.4f} ({prediction.low:.4f} to "
        f"{prediction.high:.4f}), measured {prediction.measured:.4f}: "
        f"{'inside' if prediction.inside else 'OUTSIDE'}, off by {prediction.error:+.1%}"
    )


def _frontier_lines(found: FrontierFit, analysis: Analysis) -> Iterator[str]:
    frontier, (a, b) = found.frontier, found.frontier.exponents
    source = f"measured, {found.spread[0]:.2f} to {found.spread[1]:.2f}" if found.measured else "assumed"
    yield f"compute frontier, C = {frontier.flops_per_nd:.3g} N D FLOPs ({source}):"
    yield f"  N ~ C^a  a = {a:.3f}   {found.a[0]:.3f} to {found.a[1]:.3f}"
    yield f"  D ~ C^b  b = {b:.3f}   {found.b[0]:.3f} to {found.b[1]:.3f}"
    for row in _frontier_table(found, analysis):
        yield (
            f"  {short_number(row['flops']):>7} FLOPs: {short_number(row['parameters'])} parameters, "
            f"{short_number(row['tokens'])} tokens, loss {row['loss']:.4f}"
        )


def _frontier_table(found: FrontierFit, analysis: Analysis) -> list[dict[str, float]]:
    flops = compute(analysis, found)
    rows = []
    for value in np.geomspace(flops.min(), flops.max(), FRONTIER_POINTS):
        n, d, loss = found.frontier.best(value)
        rows.append({"flops": float(value), "parameters": float(n), "tokens": float(d), "loss": float(loss)})
    return rows


def compute(analysis: Analysis, found: FrontierFit) -> np.ndarray:
    """FLOPs of every run, as measured, or by the frontier's k N D."""
    runs = analysis.runs
    return np.where(np.isfinite(runs.flops), runs.flops, found.frontier.flops_per_nd * runs.parameters * runs.tokens)


# --- JSON ---


def as_json(
    analysis: Analysis, found: Sequence[Finding], columns: Mapping[str, str], source: str, origin: Mapping
) -> str:
    """Everything, for other programs."""
    settings = analysis.settings
    laws = [law for law in (analysis.joint, *analysis.by_size) if law is not None]
    values: dict[str, Any] = {
        "origin": dict(origin),
        "source": source,
        "columns": dict(columns),
        "settings": dict(vars(settings)),
        "supported": analysis.joint is not None and supported(list(found), analysis.joint.name),
        "findings": [dict(vars(finding)) for finding in found],
        "laws": [_law_json(law, supported(list(found), law.name)) for law in laws],
        "all_runs": None,
        "frontier": None,
        "runs": _runs_json(analysis),
    }
    if analysis.all_runs is not None:
        values["all_runs"] = dict(zip(constant_names(2), analysis.all_runs.constants, strict=True))
    if analysis.frontier is not None:
        values["frontier"] = _frontier_json(analysis.frontier, analysis)
    return json.dumps(values, indent=1) + "\n"


def _law_json(law: LawFit, good: bool) -> dict[str, Any]:
    return {
        "law": law.name,
        "formula": FORMULAS[law.predictors],
        "supported": good,
        "runs": list(law.runs.names),
        "tokens": law.tokens,
        "constants": {
            name: {"value": value, "low": law.intervals[name][0], "high": law.intervals[name][1]}
            for name, value in law.constants.items()
        },
        "at_bounds": list(law.fit.bounds),
        "rms_log_residual": float(np.sqrt(np.mean(law.fit.residuals**2))),
        "log_residuals": dict(zip(law.runs.names, law.fit.residuals.tolist(), strict=True)),
        "predictions": [{**vars(p), "inside": p.inside, "error": p.error} for p in law.predictions],
    }


def _frontier_json(found: FrontierFit, analysis: Analysis) -> dict[str, Any]:
    a, b = found.frontier.exponents
    return {
        "flops_per_parameter_and_token": found.frontier.flops_per_nd,
        "measured": found.measured,
        "spread": list(found.spread),
        "a": {"value": a, "low": found.a[0], "high": found.a[1]},
        "b": {"value": b, "low": found.b[0], "high": found.b[1]},
        "G": found.frontier.scale,
        "points": _frontier_table(found, analysis),
    }


def _runs_json(analysis: Analysis) -> list[dict[str, Any]]:
    runs = analysis.runs
    return [
        {
            "run": name,
            "parameters": float(runs.parameters[i]),
            "tokens": float(runs.tokens[i]),
            "flops": float(runs.flops[i]) if np.isfinite(runs.flops[i]) else None,
            "loss": float(runs.losses[i]),
            "held_out": bool(runs.held_out[i]),
        }
        for i, name in enumerate(runs.names)
    ]
