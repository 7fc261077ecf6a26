"""How a run ends before its time: signals, and what `status.json` says of it."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from ibq import dist
from ibq.files import write_text
from ibq.progress import leave, say, terminals

STATUS_FILE = "status.json"
Status = Literal["running", "finished", "stopped", "failed"]


class StopSignals:
    """Notes SIGTERM, SIGINT, SIGHUP and one of SIGUSR1 and SIGUSR2, so that the run can end between two steps.

    A signal that comes again, during the save say, changes nothing. SIGHUP comes when the terminal is closed, and means
    nothing to what `nohup` has started.
    """

    def __init__(self, extra: Literal["USR1", "USR2", "none"]):
        self.numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self.numbers.append(signal.SIGHUP)
        if extra != "none":
            self.numbers.append(signal.Signals[f"SIG{extra}"])
        self.received = 0  # the number of the first signal that this rank has noted
        self.agreed = 0  # and what all ranks have agreed on

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Within this context the signals are noted instead of ending the process.

        After a run that a signal has ended they stay without effect: the process is on its way out.
        """
        before = {number: signal.signal(number, self._note) for number in self.numbers}
        self._terminals = terminals()
        try:
            yield
        finally:
            for number, handler in before.items():
                # Not the handler of this class: Python takes that away again while it ends.
                signal.signal(number, signal.SIG_IGN if self.agreed else handler)

    def _note(self, number: int, _frame) -> None:
        self.received = self.received or number
        if number == signal.SIGHUP:
            leave(self._terminals)

    def agree(self) -> bool:
        """Whether any rank has noted a signal; every rank calls it, and all get the same answer."""
        if not self.agreed:
            self.agreed = dist.largest(self.received)
            if self.agreed and dist.is_main():
                say(f"{self.name}: saving once, then the run ends; the same command goes on from there")
        return bool(self.agreed)

    @property
    def name(self) -> str:
        """The signal that ends the run, such as SIGTERM."""
        return signal.Signals(self.agreed).name

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal has ended."""
        return 128 + self.agreed


def write_status(
    folder: Path,
    state: Status,
    step: int,
    total_steps: int,
    reason: str = "",
    *,
    any_rank: bool = False,
    pictures: Mapping[str, Mapping] | None = None,
    save_seconds: float | None = None,
) -> None:
    """Say in `status.json` how the run stands; rank 0, or `any_rank`. A full disk is no reason to fail here.

    `pictures`: of each place that the run read, how many were found, used and left out. `save_seconds`: what the last
    checkpoint took, which stays there.
    """
    if not (dist.is_main() or any_rank):
        return
    said = {"state": state, "step": step, "total_steps": total_steps, "reason": reason}
    said |= {"pictures": pictures} if pictures else {}
    before = read_status(folder)
    save_seconds = before.get("save_seconds") if save_seconds is None else round(save_seconds, 1)
    said |= {} if save_seconds is None else {"save_seconds": save_seconds}
    if said.items() <= before.items() and state != "running":
        return  # a finished run that is started again stays as it is
    status = said | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname(), "pid": os.getpid()}
    with contextlib.suppress(OSError):
        write_text(folder / STATUS_FILE, json.dumps(status, indent=1) + "\n")


def read_status(folder: Path) -> dict:
    """What `status.json` says; empty where there is none or it is damaged."""
    try:
        status = json.loads((folder / STATUS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}
