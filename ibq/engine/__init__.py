"""Engines, chosen in a config by `kind`."""

from torch import nn

from ibq.engine.base import Engine, OptimizerConfig
from ibq.engine.local import LocalEngine, LocalEngineConfig

EngineConfig = LocalEngineConfig

__all__ = ["Engine", "EngineConfig", "LocalEngineConfig", "OptimizerConfig", "build_engine"]


def build_engine(config: EngineConfig, module: nn.Module, optimizer: OptimizerConfig, **settings) -> Engine:
    """The engine that `config` describes, training `module`; `settings` as for LocalEngine."""
    match config:
        case LocalEngineConfig():
            return LocalEngine(module, optimizer, **settings)
        case _:
            raise ValueError(f"no engine for {type(config).__name__}")
