#!/usr/bin/env bash
# DeepSpeed 0.19.8, ZeRO-3 on two CPU ranks: a checkpoint made universal by ds_to_universal, loaded with load_universal.
#
# Guess: a universal checkpoint is the whole model for any number of ranks, frozen parameters and buffers included, as the
# checkpoint that it was made of is; or the load says what is missing.
# Seen: it holds trained parameters alone. load_checkpoint returns as if all was well; a frozen weight and a buffer keep what
# the new process has initialised. The trained weight comes back, and without load_universal all three do.
#
#   loaded           trained  frozen           buffer
#   plain            right    right            right
#   universal        right    that of the new  that of the new
#
# A fine-tuning with a frozen encoder so goes on with a random one. Needs g++. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet setuptools wheel torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -m pip install --quiet --no-build-isolation deepspeed==0.19.8
cat >"$folder/look.py" <<'PYTHON'
import logging
import os
import socket
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import nn

CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True}


class Model(nn.Module):
    """A frozen and a trained layer, and a buffer."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.frozen, self.trained = nn.Linear(6, 6, bias=False).requires_grad_(False), nn.Linear(6, 6, bias=False)
        self.register_buffer("buffer", torch.rand(3))

    def forward(self, x):
        """A loss."""
        return (self.trained(self.frozen(x)) + self.buffer.mean()).square().mean()


def look(rank, port, folder, kind):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    import deepspeed

    logging.disable(logging.WARNING)
    model = Model(seed=1 if kind == "save" else 2)
    more = {"checkpoint": {"load_universal": True}} if kind == "universal" else {}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG | more)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        new = {"trained": model.trained.weight.clone(), "frozen": model.frozen.weight.clone(), "buffer": model.buffer.clone()}
    if kind == "save":
        engine.backward(engine(torch.ones(2, 6)))
        engine.step()
        engine.save_checkpoint(folder, tag="plain")
    else:
        path, _ = engine.load_checkpoint(folder, tag=kind)
        assert path is not None
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        here = {"trained": model.trained.weight.clone(), "frozen": model.frozen.weight.clone(), "buffer": model.buffer.clone()}
    if kind == "save":
        torch.save(here, f"{folder}/truth.pt") if rank == 0 else None
    elif rank == 0:
        truth = torch.load(f"{folder}/truth.pt")
        found = {n: "right" if torch.equal(here[n], truth[n]) else "new" if torch.equal(here[n], new[n]) else "?" for n in here}
        print(f"{kind}: {found}")
        lost = {"trained": "right", "frozen": "new", "buffer": "new"}
        assert found == (lost if kind == "universal" else dict.fromkeys(here, "right")), f"changed: {kind}"
    dist.barrier()
    dist.destroy_process_group()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


if __name__ == "__main__":
    folder = sys.argv[1]
    for kind in ("save", "plain", "universal"):
        if kind == "universal":
            convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", f"{folder}/plain"]
            convert += ["--output_folder", f"{folder}/universal", "--num_extract_workers", "1", "--num_merge_workers", "1"]
            subprocess.run(convert, check=True, capture_output=True)
            with open(f"{folder}/latest_universal", "w") as file:
                file.write("universal")
        torch.multiprocessing.spawn(look, args=(free_port(), folder, kind), nprocs=2)
PYTHON
mkdir "$folder/checkpoints"
export DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$folder/extensions" OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
"$folder/venv/bin/python" "$folder/look.py" "$folder/checkpoints" >"$folder/log" 2>&1 || { tail "$folder/log"; exit 1; }
grep -E "^(plain|universal):" "$folder/log" >"$folder/said"
cat "$folder/said"
[ "$(cat "$folder/said")" = "plain: {'trained': 'right', 'frozen': 'right', 'buffer': 'right'}
universal: {'trained': 'right', 'frozen': 'new', 'buffer': 'new'}" ] || { echo "changed: what comes back"; exit 1; }
echo "as stated"
