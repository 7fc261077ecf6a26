"""Options that several benches share."""

import argparse
import sys

import torch

from ibq.config import UserError
from tools.lib.options import check_least


def add_device(parser: argparse.ArgumentParser, default: str | None = None, gpus: int = 1) -> None:
    """Where to measure: on so many GPUs if they are there, unless there is a default."""
    found = "cuda" if torch.cuda.device_count() >= gpus else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default or found, help="(default: %(default)s)")


def check(arguments: argparse.Namespace, gpus: int = 1, **least: int) -> None:
    """UserError for options below their least values, and for a device that cannot be measured."""
    check_least(arguments, **least)
    found = torch.cuda.device_count()
    if arguments.device == "cuda" and found < gpus:
        raise UserError(f"--device: cuda needs GPUs, {gpus} in all, and {found} are there; use --device cpu")
    if arguments.device == "cpu" and not sys.platform.startswith("linux"):
        raise UserError("--device: the memory of a process is read from Linux's /proc; run this on Linux or on GPUs")
