r"""Waiting for what other processes do, and named points at which they wait for the test: no test hopes for a moment.

    points = Points(tmp_path / "points", {"saved": ("os.rename", r"/\.tmp-step-\d+ ")})
    process = start_script(*command, environment=script_environment(**points.environment))
    points.wait("saved", process)  # the checkpoint is written, and not yet in its place
    process.kill()

The other side is standing/sitecustomize.py.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import Popen
from typing import Any

from support.processes import HANG_S, PYTHONPATH, STANDING, Forked


def wait_for(condition: Callable[[], Any], *processes: Popen | Forked, what: str = "") -> Any:
    """The first true value of `condition()`; fails where one of the processes ends before."""
    deadline = time.monotonic() + HANG_S
    while not (value := condition()):
        for process in processes:
            if process.poll() is not None and not (value := condition()):
                said = process.communicate()[1] or ""
                raise AssertionError(f"{process} has ended before {what or 'that'}: {process.poll()}\n{said[-3000:]}")
        assert time.monotonic() < deadline, f"waited {HANG_S:.0f} s for {what or 'it'}"
        time.sleep(0.005)
    return value


class Points:
    """Named points: NAME -> (audit event, pattern of its first two arguments, at which time it comes: by default 1).

    Processes that are started with `environment` stand still there until `release`; so do their children, each for
    itself. Those that a signal has come to meanwhile, if they have a handler for it, stand at NAME.signalled too.
    """

    def __init__(self, folder: Path, points: Mapping[str, tuple[str, str] | tuple[str, str, int]]):
        self.folder = folder
        folder.mkdir(parents=True)
        listed = {name: point if len(point) == 3 else (*point, 1) for name, point in points.items()}
        self.environment = {
            "OMP_NUM_THREADS": "1",
            "TEST_POINTS": json.dumps({"folder": str(folder), "points": listed}),
            "PYTHONPATH": f"{STANDING}{os.pathsep}{PYTHONPATH}",
        }

    def standing(self, name: str) -> list[int]:
        """Ids of the processes that have come to a point."""
        return sorted(int(path.name.rpartition("-")[2]) for path in self.folder.glob(f"{name}-*"))

    def wait(self, name: str, *processes: Popen | Forked, count: int = 1) -> list[int]:
        """Wait until so many processes stand at a point; their ids."""
        return wait_for(
            lambda: len(found := self.standing(name)) >= count and found, *processes, what=f"the point {name!r}"
        )

    def release(self, *names: str) -> None:
        """Let all go on that stand, or will stand, at these points."""
        for name in names:
            (self.folder / f"{name}.go").touch()
