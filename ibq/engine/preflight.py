"""Before a long run: do all ranks reach each other, see the run's folder, and have the same time?

Every rank says hello through a store that rank 0 keeps; rank 0 finds out who is missing, whose folder is another or
cannot be written, whose clock is wrong and who does not get through an all-reduce, and all ranks learn its verdict.
"""

import contextlib
import json
import os
import secrets
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as torch_dist

from ibq.meeting import Place, own_gpu, place

FOLDER = ".preflight-"  # and a random word, beside the run's files; removed again
POLL_S = 0.05
SEEN_S = 10.0  # that a file may take to be seen on other nodes
OLD_S = 86_400.0  # a check's files are nobody's any more
NAMED_AT_MOST = 6
BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}  # of the tensor that is reduced


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What is asked of the machines."""

    folder: Path  # the run's, on a file system that all nodes share
    device: str = "auto"
    wait_s: float = 120.0  # for the slowest rank
    max_skew_s: float = 5.0  # between the clocks of two nodes


@dataclass(frozen=True, kw_only=True)
class PreflightReport:
    """What was found: `problems` name the nodes at fault."""

    problems: tuple[str, ...]
    ranks: int
    hosts: int
    seconds: float
    skew_s: float = 0.0
    gigabytes_per_second: float = 0.0  # of each rank, in an all-reduce by rings

    def __str__(self) -> str:
        if self.problems:
            return "preflight failed: " + "; ".join(self.problems)
        if self.ranks == 1:
            return "preflight: the folder can be written; there is one rank"
        return (
            f"preflight: {self.ranks} ranks on {self.hosts} nodes in {self.seconds:.1f} s; all see the folder, clocks "
            f"differ by at most {self.skew_s:.2f} s, all-reduce at {self.gigabytes_per_second:.2f} GB/s a rank"
        )


def preflight(config: PreflightConfig, hosts: Sequence[str] = ()) -> PreflightReport:
    """Check the ranks that a launcher or srun has started; every rank calls it and gets the verdict.

    `hosts`: the host of each rank where the scheduler knows it, so that a rank that never speaks can be named. Errors:
    UserError where the launcher's variables make no sense.
    """
    started, own = time.monotonic(), place()
    if own is None:
        folder = config.folder / f"{FOLDER}{secrets.token_hex(4)}"
        problem = _write_own(folder, 0)
        shutil.rmtree(folder, ignore_errors=True)
        problems = (f"{_own_name()}: {problem}",) if problem else ()
        return PreflightReport(problems=problems, ranks=1, hosts=1, seconds=time.monotonic() - started)
    rank, ranks, where = own.rank, own.ranks, f"{own.address}:{own.port}"
    what = f"opens no port at {where}" if rank == 0 else f"does not reach rank 0 at {where}"
    try:
        store = _store(own, timedelta(seconds=config.wait_s))
        what = f"has lost rank 0 at {where}"
        # Longer than rank 0 waits for the slowest rank at each question.
        store.set_timeout(timedelta(seconds=3 * config.wait_s + 60))
        member = _Member(config, store, rank, ranks, list(hosts))
        return member.judge(started) if rank == 0 else member.answer()
    except (RuntimeError, OSError) as error:
        problem = f"rank {rank} on {_own_name()} {what} ({_one_line(error)})"
        return PreflightReport(problems=(problem,), ranks=ranks, hosts=0, seconds=time.monotonic() - started)


def _store(own: Place, timeout: timedelta) -> torch_dist.Store:
    """The store that rank 0 keeps, or torchrun's agent for it."""
    keeps = own.rank == 0 and not own.kept_by_agent
    store = torch_dist.TCPStore(own.address, own.port, is_master=keeps, timeout=timeout, wait_for_workers=False)
    return torch_dist.PrefixStore("ibq/preflight", store)


