"""Files and folders that are either whole or absent."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its place when it is whole and on the disk; its folder is made where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, whole or not at all."""
    with whole_file(path) as file:
        np.save(file, array, allow_pickle=False)


def append_line(path: Path, row: Mapping) -> None:
    """Add a row to a JSONL file, whole or not at all; a half-written last line, as a kill leaves it, is ended first."""
    line = json.dumps(row).encode() + b"\n"
    with open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:  # a full disk takes a part of it
            file.truncate(size)
            raise


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSONL file, none where there is no file; a damaged line, as a kill leaves it, is left out."""
    return _rows_of(path.read_text(errors="replace")) if path.is_file() else []


def _rows_of(text: str) -> list[dict]:
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                rows.append(row)
    return rows


def keep_lines(path: Path, wanted: Callable[[dict], bool]) -> list[dict]:
    """Keep only the wanted rows of a JSONL file, and return them; a damaged line is dropped."""
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    rows = []
    for row in _rows_of(text):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if wanted(row):
                rows.append(row)
    kept = "".join(json.dumps(row) + "\n" for row in rows)
    if kept != text:
        write_text(path, kept)
    return rows


def lock(file: IO, *, wait: bool = False, of_process: bool = False) -> bool:
    """Lock an open file until it is closed; False if another has it. OSError on a file system without locks.

    The lock is that of this opening: processes forked from here hold it too, and a second opening, even in the same
    process, does not get it. With `of_process` it is this process's alone, and ends with it while forked ones live on.
    """
    try:
        (fcntl.lockf if of_process else fcntl.flock)(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk: a rename is not safe from a power cut before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fresh_folder(target: Path) -> Path:
    """An empty folder beside `target` to fill before `replace_folder`."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def replace_folder(temporary: Path, target: Path) -> None:
    """Put a filled folder in the place of `target`, which at no moment is missing for longer than a rename."""
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Undo a `replace_folder` that was killed between its two renames."""
    old = target.with_name(f".old-{target.name}")
    if old.exists() and not target.exists():
        old.rename(target)


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove these files and folders, where they are, and nothing else."""
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
