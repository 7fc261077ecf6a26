"""Preflights of several ranks, each rank a process of its own that is forked here, since importing torch takes seconds.

    python tests/workers/preflight_worker.py CASES.json

CASES: {name: {"ranks": N, "folders": [of each rank], "options": [of launchers/lib/preflight.py], and faults}}. Faults,
each by a rank: "absent" (it does not start), "clock" ({rank: seconds}), "killed" (by SIGKILL in its all-reduce),
"stopped" (SIGSTOP there), "mute" (killed after its hello). All cases run at the same time; the answer on stdout is
{name: {rank: [exit code or minus signal, what it said, whether it had to be ended]}}.
"""

import gc
import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as torch_dist

from launchers.lib import preflight as launcher

LIMIT_S = 400.0  # what has not ended by then hangs


def plant(case: dict, rank: int) -> None:
    """Put the case's faults into this rank's process."""
    if (seconds := case.get("clock", {}).get(str(rank))) is not None:
        real = time.time
        time.time = lambda: real() + seconds
    number = {case.get("killed"): signal.SIGKILL, case.get("stopped"): signal.SIGSTOP}.get(rank)
    if number is not None:
        torch_dist.all_reduce = lambda *_, **__: os.kill(os.getpid(), number)
    if case.get("mute") == rank:
        torch_dist.PrefixStore.wait = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def work(case: dict, rank: int, port: int, said: int) -> int:
    """One rank; its exit code."""
    os.dup2(said, 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    ranks = str(case["ranks"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    plant(case, rank)
    return launcher.main(["--folder", case["folders"][rank], "--device", "cpu", *case.get("options", [])])


def start(case: dict) -> dict[int, tuple[int, object]]:
    """The process and the file of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = {}
    for rank in range(case["ranks"]):
        if rank in case.get("absent", []):
            continue
        said = tempfile.TemporaryFile()  # noqa: SIM115 (of a rank)
        process = os.fork()
        if not process:
            try:
                code = work(case, rank, port, said.fileno())
            except BaseException as error:
                os.write(2, f"Traceback: {error!r}".encode())
                code = 99
            if not {"killed", "stopped"} & case.keys():
                os._exit(code)  # to end torch takes a second
            sys.exit(code)  # as in earnest, with a thread in a collective
        started[rank] = (process, said)
    return started


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    gc.freeze()  # a collection would copy what the ranks share
    begun = time.monotonic()
    running = {(name, rank): found for name, case in cases.items() for rank, found in start(case).items()}
    answer: dict[str, dict[int, list]] = {name: {} for name in cases}
    while running:
        late = time.monotonic() - begun > LIMIT_S
        for (name, rank), (process, said) in list(running.items()):
            others_ended = not any(other == name and number != rank for other, number in running)
            if late or (cases[name].get("stopped") == rank and others_ended):
                os.kill(process, signal.SIGKILL)
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                said.seek(0)
                code = os.waitstatus_to_exitcode(status)
                answer[name][rank] = [code, said.read().decode(), late]
                del running[name, rank]
        time.sleep(0.02)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
