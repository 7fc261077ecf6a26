"""One small layer of every kind in a model as other people write them, and how they train it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibq.quantizers import BSQ, FSQ, IBQ, LFQ, VQ, SimVQ
from ibq.quantizers.layer import Layer, LayerOutput

CODEBOOK = {"num_codes": 16, "dim": 4}
LAYERS = {
    "ibq": (IBQ, CODEBOOK | {"entropy_temperature": 0.5}),
    "vq": (VQ, CODEBOOK),
    "simvq": (SimVQ, CODEBOOK),
    "lfq": (LFQ, {"dim": 4, "entropy_temperature": 0.5}),
    "bsq": (BSQ, {"dim": 4, "entropy_temperature": 0.5}),
    "fsq": (FSQ, {"levels": (2, 2, 2, 2)}),
}
STEPS = 3


def layer(name: str, **settings) -> Layer:
    torch.manual_seed(0)
    kind, own = LAYERS[name]
    return kind(**own, **settings)


class Model(nn.Module):
    """An autoencoder of sequences [B, N, 6]."""

    def __init__(self, name: str):
        super().__init__()
        self.quantizer = layer(name)
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, LayerOutput]:
        out = self.quantizer(self.encoder(x))
        return self.decoder(out.latents), out


def batches() -> list[Tensor]:
    return list(torch.randn(STEPS, 4, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def train(model: nn.Module, rank: int = 0, ranks: int = 1) -> nn.Module:
    """Some steps on this rank's share of the batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches():
        x = x.chunk(ranks)[rank]
        reconstruction, out = model(x)
        (F.mse_loss(reconstruction, x) + out.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
