#!/usr/bin/env bash
# PyTorch 2.14.1, torch.randn and normal_ on a CPU: the first numbers of a seed, by how many are drawn and in what layout.
#
# Guess: a seed is one stream; who draws more of it gets the same first numbers, as with rand, and the layout of the
# tensor changes at most their order.
# Seen: up to 15 numbers are drawn one way; from 16 on another, in blocks of 16, and where the count is no multiple of 16
# the last 16 are drawn anew. A tensor that is not contiguous (channels_last too) is always filled the first way.
#
#   drawn    first numbers that those of 64 share (rand: all)
#   15       0 of 15
#   16       16 of 16
#   17       1 of 17
#   24       8 of 24
#   64, channels_last   0 of 64, in any order
#
# Noise for a batch of another size, or weights initialised after .to(memory_format=channels_last), so are others under the
# same seed. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import torch


def seeded():
    return torch.Generator().manual_seed(0)


normal, uniform = torch.randn(64, generator=seeded()), torch.rand(64, generator=seeded())
for count, shared in [(1, 0), (15, 0), (16, 16), (17, 1), (24, 8), (32, 32), (40, 24)]:
    found = int((torch.randn(count, generator=seeded()) == normal[:count]).sum())
    print(f"{count} numbers: {found} are those of a larger draw")
    assert torch.equal(torch.rand(count, generator=seeded()), uniform[:count]), "rand"
    assert found == shared, f"changed: {count} numbers"
last = torch.empty(1, 4, 4, 4).to(memory_format=torch.channels_last)
shared = int(torch.isin(last.normal_(generator=seeded()).flatten(), normal).sum())
print(f"64 numbers in channels_last: {shared} are those of 64 in a row")
assert shared == 0, "changed: channels_last"
assert torch.isin(last.uniform_(generator=seeded()).flatten(), uniform).all(), "of rand the order alone is another"
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
echo "as stated"
