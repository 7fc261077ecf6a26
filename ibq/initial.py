"""Initial weights as a function of a seed, a name and an element's place, the same in every layout.

So a rank can make its own part alone, where it will lie. Devices differ in the last digits of logarithm and cosine.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014); as signed numbers.
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
CHUNK = {"cpu": 2**17, "cuda": 2**24}  # elements at a time: what a CPU's cache holds, and what a GPU does not notice


@dataclass(frozen=True, kw_only=True)
class Initial:
    """The initial value of a parameter: normal numbers, or `mean` alone.

    Those of the first `scaled` elements, in the order in which they lie in memory, are multiplied by `factor`.
    """

    mean: float = 0.0
    std: float = 0.0
    scaled: int = 0
    factor: float = 1.0


def key_of(seed: int, name: str) -> int:
    """What tells the numbers of one parameter from those of all others."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big", signed=True)


def fill(out: Tensor, initial: Initial, key: int, spans: Iterable[tuple[int, int, int, int]]) -> None:
    """Write the values of elements into `out` [n]: of spans (start, length, count, stride) as in `engine/pieces.py`."""
    first, chunk = 0, CHUNK.get(out.device.type, CHUNK["cpu"])
    for start, length, count, stride in spans:
        part = out[first : first + count * length].view(count, length)
        if count == 1:
            for low in range(0, length, chunk):
                _fill_run(part[0, low : low + chunk], initial, key, start + low)
        for row in range(0, count if count > 1 else 0, rows := max(1, chunk // max(stride, 1))):
            wanted = part[row : row + rows]
            whole = out.new_empty(len(wanted) * stride)  # what lies between the columns is made as well
            _fill_run(whole, initial, key, start + row * stride)
            wanted.copy_(whole.view(-1, stride)[:, :length])
        first += count * length


def _fill_run(out: Tensor, initial: Initial, key: int, start: int) -> None:
    """The values of elements start, start + 1, ..."""
    if not initial.std:
        out.fill_(initial.mean)
        return
    torch.mul(normals(key, start, len(out), out.device), initial.std, out=out)
    if initial.mean:
        out.add_(initial.mean)
    if start < initial.scaled:
        out[: initial.scaled - start].mul_(initial.factor)


def normals(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers start, start + 1, ... of the sequence that a key names: float32 [count].

    Two from each 64 random bits, by the method of Box and Muller (1958).
    """
    first, last = start // 2, (start + count + 1) // 2
    bits = random_bits(key, torch.arange(first, last, device=device))
    radius = _shifted(bits, 32).float().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = bits.bitwise_and_(2**32 - 1).float().mul_(2.0 * torch.pi * 2.0**-32)
    pairs = torch.stack([angle.cos().mul_(radius), angle.sin_().mul_(radius)], dim=1)
    return pairs.flatten()[start - 2 * first :][:count]


def random_bits(key: int, index: Tensor) -> Tensor:
    """Numbers index [n] of SplitMix64's sequence after the seed `key`, counted from 1: int64 [n], the sign is a bit."""
    bits = (index * STEP).add_(key)
    bits.bitwise_xor_(_shifted(bits, 30)).mul_(FIRST)
    bits.bitwise_xor_(_shifted(bits, 27)).mul_(SECOND)
    return bits.bitwise_xor_(_shifted(bits, 31))


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, with zeros coming in."""
    return (bits >> by).bitwise_and_(2 ** (64 - by) - 1)
