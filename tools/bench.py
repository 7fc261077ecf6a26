"""Measure a part of the project against the machine's own limit and against plain forms, in one run.

python tools/bench.py loader --json loader.json
"""

import argparse
import importlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ibq.config import exit_on_user_error
from ibq.files import write_text
from ibq.training.provenance import git_state
from tools.lib import ROOT

# Each has the module tools/lib/bench/NAME.py, which is read only when it is asked for: most read PyTorch.
BENCHES = {
    "loader": "the data loader against processes that do nothing but decode, and against common pipelines",
    "quantizer": "index backpropagation without tables against the textbook form",
    "head-loss": "the head's cross-entropy without logits against the textbook form",
    "ar-step": "a training step of the transformer against a plain form and the machine's product rate",
    "tokenizer-step": "a training step of the tokenizer's GAN against a plain form",
    "sample": "sampling against a textbook sampler and the memory's bandwidth",
    "tokenizer-memory": "activation memory of the tokenizer with and without recomputed ResBlocks",
    "engines": "a training step of the transformer under each engine on two processes: time, memory, communication",
    "growth": "how a training step grows over depth, width, tokens and codes, beside counted FLOPs",
    "start-up": "seconds from a command to its first training step, by part, and of every --help",
    "xxl-step": "true steps of the 2.06B transformer with its optimizer on disk",
}


def bench_module(name: str) -> ModuleType:
    """The module of a bench."""
    return importlib.import_module(f"tools.lib.bench.{name.replace('-', '_')}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, summary in BENCHES.items():
        command = commands.add_parser(name, help=summary)
        if name in argv:
            bench = bench_module(name)
            command.description = bench.__doc__
            bench.add_options(command)
            command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser.parse_args(argv)


def origin(argv: Sequence[str]) -> dict[str, Any]:
    """What a file of figures says of where they come from: command, code, versions and machine."""
    import torch  # most benches have read it; --help should not wait for it

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


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says, print a table, and write the figures."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    bench = bench_module(arguments.name)
    figures = bench.measure(arguments)
    print(bench.table(figures))
    if arguments.json:
        write_text(arguments.json, json.dumps({"origin": origin(argv), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)
