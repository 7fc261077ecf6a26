"""Run one of the project's scripts on all ranks of a job: preflight, ranks, and a requeue where that helps.

python launchers/job.py -- ibq/train_ar.py --config yaml/xxl.yaml      # in a job's batch script: see slurm/job.sh
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ibq.config import UserError, exit_on_user_error
from ibq.engine.watch import stat_of
from ibq.files import append_line
from ibq.progress import leave, terminals
from launchers.lib import ROOT
from launchers.lib.allocation import Allocation, Step, current_allocation, deepspeed_command, torchrun_command
from launchers.lib.executor import in_code
from launchers.lib.run_config import check_run, is_training_script, load_run

ATTEMPTS_FILE = "attempts.jsonl"
SAVE_S = 600  # that ranks have at least to save after a signal, under launchers that can be told so
STOPPED = {128 + number for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)}
LOOK_S = 0.5  # between two looks at what is left
MOST_STOPS = 20  # in a row that leave no new checkpoint: each costs the whole start, and one more helps no more
ONE_PROCESS = {"launchers/sweep.py"}  # starts ranks by itself
Launcher = Literal["srun", "torchrun", "deepspeed"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A script of the project with its arguments, and how it is run on the nodes that it gets.

    Called in the job, on its first node; returns the exit code.
    """

    script: str
    arguments: tuple[str, ...] = ()
    launcher: Launcher = "srun"
    ranks: int | None = None  # on a machine without Slurm
    retries: int = 3  # starts in a row that fail without a new checkpoint
    preflight: bool = True

    def __call__(self) -> int:
        """Run until it is finished, stopped for good, or requeued."""
        if "IBQ_PROJECT" in os.environ:  # submitit starts this in the copy of the code
            os.chdir(os.environ["IBQ_PROJECT"])
        allocation = current_allocation(self.ranks)
        _, *arguments = in_code((self.script, *self.arguments))
        if self.script in ONE_PROCESS:
            here = [subprocess.Popen([sys.executable, "-u", str(ROOT / self.script), *arguments])]
            with signals_passed_on(here):
                code = exit_code(here)
                again = self._say_end(None, code)
            return leave_or_requeue(allocation, code, again)
        run = load_run(str(ROOT / self.script), arguments) if is_training_script(self.script) else None
        nodes = usable_nodes(run, len(allocation.nodes), allocation.ranks_per_node) if run else len(allocation.nodes)
        folder = Path(run.output) if run is not None else None
        logs = (folder / "logs" if folder else Path("slurm/logs")) / allocation.name
        where = f"{nodes} of {len(allocation.nodes)} nodes ({', '.join(allocation.nodes)})"
        each = f"{allocation.ranks_per_node} ranks each, start {allocation.restart + 1}"
        say(f"{self.script} on {where}, {each}; logs: {logs}/rank-*.log")
        before, started = last_checkpoint(folder), time.time()
        code = self._preflight(allocation, nodes, folder or Path.cwd(), run) if self.preflight else 0
        processes = [] if code else allocation.start(self._step(allocation, nodes, arguments, logs, folder))
        with signals_passed_on(processes):  # to the last word: as srun returns, Slurm ends a job that has lost a node
            code = code or exit_code(processes)
            if code and self.launcher != "srun":  # whose own code says little
                code = stopped_by(folder, started) or code
            row = {"start": allocation.restart, "nodes": allocation.nodes[:nodes], "code": code}
            append_line(_made(logs) / ATTEMPTS_FILE, row | {"before": before, "after": last_checkpoint(folder)})
            again = self._say_end(logs, code, folder)
        return leave_or_requeue(allocation, code, again)

    def _step(
        self, allocation: Allocation, nodes: int, arguments: Sequence[str], logs: Path, folder: Path | None
    ) -> Step:
        command = (sys.executable, str(ROOT / self.script), *arguments)
        match self.launcher:
            case "srun":
                return Step(command=command, nodes=nodes, ranks_per_node=allocation.ranks_per_node, logs=logs)
            case "torchrun":
                command = torchrun_command(allocation, nodes, command, time_to_save(folder))
            case "deepspeed":
                command = deepspeed_command(allocation, nodes, command, logs / "hostfile")
        return Step(command=command, nodes=nodes, ranks_per_node=1, logs=logs)

    def _preflight(self, allocation: Allocation, nodes: int, folder: Path, run: Any) -> int:
        _made(folder)
        hosts = [node for node in allocation.nodes[:nodes] for _ in range(allocation.ranks_per_node)]
        options = ("--folder", str(folder), "--hosts", ",".join(hosts))
        options += ("--device", run.device) if run is not None else ()
        command = (sys.executable, str(ROOT / "launchers/lib/preflight.py"), *options)
        step = Step(command=command, nodes=nodes, ranks_per_node=allocation.ranks_per_node)
        processes = allocation.start(step)
        with signals_passed_on(processes):
            return exit_code(processes)

    def _say_end(self, logs: Path | None, code: int, folder: Path | None = None) -> bool:
        """Say how it ended; whether to be requeued helps."""
        reason = status_of(folder).get("reason", "")
        said = f"{self.script} ended with exit code {code}" + (f": {reason}" if reason else "")
        limit = MOST_STOPS if code in STOPPED else self.retries
        if code == 0:
            say(f"{self.script} is done")
        elif code == 2:
            say(f"{said}; only its user can mend that, so it is not requeued")
        elif code not in STOPPED and logs is None:
            say(said)  # a sweep tries its runs again by itself
        elif logs is not None and fruitless(logs) >= limit:
            say(f"{said}; {limit} starts without a new checkpoint: it is not requeued")
        else:
            say(f"{said}; the same command goes on from the last checkpoint")
            return True
        return False


