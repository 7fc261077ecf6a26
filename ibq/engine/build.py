"""The engine that a config names by its `kind`."""

from ibq.engine.base import Engine, EngineSettings
from ibq.engine.blueprint import Blueprint
from ibq.engine.configs import EngineConfig, FsdpEngineConfig, LocalEngineConfig, ZeroEngineConfig


def build_engine(config: EngineConfig, blueprint: Blueprint, settings: EngineSettings) -> Engine:
    """The engine that `config` describes, training the module of `blueprint`."""
    match config:
        case LocalEngineConfig():
            from ibq.engine.local import LocalEngine

            return LocalEngine(blueprint, settings, config)
        case FsdpEngineConfig():
            from ibq.engine.fsdp import FsdpEngine

            return FsdpEngine(config, blueprint, settings)
        case ZeroEngineConfig():
            from ibq.engine.zero import ZeroEngine

            return ZeroEngine(config, blueprint, settings)
        case _:
            raise ValueError(f"no engine for {type(config).__name__}")
