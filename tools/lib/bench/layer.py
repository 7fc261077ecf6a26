"""IBQ as a layer of a small autoencoder, beside the quantizer of `vector-quantize-pytorch` in its place.

The autoencoder has the structure of that package's example (two convolutions with pooling, a quantizer, two with
upsampling; L1 and ten times the quantizer's loss, AdamW) and sees the bundled emoji at 32 px, 64 tokens each. Weights
outside of the quantizer, batches and steps are the same for all; figures are those of the validation images.
"""

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibq.data.images import ImageDataset
from ibq.data.shards import open_images
from ibq.data.transforms import to_unit_range
from ibq.evaluation.reconstruction import CodeUsage
from ibq.extras import need
from ibq.progress import progress_bar
from ibq.quantizers import IBQ, VQ, AsVectorQuantize
from tools.lib import ROOT
from tools.lib.options import check_least

EMOJI = ROOT / "tests/data/emoji64"
SIZE, DIM, WIDTH, BATCH = 32, 32, 16, 32
LOSS_WEIGHT, LEARNING_RATE = 10.0, 3e-4
THEIRS = "vector-quantize-pytorch"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--codes", type=int, default=1_024, metavar="K", help="size of the codebooks (default: %(default)s)")
    add("--steps", type=int, default=1_000, help="of training (default: %(default)s)")
    add("--images", type=int, default=3_000, help="most to train on (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")


def measure(arguments: argparse.Namespace) -> dict:
    """Usage of the codebook and L1 loss with each quantizer."""
    check_least(arguments, codes=1, steps=1, images=1, seed=0)
    need("vector_quantize_pytorch")
    train, validation = pictures("train-*.tar", arguments.images), pictures("val-*.tar")
    figures = {name: getattr(arguments, name) for name in ("codes", "steps", "seed")}
    figures |= {"images": len(train), "validation_images": len(validation), "quantizers": {}}
    with progress_bar("layer", 3 * arguments.steps, "step") as progress:
        for name in (*OURS, THEIRS):
            torch.manual_seed(arguments.seed)
            model = Autoencoder()  # before the quantizer: with the same weights beside each
            model.quantizer = quantizer(name, arguments.codes)
            seconds = fit(model, train, arguments, progress)
            figures["quantizers"][name] = judge(model, validation, arguments.codes) | {"train_seconds": seconds}
    return figures


def table(figures: dict) -> str:
    """The figures for people."""
    lines = [f"{figures['codes']:,} codes, {figures['steps']:,} steps".ljust(32) + "   in use  perplexity      L1"]
    for name, row in figures["quantizers"].items():
        lines.append(f"{name:32s} {row['usage']:8.1%} {row['perplexity']:11.0f} {row['l1']:7.4f}")
    return "\n".join(lines)


def pictures(pattern: str, most: int | None = None) -> Tensor:
    """The bundled images [N, 3, 32, 32] in [-1, 1] of these shards, if too many evenly spread ones."""
    images = ImageDataset(open_images(str(EMOJI / pattern)), SIZE)
    step = 1 if most is None else -(-len(images) // most)
    return to_unit_range(images.batch(range(0, len(images), step))[0])


OURS = {"ibq.quantizers.IBQ": IBQ, "ibq.quantizers.VQ": VQ}


def quantizer(name: str, codes: int) -> nn.Module:
    """A quantizer that returns (latents [B, D, h, w], codes [B, h, w], loss), with the defaults of its package."""
    if name == THEIRS:
        from vector_quantize_pytorch import VectorQuantize

        return VectorQuantize(dim=DIM, codebook_size=codes, accept_image_fmap=True)
    return AsVectorQuantize(OURS[name](num_codes=codes, dim=DIM))


class Autoencoder(nn.Module):
    """Images [B, 3, 32, 32] -> (reconstruction, codes [B, 8, 8], the loss of `quantizer`)."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, WIDTH, 3, padding=1), nn.MaxPool2d(2), nn.GELU()),
            *(nn.Conv2d(WIDTH, DIM, 3, padding=1), nn.MaxPool2d(2)),
        )
        self.decoder = nn.Sequential(
            *(nn.Upsample(scale_factor=2), nn.Conv2d(DIM, WIDTH, 3, padding=1), nn.GELU()),
            *(nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, 3, 3, padding=1)),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct images."""
        latents, codes, loss = self.quantizer(self.encoder(images))
        return self.decoder(latents).clamp(-1, 1), codes, loss


def fit(model: nn.Module, images: Tensor, arguments: argparse.Namespace, progress) -> float:
    """Train the model; the seconds that it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(arguments.seed)
    start = time.perf_counter()
    for _ in range(arguments.steps):
        batch = images[torch.randint(len(images), (BATCH,), generator=generator)]
        reconstruction, _, loss = model(batch)
        (F.l1_loss(reconstruction, batch) + LOSS_WEIGHT * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.update()
    return time.perf_counter() - start


@torch.no_grad()
def judge(model: nn.Module, images: Tensor, num_codes: int) -> dict[str, float]:
    """L1 loss, share of the codes in use and their perplexity."""
    reconstruction, codes, _ = model.eval()(images)
    usage = CodeUsage(num_codes)
    usage.add(codes)
    figures = usage.figures()
    return {"l1": float(F.l1_loss(reconstruction, images)), **{key: figures[key] for key in ("usage", "perplexity")}}
