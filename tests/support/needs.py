"""Programs that some tests need beyond Python and pip, and Debian's package of each.

    @pytest.mark.needs("g++", "libaio")

A test is skipped with one line where something is missing, and the end of the run says what to install; with
IBQ_ALL_TESTS=1, as in CI, it fails instead.
"""

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

PACKAGES = {
    "g++": "g++",
    "libaio": "libaio-dev",
    "curl": "curl",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "munged": "munge",
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
}
SLURM = ("root", "slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter")
NVME = ("g++", "libaio")  # which DeepSpeed compiles its operators with
BROWSER = ("chromium", "chromedriver")
SMALL_DISK = ("unshare", "nsenter", "mount namespaces")
REMEDIES = {
    "root": "run the tests as root",
    "mount namespaces": "run the tests as root, or allow user namespaces",
}


def is_there(name: str) -> bool:
    """Whether the tests can use it here."""
    match name:
        case "root":
            return os.geteuid() == 0
        case "mount namespaces":
            command = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else []), "true"]
            return not is_there("unshare") or subprocess.run(command, capture_output=True).returncode == 0
        case "libaio":
            return any(Path(folder, "libaio.h").exists() for folder in ("/usr/include", "/usr/local/include"))
        case _:
            # Slurm's daemons lie where not every user's PATH leads.
            return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None


def missing(*names: str) -> str:
    """One line that says what is missing of these and the remedy; empty if nothing is."""
    absent = [name for name in names if not is_there(name)]
    if not absent:
        return ""
    packages = dict.fromkeys(PACKAGES[name] for name in absent if name in PACKAGES)
    remedies = [f"apt-get install {' '.join(packages)}"] if packages else []
    remedies += [REMEDIES[name] for name in absent if name in REMEDIES]
    return f"needs {', '.join(absent)}: {'; '.join(remedies)}"


def require(*names: str) -> None:
    """Skip the test or fixture that calls this, or fail it under IBQ_ALL_TESTS=1, unless all of these are there."""
    if line := missing(*names):
        if os.environ.get("IBQ_ALL_TESTS", "") in ("", "0"):
            pytest.skip(line)
        pytest.fail(f"IBQ_ALL_TESTS=1: {line}", pytrace=False)


# What pytest calls; see tests/conftest.py.


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Look at what a test is marked with before its fixtures are made."""
    require(*dict.fromkeys(name for mark in item.iter_markers("needs") for name in mark.args))


def pytest_terminal_summary(terminalreporter) -> None:
    """Say once for each remedy how many tests were skipped for want of it."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple)]
    found = Counter(match[0] for reason in reasons if (match := re.search(r"needs .*: .*", reason)))
    if found:
        terminalreporter.section("skipped for want of programs")
    for line, count in sorted(found.items()):
        terminalreporter.line(f"{count} skipped: {line}")
