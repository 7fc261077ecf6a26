"""Charts drawn by matplotlib: SVG that takes its colours from the page's style sheet, light and dark, and PNG files.

matplotlib is imported where something is drawn, for that takes half a second, and without its global state.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ibq.files import whole_file
from ibq.reports.figures import short_number
from ibq.reports.style import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 210  # matplotlib's points, on a screen about pixels: the page scales a drawing a little to fit its column
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 38
MAX_POINTS = 100  # longer series are averaged over neighbouring steps
MAX_STEPS = 400  # of a histogram
MARKED_POINTS = 16  # shorter series show every point
NUM_COLORS = 6
DASHES = ("solid", "dashed", "dotted")  # of the first six lines, the second six, the third six
REFERENCES = ("dashed", "dotted", "dashdot")
FONT_SIZE = 11.5
SOFT, CARD = LIGHT["soft"], LIGHT["card"]
LOOK = {
    "font.size": FONT_SIZE, "text.color": SOFT, "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
    "axes.edgecolor": SOFT, "axes.facecolor": "none", "axes.spines.left": False, "axes.spines.right": False,
    "axes.spines.top": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    "grid.color": LIGHT["grid"], "ytick.major.size": 0, "ytick.major.pad": 7, "lines.linewidth": 2,
    "lines.markersize": 4.5, "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "ibq",  # text as text; the same names of shared parts at every run
}  # fmt: skip
# What the page does without, or says in its style sheet: fonts, names of groups, rotations by nothing, digits.
NEEDLESS = rf'font-size: {FONT_SIZE}px; |font-family: [^;]*; |(?<=<g) id="[^"]*"| transform="rotate\(-0 [^"]*"'
NEEDLESS += r"|(?<=\.\d\d)\d+|\n *"

Points = Sequence[tuple[float, float]]
Series = Mapping[str, tuple[int, Points]]  # name -> (number of the line's style, [(x, y)])


# --- Figures and files ---


def new_figure(width: float, height: float, **options) -> "Figure":
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), **options)


def save_png(figure: "Figure", path: Path) -> Path:
    """Write a figure, whole or not at all; the path again."""
    with whole_file(path) as file:
        figure.savefig(file, format="png")
    return path


@contextmanager
def page_look() -> Iterator[None]:
    """Figures made and saved within this context look like the page."""
    import matplotlib

    with matplotlib.rc_context(LOOK):
        yield


def as_svg(figure: "Figure", description: str, style: str = "") -> str:
    """An <svg> with a description for those who cannot see it, and perhaps with a style sheet of its own."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    head, _, drawing = text.getvalue().partition("</defs>")  # matplotlib's own style sheet ends there
    size = re.search(r'width=.*viewBox="[^"]*"', head)[0].replace("pt", "")
    names = {color: f"var(--{name})" for name, color in LIGHT.items()}
    drawing = re.sub("#[0-9a-f]{6}", lambda found: names.get(found[0], found[0]), re.sub(NEEDLESS, "", drawing))
    spoken = f'role="img" aria-label="{escape(description)}"' if description else ""
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"<svg {space} {size} {spoken}>{style}{drawing}"


# --- Parts of a chart ---


def downsample(points: Points, limit: int = MAX_POINTS) -> np.ndarray:
    """[4, n]: x, mean, lowest and highest y of at most `limit` groups of neighbours; values not finite are left out.

    The first and the last group stand where the series begins and ends.
    """
    clean = sorted((float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y))
    if not clean:
        return np.empty((4, 0))
    groups = np.array_split(np.array(clean), min(limit, len(clean)))
    found = np.array([(*group.mean(0), group[:, 1].min(), group[:, 1].max()) for group in groups]).T
    found[0, [0, -1]] = clean[0][0], clean[-1][0]
    return found


