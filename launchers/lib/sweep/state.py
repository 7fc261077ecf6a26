"""How the runs of a sweep stand: what is done, what is under way, and how far."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ibq.config import UserError
from ibq.files import remove, write_text
from ibq.training.run import RUN_FILES
from ibq.training.stopping import STATUS_FILE, read_status
from launchers.lib.sweep.grid import Part, Run, differences

RECORD_FILE, LOG_FILE = "sweep.json", "sweep.log"
MEASURED_FILES = ("reconstruction.json", "reconstruction.npz", "usage.json")  # of a tokenizer
GENERATED_FILES = ("generation.json",)  # of a transformer
SAMPLES = "samples"  # folder of a transformer's images
State = Literal["queued", "running", "stopped", "done", "failed"]


@dataclass(kw_only=True)
class RunState:
    """One run, what is written down of it in its folder, and what happens to it now."""

    run: Run
    record: dict[str, Any]
    state: State = "queued"
    part: Part | None = None  # what is under way
    since: float = 0.0  # when that was started
    models: list[str] = field(default_factory=list)  # versions of those that it uses
    failures: int = 0  # in this call
    reason: str = ""  # of the last failure
    progress: "Progress" = field(init=False)

    def __post_init__(self):
        self.progress = Progress(self.run.folder)
        if self.next_part() is None:
            self.state = "done"

    def next_part(self) -> Part | None:
        """The first part that is still to do."""
        return next((part for part in self.run.parts if not self._is_done(part)), None)

    def _is_done(self, part: Part) -> bool:
        noted = self.record["parts"].get(part.name, {})
        if part.name == "train":
            return noted.get("done", False) and read_status(self.run.folder).get("state") == "finished"
        return noted.get("done", False) and not self._differs(part)

    def _differs(self, part: Part) -> bool:
        """Whether a part was begun by another command, or with other weights in the same place."""
        noted = self.record["parts"].get(part.name, {})
        now = {"command": list(part.command), "models": versions(part.models)}
        return any(noted.get(name, value) != value for name, value in now.items())

    def seconds(self, name: str) -> float:
        """Time that a part has taken so far, in this call and in earlier ones."""
        return self.record["parts"].get(name, {}).get("seconds", 0.0)

    def spent(self, now: float) -> float:
        """Time that all parts have taken so far."""
        return sum(self.seconds(part.name) for part in self.run.parts) + (now - self.since if self.part else 0.0)

    def seconds_left(self) -> float | None:
        """Until the end of the training that is under way, or None."""
        return self.progress.seconds_left() if self.part is not None and self.part.name == "train" else None

    def make_room(self, part: Part) -> None:
        """Remove what a part that is about to be started would not write over: images of other settings."""
        if part.name in ("sample", "reconstruction") and self._differs(part):
            remove(self.run.folder, (SAMPLES,))

    def begin(self, part: Part, now: float) -> None:
        """A part has been started."""
        self.state, self.part, self.since = "running", part, now
        self.models = versions(part.models)
        self.progress.begin()

    def end(self, seconds: float, *, done: bool) -> None:
        """The part that was under way has ended; written down for later calls."""
        part, self.part = self.part, None
        noted = {"command": list(part.command), "models": self.models}
        noted |= {"done": done, "seconds": self.seconds(part.name) + seconds}
        self.record["parts"][part.name] = noted
        names = [own.name for own in self.run.parts]
        for later in names[names.index(part.name) + 1 :]:  # they measured what this part has now replaced
            self.record["parts"].pop(later, None)
        self.save()

    def save(self) -> None:
        """Write the record."""
        write_text(self.run.folder / RECORD_FILE, json.dumps(self.record, indent=1) + "\n")


def versions(places: Sequence[str]) -> list[str]:
    """What tells the weights in some places from later ones: of a run what it wrote beside them, of a file its time."""
    found = []
    for place in map(Path, places):
        infos = [path for path in (place / "best/info.json", place / "info.json") if path.exists()]
        if infos:
            found.append(hashlib.sha256(infos[0].read_bytes()).hexdigest())
        else:
            found.append(str(place.stat().st_mtime_ns) if place.exists() else "absent")
    return found


def open_run(run: Run, *, fresh: bool) -> RunState:
    """How a run stands; UserError if what is there was trained with other settings."""
    if fresh:
        remove(run.folder, (*RUN_FILES, *MEASURED_FILES, *GENERATED_FILES, SAMPLES, RECORD_FILE, LOG_FILE))
    record = _read_record(run.folder)
    trained = (run.folder / STATUS_FILE).exists() or (run.folder / "checkpoints").exists()
    if record is None:
        if trained:
            raise UserError(f"{run.folder} holds a run that is not of this sweep; set another `output` for the sweep")
        record = {"settings": run.settings, "parts": {}}
    changed = differences(record["settings"], _as_read(run.settings))
    if changed and trained:
        shown = "; ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise UserError(
            f"run {run.name} was trained with other settings ({shown}); --only {run.name} --fresh trains it again, "
            "or set another `output` for the sweep"
        )
    record["settings"] = run.settings
    return RunState(run=run, record=record)


def _as_read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are after having been written and read."""
    return json.loads(json.dumps(settings, default=str))


def _read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD_FILE
    try:
        record = json.loads(path.read_text())
        return {"settings": dict(record["settings"]), "parts": dict(record["parts"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); --only {folder.name} --fresh starts that run over"
        ) from error


class Progress:
    """How far a run's training is and when it ends, from the files that it writes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.step = self.total = 0
        self._seen = 0.0  # when the files were read last
        self._first: tuple[float, int] | None = None  # time and step when first seen, for the speed

    def begin(self) -> None:
        """The training starts or goes on: its speed is measured from here."""
        self._first = None

    def look(self, now: float) -> None:
        """Read the files again."""
        self.total = int(read_status(self.folder).get("total_steps", 0))
        step = last_step(self.folder / "metrics.jsonl")
        if self._first is None or step < self._first[1]:
            self._first = (now, step)
        self.step, self._seen = step, now

    def seconds_left(self) -> float | None:
        """Until the end of the training at the speed so far; None as long as that is not known."""
        if self._first is None or not self.total or self.step <= self._first[1]:
            return None
        since, start = self._first
        return max((self._seen - since) / (self.step - start) * (self.total - self.step), 0.0)


def last_step(path: Path) -> int:
    """The step of the last whole row of a metrics file; 0 where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.path.getsize(path) - 16_384, 0))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # cut off at either end
            continue
    return 0


def last_words(log: Path) -> str:
    """The line of a log that says best why a command failed: its error message, or else its last line."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    except OSError:
        return ""
    start = max((number for number, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    said = [line for line in lines[start + 1 :] if line]
    errors = [line for line in said if line.startswith("error: ")]
    return (errors or said or [""])[-1]
