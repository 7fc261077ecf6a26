"""Every Python process that finds this folder in PYTHONPATH imports it: at the points of TEST_POINTS it stands still.

A point is an event that Python announces before it happens (https://docs.python.org/3/library/audit_events.html): a
file is about to be opened, a folder made, renamed or removed. So the code under test knows nothing of it, and the
process, its signals and its files are real. See support/points.py for the test's side.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time

LONGEST_S = 900.0  # a process that the test has left behind does not stand for ever


def stand(folder: str, name: str) -> None:
    """Say so, and wait until the test lets all go on that stand here; say too that a signal has come meanwhile."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False) if in_main_thread else None
    touch(f"{folder}/{name}-{os.getpid()}")
    for _ in range(int(LONGEST_S / 0.005)):
        with contextlib.suppress(BlockingIOError):
            os.read(reader, 1)
            touch(f"{folder}/{name}.signalled-{os.getpid()}")
        if os.path.exists(f"{folder}/{name}.go"):
            if in_main_thread:
                signal.set_wakeup_fd(before)
            os.close(reader)
            os.close(writer)
            return
        time.sleep(0.005)
    os._exit(70)


def touch(path: str) -> None:
    """Make an empty file."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def watch(folder: str, points: dict[str, tuple[str, str, int]]) -> None:
    """Stand where an event whose first two arguments match comes to this process for the given time."""
    patterns = {name: re.compile(pattern) for name, (_, pattern, _) in points.items()}
    events = {event for event, _, _ in points.values()}
    left = {name: times for name, (_, _, times) in points.items()}

    def hook(event: str, arguments: tuple) -> None:
        if event not in events:
            return
        said = " ".join(map(str, arguments[:2]))
        for name, (own, _, _) in points.items():
            if event == own and patterns[name].search(said):
                left[name] -= 1
                if left[name] == 0:
                    stand(folder, name)

    sys.addaudithook(hook)


if "TEST_POINTS" in os.environ:
    watch(**json.loads(os.environ["TEST_POINTS"]))
