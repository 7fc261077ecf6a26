#!/usr/bin/env bash
# Triton 3.6.0, which PyTorch 2.11.0 brings, in its interpreter (TRITON_INTERPRET=1) with NumPy 2.4 and 2.3.
#
# Guess: the interpreter works with the NumPy that pip puts beside it, or with none of its kernels.
# Seen: with NumPy 2.4 kernels run, conditions on scalars included, but for loops whose bound is an argument: TypeError, "only
# 0-dimensional arrays can be converted to Python scalars". A loop over a constexpr runs. With NumPy 2.3 all run.
#
#   kernel                               NumPy 2.4.6   2.3.5
#   loads and stores, if                 right         right
#   for start in range(0, constexpr)     right         right
#   for start in range(0, argument)      TypeError     right
#
# Tests of a kernel so pass or fail by the way in which its loop is written, and never on a GPU. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet torch==2.11.0 triton==3.6.0 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def double(source, target, size, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    if start < size:
        index = start + tl.arange(0, BLOCK)
        tl.store(target + index, 2 * tl.load(source + index, mask=index < size), mask=index < size)


@triton.jit
def double_in_a_fixed_loop(source, target, size, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, SIZE, BLOCK):
        index = start + tl.arange(0, BLOCK)
        tl.store(target + index, 2 * tl.load(source + index, mask=index < size), mask=index < size)


@triton.jit
def double_in_a_loop(source, target, size, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        tl.store(target + index, 2 * tl.load(source + index, mask=index < size), mask=index < size)


new = numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
print(f"Triton {triton.__version__}, NumPy {numpy.__version__}")
for kernel in (double, double_in_a_fixed_loop, double_in_a_loop):
    source, target = torch.arange(10.0), torch.zeros(10)
    try:
        kernel[(3,)](source, target, 10, SIZE=10, BLOCK=4)
        said = "right" if torch.equal(target, 2 * source) else "wrong"
    except Exception as error:
        assert "only 0-dimensional arrays" in str(error), error
        said = "TypeError"
    print(f"{kernel.fn.__name__}: {said}")
    assert said == ("TypeError" if new and kernel is double_in_a_loop else "right"), "changed"
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/look.py" 2>/dev/null
"$folder/venv/bin/python" -m pip install --quiet numpy==2.3.5
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/look.py" 2>/dev/null
echo "as stated"
