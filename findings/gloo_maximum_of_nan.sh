#!/usr/bin/env bash
# PyTorch 2.14.1, torch.distributed with gloo (CPU): all_reduce with MAX or MIN where one of three ranks has a NaN.
#
# Guess: a NaN stays one, as in torch.max, or is passed over, as in fmax; in any case wherever it comes from.
# Seen: it shows only where rank 0 has it. On another rank it vanishes, and may take a third rank's number with it. All
# ranks get the same answer; SUM always gives NaN.
#
#   ranks have       MAX   MIN   SUM
#   nan, 2, 3        nan   nan   nan
#   1, nan, 3        1     1     nan
#   1, 2, nan        2     1     nan
#
# What takes the largest loss or gradient norm of all ranks to see whether one is not finite, misses it; a flag made by
# isfinite() on each rank does not. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import math
import os
import sys

import torch
import torch.distributed as dist

RANKS = 3


def look(rank):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
    dist.init_process_group("gloo")
    for sick in range(RANKS):
        found = {}
        for name in ("MAX", "MIN", "SUM"):
            number = torch.tensor([math.nan if rank == sick else rank + 1.0])
            dist.all_reduce(number, getattr(dist.ReduceOp, name))
            found[name] = number.item()
        answers = [None] * RANKS
        dist.all_gather_object(answers, str(found))
        assert len(set(answers)) == 1, answers
        if rank == 0:
            print(f"NaN on rank {sick}: {found}")
            assert math.isnan(found["SUM"])
            for name in ("MAX", "MIN"):
                assert math.isnan(found[name]) == (sick == 0), f"changed: {name} with a NaN on rank {sick}"
            assert sick != 1 or found["MAX"] == 1, "changed: what is lost beside the NaN"
    dist.barrier()  # all leave together: gloo may abort one whose peer is gone
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(look, nprocs=RANKS)
PYTHON
port="$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
"$folder/venv/bin/python" "$folder/look.py" "$port"
echo "as stated"
