"""Measure a trained model, generated images, or again what was measured before.

python tools/evaluate.py reconstruction --tokenizer runs/tokenizer --images 'shards/val-*.tar' --json figures.json
python tools/evaluate.py generation --samples samples/samples.npz --reference reference.npz --json figures.json
python tools/evaluate.py verify figures.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ibq import dist
from ibq.config import exit_on_user_error
from ibq.training.run import set_up_torch
from tools.lib.evaluate import generation, reconstruction
from tools.lib.evaluate import record as records
from tools.lib.options import device_of

COMMANDS = {"reconstruction": reconstruction, "generation": generation}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, allow_abbrev=False, epilog=records.EPILOG
        )
        module.add_options(command)
        command.add_argument("--json", type=Path, help="write the figures and what they depend on here")
    command = commands.add_parser("verify", help=records.HELP, description=records.HELP)
    records.add_options(command)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(argv)
    written = ("json", "npz", "samples") if arguments.command == "reconstruction" else ("json",)
    for option in written:
        if path := getattr(arguments, option, None):
            records.require_writable(f"--{option}", path)
    set_up_torch(training=False)
    if arguments.command == "verify":
        return records.verify(arguments, measure_again)
    record = measure(arguments, argv)
    if arguments.json and dist.is_main():
        records.write(arguments.json, record)
    dist.shutdown()
    return 0


def measure(arguments: argparse.Namespace, argv: Sequence[str]) -> dict:
    """Run a command; the figures, and what they depend on."""
    device_of(arguments)  # names the option if the device is not there
    device = dist.setup(arguments.device)
    found = COMMANDS[arguments.command].run(arguments, device)
    return records.start(arguments.command, argv, device) | found


def measure_again(argv: Sequence[str]) -> dict:
    """Run the command of a record, without writing its files."""
    arguments = parse(argv)
    arguments.json = None
    if arguments.command == "reconstruction":
        arguments.npz = arguments.samples = None
    return measure(arguments, argv)


if __name__ == "__main__":
    exit_on_user_error(main)
