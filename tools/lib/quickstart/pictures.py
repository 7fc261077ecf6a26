"""The pictures of the quickstart: as many of a large set as its time allows, small, in shards of its own."""

import contextlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ibq.config import UserError
from ibq.data.index import ImageEntry, ImageIndex, write_shard_index
from ibq.data.order import shuffled
from ibq.data.shards import CLASSES_FILE
from ibq.data.transforms import decode_rgb
from ibq.files import whole_file, write_text
from ibq.progress import progress_bar, say
from tools.lib import cores
from tools.make_shards import add_member

PIXELS = 64  # of the shorter side: twice what the tokenizer sees
MOST_VALIDATION = 400
HELD_OUT = 10  # every so many-th is for validation, until those are enough
SHARDS = 10  # of training pictures: the first of them hold about equally many of every class, too
LEAST = 100  # pictures that are taken whatever the time
AT_ONCE = 32  # that are decoded between two looks at the clock


def in_turn(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, turns): one picture of every class, another of each, and so on; drawn at random, the same every time.

    Any beginning of it holds about equally many of every class.
    """
    drawn = shuffled(len(labels), 0)
    drawn = drawn[np.argsort(labels[drawn], kind="stable")]
    ordered = labels[drawn]
    turns = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    places = np.lexsort((ordered, turns))
    return drawn[places], turns[places]


def splits(labels: np.ndarray, turns: np.ndarray, most_training: int) -> Iterator[tuple[int, str]]:
    """(place in the order, "train" or "val") until both are full; the first of a class is for training."""
    train = validation = 0
    for place, (label, turn) in enumerate(zip(labels.tolist(), turns.tolist(), strict=True)):
        held_out = turn and (turn + label) % HELD_OUT == HELD_OUT - 1 and validation < MOST_VALIDATION
        if held_out:
            validation += 1
        elif train < most_training:
            train += 1
        else:
            return
        yield place, "val" if held_out else "train"


def prepare(index: ImageIndex, folder: Path, *, most: int, in_time: Callable[[], bool]) -> dict[str, int]:
    """Write shards train-0000?.tar and val-00000.tar, of at most `most` training pictures; how many there are of what.

    It opens no more when `in_time()` says no. UserError where too few can be read.
    """
    usable = np.setdiff1d(np.arange(len(index)), [number for number, _ in index.problems()])
    order, turns = in_turn(index.label[usable])
    numbers = usable[order]
    plan = list(splits(index.label[numbers], turns, most))
    found: dict[str, list] = {"train": [], "val": []}
    opened, loading = 0, _loading(index, numbers[[place for place, _ in plan]])
    with progress_bar("open pictures", len(plan), "image") as bar, contextlib.closing(loading):
        while opened < len(plan) and (opened < LEAST or in_time()):
            for (place, split), data in zip(plan[opened : opened + AT_ONCE], loading, strict=False):
                if data is not None:
                    found[split].append((f"{place:07d}", int(index.label[numbers[place]]), data))
                opened += 1
                bar.update()
    _write(folder, index.classes, found)
    read = sum(map(len, found.values()))
    return {
        "found": len(index),
        "training": len(found["train"]),
        "validation": len(found["val"]),
        "unreadable": opened - read + len(index) - len(usable),
        "classes": len({label for _, label, _ in found["train"]}),
        "classes_found": len(index.classes),
    }


def _loading(index: ImageIndex, numbers: np.ndarray) -> Iterator[bytes | None]:
    """The pictures, AT_ONCE at a time, small; None for one that can't be read. The first of those is named."""
    from ibq.data.storage import ShardStore

    store, told = ShardStore(checks=index.checks, retries=0), False
    with ThreadPoolExecutor(cores()) as pool:
        for first in range(0, len(numbers), AT_ONCE):
            part = numbers[first : first + AT_ONCE].tolist()
            for number, data in zip(part, pool.map(lambda number: _small(store, index[number]), part), strict=True):
                if isinstance(data, bytes):
                    yield data
                    continue
                if not told:
                    say(f"left out: {index.key(number)}: {data}; others that can't be read are only counted")
                told = True
                yield None


def _small(store, entry: ImageEntry) -> bytes | str:
    """A picture as PNG, of at most PIXELS on its shorter side; or why it can't be read."""
    try:
        image = decode_rgb(store.read(entry), enough=2 * PIXELS)
    except (OSError, ValueError) as error:
        return str(error)
    shorter, buffer = min(image.size), io.BytesIO()
    if shorter > PIXELS:
        size = [max(1, round(side * PIXELS / shorter)) for side in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS)
    image.info = {}  # a colour profile is not that of the RGB pixels
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _write(folder: Path, classes: Sequence[str], found: dict[str, list]) -> None:
    """The shards, of the classes that there are training pictures of."""
    present = sorted({label for _, label, _ in found["train"]})
    numbers = {label: number for number, label in enumerate(present)}
    if not found["val"] and len(found["train"]) > 1:
        found["val"].append(found["train"].pop())  # classes of one picture each
    for split, rows in found.items():
        rows = [(key, numbers[label], data) for key, label, data in rows if label in numbers]
        if not rows:
            raise UserError("too few pictures can be read; give at least 50")
        shards = min(SHARDS, len(rows)) if split == "train" else 1
        for shard, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
            _write_shard(folder / f"{split}-{shard:05d}.tar", rows[part[0] : part[-1] + 1])
    write_text(folder / CLASSES_FILE, json.dumps([classes[label] for label in present], indent=1) + "\n")


def _write_shard(shard: Path, rows: Sequence[tuple[str, int, bytes]]) -> None:
    """A tar file of (key, label, PNG), and its index."""
    with whole_file(shard) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for key, label, data in rows:
            add_member(tar, f"{key}.png", data)
            add_member(tar, f"{key}.cls", str(label).encode())
    write_shard_index(shard)
