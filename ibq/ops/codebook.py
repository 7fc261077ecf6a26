"""Codebooks of another size or dimension, made from a trained one; and which codes of one are near each other."""

from typing import Literal

import torch
from torch import Tensor

from ibq.ops.kmeans import kmeans

ITERATIONS = 8
ROWS = 256  # codes whose distances to all others are there at once
SPLIT = 0.01  # how far a copy of a code lies from it, in standard deviations of the codebook


@torch.no_grad()
def resized_codebook(codes: Tensor, count: int, how: Literal["rows", "kmeans"], *, spherical: bool) -> Tensor:
    """`count` codes [count, D] from codes [K, D]: the first rows, or the k-means centres of all.

    Rows beyond K are near copies of the first (Linde, Buzo and Gray, "An algorithm for vector quantizer design", 1980).
    ValueError for more centres than codes.
    """
    generator = torch.Generator().manual_seed(0)
    if count == len(codes):
        return codes.clone()
    if how == "kmeans":
        return kmeans(codes, count, iterations=ITERATIONS, spherical=spherical, generator=generator)
    rows = codes[torch.arange(count, device=codes.device) % len(codes)]
    noise = torch.randn(rows[len(codes) :].shape, generator=generator).to(codes.device)
    rows[len(codes) :] += SPLIT * codes.std() * noise
    return rows


@torch.no_grad()
def directions(codes: Tensor, dim: int) -> Tensor:
    """An orthonormal basis [D, dim] in which codes [K, D] lose the least; with more dimensions it has zero columns."""
    old = codes.shape[1]
    if dim >= old:
        return torch.eye(old, dim, dtype=codes.dtype, device=codes.device)
    moments = codes.double().t() @ codes.double()  # about the origin: codes are compared by inner products
    return torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :dim].to(codes.dtype)


@torch.no_grad()
def nearest_codes(codes: Tensor, count: int) -> Tensor:
    """The `count` nearest of all codes [K, D] to each, by Euclidean distance: int32 [K, count], the nearest first.

    The first is the code itself, but for one that is there twice. 2 K^2 D operations, never a table of K x K; where
    there are fewer codes than `count`, all of them.
    """
    halves, count = 0.5 * codes.square().sum(dim=1), min(count, len(codes))
    tiles = (torch.topk(tile @ codes.t() - halves, count, dim=1).indices for tile in codes.split(ROWS))
    return torch.cat([tile.int() for tile in tiles])
