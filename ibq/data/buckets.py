"""Pictures in their own aspect ratios: each belongs to the bucket whose shape is most like its own.

Sizes are read from the pictures' headers, once, and kept in the cache.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ibq.config import UserError
from ibq.data.index import ImageIndex
from ibq.data.order import BucketedOrder, Location, StreamOrder
from ibq.data.shards import ImageDataConfig
from ibq.data.storage import ShardStore, is_url
from ibq.data.transforms import upright_size
from ibq.files import write_array

SIZE_RULES = 1  # of what is read as a size: what older ones have left in the cache is made again
HEADER = 2**16  # bytes that hold the size of most pictures
READERS = 8  # threads, which wait for disks and networks rather than work
PIECE = 1_024  # pictures at a time
LEAST_SHARE = 1_000  # a bucket has one of so many pictures at least: as many steps are dealt to the buckets at a time

Shape = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Buckets:
    """The shapes that pictures are brought to, and the bucket of each picture of a set [N]."""

    shapes: Sequence[Shape]
    of: np.ndarray

    @cached_property
    def members(self) -> list[np.ndarray]:
        """The pictures of each bucket, in order."""
        return [np.flatnonzero(self.of == bucket) for bucket in range(len(self.shapes))]

    def mean_pixels(self) -> float:
        """Pixels of a picture, on the mean over the set."""
        return float(np.prod(self.shapes, axis=1)[self.of].mean())


def nearest(shapes: Sequence[Shape], sizes: np.ndarray) -> np.ndarray:
    """The bucket of pictures of these (height, width) [N, 2]: the nearest by the ratio of ratios, of two the first.

    A size of 0 is unknown; such pictures join the bucket that has most.
    """
    known = (sizes > 0).all(axis=1)
    ratios = np.zeros(len(sizes))
    ratios[known] = np.log(sizes[known, 0] / sizes[known, 1])
    wanted = np.log([height / width for height, width in shapes])
    buckets = np.abs(ratios[:, None] - wanted).argmin(axis=1)
    buckets[~known] = np.bincount(buckets[known], minlength=len(shapes)).argmax()
    return buckets


def bucketed(index: ImageIndex, config: ImageDataConfig, report: Callable[[int, int], None]) -> Buckets:
    """The buckets of a set's pictures; `report` is told (pictures whose size was read, pictures)."""
    return Buckets(config.buckets, nearest(config.buckets, read_sizes(index, config, report)))


# --- Sizes ---


def read_sizes(index: ImageIndex, config: ImageDataConfig, report: Callable[[int, int], None]) -> np.ndarray:
    """(height, width) of every picture as it is shown, int32 [N, 2]; 0 where it can't be read."""
    path = config.cache() / "sizes" / f"{_stamp(index)}.npy"
    try:
        sizes = np.load(path, allow_pickle=False)
        if sizes.shape == (len(index), 2):
            return sizes
    except (OSError, ValueError, EOFError):  # none, or a damaged one
        pass
    sizes, whole = _read_all(index, config.store([index]), report)
    if whole:
        with contextlib.suppress(OSError):  # no home, or a full one: they are read again the next time
            write_array(path, sizes)
    return sizes


def _stamp(index: ImageIndex) -> str:
    """What the sizes of a set depend on, as a name."""
    digest = hashlib.sha256(f"{SIZE_RULES} {index.fingerprint()}".encode())
    for number in np.unique(index.shard).tolist():
        shard = index.shards[number]
        if is_url(shard):
            state = f"{shard} {index.checks.get(shard)}"
        else:
            try:
                status = os.stat(shard)
                state = f"{os.path.abspath(shard)} {status.st_size} {status.st_mtime_ns}"
            except OSError:
                state = f"{os.path.abspath(shard)} gone"
        digest.update(f"{state}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _read_all(index: ImageIndex, store: ShardStore, report) -> tuple[np.ndarray, bool]:
    """(sizes, whether none was missed because its shard could not be had)."""
    sizes, whole = np.zeros((len(index), 2), np.int32), True

    def read(numbers: range) -> bool:
        return sum(_read_size(index, number, store, sizes) for number in numbers) == len(numbers)

    pieces = [range(start, min(start + PIECE, len(index))) for start in range(0, len(index), PIECE)]
    with ThreadPoolExecutor(READERS) as readers:
        try:
            for piece, had in zip(pieces, readers.map(read, pieces), strict=True):
                whole &= had
                report(piece.stop, len(index))
        finally:
            readers.shutdown(cancel_futures=True)
    return sizes, whole


def _read_size(index: ImageIndex, number: int, store: ShardStore, sizes: np.ndarray) -> bool:
    """Note the size of one picture; False if its shard could not be had."""
    entry = index[number]
    if entry.problem is None:
        try:
            try:
                sizes[number] = upright_size(store.head(entry, HEADER))
            except ValueError:  # more in front of the size than usual, or no picture
                if entry.size > HEADER:
                    sizes[number] = upright_size(store.read(entry))
        except OSError:
            return False
        except ValueError:
            pass
    return True


# --- Training ---


class PicturesByBucket:
    """The order of one set whose every step has pictures of one bucket; numbers are those of the whole set."""

    def __init__(self, index: ImageIndex, buckets: Buckets, *, batch_size: int, seed: int, streams: int, window: int):
        _check_filled(buckets, batch_size)
        orders = []
        for name, (shape, members) in enumerate(zip(buckets.shapes, buckets.members, strict=True)):
            part = index.subset(members)
            identity = {"images": part.fingerprint(), "shape": list(shape)}
            orders.append(
                StreamOrder(part.unit_sizes(), seed=seed, streams=streams, window=window, name=name, identity=identity)
            )
        weights = [len(members) for members in buckets.members]
        self.order, self.members = BucketedOrder(orders, weights, batch_size=batch_size, seed=seed), buckets.members
        self.size, self.streams, self.unit = self.order.size, self.order.streams, self.order.unit

    def describe(self) -> dict:
        """What the sequence depends on."""
        return self.order.describe()

    def locate(self, position: int, later: int = 0) -> Location:
        """What stands at a position, or so many turns later in the same stream of its bucket."""
        bucket, number, epoch = self.order.locate(position, later)
        return Location(0, int(self.members[bucket][number]), epoch)


def _check_filled(buckets: Buckets, batch_size: int) -> None:
    """UserError for a bucket with too few pictures for batches of its own."""
    total = len(buckets.of)
    for number, (shape, members) in enumerate(zip(buckets.shapes, buckets.members, strict=True)):
        if len(members) < max(batch_size, least := math.ceil(total / LEAST_SHARE)):
            wanted = (
                f"one batch of {batch_size:,}" if len(members) < batch_size else f"{least:,}, 1 of {LEAST_SHARE:,},"
            )
            raise UserError(
                f"data.buckets[{number}]: {len(members):,} of {total:,} training pictures are nearest to "
                f"{shape[0]} x {shape[1]}, and {wanted} are the least; leave it out, so that they go to others"
            )


def check_shapes(shapes: Sequence[Shape], factor: int, smallest: int) -> None:
    """ValueError for shapes with sides below `smallest`, or that a token of `factor` x `factor` pixels won't divide."""
    for number, (height, width) in enumerate(shapes):
        if min(height, width) < smallest:
            raise ValueError(
                f"data.buckets[{number}]: sides must be at least {smallest} pixels, got {height} x {width}"
            )
        if height % factor or width % factor:
            near = " x ".join(str(max(1, round(side / factor)) * factor) for side in (height, width))
            raise ValueError(
                f"data.buckets[{number}]: {height} x {width} are not multiples of {factor}; take such as {near}"
            )
