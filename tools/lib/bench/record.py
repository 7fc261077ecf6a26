"""Where a bench's figures come from, and where they are kept."""

import argparse
import os
import platform
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from ibq.training.provenance import git_state
from tools.lib import ROOT

# PyTorch is imported where it is needed: --help should not wait for it.


def origin(argv: Sequence[str]) -> dict:
    """What a file of figures says of where they come from: command, code, versions and machine."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "command": shlex.join(["python", "tools/bench.py", *argv]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **git_state(ROOT),
        "torch": torch.__version__,
        "cpu": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def file_of(place: Path, arguments: argparse.Namespace) -> Path:
    """The JSON file of a bench with these options: `place`, or in a folder one named BENCH_MODEL_HARDWARE_YYYYMM.json.

    The model is the config's, or the number of codes, with the precision where there is a choice; or it is left out.
    """
    if not place.is_dir():
        return place
    if hasattr(arguments, "config"):
        model = Path(arguments.config).stem
    else:
        model = f"{arguments.codes}-codes" if hasattr(arguments, "codes") else ""
    model += f"-{arguments.precision}" if hasattr(arguments, "precision") else ""
    words = [arguments.name, model, _hardware(getattr(arguments, "device", "cpu")), time.strftime("%Y%m")]
    return place / f"{'_'.join(word.replace('_', '-') for word in words if word)}.json"


def _hardware(device: str) -> str:
    """Such as nvidia-h100-80gb-hbm3, or cpu-2-cores."""
    if device == "cpu":
        return f"cpu-{os.cpu_count()}-cores"
    import torch

    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
