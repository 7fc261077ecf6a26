"""A picture of a codebook: how often codes occur, how far apart and how long they are, and where the latents lie."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ibq.reports import charts
from ibq.reports.charts import CARD, SOFT, draw_ranks, new_figure, page_look, save_png
from ibq.reports.style import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 60
PANEL = (6.2, 3.9)  # inches
COLORS = {"in use": LIGHT["s0"], "dead": LIGHT["s5"], "codes": LIGHT["s0"], "latents": LIGHT["s1"]}


@dataclass(frozen=True, kw_only=True)
class CodebookPicture:
    """What is drawn of a codebook; a panel without anything to show is left out."""

    title: str
    counts: Tensor | None = None  # [K], how often each code occurs
    # Part ("in use", "dead", or "codes" where nothing is known of their use; "latents") -> values [N].
    distances: Mapping[str, Tensor] = field(default_factory=dict)  # to the nearest other code; of latents to their own
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    points: Mapping[str, Tensor] = field(default_factory=dict)  # -> [N, 2]
    weights: Tensor | None = None  # how often each of the codes "in use" among the points occurs
    channels: Sequence[float] = ()  # how evenly the levels of each channel are used

    def write(self, path: Path) -> None:
        """Write the panels as a PNG file, whole or not at all."""
        panels = self._panels()
        rows = -(-len(panels) // 2)
        with page_look():
            size = (PANEL[0] * min(len(panels), 2), PANEL[1] * rows + 0.4)
            sheet = new_figure(*size, layout="constrained", facecolor=CARD, dpi=110)
            sheet.suptitle(self.title, x=0.01, ha="left", size=14, weight="bold", color=LIGHT["ink"])
            grid = list(sheet.subplots(rows, min(len(panels), 2), squeeze=False).flat)
            for axes, (title, draw) in zip(grid, panels.items(), strict=False):
                axes.set_title(title, loc="left", size=12, weight="bold", color=LIGHT["ink"])
                draw(axes)
            for axes in grid[len(panels) :]:
                axes.remove()
            save_png(sheet, path)

    def _panels(self) -> dict[str, Callable[["Axes"], object]]:
        panels: dict[str, Callable[[Axes], object]] = {}
        if self.counts is not None and bool(self.counts.any()):
            used = int((self.counts > 0).sum())
            title = f"How often each code occurs: {used:,} of {len(self.counts):,} do"
            panels[title] = lambda axes: draw_ranks(axes, self.counts)
        if self.distances:
            panels["From a code to the nearest other, a latent to its own"] = lambda axes: _histograms(
                axes, self.distances, "distance"
            )
        if self.norms:
            panels["Norms, as the search compares vectors"] = lambda axes: _histograms(axes, self.norms, "norm")
        if self.channels:
            panels["How evenly each channel's levels are used"] = self._draw_channels
        if self.points:
            panels["The plane in which codes and latents vary most"] = self._draw_points
        return panels

    def _draw_channels(self, axes: "Axes") -> None:
        axes.bar(range(len(self.channels)), self.channels, color=COLORS["in use"], alpha=0.75)
        axes.set_ylim(0, 1)
        axes.set_xlabel("channel")

    def _draw_points(self, axes: "Axes") -> None:
        from matplotlib.colors import LogNorm

        for name in ("dead", "codes", "latents", "in use"):  # the last one on top
            if name not in self.points or not len(self.points[name]):
                continue
            x, y = self.points[name].t().cpu().numpy()
            look = {"s": 7, "linewidths": 0, "label": f"{name} ({len(x):,})"}
            if name == "in use" and self.weights is not None:
                weights = self.weights.cpu().numpy()
                scale = LogNorm(1, max(float(weights.max()), 2))
                drawn = axes.scatter(x, y, c=weights, norm=scale, cmap="viridis_r", **look | {"s": 12})
                bar = axes.figure.colorbar(drawn, ax=axes, pad=0.01)
                bar.ax.yaxis.set_major_formatter(lambda value, _: charts.short_number(value))
                bar.ax.minorticks_off()
                bar.set_label("tokens a code")
                bar.outline.set_visible(False)
            else:
                axes.scatter(x, y, color=COLORS[name], alpha=0.35 if name != "codes" else 0.7, **look)
        axes.grid(visible=False)
        behind = {"frameon": True, "facecolor": CARD, "edgecolor": "none", "framealpha": 0.8}
        axes.legend(markerscale=2, loc="upper right", handletextpad=0.2, fontsize=10, **behind)


def _histograms(axes: "Axes", parts: Mapping[str, Tensor], label: str) -> None:
    """Shares of the parts' values, in the same bins."""
    values = {name: part.double().cpu().numpy() for name, part in parts.items() if len(part)}
    every = np.concatenate(list(values.values()))
    low, high = float(every.min()), float(every.max())
    room = 0.02 * (high - low) or 0.05 * abs(high) or 1.0
    edges = np.linspace(low - room, high + room, BINS + 1)
    for name, part in values.items():
        heights = np.histogram(part, edges)[0] / len(part)
        axes.stairs(heights, edges, fill=True, color=COLORS[name], alpha=0.5, label=f"{name} ({len(part):,})")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel(label)
    axes.set_ylabel("share", color=SOFT)
    axes.legend(loc="upper right", fontsize=10)
