"""Train several variants of a model and compare them: a table, curves and pictures on one page.

python launchers/sweep.py --config yaml/ablations/quantizers.yaml
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ibq.config import exit_on_user_error
from ibq.extras import need
from tools.lib.options import check_least

HELP = """\
The sweep file names what all runs share and what makes each different:

  name: learning_rate
  script: ibq/train_tokenizer.py
  base: yaml/ablations/tokenizer.yaml      # the config of every run
  overrides: [training.max_steps=600]     # common settings over it
  runs:                                   # either each run with its own settings ...
    low: [optimizer.learning_rate=1e-4]
    high: [optimizer.learning_rate=1e-3]
  grid:                                   # ... or every combination of values
    optimizer.learning_rate: [1e-4, 1e-3]
  seeds: [0, 1, 2]                        # each run with each of them; tables show means and 95% intervals
  output: runs/learning_rate

In place of `runs` or `grid`, `scaling` names depths and token budgets of transformers of width 64 x depth, with the
rules for batch and learning rate: see yaml/scaling/sweep.yaml, and tools/fit_scaling.py for what is done with it.

Every run is one of the project's own commands, which is printed, in OUTPUT/RUN; what it says goes to
OUTPUT/RUN/sweep.log. Interrupted (Ctrl-C, SIGTERM) or killed, the same command goes on where it was. Runs that
are finished are not run again. The results: OUTPUT/report.html, results.md, results.csv, results.json, pictures.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the sweep file; see launchers/README.md and yaml/ablations")
    add(
        "--max-parallel",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time, which share the cores and slow "
        "each other down: times are compared among sweeps with the same N (default: 1)",
    )
    add("--retries", type=int, default=1, metavar="N", help="how often a run that fails is tried again (default: 1)")
    add("--only", action="append", metavar="RUN", help="run only this one (may be repeated); results show all")
    where = "slurm: an array of jobs, --max-parallel at a time; local: processes of this machine (default)"
    add("--executor", choices=["local", "slurm"], default="local", help=where)
    add("--element", help=argparse.SUPPRESS)  # in a job of the array: the number of the run
    add("--fresh", action="store_true", help="train all runs, or those of --only, again from the start")
    add("--collect", action="store_true", help="run nothing, only write the results of what is done")
    add("overrides", nargs="*", metavar="key=value", help="settings over the sweep file's, such as output=runs/other")
    arguments = parser.parse_intermixed_args(argv)
    check_least(arguments, max_parallel=1, retries=0)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep as the command line says; the exit code."""
    arguments = parse(argv)
    need("matplotlib")  # for the page, when all is trained
    from launchers.lib.sweep.run import run_sweep  # reads PyTorch, for which --help should not wait

    return run_sweep(arguments)


if __name__ == "__main__":
    exit_on_user_error(main)
