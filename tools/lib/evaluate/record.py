"""The JSON file of an evaluation: figures with everything that they depend on, and running it again to compare."""

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ibq import dist
from ibq.config import UserError
from ibq.evaluation.record import FORMAT, REMEDY, leaves, read_record, require_figures
from ibq.files import write_text
from ibq.progress import say
from ibq.training.provenance import git_state, version_of
from tools.lib import ROOT

HELP = "run an evaluation again from its JSON file: exit code 0 if all is the same, 1 if not, 2 for a bad file"
EPILOG = "With torchrun, several processes share the images; the figures are the same for every number of them."
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "lpips", "torch-fidelity", "pillow")
TOLERANCE = 1e-6


def start(command: str, argv: Sequence[str], device: torch.device) -> dict:
    """What every record begins with."""
    return {
        "format": FORMAT,
        "command": command,
        "arguments": list(argv),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": dist.world_size(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "git": git_state(ROOT),
    }


def write(path: Path, record: Mapping) -> None:
    """Write a record; figures that are not numbers become null, as JSON has no NaN."""
    try:
        write_text(path, json.dumps(_without_nan(record), indent=1, allow_nan=False))
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error}); the figures are those printed above") from error


def require_writable(option: str, path: Path) -> None:
    """UserError for a file that could not be written, before hours of work that it is for."""
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error}); give another file") from error


def read(path: Path) -> dict:
    """A record, checked; UserError for another file."""
    record = read_record(path)
    argv = record.get("arguments")
    if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
        raise UserError(f"{path}: `arguments` is not a list of words; {REMEDY}")
    if argv[0] != record["command"]:
        raise UserError(f"{path}: `arguments` do not begin with the command {record['command']!r}; {REMEDY}")
    require_figures(path, record)
    if not leaves(record["metrics"]):
        raise UserError(f"{path}: `metrics` are missing; {REMEDY}")
    for word in argv:
        if "pipe:" in word:
            raise UserError(
                f"{path}: would run a shell command ({word!r}); run that evaluation by hand if you trust it"
            )
    return record


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of `verify`."""
    parser.add_argument("file", type=Path, help="JSON file of an evaluation")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="largest relative difference (default: %(default)s)"
    )


def verify(arguments: argparse.Namespace, measure_again: Callable[[Sequence[str]], dict]) -> int:
    """Run a record's evaluation again and compare: 0 if all is the same, else 1."""
    if not 0 <= arguments.tolerance < math.inf:
        raise UserError(f"--tolerance: must be 0 or more, got {arguments.tolerance}")
    record = read(arguments.file)
    try:
        found = measure_again(record["arguments"])
    except SystemExit as error:  # argparse has said what is wrong
        raise UserError(
            f"{arguments.file}: its arguments are not those of tools/evaluate.py; write it again"
        ) from error
    problems = differences(record, found, arguments.tolerance)
    if dist.is_main():
        for line in notes(record, found):
            say(f"note: {line}")
        for line in problems:
            print(f"differs: {line}")
        count = len(leaves(record["metrics"]))
        print(
            f"{arguments.file}: {f'{len(problems)} differences' if problems else f'all {count} figures are the same'}"
        )
    dist.shutdown()
    return int(bool(problems))


def differences(record: Mapping, found: Mapping, tolerance: float) -> list[str]:
    """What is not the same in two records: inputs exactly, figures within the relative tolerance."""
    lines = []
    for part in ("inputs", "metrics"):
        before, now = (leaves(_without_nan(which[part])) for which in (record, found))
        for name in {**before, **now}:
            if name not in before or name not in now:
                lines.append(f"{name}: only {'now' if name in now else 'in the file'}")
            elif not _same(before[name], now[name], tolerance if part == "metrics" else 0.0):
                lines.append(f"{name}: {before[name]} in the file, {now[name]} now")
    return lines


def notes(record: Mapping, found: Mapping) -> list[str]:
    """What else has changed since: it may explain differences."""
    lines = []
    for part in ("versions", "git"):
        before, now = record.get(part), found[part]
        before = before if isinstance(before, dict) else {}
        lines += [
            f"{part}: {name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]
        ]
    lines += [
        f"{name} was {record.get(name)}, is {found[name]}"
        for name in ("device", "ranks", "threads")
        if record.get(name) != found[name]
    ]
    return lines


def _same(before: object, now: object, tolerance: float) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (before, now))
    if not numbers:
        return before == now
    return math.isclose(before, now, rel_tol=tolerance, abs_tol=tolerance * 1e-3)


def _without_nan(value):
    if isinstance(value, Mapping):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
