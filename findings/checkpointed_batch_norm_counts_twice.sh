#!/usr/bin/env bash
# PyTorch 2.14.1, torch.utils.checkpoint: running statistics of a BatchNorm that is computed again in the backward pass.
#
# Guess: what is computed again leaves no trace, as dropout draws the same numbers again; so running statistics are those
# of a plain module.
# Seen: they are updated in both passes, with use_reentrant=False and True: after one batch num_batches_tracked is 2 and
# the running mean is 1.9 times that of a plain module (momentum 0.1). The gradients are equal.
#
# A PatchGAN discriminator under gradient checkpointing so has other statistics in eval mode. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)
plain = nn.BatchNorm2d(3)
x = torch.randn(8, 3, 4, 4) + 1
weight = torch.randn(8, 3, 4, 4)
for reentrant in (False, True):
    own, again = copy.deepcopy(plain), copy.deepcopy(plain)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (own(a) * weight).sum().backward()
    (checkpoint(again, b, use_reentrant=reentrant) * weight).sum().backward()
    ratio = (again.running_mean / own.running_mean).mean().item()
    print(f"use_reentrant={reentrant}: batches {int(again.num_batches_tracked)}, running mean {ratio:.2f} of the plain")
    assert torch.allclose(a.grad, b.grad)
    assert int(own.num_batches_tracked) == 1
    assert int(again.num_batches_tracked) == 2 and abs(ratio - 1.9) < 1e-4, "changed: counted once"
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
echo "as stated"