class _Member:
    """One rank's part of the check."""

    def __init__(self, config: PreflightConfig, store: torch_dist.Store, rank: int, ranks: int, hosts: list[str]):
        self.config, self.store, self.rank, self.ranks, self.hosts = config, store, rank, ranks, hosts
        if rank == 0:
            store.set("word", secrets.token_hex(4))
        # A word of this check's own: others may run in the same folder, or have been killed in it.
        self.folder = config.folder / f"{FOLDER}{store.get('word').decode()}"
        self.device = config.device
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def _hello(self) -> None:
        problem = _write_own(self.folder, self.rank)
        local = own_gpu()
        if self.device == "cuda" and local >= torch.cuda.device_count():
            problem = problem or f"has {torch.cuda.device_count()} CUDA devices, too few for its process {local}"
        self.store.set(f"hello/{self.rank}", json.dumps({"host": _own_name(), "problem": problem}))

    def answer(self) -> PreflightReport:
        """Of any rank but 0."""
        try:
            return self._answer()
        except (RuntimeError, OSError):  # there is no rank 0 any more that would clean up
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _answer(self) -> PreflightReport:
        self._hello()
        self.store.wait([f"ping/{self.rank}"])
        self.store.set(f"pong/{self.rank}", json.dumps(time.time()))
        if json.loads(self.store.get("go")):
            sees = _wait_until((self.folder / "rank-0").exists, self._seen_s())
            self.store.set(f"sees/{self.rank}", json.dumps(sees))
            if json.loads(self.store.get("reduce")):
                self._reduce()
        report = json.loads(self.store.get("report"))
        with contextlib.suppress(OSError):  # where this is another folder, nobody else does it
            (self.folder / f"rank-{self.rank}").unlink(missing_ok=True)
            self.folder.rmdir()
        self.store.set(f"read/{self.rank}", "")
        return PreflightReport(**report | {"problems": tuple(report["problems"])})

    def judge(self, started: float) -> PreflightReport:
        """Of rank 0, which keeps the store."""
        _remove_old(self.config.folder)
        self._hello()
        missing = self._without("hello")
        present = [rank for rank in range(self.ranks) if rank not in missing]
        said = {rank: self._said(f"hello/{rank}", default={}) for rank in present}
        found = dict.fromkeys(missing, f"did not start within {self.config.wait_s:g} s")
        found |= {rank: text["problem"] for rank, text in said.items() if text["problem"]}
        clocks = self._clocks(present[1:])
        found |= {rank: "came and does not answer any more" for rank in present if rank not in clocks}
        found |= {rank: text for rank, text in self._wrong_clocks(clocks).items() if rank not in found}
        self.store.set("go", json.dumps(not found))
        speed = 0.0
        if not found:
            found = dict.fromkeys(self._elsewhere(), f"has another {self.config.folder} than rank 0")
            self.store.set("reduce", json.dumps(not found))
            if not found:
                speed = self._reduce()
                found = self._failed_to_reduce()
        report = {"problems": self._named(found, {rank: text["host"] for rank, text in said.items()})}
        report |= {"ranks": self.ranks, "hosts": len({text["host"] for text in said.values()})}
        report |= {"skew_s": max(clocks.values()) - min(clocks.values()), "gigabytes_per_second": speed}
        report["seconds"] = time.monotonic() - started
        self.store.set("report", json.dumps(report))
        self._without("read", among=present[1:], wait_s=5.0)
        shutil.rmtree(self.folder, ignore_errors=True)
        return PreflightReport(**report | {"problems": tuple(report["problems"])})

    def _named(self, found: Mapping[int, str], said: Mapping[int, str]) -> list[str]:
        """One line for the ranks of a host that have the same problem."""
        together: dict[tuple[str, str], list[int]] = {}
        for rank, text in sorted(found.items()):
            host = said.get(rank) or (self.hosts[rank] if rank < len(self.hosts) else "")
            # Of ranks of which nothing is known, each stays by itself.
            together.setdefault((host or f"\0{rank}", text), []).append(rank)
        lines = []
        for (host, text), ranks in together.items():
            name = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
            lines.append(f"{name}{'' if host.startswith(chr(0)) else f' on {host}'}: {text}")
        rest = len(lines) - NAMED_AT_MOST
        return [*lines[:NAMED_AT_MOST], *([f"and {rest} more nodes"] if rest > 0 else [])]

    def _seen_s(self) -> float:
        return min(SEEN_S, self.config.wait_s)

    def _elsewhere(self) -> list[int]:
        """The ranks whose files this rank does not come to see, or that do not see its own."""
        unseen = set(range(self.ranks))

        def all_seen() -> bool:
            unseen.difference_update({rank for rank in unseen if (self.folder / f"rank-{rank}").exists()})
            return not unseen

        _wait_until(all_seen, self._seen_s())
        others = range(1, self.ranks)
        self._without("sees", among=others, wait_s=2 * self._seen_s())  # who has died by now fails in the all-reduce
        return sorted(unseen | {rank for rank in others if not self._said(f"sees/{rank}", default=True)})

    def _without(
        self, key: str, among: Sequence[int] | None = None, wait_s: float | None = None, poll_s: float = POLL_S
    ) -> list[int]:
        """The ranks that have not said `key` in time."""
        left = set(range(self.ranks) if among is None else among)
        wait_s = self.config.wait_s if wait_s is None else wait_s

        def all_there() -> bool:
            left.difference_update({rank for rank in left if self.store.check([f"{key}/{rank}"])})
            return not left

        _wait_until(all_there, wait_s, poll_s)
        return sorted(left)

    def _said(self, key: str, default):
        return json.loads(self.store.get(key)) if self.store.check([key]) else default

    def _clocks(self, ranks: Sequence[int]) -> dict[int, float]:
        """By how much each rank's clock is before that of rank 0, to within half of what a question takes."""
        clocks = {0: 0.0}
        for rank in ranks:
            before = time.time()
            self.store.set(f"ping/{rank}", "")
            if not self._without("pong", among=[rank], wait_s=self._seen_s(), poll_s=0.001):
                clocks[rank] = self._said(f"pong/{rank}", default=before) - (before + time.time()) / 2
        return clocks

    def _wrong_clocks(self, clocks: Mapping[int, float]) -> dict[int, str]:
        # By the middle one: where rank 0's clock is wrong, it is not all others that are.
        middle = statistics.median_low(clocks.values()) if len(clocks) > 2 else 0.0
        off = {rank: value - middle for rank, value in clocks.items()}
        limit = self.config.max_skew_s
        return {rank: f"its clock is {value:+.1f} s off" for rank, value in off.items() if abs(value) > limit}

    def _reduce(self) -> float:
        """An all-reduce over all ranks in a thread, since a collective may never return; GB/s, and `reduced/RANK`."""
        result: list[float] = []
        problem: list[str] = []

        def work() -> None:
            try:
                result.append(self._all_reduce())
            except Exception as error:
                problem.append(_one_line(error))

        thread = threading.Thread(target=work, daemon=True, name="preflight")
        thread.start()
        thread.join(self.config.wait_s)
        text = problem[0] if problem else ("" if result else f"did not come back within {self.config.wait_s:g} s")
        self.store.set(f"reduced/{self.rank}", json.dumps(text))
        return result[0] if result else 0.0

    def _all_reduce(self) -> float:
        place = torch.device("cuda", own_gpu()) if self.device == "cuda" else torch.device("cpu")
        group = torch_dist.PrefixStore("group", self.store)
        timeout = timedelta(seconds=self.config.wait_s)
        backend = "nccl" if self.device == "cuda" else "gloo"
        torch_dist.init_process_group(backend, store=group, rank=self.rank, world_size=self.ranks, timeout=timeout)
        count = BYTES[self.device] // 4
        values = torch.full((count,), float(self.rank), device=place)
        torch_dist.all_reduce(values)
        expected = self.ranks * (self.ranks - 1) / 2
        if not bool((values == expected).all()):
            raise RuntimeError(f"got {float(values[0])} instead of {expected} from an all-reduce")
        started = time.perf_counter()
        torch_dist.all_reduce(values)
        float(values[0])  # waits for the device
        seconds = time.perf_counter() - started
        torch_dist.barrier()
        torch_dist.destroy_process_group()
        return 2 * (self.ranks - 1) / self.ranks * 4 * count / seconds / 1e9

    def _failed_to_reduce(self) -> dict[int, str]:
        """What kept ranks from the all-reduce: those with an error of their own, or else those that hung."""
        silent = self._without("reduced", wait_s=self._seen_s())
        if silent:
            return dict.fromkeys(silent, "ended in the all-reduce, or hangs there")
        said = {rank: self._said(f"reduced/{rank}", default="") for rank in range(self.ranks)}
        return {rank: f"failed in the all-reduce: {text}" for rank, text in said.items() if text}


def _write_own(folder: Path, rank: int) -> str:
    """Write this rank's file; what keeps it from that, or nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank-{rank}", "w") as file:
            file.write(os.uname().nodename)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot write to {folder.parent} ({error.strerror or error})"
    return ""


def _remove_old(folder: Path) -> None:
    """What checks have left that were killed; others may be running."""
    for old in folder.glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > OLD_S:
                shutil.rmtree(old, ignore_errors=True)


def _wait_until(condition: Callable[[], bool], seconds: float, poll_s: float = POLL_S) -> bool:
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(poll_s)
    return found


def _own_name() -> str:
    """Of this node, as Slurm has it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__
