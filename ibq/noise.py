"""Random numbers as a function of a seed and a position, the same on every device, for any rows in any order.

Philox 4x32-10, a counter-based generator: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and the root of three, less one
WORD = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Four random words for each counter of four words and key of two: int64 tensors of values below 2**32."""
    a, b, c, d = counter
    first, second = key
    for number in range(ROUNDS):
        step = [(part + number * more) & WORD for part, more in zip((first, second), KEY_STEPS, strict=True)]
        low, high = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # of 64 bits: the sign is one of them
        a, b, c, d = (high >> 32) & WORD ^ b ^ step[0], high & WORD, (low >> 32) & WORD ^ d ^ step[1], low & WORD
    return a, b, c, d


def uniforms(seeds: Sequence[int], positions: int, device: torch.device | str) -> Tensor:
    """[seeds, positions] float64 in (0, 1), never 0 or 1: number p of seed s depends on p and s alone.

    The key is the seed, 0 to 2**63 - 1, and the counter (position, 0, 0, 0). 52 bits are used: those of float64.
    """
    seed = send(seeds, device)[:, None]
    position = torch.arange(positions, device=device)[None, :]
    zero = torch.zeros_like(position)
    high, low, *_ = philox((position, zero, zero, zero), (seed & WORD, seed >> 32))
    return ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52


def send(values: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
    """int64 numbers of the host on a device, without waiting for what it does at the time."""
    tensor = torch.as_tensor(values, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor
