"""How to make a module with initial weights that depend on its name and the seed alone, whole or part by part."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A module that is yet to be made.

    A module with a method `initialize_parameter(name, parameter, generator)` gets every parameter from a seed of its
    own: it can be made without memory (`skeleton`) and filled one parameter at a time, equal in every layout. Any other
    module can only be made `whole`.
    """

    name: str
    build: Callable[[], nn.Module]
    seed: int

    def whole(self) -> nn.Module:
        """The module with its initial weights, on the CPU, equal on every rank."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed_of(self.name))
            module = self.build()
        if hasattr(module, "initialize_parameter"):
            for name, parameter in module.named_parameters():
                self.fill(module, name, parameter)
        return module

    def skeleton(self) -> nn.Module:
        """The module on the meta device: shapes without memory."""
        with torch.device("meta"):
            return self.build()

    def fill(self, module: nn.Module, name: str, parameter: Tensor) -> None:
        """Give one whole parameter, on the CPU, its initial value."""
        generator = torch.Generator().manual_seed(self._seed_of(f"{self.name}.{name}"))
        module.initialize_parameter(name, parameter, generator)

    def initial(self, module: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor:
        """The initial value of one parameter, float32 on the CPU."""
        value = torch.empty(shape)
        self.fill(module, name, value)
        return value

    def _seed_of(self, name: str) -> int:
        return (self.seed << 32) + zlib.crc32(name.encode())
