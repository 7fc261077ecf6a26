"""What became of the pictures of a place: found = used + left out, by reason."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ibq.data.index import ImageIndex

BESIDE, UNLABELLED = "beside the class folders", "label missing or impossible"
DAMAGED = "damaged or not readable"
# How problems begin, as the index and the decoders tell them -> the reason that a count sums up by.
REASONS = (
    (r"the label is missing: it lies beside", BESIDE),
    (r"no label|the label", UNLABELLED),
    (r"\.\w+ files are not read", "of a kind that is not read"),
    (r"no picture: a key ends", "several dots in the name"),
    (r"no picture", "label without a picture"),
    (r"several members of one key", "several pictures of one key"),
    (r"a sparse file", "sparse in the shard"),
    (r"(.* is )?a link to ", "link to what is not there"),
    (r"the shard is|what is no tar member|cannot read shard", "shard damaged"),
)


class BadSample(NamedTuple):
    """A sample that can't be used, and why."""

    shard: str
    key: str
    reason: str
    position: int = -1  # in the order of the training data
    number: int = -1  # in its set


def reason_of(problem: str) -> str:
    """What a count calls the problem of one picture."""
    return next((reason for beginning, reason in REASONS if re.match(beginning, problem)), DAMAGED)


@dataclass(frozen=True)
class PictureCount:
    """Pictures of a place, each of which is used or left out for one reason."""

    found: int
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def used(self) -> int:
        """Those that were not left out."""
        return self.found - sum(self.left_out.values())

    def __str__(self) -> str:
        lost = sum(self.left_out.values())
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(self.left_out.items()))
        return f"{self.found:,} pictures found = {self.used:,} used + {lost:,} left out{reasons and f' ({reasons})'}"

    def to_json(self) -> dict:
        """The same for a file."""
        return {"found": self.found, "used": self.used, "left_out": dict(sorted(self.left_out.items()))}


def count(index: ImageIndex, *, used: int | None = None, bad: Iterable[BadSample] = ()) -> PictureCount:
    """The pictures of a set, and those of its place that are not in it.

    What only reading can tell: `bad` are the samples that could not be used, or `used` is the number of those that
    could; those that the index knows already may be among `bad` or not.
    """
    problems = dict(index.problems())
    left_out = Counter(index.elsewhere) + Counter(map(reason_of, problems.values()))
    read = {sample.number: sample for sample in bad if index.has(sample.number, sample.shard, sample.key)}
    left_out.update(reason_of(sample.reason) for number, sample in read.items() if number not in problems)
    found = len(index) + sum(index.elsewhere.values())
    if used is not None:
        left_out[DAMAGED] += found - used - left_out.total()
    assert min(left_out.values(), default=0) >= 0, f"{used} of {found} used, {left_out}"
    return PictureCount(found, +left_out)
