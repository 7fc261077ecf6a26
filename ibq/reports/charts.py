"""Charts as inline SVG: no dependency, colours from the page's CSS variables (--ink, --grid, --s0 ... --s5)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from torch import Tensor

from ibq.reports.figures import short_number

HEIGHT = 210  # user units, about pixels: the page scales a drawing a little to fit its column
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 38
MAX_POINTS = 100  # longer series are averaged over neighbouring steps
MAX_STEPS = 400  # of a histogram
MARKED_POINTS = 16  # shorter series show every point
NUM_COLORS = 6

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps values to 0..1, linearly or by logarithm, and knows its ticks."""

    low: float
    high: float
    log: bool = False
    percent: bool = False

    def place(self, value: float) -> float:
        """Where a value lies on the axis: 0 at `low`, 1 at `high`; values outside are moved to the ends."""
        value = min(max(value, self.low), self.high)
        if self.log:
            start = math.log(self.low)
            return (math.log(value) - start) / (math.log(self.high) - start)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round values within the axis."""
        if self.log:
            return self._log_ticks(count)
        step = nice_step(self.high - self.low, count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _log_ticks(self, count: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        mantissas = (1, 2, 5) if self.high / self.low < 500 else (1,)
        stride = max(1, (last - first) // count)
        candidates = [m * 10.0**e for e in range(first, last + 1, stride) for m in mantissas]
        return [tick for tick in candidates if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]

    def label(self, value: float) -> str:
        """A tick's text, with as many decimals as its neighbours need."""
        if self.percent:
            return f"{value * 100:.4g}%"
        if self.log or max(abs(self.low), abs(self.high)) >= 10_000:
            return short_number(value)
        decimals = max(0, -math.floor(math.log10(nice_step(self.high - self.low, 5)) + 1e-9))
        return f"{value + 0.0:,.{decimals}f}" if round(value, decimals) else "0"


def nice_step(span: float, count: int) -> float:
    """The step of 1, 2 or 5 times a power of ten that divides `span` into about `count` parts."""
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if raw <= factor * power * (1 + 1e-9))


