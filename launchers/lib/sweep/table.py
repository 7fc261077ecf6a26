"""The table of a sweep's runs: redrawn in place on a terminal, in a log file a line for what changes."""

import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from ibq.reports.figures import duration
from launchers.lib.sweep.state import RunState

REDRAW_SECONDS = 0.5
QUIET_SECONDS = 60.0  # between lines about progress where there is no terminal
HEAD = ("run", "state", "step", "time", "left")
NUMBERS = (2, 3, 4)  # columns


class SweepTable:
    """Shows how the runs stand, on stdout."""

    def __init__(self, states: Sequence[RunState], slots: int, stream: TextIO | None = None):
        self.states, self.slots = states, slots
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self._drawn = 0  # lines of the table that are on the terminal now
        self._told: float | None = None  # when progress was last told
        self._looked = -REDRAW_SECONDS

    def say(self, message: str) -> None:
        """Print a message above the table."""
        self._erase()
        print(message, file=self.stream, flush=True)

    def update(self, now: float, *, last: bool = False) -> None:
        """Show the runs as they stand; the last time the whole table stays where it is."""
        if now - self._looked < REDRAW_SECONDS and not last:
            return
        self._looked = now
        for state in self.states:
            state.progress.look(now)
        if self.live or last:
            self._draw(now, whole=last)
        elif self._told is None or now - self._told >= QUIET_SECONDS:
            running = [_row(state, now) for state in self.states if state.state == "running"]
            if self._told is not None:  # at the very start there is nothing to tell
                print("\n".join([*aligned(running, NUMBERS), self.outlook(now)]), file=self.stream, flush=True)
            self._told = now

    def outlook(self, now: float) -> str:
        """How many runs are done, and when all will be."""
        done, failed = (sum(state.state == kind for state in self.states) for kind in ("done", "failed"))
        left = self._seconds_left(now)
        text = f"{done} of {len(self.states)} runs done" + (f", {failed} failed" if failed else "")
        return text + (f", about {duration(left)} left" if left else "")

    def _seconds_left(self, now: float) -> float | None:
        """Until all runs are done; a run of which nothing is known is taken to need the mean of the others."""
        totals, left, unknown = [], 0.0, 0
        for state in self.states:
            remaining = state.seconds_left()
            if state.state == "done":
                totals.append(state.spent(now))
            elif remaining is not None:
                totals.append(state.spent(now) + remaining)
                left += remaining
            elif state.state == "queued" or (state.part is not None and state.part.name == "train"):
                unknown += 1
        return (left + unknown * sum(totals) / len(totals)) / self.slots if totals else None

    def _draw(self, now: float, *, whole: bool) -> None:
        width, height = shutil.get_terminal_size()
        rows = {state.run.name: _row(state, now) for state in self.states}
        if not whole and len(rows) > height - 4:  # what scrolls off the screen cannot be redrawn
            rows = {state.run.name: rows[state.run.name] for state in self.states if state.state == "running"}
        lines = [*aligned([HEAD, *rows.values()], NUMBERS), self.outlook(now)]
        self._erase()
        if self.live and not whole:
            lines = [line[: width - 1] for line in lines[: height - 1]]
            self._drawn = len(lines)
        print("\n".join(lines), file=self.stream, flush=True)

    def _erase(self) -> None:
        if self._drawn:
            self.stream.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0


def _row(state: RunState, now: float) -> tuple[str, ...]:
    """A run's cells, as in HEAD."""
    step, total, spent, left = state.progress.step, state.progress.total, state.spent(now), state.seconds_left()
    return (
        state.run.name,
        f"{state.state}: {state.part.name}" if state.part else state.state,
        f"{step:,}/{total:,}" if total else "",
        duration(spent) if spent else "",
        "" if left is None else duration(left),
    )


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Rows of cells as lines with columns of equal width; the columns `right` end flush."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        texts = [text.rjust(w) if column in right else text.ljust(w) for column, (text, w) in enumerate(cells)]
        lines.append("  ".join(texts).rstrip())
    return lines
