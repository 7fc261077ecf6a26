"""Distances between sets of features: pure functions of arrays, exact in float64.

Formulas and conventions are those of ADM's evaluator (arXiv 2105.05233, guided-diffusion/evaluations).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ibq import dist

EPS = 1e-6  # added to covariances where a decomposition fails, as in ADM
IS_SPLIT = 5_000  # images in a split of the Inception Score
NEIGHBOURS = 3  # the radius of a ball in precision and recall reaches to this one
FOLD = 512  # rows that are taken into the moments at once
# Rows and columns of a table of distances; ADM falls back from float16 to float32 for whole tables of this size.
TILE = {"exact": 2_048, "adm": 10_000}

Distances = Literal["exact", "adm"]


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of features, in float64."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Running mean and covariance in float64 of rows [n, D], over batches and ranks (Chan et al., 1979)."""

    def __init__(self, dim: int):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T
        self._waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Take in rows [n, D]."""
        self._waiting.append(rows.detach().cpu().double())
        if sum(map(len, self._waiting)) >= FOLD:
            self._fold()

    def _fold(self) -> None:
        if not self._waiting or not sum(map(len, self._waiting)):
            return
        rows = torch.cat(self._waiting)
        self._waiting = []
        mean = rows.mean(dim=0)
        centred = rows - mean
        self._merge(len(rows), mean, centred.t() @ centred)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def merge(self, other: "Moments") -> None:
        """Take in what another has seen."""
        other._fold()
        self._fold()
        if other.count:
            self._merge(other.count, other.mean, other.scatter)

    def reduce(self) -> "Moments":
        """Merge over all ranks; every rank has the same afterwards."""
        self._fold()
        if dist.world_size() == 1:
            return self
        count = dist.all_reduce_sum(torch.tensor([float(self.count)], dtype=torch.float64))
        mean = dist.all_reduce_sum(self.mean * self.count) / count.clamp_min(1)
        shift = self.mean - mean
        self.scatter = dist.all_reduce_sum(self.scatter + torch.outer(shift, shift) * self.count)
        self.mean, self.count = mean, int(count)
        return self

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance (divided by n - 1); ValueError for fewer than two rows."""
        self._fold()
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return Gaussian(mean=self.mean.numpy(), covariance=(self.scatter / (self.count - 1)).numpy())


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)) (Heusel et al., 2017).

    The last trace is the sum of the singular values of C1^(1/2) C2^(1/2): with symmetric decompositions it is exact
    also for singular covariances, where a matrix square root of the product loses half of the digits. ValueError for
    shapes that differ or values that are not finite.
    """
    for name in ("mean", "covariance"):
        one, other = getattr(first, name), getattr(second, name)
        if one.shape != other.shape:
            raise ValueError(f"{name}: shapes differ: {one.shape} and {other.shape}")
        if not (np.isfinite(one).all() and np.isfinite(other).all()):
            raise ValueError(f"{name}: has values that are not finite")
    difference = first.mean.astype(np.float64) - second.mean.astype(np.float64)
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(difference @ difference + traces - 2 * _trace_of_root(first.covariance, second.covariance))


def _trace_of_root(first: np.ndarray, second: np.ndarray) -> float:
    first, second = (torch.as_tensor(np.asarray(c, dtype=np.float64)) for c in (first, second))
    try:
        return _sum_of_singular_values(first, second)
    except torch.linalg.LinAlgError:
        offset = EPS * torch.eye(len(first), dtype=torch.float64)
        return _sum_of_singular_values(first + offset, second + offset)


def _sum_of_singular_values(first: Tensor, second: Tensor) -> float:
    factors = []
    for covariance in (first, second):
        values, vectors = torch.linalg.eigh((covariance + covariance.t()) / 2)
        # What is below the rounding error is zero: its root would not be small.
        kept = values > values.abs().max() * len(values) * torch.finfo(values.dtype).eps
        factors.append(vectors[:, kept] * values[kept].sqrt())
    if not min(factor.shape[1] for factor in factors):
        return 0.0
    return float(torch.linalg.svdvals(factors[0].t() @ factors[1]).sum())


def inception_score(probabilities: Tensor | np.ndarray, split: int = IS_SPLIT) -> float:
    """exp of the mean divergence of class probabilities [N, C] from their mean (Salimans et al., 2016).

    Taken in splits of so many images, in order, the last of which may be smaller, and averaged as in ADM.
    """
    scores = []
    for part in torch.as_tensor(probabilities).double().split(split):
        own = torch.special.xlogy(part, part).sum(dim=1)
        mean = part.mean(dim=0)
        common = torch.special.xlogy(part, mean).sum(dim=1)
        scores.append((own - common).mean().exp())
    return float(torch.stack(scores).mean())


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Shares of samples inside the reference's manifold (precision) and the other way round (recall)."""

    precision: float
    recall: float
    sample_inside: Tensor  # [N] bool
    reference_inside: Tensor  # [M] bool