def value_axis(values: Sequence[float], *, percent: bool = False, allow_log: bool = True) -> Axis:
    """An axis that holds all values, with some room; logarithmic where positive values span a factor of 50."""
    low, high = min(values), max(values)
    if percent:
        return Axis(low=0.0, high=max(1.0, high), percent=True)
    if allow_log and low > 0 and high / low > 50:
        return Axis(low=low / 1.15, high=high * 1.15, log=True)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low=0.0 if low >= 0 and low - room < 0.25 * high else low - room, high=high + room)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Neighbouring points of a series."""

    x: float
    first: float
    last: float
    mean: float
    low: float
    high: float


def downsample(points: Points, limit: int = MAX_POINTS) -> list[Bucket]:
    """At most `limit` buckets of finite points in order of x, each with mean, lowest and highest value."""
    clean = sorted((float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y))
    count = min(limit, len(clean))
    edges = [round(index * len(clean) / count) for index in range(count + 1)] if count else []
    groups = [clean[start:stop] for start, stop in pairwise(edges)]
    return [
        Bucket(
            x=sum(x for x, _ in group) / len(group),
            first=group[0][0],
            last=group[-1][0],
            mean=sum(y for _, y in group) / len(group),
            low=min(y for _, y in group),
            high=max(y for _, y in group),
        )
        for group in groups
    ]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A plot's size and two axes, and how values become coordinates."""

    x: Axis
    y: Axis
    width: int
    height: int = HEIGHT

    @property
    def right(self) -> int:
        """Horizontal coordinate of the plot's end."""
        return self.width - RIGHT

    @property
    def bottom(self) -> int:
        """Vertical coordinate of the horizontal axis."""
        return self.height - BOTTOM

    def point(self, x: float, y: float) -> str:
        """Coordinates as SVG writes them."""
        return f"{self.left(x):.1f},{self.top(y):.1f}"

    def left(self, x: float) -> float:
        """Horizontal coordinate of x."""
        return LEFT + self.x.place(x) * (self.right - LEFT)

    def top(self, y: float) -> float:
        """Vertical coordinate of y (SVG counts downwards)."""
        return self.bottom - self.y.place(y) * (self.bottom - TOP)

    def level(self, name: str, y: float, style: str, *, below: bool = False) -> str:
        """A dashed horizontal line with its name at the right end."""
        top = self.top(y)
        line = f'<path class="reference {style}" d="M{LEFT} {top:.1f}H{self.right}"/>'
        return (
            f'{line}<text x="{self.right}" y="{top + (13 if below else -5):.1f}" class="end on">{escape(name)}</text>'
        )

    def draw(self, body: str, *, x_label: str, description: str) -> str:
        """The SVG: grid and ticks under `body`, a description for those who cannot see it."""
        parts = [f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(description)}">']
        for tick in self.y.ticks():
            top = self.top(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {top:.1f}H{self.right}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{top + 3.8:.1f}" class="end">{self.y.label(tick)}</text>')
        for tick in self.x.ticks(6):
            left = self.left(tick)
            parts.append(f'<path class="tick" d="M{left:.1f} {self.bottom}v4"/>')
            parts.append(f'<text x="{left:.1f}" y="{self.bottom + 16}" class="middle">{self.x.label(tick)}</text>')
        parts += [body, f'<path class="axis" d="M{LEFT} {self.bottom}H{self.right}"/>']
        middle = (LEFT + self.right) / 2
        parts.append(f'<text x="{middle}" y="{self.height - 4}" class="middle soft">{escape(x_label)}</text></svg>')
        return "".join(parts)


def figure(title: str, legend: Sequence[str], drawing: str) -> str:
    """A chart with its title and legend, which are text and so wrap, scale and print with the page."""
    keys = f'<ul class="legend">{"".join(legend)}</ul>' if legend else ""
    return f'<figure class="chart"><figcaption><b>{title}</b>{keys}</figcaption>{drawing}</figure>'


def swatch(style: str, text: str) -> str:
    """One entry of a legend; `style` is a CSS class such as "s0" or "r1"."""
    return f'<li><i class="key {style}"></i>{text}</li>'


def line_chart(
    series: Mapping[str, tuple[int, Points]],
    *,
    title: str,
    unit: str = "",
    x_label: str = "step",
    percent: bool = False,
    references: Mapping[str, float] | None = None,
    width: int = 320,
) -> str:
    """Curves {name: (colour number, [(x, y)])} and dashed horizontal lines {name: y} in one plot.

    Values that are not finite are left out; without any finite value the result is "".
    """
    curves = {name: (color, downsample(points)) for name, (color, points) in series.items()}
    curves = {name: (color, buckets) for name, (color, buckets) in curves.items() if buckets}
    lines = {name: float(y) for name, y in (references or {}).items() if math.isfinite(y)}
    if not curves:
        return ""
    buckets = [bucket for _, found in curves.values() for bucket in found]
    values = [y for bucket in buckets for y in (bucket.low, bucket.high)]
    first, last = min(bucket.first for bucket in buckets), max(bucket.last for bucket in buckets)
    start = 0.0 if 0 <= first < 0.3 * last else first
    axis = Axis(low=start, high=last if last > start else start + 1)
    frame = Frame(x=axis, y=value_axis([*values, *lines.values()], percent=percent), width=width)
    body, legend, spoken = [], [], []
    for name, (color, found) in curves.items():
        text = f"{found[-1].mean:.1%}" if percent else f"{found[-1].mean:.4g}"
        body.append(_curve(frame, found, color))
        legend.append(swatch(f"s{color}", f"{escape(name)} <em>{text}</em>"))
        spoken.append(f"{name} ends at {text}")
    for index, (name, y) in enumerate(lines.items()):
        crowded = any(0 < frame.top(y) - frame.top(other) < 18 for other in lines.values())
        body.append(frame.level(name, y, f"r{index % 3}", below=crowded))
        legend.append(swatch(f"reference r{index % 3}", f"{escape(name)} <em>{y:.4g}</em>"))
        spoken.append(f"{name} is {y:.4g}")
    scale = ", ".join(text for text in (unit, "logarithmic" if frame.y.log else "") if text)
    heading = escape(title) + (f' <span class="soft">{escape(scale)}</span>' if scale else "")
    description = f"{title} by {x_label}: {'; '.join(spoken)}"
    return figure(heading, legend, frame.draw("".join(body), x_label=x_label, description=description))


def _curve(frame: Frame, buckets: Sequence[Bucket], color: int) -> str:
    line = " ".join(frame.point(bucket.x, bucket.mean) for bucket in buckets)
    drawn = ""
    if any(bucket.low < bucket.high for bucket in buckets):
        upper = [frame.point(bucket.x, bucket.high) for bucket in buckets]
        lower = [frame.point(bucket.x, bucket.low) for bucket in reversed(buckets)]
        drawn = f'<polygon class="band s{color}" points="{" ".join(upper + lower)}"/>'
    drawn += f'<polyline class="line s{color}" points="{line}"/>'
    if len(buckets) <= MARKED_POINTS:
        for bucket in buckets:
            left, top = frame.point(bucket.x, bucket.mean).split(",")
            drawn += f'<circle class="dot s{color}" cx="{left}" cy="{top}" r="2.6"/>'
    return drawn


def rank_chart(counts: Tensor, *, title: str) -> str:
    """How often each code occurs (counts [K]), most frequent first, with the mean and the unused codes marked."""
    ordered = counts.double().nan_to_num(0, 0, 0).sort(descending=True).values
    num_codes, used = len(ordered), int((ordered > 0).sum())
    if not used:
        return ""
    mean = float(ordered.sum() / num_codes)
    drawn = min(used, MAX_STEPS)
    positions = [round(index * (used - 1) / max(drawn - 1, 1)) for index in range(drawn)]
    heights = [float(ordered[position]) for position in positions]
    frame = Frame(x=Axis(low=0, high=num_codes), y=_count_axis(heights), width=620, height=250)
    steps = [f"M{frame.point(0, frame.y.low)}"]
    for position, following, height in zip(positions, [*positions[1:], used], heights, strict=True):
        steps.append(f"L{frame.point(position, height)} {frame.point(following, height)}")
    steps.append(f"L{frame.point(used, frame.y.low)}Z")
    body = [f'<path class="area s0" d="{"".join(steps)}"/>']
    left = frame.left(used)
    if used < num_codes:
        size = f'width="{frame.right - left:.1f}" height="{frame.bottom - TOP}"'
        body.append(f'<rect class="unused" x="{left:.1f}" y="{TOP}" {size}/>')
    body.append(frame.level("mean", mean, "r0"))
    legend = [
        swatch("area s0", f"in use <em>{used:,} of {num_codes:,} ({used / num_codes:.1%})</em>"),
        swatch("reference r0", f"mean, if all were equally frequent <em>{mean:,.4g}</em>"),
    ]
    if used < num_codes:
        legend.insert(1, swatch("unused", f"never used <em>{num_codes - used:,}</em>"))
    x_label = "codes, most frequent first"
    heading = escape(title) + (' <span class="soft">logarithmic</span>' if frame.y.log else "")
    description = f"{title}: {used} of {num_codes} codes occur, from {heights[0]:.0f} down to {heights[-1]:.0f} times"
    return figure(heading, legend, frame.draw("".join(body), x_label=x_label, description=description))


def _count_axis(heights: Sequence[float]) -> Axis:
    if heights[0] > 50 * heights[-1]:
        return Axis(low=heights[-1] / 1.5, high=heights[0] * 1.2, log=True)
    return Axis(low=0, high=heights[0] * 1.06)


def share_bar(parts: Mapping[str, float], *, title: str, labels: Mapping[str, str]) -> str:
    """One stacked bar of the parts' shares; `labels` gives each part's value as text."""
    shown = {name: float(value) for name, value in parts.items() if math.isfinite(value) and value > 0}
    total = sum(shown.values())
    if not shown:
        return ""
    width, gap, left, body, legend = 1000.0, 2.0, 0.0, [], []
    for index, (name, value) in enumerate(shown.items()):
        color, extent = index % NUM_COLORS, width * value / total
        tip = f"<title>{escape(name)}: {escape(labels[name])} ({value / total:.0%})</title>"
        size = f'width="{max(extent - gap, 1):.1f}" height="26"'
        body.append(f'<rect class="fill s{color}" x="{left:.1f}" y="0" {size}>{tip}</rect>')
        text = f"{escape(name)} <em>{escape(labels[name])} · {value / total:.0%}</em>"
        legend.append(swatch(f"area s{color}", text))
        left += extent
    spoken = "; ".join(f"{name} {labels[name]}" for name in shown)
    drawing = f'<svg class="wide" viewBox="0 0 {width:.0f} 26" preserveAspectRatio="none" role="img"'
    drawing += f' aria-label="{escape(f"{title}: {spoken}")}">{"".join(body)}</svg>'
    return figure(escape(title), legend, drawing)
