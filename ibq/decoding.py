"""A transformer made ready for drawing codes: its weights in one precision, laid out for a number of rows."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ibq.models.transformer import Condition, KVCache, Transformer
from ibq.ops.packed_linear import Int8Linear, PackedLinear

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS = ("fp32", "bf16", "int8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


class Decoder:
    """Decodes `rows` sequences at a time; the transformer that it is made from stays as it is, and may be let go.

    `precision`: fp32; bf16 weights, cache and activations, with norms and rotations in float32; or int8 weights in the
    blocks and the head with the rest as in bf16. `compile_step` compiles the step by torch.compile, once for all
    positions: the first image takes minutes. Errors: ValueError for a precision that does not exist.
    """

    def __init__(self, transformer: Transformer, precision: Precision, rows: int, *, compile_step: bool = False):
        if precision not in PRECISIONS:
            raise ValueError(f"precision: {precision!r} does not exist; use one of {', '.join(PRECISIONS)}")
        self.precision, self.rows, self.config = precision, rows, transformer.config
        self.dtype, self.device = DTYPES[precision], transformer.head.weight.device
        self.null_class = transformer.null_class
        self._transformer = _prepared(transformer, precision, rows)
        self._step = self._transformer.decode_step
        if compile_step:
            self._step = torch.compile(self._transformer.decode_step, dynamic=False, fullgraph=True)
            self._positions = torch.arange(self.config.num_tokens, device=self.device)[:, None]
        self.compiled = compile_step

    def condition(self, classes: Tensor) -> Condition:
        """Everything that decoding needs of classes [rows]."""
        return self._transformer.condition(classes)

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return self._transformer.new_cache(self.rows, self.dtype, self.device)

    def step(self, codes: Tensor | None, condition: Condition, cache: KVCache, position: int) -> Tensor:
        """Logits [rows, V] in float32 of the code at `position`; see `Transformer.decode_step`."""
        if self.compiled and codes is not None:
            return self._step(codes, condition, cache, self._positions[position]).float()
        return self._transformer.decode_step(codes, condition, cache, position).float()

    def weight_bytes(self) -> int:
        """Bytes of the weights that every step reads: those of the blocks without their modulations, and the head."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _read_each_step(self._transformer))


def _prepared(transformer: Transformer, precision: Precision, rows: int) -> Transformer:
    """A transformer that shares what does not change, with other linear layers where every step needs them."""
    with torch.device("meta"):
        copied = Transformer(transformer.config)
    dtype = DTYPES[precision]
    state = {name: value.detach().to(dtype) for name, value in transformer.state_dict().items()}
    copied.load_state_dict(state, assign=True)
    copied.eval().requires_grad_(False)
    for block in copied.blocks:
        for owner in (block.attention, block.feed_forward):
            for name, layer in list(owner.named_children()):
                owner.register_module(name, _layer(layer, precision, rows))
    copied.head = _layer(copied.head, precision, rows)
    return copied


def _layer(layer: nn.Module, precision: Precision, rows: int) -> nn.Module:
    weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
    if precision == "int8":
        return Int8Linear(weight, bias)
    return PackedLinear(weight, bias, rows)


def _read_each_step(transformer: Transformer) -> Iterator[Tensor]:
    parts = [part for block in transformer.blocks for part in (block.attention, block.feed_forward)]
    for layer in [*(layer for part in parts for layer in part.children()), transformer.head]:
        yield layer.quantized if isinstance(layer, Int8Linear) else layer.weight
