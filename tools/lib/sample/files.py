"""The files that `tools/sample.py` writes: pieces while it runs, then one set of images in several forms."""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ibq.config import UserError
from ibq.files import remove, whole_file, write_array, write_text

PIECES, PLAN_FILE, SET_FILE, INFO_FILE = ".pieces", ".pieces/plan.json", "samples.npz", "samples.json"
SHARD_ROWS = 10_000  # images of a tar shard


def begin(folder: Path, plan: Mapping[str, Any], *, fresh: bool) -> None:
    """Prepare the folder for the pieces of a plan; UserError if another command's are there."""
    if fresh:
        remove(folder, (PIECES, SET_FILE, INFO_FILE))
    if (folder / INFO_FILE).exists() and not (folder / PLAN_FILE).exists():
        if _plan_of(folder / INFO_FILE) != json.loads(json.dumps(plan)):
            raise UserError(f"{folder}: holds the samples of another command; give another --output, or --fresh")
        return
    text = json.dumps(plan, indent=1, sort_keys=True) + "\n"
    if (folder / PLAN_FILE).exists() and (folder / PLAN_FILE).read_text() != text:
        raise UserError(f"{folder}: holds pieces of another command; give another --output, or --fresh")
    write_text(folder / PLAN_FILE, text)


def _plan_of(path: Path) -> object:
    """What a finished set was made by; None where its file does not tell."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["plan"]
    except (ValueError, KeyError, TypeError):
        return None


def piece_file(folder: Path, number: int) -> Path:
    """Where the images [n, H, W, 3] of a piece go."""
    return folder / PIECES / f"{number:06d}.npy"


def write_piece(folder: Path, number: int, images: np.ndarray) -> None:
    """Write the images of a piece, whole or not at all."""
    write_array(piece_file(folder, number), images)


def missing_pieces(folder: Path, count: int) -> list[int]:
    """The pieces that are still to be drawn."""
    return [number for number in range(count) if not piece_file(folder, number).exists()]


def write_set(
    folder: Path,
    pieces: int,
    labels: Sequence[int],
    names: Sequence[str],
    info: Mapping[str, Any],
    *,
    classes: Sequence[str],
    form: str,
    advance: Callable[[int], None],
) -> None:
    """Put the pieces together: samples.npz in ADM's form, and PNG files or shards; then they are removed.

    samples.npz: `arr_0` uint8 [N, H, W, 3] and `arr_1` the classes; never in memory as a whole.
    """
    if form == "png":
        for name, image in zip(names, _images(folder, pieces, advance), strict=True):
            Image.fromarray(image).save(folder / f"{name}.png")
    if form == "shards":
        _write_shards(folder, pieces, labels, names, classes, advance)
    _write_npz(folder, pieces, labels, advance)
    write_text(folder / INFO_FILE, json.dumps(info, indent=1) + "\n")
    shutil.rmtree(folder / PIECES)


def _images(folder: Path, pieces: int, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    for number in range(pieces):
        images = np.load(piece_file(folder, number), allow_pickle=False)
        yield from images
        advance(len(images))


def _write_shards(folder: Path, pieces: int, labels, names, classes: Sequence[str], advance) -> None:
    """Tar shards of KEY.png and KEY.cls, as the project's other tools read them, with their index."""
    rows = zip(names, labels, _images(folder, pieces, advance), strict=True)
    for shard in range(-(-len(names) // SHARD_ROWS)):
        with whole_file(folder / f"samples-{shard:05d}.tar") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for _, (name, label, image) in zip(range(SHARD_ROWS), rows, strict=False):
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "PNG")
                for suffix, data in (("png", buffer.getvalue()), ("cls", str(int(label)).encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    write_text(folder / "classes.json", json.dumps(list(classes)) + "\n")


def _write_npz(folder: Path, pieces: int, labels: Sequence[int], advance) -> None:
    first = np.load(piece_file(folder, 0), mmap_mode="r", allow_pickle=False)
    with whole_file(folder / SET_FILE) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            shape = (len(labels), *first.shape[1:])
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for number in range(pieces):
                images = np.load(piece_file(folder, number), allow_pickle=False)
                member.write(images.tobytes())
                advance(len(images))
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64), allow_pickle=False)
