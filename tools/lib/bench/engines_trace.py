"""What a profiler's trace of a training step says of communication: how long, and how much of it beside computation.

On a GPU both are kernels: NCCL's run on a stream of their own. On a CPU gloo's threads record a span `gloo:NAME` for
the time that a collective is carried out (DeepSpeed and FSDP2 go through the same process group), and this rank's
computation is what the other threads do in operators, without those that only hand a collective over (`c10d::NAME`).
A wait is no operator, so it counts as no computation. Time that the other rank is waited for is part of a collective.
"""

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Span = tuple[float, float]  # begin and end in microseconds
OPERATORS = ("aten::", "ibq::")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Communication of one rank in one step."""

    seconds: float  # during which a collective ran
    overlap: float  # share of them during which this rank's own computation ran as well
    collectives: dict[str, int]  # how many, by name


def communication(file: Path) -> Communication:
    """What a trace, gzipped JSON in Chrome's format, says."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        events = [event for event in json.load(stream)["traceEvents"] if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") in ON_GPU]
    return _of_kernels(kernels) if kernels else _of_operators(events)


def _of_kernels(kernels: Sequence[dict]) -> Communication:
    sent = [event for event in kernels if "nccl" in event["name"].lower()]
    own = [event for event in kernels if "nccl" not in event["name"].lower()]
    return _summary(sent, own, [])


def _of_operators(events: Sequence[dict]) -> Communication:
    sent = [event for event in events if event["name"].startswith("gloo:")]
    threads = {event["tid"] for event in sent}
    here = [event for event in events if event["tid"] not in threads]
    own = [event for event in here if event["name"].startswith(OPERATORS)]
    return _summary(sent, own, [event for event in here if event["name"].startswith("c10d::")])


def _summary(sent: Sequence[dict], own: Sequence[dict], handed_over: Sequence[dict]) -> Communication:
    """`handed_over`: spans that do not count as computation, though `own` may have some within."""
    during, working, handing = (_spans(events) for events in (sent, own, handed_over))
    total = covered(during)
    beside = common(during, working + handing) - common(during, handing)
    names = Counter(event["name"].removeprefix("gloo:") for event in sent)
    overlap = min(1.0, max(0.0, beside / total)) if total else 0.0  # sums of large numbers of microseconds
    return Communication(seconds=total / 1e6, overlap=overlap, collectives=dict(names))


def _spans(events: Sequence[dict]) -> list[Span]:
    return [(event["ts"], event["ts"] + event["dur"]) for event in events]


def covered(spans: Sequence[Span]) -> float:
    """Length of the union of spans."""
    length, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        length += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return length


def common(one: Sequence[Span], other: Sequence[Span]) -> float:
    """Length of what both unions of spans cover."""
    return covered(one) + covered(other) - covered([*one, *other])
