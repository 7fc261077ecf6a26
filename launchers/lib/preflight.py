"""Check the nodes of a job before it starts: all-reduce over all ranks, a shared folder, equal clocks.

srun python launchers/lib/preflight.py --folder runs/ar_xxl
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a failure is one line, without torch's stacks

from ibq.config import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> int:
    """Check as the command line says; 1 if a node is at fault, which is named on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="folder that all nodes must see and be able to write to")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    add("--wait-s", type=float, default=120.0, metavar="S", help="for the slowest rank (default: %(default)s)")
    add("--hosts", default="", metavar="A,B,...", help="the host of each rank, to name one that never speaks")
    arguments = parser.parse_args(argv)
    from ibq.engine.preflight import PreflightConfig, preflight  # reads PyTorch, for which --help should not wait

    config = PreflightConfig(folder=arguments.folder, device=arguments.device, wait_s=arguments.wait_s)
    report = preflight(config, arguments.hosts.split(",") if arguments.hosts else ())
    if int(os.environ.get("RANK", "0")) == 0 or (report.problems and not report.hosts):
        print(report, file=sys.stderr if report.problems else sys.stdout, flush=True)
    return 1 if report.problems else 0


if __name__ == "__main__":
    exit_on_user_error(main)
