"""How the ranks of a run find each other: what a launcher's variables say, and a store in which all of them meet.

They meet before a collective can wait for one of them: PyTorch's own rendezvous waits half an hour for a rank that has
ended at its start, and does not say which it is.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as torch_dist

from ibq.config import UserError

PORTS = range(12_000, 28_000)  # of the rendezvous under Slurm: below those that the system hands out
BY_HAND = (
    "start the ranks by torchrun, deepspeed or srun, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
)
COME_WITHIN_S = 300.0  # of the first rank that waits
LAST_WORDS_S = 10.0  # that a rank with a problem takes to tell the others, which may come later
PATIENCE_S = 15.0  # before rank 0 says for whom it waits
POLL_S, SLOW_POLL_S, LOOK_EVERY_S = 0.01, 0.05, 1.0
NAMED_AT_MOST = 8
T = TypeVar("T")
_stores: dict["Place", torch_dist.Store] = {}  # that this process has opened: its ranks may meet again, for another run


class RanksError(UserError):
    """Not all ranks are there; the same command may do better, so that its exit code is not that of a mistake."""

    exit_code = 1


class _LeftError(Exception):
    """What a call waits for has gone."""


class Place(NamedTuple):
    """Where a launcher's variables put this process."""

    rank: int
    ranks: int
    address: str  # of the store
    port: int

    @property
    def kept_by_agent(self) -> bool:
        """Whether torchrun's agent keeps the store, over all restarts; with other launchers rank 0 does."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def is_there(self) -> bool:
        """Whether something listens there; also where it does not answer soon."""
        try:
            socket.create_connection((self.address, self.port), timeout=LOOK_EVERY_S).close()
        except ConnectionRefusedError:
            return False
        except OSError:
            pass
        return True

    def __str__(self) -> str:
        return f"MASTER_ADDR={self.address} MASTER_PORT={self.port}"


class Meeting(NamedTuple):
    """All ranks have come. The store is theirs alone, also where torchrun keeps one over all restarts."""

    place: Place
    life: str  # prefix of what this life writes
    store: torch_dist.Store


# --- What launchers say ---


def place() -> Place | None:
    """This process among the others; None where it is alone. UserError where the variables make no sense."""
    os.environ.update(slurm_task(os.environ))
    ranks = number("WORLD_SIZE", "1")
    if ranks <= 1:
        return None
    found = Place(number("RANK"), ranks, _variable("MASTER_ADDR"), number("MASTER_PORT"))
    if found.rank >= ranks:
        raise UserError(f"RANK={found.rank} must be below WORLD_SIZE={ranks}; {BY_HAND}")
    if not 0 < found.port < 2**16:
        raise UserError(f"MASTER_PORT={found.port} is no port; give a free one, from 1024 to 65535, to all ranks")
    return found


def number(name: str, default: str | None = None) -> int:
    """A variable of the launcher; UserError where it is not set or no whole number."""
    value = _variable(name, default)
    if not re.fullmatch(r"\d{1,9}", value):
        raise UserError(f"{name}={value} is no whole number; {BY_HAND}")
    return int(value)


def own_gpu() -> int:
    """This process's GPU among those that it sees: its number on the machine, or 0 where Slurm shows it one alone.

    So it does with `srun --gpus-per-task=1`: every task has a device 0 that the others do not see.
    """
    per_task = f"{os.environ.get('SLURM_GPUS_PER_TASK', '')} {os.environ.get('SLURM_TRES_PER_TASK', '')}"
    bound = os.environ.get("SLURM_GPU_BIND", "").startswith(("per_task", "single", "map_gpu"))
    alone = (bound or bool(per_task.strip())) and torch.cuda.device_count() == 1
    return 0 if alone else number("LOCAL_RANK", "0")


def _variable(name: str, default: str | None = None) -> str:
    value = os.environ.get(name) or default
    if value is None:
        raise UserError(f"{name} is not set, but WORLD_SIZE={os.environ['WORLD_SIZE']} is; {BY_HAND}")
    return value


def slurm_task(environment: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for a task that srun has started with others; none where a launcher has set them already.

    The variables of the job are not enough: a batch script has them too, and is no rank. UserError where they are not
    those of a task.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or "WORLD_SIZE" in environment:
        return {}
    try:
        return {
            "RANK": environment["SLURM_PROCID"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "WORLD_SIZE": tasks,
            "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": environment.get("MASTER_PORT") or str(slurm_port(environment)),
        }
    except (KeyError, ValueError) as error:
        problem = f"SLURM_STEP_NUM_TASKS={tasks} is set as in a task of srun, but not {error.args[0]}"
        raise UserError(f"{problem}; start the ranks by srun, or this process alone by WORLD_SIZE=1") from error


def slurm_port(environment: Mapping[str, str]) -> int:
    """A port that differs between the jobs, the steps and the restarts of a job that may meet on a node."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    number = 7 * job + 3 * step + int(environment.get("SLURM_RESTART_COUNT", "0"))
    return PORTS[number % len(PORTS)]


