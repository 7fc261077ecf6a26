#!/usr/bin/env bash
# PyTorch 2.14.1, torch.nn.functional.linear_cross_entropy on a CPU: what it takes at its peak, forward and backward.
#
# Guess: a head fused with its loss never holds the table of logits, so it takes less memory than
# cross_entropy(linear(x, w), t) for any number of tokens.
# Seen: called as its signature offers, with options=None, it holds the whole table: the same peak to the megabyte. With
# LinearCrossEntropyOptions() it takes about four times the fp32 weights, however few the tokens: a third of the
# textbook form's at 4,096 tokens x 16,384 codes x 1,024 dimensions, but twice as much as the textbook form at 512 tokens.
#
#   512 tokens:  textbook  109 MiB, options=None  109 MiB, with options 239 MiB (logits 32, weights 64)
#   4096 tokens: textbook  778 MiB, options=None  779 MiB, with options 267 MiB (logits 256, weights 64)
#
# Needs Linux (the peak is read from /proc) and some GB of disk. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/peak.py" <<'PYTHON'
import sys
import torch
import torch.nn.functional as F

form, tokens = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
hidden = torch.randn(tokens, 1024, requires_grad=True)
weight = (torch.randn(16384, 1024) / 32).requires_grad_()
target = torch.randint(16384, (tokens,))


def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024


before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
if form == "textbook":
    loss = F.cross_entropy(F.linear(hidden, weight), target)
elif form == "none":
    loss = F.linear_cross_entropy(hidden, weight, target)
else:
    loss = F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions())
loss.backward()
print(round(status("VmHWM") - before))
PYTHON
peak() { "$folder/venv/bin/python" "$folder/peak.py" "$@"; }
for tokens in 512 4096; do
  textbook=$(peak textbook $tokens) none=$(peak none $tokens) options=$(peak options $tokens)
  echo "$tokens tokens: textbook $textbook MiB, options=None $none MiB, with options $options MiB"
  ((none > textbook * 9 / 10)) || { echo "changed: the default call saves memory now"; exit 1; }
  if ((tokens == 512)); then
    ((options > textbook * 3 / 2)) || { echo "changed: few tokens cost less now"; exit 1; }
  else
    ((options < textbook / 2)) || { echo "changed: many tokens cost more now"; exit 1; }
  fi
done
echo "as stated"
