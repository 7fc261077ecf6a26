"""A sweep as an array of Slurm jobs, one run each: submitted once, watched from anywhere, again where a job died."""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from ibq.config import UserError
from ibq.files import write_text
from launchers.lib.executor import StopRequest
from launchers.lib.submit import check_sbatch, submit
from launchers.lib.sweep.state import RunState, open_run
from launchers.lib.sweep.table import SweepTable

SCRIPT = "slurm/sweep.sh"
JOBS_FILE = "slurm.json"
POLL_SECONDS = 2.0
ALIVE = {"PENDING": "queued", "CONFIGURING": "queued", "REQUEUED": "queued", "REQUEUE_HOLD": "queued",
         "SUSPENDED": "queued", "RUNNING": "running", "COMPLETING": "running", "STOPPED": "running"}  # fmt: skip


class SlurmSweep:
    """Submits the runs that are left as an array and shows how they stand until all have ended.

    Which job a run belongs to is written to `slurm.json` in the sweep's folder: a second call, or one on another
    machine, watches the jobs that are there. Ctrl-C leaves them running.
    """

    def __init__(self, states: Sequence[RunState], numbers: Sequence[int], arguments: Sequence[str], folder: Path):
        self.states, self.arguments = list(states), list(arguments)
        self.numbers = {state.run.name: number for state, number in zip(states, numbers, strict=True)}
        self.path = folder / JOBS_FILE
        self.jobs: dict[str, str] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, at_a_time: int, retries: int) -> int:
        """Until all runs are done or have failed; 0, or the number of the signal that has ended the watch."""
        self.look()
        self._submit([state for state in self.states if state.state == "queued" and not self._alive(state)], at_a_time)
        table = SweepTable(self.states, at_a_time)
        with StopRequest() as stop:
            while not stop.number:
                self.look()
                lost = [state for state in self.states if state.state == "queued" and not self._alive(state)]
                for state in lost:
                    state.failures += 1
                    state.reason = f"its job {self.jobs.get(state.run.name)} has ended; see slurm/logs/"
                    if state.failures > retries:
                        state.state = "failed"
                again = [state for state in lost if state.state == "queued"]
                for state in again:
                    table.say(f"{state.run.name}: {state.reason}; once more")
                self._submit(again, at_a_time)
                if all(state.state in ("done", "failed") for state in self.states):
                    break
                table.update(time.monotonic())
                time.sleep(POLL_SECONDS)
            table.update(time.monotonic(), last=True)
        if stop.number:
            end = f"scancel {' '.join(self._job_numbers())}"
            print(f"the jobs go on; the same command watches them again, `{end}` ends them")
        return stop.number

    def look(self) -> None:
        """Read the runs' records and the state of their jobs."""
        self._queue = queue_states(self._job_numbers())
        for state in self.states:
            found = open_run(state.run, fresh=False)
            state.record, reason = found.record, found.record.get("failed", "")
            in_queue = self._queue.get(self.jobs.get(state.run.name, ""))
            if state.next_part() is None:
                state.state, state.part = "done", None
            elif in_queue is None and reason and state.state != "failed":
                state.state, state.part, state.reason = "failed", None, reason
            elif in_queue is not None:
                self._show(state, in_queue)
            elif state.state != "failed":
                state.state, state.part = "queued", None

    @staticmethod
    def _show(state: RunState, in_queue: str) -> None:
        part = state.next_part()
        if in_queue == "running" and state.part is not part:
            state.begin(part, time.monotonic())
        elif in_queue == "queued":
            state.state, state.part = "queued", None

    def _alive(self, state: RunState) -> bool:
        return self.jobs.get(state.run.name, "") in self._queue

    def _job_numbers(self) -> list[str]:
        return sorted({job.partition("_")[0] for job in self.jobs.values()})

    def _submit(self, states: Sequence[RunState], at_a_time: int) -> None:
        if not states:
            return
        numbers = [self.numbers[state.run.name] for state in states]
        options = [f"--array={','.join(map(str, numbers))}%{at_a_time}"]
        for state in states:
            state.record.pop("failed", None)
            state.save()
        job = submit(SCRIPT, self.arguments, options)
        self.jobs |= {state.run.name: f"{job}_{number}" for state, number in zip(states, numbers, strict=True)}
        write_text(self.path, json.dumps(self.jobs, indent=1) + "\n")
        print(f"submitted {len(states)} runs as the array {job}, {at_a_time} at a time", flush=True)
        self._queue = queue_states(self._job_numbers())


def queue_states(jobs: Sequence[str]) -> dict[str, str]:
    """`queued` or `running` for every task `JOB_NUMBER` of the arrays that Slurm still has."""
    if not jobs:
        return {}
    command = ["squeue", "--noheader", "--array", f"--jobs={','.join(jobs)}", "--format=%F_%K %T"]
    for _ in range(5):  # a controller that is busy is asked again
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            rows = [line.split() for line in done.stdout.splitlines()]
            return {job: ALIVE[state] for job, state in rows if state in ALIVE}
        if "Invalid job id" in done.stderr:  # all of them are long over
            return {}
        time.sleep(POLL_SECONDS)
    raise UserError(f"squeue: does not answer ({done.stderr.strip()}); the jobs go on, try again later")


def check_slurm(arguments: Sequence[str], count: int) -> None:
    """UserError unless Slurm would take the array."""
    if not Path(SCRIPT).exists():
        raise UserError(f"{SCRIPT}: is not there; start this from the project's folder ({os.getcwd()} is none)")
    check_sbatch(SCRIPT, arguments, [f"--array=0-{count - 1}"])
