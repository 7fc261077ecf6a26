"""The page of tools/demo.py: what it shows, what it refuses, and all of it in a real browser."""

import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, needs
from support.headless_browser import Browser
from support.points import HANG_S
from support.processes import run_script
from support.training import picture, png, write_best

from ibq.api import generate
from ibq.config import UserError, parse_config
from ibq.data.transforms import square, to_unit_range
from ibq.models.heads import BitsHeadConfig
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.pixels import codes_of, decode_in_blocks
from ibq.quantizers import BSQConfig, FSQConfig, IBQConfig, LFQConfig, VQConfig, build_quantizer
from ibq.sampler import SamplerConfig
from ibq.sampling import sample_codes
from tools import demo
from tools.lib.demo import models as demo_models
from tools.lib.demo import views as views

CODES, SIDE, NAMES = 64, 8, ["cats", "dogs & wolves", "birds"]
TOKENIZER = {
    **{"resolution": 32, "channels": 32, "channel_multipliers": [1, 1, 1], "res_blocks": 1, "latent_channels": 16},
    **{"attention_resolutions": [], "quantizer": {"kind": "ibq", "num_codes": CODES, "dim": 16}},
}
TRANSFORMER = {
    **{"vocab_size": CODES, "num_classes": len(NAMES), "tokens_per_side": SIDE},
    **{"depth": 2, "heads": 2, "width": 64},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Run folders of a tokenizer, a transformer with named classes, and one of another vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    write_best(folder / "tokenizer" / "best", Tokenizer(parse_config(TokenizerConfig, TOKENIZER)))
    for name, codes in (("transformer", CODES), ("other", 2 * CODES)):
        transformer = Transformer(parse_config(TransformerConfig, TRANSFORMER | {"vocab_size": codes}))
        torch.nn.init.normal_(transformer.head.weight, std=0.5)
        write_best(folder / name / "best", transformer)
    torch.manual_seed(1)
    random = Transformer(parse_config(TransformerConfig, TRANSFORMER | {"order": "random"}))
    torch.nn.init.normal_(random.head.weight, std=0.5)
    write_best(folder / "random" / "best", random)
    shapes = replace(transformer.config, vocab_size=CODES, grids=((SIDE, SIDE), (2, 5)))
    write_best(folder / "shapes" / "best", Transformer(shapes))
    (folder / "transformer" / "classes.json").write_text(json.dumps(NAMES))
    return folder


@pytest.fixture(scope="module")
def tokenizer(models):
    return demo_models.load_tokenizer(models / "tokenizer", device="cpu")


# --- Uploads ---


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_picture_is_read(tmp_path):
    image = picture(1, 40)
    assert np.array_equal(views.read_picture(saved(tmp_path / "x", png(image))), np.asarray(image))


def test_what_is_no_picture_is_refused(tmp_path):
    image = picture(1, 40)
    whole = png(image)
    eps = io.BytesIO()
    image.save(eps, "EPS")  # Pillow would start Ghostscript
    for data in (b"", b"no picture", whole[: len(whole) // 2], eps.getvalue()):
        with pytest.raises(UserError, match=r"cannot be shown: .*20 MB and 40 megapixels") as error:
            views.read_picture(saved(tmp_path / "x.png", data))
        assert "0x" not in str(error.value)  # no addresses of objects


def test_what_is_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.png", b"")
    os.truncate(path, views.UPLOAD_MB * 2**20 + 1)
    with pytest.raises(UserError, match=r"has 20.0 MB. The page takes"):
        views.read_picture(path)
    bomb = io.BytesIO()
    Image.new("1", (10_000, 4_001)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 10_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(UserError, match=r"10000 x 4001 pixels are more than the 40,000,000 allowed"):
        views.read_picture(saved(path, bomb.getvalue()))


@pytest.mark.parametrize(
    ("size", "shape", "side", "expected"),
    [
        ((100, 60), "centre square", 32, (32, 32)),
        ((100, 60), "centre square", 35, (32, 32)),
        ((100, 60), "whole picture", 32, (20, 32)),
        ((60, 100), "whole picture", 64, (64, 40)),
        ((4000, 1), "whole picture", 512, (8, 512)),
        ((1, 1), "centre square", 0, (8, 8)),
    ],
)
def test_pictures_are_fitted_to_whole_tokens(size, shape, side, expected):
    fitted = views.fitted(np.zeros((size[1], size[0], 3), np.uint8), shape, side, 4)
    assert fitted.shape == (3, *expected) and fitted.dtype == torch.uint8


def test_a_picture_of_the_right_size_stays_as_it_is():
    pixels = np.asarray(picture(2, 32))
    for shape in views.SHAPES:
        assert np.array_equal(views.fitted(pixels, shape, 32, 4).permute(1, 2, 0).numpy(), pixels)


# --- Reconstructions and codes ---


def test_reconstruction(tokenizer):
    pixels = views.fitted(np.asarray(picture(3, 64)), "centre square", 32, 4)
    made = views.reconstruct(tokenizer, pixels)
    codes = tokenizer.encode(to_unit_range(pixels[None]))
    assert torch.equal(made.codes, codes[0]) and made.codes.shape == (8, 8)
    assert torch.equal(made.result, decode_in_blocks(tokenizer, codes, block=1)[0])
    assert torch.equal(made.error, (4 * (pixels.int() - made.result.int()).abs()).clamp_max(255).byte())
    mean_square = (pixels.double() - made.result.double()).square().mean()
    assert made.psnr == pytest.approx(float(10 * torch.log10(255**2 / mean_square)))
    assert f"{made.psnr:.2f} dB" in views.figures(made) and "8 x 8 = 64 tokens" in views.figures(made)


def with_codes(codes) -> views.Reconstruction:
    blank = torch.zeros(3, 8, 8, dtype=torch.uint8)
    return views.Reconstruction(original=blank, result=blank, codes=torch.tensor(codes), num_codes=100)


def test_codes_in_use():
    made = with_codes([[7, 7, 3, 3], [7, 7, 50, 2]])
    assert made.counts == [(7, 4), (3, 2), (2, 1), (50, 1)]
    p = torch.tensor([4, 2, 1, 1]) / 8
    assert made.perplexity == pytest.approx(float((-(p * p.log()).sum()).exp()))
    assert "**4 of 100** codes in use (4.0%)" in views.figures(made) and "inf dB" in views.figures(made)
    colours = views.principal_colours(torch.randn(100, 4))
    table = views.code_table(made, lambda codes: colours[codes])
    assert re.findall(r"</td><td>(\d+)</td><td>(\d+)</td><td>([\d.]+%)", table)[0] == ("7", "4", "50.0%")
    many = views.code_table(with_codes([list(range(40))]), lambda codes: colours[codes])
    assert many.count("swatch") == views.MOST_LISTED and "28 others</td><td>28" in many


def test_similar_codes_have_similar_colours():
    line = torch.linspace(-1, 1, 50)[:, None] * torch.tensor([[3.0, 1.0, -2.0, 0.5]])
    line += 0.01 * torch.randn(line.shape, generator=torch.Generator().manual_seed(0))
    first = views.principal_colours(line)[:, 0].int()
    assert first.diff().abs().max() < 40 and first.max() == 255 and first.min() == 0
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(views.principal_colours(line[shuffled])[:, 0].int(), first[shuffled])


@pytest.mark.parametrize(
    ("config", "codes"),
    [
        (IBQConfig(num_codes=50, dim=4), 50),
        (VQConfig(num_codes=50, dim=4), 50),
        (LFQConfig(dim=6), 64),
        (BSQConfig(dim=6), 64),
        (FSQConfig(levels=(5, 3, 3)), 45),
    ],
)
def test_colours_of_every_quantizer(config, codes):
    colours = views.code_colours(build_quantizer(config))(torch.arange(codes - 45, codes).reshape(5, 9))
    assert colours.shape == (5, 9, 3) and colours.dtype == torch.uint8
    assert len(colours.reshape(-1, 3).unique(dim=0)) > 20


@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (40, 2)])
def test_colours_of_small_codebooks(shape):
    colours = views.principal_colours(torch.randn(shape))
    assert colours.shape == (shape[0], 3) and colours.dtype == torch.uint8
    assert (colours[:, shape[1] :] == views.GREY).all()


def test_an_unfinished_picture_is_grey_below(tokenizer):
    codes = torch.randint(CODES, (2, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    images = views.unfinished(tokenizer, codes[:, :3], SIDE)
    assert images.shape == (2, 3, 32, 32)
    assert (images[:, :, 12:] == views.GREY).all() and images[:, :, :12].float().std() > 1
    assert torch.equal(views.unfinished(tokenizer, codes, SIDE), decode_in_blocks(tokenizer, codes, block=2))


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (7, (2, 4))])
def test_a_sheet_of_pictures(count, shape):
    images = torch.randint(256, (count, 3, 32, 32)).byte()
    page = views.sheet(images)
    assert page.shape == (260 * shape[0] - 4, 260 * shape[1] - 4, 3)
    assert torch.equal(apart(page, count, 32), images)


def apart(page: np.ndarray, count: int, side: int) -> torch.Tensor:
    """The pictures of a sheet."""
    factor, columns = 256 // side, (page.shape[1] + 4) // 260
    corners = [(i // columns * 260, i % columns * 260) for i in range(count)]
    parts = [page[top : top + 256 : factor, left : left + 256 : factor] for top, left in corners]
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2)


# --- Which models, which names ---


def test_names_of_classes(models, tmp_path):
    names_of, run = demo_models.names_of, models / "transformer"
    assert names_of(str(run), 3) == names_of(str(run / "best"), 3) == NAMES
    assert names_of(str(run), 4) is None and names_of(str(models / "other"), 3) is None
    codes = tmp_path / "codes"
    codes.mkdir()
    (codes / "meta.json").write_text(json.dumps({"classes": ["a", "b"]}))
    (tmp_path / "run" / "best").mkdir(parents=True)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(f"data: {{kind: codes, train: {codes}}}")
    assert names_of(str(tmp_path / "run" / "best"), 2) == ["a", "b"]
    (tmp_path / "classes.json").write_text('["c", "d"]')
    config.write_text(f"data: {{kind: images, train: '{tmp_path}/train-*.tar'}}")
    assert names_of(str(tmp_path / "run"), 2) == ["c", "d"]
    for text in ("data: {kind: images, train: 'https://host/{0..1}.tar'}", "data: []", "a: [", "data: {train: 3}"):
        config.write_text(text)
        (tmp_path / "classes.json").unlink(missing_ok=True)
        assert names_of(str(tmp_path / "run"), 2) is None


def test_choices_of_classes():
    assert views.class_choices(NAMES, 3)[1:] == [("1  dogs & wolves", 1), ("2  birds", 2), ("no class", 3)]
    assert views.class_choices(None, 1) == [("0", 0), ("no class", 1)]


def test_without_options_it_is_the_quickstarts(models, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_models, "ROOT", tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    nothing = demo.parse([])
    with pytest.raises(UserError, match=r"no model in runs/quickstart: make one with `bash tools/quickstart.sh`"):
        demo_models.places(nothing)
    for place in (tmp_path, tmp_path / "project"):
        run = place / "runs" / "quickstart"
        for name in ("tokenizer", "transformer"):
            (run / name / "best").mkdir(parents=True)
        found = demo_models.places(nothing)
        assert [Path(path).resolve() for path in found] == [run / "tokenizer", run / "transformer"]
        (run / "transformer" / "best").rmdir()
        assert demo_models.places(nothing)[1] is None  # the quickstart is at the transformer
        (run / "tokenizer" / "best").rmdir()
        (run / "tokenizer").rmdir()
        (run / "transformer").rmdir()
        run.rmdir()


def test_help_teaches():
    result = run_script("tools/demo.py", "--help")
    assert result.returncode == 0
    assert all(word in result.stdout for word in ("quickstart", "pip install", "ssh -L", "--host", "127.0.0.1"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tokenizer", "TINY/nothing"], ["no model at", "nothing", "run folder"]),
        (["--tokenizer", "TINY/transformer"], ["not a model of this kind"]),
        (["--tokenizer", "TINY/tokenizer", "--transformer", "TINY/tokenizer"], ["not a model of this kind"]),
        (["--tokenizer", "TINY/tokenizer", "--transformer", "TINY/other"], ["128 codes, the tokenizer 64"]),
        (["--transformer", "TINY/transformer"], ["--transformer", "add --tokenizer"]),
        (["--tokenizer", "TINY/tokenizer", "--rows", "0"], ["--rows", "at least 1"]),
        (
            ["--tokenizer", "TINY/tokenizer", "--transformer", "TINY/transformer", "--class-names", "TINY/x.json"],
            ["--class-names", "cannot be read"],
        ),
    ],
)
def test_impossible_models(models, more, words):
    with pytest.raises(UserError) as error:
        demo_models.open_models(demo.parse([*(word.replace("TINY", str(models)) for word in more), "--device", "cpu"]))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--port", "TAKEN"], ["--port", "127.0.0.1", "give another"]),
        (["--port", "70000"], ["--port", "65535"]),
        (["--host", "no.such.host.invalid"], ["--host", "no.such.host.invalid"]),
    ],
)
def test_ports_that_cannot_be_had(more, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run_script("tools/demo.py", *(word.replace("TAKEN", port) for word in more))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_the_first_free_port(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(demo, "FIRST_PORT", port)
        with demo.listening(demo.parse([])) as listener:
            host, chosen = listener.getsockname()
            assert host == "127.0.0.1" and port < chosen < port + demo.PORTS and demo.is_loopback(listener)


def test_without_gradio(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('no such module')")
    result = run_script("tools/demo.py", "--port", "0", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "python -m pip install -e '.[demo]'" in result.stderr


def test_nothing_is_asked_of_other_machines():
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"""
import socket, sys
from tools.demo import stay_here
sys.addaudithook(stay_here)
socket.create_connection(("localhost", {server.getsockname()[1]})).close()
for host in ("192.0.2.1", "example.invalid", "2001:db8::1"):
    try:
        socket.create_connection((host, 80), timeout=1)
    except PermissionError as error:
        print(error)
"""
        result = run_script("-c", code)
    assert result.stdout.count("asks nothing of other machines") == 3, result.stderr


def test_what_the_page_has(models, monkeypatch):
    for name, value in demo.QUIET.items():
        monkeypatch.setenv(name, value)
    from tools.lib.demo import page as demo_page

    given = ["--tokenizer", str(models / "tokenizer"), "--device", "cpu"]
    several = demo_page.build(demo_models.open_models(demo.parse([*given, "--transformer", str(models / "shapes")])))
    assert "transformer of 8 x 8 or 2 x 5 tokens" in json.dumps(several.get_config_file(), default=str)
    both = demo_models.open_models(demo.parse([*given, "--transformer", str(models / "transformer")]))
    page = demo_page.build(both)
    offered = [[block.visible for block in p.blocks.values() if block.elem_id == "grid"] for p in (several, page)]
    assert offered == [[True], [False]], "only where there is a choice"
    named = {block.elem_id for block in page.blocks.values()}
    assert {"upload", "generate", "class"} <= named
    heavy = [event for event in page.fns.values() if event.concurrency_id == "model"]
    assert len(heavy) == 6 and all(event.concurrency_limit == 1 for event in heavy)
    only = demo_page.build(demo_models.open_models(demo.parse(given)))
    named = {block.elem_id for block in only.blocks.values()}
    assert "upload" in named and "generate" not in named
    assert "start the page with `--transformer`" in json.dumps(only.get_config_file(), default=str)


def test_transformers_of_bits_are_offered_no_filters(models, tmp_path):
    from tools.lib.demo import page as demo_page

    write_best(tmp_path / "bits" / "best", Transformer(TransformerConfig(**TRANSFORMER, head=BitsHeadConfig())))
    for place, shown in ((models / "transformer", True), (tmp_path / "bits", False)):
        given = ["--tokenizer", str(models / "tokenizer"), "--transformer", str(place), "--device", "cpu"]
        page = demo_page.build(demo_models.open_models(demo.parse(given)))
        found = {block.elem_id: block for block in page.blocks.values() if block.elem_id in ("top-k", "top-p")}
        assert [found[name].visible for name in ("top-k", "top-p")] == [shown] * 2
        assert (found["top-k"].value, found["top-p"].value) == (0, 0.9 if shown else 1)


@pytest.mark.parametrize(
    ("values", "words"), [((0, 2, -1, 1, 1, 0, 1), "seeds: -1"), ((0, 2, 0, 1, 1, 0, 2), "use 0 to 1")]
)
def test_bad_settings_get_a_message(models, values, words):
    from tools.lib.demo import page as demo_page

    given = ["--tokenizer", str(models / "tokenizer"), "--transformer", str(models / "transformer"), "--device", "cpu"]
    show = demo_page.generator(demo_models.open_models(demo.parse(given)))
    ((picture, text, _),) = show(*values)
    assert picture is None and text.startswith("These settings do not work") and words in text


@pytest.mark.parametrize(("name", "grid", "rows"), [("transformer", (), SIDE), ("shapes", ("2 x 5",), 2)])
def test_bf16_draws_what_tools_sample_draws(models, tmp_path, name, grid, rows):
    from tools.lib.demo import page as demo_page

    given = ["--tokenizer", str(models / "tokenizer"), "--transformer", str(models / name), "--device", "cpu"]
    given += ["--precision", "bf16", "--rows", "2"]
    show = demo_page.generator(demo_models.open_models(demo.parse(given)))
    *earlier, (last, text, _) = show(2, 2, 5, 1.0, 1.0, 10, 0.95, *grid)
    assert len(earlier) == rows - 1 and earlier[0][1] == f"Row 1 of {rows} …"
    (command,) = re.findall(r"```\npython (.*)\n```", text)
    result = run_script(*shlex.split(command.replace("samples", str(tmp_path))), "--device", "cpu")
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as found:
        drawn = torch.from_numpy(found["arr_0"]).permute(0, 3, 1, 2)
    assert drawn.shape[2:] == (4 * rows, 20 if grid else 32) and np.array_equal(views.sheet(drawn), last)


@pytest.mark.parametrize("name", ["random", "transformer"])
def test_a_part_is_drawn_anew(models, tmp_path, name):
    """Of a picture that was given; the rest, and what a raster model cannot draw, stays."""
    from tools.lib.demo import edit as demo_edit
    from tools.lib.demo import page as demo_page

    given = ["--tokenizer", str(models / "tokenizer"), "--transformer", str(models / name), "--device", "cpu"]
    loaded = demo_models.open_models(demo.parse([*given, "--rows", "2"]))
    region, file = (3, 5, 2, 8, "the box"), saved(tmp_path / "x.png", png(picture(5, 64)))
    codes, shown, text = demo_edit.opener(loaded, demo_page.grids_of(loaded))(str(file), "8 x 8", *region)
    fitted = torch.from_numpy(square(picture(5, 64), 32).copy()).permute(2, 0, 1)
    assert torch.equal(codes, loaded.tokenizer.encode(to_unit_range(fitted[None]))[0]) and text == ""
    small = torch.from_numpy(shown)[::8, ::8]
    assert (small[8:20, 4:] == views.GREY).all() and (small[:8] != views.GREY).any()
    assert (torch.from_numpy(demo_edit.shower(loaded)(codes, *region[:4], "all around it"))[::8, ::8][:8] == 128).all()
    draw = demo_edit.drawer(demo_page.generator(loaded))
    *earlier, (last, text, drawn) = draw(codes, *region, 1, 2, 5, 2.0, 1.0, 10, 0.95, "8 x 8")
    if name == "transformer":
        assert last is None and "keep: a model of raster order" in text and earlier == []
        *_, (last, text, drawn) = draw(codes, 5, 8, 1, 8, "the box", 1, 2, 5, 2.0, 1.0, 10, 0.95, "8 x 8")
        assert torch.equal(drawn[:, :4], codes[:4].expand(2, -1, -1)) and "done in" in text
        return
    keep = torch.ones(8, 8, dtype=torch.bool)
    keep[2:5, 1:8] = False
    settings = {"guidance_scale": 2.0, "top_k": 10, "top_p": 0.95, "rows_per_block": 2}
    expected = generate(loaded.tokenizer, loaded.transformer, [1, 1], seed=5, keep=keep, codes=codes, **settings)
    assert np.array_equal(views.sheet(expected), last) and len(earlier) == SIDE - 1
    assert torch.equal(drawn[:, keep], codes[keep].expand(2, -1)) and (drawn != codes).any()
    taken, _, text = demo_edit.taker(loaded)(drawn, 2, *region)
    assert torch.equal(taken, drawn[1]) and text == ""
    for missing in (demo_edit.taker(loaded)(drawn, 3, *region), demo_edit.taker(loaded)(None, 1, *region)):
        assert missing[0] is None and "no such picture" in missing[2]
    ((last, text, _),) = draw(None, *region, 1, 2, 5, 2.0, 1.0, 10, 0.95, "8 x 8")
    assert last is None and "no picture yet" in text
    ((last, text, _),) = draw(codes, 5, 4, *region[2:], 1, 2, 5, 2.0, 1.0, 10, 0.95, "8 x 8")
    assert last is None and "no code in the box" in text
    assert (
        "cannot be shown"
        in demo_edit.opener(loaded, demo_page.grids_of(loaded))(str(saved(tmp_path / "y", b"no")), "8 x 8", *region)[2]
    )


# --- In the browser ---

browser_tests = pytest.mark.needs(*needs.BROWSER)


class Page:
    """A running tools/demo.py, and a browser that looks at it."""

    def __init__(self, temporary: Path, *options: str):
        self.temporary = temporary
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(temporary.with_name("inductor"))  # PyTorch's own, which stays
        command = [sys.executable, "tools/demo.py", *options, "--device", "cpu", "--port", "0"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        line = self.process.stdout.readline()  # ends with the process at the latest
        assert line.startswith("http://127.0.0.1:"), self.process.communicate()[1]
        self.url = line.split()[0]

    def stop(self) -> tuple[int, str]:
        """Ctrl-C; the exit code and what stood on stderr."""
        self.process.send_signal(signal.SIGINT)
        try:
            _, errors = self.process.communicate(timeout=HANG_S)
            return self.process.returncode, errors
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def page(models, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("temporary")
    found = Page(temporary, "--tokenizer", str(models / "tokenizer"), "--transformer", str(models / "transformer"))
    yield found
    if found.process.returncode is None:
        found.stop()


@pytest.fixture(scope="module")
def browser(page):
    with Browser() as opened:
        opened.requests()  # of the browser's own first page
        opened.open(page.url)
        opened.wait(lambda: opened.text("#upload"), "the page")
        yield opened


def upload(browser: Browser, path: Path) -> None:
    """Give the page a file, in place of the one that it has."""
    if browser.script("return !document.querySelector('#upload input[type=file]')"):
        browser.click("#upload button[aria-label=Clear]")
        there = "return !!document.querySelector('#upload input[type=file]')"
        browser.wait(lambda: browser.script(there), "the place to drop a file")
    browser.keys("#upload input[type=file]", str(path))


def source(browser: Browser, name: str) -> str:
    """The address of the picture in a component, once it is there."""
    code = "const i = document.querySelector(arguments[0]); return i && i.complete && i.naturalWidth > 0 && i.src"
    return browser.wait(lambda: browser.script(code, f"#{name} img"), f"the picture {name}")


def pixels(browser: Browser, name: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(browser.fetch(source(browser, name)))).convert("RGB"))


def message(browser: Browser, name: str, words: str) -> str:
    return browser.wait(lambda: words in (text := browser.text(f"#{name}-message")) and text, f"{words!r}")


@browser_tests
def test_a_picture_is_reconstructed(browser, tokenizer, tmp_path):
    upload(browser, saved(tmp_path / "wide.png", png(picture(5, 64))))
    text = message(browser, "reconstruct", "dB")
    made = views.reconstruct(tokenizer, views.fitted(np.asarray(picture(5, 64)), "centre square", 32, 4))
    assert f"{made.psnr:.2f} dB" in text and f"{len(made.counts)} of 64" in text and "8 x 8 = 64 tokens" in text
    assert np.array_equal(pixels(browser, "reconstruction")[::8, ::8], made.result.permute(1, 2, 0).numpy())
    assert np.array_equal(pixels(browser, "original")[::8, ::8], made.original.permute(1, 2, 0).numpy())
    colours = views.code_colours(tokenizer.quantizer)(made.codes)
    assert np.array_equal(pixels(browser, "code-map")[::32, ::32], colours.numpy())
    rows = browser.script("return [...document.querySelectorAll('#codes tr')].map(e => e.innerText)")
    assert rows[1].split()[:2] == [str(number) for number in made.counts[0]]


@browser_tests
def test_another_shape_is_another_reconstruction(browser, tmp_path):
    upload(browser, saved(tmp_path / "wide.png", png(picture(6, 64).crop((0, 0, 64, 32)))))
    message(browser, "reconstruct", "8 x 8 = 64 tokens")
    browser.click("#shape label:nth-of-type(2)")
    message(browser, "reconstruct", "8 x 4 = 32 tokens")
    browser.click("#shape label:nth-of-type(1)")
    message(browser, "reconstruct", "8 x 8 = 64 tokens")


@browser_tests
def test_bad_uploads_get_a_message(browser, page, tmp_path):
    upload(browser, saved(tmp_path / "broken.png", png(picture(1, 40))[:200]))
    assert "Traceback" not in message(browser, "reconstruct", "cannot be shown")
    bomb = io.BytesIO()
    Image.new("1", (10_000, 4_001)).save(bomb, "PNG")
    upload(browser, saved(tmp_path / "bomb.png", bomb.getvalue()))
    message(browser, "reconstruct", "10000 x 4001 pixels are more than the 40,000,000 allowed")
    large = saved(tmp_path / "large.png", png(picture(1, 40)))
    os.truncate(large, views.UPLOAD_MB * 2**20 + 1)
    upload(browser, large)
    browser.wait(lambda: "exceed the maximum allowed size of 20" in browser.text("body"), "a message about the size")
    # Nor does the server take it from who goes around the page's own check.
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="large.png"\r\n\r\n'
    body = head + large.read_bytes() + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(f"{page.url}/gradio_api/upload", body, kind), timeout=HANG_S)
    assert error.value.code == 413


@browser_tests
def test_a_bundled_picture(browser):
    browser.click("#example")
    message(browser, "reconstruct", "8 x 8 = 64 tokens")
    assert pixels(browser, "original").std() > 10


WATCH = """
    window.seen = [];
    const look = () => {
        const row = document.querySelector('#generate-message').innerText.match(/Row (\\d+) of/);
        const picture = document.querySelector('#samples img');
        window.seen.push([row && +row[1], picture && picture.src]);
    };
    const options = {subtree: true, childList: true, characterData: true, attributes: true};
    new MutationObserver(look).observe(document.querySelector('#generate-tab'), options);"""


def generated(browser: Browser) -> np.ndarray:
    """The picture that a click on Generate ends with."""
    browser.script("window.seen = []")
    browser.click("#generate")
    code = f"return window.seen.some(([row]) => row && row < {SIDE})"  # the last message may still stand there
    browser.wait(lambda: browser.script(code), "a first row")
    message(browser, "generate", "done in")
    # The picture follows its message: not that of an earlier click, nor one whose last row is missing yet.
    several = "return new Set(window.seen.map(([_, address]) => address)).size > 1"
    browser.wait(lambda: browser.script(several), "unfinished pictures")

    def last() -> list[np.ndarray]:
        picture = pixels(browser, "samples")
        return [] if (apart(picture, 4, 32)[:, :, -4:] == views.GREY).all() else [picture]

    return browser.wait(last, "the last picture")[0]


@browser_tests
def test_images_appear_row_by_row(browser, models):
    browser.click("#generate-tab-button")
    browser.click("#class input")
    browser.click("#class [role=option]:nth-of-type(2)")
    assert browser.script("return document.querySelector('#class input').value") == "1  dogs & wolves"
    browser.script(WATCH)
    first = generated(browser)
    seen = browser.script("return window.seen")
    rows = {row for row, _ in seen if row}
    assert SIDE in rows and len(rows) > SIDE // 2
    assert len({address for _, address in seen if address}) > SIDE // 2
    settings = {"guidance_scale": 2.5, "top_p": 0.9}
    parts = [demo_models.load_tokenizer(models / "tokenizer", device="cpu")]
    parts.append(demo_models.load_transformer(models / "transformer", device="cpu"))
    assert torch.equal(apart(first, 4, 32), generate(*parts, classes=[1] * 4, seed=0, **settings))
    assert np.array_equal(generated(browser), first)
    # An unfinished picture, as it was shown, is grey below and finished above.
    halves = [address for row, address in seen if row == 4 and address]
    grown = np.asarray(Image.open(io.BytesIO(browser.fetch(halves[-1]))))
    unfinished = apart(grown, 4, 32)
    assert (unfinished[:, :, -4 * (SIDE - 5) :] == views.GREY).all() and (unfinished[:, :, :4] != views.GREY).any()


@browser_tests
def test_another_seed_is_another_image_and_bad_settings_get_a_message(browser):
    before = pixels(browser, "samples")
    browser.script("document.querySelector('#seed input').select()")
    browser.keys("#seed input", "7")
    assert not np.array_equal(generated(browser), before)
    browser.script("document.querySelector('#seed input').select()")
    browser.keys("#seed input", "\ue003")  # backspace
    browser.click("#generate")
    message(browser, "generate", "These settings do not work")


@browser_tests
def test_a_part_of_the_last_picture_is_drawn_anew(browser, models, tmp_path):
    """The transformer of this page knows raster order: another part than the lower one gets a message."""
    browser.script("document.querySelector('#seed input').select()")
    browser.keys("#seed input", "7")
    before = apart(generated(browser), 4, 32)
    browser.click("#edit-tab-button")
    browser.script("document.querySelector('#edit-number input').select()")
    browser.keys("#edit-number input", "3")
    browser.click("#edit-take")
    shown = torch.from_numpy(pixels(browser, "edit-picture")[::8, ::8].copy()).permute(2, 0, 1)
    assert torch.equal(shown[:, :16], before[2][:, :16]) and (shown[:, 16:] == views.GREY).all()
    browser.click("#edit-draw")
    message(browser, "edit", "done in")
    parts = [demo_models.load_tokenizer(models / "tokenizer", device="cpu")]
    parts.append(demo_models.load_transformer(models / "transformer", device="cpu"))
    settings = {"guidance_scale": 2.5, "top_p": 0.9}
    label = browser.script("return document.querySelector('#class input').value")
    config = SamplerConfig(**settings)
    codes = sample_codes(parts[1], [int(label[0])] * 4, range(7, 11), config)[2]
    expected = generate(
        *parts, [int(label[0])] * 4, seed=7, codes=codes, keep=torch.arange(64).view(8, 8) < 32, **settings
    )
    browser.wait(lambda: torch.equal(apart(pixels(browser, "edit-samples"), 4, 32), expected), "the last picture")
    browser.click("#edit-part label:nth-of-type(2)")
    browser.click("#edit-draw")
    assert "order: random" in message(browser, "edit", "These settings do not work")
    browser.keys("#edit-upload input[type=file]", str(saved(tmp_path / "x.png", png(picture(5, 64)))))
    given = torch.from_numpy(square(picture(5, 64), 32).copy()).permute(2, 0, 1)
    expected = decode_in_blocks(parts[0], codes_of(parts[0], given[None]), block=1)[0, :, 16:]

    def opened() -> bool:
        shown = pixels(browser, "edit-picture")[::8, ::8].copy()
        return torch.equal(torch.from_numpy(shown).permute(2, 0, 1)[:, 16:], expected)

    browser.wait(opened, "the picture that was given")
    browser.click("#generate-tab-button")


@browser_tests
def test_the_page_asks_only_its_own_server(browser, page):
    foreign = [url for url in browser.requests() if not url.startswith((page.url, "data:", "blob:", "chrome:"))]
    assert foreign == []
    assert not [line for line in browser.complaints() if "Content Security Policy" in line]
    for path in ("setup.cfg", str(ROOT / "setup.cfg")):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{page.url}/gradio_api/file={path}", timeout=HANG_S)
    with pytest.raises(urllib.error.HTTPError, match="400"):  # a site elsewhere whose name points here
        urllib.request.urlopen(urllib.request.Request(page.url, headers={"Host": "example.com"}), timeout=HANG_S)


def listening_addresses(process: int) -> set[str]:
    """Where a process listens, as in /proc: 0100007F is 127.0.0.1."""
    sockets = {os.readlink(file) for file in Path(f"/proc/{process}/fd").iterdir() if file.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1])
    return found


@browser_tests
def test_it_listens_on_loopback_and_stops_at_ctrl_c(browser, page):
    port = int(page.url.rpartition(":")[2])
    assert listening_addresses(page.process.pid) == {f"0100007F:{port:04X}"}
    assert [path.name.startswith("ibq-demo-") for path in page.temporary.iterdir()] == [True]
    browser.keys("#seed input", "3")
    browser.click("#generate")
    code, errors = page.stop()
    assert code in (0, 130) and errors == ""
    assert not list(page.temporary.iterdir())  # neither uploads nor pictures
