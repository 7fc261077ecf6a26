"""The contract that every quantizer keeps, what those with a codebook share, and the checks of their configurations."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Init = Literal["normal", "uniform"]


@dataclass(frozen=True, kw_only=True)
class QuantizerOutput:
    """What a quantizer makes of a latent."""

    latents: Tensor  # [B, D, h, w], quantized, differentiable
    codes: Tensor  # [B, h, w] int64
    losses: dict[str, Tensor]  # unweighted scalars
    metrics: dict[str, Tensor] = field(default_factory=dict)  # detached scalars for the log


class Quantizer(nn.Module):
    """Maps latents to codes and back.

    Every kind gives the loss "quantization", and "entropy" where it has an entropy term. All of them compute in
    float32 also under autocast; a quantizer in float64 stays in float64.

    `mean_over_ranks` (tensor -> its mean over all ranks, autograd-aware) makes batch statistics global; None keeps
    them per rank.
    """

    num_codes: int
    dim: int
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None
    spherical: bool = False  # latents and codes are unit vectors, compared by their angle
    # Whether the codes are a parameter `codebook` [K, D] that can be set to vectors like `tokens` gives (k-means). Only
    # then is there a `passthrough`: to hand on the latents unquantized until the codebook is initialised from them.
    learned_codebook: bool = False
    passthrough: bool = False

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z [B, D, h, w]."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Codes [B, h, w] of z [B, D, h, w], without the losses."""
        self.check_latents(z)
        with torch.autocast(z.device.type, enabled=False):
            return to_grid(self._codes(self.tokens(z)), z)

    def lookup(self, codes: Tensor) -> Tensor:
        """Latents [B, D, h, w] of codes [B, h, w]."""
        self.check_codes(codes)
        # By the table, so that codes out of range are noticed on accelerators as well.
        return F.embedding(codes, self.code_vectors()).permute(0, 3, 1, 2)

    def code_vectors(self) -> Tensor:
        """The latents [K, D] that the codes stand for."""
        raise NotImplementedError

    def tokens(self, z: Tensor) -> Tensor:
        """The vectors [N, D] that are compared with the codes, of z [B, D, h, w]."""
        tokens = to_tokens(z, self._dtype)
        return F.normalize(tokens, dim=1) if self.spherical else tokens

    @property
    def _dtype(self) -> torch.dtype:
        raise NotImplementedError

    def _codes(self, tokens: Tensor) -> Tensor:
        """The codes [N] of tokens [N, D]."""
        raise NotImplementedError

    def check_latents(self, z: Tensor) -> None:
        """Raise ValueError unless z is [B, D, h, w] with B >= 1 and the codebook's D."""
        if z.dim() != 4 or z.shape[1] != self.dim:
            raise ValueError(
                f"the quantizer takes latents [B, {self.dim}, h, w] but got {tuple(z.shape)}; "
                "set the quantizer's `dim` to the channels of the latent"
            )
        if z.numel() == 0:
            raise ValueError(f"the batch is empty (latents {tuple(z.shape)}); give at least one image")

    def check_codes(self, codes: Tensor) -> None:
        """Raise ValueError unless codes are integers [B, h, w] in [0, num_codes).

        The range is read only on the CPU: on an accelerator the look-up itself asserts it, without a host sync.
        """
        if codes.dim() != 3 or codes.is_floating_point():
            raise ValueError(f"codes must be integers of shape [B, h, w], got {codes.dtype} {tuple(codes.shape)}")
        if codes.device.type == "cpu" and codes.numel():
            low, high = int(codes.min()), int(codes.max())
            if low < 0 or high >= self.num_codes:
                raise ValueError(
                    f"codes lie in [{low}, {high}] but the codebook has {self.num_codes} codes; "
                    "were they made with another tokenizer?"
                )


# --- With a codebook ---------------------------------------------------------


