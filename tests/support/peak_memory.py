"""How much memory a step of training takes at most, measured."""

import gc
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def peak_of_step(prepare: Callable[[], Callable[[], object]], warmup: int = 2, repeats: int = 2) -> int:
    """Bytes of tensors that this process has on the CPU at most during a step.

    `prepare` builds everything (model, engine, batch) and returns the step. What is counted are the allocations and
    frees of PyTorch's CPU allocator, as its profiler records them from before `prepare` on: every tensor counts with
    its exact size, whoever holds it (weights, optimizer, saved activations, buckets of gradients, temporaries within an
    operator), and without collectives the result is the same from run to run. Resident memory would add the
    interpreter, libraries, freed pages that were not given back and the collectives' staging buffers, and varies by
    tens of MiB. The first steps differ (the optimizer has no state yet, DDP has not sorted its buckets) and do not
    count; of several repeats the smallest does, as what a collective's thread frees may be counted for longer.
    Garbage is collected before each repeat: whoever measures says by gc.freeze() what is none, which takes a second to
    look through.
    """
    recorded, begins = _record(prepare, warmup, repeats)
    peaks, memory = [0] * repeats, _Memory()
    for moment, place, size in sorted(_allocations(recorded.profiler.kineto_results.experimental_event_tree())):
        number = bisect_right(begins, moment) - 1
        if number >= 0:
            peaks[number] = max(peaks[number], memory.held)
        memory.note(place, size)
    return min(peaks)


def _record(prepare: Callable[[], Callable[[], object]], warmup: int, repeats: int) -> tuple[profile, list[int]]:
    """What the profiler has seen, and when each of the repeats began, in ns."""
    begins = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step = prepare()
        for _ in range(warmup):
            step()
        for _ in range(repeats):
            gc.collect()
            begins.append(time.time_ns())
            step()
    return recorded, begins


class _Memory:
    """What is allocated, by address.

    The profiler sees only this thread: a tensor that a collective's thread lets go last is known to be gone when its
    place is taken again.
    """

    def __init__(self):
        self.held = 0
        self._places: list[int] = []
        self._sizes: dict[int, int] = {}

    def note(self, place: int, size: int) -> None:
        """An allocation, or with a negative size a free, perhaps of what was there before the recording."""
        if size < 0 and place in self._sizes:  # as nearly all: what is known does not overlap
            self.held -= self._sizes.pop(place)
            del self._places[bisect_left(self._places, place)]
            return
        first = max(0, bisect_left(self._places, place) - 1)
        taken = self._places[first : bisect_left(self._places, place + max(size, 1))]
        for other in taken:
            if other + self._sizes[other] > place:
                self.held -= self._sizes.pop(other)
                self._places.remove(other)
        if size > 0:
            insort(self._places, place)
            self._sizes[place] = size
            self.held += size


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """(time in ns, address, bytes) of every allocation, and with negative bytes of every free."""
    cpu, left = torch.device("cpu"), list(events)
    while left:
        event = left.pop()
        if event.tag != _EventType.Allocation:
            left += event.children
        elif (found := event.extra_fields).device == cpu:
            yield event.start_time_ns, found.ptr, found.alloc_size
