"""A transformer made ready for drawing codes: its weights in one precision, laid out for a number of rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq.models.transformer import Condition, KVCache, Transformer
from ibq.ops.backend import require_compile
from ibq.sampler import Precision, check_precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Decoder:
    """Decodes `rows` sequences at a time; the transformer that it is made from stays as it is, and may be let go.

    `precision`: fp32; or bf16 weights, cache and activations, with norms and rotations in float32. `compile_step`
    compiles the step by torch.compile, once for all positions: the first image takes minutes. Errors: ValueError for a
    precision that does not exist, UserError where nothing can be compiled.
    """

    def __init__(self, transformer: Transformer, precision: Precision, rows: int, *, compile_step: bool = False):
        check_precision(precision)
        if compile_step:
            require_compile(transformer.head.weight.device.type, "compile", "leave it out")
        self.precision, self.rows, self.config = precision, rows, transformer.config
        self.dtype, self.device = DTYPES[precision], transformer.head.weight.device
        self.null_class = transformer.null_class
        self._transformer = _prepared(transformer, self.dtype, rows)
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
        weights = [layer.weight for layer in self._transformer.modules() if isinstance(layer, PackedLinear)]
        return sum(weight.numel() * weight.element_size() for weight in weights)


def _prepared(transformer: Transformer, dtype: torch.dtype, rows: int) -> Transformer:
    """A transformer that shares what does not change, with packed linear layers where every step needs them."""
    with torch.device("meta"):
        copied = Transformer(transformer.config)
    state = {name: value.detach().to(dtype) for name, value in transformer.state_dict().items()}
    copied.load_state_dict(state, assign=True)
    copied.eval().requires_grad_(False)
    for block in copied.blocks:
        for owner in (block.attention, block.feed_forward):
            for name, layer in list(owner.named_children()):
                owner.register_module(name, PackedLinear(layer.weight, layer.bias, rows))
    copied.head = PackedLinear(copied.head.weight, None, rows)
    return copied


# --- Products of few rows with fixed weights ---
#
# They are bound by reading the weight. On the CPU the plain product of so few rows reads it several times slower than
# memory allows; oneDNN, given the number of rows, lays it out once as it reads it best.


class PackedLinear(nn.Module):
    """y = x W^T + b for x [rows, ..., inputs] in the precision of the weight [outputs, inputs]; for use only."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        super().__init__()
        self.packed = can_pack(weight)
        weight = weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        x = x.to(self.weight.dtype)
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return packed_linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # sooner there


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can take a weight of this kind."""
    if not weight.is_cpu or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


@torch.library.custom_op("ibq::packed_linear", mutates_args=())
def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., inputs] times a packed weight; an operator of its own, as compilers want packed weights as constants."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@packed_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
