"""The benches of engines on two processes and of growth run, and their figures hold together."""

import gzip
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from support import needs
from support.processes import run_script

from ibq.config import UserError
from ibq.scaling.transformer import transformer_flops
from tools.lib.bench import engines as bench_engines
from tools.lib.bench import growth as bench_growth
from tools.lib.bench.engines_trace import common, communication, covered

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the memory of a process is read from Linux's /proc"
)
# Large enough that what an engine holds of the model is more than what a process varies by.
MODEL = """
data: {train: x, validation: x}
model: {vocab_size: 1024, num_classes: 10, tokens_per_side: 4, depth: 4, width: 768, heads: 12}
"""
STEPS = 2  # timed ones; three come before


bench = partial(run_script, "tools/bench.py", timeout=600)


# --- Engines ---


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Figures, the folder of traces and the printed table of all engines."""
    needs.require("g++")
    folder = tmp_path_factory.mktemp("engines")
    (folder / "run.yaml").write_text(MODEL)
    options = ("--config", str(folder / "run.yaml"), "--batch", "2", "--steps", str(STEPS), "--device", "cpu", "--set")
    done = bench("engines", *options, "--trace", str(folder / "traces"), "--json", str(folder / "e.json"))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "e.json").read_text()), folder / "traces", done.stdout


@pytest.mark.slow
def test_engines_train_alike(measured):
    """The same but for bf16, which engines round to at different places: some thousandths of the loss."""
    engines = measured[0]["engines"]
    assert set(engines) == set(bench_engines.TITLES)
    base = engines["ddp"]["losses"]
    assert len(base) == STEPS + 3 and base[-1] < 0.9 * base[0]
    for name, own in engines.items():
        apart = max(abs(loss - other) for loss, other in zip(own["losses"], base, strict=True))
        assert apart < 5e-3 * base[-1], name


@pytest.mark.slow
def test_time_and_memory_of_engines(measured):
    figures, _, table = measured
    engines, ratio = figures["engines"], figures["ratio"]
    for name, own in engines.items():
        parts = sum(own["parts"].values())
        assert set(own["parts"]) == {"forward", "backward", "optimizer"}
        assert 0 < parts <= own["seconds"] and own["threads"] == 1
        assert own["peak_gib"] == max(own["peak_gib_of_ranks"]) > own["expected"]["state_gib"], name
        assert ratio[name]["seconds"] == pytest.approx(own["seconds"] / engines["ddp"]["seconds"])
        assert ratio[name]["memory"] == pytest.approx(own["peak_gib"] / engines["ddp"]["peak_gib"])
        assert bench_engines.TITLES[name] in table
    assert ratio["ddp"] == {"seconds": 1.0, "memory": 1.0}
    state = {name: own["expected"]["state_gib"] for name, own in engines.items()}
    # By hand: DDP holds weights, gradients, two moments; FSDP2 half of each; ZeRO-3 the same and half of bf16 weights.
    weights = 4 * figures["parameters"] / 2**30
    assert state["ddp"] >= 4 * weights and state["fsdp2"] == pytest.approx(2 * weights)
    assert state["zero-3"] == pytest.approx(2.25 * weights)
    for name in ("fsdp2", "zero-2", "zero-3"):
        assert ratio[name]["memory"] < 0.9, name


@pytest.mark.slow
def test_traces_of_engines(measured):
    figures, folder, _ = measured
    wanted = {
        "ddp": {"all_reduce"},
        "fsdp2": {"all_gather"},
        "zero-1": {"all_reduce", "all_gather"},
        "zero-2": {"all_reduce", "all_gather"},
        "zero-3": {"all_gather"},
    }
    assert len(list(folder.iterdir())) == 2 * len(wanted)
    for name, names in wanted.items():
        for rank in range(2):
            with gzip.open(folder / f"{name}_rank{rank}.json.gz", "rt") as stream:
                events = json.load(stream)["traceEvents"]
            found = {event["name"] for event in events if event.get("ph") == "X"}
            assert {f"gloo:{own}" for own in names} <= found, name
            assert "aten::mm" in found
        own = figures["engines"][name]["communication"]
        assert names <= own["collectives"].keys() and 0 <= own["overlap"] <= 1
        assert own["seconds"] > 0


def events(path: Path, *spans: tuple) -> Path:
    """A trace of (name, category, thread, start, duration)."""
    listed = [{"ph": "X", "name": n, "cat": c, "tid": t, "ts": s, "dur": d} for n, c, t, s, d in spans]
    with gzip.open(path, "wt") as stream:
        json.dump({"traceEvents": [*listed, {"ph": "M", "name": "process_name"}]}, stream)
    return path


def test_overlap_on_a_cpu(tmp_path):
    own = communication(
        events(
            tmp_path / "t.json.gz",
            ("gloo:all_reduce", "user_annotation", 7, 100.0, 100.0),
            ("gloo:all_reduce", "user_annotation", 8, 150.0, 150.0),  # both: 100 to 300
            ("aten::copy_", "cpu_op", 7, 100.0, 100.0),  # gloo's own work
            ("aten::mm", "cpu_op", 1, 80.0, 60.0),  # 40 of them beside
            ("autograd::engine", "cpu_op", 1, 100.0, 200.0),  # a wait within it would not be work
            ("aten::mm", "cpu_op", 1, 200.0, 20.0),
            ("c10d::allreduce_", "cpu_op", 1, 250.0, 30.0),
            ("aten::clone", "cpu_op", 1, 255.0, 10.0),  # for the collective
        )
    )
    assert own.seconds == pytest.approx(200e-6) and own.overlap == pytest.approx(60 / 200)
    assert own.collectives == {"all_reduce": 2}


def test_overlap_on_a_gpu(tmp_path):
    own = communication(
        events(
            tmp_path / "t.json.gz",
            ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "kernel", 20, 0.0, 100.0),
            ("ampere_gemm", "kernel", 7, 50.0, 25.0),
            ("gloo:all_reduce", "user_annotation", 9, 0.0, 500.0),  # of a number on the CPU
        )
    )
    assert own.seconds == pytest.approx(100e-6) and own.overlap == pytest.approx(0.25)


def test_a_trace_without_communication(tmp_path):
    own = communication(events(tmp_path / "t.json.gz", ("aten::mm", "cpu_op", 1, 0.0, 5.0)))
    assert own.seconds == own.overlap == 0 and own.collectives == {}


def test_spans():
    assert covered([(0, 2), (1, 3), (5, 6)]) == 4 and covered([]) == 0
    assert common([(0, 4), (10, 12)], [(2, 11)]) == 3


def test_ratios_need_ddp():
    assert bench_engines.ratios({"fsdp2": {"seconds": 1.0, "peak_gib": 1.0}}) == {}


@pytest.mark.parametrize(
    "options",
    [("engines", "--batch=3"), ("engines", "--steps=0"), ("engines", "--set", "optimizer.kind=sgd"),
     ("engines", "--device=cuda"), ("growth", "--steps=0")],
    ids=lambda options: " ".join(options),
)  # fmt: skip
def test_bad_options_are_one_line(options):
    if "--device=cuda" in options and torch.cuda.device_count() >= bench_engines.RANKS:
        pytest.skip("there are GPUs enough")
    done = bench(*options)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert options[1].split("=")[0] in done.stderr


def test_settings_of_the_model():
    assert bench_engines.model_of("yaml/b.yaml", ["model.depth=2"]).model_width == 128
    with pytest.raises(UserError, match="model"):
        bench_engines.model_of("yaml/b.yaml", ["training.batch_size=2"])


# --- Growth ---


def test_exponents():
    sizes = [64, 256, 1_024]
    assert bench_growth.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    # By hand: of the three logarithms to base 4, 0, 1 and 3 over 0, 1 and 2, the slope is 3 / 2.
    assert bench_growth.exponent([1, 4, 16], [1, 4, 64]) == pytest.approx(1.5)
    assert bench_growth.exponent([1, 10, 100], [5.0, 5.0, 5.0]) == pytest.approx(0.0)
    points = [{"size": size, "seconds": 0.1 * size**0.5, "flops": size**2} for size in sizes]
    assert bench_growth.exponents(points) == pytest.approx({"measured": 0.5, "expected": 2.0})
    with pytest.raises(ValueError, match="one size"):
        bench_growth.exponent([8, 8], [1.0, 2.0])


def test_axes_change_one_size():
    base = bench_growth.config_of("depth", bench_growth.BASE["depth"])
    for axis in bench_growth.AXES.values():
        if axis.key is None:
            continue
        configs = [bench_growth.config_of(axis.key, size) for size in axis.sizes("all")]
        assert base in configs, "the base model lies on every axis"
        flops = [transformer_flops(config).textbook for config in configs]
        assert flops == sorted(flops) and len(set(flops)) == len(flops)
        assert set(axis.sizes("few")) < set(axis.sizes("all"))


def test_growth_over_depth(tmp_path):
    file, picture = tmp_path / "g.json", tmp_path / "some" / "picture.png"
    options = ("--axes", "depth", "--steps", "1", "--device", "cpu")
    done = bench("growth", *options, "--picture", str(picture), "--json", str(file))
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    axis = figures["axes"]["depth"]
    assert [point["size"] for point in axis["points"]] == list(bench_growth.AXES["depth"].few)
    first, *_, last = axis["points"]
    flops = [bench_growth.counted(transformer_flops(bench_growth.config_of("depth", depth))) for depth in (2, 8)]
    assert [first["flops"], last["flops"]] == [bench_growth.IMAGES * count for count in flops]
    assert min(point["seconds"] for point in axis["points"]) > 0 and 0.8 < axis["expected"] < 1
    assert axis["measured"] == pytest.approx(bench_growth.exponents(axis["points"])["measured"])
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and "depth, blocks" in done.stdout


def test_the_picture_has_a_panel_for_each_axis(tmp_path):
    points = [{"size": size, "seconds": size / 100, "flops": size * 1e9} for size in (1, 2, 4)]
    axes = {name: {"points": points} | bench_growth.exponents(points) for name in bench_growth.AXES}
    path = bench_growth.draw(axes, tmp_path / "picture.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
