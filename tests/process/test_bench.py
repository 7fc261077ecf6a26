"""The benches of numeric cores run, and write what the pages say."""

import argparse
import json
import math
import re
import sys
from functools import partial

import pytest
import torch
from support import needs
from support.processes import run_script

from tools import bench as bench_tool
from tools.lib.bench import head_loss as bench_head_loss
from tools.lib.bench import quantizer as bench_quantizer
from tools.lib.bench import record as bench_record

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the memory of a process is read from Linux's /proc"
)


bench = partial(run_script, "tools/bench.py", timeout=600)


def test_what_measures_is_forked_where_that_is_as_new():
    """From a process of one thread, for the CPU."""
    code = """
import threading
from tools.lib.bench.process import _may_fork
alone = _may_fork({"device": "cpu"}), _may_fork({"device": "cuda"})
threading.Thread(target=threading.Event().wait, daemon=True).start()
assert (*alone, _may_fork({"device": "cpu"})) == (True, False, False)
"""
    done = run_script("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("forks", [True, False])
def test_what_measures_says_why_it_fails(forks):
    code = f"""
from tools.lib.bench import process, quantizer
process._may_fork = lambda arguments: {forks}
assert process.run_apart(quantizer.rate_of_products, dim=1, device="cpu")["flop_per_second"] > 0
process.run_apart(quantizer.rate_of_products, dim=-1, device="cpu")
"""
    done = run_script("-c", code)
    assert "RuntimeError: rate_of_products ended with exit code 1:" in done.stderr, done.stderr
    assert "dimension -1" in done.stderr and not done.stdout


def test_quantizer(tmp_path):
    file = tmp_path / "q.json"
    size = ("--codes", "3000", "--dim", "16", "--images", "2", "--tokens", "400", "--repeats", "1")
    done = bench("quantizer", *size, "--no-picture", "--json", str(file))
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    origin = figures["origin"]
    assert origin["command"].startswith("python tools/bench.py quantizer --codes 3000") and origin["cpu"]
    ours, plain, ratio = figures["ours"], figures["textbook"], figures["ratio"]
    assert ratio["speedup"] == pytest.approx(plain["seconds"] / ours["seconds"])
    assert ratio["speedup_flushed"] == pytest.approx(plain["seconds_flushed"] / ours["seconds"])
    assert ratio["memory"] == pytest.approx(plain["extra_peak_gib"] / ours["extra_peak_gib"])
    tables = plain["extra_peak_gib"] * 2**30 / (4 * 3000 * 800)
    assert 5 < tables < 20, "the textbook form holds some eight tables, and the process a little more"
    assert 0 < ours["gemm_share"] < 1.2 and "textbook" in done.stdout


def test_head_loss(tmp_path):
    file = tmp_path / "h.json"
    done = bench("head-loss", "--codes", "500", "--dim", "16", "--tokens", "300", "--repeats", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert figures["ratio"]["memory"] > 1 and figures["ours"]["gemm_share"] > 0 and figures["textbook"]["seconds"] > 0
    pytorch = ("pytorch", "pytorch, mean") if hasattr(torch.nn.functional, "linear_cross_entropy") else ()
    for form in ("ours", "textbook", *pytorch):
        assert all(0 < figures[form][name] < 1e-5 for name in ("loss_error", "hidden_error", "weight_error")), form
    for form in pytorch[:1]:
        low, high = (figures["ours_over"][form]["seconds"][i] for i in (1, 2))
        assert low <= figures["ours"]["seconds"] / figures[form]["seconds"] <= high


def test_a_form_that_cannot_be_had_says_why(monkeypatch):
    def missing(*_):
        raise RuntimeError("no such product\nand more")

    monkeypatch.setitem(bench_head_loss.FORMS, "pytorch", missing)
    size = {"codes": 50, "dim": 8, "tokens": 20, "precision": "fp32", "device": "cpu"}
    names = (*bench_head_loss.MEASURED, *bench_head_loss.ERRORS, "nll", "product_rate", "threads")
    found = {form: dict.fromkeys(names, 1.0) for form in bench_head_loss.FORMS}
    found["pytorch"] = bench_head_loss.measure_form(form="pytorch", **size)
    figures = bench_head_loss.figures_of([found], argparse.Namespace(**size, repeats=1))
    assert figures["pytorch"] == {"problem": "RuntimeError: no such product"}
    assert figures["ours_over"].keys() == {"textbook", "pytorch, mean"}
    assert "RuntimeError: no such product" in bench_head_loss.table(figures)


def test_a_folder_gets_a_file_that_is_named_by_what_was_measured(tmp_path):
    arguments = bench_tool.parse(["ar-step", "--config", "yaml/b.yaml", "--device", "cpu"])
    name = bench_record.file_of(tmp_path, arguments).name
    assert re.fullmatch(r"ar-step_b_cpu-\d+-cores_\d{6}\.json", name)
    arguments = bench_tool.parse(["head-loss", "--codes", "50"])
    assert bench_record.file_of(tmp_path, arguments).name.startswith("head-loss_50-codes-fp32_cpu-")
    assert bench_record.file_of(tmp_path / "x.json", arguments) == tmp_path / "x.json"


TINY_TRANSFORMER = """
data: {train: x, validation: x}
model: {vocab_size: 64, num_classes: 3, tokens_per_side: 4, depth: 2, width: 64, heads: 2}
"""
TINY_TOKENIZER = """
data: {train: x, validation: x}
model:
  resolution: 32
  channels: 32
  channel_multipliers: [1, 1]
  res_blocks: 1
  attention_resolutions: []
  latent_channels: 16
  quantizer: {num_codes: 64, dim: 16}
loss: {gan: {discriminator: {channels: 8, layers: 2}}}
"""


def test_heads(tmp_path):
    (tmp_path / "t.yaml").write_text(TINY_TRANSFORMER)
    size = ("--config", str(tmp_path / "t.yaml"), "--codes", "4096", "--batch", "2", "--steps", "1", "--rounds", "1")
    done = bench("heads", *size, "--device", "cpu", "--json", str(tmp_path / "h.json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "h.json").read_text())
    assert list(figures["heads"]) == ["plain", "factorised", "bits", "masked_bits"]
    for head, found in figures["heads"].items():
        assert found["tokens_per_second"] == pytest.approx(2 * 16 / found["seconds"]) and head in done.stdout
    plain, factorised = (figures["heads"][head] for head in ("plain", "factorised"))
    assert plain["parameters"] - factorised["parameters"] == 2 * 64 * (4096 - 16 - 256) - inner_parameters(64)
    assert plain["seconds_of_plain"] == plain["peak_gib_of_plain"] == 1
    losses = [one["losses"][0] for one in figures["rounds"][0].values()]
    assert losses == pytest.approx([math.log(4096)] * 4, rel=1e-3)


def inner_parameters(width: int) -> int:
    """Of two blocks: projections, the feed-forward part and two norms."""
    return 2 * (4 * width**2 + 3 * width * 256 + 2 * width)


def test_sample(tmp_path):
    (tmp_path / "t.yaml").write_text(TINY_TRANSFORMER)
    (tmp_path / "k.yaml").write_text(TINY_TOKENIZER)
    size = ("--config", str(tmp_path / "t.yaml"), "--rows", "2,3", "--rounds", "1")
    pixels = ("--pixels", str(tmp_path / "k.yaml"))
    done = bench("sample", *size, *pixels, "--json", str(tmp_path / "s.json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "s.json").read_text())
    assert figures["rows"].keys() == {"2", "3"} and 0 < figures["kl_from_fp32_nats"]["bf16"] < 1e-2
    for rows, found in figures["rows"].items():
        rate, ratio, step = found["tokens_per_second"], found["ratio"], found["ms_a_step"]
        assert ratio["speedup"] == pytest.approx(rate["bf16"] / rate["textbook fp32"])
        assert ratio["speedup_fp32"] == pytest.approx(step["textbook fp32"] / step["fp32"])
        assert found["images_per_second"]["fp32"] == pytest.approx(int(rows) * 1000 / step["fp32"] / figures["tokens"])
        limit = max(found["limits_ms"]["fp32"].values())
        assert found["share_of_roofline"]["fp32"] == pytest.approx(limit / step["fp32"]) and limit > 0
        assert {"products", "attention", "norms", "gates", "draw", "rest"} == found["parts_ms"]["bf16"].keys()
        assert all(value > 0 for value in found["parts_ms"]["bf16"].values())
        pixels = found["with_pixels"]
        rates = pixels["pixels_images_per_second"], pixels["codes_images_per_second"]
        assert pixels["ratio"] == pytest.approx(rates[0] / rates[1]) and min(rates) > 0
    assert "KL from fp32" in done.stdout and "with pixels" in done.stdout
    done = bench("sample", *size, "--tokens", "17")
    assert done.returncode == 2 and "--tokens: 1 to 16" in done.stderr


@pytest.mark.parametrize(
    ("name", "config", "rate"),
    [
        pytest.param(
            "ar-step", TINY_TRANSFORMER, "tokens_per_second", marks=pytest.mark.needs("g++")
        ),  # compiled blocks
        ("tokenizer-step", TINY_TOKENIZER, "images_per_second"),
    ],
)
def test_training_steps(name, config, rate, tmp_path):
    (tmp_path / "run.yaml").write_text(config)
    size = ("--config", str(tmp_path / "run.yaml"), "--batch", "2", "--steps", "1")
    done = bench(name, *size, "--json", str(tmp_path / "s.json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "s.json").read_text())
    ours, plain = figures["ours"], figures["plain"]
    assert figures["ratio"]["speedup"] == pytest.approx(plain["seconds"] / ours["seconds"])
    assert ours[rate] / plain[rate] == pytest.approx(figures["ratio"]["speedup"])
    assert ours["parts"].keys() == plain["parts"].keys()
    assert all(figures["rates"][name] > 0 for name in ("bf16", "fp32", "bytes_per_second"))
    share = {"ar-step": "mfu", "tokenizer-step": "of_limit"}[name]
    assert 0 < plain[share] < 1 and ours[share] / plain[share] == pytest.approx(figures["ratio"]["speedup"])
    if name == "ar-step":
        loss, forward = (ours["parts"][part] for part in ("loss, of the forward pass", "forward"))
        assert 0 < loss < forward and ours["parts"]["data"] < ours["seconds"]
    # The same networks on the same data: both forms begin with nearly the same loss.
    assert ours["losses"][0] == pytest.approx(plain["losses"][0], rel=2e-2)
    assert "times the plain form's speed" in done.stdout


def test_random_orders_beside_raster_order(tmp_path):
    (tmp_path / "run.yaml").write_text(TINY_TRANSFORMER)
    size = (
        "--config",
        str(tmp_path / "run.yaml"),
        "--batch",
        "2",
        "--rounds",
        "3",
        "--depth",
        "1",
        "--compile",
        "false",
    )
    done = bench("order-step", *size, "--json", str(tmp_path / "s.json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "s.json").read_text())
    assert "3 rounds" in done.stdout
    for clock in ("seconds", "cpu_seconds"):
        raster, random = (figures[clock][order]["all"] for order in ("raster", "random"))
        ratios = sorted(one / other for one, other in zip(random, raster, strict=True))
        assert figures[clock]["ratio"]["median"] == ratios[1] and min(raster) > 0 and len(raster) == 3
        assert f"median {ratios[1]:.3f}" in done.stdout


@pytest.mark.parametrize("option", ["--codes=0", "--images=-1", "--device=cuda"])
def test_bad_options_are_one_line(option, tmp_path):
    if option == "--device=cuda" and torch.cuda.is_available():
        option = "--repeats=0"
    done = bench("quantizer", option)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and option.split("=")[0] in done.stderr


def test_growth_and_its_picture(tmp_path):
    growth = [
        {"codes": codes, "images": images, "ours": form(codes * images), "textbook": form(4 * codes * images)}
        for codes, images in [(1024, 4), (4096, 4), (16384, 1), (16384, 2), (16384, 4)]
    ]
    assert bench_quantizer.exponents(growth) == pytest.approx({"seconds_over_tokens_times_codes": 1.0})
    figures = {"growth": growth, "settings": {"codes": 16384, "images": 4}}
    path = bench_quantizer.draw(figures, tmp_path / "picture.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def form(size: int) -> dict[str, float]:
    return {"seconds": size / 1000, "extra_peak_gib": size / 10_000}


def test_tokenizer_memory(tmp_path):
    config = tmp_path / "t.yaml"
    config.write_text(
        "model: {resolution: 64, channels: 32, channel_multipliers: [1, 1], res_blocks: 4, attention_resolutions: [], "
        "latent_channels: 16, quantizer: {num_codes: 64, dim: 16}}\n"
    )
    file = tmp_path / "t.json"
    # Fewer images, or fewer blocks, are lost among the process's own pages.
    size = ("--config", str(config), "--batch", "12", "--repeats", "1")
    done = bench("tokenizer-memory", *size, "--json", str(file))
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    kept, recomputed, ratio = figures["kept"], figures["recomputed"], figures["ratio"]
    assert ratio["memory"] == pytest.approx(recomputed["activation_gib"] / kept["activation_gib"])
    assert 0 < ratio["memory"] < 1 and ratio["time"] > 0 and "recomputed" in done.stdout
    assert ratio["memory"] < figures["ratio_selective"]["memory"] < 1


@pytest.mark.slow
@pytest.mark.needs(*needs.NVME)
def test_xxl_step_in_small(tmp_path):
    """The same two runs by the deepspeed launcher, of a model that is small in everything."""
    file = tmp_path / "x.json"
    small = [f"model.{size}" for size in ("depth=2", "heads=2", "width=32", "vocab_size=64", "num_classes=12")]
    arguments = (
        "--folder",
        str(tmp_path / "run"),
        "--steps",
        "3",
        "--more-steps",
        "2",
        "--batch",
        "2",
        "--set",
        *small,
    )
    arguments = (*arguments, "optimizer.learning_rate=1e-2", "--json", str(file))
    done = bench("xxl-step", *arguments)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert len(figures["losses"]) == 3 and len(figures["resumed_losses"]) == 2
    assert figures["losses"][0] == pytest.approx(math.log(64), abs=1e-3)
    assert figures["resumed_losses"][-1] < figures["losses"][0]
    assert 0 < figures["peak_gib"] < 8 and figures["seconds_per_step"] > 0
    assert figures["parameters"] > 2 * 64 * 32 and not (tmp_path / "run").exists()
