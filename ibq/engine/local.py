"""One process, or data parallelism over several (PyTorch's DDP)."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ibq import dist
from ibq.engine.base import EngineSettings
from ibq.engine.blueprint import Blueprint
from ibq.engine.compilation import compile_units
from ibq.engine.configs import LocalEngineConfig
from ibq.engine.pieces import whole
from ibq.engine.torch_engine import Held, TorchEngine


class LocalEngine(TorchEngine):
    """Whole weights on this rank; see `ibq.engine.base.Engine`."""

    def __init__(self, blueprint: Blueprint, settings: EngineSettings, config: LocalEngineConfig | None = None):
        module = blueprint.whole().to(settings.device, memory_format=settings.memory_format)
        compiled = config is not None and compile_units(module, config.compile, settings.device)
        super().__init__(module, settings, _held(module), compiled=compiled)
        self._callable = self._parallel() if dist.world_size() > 1 else module

    def _parallel(self) -> DistributedDataParallel:
        device = self.settings.device
        ids = [device.index] if device.type == "cuda" else None
        # Buffers (batch-norm statistics) are per rank; whoever wants them global reduces them in the module.
        with warnings.catch_warnings():
            # PyTorch 2.15 announces a new name that 2.14 does not know.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            return DistributedDataParallel(self.module, device_ids=ids, broadcast_buffers=False)

    def __call__(self, *inputs):
        """The module's forward pass in the engine's precision."""
        with self.autocast():
            return (self._callable if torch.is_grad_enabled() else self.module)(*inputs)

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around one micro-batch's forward and backward passes: gradients are synced only in the last."""
        last = self._micro_batches == self.settings.accumulation - 1
        if last or self._callable is self.module:
            yield
        else:
            with self._callable.no_sync():
                yield


def _held(module: nn.Module) -> dict[str, Held]:
    """All trained parameters, whole; the ranks write about equally many elements of them."""
    load = [0] * dist.world_size()
    held = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            writer = load.index(min(load))
            load[writer] += parameter.numel()
            piece = whole(parameter.shape, owner=writer == dist.rank())
            held[name] = Held(tensor=parameter, piece=piece, decays=parameter.dim() >= 2, copies=dist.world_size())
    return held
