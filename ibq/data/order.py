"""Which samples make up which batch: a function of seed and position alone, whatever the ranks and workers.

A position counts the samples that a run has taken since its start. With V streams, position P is a turn of stream
P mod V. In every epoch the shards are shuffled and laid in a row, the row is cut into V equal pieces, and the pieces
are dealt to the streams; a stream reads its piece in windows that are shuffled within. Nothing has to be replayed to
go on at any position, and an epoch is exact: N positions hold each of the N samples once.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np

CYCLE = 1_000  # turns of a stream, or steps, over which several data sets are mixed exactly
SHARDS, PIECES, ROTATION, WINDOW, MIXTURE, BUCKETS = range(6)  # what a shuffle is about


class Location(NamedTuple):
    """What stands at a position."""

    source: int  # which of several data sets
    number: int  # which of its samples
    epoch: int  # how often the set has been gone through before


class Order(Protocol):
    """A never-ending sequence of samples, dealt to streams in turn."""

    size: int | None  # samples in one epoch, where that is known
    streams: int
    unit: int  # steps begin at multiples of it

    def locate(self, position: int, later: int = 0) -> Location:
        """What stands at a position, from 0, or so many turns later in the same stream."""

    def describe(self) -> dict:
        """What the sequence depends on, for the checkpoint."""


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) that depends on `key` alone, in every version of NumPy.

    NumPy promises this for the raw bits of its generators, not for what it makes of them.
    """
    return np.argsort(_random_bits(count, *key), kind="stable").astype(np.int32 if count < 2**31 else np.int64)


def _random_bits(count: int, *key: int) -> np.ndarray:
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)


