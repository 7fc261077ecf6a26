"""Lloyd's algorithm for codebook initialisation, in tiles: never a table of vectors x centres."""

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 4096


@torch.no_grad()
def kmeans(vectors: Tensor, count: int, *, iterations: int, spherical: bool, generator: torch.Generator) -> Tensor:
    """`count` centres [count, D] of vectors [N, D]; a centre that loses all its vectors moves to a random one.

    `spherical` compares by cosine and keeps the centres at unit length. `generator` lives on the CPU. Raises
    ValueError for fewer vectors than centres.
    """
    if len(vectors) < count:
        raise ValueError(f"{len(vectors)} vectors are too few for {count} centres; give more images to start from")
    if spherical:
        vectors = F.normalize(vectors, dim=1)
    centres = vectors[torch.randperm(len(vectors), generator=generator)[:count].to(vectors.device)]
    for _ in range(iterations):
        nearest = torch.cat([_nearest(tile, centres, spherical) for tile in vectors.split(TILE)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        sizes = torch.bincount(nearest, minlength=count)
        spare = vectors[torch.randint(len(vectors), (count,), generator=generator).to(vectors.device)]
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], spare)
        if spherical:
            centres = F.normalize(centres, dim=1)
    return centres


def _nearest(vectors: Tensor, centres: Tensor, spherical: bool) -> Tensor:
    similarity = vectors @ centres.t()
    if not spherical:
        similarity -= 0.5 * centres.square().sum(dim=1)
    return similarity.argmax(dim=1)
