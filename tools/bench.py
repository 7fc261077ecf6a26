"""Measure a part of the project against the machine's own limit and against plain forms, in one run.

python tools/bench.py loader --json loader.json
"""

import argparse
import importlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from ibq.config import exit_on_user_error
from ibq.files import write_text
from ibq.training.provenance import origin
from tools.lib.bench.record import file_of

# Each has the module tools/lib/bench/NAME.py, which is read only when it is asked for: most read PyTorch.
BENCHES = {
    "loader": "the data loader against processes that do nothing but decode, and against common pipelines",
    "quantizer": "index backpropagation without tables against the textbook form",
    "layer": "IBQ as a layer of a small autoencoder, beside the quantizer of vector-quantize-pytorch",
    "head-loss": "the head's cross-entropy without logits against the textbook form",
    "heads": "a training step with each head of the transformer, at 262,144 codes",
    "ar-step": "a training step of the transformer against a plain form and the machine's product rate",
    "order-step": "what random orders cost a training step of the transformer, in rounds beside raster order",
    "tokenizer-step": "a training step of the tokenizer's GAN against a plain form",
    "sample": "sampling against a textbook sampler and the memory's bandwidth",
    "tokenizer-memory": "activation memory of the tokenizer with and without recomputed ResBlocks",
    "engines": "a training step of the transformer under each engine on two processes: time, memory, communication",
    "growth": "how a training step grows over depth, width, tokens and codes, beside counted FLOPs",
    "start-up": "seconds from a command to its first training step, by part, and of every --help",
    "suite": "is this machine as fast as the project says? what matters most, within some minutes",
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
            command.add_argument("--json", type=Path, metavar="PLACE", help="write the figures to this file, or folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says, print a table, and write the figures."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    bench = bench_module(arguments.name)
    tqdm.monitor_interval = 0  # its thread would be a second one: see `run_apart`
    if arguments.json:
        arguments.json = file_of(arguments.json, arguments)
    figures = bench.measure(arguments)
    print(bench.table(figures))
    if arguments.json:
        where = origin(shlex.join(["python", "tools/bench.py", *argv])) | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_text(arguments.json, json.dumps({"origin": where, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)