class StreamOrder:
    """The order of one data set.

    `unit_sizes`: samples per shard, in the order of the samples' numbers; `window`: samples of a stream that are
    shuffled among each other. `name` tells several sets of one run apart; `identity` says what the samples are.
    """

    unit = 1

    def __init__(
        self,
        unit_sizes: Sequence[int],
        *,
        seed: int,
        streams: int,
        window: int,
        name: int = 0,
        identity: Mapping = MappingProxyType({}),
    ):
        self.unit_sizes = np.asarray(unit_sizes, dtype=np.int64)
        self.size = int(self.unit_sizes.sum())
        self.seed, self.streams, self.window, self.name, self.identity = seed, streams, window, name, dict(identity)
        if self.size < 1:
            raise ValueError("there is no sample to order")
        self._first_numbers = np.cumsum(self.unit_sizes) - self.unit_sizes
        self._windows: dict[int, tuple[tuple[int, int], np.ndarray]] = {}  # stream -> (epoch, window), its numbers
        self._layout = lru_cache(maxsize=2)(self._make_layout)

    def __getstate__(self):
        # For worker processes that are spawned; the caches are made again.
        return {**self.__dict__, "_windows": {}, "_layout": None}

    def __setstate__(self, state):
        self.__dict__ = state
        self._layout = lru_cache(maxsize=2)(self._make_layout)

    def describe(self) -> dict:
        """What the sequence depends on."""
        own = {"size": self.size, "seed": self.seed, "streams": self.streams, "window": self.window}
        return own | self.identity

    def locate(self, position: int, later: int = 0) -> Location:
        """What stands at a position, or so many turns later in the same stream."""
        position += later * self.streams
        epoch, place = divmod(position, self.size)
        stream = position % self.streams
        turn, first = self._turn(epoch, place, stream)
        window, within = divmod(turn, self.window)
        cached = self._windows.get(stream)
        if cached is None or cached[0] != (epoch, window):
            cached = (epoch, window), self._make_window(epoch, stream, first, window)
            self._windows[stream] = cached
        return Location(0, int(cached[1][within]), epoch)

    def _turn(self, epoch: int, place: int, stream: int) -> tuple[int, int]:
        """(turn of the stream within the epoch, the epoch's first place of the stream)."""
        first = (stream - epoch * self.size) % self.streams
        return (place - first) // self.streams, first

    def _turns(self, first) -> np.ndarray:
        """How many places of an epoch belong to the streams whose first place is given."""
        return np.maximum(0, -((first - self.size) // self.streams))

    def _make_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None, int, np.ndarray]:
        """(shards in the epoch's order, where each begins in the row, the row's rotation, where each piece begins)."""
        units = shuffled(len(self.unit_sizes), self.seed, self.name, epoch, SHARDS)
        singles = bool((self.unit_sizes == 1).all())  # every sample is a shard of its own: nothing to look up
        begins = None if singles else np.cumsum(self.unit_sizes[units]) - self.unit_sizes[units]
        pieces = shuffled(self.streams, self.seed, self.name, epoch, PIECES)
        lengths = self._turns((np.arange(self.streams) - epoch * self.size) % self.streams)[pieces]
        piece_begins = np.empty(self.streams, np.int64)
        piece_begins[pieces] = np.cumsum(lengths) - lengths
        # The row begins anywhere, so that pieces are not cut at the same samples in every epoch.
        rotation = _random_bits(1, self.seed, self.name, epoch, ROTATION)[0] % np.uint64(self.size)
        return units, begins, int(rotation), piece_begins

    def _make_window(self, epoch: int, stream: int, first: int, window: int) -> np.ndarray:
        """The sample numbers of one window of a stream, shuffled."""
        units, begins, rotation, piece_begins = self._layout(epoch)
        length = int(self._turns(np.int64(first)))
        turns = np.arange(window * self.window, min((window + 1) * self.window, length))
        row = (piece_begins[stream] + turns + rotation) % self.size
        if begins is None:
            numbers = units[row]
        else:
            at = np.searchsorted(begins, row, side="right") - 1
            # An empty shard begins where the next one does; the search finds the last of them, which has samples.
            numbers = self._first_numbers[units[at]] + row - begins[at]
        return numbers[shuffled(len(row), self.seed, self.name, epoch, WINDOW, stream, window)]


class MixedOrder:
    """Several data sets mixed by weight: of every 1,000 turns of a stream each set gets its share exactly."""

    unit = 1

    def __init__(self, orders: Sequence[StreamOrder], weights: Sequence[float], *, seed: int):
        self.orders, self.weights, self.seed = list(orders), [float(w) for w in weights], seed
        self.streams, self.size = _common_streams(orders), sum(order.size for order in orders)
        self._mixture = _Mixture(self.weights, seed, MIXTURE)

    def describe(self) -> dict:
        """What the sequence depends on."""
        return {
            "size": self.size,
            "seed": self.seed,
            "streams": self.streams,
            "weights": self.weights,
            "sources": [order.describe() for order in self.orders],
        }

    def locate(self, position: int, later: int = 0) -> Location:
        """What stands at a position, or so many turns later in the same stream."""
        turn, stream = divmod(position + later * self.streams, self.streams)
        source, own_turn = self._mixture.locate(turn, stream)
        return self.orders[source].locate(own_turn * self.streams + stream)._replace(source=source)


class BucketedOrder:
    """Several data sets mixed by weight, a step at a time: a batch whose samples must be alike comes from one of them.

    Step k takes positions k * batch_size to (k + 1) * batch_size, and of every 1,000 steps each set ("bucket") gets its
    share exactly. A bucket's own steps follow each other in its own order, so that its epochs are exact.
    """

    def __init__(self, orders: Sequence[StreamOrder], weights: Sequence[float], *, batch_size: int, seed: int):
        self.orders, self.weights, self.seed = list(orders), [float(w) for w in weights], seed
        self.streams, self.size = _common_streams(orders), sum(order.size for order in orders)
        self.batch_size = self.unit = batch_size
        self._mixture = _Mixture(self.weights, seed, BUCKETS)

    def describe(self) -> dict:
        """What the sequence depends on."""
        return {
            "size": self.size,
            "seed": self.seed,
            "streams": self.streams,
            "batch_size": self.batch_size,
            "weights": self.weights,
            "buckets": [order.describe() for order in self.orders],
        }

    def locate(self, position: int, later: int = 0) -> Location:
        """What stands at a position, or so many turns later in the same stream of its bucket."""
        step, within = divmod(position, self.batch_size)
        bucket, own_step = self._mixture.locate(step)
        # A rank owns the same streams of every bucket: the position is shifted by whole batches, see Batching.
        return self.orders[bucket].locate(own_step * self.batch_size + within, later)._replace(source=bucket)


def _common_streams(orders: Sequence[StreamOrder]) -> int:
    streams = orders[0].streams
    assert all(order.streams == streams for order in orders)
    return streams


class _Mixture:
    """Which of several sets a turn is for: of every CYCLE turns each gets its share by weight exactly."""

    def __init__(self, weights: Sequence[float], seed: int, kind: int):
        self.seed, self.kind = seed, kind
        self._counts = _shares(weights, CYCLE)
        self._cycles: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}  # stream -> its cycle that was asked for last

    def locate(self, turn: int, stream: int = 0) -> tuple[int, int]:
        """(the set that a turn of a stream is for, how many turns of the stream were for that set before)."""
        cycle, within = divmod(turn, CYCLE)
        cached = self._cycles.get(stream)
        if cached is None or cached[0] != cycle:
            cached = self._cycles[stream] = (cycle, *self._make_cycle(stream, cycle))
        source = int(cached[1][within])
        return source, cycle * self._counts[source] + int(cached[2][within])

    def _make_cycle(self, stream: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """(source of each turn of the cycle, how many turns of that source came before in the cycle)."""
        sources = np.repeat(np.arange(len(self._counts)), self._counts)
        sources = sources[shuffled(CYCLE, self.seed, stream, cycle, self.kind)]
        before = np.empty(CYCLE, np.int64)
        for source, count in enumerate(self._counts):
            before[sources == source] = np.arange(count)
        return sources, before


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total` (largest remainders)."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(value) for value in exact]
    for index in sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])[: total - sum(counts)]:
        counts[index] += 1
    if min(counts) < 1:
        raise ValueError(f"a weight is below 1/{total} of all; raise it or leave the set out")
    return counts


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How the positions of an order become batches.

    A step takes the next `batch_size` positions. Ranks own streams: with G = gcd(batch_size, streams), the streams of
    equal stream mod G go to the same rank, so that every rank gets its share of every batch. The ranks' parts, one
    after the other, are the batch of one process.
    """

    batch_size: int  # global
    micro_batch: int  # per rank
    streams: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        if self.batch_size % (self.micro_batch * self.world_size):
            raise ValueError(
                f"micro_batch: the global batch {self.batch_size} does not divide into micro-batches of "
                f"{self.micro_batch} on {self.world_size} rank(s); change training.batch_size or training.micro_batch"
            )
        if self.streams % self.world_size:
            raise ValueError(
                f"streams: {self.streams} streams cannot be shared by {self.world_size} ranks; set data.streams to a "
                f"multiple of {self.world_size}, such as {math.ceil(self.streams / self.world_size) * self.world_size}"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step."""
        return self.batch_size // (self.micro_batch * self.world_size)

    def positions(self, start: int) -> list[int]:
        """This rank's positions of the step that begins at position `start`."""
        groups = math.gcd(self.batch_size, self.streams)
        own = range(self.rank * groups // self.world_size, (self.rank + 1) * groups // self.world_size)
        stop = start + self.batch_size
        return [p for group in own for p in range(start + (group - start) % groups, stop, groups)]

    def micro_batches(self, position: int, steps: int) -> Iterator[list[int]]:
        """Positions of this rank's micro-batches, for so many steps from `position` on."""
        for step in range(steps):
            mine = self.positions(position + step * self.batch_size)
            for first in range(0, len(mine), self.micro_batch):
                yield mine[first : first + self.micro_batch]
