#!/usr/bin/env bash
# PyTorch 2.14.1, torch.distributed.checkpoint: tensors and numbers that all ranks save under one name (gloo, CPU).
#
# Guess: what is not sharded is written by rank 0, or refused where the ranks differ.
# Seen: each name is written by the rank that has the least to write so far, so one checkpoint holds values of several
# ranks, and all ranks get these when they load. A BatchNorm under FSDP2 on three ranks that have seen different data:
#
#   loaded          default   DefaultSavePlanner(dedup_save_to_lowest_rank=True)
#   running_mean    rank 1's  rank 0's
#   running_var     rank 2's  rank 0's
#   step, a number  rank 2's  rank 0's
#
# The mean of one rank so comes with the variance of another. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

warnings.simplefilter("ignore")


RANKS = 3


def look(rank):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    model(torch.randn(8, 4) + 10 * rank)  # each rank has data of its own
    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ranks = [None] * RANKS
    dist.all_gather_object(ranks, own)
    for lowest, expected in ((False, [1, 2, 2]), (True, [0, 0, 0])):
        place = f"{sys.argv[2]}/{lowest}"
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=lowest)
        for name, buffer in model.named_buffers():
            buffer.copy_(own[name])
        state = {"model": model.state_dict(), "step": rank}
        dcp.save(state, checkpoint_id=place, planner=planner if lowest else None)
        loaded = {"model": model.state_dict(), "step": -1}
        dcp.load(loaded, checkpoint_id=place)
        found = []
        for name in ("1.running_mean", "1.running_var"):
            found += [of for of in range(RANKS) if torch.equal(loaded["model"][name], ranks[of][name])]
        found.append(loaded["step"])
        if rank == 0:
            print(f"dedup_save_to_lowest_rank={lowest}: mean, variance and step of ranks {found}")
        assert found == expected, "changed: whose values are loaded"
    dist.barrier()  # all leave together: gloo may abort one whose peer is gone
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(look, nprocs=RANKS)
PYTHON
port="$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
"$folder/venv/bin/python" "$folder/look.py" "$port" "$folder/checkpoint"
echo "as stated"
