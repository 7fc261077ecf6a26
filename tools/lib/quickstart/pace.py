"""How a training of the quickstart keeps to its time: its steps are timed as they come, and their number corrected."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ibq.config import UserError
from ibq.files import read_lines
from tools.lib import ROOT

MEASURE_S = 4.0  # seconds of steps that say how many will fit
SETTLED_S = 15.0  # as many for every later correction: by then the number is about right
WINDOW_S = 40.0  # only the last so many seconds count: other programs come and go
BESIDES = 1.05  # validations and checkpoints
NOISE = 0.1  # of the number of steps
TOLERANCE = 0.08  # of the time left; or twice what a correction costs, if that is more


@dataclass(frozen=True, kw_only=True)
class Load:
    """The work of a training in units of its first steps; of a long one, the last steps cost more."""

    late: float = 1.0  # the share of the steps after which each costs more
    extra: float = 0.0  # how much more, in units
    long: int = 0  # steps from which on a training is long

    def costly(self, total: int) -> int:
        """The step from which on each costs more; `total` where none does."""
        return int(self.late * total) if total >= self.long else total

    def left(self, done: int, total: int) -> float:
        """Units that are left to do."""
        return total - done + self.extra * (total - max(done, self.costly(total)))

    def fitting(self, done: int, units: float) -> int:
        """The number of steps in all with which so many units are left."""
        low, high = done, done + int(units)
        while low < high:  # the largest with no more units
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.left(done, middle) <= units else (low, middle - 1)
        return low


@dataclass(kw_only=True)
class Pace:
    """The pace of one stage; times are those of any one clock, in seconds."""

    end: float  # when the stage should be over
    load: Load
    low: int  # steps that the stage has at least
    high: int  # and at most
    measured: bool = False  # whether the number of steps follows from a measurement
    restart_s: float = 5.0  # what a correction costs: the training saves, ends and starts again
    seconds: float | None = None  # a unit's, as last measured
    _seen: deque = field(default_factory=deque)  # (time, step)
    _began: float = 0.0

    def begin(self, now: float) -> None:
        """The training starts, once more perhaps."""
        self._seen.clear()
        self._began = now

    def see(self, now: float, step: int) -> None:
        """The training has told that it has done so many steps."""
        if not self._seen:
            self.restart_s = now - self._began
        if not self._seen or step > self._seen[-1][1]:
            self._seen.append((now, step))
        while len(self._seen) > 2 and now - self._seen[1][0] > WINDOW_S:
            self._seen.popleft()

    def wanted(self, now: float, total: int) -> int | None:
        """The number of steps to go on with instead of `total`, where that is worth a restart."""
        if len(self._seen) < 2 or self._seen[-1][1] >= total:
            return None
        (first, start), (last, step) = self._seen[0], self._seen[-1]
        if last - first < (SETTLED_S if self.measured else MEASURE_S):
            return None
        self.seconds = (last - first) / (self.load.left(start, total) - self.load.left(step, total))
        over = last + self.seconds * self.load.left(step, total) * BESIDES
        spare = max(TOLERANCE * (self.end - now), 2 * self.restart_s)
        number = self.fitting(now + self.restart_s, step)
        # What is fitted anew has to differ by more than the measurement's noise, or each correction brings the next.
        noise = (NOISE if self.measured else NOISE / 3) * total
        return number if abs(over - self.end) > spare and abs(number - total) > noise else None

    def fitting(self, now: float, done: int) -> int:
        """The number of steps that ends in time, from `done` on."""
        units = max(self.end - now, 0.0) / (self.seconds * BESIDES)
        return max(min(self.load.fitting(done, units), self.high), self.low, done + 1)


# --- The training itself ---

LOOK_S, SAVE_S = 0.25, 10.0  # between two looks at a training, and two notes of the time
LAST_S = 20  # for a last checkpoint
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # exit codes


def watch(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    pace: Pace,
    total: int,
    clock: Callable[[], float],
    save: Callable[[], None],
) -> int | None:
    """Run a training command of `total` steps in its folder; the number of steps to go on with, if it was stopped.

    `save` is called now and then.
    """
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env={**os.environ, **environment})
    stopped, before, saved = False, last_step(folder), clock()
    pace.begin(clock())
    try:
        while process.poll() is None:
            time.sleep(LOOK_S)
            step, now = last_step(folder), clock()
            before = min(before, step)  # an interrupted run's last lines are taken back
            if step > before:
                pace.see(now, step)
            if not stopped and pace.wanted(now, total) is not None:
                stopped = True
                process.terminate()  # it saves, and goes on from there when started again
            if now - saved > SAVE_S:
                saved = now
                save()
    except BaseException:  # Ctrl-C, which the training has been told of, too: it saves
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_S)
        process.kill()
        raise
    if stopped and process.returncode in STOPPED:
        pace.measured, done = True, saved_step(folder)
        return pace.fitting(clock() + pace.restart_s, done) if done < total else total
    if process.returncode:
        raise UserError(f"{command[0]}: the command above ended with exit code {process.returncode}")
    return None


def last_step(folder: Path) -> int:
    """The last step that a training has told of; 0 where there is none."""
    rows = read_lines(folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def saved_step(folder: Path) -> int:
    """The step of the last checkpoint; 0 where there is none."""
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*")), default=0)
