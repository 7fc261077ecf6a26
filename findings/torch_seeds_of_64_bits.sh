#!/usr/bin/env bash
# PyTorch 2.14.1, torch.manual_seed and torch.Generator on a CPU: seeds that agree in their low 32 bits.
#
# Guess: seeds are whole numbers of 64 bits (others are refused, and initial_seed() gives all 64 back), so different seeds
# are different streams.
# Seen: the CPU's generator takes the low 32 bits and drops the others without a word.
#
#   seed             rand(1)
#   1                0.757632
#   2**32 + 1        0.757632
#   2**63 + 1        0.757632
#   -2**32 + 1       0.757632
#   2                0.614695
#
# NumPy's default_rng tells 1 and 2**32 + 1 apart. "(seed << 32) + rank" so gives every seed the same numbers, and among
# 77,000 samples with 64-bit hashes as seeds two are likely to share theirs. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import numpy as np
import torch

first = {}
for name, seed in [("1", 1), ("2", 2), ("2**32 + 1", 2**32 + 1), ("2**63 + 1", 2**63 + 1), ("-2**32 + 1", -(2**32) + 1)]:
    generator = torch.Generator().manual_seed(seed)
    first[name] = torch.rand(1000, generator=generator)
    assert generator.initial_seed() == seed % 2**64, "the whole seed is given back"
    torch.manual_seed(seed)
    assert torch.equal(first[name], torch.rand(1000)), "the default generator is of the same kind"
    same = torch.equal(first[name], first["1"])
    print(f"seed {name:11s} {first[name][0].item():.6f} {'the numbers of seed 1' if same else 'other numbers'}")
    assert same == (name != "2"), "changed: which seeds are different"
assert np.random.default_rng(1).random() != np.random.default_rng(2**32 + 1).random()
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
echo "as stated"
