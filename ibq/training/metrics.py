"""What a run tells of itself: the means of its metrics and its rates, in TensorBoard and in a JSONL file."""

import math
import os
import resource
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ibq import dist
from ibq.files import append_line, keep_lines
from ibq.progress import say
from ibq.training.bad_samples import TRAIN, VALIDATION, BadSamples
from ibq.training.checkpoint import OWN, TrainingState
from ibq.training.run_data import RunData
from ibq.training.startup import StartUp


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

    def open(self) -> None:
        """Go on with the log where the checkpoint is."""
        self._logger = MetricLogger(self.folder, self._state.step)
        self._since, self._started = self._state.step, time.perf_counter()

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
    """Writes scalars and pictures of one run; does nothing on ranks other than 0.

    A disk that is full is no reason to stop: rows wait in memory until they can be written.
    """

    def __init__(self, folder: Path, start_step: int):
        self.folder, self.path = folder, folder / "metrics.jsonl"
        # Rows that could not be written yet, to the JSONL file and for TensorBoard.
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._unshown: list[tuple[int, dict[str, float]]] = []
        self._events: EventFile | None = None
        self._warned = False
        if dist.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            # What an interrupted run logged after its last checkpoint is about to be logged again.
            keep_lines(self.path, lambda row: row["step"] <= start_step)
            with self._tolerant():
                for path in (folder / "tensorboard").glob("events.out.tfevents.*"):
                    cut_events(path, start_step)
                self._events = EventFile(folder / "tensorboard", start_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars at a step (the number of steps done)."""
        if not dist.is_main():
            return
        self._rows.append((step, dict(values)))
        with self._tolerant():
            while self._rows:
                row_step, row = self._rows[0]
                named = {name: value if math.isfinite(value) else str(value) for name, value in row.items()}
                append_line(self.path, {"step": row_step, **named})
                self._unshown.append(self._rows.pop(0))
            self._show()

    def _show(self) -> None:
        from torch.utils.tensorboard import summary  # slow to import

        while self._unshown:
            step, values = self._unshown[0]
            self._add(step, [summary.scalar(name, value) for name, value in values.items()])
            del self._unshown[0]

    def images(self, step: int, name: str, rows: Tensor) -> None:
        """Log a grid of uint8 images [rows, columns, 3, H, W]."""
        if dist.is_main() and rows.numel():
            from torch.utils.tensorboard import summary

            r, c, channels, height, width = rows.shape
            grid = rows.permute(2, 0, 3, 1, 4).reshape(channels, r * height, c * width)
            with self._tolerant():
                self._add(step, [summary.image(name, grid, dataformats="CHW")])

    def _add(self, step: int, summaries: list) -> None:
        if self._events is None:
            self._events = EventFile(self.folder / "tensorboard", step)
        try:
            self._events.add(step, summaries)
        except OSError:
            self._events = None  # what follows a half-written record would not be read
            raise

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                say(f"WARNING: {self.folder}: cannot write the log ({error}); training goes on")
            self._warned = True


class EventFile:
    """A file that TensorBoard reads; unlike its own writer without a thread, so that errors come to the caller.

    What earlier files of the folder say of `first_step` and later is void.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}"
        number = sum(path.name.startswith(name) for path in folder.iterdir())
        self._event = Event
        self._writer = RecordWriter(open(folder / f"{name}.{number}", "wb"))  # noqa: SIM115
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        self._writer.flush()

    def _write(self, event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())

    def add(self, step: int, summaries: list) -> None:
        """Write the summaries of a step."""
        for summary in summaries:
            self._write(self._event(step=step, summary=summary))
        self._writer.flush()


def cut_events(path: Path, last_step: int) -> None:
    """Cut from an event file what follows a step, and a record that a kill has left half-written.

    TensorBoard's data server takes no notice of where a run went on (`SessionLog.START`), and would show both.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    end, size = 0, path.stat().st_size
    with open(path, "rb") as file:
        # A record: its length in 8 bytes, a checksum in 4, the event, another checksum in 4. Steps never go back.
        while len(head := file.read(12)) == 12:
            length = int.from_bytes(head[:8], "little")
            if (after := end + len(head) + length + 4) > size:
                break
            event = Event.FromString(file.read(length))
            if event.step > last_step and not event.HasField("session_log"):
                break
            end = file.seek(after)
    if end < size:
        os.truncate(path, end)


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
