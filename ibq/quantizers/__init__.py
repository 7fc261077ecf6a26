"""Quantizers, chosen in a config by `kind`, or built as layers: `IBQ(num_codes=1024, dim=64)`."""

from ibq.quantizers.base import Quantizer, QuantizerOutput
from ibq.quantizers.ibq import IBQConfig, IndexBackpropQuantizer
from ibq.quantizers.layer import BSQ, FSQ, IBQ, LFQ, VQ, AsVectorQuantize, LayerOutput, SimVQ
from ibq.quantizers.lookup_free import (
    BinarySphericalQuantizer,
    BSQConfig,
    FiniteScalarQuantizer,
    FSQConfig,
    LFQConfig,
    LookupFreeBinaryQuantizer,
)
from ibq.quantizers.projector import LinearProjectorConfig, ProjectorConfig, VQBridgeConfig
from ibq.quantizers.vq import SimVectorQuantizer, SimVQConfig, VectorQuantizer, VQConfig

QuantizerConfig = IBQConfig | VQConfig | LFQConfig | BSQConfig | FSQConfig | SimVQConfig


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer that `config` describes."""
    match config:
        case IBQConfig():
            return IndexBackpropQuantizer(config)
        case VQConfig():
            return VectorQuantizer(config)
        case LFQConfig():
            return LookupFreeBinaryQuantizer(config)
        case BSQConfig():
            return BinarySphericalQuantizer(config)
        case FSQConfig():
            return FiniteScalarQuantizer(config)
        case SimVQConfig():
            return SimVectorQuantizer(config)
        case _:
            raise ValueError(f"no quantizer for {type(config).__name__}")
