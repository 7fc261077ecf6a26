"""What a codebook looks like beside the latents that look for codes in it: why one collapses, and whether one has."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ibq.data.transforms import to_unit_range
from ibq.evaluation.reconstruction import CodeUsage
from ibq.files import read_lines
from ibq.quantizers import IBQConfig, Quantizer

ROWS, COLUMNS = 256, 16_384  # of a tile of the products of codes with codes
LOGIT_TILE = 16  # tokens that see all codes at once
LOGIT_TOKENS = 256  # whose logits are looked at, evenly spaced
DUPLICATE = 1e-3  # nearer to another code than this share of the median norm: the same code twice
QUANTILES = {"min": 0.0, "1%": 0.01, "median": 0.5, "99%": 0.99, "max": 1.0}


def reachable(tokens_per_code: float) -> float:
    """The share of codes that so many tokens touch when they are spread evenly at random: fewer can't touch all."""
    return 1 - math.exp(-tokens_per_code)


def spread(values: Tensor) -> dict[str, float]:
    """Lowest, highest and QUANTILES between them of values [N]; {} without any."""
    if not len(values):
        return {}
    ordered = values.double().sort().values  # torch.quantile takes 16 million at most
    return {name: float(ordered[round(share * (len(ordered) - 1))]) for name, share in QUANTILES.items()}


# --- Codes beside codes ---


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Of the codes `rows` [n]: how far the nearest other one is."""

    rows: Tensor  # [n] int64, in ascending order
    distances: Tensor  # [n], Euclidean
    # [n] bool: a latent equal to the code selects it. By inner products a longer code can win that place.
    own: Tensor


def sample_rows(num_codes: int, count: int) -> Tensor:
    """`count` of the codes, or all, in ascending order; the same ones at every call."""
    drawn = torch.randperm(num_codes, generator=torch.Generator().manual_seed(0))[:count]
    return drawn.sort().values


@torch.no_grad()
def nearest_neighbours(
    vectors: Tensor, rows: Tensor, *, inner_product: bool = False, progress: Callable[[int], None] = lambda done: None
) -> Neighbours:
    """The nearest other code of each of `rows` [n] among all vectors [K, D], in tiles: never a table of K x K.

    2 n K D operations. `inner_product` says that codes are selected by it, and not by their distance. `progress` is
    told of every tile of rows. ValueError for fewer than two codes.
    """
    if len(vectors) < 2:
        raise ValueError("one code has no neighbour; give a codebook of at least two")
    halves = 0.5 * vectors.square().sum(dim=1)
    distances, own = [], []
    for tile in rows.to(vectors.device).split(ROWS):
        tokens = vectors[tile]
        best = torch.full((len(tile),), -math.inf, dtype=vectors.dtype, device=vectors.device)
        nearest, longest = torch.zeros_like(tile), best.clone()
        for start in range(0, len(vectors), COLUMNS):
            products = tokens @ vectors[start : start + COLUMNS].t()
            itself = ((tile >= start) & (tile < start + products.shape[1])).nonzero()[:, 0]
            products[itself, tile[itself] - start] = -math.inf
            longest = torch.maximum(longest, products.max(dim=1).values)
            found, where = products.sub_(halves[start : start + COLUMNS]).max(dim=1)
            nearest = torch.where(found > best, where + start, nearest)
            best = torch.maximum(best, found)
        # Of the pair itself: a difference of squares would lose the small ones.
        distances.append((tokens - vectors[nearest]).norm(dim=1))
        own.append((2 * halves[tile] >= longest) if inner_product else distances[-1] > 0)
        progress(len(tile))
    return Neighbours(rows=rows, distances=torch.cat(distances).cpu(), own=torch.cat(own).cpu())


def channel_evenness(vectors: Tensor, counts: Tensor) -> list[float]:
    """How evenly the tokens use the levels of each channel, from 0, always the same one, to 1.

    Of codes [K, D] whose channels have few levels (LFQ, BSQ, FSQ), which occur `counts` [K] times: the entropy of a
    channel's levels over its largest.
    """
    found = []
    for channel in vectors.t():
        levels, which = channel.unique(return_inverse=True)
        p = torch.zeros(len(levels), dtype=torch.float64, device=counts.device)
        p = p.index_add_(0, which, counts.double()) / counts.sum().clamp_min(1)
        found.append(float(-torch.special.xlogy(p, p).sum()) / math.log(len(levels)))
    return found


# --- Codes beside latents ---


@dataclass(frozen=True, kw_only=True)
class LatentScale:
    """Latents against codes, as the search compares them; norms are medians."""

    latent_norm: float
    code_norm: float
    error: float  # mean squared distance of a latent to its code over the variance of the latents: 1 is no better
    # than one code for all.
    logit_spread: float | None = None  # of IBQ: standard deviation of a token's logits over the selection temperature
    codes_sharing: float | None = None  # of IBQ: exp of the entropy of the selection's softmax, mean over tokens

    def __str__(self) -> str:
        text = f"norms: latents {self.latent_norm:.3g}, codes {self.code_norm:.3g}"
        text += f"; error {self.error:.3g} of the latents' variance"
        if self.logit_spread is None:
            return text
        return (
            f"{text}; logits spread {self.logit_spread:.3g}, a token's gradient reaches {self.codes_sharing:.1f} codes"
        )


@torch.no_grad()
def latent_scale(quantizer: Quantizer, tokens: Tensor, codes: Tensor, vectors: Tensor | None = None) -> LatentScale:
    """How tokens [N, D], as `quantizer.tokens` gives them, stand to the codes [N] that they select.

    `vectors` [K, D] are what the codes stand for, where they are at hand.
    """
    vectors = quantizer.code_vectors() if vectors is None else vectors
    step = max(len(tokens) // LOGIT_TOKENS, 1)
    tokens, codes = tokens[::step], codes[::step]
    variance = (tokens - tokens.mean(dim=0)).square().sum(dim=1).mean()
    norms = [each.norm(dim=1).median() for each in (tokens, vectors)]
    figures = [*norms, (tokens - vectors[codes]).square().sum(dim=1).mean() / variance.clamp_min(1e-30)]
    if isinstance(quantizer.config, IBQConfig):
        figures += _selection(tokens, vectors, quantizer.config.selection_temperature)
    names = ("latent_norm", "code_norm", "error", "logit_spread", "codes_sharing")
    return LatentScale(**dict(zip(names, torch.stack(figures).tolist(), strict=False)))


def _selection(tokens: Tensor, vectors: Tensor, temperature: float) -> list[Tensor]:
    """Mean over the tokens of the spread of their logits, and of how many codes share their softmax."""
    sums = tokens.new_zeros(2)
    for tile in tokens.split(LOGIT_TILE):
        logits = tile @ vectors.t() / temperature
        log_p = logits.log_softmax(dim=1)
        sharing = torch.special.entr(log_p.exp()).sum(dim=1).exp()
        sums += torch.stack([logits.std(dim=1).sum(), sharing.sum()])
    return list(sums / len(tokens))


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the images of a set look for in the codebook."""

    counts: Tensor  # [K] int64
    latents: Tensor  # [n, D] of the first tokens, as the search compares them
    codes: Tensor  # [n] that these select
    images: int


