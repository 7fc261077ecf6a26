"""Plots of fitted scaling laws: the loss over size, tokens and FLOPs, and what the law misses."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from ibq.reports.charts import new_figure, save_png
from ibq.reports.figures import short_number
from ibq.scaling.law_fit import Analysis, Runs
from tools.lib.scaling.report import compute

INCHES, DPI = (4.6, 3.4), 110
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
REACH = 1.6  # curves go on beyond the runs by this factor
Group = tuple[np.ndarray, float, dict]  # mask of its runs, what they share, how they look


def write_plots(analysis: Analysis, folder: Path, columns: Mapping[str, str]) -> list[Path]:
    """Write the PNG files; which they are."""
    plots: dict[str, Callable[[Axes, Analysis], None]] = {"size": _over_size, "tokens": _over_tokens}
    if analysis.frontier is not None:
        plots["flops"] = _over_flops
    if analysis.joint is not None:
        plots["residuals"] = _residuals
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, draw in plots.items():
            axes = new_figure(*INCHES, dpi=DPI, layout="constrained").add_subplot()
            axes.set_ylabel(f"loss ({columns['loss']}), nats a token")
            draw(axes, analysis)
            paths.append(save_png(axes.figure, folder / f"{name}.png"))
    return paths


def _budgets(runs: Runs) -> Iterator[Group]:
    masks = runs.budgets()
    for mask, color in zip(masks, _colors(len(masks)), strict=False):
        tokens = float(np.median(runs.tokens[mask]))
        yield mask, tokens, {"color": color, "label": f"{short_number(tokens)} tokens"}


def _sizes(runs: Runs) -> Iterator[Group]:
    for size, color in zip(runs.sizes, _colors(len(runs.sizes)), strict=False):
        yield runs.parameters == size, size, {"color": color, "label": short_number(float(f"{size:.3g}"))}


def _colors(count: int) -> np.ndarray:
    return matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, max(count, 2)))


def _points(axes: Axes, runs: Runs, x: np.ndarray, y: np.ndarray, mask: np.ndarray, look: Mapping) -> None:
    """Filled points for fitted runs, hollow ones for those held out."""
    fitted, held_out = mask & ~runs.held_out, mask & runs.held_out
    axes.plot(x[fitted], y[fitted], "o", ms=4.5, zorder=3, **look)
    axes.plot(x[held_out], y[held_out], "o", ms=5.5, zorder=3, color=look["color"], fillstyle="none")


def _finish(axes: Axes, x_label: str, title: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(fontsize=7)


def _log_losses(axes: Axes, losses: np.ndarray) -> None:
    """A logarithmic axis with plain numbers."""
    axes.set_yscale("log")
    low, high = losses.min() / 1.05, losses.max() * 1.05
    axes.set_ylim(low, high)
    step = next(step for step in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, high) if (high - low) / step <= 8)
    axes.set_yticks(np.arange(np.ceil(low / step), high / step) * step)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.minorticks_off()


def _span(values: np.ndarray) -> np.ndarray:
    return np.geomspace(values.min() / REACH, values.max() * REACH, 100)


def _over_size(axes: Axes, analysis: Analysis) -> None:
    runs, n = analysis.runs, _span(analysis.runs.parameters)
    alone = {law.tokens: law.fit.law for law in analysis.by_size}
    for mask, tokens, look in _budgets(runs):
        _points(axes, runs, runs.parameters, runs.losses, mask, look)
        if analysis.joint is not None:
            axes.plot(n, analysis.joint.fit.law(n, tokens), color=look["color"], lw=1.2)
        elif tokens in alone:
            axes.plot(n, alone[tokens](n), color=look["color"], lw=1.2)
    _log_losses(axes, runs.losses)
    _finish(axes, "parameters N", "over size; hollow: held out")


def _over_tokens(axes: Axes, analysis: Analysis) -> None:
    runs, d = analysis.runs, _span(analysis.runs.tokens)
    for mask, size, look in _sizes(runs):
        _points(axes, runs, runs.tokens, runs.losses, mask, look)
        if analysis.joint is not None:
            axes.plot(d, analysis.joint.fit.law(size, d), color=look["color"], lw=1.2)
    _log_losses(axes, runs.losses)
    _finish(axes, "tokens D", "over tokens, by parameters")


def _over_flops(axes: Axes, analysis: Analysis) -> None:
    runs, found = analysis.runs, analysis.frontier
    flops = compute(analysis, found)
    for mask, _, look in _sizes(runs):
        _points(axes, runs, flops, runs.losses, mask, look)
        order = np.argsort(flops[mask])
        axes.plot(flops[mask][order], runs.losses[mask][order], color=look["color"], lw=0.8, alpha=0.6)
    c = _span(flops)
    axes.plot(c, found.frontier.best(c)[2], color="black", lw=1.2, ls="--", label="frontier of the law")
    _log_losses(axes, runs.losses)
    _finish(axes, "training FLOPs C", "over compute, by parameters")


def _residuals(axes: Axes, analysis: Analysis) -> None:
    runs, law = analysis.runs, analysis.joint.fit.law
    missed = 100 * (np.log(runs.losses) - np.log(law(runs.parameters, runs.tokens)))
    for mask, _, look in _budgets(runs):
        _points(axes, runs, runs.parameters, missed, mask, look)
    axes.axhline(0.0, color="black", lw=0.8)
    axes.set_ylabel("log of measured over fitted loss, %")
    _finish(axes, "parameters N", "what the law misses; hollow: held out")
