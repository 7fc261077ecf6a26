"""A sweep from its command line to its results: the runs, one after the other or side by side."""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ibq.config import UserError, load_config
from ibq.training.run import run_folder
from launchers.lib import ROOT
from launchers.lib.allocation import SlurmAllocation, srun_prefix
from launchers.lib.executor import PROJECT, Ended, LocalExecutor, StopRequest, shown
from launchers.lib.sweep.grid import Run, SweepConfig, runs_of
from launchers.lib.sweep.results import write_results
from launchers.lib.sweep.slurm import SlurmSweep, check_slurm
from launchers.lib.sweep.state import LOG_FILE, RunState, last_words, open_run
from launchers.lib.sweep.table import SweepTable

POLL_SECONDS = 0.2
STOPPED = {128 + number: number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}


class Sweep:
    """Brings the runs to their end, as many at a time as the executor takes."""

    def __init__(self, states: Sequence[RunState], executor: LocalExecutor, table: SweepTable, retries: int):
        self.states, self.executor, self.table, self.retries = states, executor, table, retries
        self.started = time.monotonic()
        self.stopped_by = 0  # the number of a signal that ended a run from outside

    def run(self) -> int:
        """Run what is left to do; 0, or the number of the signal that has ended it."""
        with StopRequest() as stop:
            passed_on = False
            while True:
                for ended in self.executor.ended():
                    self._end(ended, stopping=bool(stop.number))
                if stop.number and not passed_on:
                    self._say(f"stopping {len(self._of('running'))} runs; the same command goes on from there")
                    self.executor.signal(stop.number)
                    passed_on = True
                while not stop.number and self.executor.free() and self._of("queued"):
                    self._start(self._of("queued")[0])
                if not self._of("running"):
                    break
                self.table.update(time.monotonic())
                time.sleep(POLL_SECONDS)
            self.table.update(time.monotonic(), last=True)
        return stop.number or self.stopped_by

    def _of(self, kind: str) -> list[RunState]:
        return [state for state in self.states if state.state == kind]

    def _say(self, message: str) -> None:
        self.table.say(f"[{time.monotonic() - self.started:4.0f} s] {message}")

    def _start(self, state: RunState) -> None:
        part, log = state.next_part(), state.run.folder / LOG_FILE
        state.save()
        state.make_room(part)
        self._say(f"{state.run.name}: {part.name}\n$ {shown(part.command)}")
        state.begin(part, time.monotonic())
        self.executor.start(state.run.name, part.command, log)

    def _end(self, ended: Ended, *, stopping: bool) -> None:
        state = next(state for state in self.states if state.run.name == ended.key)
        part, log = state.part, state.run.folder / LOG_FILE
        state.end(ended.seconds, done=ended.code == 0)
        if ended.code == 0 and state.next_part() is not part:
            state.state = "queued" if state.next_part() else "done"
            if state.state == "done":
                self._say(f"{state.run.name}: done")
            return
        if stopping or ended.code in STOPPED:  # Slurm tells the ranks themselves to stop
            state.state = "stopped"
            self.stopped_by = STOPPED.get(ended.code, 0)
            return
        state.failures += 1
        # Exit code 2 is a mistake that only the user can mend.
        again = ended.code != 2 and state.failures <= self.retries
        state.state = "queued" if again else "failed"
        state.reason = f"{part.name} ended with exit code {ended.code}: {last_words(log)}"
        if not again:
            state.record["failed"] = state.reason
            state.save()
        self._say(f"{state.run.name}: {state.reason}" + ("; once more" if again else f"; see {log}"))


def chosen(runs: Sequence[Run], names: Sequence[str] | None) -> list[Run]:
    """The runs that --only names, or all; UserError for a name that is none."""
    known = [run.name for run in runs]
    for name in names or ():
        if name not in known:
            raise UserError(f"--only: there is no run {name!r}; the sweep has {', '.join(known)}")
    return [run for run in runs if not names or run.name in names]


def run_sweep(arguments: argparse.Namespace) -> int:
    """Run a sweep as its options say; the exit code."""
    config_file = os.path.abspath(arguments.config)
    os.chdir(PROJECT)  # paths in a sweep file are relative to the project, and so are the commands that are printed
    source = os.path.relpath(config_file) if Path(config_file).is_relative_to(ROOT) else config_file
    config = load_config(SweepConfig, source, arguments.overrides)
    runs = runs_of(config, source)
    selected = chosen(runs, arguments.only if arguments.element is None else [element(runs, arguments.element)])
    if arguments.collect and arguments.fresh:
        raise UserError("--collect runs nothing and removes nothing; leave out --fresh")
    if arguments.executor == "slurm" and not arguments.collect:
        states = [open_run(run, fresh=arguments.fresh) for run in selected]
        given = ["--config", source, *arguments.overrides, "--retries", str(arguments.retries)]
        check_slurm(given, len(runs))
        numbers = [[run.name for run in runs].index(run.name) for run in selected]
        number = SlurmSweep(states, numbers, given, config.folder).run(arguments.max_parallel, arguments.retries)
        return 128 + number if number else conclude(config, runs, states, arguments, source)
    with contextlib.ExitStack() as locks:
        if not arguments.collect:
            for run in selected:  # not the whole sweep: --only may run beside it
                locks.enter_context(run_folder(str(config.folder / ".locks" / run.name), fresh=False))
        states = [open_run(run, fresh=arguments.fresh) for run in selected]
        number = 0 if arguments.collect else execute(states, arguments)
    return 128 + number if number else conclude(config, runs, states, arguments, source)


def conclude(config: SweepConfig, runs, states: Sequence[RunState], arguments: argparse.Namespace, source: str) -> int:
    """Write the results, and name the runs that have failed; the exit code."""
    if arguments.element is None:  # a job of an array leaves that to the one who watches it
        write_results(config, runs, shlex.join(["--config", source, *arguments.overrides]))
    failed = [state for state in states if state.state == "failed"]
    if failed:
        said = "; ".join(f"{state.run.name} ({state.reason})" for state in failed)
        print(f"{len(failed)} of {len(states)} runs failed: {said}; the same command tries again", file=sys.stderr)
        return 1
    return 0


def element(runs: Sequence[Run], number: str) -> str:
    """The name of the run with this number in the array."""
    if not number.isdigit() or int(number) >= len(runs):
        raise UserError(f"--array: the sweep has the runs 0 to {len(runs) - 1}, and none of number {number!r}")
    return runs[int(number)].name


def execute(states: Sequence[RunState], arguments: argparse.Namespace) -> int:
    """Run what is left to do; 0, or the number of the signal that has ended it."""
    prefix = srun_prefix(SlurmAllocation()) if arguments.element is not None and "SLURM_JOB_ID" in os.environ else ()
    executor = LocalExecutor(arguments.max_parallel, prefix)
    done = sum(state.state == "done" for state in states)
    if done == len(states):
        print(f"all {done} runs are done; --fresh trains them again")
        return 0
    share = f"{executor.slots} at a time, threads each: {executor.threads}"
    print(f"{len(states)} runs, {done} done; {share}", flush=True)
    return Sweep(states, executor, SweepTable(states, executor.slots), arguments.retries).run()
