#!/usr/bin/env bash
# PyTorch 2.14.1, torch.distributed with gloo (CPU): wait(timeout) of an asynchronous operation whose other side is late.
#
# Guess: when the time is over it raises, and may be called again: the operation is still under way. So it is with
# all_reduce.
# Seen: with irecv the limit ends the connection to the other rank for good. The second wait raises, and so does every later
# operation between the two, while is_completed() says True. The other rank, which is well, gets "Connection closed by
# peer ... typically caused by a remote worker crashing" when it sends.
#
#   operation    first wait, 0.5 s   second wait             the other rank
#   all_reduce   raises              has the result          has the result
#   irecv        raises              raises at once          its send raises
#
# Nothing can be polled so; is_completed() can. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import datetime
import os
import sys

import torch
import torch.distributed as dist


def said(what):
    """What an operation raises, or "well"."""
    try:
        what()
        return "well"
    except RuntimeError as error:
        return str(error)


def look(rank, port, operation):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    store, number = dist.distributed_c10d._get_default_store(), torch.ones(1)
    if rank == 0:
        work = dist.irecv(number, 1) if operation == "irecv" else dist.all_reduce(number, async_op=True)
        first = said(lambda: work.wait(datetime.timedelta(seconds=0.5)))
        store.set("waited", "yes")
        store.wait(["sent"])
        second, completed = said(lambda: work.wait(datetime.timedelta(seconds=30))), work.is_completed()
        theirs = store.get("sent").decode()
        print(f"{operation}: first wait: {first[-30:]!r}, second: {second!r}, the other rank: {theirs!r}")
        assert "imed out" in first and completed
        if operation == "all_reduce":
            assert second == theirs == "well" and number.item() == 2, "changed: all_reduce"
        else:
            assert "pair closure" in second, "changed: it may be waited for again"
            assert "remote worker crashing" in theirs, "changed: what the other rank hears"
    else:
        store.wait(["waited"])
        number *= 1
        theirs = said(lambda: dist.send(number, 0)) if operation == "irecv" else None
        if operation == "all_reduce":
            work = dist.all_reduce(number, async_op=True)
            theirs = said(lambda: work.wait(datetime.timedelta(seconds=30)))
        store.set("sent", theirs.partition("Check the logs")[0].partition("] Conn")[2] or theirs)
        store.wait(["end"])
    if rank == 0:
        store.set("end", "yes")


if __name__ == "__main__":
    for port, operation in zip(sys.argv[1:], ("all_reduce", "irecv"), strict=True):
        torch.multiprocessing.spawn(look, args=(port, operation), nprocs=2)
PYTHON
ports() { "$folder/venv/bin/python" -c 'import socket
for s in [socket.socket(), socket.socket()]: s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
# shellcheck disable=SC2046
"$folder/venv/bin/python" "$folder/look.py" $(ports)
echo "as stated"