def first_host(nodes: str) -> str:
    """The first of a list of hosts as Slurm writes it: `node[03-07,12],login` begins with `node03`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


# --- The meeting ---


@contextlib.contextmanager
def telling_others() -> Iterator[None]:
    """An error in this context, before the ranks have met, is told to the others, which end too."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(Exception):  # their wait is bounded
            meet(LAST_WORDS_S, _word(error))
        raise


def _word(error: Exception) -> dict:
    """What the others are told of an error."""
    text = " ".join((str(error) or type(error).__name__).split())
    return {"text": f"host {os.uname().nodename}: {text}", "code": getattr(error, "exit_code", RanksError.exit_code)}


def meet(within_s: float = COME_WITHIN_S, word: Mapping | None = None) -> Meeting | None:
    """Wait until all ranks have come; None where this process is alone.

    `word`: why this rank will not take part (text, exit code). Errors: on all ranks RanksError that names those that
    have not come in time, or what a rank has said, as UserError if that is one; UserError where there is no store at
    the launcher's address.
    """
    own = place()
    if own is None:
        return None
    end = time.monotonic() + within_s
    store = _stores.get(own) or _stores.setdefault(own, _open_store(own, end))
    try:
        life, verdict = (_call_roll if own.rank == 0 else _answer)(store, own, word or {}, end)
    except torch_dist.DistError as error:
        raise RanksError(_gone(own, first_line(error))) from error
    if verdict:
        raise (UserError if verdict["code"] == UserError.exit_code else RanksError)(verdict["text"])
    return Meeting(own, life, torch_dist.PrefixStore(life, store))


def _call_roll(store: torch_dist.Store, own: Place, word: Mapping, end: float) -> tuple[str, Mapping]:
    """Rank 0's part: (prefix of this life, why it ends before it has begun, or nothing).

    torchrun's agent keeps one store over all restarts, and the processes of a new life would find the addresses of
    dead ones in it (https://github.com/pytorch/pytorch/issues/135712). No number that a launcher gives tells the lives
    apart: every agent counts its own restarts. So each rank asks under a random name, and rank 0 answers every name
    that it finds until each rank has said a word in this life.
    """
    life = f"ibq/life/{secrets.token_hex(8)}-of-{own.ranks}/"
    words, answered, verdict = {0: word}, set(), _verdict({0: word})
    say_at = time.monotonic() + PATIENCE_S
    while (missing := sorted(set(range(own.ranks)) - words.keys())) and (now := time.monotonic()) < end:
        if verdict:  # as soon as there is one; the time that is left is for those that are still to be told
            store.set(f"{life}verdict", json.dumps(verdict))
            end = min(end, now + LAST_WORDS_S)
        elif now > say_at:
            say_at = end
            print(f"waiting for {_named(missing)} of {own.ranks} at {own}", file=sys.stderr, flush=True)
        words |= _hear(store, life, missing, answered)
        verdict = verdict or _verdict(words)
        time.sleep(POLL_S)
    if missing and not verdict:
        problem = f"{_named(missing)} of WORLD_SIZE={own.ranks} did not come to {own} in time"
        remedy = "see what became of them, and whether as many ranks were started; then start all again"
        verdict = {"text": f"{problem}; {remedy}", "code": RanksError.exit_code}
    store.set(f"{life}verdict", json.dumps(verdict))
    if verdict and (read := [f"{life}read/{rank}" for rank in words if rank]):
        with contextlib.suppress(torch_dist.DistError):  # the store may end with this process
            store.wait(read, timedelta(seconds=2))
    return life, verdict


def _hear(store: torch_dist.Store, life: str, ranks: Iterable[int], answered: set[str]) -> dict[int, Mapping]:
    """Answer those who ask; the words of those who have had an answer."""
    words = {}
    for rank in ranks:
        if store.check([f"ibq/asks/{rank}"]) and (name := store.get(f"ibq/asks/{rank}").decode()) not in answered:
            answered.add(name)
            store.set(f"ibq/answer/{name}", life)
        if store.check([f"{life}word/{rank}"]):
            words[rank] = json.loads(store.get(f"{life}word/{rank}"))
    return words


