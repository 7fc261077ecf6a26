"""Signs of life between the ranks: one that dies or hangs ends the run soon, and its log says which it was.

Collectives alone do not do that: with NCCL the others wait for the time-out of the process group, with gloo they fail
with the address of a socket, and a rank whose main thread sleeps is not found at all.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch.distributed as torch_dist

from ibq.config import UserError
from ibq.engine.watch import Beat, HeartbeatConfig, Process, Progress, Verdict, Watch
from ibq.meeting import Meeting, RanksError, first_line

__all__ = ["Heartbeat", "HeartbeatConfig"]

UNDECIDED = "-"  # in the store, as long as there is no verdict
OWN_END_S = 5.0  # that a rank has to end by itself after another has raised an error, which it may raise too
LAST_WORDS_S = 15.0  # that a rank has to write what it must once the verdict is there
RANKS_PER_LOOK = 256  # larger worlds are looked at less often: one store serves them all
# How errors of a collective look that come from the other end, besides torch's own classes.
CONNECTION_WORDS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


class Heartbeat:
    """A rank's signs of life, and its watch over the others; a context around all that a run does once they have met.

    Within it `mark` notes progress, which costs next to nothing. All ranks enter it together, after their `meeting` and
    before their process group is made, whose first collective may be what waits for a rank that has died.
    When a rank dies or the run hangs, one rank of each host prints which it is to stderr, the lowest one that is left
    calls `on_failure(line)`, and all end with exit code 1, whatever their main threads wait for. A main thread that
    gets an error first calls `explain(error)`. A process that is alone (no meeting) does nothing here.

    Beats go through a connection of their own to the store of the process group (torchrun's agent keeps it, or with
    other launchers rank 0), so that a main thread that waits does not keep them. One rank per host reads the beats of
    all, the others those of their host.
    """

    def __init__(self, config: HeartbeatConfig, meeting: Meeting | None):
        self.on_failure: Callable[[str], None] = lambda message: None  # set once there is a place to write it to
        self._config, self._meeting = config, meeting
        self._rank, self._world_size = (meeting.place.rank, meeting.place.ranks) if meeting else (0, 1)
        self._progress = Progress()
        self._beat = Beat(rank=self._rank, process=Process.current())
        self._outbox: Verdict | None = None  # what this rank has found, to be told
        self._inbox: tuple[dict[int, str], list[Beat], Verdict | None] | None = None
        self._lost = ""  # why there is no store any more
        self._verdict: Verdict | None = None
        self._explanation = ""
        self._wake, self._told = threading.Event(), threading.Event()
        self._decided, self._reported = threading.Event(), threading.Event()
        self._failing, self._waiting, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        look_s = config.every_s * max(1.0, self._world_size / RANKS_PER_LOOK)
        self._look_s = min(look_s, config.dead_after_s / 5)

    def mark(self, step: int, phase: str) -> None:
        """Note that the main thread now is in a phase of a step; every rank enters the same ones in the same order.

        The same phase again, as for each batch of a validation, is progress too.
        """
        last = self._progress
        place = last.place if step == last.step else 0
        entered = (step, phase) != (last.step, last.phase)
        self._progress = Progress(step, phase, place + entered, last.marks + 1)

    def __enter__(self) -> "Heartbeat":
        if self._meeting is not None:
            self._connect()
            jobs = (self._exchange_beats, self._watch_others)
            self._threads = [threading.Thread(target=job, daemon=True, name="heartbeat") for job in jobs]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        if not self._threads:
            return
        if error is not None:
            self.explain(error)
            if not isinstance(error, UserError):
                return  # the watch goes on: a process that does not come to its end is ended
        self.stop()

    def stop(self) -> None:
        """This rank has ended well: its last beat says so."""
        if not self._threads or self._ended.is_set():
            return
        self._ended.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout=self._config.dead_after_s / 2)  # a store that does not answer does not keep it

    def explain(self, error: BaseException) -> str:
        """Why this rank fails with `error`: the death of another, if that is what it comes from, else the error itself.

        Waits until that is known, some seconds for ranks of one host and dead_after_s otherwise. An error of this
        rank's own is told to the others, which end too.
        """
        own = str(error) or type(error).__name__
        if not self._threads or self._ended.is_set():
            return own
        if not self._failing.is_set():
            self._failing.set()
            self._explanation = (_comes_from_others(error) and self._wait_for_verdict()) or own
            if self._explanation == own:
                beat = replace(self._beat, progress=self._progress)
                message = f"{beat.who} has failed at {beat.where}: {type(error).__name__}: {' '.join(own.split())}"
                self._tell(Verdict(kind="failed", ranks=(self._rank,), message=message))
                if self._rank == 0 and self._agent is None:
                    self._let_read()
        return self._explanation

    def _wait_for_verdict(self) -> str:
        """The verdict's message once all is done about it that must be, or nothing if there is none in time."""
        self._waiting.set()
        seconds = self._look_s + 5.0 + (0.0 if self._alone_on_host else self._config.dead_after_s)
        if not self._decided.wait(seconds):
            return ""
        self._reported.wait(LAST_WORDS_S)
        return self._verdict.message

    def _connect(self) -> None:
        """Open the connection, leave the first beat, learn who the others are; RanksError if one has ended."""
        self._prefix = f"{self._meeting.life}heartbeat/"
        own = self._meeting.place
        self._agent = f"{own.address}:{own.port}" if own.kept_by_agent else None
        timeout = timedelta(seconds=self._config.dead_after_s)
        options = {"is_master": False, "timeout": timeout, "wait_for_workers": False}
        self._store = torch_dist.TCPStore(own.address, own.port, **options)
        self._store.set(f"{self._prefix}{self._rank}", self._beat.dumps())
        if self._rank == 0:
            self._store.set(f"{self._prefix}verdict", UNDECIDED)
        ranks = range(self._world_size)
        try:
            self._store.wait([f"{self._prefix}{rank}" for rank in ranks])
            beats = self._read(ranks)
        except torch_dist.DistError as error:
            raise RanksError(f"a rank has ended at its start: {first_line(error)}; see the ranks' output") from error
        machine = self._beat.process.machine
        self._host_of_store = beats[0]
        self._neighbours = [beat for beat in beats if machine and beat.process.machine == machine]
        self._alone_on_host = len(self._neighbours) == self._world_size
        leads = not self._neighbours or self._neighbours[0].rank == self._rank
        self._watched = [beat.rank for beat in (beats if leads else self._neighbours)]
        self._watch = Watch(self._config, self._rank, beats if leads else self._neighbours, self._look_s)

    def _read(self, ranks) -> list[Beat]:
        return [Beat.loads(text) for text in self._store.multi_get([f"{self._prefix}{rank}" for rank in ranks])]

    # The first thread: it may have to wait for the store.

    def _exchange_beats(self) -> None:
        looked = 0.0
        while True:
            ended, outbox = self._ended.is_set(), self._outbox
            self._beat = replace(self._beat, count=self._beat.count + 1, progress=self._progress, done=ended)
            try:
                self._store.set(f"{self._prefix}{self._rank}", self._beat.dumps())
                if outbox is not None and not self._told.is_set():
                    self._store.compare_set(f"{self._prefix}verdict", UNDECIDED, outbox.dumps())
                    self._told.set()
                if ended:
                    return
                if time.monotonic() - looked >= self._look_s or outbox is not None:
                    looked = time.monotonic()
                    self._look()
            except RuntimeError as error:  # torch's DistError among them
                self._lost = first_line(error)
                return
            self._wake.wait(self._config.every_s)
            self._wake.clear()

    def _look(self) -> None:
        states = {beat.rank: beat.process.state() for beat in self._neighbours}  # before the beats: see Watch.observe
        beats = self._read(self._watched)
        verdict = self._store.get(f"{self._prefix}verdict").decode()
        self._inbox = (states, beats, None if verdict == UNDECIDED else Verdict.loads(verdict))

    def _tell(self, verdict: Verdict) -> None:
        """Tell the others, unless one of them has told something before."""
        self._outbox = verdict
        self._wake.set()
        self._told.wait(2 * self._config.every_s)

    # The second thread: it never waits for anything.

    def _watch_others(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(min(self._config.every_s / 4, 0.25)):
            now = time.monotonic()
            self._watch.pass_time(now - before)
            before = now
            told = None
            if self._inbox is not None:
                (states, beats, told), self._inbox = self._inbox, None
                self._watch.observe(states, beats)
            verdict = told or self._watch.verdict() or self._store_verdict()
            if verdict is not None:
                self._bring_down(verdict, told is not None)
                return

    def _store_verdict(self) -> Verdict | None:
        if not self._lost and not self._watch.silent():
            return None
        if self._outbox is not None:  # this rank fails by itself, and others do so too
            return self._outbox
        reason = self._lost or f"no answer for {self._config.dead_after_s:g} s"
        return self._watch.store_lost(reason, self._agent, self._host_of_store)

    def _bring_down(self, verdict: Verdict, told: bool) -> None:
        """Say what has happened, and end this process."""
        if not told:
            self._tell(verdict)
        self._verdict = verdict
        if verdict.kind == "failed" and self._ends_by_itself():
            return
        self._decided.set()
        # In a thread, since stderr and the file system may be what hangs.
        speaker = threading.Thread(target=self._report, args=(verdict,), daemon=True)
        speaker.start()
        speaker.join(LAST_WORDS_S)
        self._reported.set()
        if self._failing.is_set() and self._ended.wait(LAST_WORDS_S):
            return
        if not told:
            self._let_read()
        os._exit(1)

    def _let_read(self) -> None:
        """Wait until the others have read what this rank has told: the store may end with this process."""
        time.sleep(1.5 * self._look_s)

    def _ends_by_itself(self) -> bool:
        """Whether the main thread leaves the context soon; if it waits for an explanation it does not."""
        deadline = time.monotonic() + OWN_END_S
        while time.monotonic() < deadline and not self._waiting.is_set():
            if self._ended.wait(0.1):
                return True
        return False

    def _report(self, verdict: Verdict) -> None:
        if self._speaks(verdict):
            print(f"\nerror: {verdict.message}; all ranks end", file=sys.stderr, flush=True)
        if verdict.kind == "hung" and self._rank in verdict.ranks:
            frame = sys._current_frames()[threading.main_thread().ident]
            stack = "".join(traceback.format_stack(frame))
            print(f"rank {self._rank} waits here (innermost call last):\n{stack}", file=sys.stderr, flush=True)
        left = [rank for rank in range(self._world_size) if verdict.kind != "dead" or rank not in verdict.ranks]
        if self._rank == left[0]:
            self.on_failure(verdict.message)
        if verdict.kind == "dead":
            self._kill(verdict.ranks)

    def _speaks(self, verdict: Verdict) -> bool:
        """Whether this rank prints the verdict: one of each host does, and none that has said it as its own error."""
        silent = set(verdict.ranks) if verdict.kind in ("dead", "failed") else set()
        able = [beat.rank for beat in self._neighbours if beat.process.state() not in ("", "T", "t")]
        return self._rank not in silent and self._rank == min(
            (rank for rank in able if rank not in silent), default=self._rank
        )

    def _kill(self, ranks: tuple[int, ...]) -> None:
        """End processes of this machine that are silent but there: they would hold memory, files and the launcher."""
        for beat in self._neighbours:
            if beat.rank in ranks and beat.rank != self._rank and beat.process.state():
                os.kill(beat.process.pid, signal.SIGKILL)


def _comes_from_others(error: BaseException) -> bool:
    """Whether an error tells of a broken connection rather than of this rank."""
    return isinstance(error, torch_dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in CONNECTION_WORDS)
    )
