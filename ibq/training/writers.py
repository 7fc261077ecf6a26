"""Where a run's scalars and pictures go: its JSONL file, and the writers that the config names."""

import math
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from ibq import dist
from ibq.config import UserError
from ibq.extras import install, need
from ibq.files import append_line, keep_lines
from ibq.meeting import place

Values = Mapping[str, float | Tensor]  # scalars, and pictures as uint8 [3, H, W]


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """The run's place at Weights & Biases; its id is kept in the run's folder."""

    project: str = "ibq"
    entity: str | None = None  # a user or team; null takes the account's own
    group: str | None = None
    mode: Literal["online", "offline"] = "online"  # offline: into the run's folder, for `wandb sync`

    def __post_init__(self):
        for name in ("project", "entity", "group"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}: must not be empty; give a name")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Who is told of a run besides its own `metrics.jsonl`."""

    writers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self):
        if len(set(self.writers)) < len(self.writers):
            raise ValueError("writers: one is named twice; name each once")

    def check(self) -> None:
        """UserError for a writer that cannot work here: a package or a key is missing."""
        if "tensorboard" in self.writers:
            need("tensorboard")
        if "wandb" not in self.writers:
            return
        if find_spec("wandb") is None:
            raise UserError(f"log.writers: wandb is not installed; {install('wandb')}, or take it out")
        if self.wandb.mode == "online" and ((own := place()) is None or own.rank == 0):
            from ibq.training.wandb_writer import has_key

            if not has_key():
                problem = "log.wandb.mode: Weights & Biases has no API key here"
                raise UserError(f"{problem}; run `wandb login`, set WANDB_API_KEY, or set it to offline")


class Writer(Protocol):
    """Is told of a run; rank 0 has them."""

    def write(self, step: int, values: Values) -> None:
        """Add scalars and pictures of a step; steps never go back. OSError: not written, to be tried again."""

    def close(self) -> None:
        """Nothing follows; takes a bounded time."""


def open_writers(config: LogConfig, folder: Path, start_step: int, config_text: str) -> list[Writer]:
    """The JSONL file and the config's writers, to go on after `start_step`; none on other ranks than 0.

    What an interrupted run wrote after its last checkpoint is about to be written again.
    """
    if not dist.is_main():
        return []
    writers: list[Writer] = [LineWriter(folder, start_step)]
    for kind in config.writers:
        match kind:
            case "tensorboard":
                writers.append(TensorBoardWriter(folder / "tensorboard", start_step))
            case "wandb":
                from ibq.training.wandb_writer import WandbWriter

                writers.append(WandbWriter(folder, config.wandb, config_text))
    return writers


def scalars_of(values: Values) -> dict[str, float]:
    """Those that are no pictures."""
    return {name: value for name, value in values.items() if not isinstance(value, Tensor)}


class LineWriter:
    """Writes scalars as rows of `metrics.jsonl`."""

    def __init__(self, folder: Path, start_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        keep_lines(self._path, lambda row: row["step"] <= start_step)

    def write(self, step: int, values: Values) -> None:
        """Add a row; values that are not finite are written as text."""
        if row := scalars_of(values):
            named = {name: value if math.isfinite(value) else str(value) for name, value in row.items()}
            append_line(self._path, {"step": step, **named})

    def close(self) -> None:
        """Every row is on the disk already."""


# --- TensorBoard ---


class TensorBoardWriter:
    """Writes event files; opens the first when there is something to write."""

    def __init__(self, folder: Path, start_step: int):
        self._folder = folder
        self._start_step: int | None = start_step  # None once earlier files are cut
        self._events: EventFile | None = None

    def write(self, step: int, values: Values) -> None:
        """Add the values of a step to the events."""
        from torch.utils.tensorboard import summary  # slow to import

        if self._events is None:
            self._open(step)
        found = [
            summary.image(name, value, dataformats="CHW") if isinstance(value, Tensor) else summary.scalar(name, value)
            for name, value in values.items()
        ]
        try:
            self._events.add(step, found)
        except OSError:
            self._events = None  # what follows a half-written record would not be read
            raise

    def close(self) -> None:
        """Every event is on the disk already."""

    def _open(self, step: int) -> None:
        if self._start_step is not None:
            for path in self._folder.glob("events.out.tfevents.*"):
                cut_events(path, self._start_step)
            step, self._start_step = self._start_step + 1, None
        self._events = EventFile(self._folder, step)


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
