"""Which rank has died and which holds the others up, judged from the ranks' beats: no clock, no network, no threads."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

NAMED_AT_MOST = 4  # of the ranks that a message is about; of the others it gives the number


@dataclass(frozen=True, kw_only=True)
class HeartbeatConfig:
    """When a rank is taken for dead and when the run for hung; either ends all ranks."""

    every_s: float = 1.0  # between two signs of life of a rank
    start_within_s: float = 300.0  # that the last rank may start after the first
    dead_after_s: float = 60.0  # without a sign of life; a process that is gone is noticed at once on its own host
    hang_after_s: float | None = 1_800.0  # without progress on any rank after its start; null waits for ever

    def __post_init__(self):
        for name in ("every_s", "start_within_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be greater than 0, got {getattr(self, name)}")
        if self.dead_after_s < 5 * self.every_s:
            raise ValueError(
                f"dead_after_s: must be at least 5 * every_s = {5 * self.every_s}, got {self.dead_after_s}"
            )
        if self.hang_after_s is not None and self.hang_after_s < 2 * self.every_s:
            raise ValueError(f"hang_after_s: must be at least 2 * every_s or null, got {self.hang_after_s}")


class Progress(NamedTuple):
    """How far a rank's main thread has come."""

    step: int = 0
    phase: str = "start"
    place: int = 0  # phases that it has entered in this step: their order, equal on all ranks
    marks: int = 0  # ever made


START = Progress()


class Process(NamedTuple):
    """A process, so named that no other is taken for it."""

    host: str
    machine: str  # what shares process ids: a boot of a host, and in it a namespace; empty where that is not known
    pid: int
    born: str  # in clock ticks after the boot; a later process may get the same id

    @classmethod
    def current(cls) -> "Process":
        """This process."""
        return cls.of(os.getpid()) or cls(os.uname().nodename, "", os.getpid(), "")

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """A process of this machine; None where there is none, or the system does not tell."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            machine = f"{boot}/{os.readlink('/proc/self/ns/pid')}"
            return cls(os.uname().nodename, machine, pid, stat_of(pid)[19])
        except (OSError, IndexError):
            return None

    def parent(self) -> int:
        """The process id of its parent; 0 for the first one, or where it is gone."""
        try:
            return int(stat_of(self.pid)[1])
        except (OSError, IndexError):
            return 0

    def state(self) -> str:
        """On its own machine: the kernel's letter (R, S, D, T ...), or nothing if it is gone or but a zombie."""
        try:
            fields = stat_of(self.pid)
        except (OSError, IndexError):
            return ""
        return "" if fields[19] != self.born or fields[0] in "ZX" else fields[0]


def stat_of(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the third on: the name before them may hold spaces and parentheses."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A rank's last sign of life."""

    rank: int
    process: Process
    count: int = 0
    progress: Progress = START
    done: bool = False

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str | bytes) -> "Beat":
        """From `dumps`."""
        beat = cls(**json.loads(text))
        return replace(beat, process=Process(*beat.process), progress=Progress(*beat.progress))

    @property
    def who(self) -> str:
        """The rank with its host and process."""
        return f"rank {self.rank} (host {self.process.host}, process {self.process.pid})"

    @property
    def where(self) -> str:
        """Its place in the run."""
        return f'step {self.progress.step}, phase "{self.progress.phase}"'


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why the run cannot go on."""

    kind: Literal["dead", "hung", "failed"]
    ranks: tuple[int, ...]  # that it is about
    message: str  # one line

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str | bytes) -> "Verdict":
        """From `dumps`."""
        verdict = cls(**json.loads(text))
        return replace(verdict, ranks=tuple(verdict.ranks))


@dataclass
class _Seen:
    """A rank as its watcher sees it; times are those of the watcher's clock, in seconds."""

    beat: Beat
    heard: float
    moved: float
    state: str = ""


