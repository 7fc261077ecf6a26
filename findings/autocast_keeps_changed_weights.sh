#!/usr/bin/env bash
# PyTorch 2.14.1, torch.autocast (CPU, bfloat16): weights that change between two calls within one autocast region.
#
# Guess: the copies that autocast keeps of the weights in low precision follow them: a change in place raises a tensor's
# version, and what assigns other data could not be missed.
# Seen: the second call computes with the old weights, without a word: after an in-place change, after load_state_dict,
# after assigning `weight.data`, and where both calls are made under no_grad. With cache_enabled=False it is right. (A
# first call under no_grad does not cost a second one its gradients.)
#
#   weights doubled by            second result over the first (expected 2)
#   mul_ in place                 1
#   load_state_dict               1
#   assigning weight.data         1
#   mul_, calls under no_grad     1
#   mul_, cache_enabled=False     2
#
# Whoever swaps in averaged weights within the region of the training step compares a model with itself. Fails if this
# changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import torch
from torch import nn


def in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


def loaded(layer):
    layer.load_state_dict({"weight": layer.weight.detach() * 2})


def assigned(layer):
    layer.weight.data = layer.weight.data * 2


def ratio(double, *, cache=True, grad=True):
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 4, bias=False), torch.ones(1, 4)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache), torch.set_grad_enabled(grad):
        first = layer(x).detach().clone()
        double(layer)
        return round(float((layer(x).detach() / first).mean()), 3)


for name, expected, found in [
    ("mul_ in place", 1, ratio(in_place)),
    ("load_state_dict", 1, ratio(loaded)),
    ("assigning weight.data", 1, ratio(assigned)),
    ("mul_, cache_enabled=False", 2, ratio(in_place, cache=False)),
    ("mul_, calls under no_grad", 1, ratio(in_place, grad=False)),
]:
    print(f"{name:26s} {found}")
    assert found == expected, f"changed: {name}"
layer = nn.Linear(4, 4, bias=False)
with torch.autocast("cpu", torch.bfloat16):
    with torch.no_grad():
        layer(torch.ones(1, 4))
    layer(torch.ones(1, 4)).sum().backward()
assert layer.weight.grad is not None and bool(layer.weight.grad.all()), "changed: gradients after a call without them"
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
echo "as stated"
