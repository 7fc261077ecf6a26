"""Variants of a model side by side: a self-contained page, and the same as Markdown with pictures.

Where each ran with several seeds, its figures are means with their 95% intervals (`ibq/reports/seeds.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ibq.evaluation.reconstruction import MIN_TOKENS_PER_CODE
from ibq.files import whole_file, write_text
from ibq.reports import charts
from ibq.reports.charts import DASHES, NUM_COLORS, Series
from ibq.reports.figures import BETTER, FIELDS, as_number, number
from ibq.reports.page import image_rows, page, table
from ibq.reports.style import COLORS, LIGHT, STYLE

# Figure: (label, how to print it, which direction is better, what it is), in the order of the table.
COLUMNS = {
    "num_codes": ("Codes", *FIELDS["codebook.num_codes"][1:]),
    "dim": ("Dim", *FIELDS["codebook.dim"][1:]),
    "psnr": ("PSNR", "dB", "higher", "Closeness of validation images' reconstructions to the originals."),
    "ssim": FIELDS["reconstruction.ssim"],
    "lpips": FIELDS["reconstruction.lpips"],
    "usage": ("Usage", *FIELDS["codebook.usage"][1:]),
    "perplexity": ("Perplexity", *FIELDS["codebook.perplexity"][1:]),
    "effective_rank": ("Rank", *FIELDS["codebook.effective_rank"][1:]),
    "tokens_per_code": ("Tokens/code", *FIELDS["codebook.tokens_per_code"][1:]),
    "depth": ("Depth", "int", "", "Blocks of the transformer."),
    "width": ("Width", "int", "", "Channels of the transformer."),
    "tokens": ("Tokens", "short", "", "Codes seen in training, repeated ones counted again: D of a scaling law."),
    "flops": ("FLOPs", "short", "", "Of the training: forward and backward pass, without recomputation."),
    "batch_size": ("Batch", "int", "", "Images in a step."),
    "learning_rate": ("Rate", "short", "", "Peak learning rate."),
    "nll": ("NLL", "nats/token", "lower", "Of the validation images at the end, with averaged weights."),
    "bits_per_image": ("Bits/image", "", "lower", "The NLL of all codes of an image together, in bits."),
    "best_nll": ("Best NLL", "nats/token", "lower", "The lowest at any validation."),
    "train_loss": ("Train loss", "nats/token", "", "Mean of the last steps, with dropout and the weights as they are."),
    "recognised": ("Recognised", "%", "higher", FIELDS["classifier.generated_accuracy"][3]),
    "real_recognised": ("Real ones", "%", "", FIELDS["classifier.validation_accuracy"][3]),
    "frechet": ("Fréchet", "", "lower",
        "Fréchet distance of the samples to the training images by that classifier's features: as FID, not its scale."),
    "real_frechet": ("Real ones'", "", "", "The same of unseen real images: what is usual."),
    "nearest_pixel": ("Nearest", "", "", FIELDS["classifier.generated_nearest_pixel"][3]),
    "steps": ("Steps", "int", "", "Training steps."),
    "seconds_per_step": ("Per step", "s", "lower", "Median wall-clock time of a training step."),
    "seconds": ("Training", "s", "lower", "Wall-clock time of the training command, with start and validations."),
    "peak_memory_gib": ("Memory", "GiB", "lower", "Peak memory: on a GPU allocated, else the whole process."),
    "parameters": ("Weights", "int", "", "Trained numbers, codebook and embeddings included."),
    "non_embedding_parameters": ("Without embeddings", "int", "", "Of them, those that are no embeddings and no head."),
    "held_out": ("Held out", "int", "", "1: left out of the fit of a scaling law, which then predicts it."),
}  # fmt: skip
UNITS_IN_HEAD = ("dB", "GiB", "nats/token")
DECIMALS = {"nats/token": 4}  # of units in the head; else 2
CHART_WIDTH = 470  # two charts side by side
PERCENT, UNITS = {"Codebook usage"}, {"PSNR": "dB"}
# Their first steps differ so much from the last that the runs would not differ on the same scale.
LATE, LATE_START = {"PSNR", "SSIM"}, 1 / 3

TABLE_STYLE = """
table.figures th, table.figures td { padding-right: 13px; font-size: 13px; white-space: nowrap; color: var(--ink); }
table.figures thead th { color: var(--soft); white-space: normal; vertical-align: bottom; }
table.figures th + th { text-align: right; }
td.best { font-weight: 700; } .scroll + p { margin-top: 14px; }
"""
# The drawing for documents brings its own colours, light and dark.
SVG_STYLE = f"<style>{COLORS} text {{ font: {charts.FONT_SIZE}px system-ui, Segoe UI, Helvetica, sans-serif; }}</style>"


@dataclass(frozen=True, kw_only=True)
class AblationData:
    """What is shown of a comparison; images are uint8 [n, 3, H, W], the same ones for every run."""

    title: str
    about: str
    rows: Mapping[str, Mapping[str, float]]  # run -> figure -> value, or mean over seeds; figures as in COLUMNS
    settings: Mapping[str, Sequence[str]]  # run -> what makes it different
    common: Sequence[str]  # settings of all
    missing: Sequence[str]  # runs without results
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]  # quantity -> run -> [(step, value)]
    originals: Tensor
    reconstructions: Mapping[str, Tensor]  # run -> images
    command: str
    seeds: Mapping[str, Sequence[int]] = field(default_factory=dict)  # run -> its seeds, where there are several
    intervals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # run -> figure -> half width

    @property
    def columns(self) -> list[str]:
        """The figures that any run has, in the order of the table."""
        return columns_of(self.rows)

    def texts(self, run: str) -> dict[str, str]:
        """A run's cells by figure."""
        return {column: cell(self.rows[run], column, self.intervals.get(run)) for column in self.columns}

    @property
    def colors(self) -> dict[str, int]:
        """The number of each run's line style, the same in all charts."""
        count = NUM_COLORS * len(DASHES)
        return {name: index % count for index, name in enumerate(self.rows)}


