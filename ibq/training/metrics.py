"""Scalars of a run: averaged over an interval, written to TensorBoard and to a JSONL file by rank 0."""

import json
import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ibq import dist


class MetricLogger:
    """Writes scalars and pictures of one run; does nothing on ranks other than 0."""

    def __init__(self, folder: Path, start_step: int):
        self.path = folder / "metrics.jsonl"
        self._writer = None
        if not dist.is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._drop_after(start_step)
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def _drop_after(self, step: int) -> None:
        """Leave out what an interrupted run logged after its last checkpoint: it is about to be logged again."""
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            self.path.write_text("".join(line + "\n" for line in lines))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars at a step (the number of steps done)."""
        if self._writer is None:
            return
        rounded = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def images(self, step: int, name: str, rows: Tensor) -> None:
        """Log a grid of uint8 images [rows, columns, 3, H, W]."""
        if self._writer is not None and rows.numel():
            r, c, channels, height, width = rows.shape
            grid = rows.permute(2, 0, 3, 1, 4).reshape(channels, r * height, c * width)
            self._writer.add_image(name, grid, step)

    def close(self) -> None:
        """Flush everything."""
        if self._writer is not None:
            self._writer.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf  # a half-written last line


class Interval:
    """Running means of a step's metrics, kept on the device and reduced over ranks once per interval."""

    def __init__(self, device: torch.device):
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one step's detached scalars."""
        for name, value in metrics.items():
            value = torch.as_tensor(value).detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] += 1

    def means(self) -> dict[str, float]:
        """Mean over the interval and over ranks; empties the interval."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        # Settings of the step, such as the learning rate, are on the CPU.
        values = torch.stack([(self._sums[name] / self._counts[name]).to(self._device) for name in names])
        result = dict(zip(names, dist.all_reduce_mean(values).tolist(), strict=True))
        self._sums.clear()
        self._counts.clear()
        return result


class Stopwatch:
    """Time per part of the step; on CUDA by events, so that nothing waits for the device."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a part; parts with the same name add up."""
        start = self._now()
        try:
            yield
        finally:
            self._spans[name].append((start, self._now()))

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def means(self, steps: int) -> dict[str, float]:
        """Seconds per step of each part since the last call."""
        if self._cuda:
            torch.cuda.synchronize()
        result = {}
        for name, spans in self._spans.items():
            seconds = sum(a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in spans)
            result[f"seconds/{name}"] = seconds / steps
        self._spans.clear()
        return result


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
