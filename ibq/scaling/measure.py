"""How much memory a step of training takes at most, measured."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of_step(prepare: Callable[[], Callable[[], object]], steps: int = 3) -> int:
    """Bytes of tensors that this process has on the CPU at most during the last of so many steps.

    `prepare` builds everything (model, engine, batch) and returns the step. What is counted are the allocations and
    frees of PyTorch's CPU allocator, as its profiler records them from before `prepare` on: every tensor counts with
    its exact size, whoever holds it (weights, optimizer, saved activations, buckets of gradients, temporaries within an
    operator), and the result is the same from run to run. Resident memory would add the interpreter, libraries, freed
    pages that were not given back and the collectives' staging buffers, and varies by tens of MiB. The first step
    differs (the optimizer has no state yet, DDP has not sorted its buckets): take at least two.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step = prepare()
        for _ in range(steps - 1):
            step()
        gc.collect()
        begin = time.time_ns()
        step()
    level = peak = 0
    for moment, allocated in sorted(_allocations(recorded.profiler.kineto_results.experimental_event_tree())):
        if moment >= begin:
            peak = max(peak, level, allocated)
        level = allocated
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """(time in ns, bytes allocated from then on) of every allocation and free."""
    for event in events:
        if event.name == "[memory]" and event.extra_fields.device == torch.device("cpu"):
            yield event.start_time_ns, event.extra_fields.total_allocated
        yield from _allocations(event.children)
