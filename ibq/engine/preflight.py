"""Before a long run: do all ranks reach each other, see the run's folder, and have the same time?

Every rank says hello through a store that rank 0 keeps; rank 0 finds out who is missing, whose folder is another or
cannot be written, whose clock is wrong and who does not get through an all-reduce, and all ranks learn its verdict.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as torch_dist

from ibq import dist

FOLDER = ".preflight"  # beside the run's files; removed again
POLL_S = 0.05
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

    `hosts`: the host of each rank where the scheduler knows it, so that a rank that never speaks can be named.
    """
    os.environ.update(dist.slurm_task(os.environ))
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    started = time.monotonic()
    if ranks == 1:
        problem = _write_own(config.folder / FOLDER, 0)
        shutil.rmtree(config.folder / FOLDER, ignore_errors=True)
        problems = (f"{os.uname().nodename}: {problem}",) if problem else ()
        return PreflightReport(problems=problems, ranks=1, hosts=1, seconds=time.monotonic() - started)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=config.wait_s)
    try:
        store = torch_dist.TCPStore(address, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        what = "opens no port" if rank == 0 else "does not reach rank 0"
        problem = f"rank {rank} on {os.uname().nodename} {what} at {address}:{port} ({_one_line(error)})"
        return PreflightReport(problems=(problem,), ranks=ranks, hosts=0, seconds=time.monotonic() - started)
    member = _Member(config, store, rank, ranks, list(hosts))
    if rank == 0:
        return member.judge(started)
    return member.answer()


class _Member:
    """One rank's part of the check."""

    def __init__(self, config: PreflightConfig, store: torch_dist.TCPStore, rank: int, ranks: int, hosts: list[str]):
        self.config, self.store, self.rank, self.ranks, self.hosts = config, store, rank, ranks, hosts
        self.folder = config.folder / FOLDER
        self.device = config.device
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def _hello(self) -> None:
        problem = _write_own(self.folder, self.rank)
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if self.device == "cuda" and local >= torch.cuda.device_count():
            problem = problem or f"has {torch.cuda.device_count()} CUDA devices, too few for its process {local}"
        self.store.set(f"hello/{self.rank}", json.dumps({"host": os.uname().nodename, "problem": problem}))

    def answer(self) -> PreflightReport:
        """Of any rank but 0."""
        self._hello()
        self.store.wait([f"ping/{self.rank}"])
        self.store.set(f"pong/{self.rank}", str(time.time()))
        go = json.loads(self.store.get("go"))
        if go:
            self.store.set(f"sees/{self.rank}", json.dumps(_wait_until((self.folder / "rank-0").exists, 10.0)))
            self._reduce()
        report = json.loads(self.store.get("report"))
        self.store.set(f"read/{self.rank}", "")
        return PreflightReport(**report | {"problems": tuple(report["problems"])})

    def judge(self, started: float) -> PreflightReport:
        """Of rank 0, which keeps the store."""
        self._hello()
        missing = self._without("hello")
        names = {rank: self._name(rank, known=rank not in missing) for rank in range(self.ranks)}
        problems = [f"{names[rank]} did not start within {self.config.wait_s:g} s" for rank in missing]
        problems += [f"{names[rank]} {text}" for rank, text in self._own_problems(missing).items()]
        skews = {} if missing else self._skews()
        limit = self.config.max_skew_s
        problems += [f"the clock of {names[rank]} is {s:+.1f} s off" for rank, s in skews.items() if abs(s) > limit]
        self.store.set("go", json.dumps(not problems))
        speed = 0.0
        if not problems:
            unseen = [rank for rank in range(self.ranks) if not _wait_until((self.folder / f"rank-{rank}").exists, 10)]
            problems += [f"{names[rank]} writes to another {self.config.folder} than rank 0" for rank in unseen]
            speed = self._reduce()
            blind = [rank for rank in range(1, self.ranks) if not self._said(f"sees/{rank}", default=False)]
            problems += [f"{names[rank]} sees another {self.config.folder} than rank 0" for rank in blind]
            problems += [f"{names[rank]} {text}" for rank, text in self._failed_to_reduce().items()]
        said = {"problems": problems[:NAMED_AT_MOST], "ranks": self.ranks}
        if len(problems) > NAMED_AT_MOST:
            said["problems"].append(f"and {len(problems) - NAMED_AT_MOST} more")
        said |= {"hosts": len({self._host(rank) for rank in range(self.ranks)}), "skew_s": _spread(skews.values())}
        said |= {"seconds": time.monotonic() - started, "gigabytes_per_second": speed}
        self.store.set("report", json.dumps(said))
        self._without("read", among=[rank for rank in range(1, self.ranks) if rank not in missing], wait_s=5.0)
        shutil.rmtree(self.folder, ignore_errors=True)
        return PreflightReport(**said | {"problems": tuple(said["problems"])})

    def _without(self, key: str, among: Sequence[int] | None = None, wait_s: float | None = None) -> list[int]:
        """The ranks that have not said `key` in time."""
        left = set(range(self.ranks) if among is None else among)
        wait_s = self.config.wait_s if wait_s is None else wait_s

        def all_there() -> bool:
            left.difference_update({rank for rank in left if self.store.check([f"{key}/{rank}"])})
            return not left

        _wait_until(all_there, wait_s)
        return sorted(left)

    def _said(self, key: str, default):
        return json.loads(self.store.get(key)) if self.store.check([key]) else default

    def _host(self, rank: int) -> str:
        said = self._said(f"hello/{rank}", default={})
        return said.get("host") or (self.hosts[rank] if rank < len(self.hosts) else "")

    def _name(self, rank: int, known: bool) -> str:
        host = self._host(rank) if known or self.hosts else ""
        return f"rank {rank} on {host}" if host else f"rank {rank}"

    def _own_problems(self, missing: Sequence[int]) -> dict[int, str]:
        said = {rank: self._said(f"hello/{rank}", default={}) for rank in range(self.ranks) if rank not in missing}
        return {rank: text["problem"] for rank, text in said.items() if text["problem"]}

    def _skews(self) -> dict[int, float]:
        """By how much each rank's clock is before that of rank 0, to within half of what a question takes."""
        skews = {}
        for rank in range(1, self.ranks):
            before = time.time()
            self.store.set(f"ping/{rank}", "")
            theirs = float(self.store.get(f"pong/{rank}"))
            after = time.time()
            skews[rank] = theirs - (before + after) / 2
        return skews

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
        local = int(os.environ.get("LOCAL_RANK", "0"))
        place = torch.device("cuda", local) if self.device == "cuda" else torch.device("cpu")
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
        silent = self._without("reduced", wait_s=10.0)
        said = {rank: self._said(f"reduced/{rank}", default="ended in the all-reduce") for rank in range(self.ranks)}
        found = {rank: text for rank, text in said.items() if text}
        gone = {rank: text for rank, text in found.items() if rank in silent}
        return {rank: f"failed in the all-reduce: {text}" for rank, text in (gone or found).items()}


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


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return found


def _spread(skews) -> float:
    values = [0.0, *skews]
    return max(values) - min(values)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__
