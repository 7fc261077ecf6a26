"""Group normalization followed by SiLU, as every convolution of the tokenizer has before it."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ibq.ops.backend import triton_is_installed

WIDEST = 4096  # channels that a kernel's tile has in one row


def group_norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """silu(norm(x)) of images x [B, C, H, W].

    Channels-last images in bfloat16 on CUDA go through fused kernels (`triton_group_norm_silu.py`), which compute in
    float32 and round once, to the bfloat16 that the convolution after them takes.
    """
    if _has_kernels(x):
        return _Fused.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return F.silu(norm(x))


def _has_kernels(x: Tensor) -> bool:
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and x.shape[1] <= WIDEST
        and x.is_contiguous(memory_format=torch.channels_last)
        and triton_is_installed()
        and not torch.compiler.is_compiling()  # compilers fuse it themselves
    )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        from ibq.ops import triton_group_norm_silu  # only where Triton is installed

        weight, bias = weight.float(), bias.float()  # in bfloat16 where an engine gathers them so
        out, found = triton_group_norm_silu.forward(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, *found)
        ctx.groups = groups
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from ibq.ops import triton_group_norm_silu

        x, weight, *found = ctx.saved_tensors
        found = triton_group_norm_silu.Normalization(*found)
        return *triton_group_norm_silu.backward(grad, x, weight, ctx.groups, found), None, None
