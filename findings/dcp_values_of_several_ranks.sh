#!/usr/bin/env bash
# PyTorch 2.14.1, torch.distributed.checkpoint: tensors and numbers that both ranks save under one name (gloo, CPU).
#
# Guess: what is not sharded is written by rank 0, or refused where the ranks differ.
# Seen: the writing is dealt out among the ranks, one name after the other, and a plain number or text is that of the last
# rank. One checkpoint so holds a mixture, which every rank gets when it loads.
#
#   saved by both ranks            loaded
#   1.running_mean                 rank 0's
#   1.running_var                  rank 1's
#   step (a number)                rank 1's
#
# Buffers under FSDP2 are such tensors: of a BatchNorm whose ranks have seen different data, the mean of one rank is saved
# with the variance of another. Fails if this changes.
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


def look(rank):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model(torch.randn(8, 4) + 10 * rank)  # each rank has data of its own
    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    dcp.save({"model": model.state_dict(), "step": rank}, checkpoint_id=sys.argv[2])
    loaded = {"model": model.state_dict(), "step": -1}
    dcp.load(loaded, checkpoint_id=sys.argv[2])
    both = [None, None]
    dist.all_gather_object(both, own)
    found = {"step": loaded["step"]}
    for name in ("1.running_mean", "1.running_var"):
        assert not torch.equal(both[0][name], both[1][name])
        found[name] = next(r for r in range(2) if torch.equal(loaded["model"][name], both[r][name]))
    if rank == 0:
        print("loaded", {name: f"rank {of}'s" for name, of in found.items()})
    assert found["1.running_mean"] != found["1.running_var"], "changed: all buffers are of one rank"
    assert found["step"] == 1, "changed: numbers are of the first rank"
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(look, nprocs=2)
PYTHON
port="$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
"$folder/venv/bin/python" "$folder/look.py" "$port" "$folder/checkpoint"
echo "as stated"