@torch.no_grad()
def survey(tokenizer, batches: Iterable[tuple[Tensor, Tensor]], *, keep: int = 8_192) -> Survey:
    """Count the codes of uint8 batches (images [B, 3, H, W], labels), and keep the latents of the first tokens."""
    quantizer = tokenizer.quantizer
    usage = CodeUsage(quantizer.num_codes, next(tokenizer.parameters()).device)
    latents, selected, images, kept = [], [], 0, 0
    for pictures, _ in batches:
        z = tokenizer.encode_latents(to_unit_range(pictures))
        codes = quantizer.encode(z).flatten()
        usage.add(codes)
        images += len(pictures)
        if kept < keep:
            latents.append(quantizer.tokens(z)[: keep - kept])
            selected.append(codes[: keep - kept])
            kept += len(selected[-1])
    if not images:
        raise ValueError("no images to look at")
    return Survey(counts=usage.counts, latents=torch.cat(latents), codes=torch.cat(selected), images=images)


@torch.no_grad()
def principal_plane(codes: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [K, D] and latents [n, D] (or none) as points [K, 2] and [n, 2] of the plane in which they vary most.

    Both clouds weigh alike, and so does what lies between them.
    """
    codes, latents = codes.double(), latents.double()
    clouds = [cloud for cloud in (codes, latents) if len(cloud)]
    centre = torch.stack([cloud.mean(dim=0) for cloud in clouds]).mean(dim=0)
    covariance = sum((cloud - centre).t() @ (cloud - centre) / len(cloud) for cloud in clouds)
    axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :2]
    if axes.shape[1] < 2:  # of one dimension
        axes = torch.cat([axes, torch.zeros_like(axes)], dim=1)
    return (codes - centre) @ axes, (latents - centre) @ axes


# --- What the training has noted ---

LOGGED = {
    "codebook/usage_of_reachable": "usage of reachable codes",
    "codebook/usage": "usage",
    "codebook/perplexity": "perplexity",
    "quantizer/sample_entropy": "sample entropy, nats",
    "quantizer/batch_entropy": "batch entropy, nats",
    "validation/usage": "usage, validation images",
}


def last_logged(folder: Path) -> dict[str, float]:
    """The last of each of the LOGGED figures in a run's metrics.jsonl, and their `step`; {} without any."""
    found: dict[str, float] = {}
    for row in read_lines(folder / "metrics.jsonl"):
        # What is not finite is a text there.
        if figures := {name: float(row[name]) for name in LOGGED if name in row}:
            found |= figures | {"step": row["step"]}
    return found
