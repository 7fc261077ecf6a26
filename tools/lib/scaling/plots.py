"""Plots of fitted scaling laws: the loss over size, tokens and FLOPs, and what the law misses."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from ibq.files import whole_file
from ibq.reports.figures import short_number
from ibq.scaling.law_fit import Analysis
from tools.lib.scaling.report import compute

INCHES, DPI = (4.6, 3.4), 110
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
REACH = 1.6  # curves go on beyond the runs by this factor


def write_plots(analysis: Analysis, folder: Path, columns: Mapping[str, str]) -> list[Path]:
    """Write the PNG files; which they are."""
    plots: dict[str, Callable[[Axes, Analysis], None]] = {"size": _over_size, "tokens": _over_tokens}
    if analysis.frontier is not None:
        plots["flops"] = _over_flops
    if analysis.joint is not None:
        plots["residuals"] = _residuals
    paths = []
    for name, draw in plots.items():
        paths.append(folder / f"{name}.png")
        with _axes(paths[-1]) as axes:
            axes.set_ylabel(f"loss ({columns['loss']}), nats a token")
            draw(axes, analysis)
    return paths


@contextmanager
def _axes(path: Path) -> Iterator[Axes]:
    """Axes of a figure that is written to a file."""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=INCHES, dpi=DPI, layout="constrained")
        try:
            yield axes
            buffer = BytesIO()
            figure.savefig(buffer, format="png")
        finally:
            pyplot.close(figure)
    with whole_file(path) as file:
        file.write(buffer.getvalue())


def _colors(count: int) -> np.ndarray:
    return pyplot.get_cmap("viridis")(np.linspace(0.0, 0.88, max(count, 2)))


def _points(axes: Axes, x: np.ndarray, y: np.ndarray, held_out: np.ndarray, color) -> None:
    """Filled points for fitted runs, hollow ones for those held out."""
    axes.scatter(x[~held_out], y[~held_out], s=22, color=[color], zorder=3)
    axes.scatter(x[held_out], y[held_out], s=30, facecolors="none", edgecolors=[color], zorder=3)


def _finish(axes: Axes, x_label: str, title: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.set_title(title, fontsize=9, loc="left")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _log_losses(axes: Axes, losses: np.ndarray) -> None:
    """A logarithmic axis with plain numbers."""
    axes.set_yscale("log")
    low, high = losses.min() / 1.05, losses.max() * 1.05
    axes.set_ylim(low, high)
    step = next(step for step in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, high) if (high - low) / step <= 8)
    axes.set_yticks(np.arange(np.ceil(low / step), high / step) * step)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(pyplot.NullLocator())


def _span(values: np.ndarray) -> np.ndarray:
    return np.geomspace(values.min() / REACH, values.max() * REACH, 100)


def _over_size(axes: Axes, analysis: Analysis) -> None:
    runs, masks = analysis.runs, analysis.runs.budgets()
    for mask, color in zip(masks, _colors(len(masks)), strict=False):
        tokens = float(np.median(runs.tokens[mask]))
        _points(axes, runs.parameters[mask], runs.losses[mask], runs.held_out[mask], color)
        label = f"{short_number(tokens)} tokens"
        alone = next((law for law in analysis.by_size if law.tokens == tokens), None)
        n = _span(runs.parameters)
        if analysis.joint is not None:
            axes.plot(n, analysis.joint.fit.law(n, np.full_like(n, tokens)), color=color, lw=1.2, label=label)
        elif alone is not None:
            axes.plot(n, alone.fit.law(n), color=color, lw=1.2, label=label)
        else:
            axes.plot([], [], color=color, label=label)
    _log_losses(axes, runs.losses)
    _finish(axes, "parameters N", "over size; hollow: held out")


def _over_tokens(axes: Axes, analysis: Analysis) -> None:
    runs, sizes = analysis.runs, analysis.runs.sizes
    for size, color in zip(sizes, _colors(len(sizes)), strict=False):
        mask = runs.parameters == size
        _points(axes, runs.tokens[mask], runs.losses[mask], runs.held_out[mask], color)
        label = short_number(float(f"{size:.3g}"))
        if analysis.joint is not None:
            d = _span(runs.tokens)
            axes.plot(d, analysis.joint.fit.law(np.full_like(d, size), d), color=color, lw=1.2, label=label)
        else:
            axes.plot([], [], color=color, label=label)
    _log_losses(axes, runs.losses)
    _finish(axes, "tokens D", "over tokens, by parameters")


def _over_flops(axes: Axes, analysis: Analysis) -> None:
    runs, found = analysis.runs, analysis.frontier
    flops, sizes = compute(analysis, found), analysis.runs.sizes
    for size, color in zip(sizes, _colors(len(sizes)), strict=False):
        mask = runs.parameters == size
        _points(axes, flops[mask], runs.losses[mask], runs.held_out[mask], color)
        order = np.argsort(flops[mask])
        label = short_number(float(f"{size:.3g}"))
        axes.plot(flops[mask][order], runs.losses[mask][order], color=color, lw=0.8, alpha=0.6, label=label)
    c = _span(flops)
    axes.plot(c, found.frontier.best(c)[2], color="black", lw=1.2, ls="--", label="frontier of the law")
    _log_losses(axes, runs.losses)
    _finish(axes, "training FLOPs C", "over compute, by parameters")


def _residuals(axes: Axes, analysis: Analysis) -> None:
    runs, law = analysis.runs, analysis.joint.fit.law
    missed = 100 * (np.log(runs.losses) - np.log(law(runs.parameters, runs.tokens)))
    masks = runs.budgets()
    for mask, color in zip(masks, _colors(len(masks)), strict=False):
        _points(axes, runs.parameters[mask], missed[mask], runs.held_out[mask], color)
        axes.plot([], [], "o", color=color, ms=4, label=f"{short_number(float(np.median(runs.tokens[mask])))} tokens")
    axes.axhline(0.0, color="black", lw=0.8)
    axes.set_ylabel("log of measured over fitted loss, %")
    _finish(axes, "parameters N", "what the law misses; hollow: held out")
