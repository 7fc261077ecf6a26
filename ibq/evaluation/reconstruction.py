"""How well images survive the tokenizer, and how well the codebook is used."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibq import dist
from ibq.data.transforms import to_uint8, to_unit_range
from ibq.evaluation.distances import Moments, frechet_distance
from ibq.evaluation.features import BLOCK as FEATURE_BLOCK
from ibq.evaluation.features import POOL_DIM, Inception

BLOCK = 16  # images that the tokenizer sees at once in an evaluation
SSIM_WINDOW, SSIM_K1, SSIM_K2 = 7, 0.01, 0.03
RANK_PIECE = 16_384  # codes at a time
MIN_TOKENS_PER_CODE = 20  # fewer tokens say little about which codes a codebook uses


def psnr(reference: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of uint8 images [B, C, H, W], per image [B]; equal images give inf."""
    error = (reference.double() - other.double()).div(255).square().flatten(1).mean(dim=1)
    return -10 * error.log10()


def ssim(reference: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of uint8 images [B, C, H, W], per image [B].

    7x7 uniform window, sample covariance, mean over channels and over pixels with a border of 3 cropped: the
    defaults of scikit-image (Wang et al., 2004). ValueError for images smaller than the window.
    """
    if min(reference.shape[-2:]) < SSIM_WINDOW:
        height, width = reference.shape[-2:]
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {height} x {width}")
    x, y = reference.double() / 255, other.double() / 255
    count = SSIM_WINDOW**2
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    sample = count / (count - 1)
    var_x = sample * (_window_mean(x * x) - mean_x**2)
    var_y = sample * (_window_mean(y * y) - mean_y**2)
    covariance = sample * (_window_mean(x * y) - mean_x * mean_y)
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    structure = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    structure /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return structure.flatten(1).mean(dim=1)


def _window_mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, SSIM_WINDOW, stride=1)


def thumbnail(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """uint8 images [B, C, H, W] shrunk to `size` and scaled up bicubically: what a code must beat.

    `size`: pixels of a square's side, or height and width.
    """
    small = F.interpolate(images.double(), size=size, mode="bicubic", antialias=True, align_corners=False)
    small = small.round().clamp(0, 255)
    large = F.interpolate(small, size=images.shape[-2:], mode="bicubic", align_corners=False)
    return large.round().clamp(0, 255).to(torch.uint8)


class CodeUsage:
    """Counts how often each code occurs."""

    def __init__(self, num_codes: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(num_codes, dtype=torch.int64, device=device)

    def add(self, codes: Tensor) -> None:
        """Count the codes of a batch, of any shape."""
        codes = codes.flatten()  # bincount would wait for the device
        self.counts.scatter_add_(0, codes, torch.ones_like(codes))

    def reduce(self) -> "CodeUsage":
        """Sum the counts over all ranks."""
        dist.all_reduce_sum(self.counts)
        return self

    def figures(self) -> dict[str, float]:
        """Share of codes in use, perplexity (exp of the entropy of the codes), entropy in nats, tokens per code."""
        total = int(self.counts.sum())
        p = self.counts.double() / max(total, 1)
        entropy = float(-torch.special.xlogy(p, p).sum())
        return {
            "usage": float((self.counts > 0).double().mean()),
            "perplexity": math.exp(entropy),
            "entropy": entropy,
            "tokens_per_code": total / len(self.counts),
        }

    def used(self) -> Tensor:
        """Boolean [num_codes]: which codes occur."""
        return self.counts > 0

    def histogram(self) -> dict[str, int]:
        """How many codes occur how often: never, once, 2 to 3 times, 4 to 7, ... (the key is the range)."""
        bins = torch.zeros_like(self.counts)
        used = self.used()
        bins[used] = 1 + self.counts[used].double().log2().floor().long()
        sizes = torch.bincount(bins).tolist()
        ranges = ["0", "1"] + [f"{2**n}-{2 ** (n + 1) - 1}" for n in range(1, max(len(sizes) - 1, 1))]
        return dict(zip(ranges, sizes, strict=False))


@torch.no_grad()
def effective_rank(vectors: Tensor) -> float:
    """exp of the entropy of the normalised singular values of vectors [K, D] (Roy & Vetterli, 2007)."""
    if vectors.shape[0] == 0:
        return 0.0
    # [D, D], in pieces: K may be 262,144, which in float64 is another half a gigabyte.
    gram = sum(piece.double().t() @ piece.double() for piece in vectors.split(RANK_PIECE))
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular / singular.sum().clamp_min(1e-300)
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


@dataclass(frozen=True, kw_only=True)
class ReconstructionReport:
    """Figures over a whole image set, and its first images."""

    metrics: dict[str, float]
    histogram: Tensor  # [num_codes] int64, how often each code occurs
    codes_by_use: dict[str, int]  # how many codes occur how often
    originals: Tensor  # uint8 [n, 3, H, W]; where shapes differ some of each, on white
    reconstructions: Tensor


class Totals:
    """Sums of figures per image, in float64."""

    def __init__(self, names: Iterable[str], device: torch.device):
        # Every rank needs them all for the reduction, also one that no image falls to.
        self.sums = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in names}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take in the figures [B] of a batch; an exact copy counts as 100 dB."""
        for name, value in values.items():
            finite = torch.where(torch.isinf(value), 100.0, value.double())
            self.sums[name] += torch.stack([finite.sum(), finite.new_tensor(len(finite))])

    def means(self) -> dict[str, float]:
        """Means over all images and ranks, and the number of images."""
        means = {}
        for name, pair in self.sums.items():
            total, count = dist.all_reduce_sum(pair).tolist()
            means[name] = total / count if count else math.nan
            means["images"] = count
        return means


@torch.no_grad()
def evaluate_reconstruction(
    tokenizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    perceptual: nn.Module | Mapping[str, nn.Module] | None = None,
    inception: Inception | None = None,
    keep: int = 16,
    block: int | None = None,
    others: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType({}),
    take: Callable[[Tensor], None] | None = None,
) -> ReconstructionReport:
    """Reconstruct uint8 batches (images [B, 3, H, W], labels); figures are exact means over all images and ranks.

    The images of a batch have one shape, which may be another one in the next.
    `tokenizer` has encode, decode, quantizer and downsampling; `perceptual` is an LPIPS module, or several by the names
    of their figures; with `inception` there is an rFID of the reconstructions against these same originals. With
    `block`, the networks always see so many images at once, and the figures do not depend on the batches. `others`
    gives, by name, other codes in place of an image's (codes [B, h, w], labels [B]): their PSNR and L1 are `psnr_NAME`
    and `l1_NAME`; not with `block`. `take` is given all reconstructions, uint8 [n, 3, H, W] at a time: images of one
    shape in their order.
    """
    device = next(tokenizer.parameters()).device
    if not isinstance(perceptual, Mapping):
        perceptual = {} if perceptual is None else {"lpips": perceptual}
    usage = CodeUsage(tokenizer.quantizer.num_codes, device)
    names = (f"{figure}_{name}" for name in others for figure in ("psnr", "l1"))
    totals = Totals(("psnr", "ssim", "l1", "thumbnail_psnr", *perceptual, *names), device)
    moments = (Moments(POOL_DIM), Moments(POOL_DIM)) if inception is not None else ()
    kept = KeptImages(keep)
    spare = torch.zeros(1, 3, *[2 * tokenizer.downsampling] * 2, dtype=torch.uint8, device=device)
    nothing = spare, 0, torch.zeros(1, dtype=torch.int64, device=device)
    for own in dist.with_all_ranks(_with_labels(batches, block)):
        images, count, labels = own or nothing
        codes = tokenizer.encode(to_unit_range(images))
        decoded = tokenizer.decode(codes)
        decoded_others = {name: tokenizer.decode(other(codes, labels)) for name, other in others.items()}
        if not count:
            continue
        usage.add(codes[:count])
        outputs = to_uint8(decoded)
        values = _figures(images, decoded.float(), outputs, tokenizer.downsampling, perceptual)
        for name, other in decoded_others.items():
            values |= {f"psnr_{name}": psnr(images, to_uint8(other)), f"l1_{name}": _l1(images, other.float())}
        totals.add({name: value[:count] for name, value in values.items()})
        for seen, pictures in zip(moments, (images, outputs), strict=False):
            for part in pictures[:count].split(FEATURE_BLOCK):
                seen.add(inception.block_features(part).pool)
        kept.add(images[:count], outputs[:count])
        if take is not None:
            take(outputs[:count])
    metrics = totals.means() | _rfid(moments)
    usage.reduce()
    metrics |= usage.figures()
    metrics["effective_rank"] = effective_rank(tokenizer.quantizer.code_vectors()[usage.used()])
    originals, reconstructions = kept.rows()
    return ReconstructionReport(
        metrics=metrics,
        histogram=usage.counts.cpu(),
        codes_by_use=usage.histogram(),
        originals=originals,
        reconstructions=reconstructions,
    )


class KeptImages:
    """The first `keep` images and their reconstructions; where their shapes differ, the first of each shape in turn."""

    def __init__(self, keep: int):
        self.keep = keep
        self.pairs: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}  # uint8 [3, H, W] each, by shape

    def add(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch [B, 3, H, W]."""
        pairs = self.pairs.setdefault(originals.shape[1:], [])
        if missing := self.keep - len(pairs):
            pairs += zip(originals[:missing].cpu(), reconstructions[:missing].cpu(), strict=True)

    def rows(self) -> tuple[Tensor, Tensor]:
        """(originals, reconstructions) [n, 3, H, W], at the top left of a white canvas that holds the largest."""
        turns = zip_longest(*self.pairs.values())
        pairs = [pair for turn in turns for pair in turn if pair is not None][: self.keep]
        if not pairs:
            return torch.empty(0), torch.empty(0)
        height, width = (max(shape[side] for shape in self.pairs) for side in (1, 2))
        canvas = torch.full((2, len(pairs), 3, height, width), 255, dtype=torch.uint8)
        for number, pair in enumerate(pairs):
            for row, image in enumerate(pair):
                canvas[row, number, :, : image.shape[1], : image.shape[2]] = image
        return canvas[0], canvas[1]


def in_blocks(batches: Iterable[tuple[Tensor, Tensor]], block: int) -> Iterator[tuple[Tensor, int]]:
    """(images, how many of them count): all images in blocks of one size.

    Matrix products round differently for different batch shapes and memory layouts. A block has images of one shape;
    the last one is filled up with its first image.
    """
    rest: dict[torch.Size, Tensor] = {}
    for images, _ in batches:
        shape = images.shape[1:]
        waiting = torch.cat([rest[shape], images]) if shape in rest else images
        while len(waiting) >= block:
            yield waiting[:block].contiguous(), block
            waiting = waiting[block:]
        rest[shape] = waiting
    for waiting in rest.values():
        if len(waiting):
            yield torch.cat([waiting, waiting[:1].expand(block - len(waiting), -1, -1, -1)]).contiguous(), len(waiting)


def _with_labels(
    batches: Iterable[tuple[Tensor, Tensor]], block: int | None
) -> Iterator[tuple[Tensor, int, Tensor | None]]:
    """(images, how many of them count, labels): batches as they are, or blocks, which have no labels."""
    if block is None:
        yield from ((images, len(images), labels) for images, labels in batches)
    else:
        yield from ((images, count, None) for images, count in in_blocks(batches, block))


def _figures(
    images: Tensor, decoded: Tensor, outputs: Tensor, downsampling: int, perceptual: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Figures [B] of a batch."""
    inputs = to_unit_range(images)
    values = {
        "psnr": psnr(images, outputs),
        "ssim": ssim(images, outputs),
        "l1": _l1(images, decoded),
        "thumbnail_psnr": psnr(images, thumbnail(images, tuple(side // downsampling for side in images.shape[-2:]))),
    }
    with torch.autocast(images.device.type, enabled=False):
        for name, network in perceptual.items():
            values[name] = network(inputs, decoded.clamp(-1, 1)).flatten()
    return values


def _l1(images: Tensor, decoded: Tensor) -> Tensor:
    """The mean absolute difference of each image [B], of values in [-1, 1]."""
    return (to_unit_range(images) - decoded).abs().flatten(1).mean(dim=1)


def _rfid(moments: Sequence[Moments]) -> dict[str, float]:
    """FID between originals and reconstructions; NaN for fewer than two images, and on other ranks than 0."""
    if not moments:
        return {}
    originals, reconstructions = (seen.reduce() for seen in moments)
    if originals.count < 2 or not dist.is_main():
        return {"rfid": math.nan}
    return {"rfid": frechet_distance(originals.gaussian(), reconstructions.gaussian())}
