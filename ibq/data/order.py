"""Which samples make up which batch: a function of (seed, step) alone, whatever the number of ranks and workers."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Deals a data set of `size` samples into global batches, a fresh shuffle every epoch.

    The samples of a last, incomplete batch are left out; the shuffle leaves out others in every epoch. Rank r takes
    the r-th part of each global batch, in micro-batches: the global batch is the same for every world size.
    """

    size: int
    batch_size: int  # global
    micro_batch: int  # per rank
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        if self.size < self.batch_size:
            raise ValueError(
                f"batch_size: the global batch {self.batch_size} exceeds the {self.size} training samples; lower it"
            )
        if self.batch_size % (self.micro_batch * self.world_size):
            raise ValueError(
                f"micro_batch: the global batch {self.batch_size} does not divide into micro-batches of "
                f"{self.micro_batch} on {self.world_size} rank(s); change training.batch_size or training.micro_batch"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step."""
        return self.batch_size // (self.micro_batch * self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in one pass over the data."""
        return self.size // self.batch_size

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> np.ndarray:
        """Sample numbers [batch_size] of a step over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return _shuffled(self.size, self.seed, epoch)[start : start + self.batch_size]

    def micro_batches(self, start: int, stop: int) -> Iterator[list[tuple[int, int]]]:
        """(sample, epoch) lists of this rank's micro-batches for the steps [start, stop)."""
        share = self.batch_size // self.world_size
        for step in range(start, stop):
            mine = self.global_batch(step)[self.rank * share : (self.rank + 1) * share]
            for first in range(0, share, self.micro_batch):
                yield [(int(i), self.epoch(step)) for i in mine[first : first + self.micro_batch]]


@lru_cache(maxsize=2)
def _shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