def draw_lines(
    axes: "Axes",
    series: Series,
    *,
    percent: bool = False,
    references: Mapping[str, float] = MappingProxyType({}),
    expected: np.ndarray | None = None,
) -> dict[str, float]:
    """Draw curves, the range of what was averaged as a band, and horizontal lines {name: y}; the curves' last values.

    Curves without any finite value are left out; without any such curve nothing is drawn. `expected` [4, n], with a
    step, its mean, lowest and highest value in a column, lies beneath.
    """
    from matplotlib.ticker import MaxNLocator

    curves = {name: downsample(points) for name, (_, points) in series.items()}
    curves = {name: curve for name, curve in curves.items() if curve.size}
    if not curves:
        return {}
    beneath = [] if expected is None else [expected]
    every = np.concatenate([*curves.values(), *beneath], axis=1)
    first, last = every[0].min(), every[0].max()
    start = 0.0 if 0 <= first < 0.3 * last else first
    axes.set_xlim(start, last if last > start else start + 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(_tick_text(last))
    axes.set_xlabel("step")
    _set_values(axes, np.array([*every[2], *every[3], *references.values()]), percent)
    for x, mean, low, high in beneath:
        axes.fill_between(x, low, high, color=SOFT, alpha=0.25, linewidth=0)
        axes.plot(x, mean, color=SOFT, linewidth=1, linestyle="dashed")
    for name, (x, mean, low, high) in curves.items():
        look = line_look(series[name][0])
        if (low < high).any():
            axes.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0)
        axes.plot(x, mean, marker="o" if len(x) <= MARKED_POINTS else "", clip_on=False, **look)
    for (name, y), dashes in zip(references.items(), itertools.cycle(REFERENCES), strict=False):
        draw_level(axes, name, y, dashes, references.values())
    return {name: float(curve[1, -1]) for name, curve in curves.items()}


