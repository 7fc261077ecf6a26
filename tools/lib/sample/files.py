"""The files of drawn images: pieces while they are drawn, then one set in several forms."""

import gc
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ibq.config import UserError
from ibq.files import remove, whole_file, write_text
from tools.lib.processes import context, prepare

PIECES, SET_FILE, INFO_FILE = ".pieces", "samples.npz", "samples.json"
DESCRIPTION_FILE, DESCRIPTION = ".pieces/plan.json", "plan"  # by the names that earlier runs gave them
SHARD_ROWS = 10_000  # images of a tar shard
MOST_WRITERS = 8  # processes
Form = Literal["png", "shards", "none"]  # beside the set


def begin(folder: Path, description: Mapping, *, fresh: bool) -> bool:
    """Prepare the folder for what is described; whether there is any to draw. UserError where another command's is."""
    if fresh:
        remove(folder, (INFO_FILE, PIECES, SET_FILE))  # first what says that the set is whole
    description = json.loads(json.dumps(description))
    found, pieces = _description_of(folder / INFO_FILE), (folder / DESCRIPTION_FILE).exists()
    if found == description:
        shutil.rmtree(folder / PIECES, ignore_errors=True)  # which an interruption at the very end leaves
        return False
    if (folder / INFO_FILE).exists() and not pieces:
        raise UserError(
            f"{folder}: holds the samples of another command or version{_other(found, description)}; "
            "give another --output, or --fresh"
        )
    text = json.dumps(description, indent=1, sort_keys=True) + "\n"
    if pieces and (folder / DESCRIPTION_FILE).read_text() != text:
        other = _other(json.loads((folder / DESCRIPTION_FILE).read_text()), description)
        raise UserError(
            f"{folder}: holds pieces of another command or version{other}; give another --output, or --fresh"
        )
    write_text(folder / DESCRIPTION_FILE, text)
    return True


def _description_of(path: Path) -> object:
    """What a finished set was made by; None where its file does not tell."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))[DESCRIPTION]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _other(found: object, wanted: Mapping) -> str:
    """Which of the sampler's settings are others, in parentheses."""
    try:
        pairs = [(name, found["sampler"][name], value) for name, value in wanted["sampler"].items()]
    except (KeyError, TypeError):
        return ""
    others = ", ".join(f"{name} {there}, not {here}" for name, there, here in pairs if there != here)
    return others and f" ({others})"


def piece_file(folder: Path, number: int) -> Path:
    """Where the images [n, H, W, 3] of a piece go."""
    return folder / PIECES / f"{number:06d}.npy"


def picture_file(folder: Path, number: int) -> Path:
    """Where a piece's images go as KEY.png and KEY.cls in a tar file."""
    return piece_file(folder, number).with_suffix(".tar")


class Writers:
    """Processes that compress pieces to PNG while others are drawn; they end with this one."""

    def __init__(self, folder: Path, form: Form, processes: int):
        self._folder, self._form = folder, form
        self._pool = ProcessPoolExecutor(min(MOST_WRITERS, max(1, processes)), context(), _start_writer)
        self._started: list[Future] = []

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        self._pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a process that compresses pictures was killed, perhaps for want of memory; the same command goes on"
            ) from error

    def add(self, number: int, names: Sequence[str], labels: Sequence[int]) -> None:
        """Compress a piece whose images are there, unless it is done or no form wants pictures.

        The errors are those of pieces before.
        """
        self.wait(only_done=True)
        if self._form != "none" and not picture_file(self._folder, number).exists():
            rows = list(zip(names, labels, strict=True))
            self._started.append(self._pool.submit(compress, self._folder, number, rows))

    def wait(self, *, only_done: bool = False) -> None:
        """Until all are written; OSError where one could not be."""
        for each in self._started:
            if each.done() or not only_done:
                each.result()


def _start_writer() -> None:
    """Prepare a process."""
    gc.freeze()  # what this process has of the main one's is not its to collect: streams and graphs of a GPU
    prepare()


def compress(folder: Path, number: int, rows: Sequence[tuple[str, int]]) -> None:
    """Write a piece's images, of these names and labels, as KEY.png and KEY.cls in a tar file."""
    images = np.load(piece_file(folder, number), allow_pickle=False)
    with whole_file(picture_file(folder, number)) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for (name, label), image in zip(rows, images, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            for suffix, data in (("png", buffer.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_all(folder: Path, pieces: int, labels: Sequence[int], form: Form, advance: Callable[[int], None]) -> None:
    """Put the pieces together, in ADM's form and as PNG files or shards. `advance` is called with numbers of images."""
    if form == "png":
        for member, data in _pictures(folder, pieces, advance):
            if member.name.endswith(".png"):
                (folder / member.name).write_bytes(data)
    if form == "shards":
        write_shards(folder, pieces, labels, advance)
    write_npz(folder, pieces, labels, advance)


def remove_pieces(folder: Path) -> None:
    """They are no longer needed."""
    shutil.rmtree(folder / PIECES)


def _pictures(folder: Path, pieces: int, advance: Callable[[int], None]) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The members of the pieces' tar files, two for each image, one after the other."""
    for number in range(pieces):
        with tarfile.open(picture_file(folder, number), "r:") as tar:
            for place, member in enumerate(tar):
                yield member, tar.extractfile(member).read()
                advance(place % 2)


def write_shards(folder: Path, pieces: int, labels: Sequence[int], advance: Callable[[int], None]) -> None:
    """Tar shards of KEY.png and KEY.cls, as the project's other tools read them, with the names of the classes."""
    members = _pictures(folder, pieces, advance)
    for shard in range(-(-len(labels) // SHARD_ROWS)):
        with whole_file(folder / f"samples-{shard:05d}.tar") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for _, (member, data) in zip(range(2 * SHARD_ROWS), members, strict=False):
                tar.addfile(member, io.BytesIO(data))
    write_text(folder / "classes.json", json.dumps([str(number) for number in range(max(labels) + 1)]) + "\n")


def write_npz(folder: Path, pieces: int, labels: Sequence[int], advance: Callable[[int], None]) -> None:
    """`arr_0` uint8 [N, H, W, 3] and `arr_1` the classes: ADM's form; never in memory as a whole."""
    first = np.load(piece_file(folder, 0), mmap_mode="r", allow_pickle=False)
    with whole_file(folder / SET_FILE) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            shape = (len(labels), *first.shape[1:])
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for number in range(pieces):
                images = np.load(piece_file(folder, number), allow_pickle=False)
                member.write(images.data)
                advance(len(images))
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64), allow_pickle=False)
