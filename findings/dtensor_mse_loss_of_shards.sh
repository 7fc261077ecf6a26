#!/usr/bin/env bash
# PyTorch 2.14.1, DTensor: the mean of a loss over 5 rows that two ranks share as 3 and 2 (gloo, CPU).
#
# Guess: losses with reduction="mean" are right for every sharding, as tensor.mean() is; where they could not be, they
# would raise.
# Seen: tensor.mean(), l1_loss and kl_div are right. mse_loss, smooth_l1_loss, huber_loss, binary_cross_entropy and
# soft_margin_loss average the ranks' means without regard to their numbers of rows, and say nothing. The gradients of
# mse_loss are those of each rank's own mean: twice too large on two ranks that have equally many rows.
#
#                                       over the whole tensor's
#   mean(), l1_loss                     1.000
#   mse_loss, smooth_l1, huber          1.143
#   binary_cross_entropy                1.065
#   gradient of mse_loss, by row        1.667 (rank 0) and 2.500 (rank 1)
#   the same of 4 rows, shared evenly   2.000
#
# A reconstruction loss over sharded activations so depends on the number of ranks. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

warnings.simplefilter("ignore")
NAMES = ["l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss"]
RIGHT = {"l1_loss"}


def look(rank):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(15.0).reshape(5, 3) / 20 + 0.1

    def share(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)])

    ratios = {"mean": float(share(whole).mean().full_tensor() / whole.mean())}
    for name in NAMES:
        loss = getattr(F, name)
        ratios[name] = float(loss(share(whole), share(whole / 2)).full_tensor() / loss(whole, whole / 2))
    ours, theirs = share(whole).requires_grad_(), whole.clone().requires_grad_()
    F.mse_loss(ours, share(whole / 2)).backward()
    F.mse_loss(theirs, whole / 2).backward()
    gradient = (ours.grad.full_tensor() / theirs.grad).mean(dim=1).tolist()
    even, expected = distribute_tensor(whole[:4], mesh, [Shard(0)]).requires_grad_(), whole[:4].clone().requires_grad_()
    F.mse_loss(even, share(whole[:4] / 2)).backward()
    F.mse_loss(expected, whole[:4] / 2).backward()
    ratio = (even.grad.full_tensor() / expected.grad).mean().item()
    if rank == 0:
        print("\n".join(f"{name:22s} {ratio:.3f}" for name, ratio in ratios.items()))
        print("gradient of mse_loss by row", [f"{row:.3f}" for row in gradient], f"of 4 rows {ratio:.3f}")
        assert abs(ratios["mean"] - 1) < 1e-5, "changed: mean()"
        assert abs(ratio - 2) < 1e-5 and abs(gradient[0] - 5 / 3) < 1e-5, "changed: gradients"
        for name in NAMES:
            assert (abs(ratios[name] - 1) < 1e-5) == (name in RIGHT), f"changed: {name}"
    dist.barrier()  # all leave together: gloo may abort one whose peer is gone
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(look, nprocs=2)
PYTHON
port="$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
"$folder/venv/bin/python" "$folder/look.py" "$port"
echo "as stated"