def _verdict(words: Mapping[int, Mapping]) -> Mapping:
    """What the first rank with a problem has said, if there is one."""
    for rank, word in words.items():
        if word:
            return {**word, "text": f"rank {rank} has ended at its start, {word['text']}"}
    return {}


def _answer(store: torch_dist.Store, own: Place, word: Mapping, end: float) -> tuple[str, Mapping]:
    """The part of every other rank; see `_call_roll`."""
    name, end = secrets.token_hex(8), end + 3 * LAST_WORDS_S  # longer than rank 0 waits for others
    store.set(f"ibq/asks/{own.rank}", name)
    life = _get(store, f"ibq/answer/{name}", end).decode()
    if not word and not life.endswith(f"-of-{own.ranks}/"):
        word = _word(UserError(f"WORLD_SIZE={own.ranks} is another than that of rank 0; {BY_HAND}"))
    store.set(f"{life}word/{own.rank}", json.dumps(word))
    verdict = json.loads(_get(store, f"{life}verdict", end))
    store.set(f"{life}read/{own.rank}", "")
    return life, verdict


def _get(store: torch_dist.Store, key: str, end: float) -> bytes:
    """A value of the store, once it is there; by asking again, since Ctrl-C does not end the store's own wait."""
    pause = POLL_S
    while not store.check([key]):
        if time.monotonic() > end:
            raise torch_dist.DistStoreError("no answer in time")
        time.sleep(pause)
        pause = min(2 * pause, SLOW_POLL_S)
    return store.get(key)


def _open_store(own: Place, end: float) -> torch_dist.Store:
    """The store of all ranks, which torchrun's agent keeps or else rank 0; either may come later than this rank."""
    keeps = own.rank == 0 and not own.kept_by_agent
    if not keeps:
        _reach(own, end)
    seconds = max(1.0, end - time.monotonic())
    options = {"is_master": keeps, "timeout": timedelta(seconds=seconds), "wait_for_workers": False}
    address = "127.0.0.1" if keeps else own.address  # it listens on all of its host
    try:
        store = _in_time(
            lambda: torch_dist.TCPStore(address, own.port, **options), seconds + 1, lambda: keeps or own.is_there()
        )
    except _LeftError:
        raise RanksError(_gone(own, "its port is closed")) from None
    except torch_dist.DistError as error:
        problem = f"{own}: rank {own.rank} cannot use it ({first_line(error)})"
        raise UserError(f"{problem}; give all ranks another MASTER_PORT") from error
    if store is None:
        raise UserError(f"{own}: another program answers there; give all ranks another MASTER_PORT")
    if keeps:
        _reach(own, min(end, time.monotonic() + LAST_WORDS_S))
    return store


def _reach(own: Place, end: float) -> None:
    """Wait until the store can be reached, without the pages that PyTorch would write to stderr meanwhile."""
    while True:
        left = end - time.monotonic()
        try:
            socket.create_connection((own.address, own.port), timeout=max(1.0, left)).close()
            return
        except OSError as error:  # nobody is there yet, or its name is not yet known
            if left <= 0:
                problem = f"{own}: rank {own.rank} reaches no store of rank 0 there ({error.strerror or error})"
                raise UserError(f"{problem}; see whether rank 0 runs, or give all ranks its host and port") from error
        time.sleep(SLOW_POLL_S)


def _in_time(call: Callable[[], T], seconds: float, still: Callable[[], bool]) -> T | None:
    """The result of a call that may never return, or its error; None if there is neither in time.

    _LeftError as soon as `still` says that none can come any more.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True, name="store")
    thread.start()
    end = time.monotonic() + seconds
    while thread.is_alive() and (left := end - time.monotonic()) > 0:
        thread.join(min(left, LOOK_EVERY_S))
        if thread.is_alive() and not still():
            raise _LeftError
    if errors:
        raise errors[0]
    return results[0] if results else None


def _gone(own: Place, sign: str) -> str:
    problem = f"rank 0, or what keeps the store at {own}, has ended before all ranks had come"
    return f"{problem} ({sign}); see its output, then start all again"


def _named(ranks: Iterable[int]) -> str:
    ranks = list(ranks)
    more = f" and {len(ranks) - NAMED_AT_MOST} more" if len(ranks) > NAMED_AT_MOST else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:NAMED_AT_MOST]))}{more}"


def first_line(error: BaseException) -> str:
    """An error without the stack that PyTorch writes below it."""
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__
