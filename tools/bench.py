"""Measure a part of the project against the machine's own limit and against plain forms, in one run.

python tools/bench.py loader --json loader.json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ibq.config import exit_on_user_error
from ibq.files import write_text
from tools import (
    bench_ar_step,
    bench_head_loss,
    bench_loader,
    bench_quantizer,
    bench_sample,
    bench_tokenizer_memory,
    bench_xxl_step,
)

BENCHES = {
    "loader": bench_loader,
    "quantizer": bench_quantizer,
    "head-loss": bench_head_loss,
    "ar-step": bench_ar_step,
    "sample": bench_sample,
    "tokenizer-memory": bench_tokenizer_memory,
    "xxl-step": bench_xxl_step,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, bench in BENCHES.items():
        summary = bench.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        bench.add_options(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says, print a table, and write the figures."""
    arguments = parse(argv)
    bench = BENCHES[arguments.name]
    figures = bench.measure(arguments)
    print(bench.table(figures))
    if arguments.json:
        write_text(arguments.json, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)
