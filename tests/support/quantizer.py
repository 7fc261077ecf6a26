"""One small configuration of every kind of quantizer, and what can be expected of it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ibq.quantizers import (
    BSQConfig,
    FSQConfig,
    IBQConfig,
    LFQConfig,
    LinearProjectorConfig,
    QuantizerConfig,
    QuantizerOutput,
    SimVQConfig,
    VQBridgeConfig,
    VQConfig,
    build_quantizer,
)
from ibq.quantizers.base import Quantizer

Reached = Literal["every code", "codes in use", "no code"]
SMALL = {"num_codes": 16, "dim": 4}
ENTROPY = {"sample_entropy_weight": 1.0, "batch_entropy_weight": 0.5, "entropy_temperature": 0.5}
BRIDGE = VQBridgeConfig(group=2, width=8, blocks=2, heads=2)
LLAMAGEN = {"normalize": "vectors", "beta_weighs": "commitment"}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A configuration with 16 codes of 4 dimensions, and which rows of the trained codebook get a gradient."""

    config: QuantizerConfig
    from_latents: Reached  # the gradient of what the decoder makes of the latents
    from_losses: Reached
    losses_pull: bool = True  # the losses have a gradient with respect to the latents
    over_batch: bool = True  # there are statistics over the batch, which ranks may share


VQ = {"from_latents": "no code", "from_losses": "codes in use", "over_batch": False}
VQ_WITH_ENTROPY = {"from_latents": "no code", "from_losses": "every code"}
LOOKUP_FREE = {"from_latents": "no code", "from_losses": "no code"}
EVERY = {"from_latents": "every code", "from_losses": "every code"}

KINDS = {
    "ibq": Kind(config=IBQConfig(**SMALL, entropy_temperature=0.5), **EVERY),
    "ibq-uniform": Kind(config=IBQConfig(**SMALL, entropy_temperature=0.5, init="uniform", init_scale=0.5), **EVERY),
    "ibq-commitment": Kind(config=IBQConfig(**SMALL, entropy_temperature=0.5, beta_weighs="commitment"), **EVERY),
    "ibq-sphere": Kind(
        config=IBQConfig(**SMALL, entropy_temperature=0.5, l2_normalize=True, selection_temperature=0.5), **EVERY
    ),
    "ibq-linear": Kind(config=IBQConfig(**SMALL, entropy_temperature=0.5, projector=LinearProjectorConfig()), **EVERY),
    "ibq-vqbridge": Kind(config=IBQConfig(**SMALL, entropy_temperature=0.5, projector=BRIDGE), **EVERY),
    "vq": Kind(config=VQConfig(**SMALL), **VQ),
    "vq-commitment": Kind(config=VQConfig(**SMALL, beta_weighs="commitment", init="normal"), **VQ),
    "vq-search": Kind(config=VQConfig(**SMALL, normalize="search"), **VQ),
    "vq-llamagen": Kind(config=VQConfig(**SMALL, **LLAMAGEN), **VQ),
    "vq-llamagen-entropy": Kind(config=VQConfig(**SMALL, **LLAMAGEN, **ENTROPY), **VQ_WITH_ENTROPY),
    "vq-entropy": Kind(config=VQConfig(**SMALL, **ENTROPY), **VQ_WITH_ENTROPY),
    "vq-search-entropy": Kind(config=VQConfig(**SMALL, normalize="search", **ENTROPY), **VQ_WITH_ENTROPY),
    # A linear layer moves every code, but passes no gradient on to the rows of the others.
    "vq-linear": Kind(config=VQConfig(**SMALL, projector=LinearProjectorConfig()), **VQ),
    "vq-vqbridge": Kind(
        config=VQConfig(**SMALL, projector=BRIDGE), from_latents="no code", from_losses="every code", over_batch=False
    ),
    "simvq": Kind(config=SimVQConfig(**SMALL), from_latents="no code", from_losses="no code", over_batch=False),
    "lfq": Kind(config=LFQConfig(dim=4, entropy_temperature=0.5), **LOOKUP_FREE),
    "bsq": Kind(config=BSQConfig(dim=4, entropy_temperature=0.5), **LOOKUP_FREE),
    "bsq-groups": Kind(config=BSQConfig(dim=4, entropy_temperature=0.5, entropy_group=3), **LOOKUP_FREE),
    "fsq": Kind(config=FSQConfig(levels=(2, 2, 2, 2)), **LOOKUP_FREE, losses_pull=False, over_batch=False),
}


def build(config: QuantizerConfig) -> Quantizer:
    """A quantizer as after some training: nothing that starts at zero or as the identity is there any more."""
    torch.manual_seed(0)
    quantizer = build_quantizer(config)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return quantizer


def draw_latents(dim: int = 4, batch: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, dim, 5, 2, generator=torch.Generator().manual_seed(seed))


def objective(out: QuantizerOutput, upstream: Tensor) -> Tensor:
    """A scalar that depends on everything that is differentiable; a mean over the images."""
    return (out.latents * upstream).sum() / len(upstream) + sum(out.losses.values())
