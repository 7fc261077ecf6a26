"""Seconds from a command to its first training step, by part, and seconds until every command answers `--help`.

In fresh processes: the first training of tools/quickstart.sh, and the 2.06B transformer under ZeRO-3 with its optimizer
on disk, which needs 25 GiB there, 21 GiB of memory and minutes on 2 cores; it is ended after its first step.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ibq.config import UserError
from ibq.progress import progress_bar, say
from tools.lib import ROOT
from tools.lib.options import check_least

STARTUP_FILE, ROWS = "startup.json", 64
RUNS = ("quickstart", "xxl")
# What comes after the name of a command that has commands of its own.
SUBCOMMANDS = {
    "tools/convert.py": ("export", "import", "hub"),
    "tools/evaluate.py": ("reconstruction", "generation", "verify"),
}
SLOWEST = 5  # that the table names
MAIN, PARSES = re.compile(r"^if __name__ ==", re.M), re.compile(r"parse_args|Command\.begin|parse_job|def parse\b")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--runs", nargs="*", choices=RUNS, default=[*RUNS], help="(default: both)")
    add("--config", default="yaml/xxl.yaml", help="the large transformer (default: %(default)s)")
    add("--set", nargs="*", default=[], metavar="key=value", dest="overrides", help="settings over that file's")
    add("--folder", type=Path, default=Path("runs/bench-startup"), help="for its files (default: %(default)s)")
    add("--repeats", type=int, default=3, help="of the quickstart's run and of --help (default: %(default)s)")
    add("--commands", nargs="*", metavar="COMMAND", help="only these answer --help (default: all; none: leave it out)")


def measure(arguments: argparse.Namespace) -> dict:
    """Everything, one process after the other."""
    check_least(arguments, repeats=1)
    found: dict = {"runs": {}}
    if "quickstart" in arguments.runs:
        found["runs"]["quickstart"] = quickstart_start(arguments.repeats)
    if "xxl" in arguments.runs:
        found["runs"]["xxl"] = large_start(arguments.folder, arguments.config, arguments.overrides)
    commands = help_commands() if arguments.commands is None else arguments.commands
    found["help"] = {}
    with progress_bar("--help", len(commands), "command", disable=not commands) as progress:
        for command in commands:
            found["help"][command] = help_seconds(command, arguments.repeats)
            progress.update()
    return found


def table(figures: dict) -> str:
    """The figures for people."""
    lines = []
    for name, start in figures["runs"].items():
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in start["parts"].items() if seconds >= 0.05)
        lines.append(f"{name}: {start['seconds']:.1f} s to the first step: {parts}")
    slowest = sorted(figures["help"].items(), key=lambda item: -item[1])
    if slowest:
        lines.append(f"--help of {len(slowest)} commands: {statistics.median(figures['help'].values()):.2f} s (median)")
        lines += [f"  {seconds:.2f} s  {command}" for command, seconds in slowest[:SLOWEST]]
    return "\n".join(lines)


# --- Runs ---


def quickstart_start(repeats: int) -> dict:
    """The first training of tools/quickstart.sh, of one step: the run of the median time."""
    # It reads much of the project, which the other runs do not need.
    from tools.lib.quickstart import recipe as quickstart

    starts = []
    with tempfile.TemporaryDirectory(prefix="ibq-startup-") as folder:
        place = quickstart.Place(train=quickstart.EMOJI[0], validation=quickstart.EMOJI[1])
        if not list(ROOT.glob(place.train)):
            _write_pictures(Path(folder) / "pictures")
            place = quickstart.Place(train=str(Path(folder) / "pictures"), validation=None)
        for number in range(repeats):
            output = Path(folder) / str(number)
            settings = quickstart.tokenizer_settings(place.overrides(), output, steps=1)
            settings += ["training.batch_size=16", "training.micro_batch=16"]  # k-means wants a token for each code
            script, config = quickstart.STAGES["tokenizer"]
            starts.append(_start([sys.executable, script, "--config", config, *settings], output))
    return sorted(starts, key=lambda start: start["seconds"])[len(starts) // 2]


def large_start(folder: Path, config: str, overrides: Sequence[str]) -> dict:
    """The large transformer on codes drawn at random, by the deepspeed launcher."""
    from tools.lib.bench import xxl_step as bench_xxl_step  # it reads PyTorch, which `--help` does not need

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        _write_codes(folder / "codes", config, [change for change in overrides if change.startswith("model.")])
        # Of two steps, for the last would write a checkpoint: the run is ended after the first.
        command = bench_xxl_step.training_command(folder, config, batch=2, last=2, overrides=overrides)
        return _start(command, folder / "run")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(command: Sequence[str], output: Path) -> dict:
    """Run a training command until it has done its first step; what it says, and the launcher's time before it."""
    say(f"$ {' '.join(command)}")
    began = time.time()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            while not (found := _read(output / STARTUP_FILE)) and process.poll() is None:
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the launcher and its ranks: what is left of the run is no use
            process.wait()
        if not (found := found or _read(output / STARTUP_FILE)):
            log.seek(0)
            raise UserError(f"{command[1]} ended with exit code {process.returncode}: {log.read()[-2000:]}")
    launcher = max(found["started"] - began, 0.0)
    return {"seconds": found["seconds"] + launcher, "parts": {"launcher": launcher} | found["parts"]}


def _read(file: Path) -> dict | None:
    return json.loads(file.read_text()) if file.exists() else None


def _write_pictures(folder: Path) -> None:
    """A folder of two classes with a few pictures of noise, for where the project's own are not at hand."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(64):
        file = folder / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)


def _write_codes(folder: Path, config: str, sizes: Sequence[str]) -> None:
    from ibq.config import load_section
    from ibq.data.codes import CodesMeta, write_codes
    from ibq.models.transformer import TransformerConfig

    model = load_section(TransformerConfig, config, "model", [size.removeprefix("model.") for size in sizes])
    rng = np.random.default_rng(0)
    codes = rng.integers(0, model.vocab_size, (ROWS, model.num_tokens))
    names = [str(number) for number in range(model.num_classes)]
    meta = CodesMeta(num_codes=model.vocab_size, grid=model.code_grids[0], classes=names, tokenizer="random")
    write_codes(folder, codes, rng.integers(0, model.num_classes, ROWS), meta)


# --- Help ---


def help_commands() -> list[str]:
    """Every command of the project that answers `--help`."""
    from tools.bench import BENCHES

    found = []
    for file in sorted(path for part in ("ibq", "launchers", "tools") for path in (ROOT / part).rglob("*.py")):
        text = file.read_text("utf-8")
        if MAIN.search(text) and PARSES.search(text):
            script = file.relative_to(ROOT).as_posix()
            names = tuple(BENCHES) if script == "tools/bench.py" else SUBCOMMANDS.get(script, ())
            found += [script, *(f"{script} {name}" for name in names)]
    return found


def help_seconds(command: str, repeats: int) -> float:
    """Median wall-clock seconds until a command has answered `--help`."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *command.split(), "--help"], cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - began)
        if done.returncode or "usage:" not in done.stdout:
            raise UserError(f"{command} --help ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return statistics.median(seconds)
