"""How long commands take to start: what a run says of it, the bench, and what `--help` does not import."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, needs
from support.processes import run_script
from support.training import make_workplace, train_here

from ibq.training import startup
from ibq.training.run import RUN_FILES
from tools.lib.bench import start_up as bench_start_up


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("startup"))


def check(folder: Path, said: str) -> dict:
    """The parts make up the total, and the line says the same as the file."""
    found = json.loads((folder / startup.FILE).read_text())
    assert found["seconds"] == pytest.approx(sum(found["parts"].values()), abs=1e-3)
    assert set(found["parts"]) <= set(startup.PARTS) and found["ranks"] == 1
    assert min(found["parts"].values()) > 0
    (line,) = re.findall(r"start-up: .*", said)
    total, parts = re.fullmatch(r"start-up: ([\d.]+) s to the first step: (.*)", line).groups()
    shown = {name: float(seconds) for name, seconds in (part.rsplit(" ", 1) for part in parts.split(", "))}
    assert float(total) == pytest.approx(found["seconds"], abs=0.051)
    assert shown == {name: round(seconds, 1) for name, seconds in found["parts"].items() if seconds >= 0.05}
    return found


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_run_says_what_its_start_took(stage, workplace, tmp_path, capfd):
    settings = ["--config", str(workplace / f"{stage}.yaml"), f"output={tmp_path / 'run'}"]
    assert train_here(stage, [*settings, "training.max_steps=2"]) == 0
    first = check(tmp_path / "run", capfd.readouterr().err)
    assert {"imports", "engine", "model", "first batch", "first step"} <= set(first["parts"])
    assert train_here(stage, settings) == 0
    resumed = check(tmp_path / "run", capfd.readouterr().err)
    assert "checkpoint" in resumed["parts"] and resumed != first
    # Nothing is left to do: there is no first step, and what was known stays.
    assert train_here(stage, settings) == 0
    assert "start-up" not in capfd.readouterr().err
    assert json.loads((tmp_path / "run" / startup.FILE).read_text()) == resumed


def test_fresh_removes_it():
    assert startup.FILE in RUN_FILES


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    startup.StartUp().finish(tmp_path / "file")  # no folder
    assert "start-up: " in capfd.readouterr().err


def test_parts_inside_parts_count_once(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr(startup.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(startup, "process_seconds", lambda: 5.0)
    start = startup.StartUp()
    with start.part("engine"), start.part("model"):
        pass
    assert {name: seconds for name, seconds in start.seconds.items() if seconds} == {
        "imports": 5.0, "set-up": 1.0, "engine": 2.0 + 8.0, "model": 4.0,
    }  # fmt: skip


def test_without_proc_the_module_s_import_is_the_beginning(monkeypatch):
    monkeypatch.setattr(startup.Path, "read_text", lambda _: "")
    monkeypatch.setattr(startup.time, "perf_counter", lambda: startup._imported + 2.5)
    assert startup.process_seconds() == pytest.approx(2.5)


# --- The bench, and what `--help` imports ---

HEAVY = ("scipy", "matplotlib", "deepspeed", "lpips", "torchvision", "tensorboard", "gradio", "webdataset", "triton",
         "torch._dynamo", "submitit", "huggingface_hub")  # fmt: skip
# What these print needs nothing of PyTorch, nor what they do before they start another process.
WITHOUT_TORCH = {
    *(
        "launchers/slurm.py",
        "launchers/job.py",
        "launchers/lib/preflight.py",
        "launchers/lib/snapshot.py",
        "launchers/sweep.py",
    ),
    *(
        "tools/bench.py",
        "tools/bench.py start-up",
        "tools/demo.py",
        "tools/fit_scaling.py",
        "tools/make_shards.py",
        "tools/published.py",
    ),
    *("tools/lib/quickstart/recipe.py",),
}


def test_every_command_is_known():
    found = bench_start_up.help_commands()
    assert set(found) >= WITHOUT_TORCH | {"ibq/train_ar.py", "tools/convert.py hub", "tools/evaluate.py verify"}
    assert "launchers/sweep.py" in found and "tools/lib/bench/process.py" not in found


# Runs a command, and says last which modules are there then.
TELLS_MODULES = """
import json, pathlib, runpy, sys
del sys.argv[0]
sys.path[0] = str(pathlib.Path(sys.argv[0]).resolve().parent)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(json.dumps([*sys.modules]), file=sys.stderr)
"""


@pytest.mark.parametrize("command", bench_start_up.help_commands())
def test_help_does_not_wait_for_heavy_modules(command):
    """From a process that has nothing but PyTorch, and what that imports, or has not even that."""
    light = command in WITHOUT_TORCH
    done = run_script("-c", TELLS_MODULES, *command.split(), "--help", imported=["torch"], fresh=light, PYTHONPATH="")
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-2000:]
    modules = set(json.loads(done.stderr.splitlines()[-1]))
    assert "argparse" in modules
    assert not modules & {*HEAVY, *(["torch"] if light else [])}


@pytest.mark.needs(*needs.NVME)
def test_the_bench_in_small(tmp_path):
    small = [f"model.{size}" for size in ("depth=2", "heads=2", "width=32", "vocab_size=64", "num_classes=12")]
    options = ["--folder", str(tmp_path / "run"), "--repeats", "1", "--commands", "tools/bench.py", "--set", *small]
    done = subprocess.run(
        [sys.executable, "tools/bench.py", "start-up", *options, "--json", str(tmp_path / "s.json")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "s.json").read_text())
    for run in figures["runs"].values():
        assert run["seconds"] == pytest.approx(sum(run["parts"].values()), abs=0.01)
    assert set(figures["runs"]) == {"quickstart", "xxl"} and figures["runs"]["xxl"]["parts"]["launcher"] > 0
    assert figures["help"].keys() == {"tools/bench.py"} and not (tmp_path / "run").exists()
    assert "quickstart: " in done.stdout and "tools/bench.py" in done.stdout


def test_without_the_emoji_there_are_pictures_of_noise(tmp_path):
    bench_start_up._write_pictures(tmp_path)
    assert len(list(tmp_path.glob("class?/*.png"))) == 64
