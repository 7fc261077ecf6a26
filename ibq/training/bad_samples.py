"""What happens to samples that can't be used: named once, counted, and too many of them stop the run."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ibq import dist
from ibq.config import UserError
from ibq.data.images import BadSample
from ibq.files import append_line, keep_lines
from ibq.progress import say

SAID = 20  # so many are also named on the screen
LEAST = 1_000  # samples that a fraction is taken of, where the size of the set is unknown
FILE = "bad_samples.jsonl"


class BadSamples:
    """Counts and names the samples that were replaced, over all ranks."""

    def __init__(self, folder: Path, size: int | None, max_fraction: float):
        self.path, self.size, self.max_fraction = folder / FILE, size, max_fraction
        self.by_epoch: dict[str, int] = defaultdict(int)
        self._known: set[tuple[str, str]] = set()
        self._new: list[BadSample] = []

    def resume(self, step: int, by_epoch: dict[str, int]) -> None:
        """Go on from a checkpoint: what was noted after it is noted again."""
        self.by_epoch = defaultdict(int, by_epoch)
        if dist.is_main():
            lines = keep_lines(self.path, lambda row: row["step"] <= step)
            self._known = {(row["shard"], row["key"]) for row in lines}

    @property
    def total(self) -> int:
        """How many samples were replaced so far."""
        return sum(self.by_epoch.values())

    def report(self, samples: Sequence[BadSample]) -> None:
        """Take note of samples of this rank; `reduce` tells the others."""
        self._new += samples

    def reduce(self, step: int, position: int) -> None:
        """Count what all ranks have noted since the last call; every rank calls it. UserError if it is too much."""
        if not dist.largest(len(self._new)):
            return
        texts = dist.gather_texts(json.dumps(self._new))[:: dist.world_size() // dist.data_world_size()]
        self._new = []
        samples = sorted(
            (BadSample(*fields) for text in texts for fields in json.loads(text)), key=lambda s: s.position
        )
        for sample in samples:
            self.by_epoch[str(sample.position // self.size if self.size else 0)] += 1
            if dist.is_main():
                self._name(step, sample)
        self._check(samples, position)

    def _name(self, step: int, sample: BadSample) -> None:
        if (sample.shard, sample.key) in self._known:
            return
        self._known.add((sample.shard, sample.key))
        if len(self._known) <= SAID:
            more = f"; further ones are named in {self.path} alone" if len(self._known) == SAID else ""
            say(f"bad sample replaced: shard {sample.shard}, image {sample.key!r}: {sample.reason}{more}")
        append_line(self.path, {"step": step, **sample._asdict()})

    def _check(self, samples: Sequence[BadSample], position: int) -> None:
        among = self.size or max(LEAST, position)
        worst = max(self.by_epoch.values())
        if worst > self.max_fraction * among:
            first = samples[0]
            raise UserError(
                f"{worst:,} of {among:,} samples of an epoch could not be used, more than "
                f"data.max_bad_fraction={self.max_fraction:g}; the first of the last ones: shard {first.shard}, image "
                f"{first.key!r}: {first.reason}; all are in {self.path}; mend the data or raise the fraction"
            )
