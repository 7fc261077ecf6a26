"""One self-contained HTML page that shows what a tokenizer and a transformer have learned."""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ibq.evaluation.record import leaves
from ibq.files import write_text
from ibq.reports.charts import MAX_POINTS, line_chart, rank_chart, share_bar
from ibq.reports.figures import BETTER, FIELDS, as_number, duration, number
from ibq.reports.style import STYLE

Curves = Mapping[str, Sequence[tuple[int, float]]]

DISPLAY_PX = 96  # images are shown at the multiple of their size that is nearest to this
LARGEST_PX = 128
IMAGES_PER_ROW = 8
CHART_WIDTHS = {1: 640, 2: 470, 3: 310}  # by the number of charts side by side
SPLITS = {"train": "train", "training": "train", "validation": "validation", "val": "validation"}


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What the page shows; images are uint8 [n, 3, H, W], values that are missing or not finite show as n/a."""

    title: str
    subtitle: str
    metrics: Mapping  # nested: see FIELDS for the names; "parts" {name: seconds}
    originals: Tensor
    reconstructions: Tensor
    thumbnails: Tensor
    classes: Sequence[str]
    samples: Mapping[int, Tensor]  # class -> samples
    nearest: Mapping[int, Tensor]  # class -> nearest training image of each sample
    tokenizer_curves: Curves  # name -> [(step, value)], as in "validation PSNR"
    transformer_curves: Curves
    reference_lines: Mapping[str, float]  # drawn where the transformer's NLL is
    histogram: Tensor  # [num_codes] counts
    commands: Sequence[tuple[str, str]]  # (what it does, command)

    def __post_init__(self):
        named = {name: getattr(self, name) for name in ("originals", "reconstructions", "thumbnails")}
        for name in ("samples", "nearest"):
            named |= {f"{name}[{label}]": images for label, images in getattr(self, name).items()}
        for name, images in named.items():
            if images.numel() and (images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3):
                found = f"{images.dtype} {list(images.shape)}"
                raise ValueError(f"{name}: expected uint8 [n, 3, H, W], found {found}; convert with to_uint8")
        for label, images in self.samples.items():
            if label in self.nearest and len(self.nearest[label]) != len(images):
                raise ValueError(f"nearest[{label}]: expected one image for each of {len(images)} samples")

    def metric(self, path: str) -> float:
        """A number by its dotted path, NaN where there is none."""
        value = self.metrics
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return as_number(value)


def write_report(path: Path, data: ReportData) -> None:
    """Write the page to `path`, whole or not at all; folders are made where missing."""
    write_text(Path(path), render(data))


def render(data: ReportData) -> str:
    """The page's HTML."""
    sections = {
        "Reconstructions": _reconstructions(data),
        "Samples": _samples(data),
        "Training": _training(data),
        "Codebook": _codebook(data),
        "All figures": _table(data),
        "Time": _time(data),
        "Next": _commands(data),
    }
    sections = {name: body for name, body in sections.items() if body}
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<a href="#{anchors[name]}">{name}</a>' for name in sections)
    body = "".join(f'<section id="{anchors[name]}"><h2>{name}</h2>{body}</section>' for name, body in sections.items())
    navigation = f'<nav aria-label="Sections">{links}</nav>'
    return page(data.title, data.subtitle, f"{_cards(data)}{navigation}{body}", STYLE)


def page(title: str, lead: str, main: str, style: str) -> str:
    """A self-contained HTML page around the HTML `main`."""
    # The policy makes browsers refuse whatever is not in this file.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style></head>
<body><header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>
<main>{main}</main></body></html>
"""


def table(rows: Iterable[tuple[str, str]], heads: Sequence[str] = (), style: str = "") -> str:
    """A table that scrolls by itself, of (name of a row, its cells as HTML)."""
    top = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>' for name, cells in rows)
    head = f"<thead><tr>{top}</tr></thead>" if heads else ""
    return f'<div class="scroll"><table class="{style}">{head}<tbody>{body}</tbody></table></div>'


# --- Images ---


def image_rows(rows: Mapping[str, Tensor], alt: str, first: int = 1) -> str:
    """Rows of images under their names; `alt` describes one by its row's {name} and its {number}."""
    cells = ""
    for name, images in rows.items():
        numbered = enumerate(images, first)
        pictures = "".join(image(pixels, alt.format(name=name, number=number)) for number, pixels in numbered)
        cells += f"<dt>{escape(name)}</dt><dd>{pictures}</dd>"
    return f'<dl class="rows">{cells}</dl>'


