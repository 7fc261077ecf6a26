"""What benches of numeric cores share: seconds, peak memory, matrix-product rates, exponents, processes for each."""

import ctypes
import importlib
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

if __name__ == "__main__":  # started by `run_apart`
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch

GIB = 2**30
SECONDS_OF_PRODUCTS = 0.02


def run_apart(function: Callable[..., dict], **arguments) -> dict:
    """`function(**arguments)` in a process of its own: neither memory nor caches of one measurement touch the next.

    The function lies at the top level of a module of this repository; arguments and result go through JSON. Its
    printed lines come before the result and are dropped. Raises RuntimeError with the error output if it fails.
    """
    run = _run_forked if _may_fork(arguments) else _run_fresh
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        code = run(function, json.dumps(arguments), said, errors)
        for stream in (said, errors):
            stream.seek(0)
        if code != 0:
            raise RuntimeError(f"{function.__name__} ended with exit code {code}:\n{errors.read().strip()}")
        return json.loads(said.read().splitlines()[-1])


def _may_fork(arguments: Mapping) -> bool:
    """Whether a fork is as a fresh interpreter but for the seconds of its imports: this process has computed nothing.

    With one thread alone it holds no pool of them, which would be lost, and no lock that another has; CUDA knows of
    no forks.
    """
    linux = sys.platform.startswith("linux")
    return linux and arguments.get("device") == "cpu" and len(os.listdir("/proc/self/task")) == 1


def _run_fresh(function: Callable[..., dict], arguments: str, said: IO, errors: IO) -> int:
    command = [sys.executable, __file__, function.__module__, function.__name__, arguments]
    return subprocess.run(command, stdout=said, stderr=errors).returncode


def _run_forked(function: Callable[..., dict], arguments: str, said: IO, errors: IO) -> int:
    process = multiprocessing.get_context("fork").Process(target=_in_fork, args=(function, arguments, said, errors))
    process.start()
    process.join()
    return process.exitcode


def _in_fork(function: Callable[..., dict], arguments: str, said: IO, errors: IO) -> None:
    for number, stream in ((1, said), (2, errors)):
        os.dup2(stream.fileno(), number)
    print(json.dumps(function(**json.loads(arguments))), flush=True)


def seconds_of(function: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Wall-clock seconds of a call, and of the device's work for it."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(function: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """Median of `seconds_of` so many calls, after one call that is not counted."""
    function()
    return statistics.median(seconds_of(function, device) for _ in range(repeats))


def extra_peak_gib(function: Callable[[], object], device: str = "cpu") -> float:
    """How far a call raises this process's memory above what it holds before, at most, in GiB.

    What the call returns counts as well. On CUDA: allocated tensors. Else: resident memory, which only Linux tells;
    call the function once before if its first call loads libraries.
    """
    if torch.device(device).type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        synchronize(device)
        del result
        return (torch.cuda.max_memory_allocated(device) - before) / GIB
    before = _reset_peak()
    result = function()
    peak = _status_kib("VmHWM")
    del result
    return (peak - before) * 1024 / GIB


def held_gib(device: str = "cpu") -> float:
    """What this process holds now, in GiB: allocated tensors on CUDA, else resident memory without what is freed."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device) / GIB
    return _reset_peak() * 1024 / GIB


def product_rate(dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]], device: str = "cpu") -> float:
    """The fastest matrix product of [rows, inner] and [inner, columns] over these shapes, in FLOP/s.

    Each into memory that exists already, several times, at its best: the limit that a program can hope for.
    """
    return max(rate for shape in shapes for rate in _product_rates(*shape, dtype, device))


def _product_rates(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> list[float]:
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype).t()
    out = torch.empty(rows, columns, dtype=dtype, device=device)

    def seconds(calls: int) -> float:
        return seconds_of(lambda: [torch.mm(a, b, out=out) for _ in range(calls)], device)

    seconds(1)  # loads what a first call loads
    # Long enough for the clock, and on a GPU for the wait at the end not to count.
    calls = max(1, round(SECONDS_OF_PRODUCTS / seconds(1)))
    return [calls * 2 * rows * inner * columns / seconds(calls) for _ in range(5)]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the logarithms of values over those of sizes, by least squares; ValueError for a single size."""
    if len(set(sizes)) < 2:
        raise ValueError(f"no exponent follows from one size, {sizes[0]}; give at least two")
    return statistics.linear_regression(*([math.log(one) for one in some] for some in (sizes, values))).slope


def synchronize(device: str | torch.device) -> None:
    """Wait for the device's work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak() -> int:
    """Give freed memory back to the system, start the peak anew, and return the resident memory in KiB."""
    if not sys.platform.startswith("linux"):
        raise RuntimeError("peak memory of a process is read from /proc; run this bench on Linux or on a GPU")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_kib("VmRSS")


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Call one function as `run_apart` says, and print its result."""
    module, function, arguments = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
