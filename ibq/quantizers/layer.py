"""Quantizers as layers of any model: keyword arguments for a config, sequences beside images, one loss to add."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from ibq.quantizers.base import Quantizer, QuantizerOutput, require_choice, require_not_negative
from ibq.quantizers.ibq import IBQConfig, IndexBackpropQuantizer
from ibq.quantizers.lookup_free import (
    BinarySphericalQuantizer,
    BSQConfig,
    FiniteScalarQuantizer,
    FSQConfig,
    LFQConfig,
    LookupFreeBinaryQuantizer,
)
from ibq.quantizers.vq import SimVectorQuantizer, SimVQConfig, VectorQuantizer, VQConfig

Channels = Literal["first", "last"]


@dataclass(frozen=True, kw_only=True)
class LayerOutput(QuantizerOutput):
    """What a layer makes of its input: latents in the input's layout and precision, codes without its channels."""

    loss: Tensor  # the weighted sum of `losses`, to be added to the model's own


# So that hooks on a module's output, as FSDP has them, find the tensors in it.
register_dataclass(LayerOutput)


class Layer(Quantizer):
    """A quantizer with channels anywhere; its weights have the names and values of the one in a tokenizer.

    Where the channels are is a rule and never a guess, for [B, N, D] and [B, D, T] look the same when N = D. Without
    `channels`: last in [N, D] and [B, N, D], second in [B, D, h, w] and [B, D, t, h, w]. With "first" always second,
    as in [B, D, T]; with "last" always last. The other keywords are those of the config of this kind, and the weights
    of both losses, by default those of the tokenizers. Errors: ValueError.
    """

    settings: ClassVar[type]

    def __init__(
        self,
        *,
        channels: Channels | None = None,
        quantization_weight: float = 1.0,
        entropy_weight: float = 0.05,
        **settings,
    ):
        super().__init__(self.settings(**settings))
        self.channels, self.quantization_weight, self.entropy_weight = channels, quantization_weight, entropy_weight
        require_not_negative(self, "quantization_weight", "entropy_weight")
        if channels is not None:
            require_choice(self, "channels", Channels)

    def forward(self, z: Tensor) -> LayerOutput:
        """Quantize z, such as [B, N, D], to latents of the same shape and codes [B, N]."""
        axis = self._axis(z.dim())
        out = super().forward(self._pixels(z, axis))
        weights = {"quantization": self.quantization_weight, "entropy": self.entropy_weight}
        latents = out.latents.flatten(1).view(*z.movedim(axis, -1).shape).movedim(-1, axis)
        return LayerOutput(
            latents=latents.to(z.dtype),
            codes=out.codes.view(*z.shape[:axis], *z.shape[axis + 1 :]),
            losses=out.losses,
            loss=sum(weights[name] * loss for name, loss in out.losses.items()),
            metrics=out.metrics,
        )

    def encode(self, z: Tensor) -> Tensor:
        """Codes of z, such as [B, N] of [B, N, D], without the losses."""
        axis = self._axis(z.dim())
        return super().encode(self._pixels(z, axis)).view(*z.shape[:axis], *z.shape[axis + 1 :])

    def lookup(self, codes: Tensor) -> Tensor:
        """Latents of codes, such as [B, N, D] of [B, N]."""
        latents = super().lookup(codes.reshape(-1, 1, 1))
        return latents.view(*codes.shape, self.dim).movedim(-1, self._axis(codes.dim() + 1))

    def _axis(self, dims: int) -> int:
        """The axis of the channels of an input of so many axes."""
        first = dims > 3 if self.channels is None else self.channels == "first"
        return 1 if first else dims - 1

    def _pixels(self, z: Tensor, axis: int) -> Tensor:
        """Every token of z as an image [N, D, 1, 1] of one pixel."""
        if z.dim() < 2 or z.shape[axis] != self.dim:
            others = {"first": 1, "last": z.dim() - 1}
            fits = [f"channels={name!r}" for name, i in others.items() if z.dim() > 2 and z.shape[i] == self.dim]
            raise ValueError(
                f"{type(self).__name__} has dim {self.dim}, and axis {axis} of the input {tuple(z.shape)} is taken for "
                f"the channels; {'give ' + fits[0] if fits else 'set `dim` to the channels of the input'}"
            )
        return z.movedim(axis, -1).reshape(-1, self.dim, 1, 1)


class IBQ(Layer, IndexBackpropQuantizer):
    """`IBQ(num_codes=16_384, dim=256)` on [B, N, 256]: see `Layer`, `IBQConfig`, `IndexBackpropQuantizer`."""

    settings = IBQConfig


class VQ(Layer, VectorQuantizer):
    """`VQ(num_codes=16_384, dim=256)`: see `Layer`, `VQConfig`, `VectorQuantizer`."""

    settings = VQConfig


class SimVQ(Layer, SimVectorQuantizer):
    """`SimVQ(num_codes=65_536, dim=128)`: see `Layer`, `SimVQConfig`, `SimVectorQuantizer`."""

    settings = SimVQConfig


class LFQ(Layer, LookupFreeBinaryQuantizer):
    """`LFQ(dim=18)`: see `Layer`, `LFQConfig`, `LookupFreeBinaryQuantizer`."""

    settings = LFQConfig


class BSQ(Layer, BinarySphericalQuantizer):
    """`BSQ(dim=18)`: see `Layer`, `BSQConfig`, `BinarySphericalQuantizer`."""

    settings = BSQConfig


class FSQ(Layer, FiniteScalarQuantizer):
    """`FSQ(levels=(8, 5, 5, 5))`: see `Layer`, `FSQConfig`, `FiniteScalarQuantizer`."""

    settings = FSQConfig


class AsVectorQuantize(nn.Module):
    """A layer that returns (quantized, indices, loss), as those of `vector-quantize-pytorch` do."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize z in the layer's layout."""
        out = self.layer(z)
        return out.latents, out.codes, out.loss