def image(pixels: Tensor, alt: str) -> str:
    """An <img> of a uint8 image [3, H, W], embedded as PNG and shown with visible pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, "PNG", optimize=True)
    height, width = pixels.shape[1:]
    scale = max(round(DISPLAY_PX / width), 1)
    shown = min(width * scale, LARGEST_PX)
    style = "" if shown >= width else ' class="smooth"'
    size = f'width="{shown}" height="{round(shown * height / width)}"'
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img src="{source}" alt="{escape(alt)}" {size}{style}>'


def _reconstructions(data: ReportData) -> str:
    rows = {"Original": data.originals, "Reconstruction": data.reconstructions}
    rows[f"{_grid(data)} thumbnail"] = data.thumbnails
    rows = {name: images for name, images in rows.items() if images.numel()}
    blocks = ""
    for start in range(0, max(map(len, rows.values()), default=0), IMAGES_PER_ROW):
        shown = {name: images[start : start + IMAGES_PER_ROW] for name, images in rows.items()}
        blocks += image_rows(shown, "{name} of validation image {number}", start + 1)
    return f"<p>{_compression(data)}</p>{blocks}" if blocks else ""


def _grid(data: ReportData) -> str:
    """The size of the baseline's thumbnail: one pixel per token."""
    tokens = data.metric("tokens_per_image")
    side = math.isqrt(int(tokens)) if math.isfinite(tokens) and tokens > 0 else 0
    return f"{side}×{side}" if side and side**2 == tokens else "Small"


def _compression(data: ReportData) -> str:
    text = "Validation images that the tokenizer has not seen in training, and what its decoder makes of their tokens."
    tokens, num_codes = data.metric("tokens_per_image"), data.metric("codebook.num_codes")
    if data.originals.numel() and tokens > 0 and num_codes > 1:
        stored, raw = tokens * math.log2(num_codes) / 8, data.originals[0].numel()
        text += f" An image is {tokens:,.0f} tokens of {math.log2(num_codes):.3g} bits: {stored:,.0f} bytes "
        text += f"instead of {raw:,} ({raw / stored:.0f} times fewer). "
        text += f"The baseline, a thumbnail with one pixel per token, takes {3 * tokens:,.0f}."
    return text


def _samples(data: ReportData) -> str:
    drawn = {label: images for label, images in sorted(data.samples.items()) if len(images)}
    if not drawn:
        return ""
    blocks = []
    for label, images in drawn.items():
        name, neighbours = _class_name(data, label), data.nearest.get(label)
        pairs = ""
        for index, pixels in enumerate(images):
            pair = image(pixels, f"{name}: sample {index + 1}")
            if neighbours is not None:
                pair += image(neighbours[index], f"{name}: training image nearest to sample {index + 1}")
            pairs += f'<li class="pair">{pair}</li>'
        blocks.append(f'<h3>{escape(name)}</h3><ul class="pairs">{pairs}</ul>')
    text = "Drawn by the transformer, token by token, given only the class."
    if data.nearest:
        text += " Beside each: the training image nearest to it, so that copies would show."
        text += ' <span class="keys"><i class="key sampled"></i>sample <i class="key found"></i>nearest</span>'
    missing = [name for label, name in enumerate(data.classes) if label not in drawn]
    rest = f'<p class="soft">Classes without samples here: {escape(", ".join(missing))}.</p>' if missing else ""
    return f'<p>{text}</p><div class="classes">{"".join(blocks)}</div>{rest}'


def _class_name(data: ReportData, label: int) -> str:
    return data.classes[label] if 0 <= label < len(data.classes) else f"class {label}"


# --- Charts ---


def _training(data: ReportData) -> str:
    body = ""
    for stage, curves in (("Tokenizer", data.tokenizer_curves), ("Transformer", data.transformer_curves)):
        references = data.reference_lines if stage == "Transformer" else {}
        groups = _by_quantity(curves)
        columns = {1: 1, 2: 2, 4: 2}.get(len(groups), 3)
        charts = "".join(_curve_chart(*group, references, CHART_WIDTHS[columns]) for group in groups.items())
        body += f'<h3>{stage}</h3><div class="charts columns{columns}">{charts}</div>' if charts else ""
    longest = max(map(len, [*data.tokenizer_curves.values(), *data.transformer_curves.values()]), default=0)
    note = "Figures beside the names are the last values."
    if longest > MAX_POINTS:
        note += " Long series are averaged over neighbouring steps, and a band shows their range."
    return f'<p class="soft">{note}</p>{body}' if body else ""


def _by_quantity(curves: Curves) -> dict[str, Curves]:
    """Curves that share a chart: {"NLL": {"train": [...], "validation": [...]}, ...}."""
    groups: dict[str, dict[str, Sequence[tuple[int, float]]]] = {}
    for name, points in curves.items():
        split, quantity = _split_and_quantity(name)
        if any(math.isfinite(value) for _, value in points):
            groups.setdefault(quantity, {})[split or name] = points
    return groups


def _curve_chart(quantity: str, curves: Curves, references: Mapping[str, float], width: int) -> str:
    unit, percent, is_nll = _unit(quantity)
    series = {name: (int(name == "validation"), points) for name, points in curves.items()}
    title = quantity[:1].upper() + quantity[1:]
    lines = references if is_nll else {}
    return line_chart(series, title=title, unit=unit, percent=percent, references=lines, width=width)


def _split_and_quantity(name: str) -> tuple[str, str]:
    """("validation", "PSNR") of "validation PSNR" or "val/PSNR"; no split where the name has none."""
    first, _, rest = name.replace("/", " ").partition(" ")
    split = SPLITS.get(first.lower(), "")
    return (split, rest) if split and rest else ("", name)