def write_ablation(folder: Path, pictures: str, data: AblationData) -> None:
    """Write report.html, results.md and the folder `pictures` with what results.md shows."""
    write_text(folder / "report.html", render(data))
    if svg := curves_svg(data):
        write_text(folder / pictures / "curves.svg", svg)
    if data.reconstructions:
        with whole_file(folder / pictures / "reconstructions.png") as file:
            reconstruction_sheet(data).save(file, "PNG", optimize=True)
    write_text(folder / "results.md", markdown(data, pictures))


# --- The table ---


def columns_of(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The figures that any run has, in the order of the table."""
    return [name for name in COLUMNS if any(name in row for row in rows.values())]


def cell(row: Mapping[str, float], column: str, intervals: Mapping[str, float] | None = None) -> str:
    """A figure as it is printed, without the unit where the whole column has it; with its interval, if it has one."""
    text, half = _printed(as_number(row.get(column)), column), as_number((intervals or {}).get(column))
    return f"{text} ± {_printed(half, column)}" if half > 0 else text


def _printed(value: float, column: str) -> str:
    unit = COLUMNS[column][1]
    if math.isnan(value):
        return "–"
    if column == "seconds_per_step" and value < 10:
        return f"{1000 * value:,.0f} ms"
    if column in ("parameters", "non_embedding_parameters"):
        return f"{value / 1e6:.2f}M"
    return f"{value:.{DECIMALS.get(unit, 2)}f}" if unit in UNITS_IN_HEAD else number(value, unit)


def head(column: str) -> str:
    """A column's label with the unit that its cells are without, and which direction is better."""
    label, unit, better, _ = COLUMNS[column]
    arrow = f" {BETTER[better].split()[0]}" if better else ""
    return label + (f", {unit}" if unit in UNITS_IN_HEAD else "") + arrow


def best_runs(data: AblationData, column: str) -> set[str]:
    """The runs whose printed figure is the best of a column; none where all are equal or no direction is better.

    With intervals also those whose own meets that of the best.
    """
    values = {name: as_number(row.get(column)) for name, row in data.rows.items()}
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    better = COLUMNS[column][2]
    if not better or not values:
        return set()
    best = max(values.values()) if better == "higher" else min(values.values())
    printed = {name: cell(data.rows[name], column) for name in values}
    winner = next(printed[name] for name, value in values.items() if value == best)
    own = {name: as_number(data.intervals.get(name, {}).get(column)) for name in values}
    widths = {name: half if half > 0 else 0.0 for name, half in own.items()}
    nearest = min(widths[name] for name, value in values.items() if value == best)
    winners = {
        name
        for name, value in values.items()
        if printed[name] == winner or (widths[name] and abs(value - best) <= widths[name] + nearest)
    }
    return winners if len(winners) < len(values) else set()


def notes(data: AblationData) -> list[str]:
    """What one has to know to read the figures."""
    found = []
    few = [name for name, row in data.rows.items() if row.get("tokens_per_code", math.inf) < MIN_TOKENS_PER_CODE]
    if few:
        found.append(
            f"Under {MIN_TOKENS_PER_CODE} tokens per code say as much about the set's size as about the codebook: "
            f"the usage of {', '.join(few)} is too low by that."
        )
    if data.seeds:
        found.append(
            "Means over seeds, with the 95% interval of the mean by Student's t; the interval of what is bold meets "
            f"that of the best. Seeds: {_seeds_text(data.seeds)}."
        )
    if data.missing:
        found.append(f"Without results: {', '.join(data.missing)}.")
    return found


def _seeds_text(seeds: Mapping[str, Sequence[int]]) -> str:
    """The seeds of all runs, or those of each where they are not the same."""
    texts = {name: ", ".join(map(str, own)) for name, own in seeds.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{own} of {name}" for name, own in texts.items())


# --- The page ---


def render(data: AblationData) -> str:
    """The page's HTML."""
    sections = {
        "Figures": _table(data),
        "Training": _charts(data),
        "Reconstructions": _reconstructions(data),
        "Settings": _settings(data),
        "What the figures are": _explanations(data),
    }
    body = "".join(f"<section><h2>{name}</h2>{text}</section>" for name, text in sections.items() if text)
    return page(data.title, data.about, body, f"{STYLE}{TABLE_STYLE}")


def _table(data: AblationData) -> str:
    best = {column: best_runs(data, column) for column in data.columns}
    rows = []
    for name in data.rows:
        cells = (
            f'<td class="number{" best" if name in best[column] else ""}">{escape(text)}</td>'
            for column, text in data.texts(name).items()
        )
        rows.append((name, "".join(cells)))
    said = "".join(f'<p class="soft">{escape(text)}</p>' for text in notes(data))
    return table(rows, ("Run", *map(head, data.columns)), "figures") + said


def _unit(data: AblationData, quantity: str) -> str:
    """What is said beside a chart's title."""
    start = _first_step(data, quantity)
    return ", ".join(filter(None, (UNITS.get(quantity), f"from step {start:,}" if start else "")))


def _first_step(data: AblationData, quantity: str) -> int:
    last = max((step for points in data.curves[quantity].values() for step, _ in points), default=0)
    return round(last * LATE_START) if quantity in LATE else 0


def _series(data: AblationData, quantity: str) -> Series:
    start, colors = _first_step(data, quantity), data.colors
    curves = data.curves[quantity]
    return {name: (colors[name], [point for point in curves[name] if point[0] >= start]) for name in curves}


def _charts(data: AblationData) -> str:
    drawn = ""
    for name in data.curves:
        look = {"unit": _unit(data, name), "percent": name in PERCENT, "width": CHART_WIDTH}
        drawn += charts.line_chart(_series(data, name), title=name, **look)
    text = "On the validation images, with averaged weights. Figures beside the names are the last values"
    text += (
        "; usage and perplexity are lower than in the table where that counts the codes of more images."
        if any("perplexity" in row for row in data.rows.values())
        else "."
    )
    return f'<p class="soft">{text}</p><div class="charts columns2">{drawn}</div>' if drawn else ""


def _reconstructions(data: AblationData) -> str:
    if not data.reconstructions:
        return ""
    rows = image_rows({"Original": data.originals, **data.reconstructions}, "{name}: validation image {number}")
    return f"<p>The same validation images, as each run reconstructs them.</p>{rows}"


def _settings(data: AblationData) -> str:
    rows = ((name, _text_cell(" ".join(settings) or "as the base")) for name, settings in data.settings.items())
    return (
        f"<p>All runs: {escape(' '.join(data.common))}. What makes each different:</p>{table(rows)}"
        f"<p>Made by</p><pre><code>{escape(data.command)}</code></pre>"
    )


def _explanations(data: AblationData) -> str:
    return table((head(column), _text_cell(COLUMNS[column][3])) for column in data.columns)


def _text_cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


# --- Markdown and pictures ---


def markdown(data: AblationData, pictures: str) -> str:
    """The table, curves and reconstructions for a page of documentation."""
    best = {column: best_runs(data, column) for column in data.columns}
    lines = [f"# {data.title}", "", *([data.about, ""] if data.about else []), "```bash", data.command, "```", ""]
    rows = []
    for name in data.rows:
        texts = data.texts(name)
        rows.append([f"`{name}`", *(f"**{text}**" if name in best[key] else text for key, text in texts.items())])
    lines += _markdown_table(("run", *map(head, data.columns)), rows, "---:|")
    for text in notes(data):
        lines += ["", text]
    if any(data.curves.values()):
        lines += ["", f"![Validation figures over the steps of training]({pictures}/curves.svg)"]
    if data.reconstructions:
        lines += ["", f"![The same images, reconstructed by each run]({pictures}/reconstructions.png)"]
    lines += ["", f"All runs: `{' '.join(data.common)}`. What makes each different:", ""]
    settings = {name: f"`{' '.join(texts)}`" if texts else "as the base" for name, texts in data.settings.items()}
    lines += _markdown_table(("run", "settings"), [(f"`{name}`", text) for name, text in settings.items()], "---|")
    return "\n".join(lines) + "\n"


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], rule: str) -> list[str]:
    first, *others = ("| " + " | ".join(row) + " |" for row in (heads, *rows))
    return [first, "|---|" + rule * (len(heads) - 1), *others]


