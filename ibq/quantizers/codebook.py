"""What the quantizers with a codebook share: its initialisation, a projector over it, look-up and pass-through."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibq.quantizers.base import Quantizer, QuantizerOutput, to_grid, to_tokens

Init = Literal["normal", "uniform"]


@torch.no_grad()
def initialise(codebook: Tensor, init: Init, scale: float, generator: torch.Generator | None = None) -> None:
    """Draw a codebook [K, D]: normal with standard deviation `scale`, or uniform in [-scale, scale]."""
    match init:
        case "normal":
            nn.init.normal_(codebook, std=scale, generator=generator)
        case "uniform":
            nn.init.uniform_(codebook, -scale, scale, generator=generator)


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
        with torch.autocast(self.codebook.device.type, enabled=False):
            codebook = self.codebook if self.projector is None else self.projector(self.codebook)
            codebook = codebook.to(self._dtype)
            return F.normalize(codebook, dim=1) if self.spherical else codebook

    def tokens(self, z: Tensor) -> Tensor:
        """The vectors [N, D] that are compared with the codes, of z [B, D, h, w]."""
        tokens = to_tokens(z, self._dtype)
        return F.normalize(tokens, dim=1) if self.spherical else tokens

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Codes [B, h, w] of z [B, D, h, w], without the losses."""
        self.check_latents(z)
        with torch.autocast(z.device.type, enabled=False):
            return to_grid(self._best(self.tokens(z), self.code_vectors()), z)

    def lookup(self, codes: Tensor) -> Tensor:
        """Latents [B, D, h, w] of codes [B, h, w]."""
        self.check_codes(codes)
        return F.embedding(codes, self.code_vectors()).permute(0, 3, 1, 2)

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
