"""What this machine does fastest, now."""

import os
import time

from tools.lib import cores

BUSY_S = 0.2  # of products, for each number of threads


def bf16_speedup() -> float:
    """How many times faster than fp32 a bf16 matrix product is here."""
    import torch

    if torch.cuda.is_available():
        return float("inf")
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512).to(dtype)  # small: without instructions for bf16 it takes a hundred times as long
        times = []
        while len(times) < 5 and sum(times) < 0.1:
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)  # other programs only add to it
    return seconds[torch.float32] / seconds[torch.bfloat16]


def best_threads() -> tuple[int, float]:
    """(the number of threads that products like those of a step are fastest with, how many of them a second).

    Where other programs take the cores, threads wait for each other at every product, and one alone is ten times faster
    than all. OMP_NUM_THREADS decides where it is set.
    """
    import torch

    before, speeds = torch.get_num_threads(), {}
    threads = before if "OMP_NUM_THREADS" in os.environ else cores()
    while threads:
        torch.set_num_threads(threads)
        speeds[threads] = _products_per_second(torch.randn(512, 256))
        threads = 0 if "OMP_NUM_THREADS" in os.environ else threads // 2
    torch.set_num_threads(before)
    best = max(speeds, key=speeds.get)
    return best, speeds[best]


def _products_per_second(a) -> float:
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < BUSY_S or done < 3:
        (a @ a.T).relu_()
        done += 1
    return done / (time.perf_counter() - start)
