"""A copy of the project's code as it is now, so that later edits do not reach jobs that wait in a queue.

python launchers/lib/snapshot.py     # prints where the copy is: runs/code/HASH, the same for the same code
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from ibq.config import UserError, exit_on_user_error
from ibq.files import write_text
from ibq.training.provenance import SNAPSHOT_FILE, git_state
from launchers.lib import ROOT

PARTS = ("ibq", "launchers", "tools", "yaml", "slurm", "setup.cfg", "pyproject.toml")
LEFT_OUT = {"__pycache__", "logs", "pictures"}


def code_files(root: Path = ROOT) -> list[Path]:
    """The files that make up the code, relative to the project, whether git knows them or not."""
    found = []
    for part in PARTS:
        path = root / part
        if path.is_file():
            found.append(path)
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if name not in LEFT_OUT]
            # An editor's lock is a link to nowhere.
            found += [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
    return sorted(path.relative_to(root) for path in found)


def code_hash(root: Path = ROOT) -> str:
    """Of names and contents."""
    digest = hashlib.sha256()
    for path in code_files(root):
        content = (root / path).read_bytes()
        digest.update(f"{path.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def take_snapshot(root: Path = ROOT, folder: Path | None = None) -> Path:
    """Copy the code to `folder`/HASH, whole or not at all; a copy that is there already is taken."""
    folder = root / "runs" / "code" if folder is None else folder
    target = folder / code_hash(root)
    if (target / SNAPSHOT_FILE).exists():
        return target
    temporary = folder / f".tmp-{target.name}-{os.uname().nodename}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    for path in code_files(root):
        (temporary / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, temporary / path)
    if code_hash(temporary) != target.name:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{root}: the code has been edited while it was copied; the same command copies it again")
    write_text(temporary / SNAPSHOT_FILE, json.dumps({"from": str(root), **git_state(root)}, indent=1) + "\n")
    try:
        temporary.rename(target)
    except OSError:  # another has made the same copy meanwhile
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def edited_since_submission(job: str, root: Path = ROOT) -> list[Path]:
    """Code files that are newer than a queued job: `sbatch` runs nothing at submission that could copy them."""
    try:
        said = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, check=True
        ).stdout
        words = dict(word.split("=", 1) for word in said.split() if "=" in word)
        submitted = subprocess.run(
            ["date", "-d", words["SubmitTime"], "+%s"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError, KeyError):
        return []
    return [path for path in code_files(root) if (root / path).stat().st_mtime > int(submitted) + 1]


def main(argv: Sequence[str] | None = None) -> None:
    """Take a snapshot and print its place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", metavar="ID", help="warn if files have been edited since this job was submitted")
    arguments = parser.parse_args(argv)
    if arguments.job and (edited := edited_since_submission(arguments.job)):
        names = ", ".join(map(str, edited[:5])) + (" ..." if len(edited) > 5 else "")
        print(
            f"WARNING: edited between submission and start, and taken as it is now: {names}; "
            "`bash slurm/NAME.sh` instead of `sbatch` copies the code at submission",
            file=sys.stderr,
        )
    print(take_snapshot())


if __name__ == "__main__":
    exit_on_user_error(main)
