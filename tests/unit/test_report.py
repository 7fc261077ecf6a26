import base64
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from ibq.reports import charts, figures
from ibq.reports.page import ReportData, write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}
CLASSES = ["Smileys & Emotion", "<b>Food</b>", 'Flags "quoted"']
CURVE = [(step, 5.0 - step / 500) for step in range(10, 1001, 10)]


class Page(HTMLParser):
    """Checks that tags nest, and keeps tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)

    def images(count):
        return torch.randint(256, (count, 3, 32, 32), generator=generator).to(torch.uint8)

    return ReportData(
        title="Emoji <script>alert(1)</script>",
        subtitle="small & quick",
        metrics={
            "reconstruction": {"psnr": 22.5, "thumbnail_psnr": 19.0, "ssim": 0.87},
            "codebook": {"num_codes": 64, "dim": 8, "usage": 0.75, "perplexity": 40.0, "effective_rank": 6.5},
            "tokens_per_image": 64,
            "ar": {"val_nll": 3.1, "unigram_nll": 4.0, "bigram_nll": 3.5},
            "extra_figure": 7.0,
            "seconds": 400.0,
            "parts": {"tokenizer <1>": 250.0, "transformer": 140.0},
        },
        originals=images(10),
        reconstructions=images(10),
        thumbnails=images(10),
        classes=CLASSES,
        samples={0: images(3), 1: images(2)},
        nearest={0: images(3), 1: images(2)},
        tokenizer_curves={"train loss": CURVE, "validation PSNR": [(500, 20.0), (1000, 22.5)]},
        transformer_curves={"train NLL": CURVE, "validation NLL": [(500, 4.0), (1000, 3.1)]},
        reference_lines={"unigram": 4.0, "bigram": 3.5},
        histogram=torch.arange(64).sub(16).clamp_min(0),
        commands=[("More samples <now>", "python tools/sample.py --class 1 && echo '<done>'")],
    )


@pytest.fixture(scope="module")
def page(data, tmp_path_factory):
    return read(data, tmp_path_factory.mktemp("page"))


def read(data, folder):
    write_report(folder / "run" / "report.html", data)
    assert [path.name for path in (folder / "run").iterdir()] == ["report.html"]  # nothing half-written stays
    return Page((folder / "run" / "report.html").read_text("utf-8"))


def test_the_page_needs_nothing_else(page):
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), attributes
    assert not page.all("link") and not page.all("script") and not page.all("iframe")
    assert "default-src 'none'" in next(a["content"] for a in page.all("meta") if "http-equiv" in a)


def test_images_are_exact_described_and_complete(page, data):
    found = page.all("img")
    assert len(found) == 3 * 10 + 2 * (3 + 2)
    assert all(image["alt"] for image in found)
    assert {(image["width"], image["height"]) for image in found} == {("96", "96")}
    encoded = base64.b64decode(found[0]["src"].partition(",")[2])
    pixels = torch.tensor(list(Image.open(io.BytesIO(encoded)).tobytes())).view(32, 32, 3)
    assert torch.equal(pixels, data.originals[0].permute(1, 2, 0).long())


def test_each_sample_stands_beside_its_neighbour(page):
    alts = [image["alt"] for image in page.all("img")][30:]
    assert alts[:2] == [
        "Smileys & Emotion: sample 1",
        "Smileys & Emotion: training image nearest to sample 1",
    ]


def test_users_text_is_text(page, data):
    for text in [*CLASSES, data.title, data.subtitle, *data.commands[0], "tokenizer <1>"]:
        assert text in page.text


def test_headline_compares_with_baselines(page):
    assert "3.50 dB better than the 8×8 thumbnail" in page.text
    assert "0.40 nats better than bigrams" in page.text
    assert "48 of 64 codes" in page.text and "6 min 40 s" in page.text


def test_a_worse_result_is_called_worse(data, tmp_path):
    metrics = {**data.metrics, "ar": {"val_nll": 3.75, "bigram_nll": 3.5}}
    assert "0.25 nats worse than bigrams" in read(replace(data, metrics=metrics), tmp_path).text


def test_curves_of_one_quantity_share_a_chart(page):
    labels = [drawing["aria-label"] for _, drawing in page.tags if drawing.get("role") == "img"]
    assert len(labels) == 3 + 1 + 1  # loss, PSNR, NLL; histogram; time
    nll = next(label for label in labels if label.startswith("NLL"))
    assert all(word in nll for word in ("train", "validation ends at 3.1", "unigram is 4", "bigram is 3.5"))


def test_missing_and_broken_values_do_not_stop_the_page(data, tmp_path):
    empty = torch.empty(0)
    broken = replace(
        data,
        metrics={"reconstruction": {"psnr": math.inf}, "ar": {"val_nll": math.nan, "bigram_nll": None}, "seconds": 0},
        originals=empty,
        reconstructions=empty,
        thumbnails=empty,
        samples={},
        nearest={},
        tokenizer_curves={"train loss": [(1, math.nan), (2, math.inf)], "usage": []},
        transformer_curves={"train NLL": [(1, math.nan), (2, 5.0)]},
        reference_lines={"bigram": math.nan},
        histogram=torch.zeros(8),
        commands=[],
    )
    page = read(broken, tmp_path)
    assert "n/a" in page.text and "∞" in page.text
    assert not any("nan" in str(value).lower() for tag, a in page.tags if tag != "meta" for value in a.values())


def test_images_of_the_wrong_kind_are_refused(data):
    with pytest.raises(ValueError, match=r"samples\[0\]: expected uint8"):
        replace(data, samples={0: torch.rand(3, 3, 32, 32)})
    with pytest.raises(ValueError, match=r"nearest\[1\]: expected one image for each of 2"):
        replace(data, nearest={1: data.originals[:1]})


def test_downsampling_keeps_ends_and_extremes():
    points = [(step, math.sin(step)) for step in range(100_000)]
    points[777] = (777, 50.0)
    x, mean, low, high = charts.downsample(points)
    assert len(x) == charts.MAX_POINTS and (low <= mean).all() and (mean <= high).all()
    assert x[0] == 0 and x[-1] == 99_999
    assert high.max() == 50.0
    x, mean, _, _ = charts.downsample([(2, 1.0), (1, 3.0), (3, math.nan)])
    assert [*zip(x, mean, strict=True)] == [(1, 3.0), (2, 1.0)]


@pytest.mark.parametrize(
    "values",
    [[0.0], [3.0, 3.0], [-1e-9, 1e9], [1e-6, 1.0], [5.1, 5.2], [-3.0, 4.0], [1e5, 2e5], [1e-300, 1e300]],
)
def test_axes_hold_their_values_and_have_distinct_round_ticks(values):
    axes = charts.new_figure(4, 3).add_subplot()
    charts.draw_lines(axes, {"curve": (0, [*enumerate(values)])})
    low, high = axes.get_ylim()
    assert all(low <= value <= high for value in values)
    axes.figure.canvas.draw()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    labels = [label.get_text() for tick, label in ticks if low <= tick <= high]
    assert 2 <= len(labels) <= 14 and len(set(labels)) == len(labels), labels
    assert all(len(label) < 8 for label in labels), labels


def test_drawings_are_the_same_every_time_and_take_their_colours_from_the_page():
    one, other = (charts.line_chart({"a & b": (1, CURVE)}, title="<t>") for _ in range(2))
    assert one == other and "var(--s1)" in one and "var(--soft)" in one
    assert not re.search("#[0-9a-f]{6}[; ]", one), "a colour of its own"
    assert "a &amp; b" in one and "<t>" not in one


def test_a_large_codebook_stays_a_small_drawing():
    drawing = charts.rank_chart(torch.arange(262_144), title="codes")
    assert len(drawing) < 30_000
    assert "262,143 of 262,144" in drawing
    Page(drawing)


def test_numbers_read_well():
    assert [figures.duration(value) for value in (4.21, 59.97, 185, 7800)] == [
        "4.2 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
    assert figures.number(0.5, "%") == "50.0%" and figures.number(1024.0, "int") == "1,024"
    assert figures.number(4.7123, "nats") == "4.712 nats" and figures.number(math.nan, "dB") == "n/a"