def precision_recall(
    reference: Tensor, samples: Tensor, *, neighbours: int = NEIGHBOURS, distances: Distances = "exact"
) -> PrecisionRecall:
    """Improved precision and recall (arXiv 1904.06991) of features [M, D], [N, D], on their device.

    "exact" computes in float64, "adm" rounds as ADM's evaluator: float16, in float32 where that overflows. Memory is
    bounded, rows are shared among the ranks, and every rank gets the result. ValueError for sets that are too small.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= neighbours:
            raise ValueError(f"{name}: precision and recall need more than {neighbours} images, got {len(features)}")
    reference_radii = radii(reference, neighbours=neighbours, distances=distances)
    sample_radii = radii(samples, neighbours=neighbours, distances=distances)
    sample_inside = _inside(samples, reference, reference_radii, distances)
    reference_inside = _inside(reference, samples, sample_radii, distances)
    return PrecisionRecall(
        precision=float(sample_inside.double().mean()),
        recall=float(reference_inside.double().mean()),
        sample_inside=sample_inside,
        reference_inside=reference_inside,
    )


def radii(features: Tensor, *, neighbours: int = NEIGHBOURS, distances: Distances = "exact") -> Tensor:
    """SQUARED distance [N] of each row to its so-many-th nearest neighbour in the set, itself not counted."""
    dtype = torch.float64 if distances == "exact" else torch.float32
    found = torch.zeros(len(features), dtype=dtype, device=features.device)
    for rows in _own_rows(features, distances):
        best = torch.empty(len(features[rows]), 0, dtype=dtype, device=features.device)
        for columns in _pieces(features, distances):
            best = torch.cat([best, _table(features[rows], features[columns], distances)], dim=1)
            best = best.topk(min(neighbours + 1, best.shape[1]), dim=1, largest=False).values
        found[rows] = best.max(dim=1).values
    return dist.all_reduce_sum(found)


def _inside(points: Tensor, centres: Tensor, centre_radii: Tensor, distances: Distances) -> Tensor:
    """bool [N]: which points lie in a ball around any centre."""
    found = torch.zeros(len(points), dtype=torch.int32, device=points.device)
    for rows in _own_rows(points, distances):
        for columns in _pieces(centres, distances):
            table = _table(points[rows], centres[columns], distances)
            found[rows] |= (table <= centre_radii[columns]).any(dim=1).int()
    return dist.all_reduce_sum(found).bool()


def _pieces(rows: Tensor, distances: Distances) -> list[slice]:
    """What of the rows is compared at once."""
    size = TILE[distances]
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _own_rows(rows: Tensor, distances: Distances) -> list[slice]:
    """This rank's pieces of the rows."""
    return _pieces(rows, distances)[dist.rank() :: dist.world_size()]


def _table(rows: Tensor, columns: Tensor, distances: Distances) -> Tensor:
    """Squared distances [n, m]."""
    if distances == "exact":
        return _squared_distances(rows.double(), columns.double())
    return _adm_distances(rows, columns)


def _adm_distances(rows: Tensor, columns: Tensor) -> Tensor:
    half = _squared_distances(rows.half(), columns.half())
    if bool(torch.isfinite(half).all()):
        return half.float()
    return _squared_distances(rows.float(), columns.float())


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """|u|^2 - 2 u v + |v|^2, at least 0, every step in the dtype of the arguments."""
    norms = rows.square().sum(dim=1)[:, None], columns.square().sum(dim=1)[None]
    return (norms[0] - 2 * (rows @ columns.t()) + norms[1]).clamp_min(0)


def nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """(Euclidean distance [N], number [N]) of the row of `others` [M, D] nearest to each of `points` [N, D]."""
    distance = torch.full((len(points),), torch.inf, dtype=torch.float64, device=points.device)
    number = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for columns in _pieces(others, "exact"):
        for rows in _pieces(points, "exact"):
            best = _table(points[rows], others[columns], "exact").min(dim=1)
            nearer = best.values < distance[rows]
            distance[rows] = torch.where(nearer, best.values, distance[rows])
            number[rows] = torch.where(nearer, best.indices + columns.start, number[rows])
    return distance.sqrt(), number
