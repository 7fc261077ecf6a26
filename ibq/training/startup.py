"""How long a run takes from its command to its first step, by part: one line, and a file in the run's folder."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ibq import dist
from ibq.engine.blueprint import Blueprint
from ibq.engine.pieces import Piece
from ibq.engine.watch import stat_of
from ibq.files import write_text
from ibq.progress import say

FILE = "startup.json"  # of the last start
# In the order in which they begin; set-up is the settings, the process group, the run's folder and its records.
PARTS = ("imports", "set-up", "data", "model", "engine", "checkpoint", "log", "validation", "first batch", "first step")
_imported = time.perf_counter()


def process_seconds() -> float:
    """Seconds since this process was started; since this module was imported where the system does not tell."""
    try:
        ticks = int(stat_of("self")[19])  # starttime (man 5 proc_pid_stat), since the machine was started
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.perf_counter() - _imported


class StartUp:
    """Seconds of each part of a start; made when the imports are done. At any time one part is being measured."""

    def __init__(self):
        age, self._since = process_seconds(), time.perf_counter()
        self.started = time.time() - age  # Unix time
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.seconds["imports"] = age
        self._part = "set-up"
        self.done = False

    def enter(self, part: str) -> str:
        """What follows belongs to this part; the part before. Nothing is measured any more after the first step."""
        now, before = time.perf_counter(), self._part
        if not self.done:
            self.seconds[before] += now - self._since
        self._since, self._part = now, part
        return before

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """This context belongs to a part, but for contexts inside it."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def finish(self, folder: Path) -> None:
        """The first step is done: rank 0 says how long all took, and writes it down where that is possible."""
        self.enter(self._part)
        self.done = True
        if not dist.is_main():
            return
        parts = {name: round(seconds, 3) for name, seconds in self.seconds.items() if seconds >= 0.0005}
        total = sum(parts.values())
        shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if seconds >= 0.05)
        say(f"start-up: {total:.1f} s to the first step: {shown}")
        found = {"seconds": round(total, 3), "parts": parts, "started": round(self.started, 3)}
        with contextlib.suppress(OSError):  # a disk that is full is no reason to stop
            write_text(folder / FILE, json.dumps(found | {"ranks": dist.world_size()}, indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class TimedBlueprint(Blueprint):
    """A blueprint whose modules and weights count as the start's part `model`, whichever engine asks for them."""

    start_up: StartUp

    def whole(self, device: torch.device | str = "cpu") -> nn.Module:
        """See `Blueprint.whole`."""
        with self.start_up.part("model"):
            return super().whole(device)

    def skeleton(self) -> nn.Module:
        """See `Blueprint.skeleton`."""
        with self.start_up.part("model"):
            return super().skeleton()

    def initial(self, module: nn.Module, name: str, piece: Piece, device: torch.device | str = "cpu") -> Tensor:
        """See `Blueprint.initial`."""
        with self.start_up.part("model"):
            return super().initial(module, name, piece, device)
