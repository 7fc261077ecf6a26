"""What a run tells of itself: the means of its metrics and its rates."""

import math
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ibq import dist
from ibq.progress import say
from ibq.training.bad_samples import TRAIN, VALIDATION, BadSamples
from ibq.training.checkpoint import OWN, TrainingState
from ibq.training.run_data import RunData
from ibq.training.startup import StartUp
from ibq.training.writers import LogConfig, Values, Writer, open_writers, scalars_of


class RunLog:
    """Collects the figures of a run's steps and writes them; every rank calls the same methods.

    `state` is the run's, which the steps change. `mark` is told what begins, each part of a step included.
    """

    def __init__(
        self, folder: Path, data: RunData, state: TrainingState, device: torch.device, mark: Callable[[str], None]
    ):
        self.folder = folder
        self.stopwatch = Stopwatch(device, entered=mark)
        self.bad_samples = BadSamples(folder, data.order.size, data.max_bad_fraction)
        self._data, self._state, self._device, self._mark = data, state, device, mark
        self.means = RunningMeans(device)  # of the steps since the last log
        self._since, self._started = 0, time.perf_counter()  # of the interval between two logs
        self._aside = 0.0  # seconds of it that are no part of the steps
        self._summary: dict[str, float] = {}
        self._logger: MetricLogger

    def open(self, config: LogConfig, config_text: str) -> None:
        """Go on with the log where the checkpoint is; the run's `config_text` is told to writers that show it."""
        self._logger = MetricLogger(self.folder, open_writers(config, self.folder, self._state.step, config_text))
        self._since, self._started = self._state.step, time.perf_counter()

    def close(self) -> None:
        """Nothing follows."""
        self._logger.close()

    @contextmanager
    def besides_steps(self) -> Iterator[None]:
        """What happens in this context does not count in the time per step."""
        start = time.perf_counter()
        yield
        self._aside += time.perf_counter() - start

    def note_start(self, start_up: StartUp) -> None:
        """Say how long it took until the first step was done."""
        with self.besides_steps():
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # once: until now the step may only have been queued
            start_up.finish(self.folder)

    def bad_step(self) -> None:
        """Log that there is one more."""
        self._logger.scalars(self._state.step, {"bad_steps": self._state.bad_steps})

    def reduce_bad_samples(self) -> None:
        """Learn of the other ranks' bad samples; UserError where they are too many."""
        self.bad_samples.reduce(self._state.step, self._state.position)

    def count_pictures(self) -> dict[str, dict]:
        """Say what became of the pictures of every place; the same for a file. Codes and rank 0 alone have none."""
        if not dist.is_main():
            return {}
        counts = self._data.count_pictures(*map(self.bad_samples.named, (TRAIN, VALIDATION)))
        for place, count in counts.items():
            say(f"{place}: {count}")
        return {place: count.to_json() for place, count in counts.items()}

    def steps(self, batch_size: int, interval_metrics: Callable[[int], dict[str, float]]) -> None:
        """Log the means since the last log with rates, memory and the task's own figures."""
        state = self._state
        self._mark("log")
        self.reduce_bad_samples()
        steps = state.step - self._since
        seconds = (time.perf_counter() - self._started - self._aside) / steps
        values = self.means.means() | self.stopwatch.means(steps) | {"seconds/step": seconds}
        images = batch_size / seconds
        values["images_per_second"] = images
        values["peak_memory_gib"] = peak_memory_gib(self._device)
        values["bad_steps"] = state.bad_steps
        values["data/bad_samples"] = self.bad_samples.total
        if self._data.order.size:
            values["data/epoch"] = state.position / self._data.order.size
        values |= interval_metrics(state.step)
        if "tokens_per_image" in values:
            values["tokens_per_second"] = images * values.pop("tokens_per_image")
        self._logger.scalars(state.step, values)
        self._summary |= {"loss": values.get("loss/total", math.nan)}
        self._since, self._started, self._aside = state.step, time.perf_counter(), 0.0

    def validation(self, metrics: Mapping[str, float], images: Mapping[str, Tensor]) -> None:
        """Log what a validation has found."""
        step = self._state.step
        self._logger.scalars(step, {f"validation/{name}": value for name, value in metrics.items()})
        for name, rows in images.items():
            self._logger.images(step, name, rows)

    def note_best(self) -> None:
        """Show the best validation so far beside the progress bar."""
        self._summary["best"] = math.nan if self._state.best_score is None else self._state.best_score

    def summary(self) -> str:
        """The few figures beside the progress bar."""
        return " ".join(f"{name} {value:.3f}" for name, value in self._summary.items())


class MetricLogger:
    """Passes scalars and pictures of one run to its writers, of which rank 0 alone has any.

    A disk that is full is no reason to stop: rows wait in memory until they can be written, pictures do not.
    """

    def __init__(self, folder: Path, writers: Sequence[Writer]):
        self.folder = folder
        self._waiting: list[tuple[Writer, list[tuple[int, Values]]]] = [(writer, []) for writer in writers]
        self._warned = False

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars at a step (the number of steps done)."""
        self._write(step, dict(values))

    def images(self, step: int, name: str, rows: Tensor) -> None:
        """Log a grid of uint8 images [rows, columns, 3, H, W]."""
        if rows.numel():
            r, c, channels, height, width = rows.shape
            self._write(step, {name: rows.permute(2, 0, 3, 1, 4).reshape(channels, r * height, c * width)})

    def close(self) -> None:
        """Nothing follows."""
        for writer, _ in self._waiting:
            writer.close()

    def _write(self, step: int, values: Values) -> None:
        for writer, rows in self._waiting:
            rows.append((step, values))
            try:
                while rows:
                    writer.write(*rows[0])
                    del rows[0]
            except OSError as error:
                if not self._warned:
                    say(f"WARNING: {self.folder}: cannot write the log ({error}); training goes on")
                self._warned = True
                rows[:] = [(step, scalars) for step, row in rows if (scalars := scalars_of(row))]


class RunningMeans:
    """Means of a step's metrics over the interval between two logs, kept on the device until then."""

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

    def tensors(self) -> dict[str, Tensor]:
        """What has been added since the last call of `means`, for the checkpoint."""
        counts = {f"{OWN}interval/count/{name}": torch.tensor(count) for name, count in self._counts.items()}
        return {f"{OWN}interval/sum/{name}": value for name, value in self._sums.items()} | counts

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with what a checkpoint holds."""
        for key, value in tensors.items():
            if key.startswith(f"{OWN}interval/sum/"):
                name = key.removeprefix(f"{OWN}interval/sum/")
                self._sums[name] = value.to(self._device)
                self._counts[name] = int(tensors[f"{OWN}interval/count/{name}"])


class Stopwatch:
    """Time per part of the step; on CUDA by events, so that nothing waits for the device.

    `entered` is told the name of every part that begins.
    """

    def __init__(self, device: torch.device, entered: Callable[[str], None] = lambda _: None):
        self._cuda = device.type == "cuda"
        self._entered = entered
        self._spans: dict[str, list] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a part; parts with the same name add up."""
        self._entered(name)
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
