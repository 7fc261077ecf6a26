#!/usr/bin/env bash
# DeepSpeed 0.19.8, ZeRO-3 on a CPU: programs that a training step starts.
#
# Guess: none; what there is of cores and memory nodes is asked once, as the process begins.
# Seen: `numactl --hardware`, for every bucket of gradients that is reduced: device_count() of the CPU's accelerator, which
# stage 3 asks for the size of a node, counts the memory nodes anew each time. It is forked from the whole training process,
# also where numactl is not installed. With LOCAL_SIZE=1 in the environment, which is believed instead, none is started.
#
#   buckets in a step      programs started in a step
#   1                      1
#   8                      8
#   8, with LOCAL_SIZE=1   0
#
# Needs g++. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet setuptools wheel torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" -m pip install --quiet --no-build-isolation deepspeed==0.19.8
cat >"$folder/look.py" <<'PYTHON'
import logging
import os
import socket
import sys

import torch
from torch import nn

LAYERS, STEPS = 8, 4
started = []
sys.addaudithook(lambda event, found: started.append(found[0]) if event == "subprocess.Popen" else None)


def look(buckets):
    """Programs that the last step started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    import deepspeed

    logging.disable(logging.WARNING)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(LAYERS)))
    zero = {"stage": 3, "reduce_bucket_size": LAYERS * 256 // buckets, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(STEPS):
        started.clear()
        engine.backward(engine(torch.ones(1, 16)).square().mean())
        engine.step()
    return [*started]


found = look(int(sys.argv[1]))
assert set(found) <= {"numactl"}, f"other programs: {set(found)}"
print(f"buckets {sys.argv[1]}, LOCAL_SIZE {os.environ.get('LOCAL_SIZE', 'not set')}: {len(found)} started", flush=True)
sys.exit(len(found) != int(sys.argv[2]))
PYTHON
look() {
  env -u LOCAL_SIZE DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$folder/extensions" PATH="$folder/venv/bin:$PATH" "$@" \
    2>"$folder/errors" | grep started || { cat "$folder/errors" && echo "changed" && exit 1; }
}
look python "$folder/look.py" 1 1
look python "$folder/look.py" 8 8
look env LOCAL_SIZE=1 python "$folder/look.py" 8 0
echo "as stated"
