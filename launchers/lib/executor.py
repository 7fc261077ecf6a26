"""Where the commands of a sweep run."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.lib import ROOT
from tools.lib import cores

# Where the project's data and runs are; in a job the code is a copy that lies elsewhere.
PROJECT = Path(os.environ.get("IBQ_PROJECT", ROOT))


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A command that has ended."""

    key: str
    code: int  # the exit code; negative or above 128 after a signal
    seconds: float


class LocalExecutor:
    """Processes of this machine, at most `slots` at a time, which share its cores."""

    def __init__(self, slots: int, prefix: Sequence[str] = ()):
        self.slots, self.prefix = slots, list(prefix)  # `srun` with its options, in a job
        # Who sets OMP_NUM_THREADS has divided the cores already, with other users of the machine perhaps.
        self.threads = os.environ.get("OMP_NUM_THREADS") or str(max(cores() // slots, 1))
        self._running: dict[str, tuple[subprocess.Popen, float]] = {}

    def free(self) -> int:
        """How many commands may be started now."""
        return self.slots - len(self._running)

    def start(self, key: str, command: Sequence[str], log: Path) -> None:
        """Start a Python script with its arguments; what it prints is added to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": self.threads, "PYTHONWARNINGS": "ignore"}
        with open(log, "ab") as file:
            file.write(f"\n$ {shown(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [*self._prefix_for(command), sys.executable, *in_code(command)],
                cwd=PROJECT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it once, through `signal`, also with workers of its own
            )
        self._running[key] = (process, time.monotonic())

    def _prefix_for(self, command: Sequence[str]) -> list[str]:
        """Only training runs as several ranks."""
        if not self.prefix or command[0].startswith("ibq/train_"):
            return self.prefix
        return ["srun", "--nodes=1", "--ntasks=1"]

    def ended(self) -> list[Ended]:
        """The commands that have ended since the last call."""
        codes = {key: process.poll() for key, (process, _) in self._running.items()}
        now = time.monotonic()
        return [
            Ended(key=key, code=code, seconds=now - self._running.pop(key)[1])
            for key, code in codes.items()
            if code is not None
        ]

    def signal(self, number: int) -> None:
        """Pass a signal on to all commands that are running, and to their worker processes."""
        for process, _ in self._running.values():
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:  # it has just ended
                continue


class StopRequest:
    """Notes the first of SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 instead of ending this process."""

    def __init__(self):
        self.number = 0

    def __enter__(self) -> "StopRequest":
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        wanted = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.number = self.number or number


def code_path(path: str) -> str:
    """A file of the project in this copy of the code, where the code is a copy and has it."""
    own = ROOT / path
    return str(own) if PROJECT != ROOT and not Path(path).is_absolute() and own.is_file() else path


def in_code(command: Sequence[str]) -> list[str]:
    """A script's command line, or its arguments, with script and config files as in this copy of the code."""
    found, after = [], "--config"
    for text in command:
        found.append(code_path(text) if after == "--config" else text)
        after = text
    return found


def shown(command: Sequence[str]) -> str:
    """A command as a user would type it."""
    return shlex.join(["python", *command])