@dataclass(frozen=True)
class SubmittedJob:
    """What submitit calls in a Slurm job: a job that fails is a failed job of Slurm's too."""

    job: Job

    def __call__(self) -> None:
        """Run the job."""
        if code := self.job():
            sys.exit(code)

    def checkpoint(self) -> Any:
        """Where submitit gets a signal before the ranks have been started: the same job again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def stopped_by(folder: Path | None, since: float) -> int:
    """128 + the signal that has ended the run in a folder since then, as its ranks say; 0 if none has."""
    said = status_of(folder)
    if said.get("state") != "stopped" or time.mktime(time.strptime(said["time"][:19], "%Y-%m-%dT%H:%M:%S")) < since - 1:
        return 0
    return 128 + signal.Signals[said["reason"]]


def time_to_save(folder: Path | None) -> float:
    """Seconds that ranks get after a signal: twice what the run's last checkpoint took, if that is known and long."""
    return max(SAVE_S, 2 * status_of(folder).get("save_seconds", 0))


def status_of(folder: Path | None) -> dict:
    """What a run says of itself; nothing without a run."""
    from ibq.training.stopping import read_status  # reads PyTorch, for which --help should not wait

    return read_status(folder) if folder else {}


def usable_nodes(run: Any, nodes: int, ranks_per_node: int) -> int:
    """The largest number of the nodes over which the fixed global batch divides; UserError where there is none."""
    problem = None
    for usable in range(nodes, 0, -1):
        try:
            check_run(run, usable * ranks_per_node)
            return usable
        except UserError as error:
            problem = problem or error
    raise problem


def last_checkpoint(folder: Path | None) -> str:
    """The name of the last checkpoint in a run's folder, or nothing."""
    if folder is None:
        return ""
    return max((path.name for path in folder.glob("checkpoints/step-*")), default="")


def fruitless(logs: Path) -> int:
    """The last starts in a row that have left no new checkpoint, all stopped from outside or all failed."""
    try:
        rows = [json.loads(line) for line in (logs / ATTEMPTS_FILE).read_text().splitlines()]
    except (OSError, ValueError):
        return 0
    count = 0
    for row in reversed(rows):
        if row["after"] != row["before"] or (row["code"] in STOPPED) != (rows[-1]["code"] in STOPPED):
            break
        count += 1
    return count


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def exit_code(processes: Sequence[subprocess.Popen]) -> int:
    """That of several processes and of what they have started, once all have ended; a signal's as shells have it."""
    codes = [process.wait() for process in processes]
    while any(is_group_running(process.pid) for process in processes):
        time.sleep(LOOK_S)
    return max(128 - code if code < 0 else code for code in codes)


def leave_or_requeue(allocation: Allocation, code: int, again: bool) -> int:
    """The exit code, after a requeue where that helps; signals end this process again, as Slurm then does."""
    if again and allocation.requeue():
        say("requeued, but still running: ending")
    return code


@contextlib.contextmanager
def signals_passed_on(processes: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Signals to this process go to those that run, and do not end it.

    When Slurm ends a job it signals the tasks itself, and `srun` and this process too: this one waits for them.
    """
    in_slurm = "SLURM_JOB_ID" in os.environ
    streams = terminals()

    def pass_on(number: int, _frame) -> None:
        if number == signal.SIGHUP:
            leave(streams)
        if not in_slurm or number in (signal.SIGUSR1, signal.SIGUSR2):
            for process in processes:
                if process.poll() is None:
                    process.send_signal(number)

    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_group_running(group: int) -> bool:
    """Whether any process of a group is left, its leader or not: the deepspeed command ends before ranks that save."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):  # it has just ended
            state, _, own, *_ = stat_of(path.name)
            if own == str(group) and state not in "ZX":
                return True
    return False


def say(message: str) -> None:
    """A line in the job's own output."""
    print(f"[{time.strftime('%F %T')}] {message}", flush=True)


def parse_job(argv: Sequence[str] | None, doc: str, add_options: Callable | None = None) -> argparse.Namespace:
    """A command line of the form `[options] -- SCRIPT arguments`."""
    first, *_ = doc.splitlines()
    parser = argparse.ArgumentParser(
        description=first, epilog=doc.partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    if add_options is not None:
        add_options(parser)
    add("--launcher", choices=["srun", "torchrun", "deepspeed"], default="srun",
        help="who starts the ranks; only srun passes signals on and names no process in between (default)")  # fmt: skip
    add("--retries", type=int, default=3, metavar="N", help="failures in a row, without a new checkpoint (default: 3)")
    add("--no-preflight", action="store_true", help="start without a check of the nodes")
    add("command", nargs=argparse.REMAINDER, metavar="-- SCRIPT ...", help="a script of the project, and its arguments")
    arguments = parser.parse_args(argv)
    arguments.command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not arguments.command:
        raise UserError("no script is given; write -- ibq/train_ar.py --config yaml/b.yaml")
    if not (ROOT / arguments.command[0]).is_file():
        raise UserError(f"{arguments.command[0]}: is no script of the project, such as ibq/train_ar.py")
    return arguments


def job_of(arguments: argparse.Namespace, ranks: int | None = None) -> Job:
    """The job that a command line describes."""
    script, *rest = arguments.command
    return Job(
        script=Path(script).as_posix(),
        arguments=tuple(rest),
        launcher=arguments.launcher,
        ranks=ranks,
        retries=arguments.retries,
        preflight=not arguments.no_preflight,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says."""
    ranks = {"type": int, "metavar": "N", "help": "without Slurm"}
    arguments = parse_job(argv, __doc__, lambda parser: parser.add_argument("--ranks", **ranks))
    return job_of(arguments, arguments.ranks)()


if __name__ == "__main__":
    exit_on_user_error(main)