class Watch:
    """What one rank knows of those that it watches."""

    def __init__(self, config: HeartbeatConfig, own_rank: int, beats: Iterable[Beat], look_s: float):
        self._config, self._own_rank, self._look_s = config, own_rank, look_s
        self._clock = self._answered = 0.0
        self._seen = {beat.rank: _Seen(beat, 0.0, 0.0, "?") for beat in beats}

    def pass_time(self, seconds: float) -> None:
        """So much time is over.

        More than a few beats at once means that this process itself was frozen (as when Slurm suspends a job), and
        says nothing of the others: it does not count.
        """
        self._clock += min(seconds, 3 * self._config.every_s)

    def observe(self, states: Mapping[int, str], beats: Iterable[Beat]) -> None:
        """Take in what the store says, and the states of processes on this machine as they were *before* it said so.

        In this order a rank that ended well is never taken for dead: it leaves its last beat, then it goes.
        """
        self._answered = self._clock
        for beat in beats:
            seen = self._seen[beat.rank]
            if beat.count != seen.beat.count:
                seen.heard = self._clock
            if beat.progress.marks != seen.beat.progress.marks or beat.done:
                seen.moved = self._clock
            seen.beat, seen.state = beat, states.get(beat.rank, "?")

    def silent(self) -> bool:
        """Whether the store has not answered for too long."""
        return self._clock - self._answered > self._config.dead_after_s

    def verdict(self) -> Verdict | None:
        """Why the run cannot go on, if so."""
        return self._dead() or self._hung()

    def store_lost(self, reason: str, agent: str | None, host: Beat) -> Verdict | None:
        """What it means that the ranks' store does not answer; None if its host has ended well.

        `agent`: the torchrun agent's address if that keeps the store, else it is rank 0: `host`.
        """
        if agent is not None:
            message = f"torchrun's agent at {agent}, which keeps the ranks' store, has died: {reason}"
            return Verdict(kind="dead", ranks=(), message=message)
        if self._seen.get(host.rank, _Seen(host, 0.0, 0.0)).beat.done:
            return None
        beat = self._seen[host.rank].beat if host.rank in self._seen else host
        message = f"{beat.who} has died: the store that it keeps: {reason}; last heard at {beat.where}"
        return Verdict(kind="dead", ranks=(host.rank,), message=message)

    def _running(self) -> list[_Seen]:
        return [seen for seen in self._seen.values() if not seen.beat.done]

    def _dead(self) -> Verdict | None:
        others = [seen for seen in self._running() if seen.beat.rank != self._own_rank]
        limit = self._config.dead_after_s
        if all(seen.state and self._clock - seen.heard <= limit for seen in others):
            return None
        # A host that dies takes all its ranks along; their last beats are a little apart.
        near = max(limit / 2, limit - 3 * self._look_s)
        dead = [seen for seen in others if not seen.state or self._clock - seen.heard > near]
        parts = [f"{seen.beat.who} has died: {self._signs(seen)}" for seen in dead[:NAMED_AT_MOST]]
        if len(dead) > NAMED_AT_MOST:
            parts.append(f"and {len(dead) - NAMED_AT_MOST} more ranks")
        return Verdict(kind="dead", ranks=tuple(seen.beat.rank for seen in dead), message="; ".join(parts))

    def _signs(self, seen: _Seen) -> str:
        heard = f"last heard at {seen.beat.where}"
        silence = f"no sign of life for {self._clock - seen.heard:.0f} s"
        match seen.state:
            case "":
                return f"{heard}; its process is gone"
            case "?":
                return f"{heard}; {silence}"
            case "T" | "t":
                return f"{heard}; {silence}, its process is stopped"
            case state:
                return f"{heard}; {silence}, though its process is there (state {state})"

    def _hung(self) -> Verdict | None:
        running, limit = self._running(), self._config.hang_after_s
        if limit is None or any(seen.beat.progress.phase == START.phase for seen in running):
            return None  # the start of a run may read all of its data
        if not running or any(self._clock - seen.moved <= limit for seen in running):
            return None
        places = {seen.beat.rank: (seen.beat.progress.step, seen.beat.progress.place) for seen in running}
        last = min(places.values())
        behind = [seen.beat for seen in running if places[seen.beat.rank] == last]
        since = f"no rank has made progress for {limit:g} s"
        ranks = tuple(beat.rank for beat in behind)
        if len(behind) == len(running):
            message = f"the run hangs: {since}; all ranks wait at the same place, {behind[0].where}"
            return Verdict(kind="hung", ranks=ranks, message=message)
        names = ", ".join(beat.who for beat in behind[:NAMED_AT_MOST])
        more = f" and {len(behind) - NAMED_AT_MOST} more" if len(behind) > NAMED_AT_MOST else ""
        verb = "hangs" if len(behind) == 1 else "hang"
        message = f"{names}{more} {verb} at {behind[0].where}: {since}, and the other ranks are farther on"
        return Verdict(kind="hung", ranks=ranks, message=message)
