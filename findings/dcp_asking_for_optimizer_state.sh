#!/usr/bin/env bash
# PyTorch 2.14.1, torch.distributed.checkpoint: get_optimizer_state_dict of an AdamW that has made no step yet.
#
# Guess: to ask for a state changes nothing; of an optimizer without state it is empty.
# Seen: it makes a step with zero gradients and a learning rate of 0 to bring the state about, and leaves it there:
# "step" is 1 before training begins. The bias correction of the first true step is then that of a second one, so with
# the default betas it moves the weights by 0.74 of what it would have, and the next ones still differ.
#
#   first update without asking  -0.01000
#   first update after asking    -0.00744
#
# A job that writes a checkpoint of step 0, or whose discriminator has not started when it first saves, so trains
# otherwise than one that does not. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def first_update(ask):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.0)
    before = layer.weight.detach().clone()
    if ask:
        get_optimizer_state_dict(layer, optimizer)
        assert torch.equal(layer.weight, before)
        print("after asking, step is", optimizer.state[layer.weight]["step"].item())
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return (layer.weight - before).mean().item(), optimizer.state[layer.weight]["step"].item()


(plain, one), (asked, two) = first_update(False), first_update(True)
print(f"first update without asking {plain:.5f}, after asking {asked:.5f}: {asked / plain:.3f} of it")
assert one == 1 and abs(plain + 0.01) < 1e-5
assert two == 2, "changed: the question leaves no step behind"
assert abs(asked / plain - 0.744) < 0.005, "changed: the first update"
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
echo "as stated"
