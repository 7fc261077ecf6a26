"""What happens to samples that can't be used: named once, counted, and too many of them stop the run."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ibq import dist
from ibq.config import UserError
from ibq.data.counts import BadSample
from ibq.files import append_line, keep_lines
from ibq.progress import say

SAID = 20  # so many are also named on the screen
LEAST = 1_000  # samples that a fraction is taken of, where the size of the set is unknown
FILE = "bad_samples.jsonl"
TRAIN, VALIDATION = "train", "validation"


class BadSamples:
    """Counts and names the samples that were replaced, over all ranks."""

    def __init__(self, folder: Path, size: int | None, max_fraction: float):
        self.path, self.size, self.max_fraction = folder / FILE, size, max_fraction
        self.by_epoch: dict[str, int] = defaultdict(int)
        self._known: dict[tuple, BadSample] = {}  # (set, shard, key, number), on rank 0
        self._new: list[BadSample] = []

    def resume(self, step: int, by_epoch: dict[str, int]) -> None:
        """Go on from a checkpoint: what was noted after it is noted again."""
        self.by_epoch = defaultdict(int, by_epoch)
        if dist.is_main():
            lines = keep_lines(self.path, lambda row: row["step"] <= step)
            for row in lines:
                sample = BadSample(**{name: row[name] for name in BadSample._fields if name in row})
                self._known[_identity(row.get("set", TRAIN), sample)] = sample

    @property
    def total(self) -> int:
        """How many samples were replaced so far."""
        return sum(self.by_epoch.values())

    def report(self, samples: Sequence[BadSample]) -> None:
        """Take note of samples of this rank; `reduce` tells the others."""
        self._new += samples

    def reduce(self, step: int, position: int) -> None:
        """Count what all ranks have noted since the last call; every rank calls it. UserError if it is too much."""
        new, self._new = self._new, []
        samples = _of_all_ranks(new)
        for sample in samples:
            self.by_epoch[str(sample.position // self.size if self.size else 0)] += 1
            self._name(step, sample, TRAIN, "bad sample replaced")
        if samples:
            self._check(samples, position)

    def validation(self, step: int, samples: Sequence[BadSample]) -> None:
        """Name what this rank's share of a validation is without; every rank calls it."""
        for sample in _of_all_ranks(samples):
            self._name(step, sample, VALIDATION, "left out of the validation")

    def _name(self, step: int, sample: BadSample, part: str, what: str) -> None:
        if not dist.is_main() or _identity(part, sample) in self._known:
            return
        self._known[_identity(part, sample)] = sample
        if len(self._known) <= SAID:
            more = f"; further ones are named in {self.path} alone" if len(self._known) == SAID else ""
            say(f"{what}: shard {sample.shard}, image {sample.key!r}: {sample.reason}{more}")
        append_line(self.path, {"step": step, "set": part, **sample._asdict()})

    def named(self, part: str) -> list[BadSample]:
        """All that were named of a set (TRAIN, VALIDATION), on rank 0."""
        return [sample for identity, sample in self._known.items() if identity[0] == part]

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


def _identity(part: str, sample: BadSample) -> tuple:
    return part, sample.shard, sample.key, sample.number


def _of_all_ranks(samples: Sequence[BadSample]) -> list[BadSample]:
    """What the ranks have found, in the order of positions; those that share their data tell it once."""
    if not dist.largest(len(samples)):
        return []
    texts = dist.gather_texts(json.dumps(samples))[:: dist.world_size() // dist.data_world_size()]
    return sorted((BadSample(*fields) for text in texts for fields in json.loads(text)), key=lambda s: s.position)
