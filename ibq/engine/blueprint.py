"""How to make a module with initial weights that depend on its name and the seed alone, whole or part by part."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibq import initial
from ibq.engine.pieces import Piece, whole


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A module that is yet to be made.

    A module with a method `initial_value(name, shape)` that says an `Initial` of each parameter, and without buffers,
    can be made without memory (`skeleton`) and filled in pieces, on any device, equal in every layout. Any other module
    can only be made `whole`.
    """

    name: str
    build: Callable[[], nn.Module]
    seed: int

    def whole(self, device: torch.device | str = "cpu") -> nn.Module:
        """The module with its initial weights on a device, equal on every rank."""
        module = self.skeleton()
        if in_pieces(module):
            module.to_empty(device=device)
            for name, parameter in module.named_parameters():
                parameter.data.copy_(self.initial(module, name, whole(parameter.shape), device).view(parameter.shape))
            return module
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator takes the low 32 bits of a seed alone, so name and seed are both in them.
            torch.manual_seed(zlib.crc32(self.name.encode(), self.seed % 2**32))
            return self.build().to(device)

    def skeleton(self) -> nn.Module:
        """The module on the meta device: shapes without memory."""
        with torch.device("meta"):
            return self.build()

    def initial(self, module: nn.Module, name: str, piece: Piece, device: torch.device | str = "cpu") -> Tensor:
        """The initial values [numel] of a piece of one parameter, float32 on a device."""
        out = torch.empty(piece.numel, device=device)
        spans = ((span.start, span.length, span.count, span.stride) for span in piece.spans)
        wanted = module.initial_value(name, piece.shape)
        initial.fill(out, wanted, initial.key_of(self.seed, f"{self.name}.{name}"), spans)
        return out


def in_pieces(module: nn.Module) -> bool:
    """Whether a module's initial weights can be made one piece at a time."""
    return hasattr(module, "initial_value") and not any(True for _ in module.buffers())
