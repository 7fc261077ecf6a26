"""Measure a trained model, generated images, or again what was measured before.

python tools/evaluate.py reconstruction --tokenizer runs/tokenizer --images 'shards/val-*.tar' --json figures.json
python tools/evaluate.py generation --samples samples/samples.npz --reference reference.npz --json figures.json
python tools/evaluate.py verify figures.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ibq import dist
from ibq.config import exit_on_user_error
from ibq.training.run import set_up_torch
from tools import evaluate_generation, evaluate_reconstruction, evaluate_record
from tools.options import device_of

COMMANDS = {"reconstruction": evaluate_reconstruction, "generation": evaluate_generation}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, allow_abbrev=False, epilog=evaluate_record.EPILOG
        )
        module.add_options(command)
        command.add_argument("--json", type=Path, help="write the figures and what they depend on here")
    command = commands.add_parser("verify", help=evaluate_record.HELP, description=evaluate_record.HELP)
    evaluate_record.add_options(command)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(argv)
    for option in ("json", "npz"):
        if path := getattr(arguments, option, None):
            evaluate_record.require_writable(f"--{option}", path)
    set_up_torch(training=False)
    if arguments.command == "verify":
        return evaluate_record.verify(arguments, measure_again)
    record = measure(arguments, argv)
    if arguments.json and dist.is_main():
        evaluate_record.write(arguments.json, record)
    dist.shutdown()
    return 0


def measure(arguments: argparse.Namespace, argv: Sequence[str]) -> dict:
    """Run a command; the figures, and what they depend on."""
    device_of(arguments)  # names the option if the device is not there
    device = dist.setup(arguments.device)
    found = COMMANDS[arguments.command].run(arguments, device)
    return evaluate_record.start(arguments.command, argv, device) | found


def measure_again(argv: Sequence[str]) -> dict:
    """Run the command of a record, without writing its files."""
    arguments = parse(argv)
    arguments.json = None
    if arguments.command == "reconstruction":
        arguments.npz = None
    return measure(arguments, argv)


if __name__ == "__main__":
    exit_on_user_error(main)
