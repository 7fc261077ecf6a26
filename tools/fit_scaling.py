"""Fit scaling laws to the runs of a sweep: how the loss falls with size and tokens, and what a larger run would give.

python tools/fit_scaling.py runs/scaling/sweep
"""

import argparse
import csv
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from ibq.config import UserError, exit_on_user_error
from ibq.extras import need
from ibq.files import write_text
from ibq.progress import progress_bar
from ibq.scaling.law_fit import Runs, Settings, analyse, fits_to_do
from ibq.scaling.law_support import findings
from tools.lib.scaling.report import as_json, as_text

EPILOG = """\
RUNS is the folder of a sweep (yaml/scaling/sweep.yaml, run by launchers/sweep.py, which writes results.json), or a
CSV or JSON file with one row a run and these columns:

  run          a name
  parameters   N
  tokens       D, that the training has seen
  nll          the loss in nats a token; another column with --loss
  flops        of the training; may be missing, then the frontier assumes 6 N D
  held_out     1: not fitted, but predicted; may be missing

Fitted are L(N, D) = E + A / N^alpha + B / D^beta to all runs that are not held out, and L(N) = E + A / N^alpha at every
token budget with four or more sizes: Huber loss of log L, L-BFGS from many starts (Hoffmann et al. 2022, third
approach, as Besiroglu et al. 2024 mended it). Intervals come from fits to resampled runs. A run that is held out is
predicted and compared with what it gave; where none is marked, that is the run with the most FLOPs (--held-out).

Written to OUTPUT: fit.json (everything), size.png, tokens.png, flops.png, residuals.png. Where the runs do not support
a fit, a section WARNING and "supported": false say why; the exit code is 0 all the same, and 2 for unusable input.

examples:
  python tools/fit_scaling.py runs/scaling/sweep
  python tools/fit_scaling.py runs/scaling/sweep --size non_embedding_parameters --held-out d6-512k --output fit
  python tools/fit_scaling.py published_runs.csv --loss loss --held-out none --resamples 2000
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; UserError for impossible numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", metavar="RUNS", type=Path, help="a sweep's folder, or a CSV or JSON file")
    add("--output", metavar="FOLDER", type=Path, help="for the JSON and the plots (default: the folder `fit` in RUNS)")
    add("--loss", metavar="COLUMN", default="nll", help="such as nll, best_nll, train_loss (default: %(default)s)")
    add("--size", metavar="COLUMN", default="parameters", help="or non_embedding_parameters (default: %(default)s)")
    add(
        "--held-out", metavar="RUN", action="append", help="predict this run instead of fitting it (may be repeated), "
        "or none; default: those marked held_out, or else the run with the most FLOPs",
    )  # fmt: skip
    add("--resamples", metavar="N", type=int, default=500, help="fits to resampled runs (default: %(default)s)")
    add("--level", metavar="X", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    add("--delta", metavar="X", type=float, default=1e-3, help="of the Huber loss of log L (default: %(default)s)")
    add("--seed", metavar="N", type=int, default=0, help="of the resampling (default: %(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.resamples < 20:
        raise UserError(f"--resamples: {arguments.resamples} give no intervals; take at least 20, better 500")
    if not 0 < arguments.level < 1:
        raise UserError(f"--level: {arguments.level} is no probability; give a number in (0, 1), such as 0.95")
    if not 0 < arguments.delta < math.inf:
        raise UserError(f"--delta: {arguments.delta} is not positive; give a small number, such as 1e-3")
    if arguments.seed < 0:
        raise UserError(f"--seed: must not be negative, got {arguments.seed}")
    return arguments


# --- Reading ---


def read_rows(place: Path) -> tuple[Path, list[dict[str, Any]]]:
    """(the file, its rows) of a sweep's folder or a file; UserError for what cannot be read."""
    file = place
    if place.is_dir():
        found = [place / name for name in ("results.json", "results.csv") if (place / name).is_file()]
        if not found:
            raise UserError(
                f"{place}: no results.json or results.csv; run the sweep, or `launchers/sweep.py --collect`"
            )
        file = found[0]
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".csv":
            return file, list(csv.DictReader(text.splitlines()))
        rows = json.loads(text)
        rows = rows["runs"] if isinstance(rows, dict) else rows
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("no list of rows")
        return file, rows
    except FileNotFoundError:
        raise UserError(f"{file}: not found; give a sweep's folder, or a CSV or JSON file") from None
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read ({error}); give a sweep's results.json or results.csv") from None


