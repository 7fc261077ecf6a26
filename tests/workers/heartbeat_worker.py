"""A toy training loop with a heartbeat and a planted fault, for a launcher or for plain processes.

    torchrun --standalone --nproc-per-node 2 tests/workers/heartbeat_worker.py FOLDER '{"fault": "sleep", "rank": 1}'

Faults, in the given rank, from step 5 on and under torchrun in its first life alone: "none", "ready" (only waits for
the test to do harm to it), "sleep" (the main thread never goes on), "everyone" (all do that), "raise" (an error of its
own), "user" (one of the user, on all ranks), "early" (it ends well while the others go on). "config": settings of the
heartbeat; null: without.

FOLDER/RANK.pid appears at step 5, and with "ready" FOLDER/RANK.heard when the rank has heard that all are there.
FOLDER/RANK.failure holds what on_failure was told, FOLDER/RANK.reason what explain answered; FOLDER/RANK.done says that
the rank has come to its end.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from ibq import dist
from ibq.config import UserError, exit_on_user_error
from ibq.engine.heartbeat import Heartbeat, HeartbeatConfig
from ibq.meeting import meet

STEPS = 10


def steps(folder: Path, settings: dict, heartbeat: Heartbeat) -> None:
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    fault = settings["fault"] if first_life and settings.get("rank", dist.rank()) == dist.rank() else "none"
    for step in range(STEPS):
        heartbeat.mark(step, "data")
        if step == 5:
            (folder / f"{dist.rank()}.pid").write_text(f"{os.getpid()}\n")
            misbehave(fault)
            if fault == "early":
                return
        if settings["fault"] == "early" and step >= 5:
            time.sleep(1.2)  # in all, longer than a rank may be silent
            continue
        heartbeat.mark(step, "forward")
        dist.all_reduce_mean(torch.ones(1000))
        if settings["fault"] == "ready" and step >= 5:
            while True:
                dist.all_reduce_mean(torch.ones(1000))
                if all(seen.beat.progress[:2] == (5, "forward") for seen in heartbeat._watch._seen.values()):
                    (folder / f"{dist.rank()}.heard").touch()
                time.sleep(0.01)


def misbehave(fault: str) -> None:
    match fault:
        case "sleep" | "everyone":
            time.sleep(1_000)
        case "raise":
            raise ValueError("a fault of its own")
        case "user":
            raise UserError("the same on all ranks")


def work(folder: Path, settings: dict) -> int:
    signal.signal(signal.SIGTERM, lambda *_: None)  # as the training loop does: noted, it ends after the step
    torch.set_num_threads(1)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.environ["RANK"] == "0":
        time.sleep(3)  # a late rank 0: the others must not take addresses of its first life from the store
    meeting = meet()
    own = folder / str(meeting.place.rank)
    config = settings.get("config", {})
    with Heartbeat(HeartbeatConfig(**config or {}), meeting if config is not None else None) as heartbeat:
        heartbeat.on_failure = own.with_suffix(".failure").write_text
        dist.setup("cpu", meeting)
        try:
            steps(folder, settings, heartbeat)
        except BaseException as error:
            own.with_suffix(".reason").write_text(heartbeat.explain(error))
            raise
    dist.shutdown()
    own.with_suffix(".done").touch()
    return 0


def work_as(environment: dict[str, str], log: Path, folder: Path, settings: dict) -> None:
    """The same in a forked process."""
    os.environ.update(environment)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    exit_on_user_error(lambda: work(folder, settings))


if __name__ == "__main__":
    exit_on_user_error(lambda: work(Path(sys.argv[1]), json.loads(sys.argv[2])))
