"""Where a run comes from: code, packages, machine and command, one line for each start in the run's folder."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from ibq.files import append_line, write_text

ROOT = Path(__file__).resolve().parents[2]
FILE = "starts.jsonl"
PACKAGES_FILE = "packages.txt"  # of the last start
SNAPSHOT_FILE = "snapshot.json"  # in a copy of the code, what git said of the original
# Variables that say how the run was started; what may be secret stays out.
KEPT = re.compile(r"(SLURM|NCCL|GLOO|TORCH|CUDA|OMP|MKL|MASTER|RANK|WORLD|LOCAL|IBQ|DS|PYTORCH|FI|UCX)(_|$)")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY|AUTH|JWT", re.IGNORECASE)


def git_state(root: Path) -> dict[str, str | bool | None]:
    """Revision of a working tree and whether it has been edited since; of a snapshot, what it was made from."""
    if (root / SNAPSHOT_FILE).exists():
        said = json.loads((root / SNAPSHOT_FILE).read_text())
        return {"revision": said["revision"], "edited": said["edited"]}

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    revision = git("rev-parse", "HEAD") if (root / ".git").exists() and shutil.which("git") else None
    changes = git("status", "--porcelain") if revision else None
    return {"revision": revision, "edited": None if changes is None else bool(changes)}


def start_record(root: Path) -> dict:
    """What is known of this start."""
    # Here, for launchers/lib/snapshot.py and submissions want only `git_state`, and not to wait for PyTorch.
    import torch

    from ibq import dist

    kept = {name: value for name, value in sorted(os.environ.items()) if KEPT.match(name) and not SECRET.search(name)}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [sys.executable, *sys.argv],
        "folder": str(Path.cwd()),
        "code": str(root),
        **git_state(root),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "host": platform.node(),
        "ranks": dist.world_size(),
        "environment": kept,
    }


def origin(command: str) -> dict:
    """What a file of figures says of where they come from: command, code, PyTorch's version and machine."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "command": command,
        **git_state(ROOT),
        "torch": torch.__version__,
        "cpu": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def version_of(package: str) -> str | None:
    """The version that is installed, if any is."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def packages() -> list[str]:
    """NAME==VERSION of all that is installed.

    Read from the heads of their descriptions: to parse these wholly takes as long as some steps of training.
    """
    found = set()
    for each in distributions():
        head = (each.read_text("METADATA") or each.read_text("PKG-INFO") or "").partition("\n\n")[0]
        fields = dict(re.findall(r"^(Name|Version): *(.*?)\r?$", head, flags=re.MULTILINE))
        if len(fields) == 2:
            found.add(f"{fields['Name']}=={fields['Version']}")
    return sorted(found, key=str.lower)


def record_start(folder: Path) -> None:
    """Add this start to the run's list; rank 0 alone does it. A full disk is no reason to fail here."""
    from ibq import dist  # as above

    if not dist.is_main():
        return
    try:
        append_line(folder / FILE, start_record(ROOT))
        write_text(folder / PACKAGES_FILE, "\n".join(packages()) + "\n")
    except OSError:
        return