def read_runs(place: Path, loss: str, size: str) -> tuple[Path, Runs]:
    """(the file, its runs); UserError that names row and column for what is no use."""
    file, rows = read_rows(place)
    if not rows:
        raise UserError(f"{file}: holds no runs; run the sweep first")
    columns = list(dict.fromkeys(key for row in rows for key in row if key is not None))
    for column in (size, "tokens", loss):
        if column not in columns:
            raise UserError(
                f"{file}: has no column {column!r}, only {', '.join(columns)}; name it with --size or --loss"
            )
    names = tuple(str(row.get("run") or f"row {number}") for number, row in enumerate(rows, 1))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{file}: run {twice} is there twice; give every run a name of its own")
    where = [f"{file}: run {name}" for name in names]
    wanted = {"parameters": size, "tokens": "tokens", "losses": loss}
    arrays = {
        field: np.array([_positive(row, column, at) for row, at in zip(rows, where, strict=True)])
        for field, column in wanted.items()
    }
    given = [row.get("flops") not in (None, "") for row in rows]
    flops = [_positive(row, "flops", at) if g else math.nan for row, at, g in zip(rows, where, given, strict=True)]
    held_out = [str(row.get("held_out") or "0").strip().lower() in ("1", "1.0", "true", "yes") for row in rows]
    return file, Runs(names=names, flops=np.array(flops), held_out=np.array(held_out), **arrays)


def _positive(row: Mapping[str, Any], column: str, where: str) -> float:
    value = row.get(column)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(
            f"{where}: {column} is {'missing' if value in (None, '') else value}, not a positive number; train that "
            "run again, or take its row out"
        )
    return number


def hold_out(runs: Runs, names: Sequence[str] | None) -> Runs:
    """The runs with those marked that are predicted instead of fitted."""
    if names == ["none"]:
        return replace(runs, held_out=np.zeros(len(runs), bool))
    for name in names or ():
        if name not in runs.names:
            raise UserError(f"--held-out: there is no run {name!r}; there are {', '.join(runs.names)}")
    if names:
        return replace(runs, held_out=np.array([name in names for name in runs.names]))
    if runs.held_out.any():
        return runs
    cost = np.where(np.isfinite(runs.flops), runs.flops, 6 * runs.parameters * runs.tokens)
    return replace(runs, held_out=np.arange(len(runs)) == np.argmax(cost))


def main(argv: Sequence[str] | None = None) -> None:
    """Fit as the command line says."""
    arguments = parse(argv)
    need("scipy", "matplotlib")  # the one to fit, the other when all is fitted
    file, runs = read_runs(arguments.runs, arguments.loss, arguments.size)
    runs = hold_out(runs, arguments.held_out)
    if runs.held_out.all():
        raise UserError(f"{file}: all runs are held out, none is left to fit; hold out fewer with --held-out")
    output = arguments.output or file.parent / "fit"
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; give a folder")
    settings = Settings(
        delta=arguments.delta, resamples=arguments.resamples, level=arguments.level, seed=arguments.seed
    )
    with progress_bar("resampled fits", fits_to_do(runs, settings), "fit") as progress:
        analysis = analyse(runs, settings, progress.update)
    found = findings(analysis)
    columns = {"loss": arguments.loss, "size": arguments.size}
    print("\n".join(as_text(analysis, found, columns)))
    try:
        from ibq.training.provenance import origin  # reads PyTorch

        command = f"python tools/fit_scaling.py {shlex.join(sys.argv[1:] if argv is None else argv)}"
        write_text(output / "fit.json", as_json(analysis, found, columns, str(file), origin(command)))
        from tools.lib.scaling.plots import write_plots  # reads matplotlib

        pictures = write_plots(analysis, output, columns)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written ({error}); give another folder") from error
    print(f"\nwritten: {output / 'fit.json'}, {', '.join(picture.name for picture in pictures)}")


if __name__ == "__main__":
    exit_on_user_error(main)
