"""How close generated images are to real ones: FID, sFID, Inception Score, precision and recall as ADM computes them.

A distance to a reference is meaningless without the reference, so figures stand under its name: file and hash.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ibq import dist
from ibq.config import UserError
from ibq.evaluation.distances import (
    IS_SPLIT,
    NEIGHBOURS,
    Distances,
    Gaussian,
    Moments,
    frechet_distance,
    inception_score,
    precision_recall,
)
from ibq.evaluation.features import BLOCK, POOL_DIM, RESIZING, SPATIAL_DIM, Inception
from ibq.evaluation.image_sets import ImageSet

USUAL_SAMPLES, USUAL_REFERENCE = 50_000, 10_000  # of published figures


@dataclass(frozen=True, kw_only=True)
class SetFeatures:
    """What is known of a set; every rank has all of it."""

    count: int
    pool: Tensor | None  # [N, 2048] float32 in the set's order; None for stored statistics
    pool_gaussian: Gaussian | None
    spatial_gaussian: Gaussian | None


@dataclass(frozen=True, kw_only=True)
class GenerationReport:
    """`metrics` holds the Inception Score, and for each reference's name the figures against it."""

    metrics: dict[str, float | dict[str, float]]
    references: dict[str, dict]  # name -> place, hash, images, where its statistics are from
    samples: dict
    notes: list[str]


def extract(
    network: Inception,
    images: ImageSet,
    *,
    batch_size: int = BLOCK,
    advance: Callable[[int], None] = lambda images: None,
) -> SetFeatures:
    """Features of all images, shared among the ranks; the same for every batch size and number of ranks.

    `batch_size` images, rounded up to whole blocks, are read at once. UserError for fewer than two images.
    """
    if images.count < 2:
        raise UserError(f"{images.place}: {images.count} images are too few for statistics; give at least 2")
    pool = torch.zeros(images.count, POOL_DIM)
    spatial = Moments(SPATIAL_DIM)
    size = -(-batch_size // BLOCK) * BLOCK
    first = dist.rank() * size
    for batch in images.blocks(size, dist.rank(), dist.world_size()):
        for start, block in enumerate(batch.split(BLOCK)):
            features = network.block_features(block)
            place = first + start * BLOCK
            pool[place : place + len(block)] = features.pool
            spatial.add(features.spatial)
        first += dist.world_size() * size
        advance(len(batch) * dist.world_size())
    dist.all_reduce_sum(pool)  # every row comes from one rank, and is zero on the others
    moments = Moments(POOL_DIM)
    for rows in pool.split(BLOCK):
        moments.add(rows)
    return SetFeatures(
        count=images.count, pool=pool, pool_gaussian=moments.gaussian(), spatial_gaussian=spatial.reduce().gaussian()
    )


def reference_features(network: Inception, images: ImageSet, **options) -> SetFeatures:
    """A reference's features; statistics that its file holds are taken as they are, as ADM does."""
    stored = images.statistics()
    if images.count == 0 and stored.pool is not None:
        return SetFeatures(count=0, pool=None, pool_gaussian=stored.pool, spatial_gaussian=stored.spatial)
    found = extract(network, images, **options)
    return SetFeatures(
        count=found.count,
        pool=found.pool,
        pool_gaussian=stored.pool or found.pool_gaussian,
        spatial_gaussian=stored.spatial or found.spatial_gaussian,
    )


def reference_name(images: ImageSet, digest: str) -> str:
    """What figures against a reference are called after."""
    return f"{Path(images.place).name}@{digest[:8]}"


def evaluate_generation(
    network: Inception,
    samples: ImageSet,
    references: Sequence[ImageSet],
    *,
    distances: Distances = "exact",
    batch_size: int = BLOCK,
    progress: Callable[[str, int], AbstractContextManager] = lambda title, images: nullcontext(lambda done: None),
) -> GenerationReport:
    """Figures of samples against references; whole on rank 0 alone. UserError for sets that can't be used.

    `progress` (title, images) is a context around each set, which gives what is told the images that are done.
    """
    hashes = [images.sha256() for images in references]
    with progress("samples", samples.count) as advance:
        own = extract(network, samples, batch_size=batch_size, advance=advance)
    notes = _notes_on_count(samples.place, own.count, USUAL_SAMPLES, "samples")
    metrics, described = {}, {}
    device = network.fc.weight.device
    probabilities = [network.probabilities(rows.to(device)).cpu() for rows in own.pool.split(IS_SPLIT)]
    metrics["inception_score"] = inception_score(torch.cat(probabilities))
    for images, digest in zip(references, hashes, strict=True):
        name = reference_name(images, digest)
        stored = images.statistics()
        with progress(name, images.count) as advance:
            found = reference_features(network, images, batch_size=batch_size, advance=advance)
        metrics[name] = compare(own, found, distances, device)
        notes += _notes_on_reference(images, found, metrics[name])
        described[name] = {
            "place": images.place,
            "sha256": digest,
            "images": found.count,
            "image_size": list(images.size),
            "statistics": "stored in the file" if stored.pool is not None else "computed from the images",
        }
    facts = {"place": samples.place, "sha256": samples.sha256(), "images": own.count, "image_size": list(samples.size)}
    return GenerationReport(metrics=metrics, references=described, samples=facts, notes=notes)


def compare(
    samples: SetFeatures, reference: SetFeatures, distances: Distances, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """FID and what else the reference allows; the two distances on rank 0 alone."""
    figures = {}
    if dist.is_main():
        figures["fid"] = frechet_distance(samples.pool_gaussian, reference.pool_gaussian)
        if reference.spatial_gaussian is not None:
            figures["sfid"] = frechet_distance(samples.spatial_gaussian, reference.spatial_gaussian)
    if reference.pool is not None and min(reference.count, samples.count) > NEIGHBOURS:
        found = precision_recall(reference.pool.to(device), samples.pool.to(device), distances=distances)
        figures |= {"precision": found.precision, "recall": found.recall}
    return figures


def protocol(network: Inception, distances: Distances) -> dict:
    """What the figures depend on besides the images."""
    return {
        "network": network.description,
        "network_sha256": network.sha256,
        "resizing": RESIZING,
        "images_at_once": BLOCK,
        "inception_score_split": IS_SPLIT,
        "inception_score_head": "without bias",
        "neighbours": NEIGHBOURS,
        "distances": distances,
    }


def _notes_on_count(place: str, count: int, usual: int, kind: str) -> list[str]:
    if count <= POOL_DIM:
        return [
            f"{place}: {count:,} images for {POOL_DIM:,} features: the covariance is singular, and FID and sFID say "
            f"little; published figures use {usual:,} {kind}"
        ]
    if count < usual:
        return [f"{place}: {count:,} images; published figures use {usual:,} {kind}, and fewer raise FID"]
    return []


def _notes_on_reference(images: ImageSet, found: SetFeatures, figures: dict[str, float]) -> list[str]:
    notes = _notes_on_count(images.place, found.count, USUAL_REFERENCE, "reference images") if found.count else []
    if "precision" not in figures:
        lack = "holds no images" if found.pool is None else f"{NEIGHBOURS + 1} images are the least on either side"
        notes.append(f"{images.place}: no precision and recall: {lack}")
    if found.spatial_gaussian is None:
        notes.append(f"{images.place}: no sFID: the file has no mu_s and sigma_s")
    return notes