def _unit(quantity: str) -> tuple[str, bool, bool]:
    """(unit, is it a share of one, is it the transformer's NLL)."""
    lower = quantity.lower()
    if "nll" in lower:
        return "nats/token", False, True
    return ("dB", False, False) if "psnr" in lower else ("", "usage" in lower, False)


def _codebook(data: ReportData) -> str:
    chart = rank_chart(data.histogram, title="How often each code occurs")
    if not chart:
        return ""
    perplexity, rank = data.metric("codebook.perplexity"), data.metric("codebook.effective_rank")
    dim = data.metric("codebook.dim")
    facts = [
        (number(data.metric("codebook.usage"), "%"), "of the codes are in use"),
        (number(perplexity), f"perplexity, of at most {number(data.metric('codebook.num_codes'), 'int')}"),
        (number(rank), f"effective rank, of at most {number(dim, 'int')}"),
    ]
    items = "".join(f"<li><b>{value}</b> {text}</li>" for value, text in facts if value != "n/a")
    return f'<div class="beside">{chart}<ul class="facts">{items}</ul></div>'


def _time(data: ReportData) -> str:
    parts = data.metrics.get("parts") or {}
    parts = {str(name): as_number(value) for name, value in parts.items()}
    rest = data.metric("seconds") - sum(value for value in parts.values() if math.isfinite(value))
    if parts and rest > 0.02 * data.metric("seconds"):
        parts["other"] = rest
    labels = {name: duration(value) for name, value in parts.items()}
    return share_bar(parts, title=f"{duration(data.metric('seconds'))} in all", labels=labels)


# --- Figures ---


def _cards(data: ReportData) -> str:
    psnr, thumbnail = data.metric("reconstruction.psnr"), data.metric("reconstruction.thumbnail_psnr")
    nll, bigram = data.metric("ar.val_nll"), data.metric("ar.bigram_nll")
    used = data.metric("codebook.usage") * data.metric("codebook.num_codes")
    images = data.metric("reconstruction.images")
    scope = f"{images:,.0f} validation images" if images > 0 else "validation images"
    baseline = f"the {_grid(data).lower()} thumbnail"
    cards = [
        _card("Reconstruction", number(psnr, "dB"), _verdict(psnr - thumbnail, "dB", baseline),
              f"thumbnail {number(thumbnail, 'dB')} · {scope}"),
        _card("Codebook in use", number(data.metric("codebook.usage"), "%"), "",
              f"{number(used, 'int')} of {number(data.metric('codebook.num_codes'), 'int')} codes"
              f" · perplexity {number(data.metric('codebook.perplexity'))}"),
        _card("Transformer", f"{number(nll)} <small>nats/token</small>", _verdict(bigram - nll, "nats", "bigrams"),
              f"bigram {number(bigram)} · unigram {number(data.metric('ar.unigram_nll'))}"),
        *_classifier_card(data),
        _card("Time", number(data.metric("seconds"), "s"), "", "from the data to this page"),
    ]  # fmt: skip
    return f'<div class="cards">{"".join(cards)}</div>'


def _classifier_card(data: ReportData) -> list[str]:
    generated, chance = data.metric("classifier.generated_accuracy"), data.metric("classifier.chance")
    if not math.isfinite(generated):
        return []
    times = f'<p class="{"good" if generated >= 2 * chance else "bad"}">{generated / chance:.1f} times chance</p>'
    detail = f"by a small classifier · real images {number(data.metric('classifier.validation_accuracy'), '%')}"
    return [_card("Samples recognised", number(generated, "%"), times, detail)]


def _card(name: str, value: str, verdict: str, detail: str) -> str:
    return f'<div class="card"><h2>{name}</h2><p class="value">{value}</p>{verdict}<p class="soft">{detail}</p></div>'


def _verdict(margin: float, unit: str, baseline: str) -> str:
    """Whether a figure beats its baseline, by `margin` in its own direction of better."""
    if not math.isfinite(margin):
        return ""
    if margin > 0:
        return f'<p class="good">▲ {margin:.2f} {unit} better than {baseline}</p>'
    return f'<p class="bad">▼ {-margin:.2f} {unit} worse than {baseline}</p>'


def _table(data: ReportData) -> str:
    metrics = {key: value for key, value in data.metrics.items() if key != "parts"}
    found = leaves(metrics, ".")
    rows = []
    for path in [*(path for path in FIELDS if path in found), *(path for path in found if path not in FIELDS)]:
        fallback = path.replace(".", ": ").replace("_", " ")
        label, unit, better, explanation = FIELDS.get(path, (fallback, "", "", ""))
        value = found[path] if isinstance(found[path], str) else number(as_number(found[path]), unit)
        cells = f'<td class="number">{escape(value)}</td><td class="better">{BETTER[better]}</td>'
        rows.append((label, f"{cells}<td>{escape(explanation)}</td>"))
    return table(rows, ("Figure", "Value", "Better", "What it is"))


def _commands(data: ReportData) -> str:
    items = "".join(
        f"<li>{escape(what)}<pre><code>{escape(command)}</code></pre></li>" for what, command in data.commands
    )
    return f'<ol class="commands">{items}</ol>' if items else ""
