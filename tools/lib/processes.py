"""Processes that work for a tool, and end with it whatever its end was."""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any


def context() -> multiprocessing.context.BaseContext:
    """How they are started: forked where that is safe, so that they have what this process has read."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)


def prepare(*stops: Connection) -> None:
    """Make this one end with the main process, or when one of `stops` says so; Ctrl-C is the main process's matter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ends = [*stops, multiprocessing.parent_process().sentinel]
    threading.Thread(target=lambda: (wait_for_any(ends), os._exit(1)), daemon=True).start()
