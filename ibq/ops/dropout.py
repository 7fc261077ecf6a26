"""Dropout whose random numbers do not take longer than the layer around it on a CPU.

PyTorch draws a number of 32 bits for each element there, one after the other, which is a twentieth of a training step.
Here one of 64 bits serves four elements.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = 2**16  # the probabilities that 16 bits can tell


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """`F.dropout`: in training elements become zero with this probability, and the others grow by what is lost.

    On a CPU the probability is rounded to 16 bits, and the growth is that of the rounded one.
    """
    if training and round(probability * STEPS) > 0 and x.is_cpu:
        return x * _factors(x.detach(), probability)
    return F.dropout(x, probability, training)


# Opaque to torch.compile, whose own random numbers are slower still on a CPU.
@torch.library.custom_op("ibq::dropout_factors", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _factors(x: Tensor, probability: float) -> Tensor:
    """0 or 1 / (1 - probability) for every element of x, in its precision."""
    dropped = round(probability * STEPS)
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = drawn.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - STEPS // 2
    return kept.to(x.dtype).mul_(STEPS / (STEPS - dropped))


@_factors.register_fake
def _(x: Tensor, probability: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
