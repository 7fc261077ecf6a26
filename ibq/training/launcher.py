"""The deepspeed command leaves its ranks running when a signal ends it: they notice, and stop as if told so."""

import os
import signal
import threading
from pathlib import Path

from ibq import dist
from ibq.engine.watch import Process
from ibq.progress import say

LOOK_S = 1.0  # between two looks


def watch_launcher() -> None:
    """From now on this process gets SIGTERM when a process of the deepspeed command above it has gone."""
    if launchers := deepspeed_above():
        threading.Thread(target=_watch, args=(launchers,), name="launcher", daemon=True).start()


def deepspeed_above() -> list[Process]:
    """The processes of the deepspeed command that this one descends from: the node's launcher, and the command itself.

    None elsewhere: others, such as a shell, may go while their programs run on.
    """
    found, pid = [], os.getppid()
    while (process := Process.of(pid)) is not None and _is_deepspeed(pid):
        found.append(process)
        pid = process.parent()
    return found


def _is_deepspeed(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    # python -u -m deepspeed.launcher.launch ..., python .../bin/deepspeed ...
    return any(Path(word).name in ("deepspeed", "ds") or word.startswith("deepspeed.launcher.") for word in words[:4])


def _watch(launchers: list[Process]) -> None:
    pause = threading.Event()
    while all(process.state() for process in launchers):
        pause.wait(LOOK_S)
    if dist.is_main():
        say("the deepspeed command has ended without its ranks")
    os.kill(os.getpid(), signal.SIGTERM)
