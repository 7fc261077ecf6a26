"""Is this machine as fast as the project says? The checks and benches that matter most, within some minutes.

Each runs as a command of its own, in order of importance; one that no longer fits into the time is named, and one that
takes longer than what is left is stopped. It needs this checkout and the packages that are there, and no network.
"""

import argparse
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ibq.progress import progress_bar
from ibq.training.provenance import version_of
from tools.lib import ROOT
from tools.lib.bench.options import add_device, check

PATIENCE_S = 15  # from TERM to KILL: torchrun ends its ranks meanwhile
TESTS = "-m pytest -q -x -p no:cacheprovider -m cuda tests/gpu tests/unit"


@dataclass(frozen=True)
class Stage:
    """One command, which is not started with less time than it needs at least."""

    name: str
    words: str  # after tools/bench.py, or for Python if they begin with -m
    least_s: float
    most_s: float = float("inf")


STAGES = {
    "cuda": (
        Stage("tests on this GPU", TESTS, 20, 120),
        Stage("sampling, B", "sample --config yaml/b.yaml --rows 32,256 --tokens 8 --rounds 1", 30),
        Stage("training, B", "ar-step --config yaml/b.yaml --batch 64", 30),
        Stage("training, XXL", "ar-step --config yaml/xxl.yaml --batch 16", 60),
        Stage("training, tokenizer", "tokenizer-step --config yaml/tokenizer_262144.yaml --batch 8", 40),
        Stage("engines, B", "engines --config yaml/b.yaml --set --ranks 1 --batch 32 --steps 2 --device cuda", 60),
        Stage("sampling, XXL", "sample --config yaml/xxl.yaml --rows 64 --tokens 8 --rounds 1", 60),
        Stage(
            "sampling with pixels, B",
            "sample --config yaml/b.yaml --rows 256 --tokens 2 --rounds 1 --pixels yaml/tokenizer_16384.yaml",
            40,
        ),
    ),
    "cpu": (
        Stage("sampling, B", "sample --config yaml/b.yaml --rows 4 --tokens 8 --rounds 1 --device cpu", 45),
        Stage("training, B", "ar-step --config yaml/b.yaml --batch 4 --device cpu", 60),
        Stage("engines", "engines --device cpu", 90),
        Stage("training, tokenizer", "tokenizer-step --config yaml/tokenizer_16384.yaml --batch 1 --device cpu", 60),
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    parser.add_argument("--minutes", type=float, default=8, help="for all of it (default: %(default)s)")
    add_device(parser)


def measure(arguments: argparse.Namespace) -> dict:
    """All stages that fit into the time."""
    check(arguments, minutes=0)
    return {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU",
        "versions": versions(),
        "minutes": arguments.minutes,
        "stages": run_stages(STAGES[arguments.device], 60 * arguments.minutes),
    }


def versions() -> dict[str, str | None]:
    """Of what the figures depend on."""
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)*", driver.read_text()) if driver.exists() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version_of(name) for name in ("triton", "deepspeed")},
        "driver": found and found[0],
    }


def run_stages(stages: Sequence[Stage], seconds: float) -> dict[str, dict]:
    """What came of each stage: its command, seconds, and figures or the problem."""
    deadline, found = time.monotonic() + seconds, {}
    with tempfile.TemporaryDirectory() as folder, progress_bar("suite", len(stages), "stage") as progress:
        for number, stage in enumerate(stages):
            left = min(deadline - time.monotonic(), stage.most_s)
            if left < stage.least_s:
                found[stage.name] = {"command": stage.words, "problem": "no time was left"}
            else:
                found[stage.name] = _run(stage, left, Path(folder, f"{number}.json"))
            progress.update()
    return found


def _run(stage: Stage, seconds: float, file: Path) -> dict:
    words, tested = shlex.split(stage.words), stage.words.startswith("-m ")
    command = [sys.executable, *(words if tested else ["tools/bench.py", *words, "--json", str(file)])]
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    problem = None
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        said = _stop(process)
        problem = f"stopped after {seconds:.0f} s"
    except BaseException:  # Ctrl-C
        _stop(process)
        raise
    lines = [line for line in said.splitlines() if line.strip()]
    if problem is None and process.returncode != 0:
        problem = (lines or ["nothing was said"])[-1][-300:]
    result = {"command": stage.words, "seconds": round(time.monotonic() - start, 1)}
    if problem is not None:
        return result | {"problem": problem}
    return result | ({"said": lines[-1]} if tested else {"figures": json.loads(file.read_text())})


def _stop(process: subprocess.Popen) -> str:
    """End a stage, and by its own means what it has started; what it said."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.communicate(timeout=PATIENCE_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


# --- The table ---


def table(figures: dict) -> str:
    """The figures for people."""
    known = ", ".join(f"{name} {version}" for name, version in figures["versions"].items() if version)
    lines = [f"{figures['device']}: {known}"]
    for name, stage in figures["stages"].items():
        if "problem" in stage:
            lines.append(f"{name:24s} {stage['problem']}")
        elif "said" in stage:
            lines.append(f"{name:24s} {stage['said'].strip('= ')}")
        else:
            headline: Callable[[Mapping], list[str]] = HEADLINES[stage["command"].split()[0]]
            for line in headline(stage["figures"]):
                lines.append(f"{name:24s} {line}")
    return "\n".join(lines)


def _sample(figures: Mapping) -> list[str]:
    lines = []
    for rows, found in figures["rows"].items():
        line = f"{rows} images: {found['images_per_second']['bf16']:.1f} images/s, "
        line += (
            f"{found['ms_a_step']['bf16']:.2f} ms a step, {found['share_of_roofline']['bf16']:.0%} of the roofline, "
        )
        line += f"{found['ratio']['speedup']:.1f} x the textbook form"
        if "with_pixels" in found:
            line += f"; with pixels {found['with_pixels']['ratio']:.2f} of that"
        lines.append(line)
    return lines


def _step(figures: Mapping) -> list[str]:
    ours = figures["ours"]
    rate, share = ("tokens", "mfu") if "tokens_per_second" in ours else ("images", "of_limit")
    return [
        f"{ours[f'{rate}_per_second']:,.1f} {rate}/s, {ours[share]:.0%} of the products' limit, "
        f"{ours['peak_gib']:.1f} GiB, {figures['ratio']['speedup']:.2f} x the plain form"
    ]


def _engines(figures: Mapping) -> list[str]:
    return [
        f"{name}: {own['seconds']:.3f} s a step, {own['peak_gib']:.1f} GiB; {figures['ratio'][name]['seconds']:.2f} of "
        f"DDP's time, {figures['ratio'][name]['memory']:.2f} of its memory"
        for name, own in figures["engines"].items()
    ]


HEADLINES = {"sample": _sample, "ar-step": _step, "tokenizer-step": _step, "engines": _engines}
