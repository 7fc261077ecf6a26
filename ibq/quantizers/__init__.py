"""Quantizers, chosen in a config by `kind`."""

from ibq.quantizers.base import Quantizer, QuantizerOutput
from ibq.quantizers.ibq import IBQConfig, IndexBackpropQuantizer

QuantizerConfig = IBQConfig

__all__ = [
    "IBQConfig",
    "IndexBackpropQuantizer",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "build_quantizer",
]


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer that `config` describes."""
    match config:
        case IBQConfig():
            return IndexBackpropQuantizer(config)
        case _:
            raise ValueError(f"no quantizer for {type(config).__name__}")