def line_look(style: int) -> dict[str, str]:
    """Colour and dashes of a line: more lines than colours are told apart by dashes."""
    return {"color": LIGHT[f"s{style % NUM_COLORS}"], "linestyle": DASHES[style // NUM_COLORS]}


def draw_level(axes: "Axes", name: str, y: float, dashes: str, others: Sequence[float] = ()) -> None:
    """A horizontal line with its name at the right end: above it, or below where another line is close above."""

    def up(value: float) -> float:
        return axes.transData.transform((0, value))[1]

    crowded = any(0 < up(other) - up(y) < 18 for other in others)
    axes.axhline(y, color=SOFT, linewidth=1.5, linestyle=dashes)
    place = {"xy": (1, y), "xycoords": ("axes fraction", "data"), "xytext": (0, -4 if crowded else 4)}
    behind = {"facecolor": CARD, "edgecolor": "none", "pad": 1, "alpha": 0.8}
    aligned = {"ha": "right", "va": "top" if crowded else "bottom"}
    axes.annotate(name, textcoords="offset points", annotation_clip=False, bbox=behind, **place, **aligned)


def _set_values(axes: "Axes", values: np.ndarray, percent: bool) -> None:
    """Limits that hold all values, with some room; logarithmic where positive values span a factor of 50."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    low, high = float(values.min()), float(values.max())
    if percent:
        axes.set_ylim(0.0, max(1.0, high))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        return
    if low > 0 and high / low > 50:
        set_logarithmic(axes, low / 1.15, high * 1.15)
        return
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(0.0 if low >= 0 and low - room < 0.25 * high else low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter(_tick_text(max(abs(low), abs(high))))


def set_logarithmic(axes: "Axes", low: float, high: float) -> None:
    """A logarithmic vertical axis with round numbers."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 500 else (1,), numticks=6))
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.minorticks_off()


def _tick_text(largest: float):
    """How the ticks of a linear axis are written."""
    if largest >= 10_000:
        return lambda value, _: short_number(value)
    return lambda value, _: f"{round(value, 12) + 0.0:,.10g}"


# --- Charts of the page ---


def figure(title: str, legend: Sequence[str], drawing: str) -> str:
    """A chart with its title and legend, which are text and so wrap, scale and print with the page."""
    keys = f'<ul class="legend">{"".join(legend)}</ul>' if legend else ""
    return f'<figure class="chart"><figcaption><b>{title}</b>{keys}</figcaption>{drawing}</figure>'


def swatch(kind: str, color: str, text: str) -> str:
    """One entry of a legend: a line ("solid", "dashed", ...) or an "area" in one of the page's colours."""
    return f'<li><i class="key {kind}" style="--c: var(--{color})"></i>{text}</li>'


def line_chart(
    series: Series,
    *,
    title: str,
    unit: str = "",
    percent: bool = False,
    references: Mapping[str, float] = MappingProxyType({}),
    band: tuple[str, np.ndarray | None] = ("", None),
    width: int = 320,
) -> str:
    """Curves over training steps, and horizontal lines {name: y}, in one plot.

    Values that are not finite are left out; without any finite value the result is "". `band`: its name, and what
    `draw_lines` takes as `expected`.
    """
    levels = {name: float(y) for name, y in references.items() if math.isfinite(y)}
    legend, spoken = [], []
    with page_look():
        axes = _single_axes(width, HEIGHT)
        ends = draw_lines(axes, series, percent=percent, references=levels, expected=band[1])
        for name, end in ends.items():
            text, style = f"{end:.1%}" if percent else f"{end:.4g}", series[name][0]
            kind, color = DASHES[style // NUM_COLORS], f"s{style % NUM_COLORS}"
            legend.append(swatch(kind, color, f"{escape(name)} <em>{text}</em>"))
            spoken.append(f"{name} ends at {text}")
        if band[1] is not None:
            legend.append(swatch("area", "soft", f"{escape(band[0])} <em>{band[1][1, -1]:.4g}</em>"))
        for (name, y), dashes in zip(levels.items(), itertools.cycle(REFERENCES), strict=False):
            legend.append(swatch(dashes, "soft", f"{escape(name)} <em>{y:.4g}</em>"))
            spoken.append(f"{name} is {y:.4g}")
        drawing = as_svg(axes.figure, f"{title} by step: {'; '.join(spoken)}")
    return figure(_heading(title, unit, axes), legend, drawing) if ends else ""


def _single_axes(width: int, height: int) -> "Axes":
    """Axes in a figure of so many points."""
    canvas = new_figure(width / 72, height / 72, facecolor="none")
    size = ((width - LEFT - RIGHT) / width, (height - TOP - BOTTOM) / height)
    return canvas.add_axes((LEFT / width, BOTTOM / height, *size))


def _heading(title: str, unit: str, axes: "Axes") -> str:
    scale = ", ".join(filter(None, (unit, "logarithmic" if axes.get_yscale() == "log" else "")))
    return escape(title) + (f' <span class="soft">{escape(scale)}</span>' if scale else "")


def rank_chart(counts: Tensor, *, title: str) -> str:
    """How often each code occurs (counts [K]), most frequent first, with the mean and the unused codes marked."""
    num_codes, used = len(counts), int((counts > 0).sum())
    if not used:
        return ""
    with page_look():
        axes = _single_axes(620, 250)
        ordered = draw_ranks(axes, counts)
        spoken = f"{used} of {num_codes} codes occur, from {ordered[0]:.0f} down to {ordered[used - 1]:.0f} times"
        drawing = as_svg(axes.figure, f"{title}: {spoken}")
    legend = [
        swatch("area", "s0", f"in use <em>{used:,} of {num_codes:,} ({used / num_codes:.1%})</em>"),
        *([swatch("area unused", "soft", f"never used <em>{num_codes - used:,}</em>")] if used < num_codes else []),
        swatch(REFERENCES[0], "soft", f"mean, if all were equally frequent <em>{ordered.mean():,.4g}</em>"),
    ]
    return figure(_heading(title, "", axes), legend, drawing)


def draw_ranks(axes: "Axes", counts: Tensor) -> np.ndarray:
    """How often each code occurs (counts [K], not all zero), most frequent first; these numbers in that order."""
    ordered = counts.double().nan_to_num(0, 0, 0).sort(descending=True).values.cpu().numpy()
    num_codes, used = len(ordered), int((ordered > 0).sum())
    edges = np.unique(np.linspace(0, used, min(used, MAX_STEPS) + 1).round())
    heights = ordered[edges[:-1].astype(int)]
    axes.set_xlim(0, num_codes)
    axes.xaxis.set_major_formatter(_tick_text(num_codes))
    axes.set_xlabel("codes, most frequent first")
    if heights[0] > 50 * heights[-1]:
        set_logarithmic(axes, heights[-1] / 1.5, heights[0] * 1.2)
    else:
        axes.set_ylim(0, heights[0] * 1.06)
        axes.yaxis.set_major_formatter(_tick_text(heights[0]))
    axes.stairs(heights, edges, baseline=axes.get_ylim()[0], fill=True, color=LIGHT["s0"], alpha=0.75)
    axes.axvspan(used, num_codes, color=SOFT, alpha=0.14, linewidth=0)
    draw_level(axes, "mean", float(ordered.mean()), REFERENCES[0])
    return ordered


def share_bar(parts: Mapping[str, float], *, title: str, labels: Mapping[str, str]) -> str:
    """One stacked bar of the parts' shares; `labels` gives each part's value as text."""
    shown = {name: float(value) for name, value in parts.items() if math.isfinite(value) and value > 0}
    pieces, legend, total = [], [], sum(shown.values())
    for index, (name, value) in enumerate(shown.items()):
        color, text = f"s{index % NUM_COLORS}", f"{escape(name)} <em>{escape(labels[name])} · {value / total:.0%}</em>"
        tip = escape(f"{name}: {labels[name]} ({value / total:.0%})")
        pieces.append(f'<i style="flex: {value / total:.4f}; --c: var(--{color})" title="{tip}"></i>')
        legend.append(swatch("area", color, text))
    spoken = "; ".join(f"{name} {labels[name]}" for name in shown)
    bar = f'<div class="bar" role="img" aria-label="{escape(f"{title}: {spoken}")}">{"".join(pieces)}</div>'
    return figure(escape(title), legend, bar) if shown else ""
