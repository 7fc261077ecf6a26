"""Whether codes were drawn as often as they should be."""

import torch
from torch import Tensor


def check_frequencies(drawn: Tensor, logits: Tensor) -> None:
    """By chi-square, codes against logits [V]. Those that are expected less than ten times count as one."""
    expected = logits.double().softmax(-1) * drawn.numel()
    counts = drawn.flatten().bincount(minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    often = expected >= 10
    expected = torch.cat([expected[often], expected[~often].sum(0, keepdim=True)])
    counts = torch.cat([counts[often], counts[~often].sum(0, keepdim=True)])
    kept = expected > 1  # the rest may be nothing
    squares = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert abs(squares - freedom) < 5 * (2 * freedom) ** 0.5 + 5