def curves_svg(data: AblationData) -> str:
    """All charts in one drawing with one legend, which brings its own colours; "" without any curve."""
    names = [name for name, runs in data.curves.items() if any(charts.downsample(p).size for p in runs.values())]
    if not names:
        return ""
    columns, rows = min(len(names), 2), -(-len(names) // 2)
    width = columns * (CHART_WIDTH + 30)
    keys = max(int(width // (48 + 8 * max(map(len, data.colors)))), 1)  # of the legend, side by side
    height = rows * (charts.HEIGHT + 54) + -(-len(data.colors) // keys) * 20
    with charts.page_look():
        from matplotlib.lines import Line2D

        sheet = charts.new_figure(width / 72, height / 72, layout="constrained", facecolor=charts.CARD)
        panels = sheet.subplots(rows, columns, squeeze=False).flat
        for axes, name in zip(panels, names, strict=False):
            charts.draw_lines(axes, _series(data, name), percent=name in PERCENT)
            axes.set_title(name, loc="left", size=14, weight="bold", color=LIGHT["ink"])
            axes.set_title(_unit(data, name), loc="right", size=13)
        for axes in panels[len(names) :]:
            axes.remove()
        lines = [Line2D([], [], label=name, **charts.line_look(style)) for name, style in data.colors.items()]
        sheet.legend(handles=lines, loc="outside lower left", ncols=keys, fontsize=13)
        return charts.as_svg(sheet, f"{', '.join(names)} by step", SVG_STYLE)


def reconstruction_sheet(data: AblationData) -> Image.Image:
    """One row a run under the originals, each with its name and, where known, its PSNR."""
    rows = {"original": data.originals, **data.reconstructions}
    names = {name: name for name in rows}
    for name, row in data.rows.items():
        if "psnr" in row:
            names[name] = f"{name}\n{row['psnr']:.2f} dB"
    side = data.originals.shape[-1]
    scale, gap = max(round(64 / side), 1), 6
    step = side * scale + gap
    font = ImageFont.load_default(size=13)
    margin = int(max(font.getlength(line) for text in names.values() for line in text.splitlines())) + 3 * gap
    sheet = Image.new("RGB", (margin + step * len(data.originals), step * len(rows) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, images) in enumerate(rows.items()):
        top = gap + index * step
        draw.multiline_text((gap, top + side * scale / 2), names[name], fill="#1b2230", font=font, anchor="lm")
        for column, pixels in enumerate(images):
            tile = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
            tile = tile.resize((side * scale, side * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + column * step, top))
    return sheet
