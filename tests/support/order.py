"""How the tests are spread over processes: file by file, those first that took longest, as many as fit this machine.

    python -m pytest -n auto --write-durations tests/durations.json      measures anew

The file has the seconds of every test file, set-up and all, and those of the slowest tests.
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from support import ROOT

DURATIONS = ROOT / "tests" / "durations.json"
GIB_OF_A_WORKER = 4  # with the processes that its tests start
SLOWEST = 50
measured: Counter[str] = Counter()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Three for two cores that are ours, as many tests wait for clocks and Slurm; one for each share of the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores + cores // 2, int(memory / GIB_OF_A_WORKER)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long files first where several processes share the tests; one that is not known counts as long."""
    if hasattr(config, "workerinput"):
        seconds = json.loads(DURATIONS.read_text())["files"]
        items.sort(key=lambda item: -seconds.get(file_of(item.nodeid), 1e6))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes the durations."""
    parser.addoption("--write-durations", type=Path, metavar="FILE", help="write how long files and tests took")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up set-up, call and teardown; the controller gets the reports of all processes."""
    measured[report.nodeid] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what has been measured, if that is wanted."""
    path = session.config.getoption("write_durations")
    if path is None or hasattr(session.config, "workerinput"):
        return
    files: Counter[str] = Counter()
    for name, seconds in measured.items():
        files[file_of(name)] += seconds
    found = {"files": files.most_common(), "tests": measured.most_common(SLOWEST)}
    rounded = {kind: {name: round(seconds, 1) for name, seconds in pairs} for kind, pairs in found.items()}
    path.write_text(json.dumps(rounded, indent=1) + "\n")


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]
