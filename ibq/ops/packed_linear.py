"""Linear layers for few rows and fixed weights, as in decoding: packed for oneDNN on the CPU, or 8-bit weights.

With a handful of rows a product is bound by reading the weight. On the CPU the plain product of so few rows reads it
several times slower than memory allows; oneDNN, given the number of rows, lays it out once as it reads it best. In 8
bits, w = scale * q for each output with q in [-127, 127]: half the bytes of bfloat16 (weight-only quantization as in
LLM.int8(), arXiv 2208.07339, without its outliers).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INT8_LARGEST = 127
INT8_INPUTS = 16  # PyTorch's product on the CPU reads over the end of rows that are no multiple of so many


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


class PackedLinear(nn.Module):
    """y = x W^T + b for x [rows, ..., inputs] in the precision of the weight [outputs, inputs]; for use only."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        super().__init__()
        self.packed = can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        x = x.to(self.weight.dtype)
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return packed_linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # sooner there


class Int8Linear(nn.Module):
    """The same with a weight of 8 bits and one scale for each output; activations are bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.quantized, self.scale = quantize_rows(weight)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs] in bfloat16."""
        x = x.to(torch.bfloat16)
        if x.is_cpu and self.quantized.shape[1] % INT8_INPUTS == 0:
            flat = torch._weight_int8pack_mm(x.flatten(0, -2), self.quantized, self.scale)
            y = flat.unflatten(0, x.shape[:-1])
        else:  # compiled on a GPU, the conversion is a part of the product's loop
            y = F.linear(x, self.quantized.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(q int8, scale bfloat16 [outputs]) of a weight [outputs, inputs]: q is taken for the rounded scale."""
    largest = weight.detach().float().abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    scale = (largest / INT8_LARGEST).to(torch.bfloat16)
    quantized = (weight.detach().float() / scale.float()[:, None]).round()
    return quantized.clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8), scale
