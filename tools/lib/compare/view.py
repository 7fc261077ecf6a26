"""The page of a comparison: each curve of the run over those of the references."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ibq.files import write_text
from ibq.reports.charts import line_chart
from ibq.reports.page import page, table
from ibq.reports.style import STYLE
from tools.lib.compare.references import TrainedRun
from tools.lib.compare.verdict import JUDGED, Verdict, band

WIDTH = 470  # two charts side by side


def write_view(
    path: Path, run: TrainedRun, references: Sequence[TrainedRun], verdicts: Sequence[Verdict], notes: Sequence[str]
) -> None:
    """Write the page, whole or not at all."""
    rows = [
        (one.metric, "".join(f"<td>{text}</td>" for text in (
            f"{one.step:,}", f"{one.value:.4g}", f"{one.expected:.4g} ± {one.margin:.2g}", escape(one.words))))
        for one in verdicts
    ]  # fmt: skip
    heads = ("Metric", "At step", "This run", "References", "Verdict")
    said = "".join(f"<p>{escape(note)}</p>" for note in notes[1:])
    charts = "".join(_chart(run, references, metric) for metric in _ordered(run, references))
    body = f'{said}{table(rows, heads)}<h2>Curves</h2><div class="charts columns2">{charts}</div>'
    write_text(path, page(f"Is {run.name} normal?", notes[0], body, STYLE))


def _ordered(run: TrainedRun, references: Sequence[TrainedRun]) -> list[str]:
    """What both have, with what is judged first."""
    shared = [name for name in run.metrics() if any(name in one.metrics() for one in references)]
    return sorted(shared, key=lambda name: (JUDGED.index(name) if name in JUDGED else len(JUDGED), name))


def _chart(run: TrainedRun, references: Sequence[TrainedRun], metric: str) -> str:
    others = [one.curve(metric) for one in references]
    series = {"this run": (0, run.curve(metric))}
    return line_chart(series, title=metric, width=WIDTH, band=("references", band(others, metric)))
