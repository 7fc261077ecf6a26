"""Check a job and submit one of slurm/*.sh, with a copy of the code that later edits do not reach.

bash slurm/ar_2b.sh training.epochs=100                # calls this; sbatch's options by its variables:
SBATCH_PARTITION=gpu SBATCH_ACCOUNT=me bash slurm/ar_2b.sh
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from ibq.config import UserError, exit_on_user_error
from launchers.job import usable_nodes
from launchers.lib.run_config import is_training_script, load_run
from launchers.lib.snapshot import take_snapshot


def check_sbatch(script: str, arguments: Sequence[str], options: Sequence[str] = ()) -> None:
    """UserError with Slurm's own words unless it would take the script: partition, account, nodes, limits."""
    try:
        done = subprocess.run(
            ["sbatch", "--test-only", *options, script, *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise UserError("sbatch: there is no Slurm on this machine; torchrun starts a run without it") from error
    if done.returncode:
        said = [line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip()]
        remedy = f"mend the #SBATCH lines of {script}, or set SBATCH_PARTITION, SBATCH_ACCOUNT, ... (see sinfo)"
        raise UserError(f"{script}: Slurm would not take it: {said[0] if said else 'no reason given'}; {remedy}")


def check_batch(run: Any, script: str) -> None:
    """UserError unless the run's global batch divides over some number of the nodes that the script asks for."""
    text = Path(script).read_text()
    asked = dict(re.findall(r"^#SBATCH --(nodes|gpus-per-node)=(\S+)", text, flags=re.M))
    asked["gpus-per-node"] = os.environ.get("SBATCH_GPUS_PER_NODE") or asked.get("gpus-per-node", "1")
    most, gpus = asked.get("nodes", "1").rpartition("-")[2], asked["gpus-per-node"].rpartition(":")[2]
    if most.isdecimal() and gpus.isdecimal():  # Slurm itself judges whatever else is written there
        usable_nodes(run, int(most), max(int(gpus), 1))


def check_signal(run: Any, script: str) -> None:
    """UserError where the script asks Slurm for a warning by another signal than that at which the ranks save."""
    asked = re.search(r"^#SBATCH --signal=(?:[BR]+:)?(?:SIG)?(\w+)", Path(script).read_text(), flags=re.M)
    if asked and asked[1] != run.checkpoint.signal:
        raise UserError(
            f"{script}: --signal={asked[1]} would end the ranks, which save at {run.checkpoint.signal}; change that "
            f"line, or set checkpoint.signal={asked[1]}"
        )


def submit(script: str, arguments: Sequence[str], options: Sequence[str] = ()) -> str:
    """Submit a script with a copy of the code; the job's number."""
    code = take_snapshot()
    command = ["sbatch", "--parsable", f"--export=ALL,IBQ_CODE={code}", *options, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{script}: not submitted: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Submit as the command line says: SCRIPT ARGUMENTS -- the command that the job will run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--" not in argv[1:-1]:
        raise UserError("no command is given; start it by bash slurm/ar_b.sh")
    split = len(argv) - 1 - argv[::-1].index("--")
    (script, *arguments), (program, *options) = argv[:split], argv[split + 1 :]
    if is_training_script(program):
        run = load_run(program, options)
        check_batch(run, script)
        check_signal(run, script)
    check_sbatch(script, arguments)
    print(f"submitted as job {submit(script, arguments)}; its log: slurm/logs/")


if __name__ == "__main__":
    exit_on_user_error(main)