class CodebookQuantizer(Quantizer):
    """A quantizer whose codes stand for the rows of `codebook` [K, D].

    With a projector (a module [K, D] -> [K, D]) they stand for the rows that it makes of the codebook; `spherical` then
    scales them, and the tokens, to unit length. A frozen codebook is not trained: it is drawn from its own seed, so
    that a run that goes on has the same one.
    """

    def __init__(
        self,
        config: Any,
        *,
        init_scale: float,
        spherical: bool = False,
        projector: nn.Module | None = None,
        frozen_seed: int | None = None,
    ):
        super().__init__()
        self.config = config
        self.num_codes, self.dim = config.num_codes, config.dim
        self.init_scale, self.spherical, self.frozen_seed = init_scale, spherical, frozen_seed
        self.learned_codebook = frozen_seed is None
        codebook = torch.empty(config.num_codes, config.dim)
        if self.learned_codebook:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.projector = projector
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the codebook anew."""
        if self.learned_codebook:
            initialise(self.codebook, self.config.init, self.init_scale)
        else:  # on the CPU: the same numbers on every device
            drawn = torch.empty(self.codebook.shape, device="cpu")
            initialise(drawn, self.config.init, self.init_scale, torch.Generator().manual_seed(self.frozen_seed))
            with torch.no_grad():
                self.codebook.copy_(drawn)

    def code_vectors(self) -> Tensor:
        """The rows [K, D] that codes stand for, in float32 or float64."""
        codebook = self._projected()
        return F.normalize(codebook, dim=1) if self.spherical else codebook

    def _projected(self) -> Tensor:
        """What the projector makes of the codebook [K, D], not scaled."""
        with torch.autocast(self.codebook.device.type, enabled=False):
            codebook = self.codebook if self.projector is None else self.projector(self.codebook)
            return codebook.to(self._dtype)

    @torch.no_grad()
    def merged(self) -> "CodebookQuantizer":
        """This quantizer for use, without its projector: what that makes is the codebook. Equal codes, bit for bit.

        FVQ's models are published so (arXiv 2509.10140): the projector costs nothing once the training is over.
        """
        with torch.device("meta"):
            merged = self._unprojected()
        codebook = nn.Parameter(self._projected().clone(), requires_grad=False)
        merged.load_state_dict({"codebook": codebook}, assign=True)
        return merged.train(self.training).requires_grad_(False)

    def _unprojected(self) -> "CodebookQuantizer":
        return type(self)(replace(self.config, projector=None))

    def _codes(self, tokens: Tensor) -> Tensor:
        return self._best(tokens, self.code_vectors())

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.codebook.dtype == torch.float64 else torch.float32

    def _best(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """The codes [N] of tokens [N, D]."""
        raise NotImplementedError

    def _pass(self, z: Tensor, tokens: Tensor, codebook: Tensor, losses: tuple[str, ...]) -> QuantizerOutput:
        """The output while `passthrough` is set."""
        nothing = 0.0 * codebook.sum()  # data parallelism wants a gradient for every parameter
        return QuantizerOutput(
            latents=to_grid(tokens, z),
            codes=to_grid(self._best(tokens.detach(), codebook.detach()), z),
            losses=dict.fromkeys(losses, nothing),
        )


@torch.no_grad()
def initialise(codebook: Tensor, init: Init, scale: float, generator: torch.Generator | None = None) -> None:
    """Draw a codebook [K, D]: normal with standard deviation `scale`, or uniform in [-scale, scale]."""
    match init:
        case "normal":
            nn.init.normal_(codebook, std=scale, generator=generator)
        case "uniform":
            nn.init.uniform_(codebook, -scale, scale, generator=generator)


# --- Tokens, grids and losses --------------------------------------------------------


def to_tokens(z: Tensor, dtype: torch.dtype) -> Tensor:
    """The vectors [N, D] of z [B, D, h, w], images one after the other in raster order."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).to(dtype)


def to_grid(tokens: Tensor, z: Tensor) -> Tensor:
    """Tokens [N, D] as [B, D, h, w], or codes [N] as [B, h, w], in the places that they have in z [B, D, h, w]."""
    batch, _, height, width = z.shape
    grid = tokens.view(batch, height, width, *tokens.shape[1:])
    return grid if tokens.dim() == 1 else grid.permute(0, 3, 1, 2)


def entropy_loss(config: Any, sample: Tensor, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(the weighted entropy of each token less that of the batch, both for the log)."""
    loss = config.sample_entropy_weight * sample - config.batch_entropy_weight * batch
    return loss, {"sample_entropy": sample.detach(), "batch_entropy": batch.detach()}


def straight_through(tokens: Tensor, rows: Tensor) -> Tensor:
    """The values of `rows`, to the last bit, with the gradient going to `tokens` alone (arXiv 1308.3432)."""
    return rows.detach() + (tokens - tokens.detach())


# --- Checks of configurations: errors are named after the field --------------


def require_positive(config: Any, *names: str) -> None:
    """Raise ValueError for a field that is not positive and finite."""
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: must be positive, got {value}; the paper's settings are the defaults")


def require_not_negative(config: Any, *names: str) -> None:
    """Raise ValueError for a field that is negative or not finite."""
    for name in names:
        value = getattr(config, name)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}: must be at least 0 and finite, got {value}; the paper's is the default")


def require_choice(config: Any, name: str, literal: Any) -> None:
    """Raise ValueError for a field that is not among the values of a Literal type."""
    value, choices = getattr(config, name), get_args(literal)
    if value not in choices:
        raise ValueError(f"{name}: there is no {value!r}; use {' or '.join(choices)}")
