"""The orders in which a transformer learns the codes of an image: raster, or random (RAR, arXiv 2411.00776).

An order [B, T] holds the raster index of the code that is predicted first, second, ... of each image; None is raster.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def draw_orders(codes: Tensor, share: float) -> Tensor | None:
    """Orders for codes [B, h, w]: each image's is uniformly random with probability `share`, else raster.

    RAR, section 3.2, whose r is the share. Drawn as dropout is, from the generator of the codes' device; of a share of
    0 nothing is drawn.
    """
    if share == 0:
        return None
    rows, tokens = len(codes), codes[0].numel()
    numbers = torch.rand(rows, tokens + 1, dtype=torch.float64, device=codes.device)
    ascending = torch.arange(tokens, dtype=torch.float64, device=codes.device)
    return torch.where(numbers[:, :1] < share, numbers[:, 1:], ascending).argsort(-1)


def rotations_in_order(table: Tensor, order: Tensor) -> Tensor:
    """Of each input, which are the class and the codes in their order but the last, its row of `rotary_table`.

    Table [1 + T, D / 2], orders [B, T] -> [B, T, D / 2].
    """
    return table[F.pad(order[:, :-1] + 1, (1, 0))]
