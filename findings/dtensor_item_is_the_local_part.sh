#!/usr/bin/env bash
# PyTorch 2.14.1, DTensor: .item() and float() of a sum, norm or maximum of a tensor that two ranks share (gloo, CPU).
#
# Guess: a scalar that becomes a Python number is reduced over the ranks first, as print() of its full_tensor() shows;
# or it is refused, as .tolist() is.
# Seen: of what is still to be reduced (placement Partial) each rank gets the number of its own part, without a word:
#
#   sum     2.7 and 4.05     of 6.75
#   norm    0.98 and 1.667   of 1.933
#   max     0.5 and 0.8      of 0.8
#   mean    0.45 and 0.45    of 0.45
#
# The mean comes reduced, and so does what clip_grad_norm_ returns. A condition on one of the others, such as "skip this
# step if the norm exceeds 1", is decided by each rank for itself. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

WHOLE = {"sum": False, "norm": False, "max": False, "mean": True}


def look(rank):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(15.0).reshape(5, 3) / 20 + 0.1
    shared = distribute_tensor(whole, mesh, [Shard(0)])
    for name, agrees in WHOLE.items():
        number, parts = getattr(shared, name)(), [None, None]
        dist.all_gather_object(parts, (number.item(), float(number)))
        full = number.full_tensor().item()
        if rank == 0:
            expected = getattr(whole, name)().item()
            print(f"{name:5s} {parts[0][0]:.3f} and {parts[1][0]:.3f}, full_tensor() {full:.3f}")
            assert abs(full - expected) < 1e-5, name
            assert all(item == number for item, number in parts), name
            assert all(abs(item - expected) < 1e-5 for item, _ in parts) == agrees, f"changed: {name}"
    parameter = torch.nn.Parameter(shared)
    parameter.grad = shared * 3
    norm = float(torch.nn.utils.clip_grad_norm_([parameter], 1.0))
    assert abs(norm - 3 * whole.norm()) < 1e-4, "changed: clip_grad_norm_"
    dist.barrier()  # all leave together: gloo may abort one whose peer is gone
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(look, nprocs=2)
PYTHON
port="$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
"$folder/venv/bin/python" "$folder/look.py" "$port"
echo "as stated"
