"""Group normalization followed by SiLU, as every convolution of the tokenizer has before it; and blocks of two such."""

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
    if has_kernels(x):
        return _Fused.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return F.silu(norm(x))


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels take these images."""
    return (
        not torch.compiler.is_compiling()  # compilers fuse it themselves, and may not trace what comes after
        and x.is_cuda
        and x.dtype == torch.bfloat16
        and x.shape[1] <= WIDEST
        and x.is_contiguous(memory_format=torch.channels_last)
        and triton_is_installed()
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
        return *triton_group_norm_silu.backward(grad, x, weight, ctx.groups, found)[:3], None, None


# --- Residual blocks ---
#
# On CUDA a block of two convolutions, each behind a normalization, is one operator. It keeps what enters the two
# normalizations, and makes the rest again in the backward pass, which is cheap. Biases of convolutions are no passes of
# their own: the first goes into the statistics of the normalization after it, the second into the sum with the
# shortcut; and so do their gradients.


def can_fuse(x: Tensor, convolutions: tuple[nn.Conv2d, nn.Conv2d]) -> bool:
    """Whether `res_block` takes these images, and convolutions that have a bias.

    It does not call them: where they have hooks, as those by which DeepSpeed reads their weights from NVMe, it may not.
    """
    return has_kernels(x) and all(
        conv.bias is not None and not conv._forward_pre_hooks and not conv._forward_hooks for conv in convolutions
    )


def res_block(
    x: Tensor,
    shortcut: Tensor | None,
    norms: tuple[nn.GroupNorm, nn.GroupNorm],
    convolutions: tuple[nn.Conv2d, nn.Conv2d],
) -> Tensor:
    """conv(silu(norm(conv(silu(norm(x)))))) + shortcut for channels-last x; the shortcut None is x itself.

    Convolutions in the precision of x, all between them in float32.
    """
    tensors = [
        tensor
        for norm, conv in zip(norms, convolutions, strict=True)
        for tensor in (norm.weight, norm.bias, conv.weight, conv.bias)
    ]
    settings = tuple((norm.num_groups, norm.eps, conv.padding) for norm, conv in zip(norms, convolutions, strict=True))
    return _ResBlock.apply(x, shortcut, settings, *tensors)


class _ResBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shortcut, settings, *tensors):
        from ibq.ops import triton_group_norm_silu as kernels  # only where Triton is installed

        (first, second), given = settings, tensors
        weight1, bias1, kernel1, added1, weight2, bias2, kernel2, added2 = (
            tensor.to(x.dtype) if tensor.dim() == 4 else tensor.float() for tensor in given
        )
        found1 = kernels.normalization(x, weight1, bias1, *first[:2])
        h = _convolved(kernels.values(x, found1), kernel1, first[2])
        found2 = kernels.normalization(h, weight2, bias2, *second[:2], added=added1)
        out = _convolved(kernels.values(h, found2), kernel2, second[2])
        ctx.save_for_backward(x, h, weight1, kernel1, weight2, kernel2, *found1, *found2)
        ctx.settings, ctx.dtypes, ctx.shortcut_is_x = settings, [tensor.dtype for tensor in given], shortcut is None
        shortcut = x if shortcut is None else shortcut.contiguous(memory_format=torch.channels_last)
        return kernels.add_shortcut(out, added2, shortcut)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from ibq.ops import triton_group_norm_silu as kernels

        x, h, weight1, kernel1, weight2, kernel2, *found = ctx.saved_tensors
        half = len(found) // 2
        found1, found2 = kernels.Normalization(*found[:half]), kernels.Normalization(*found[half:])
        (first, second), needed = ctx.settings, ctx.needs_input_grad[3:]
        grad = grad.contiguous(memory_format=torch.channels_last)
        own, grad_kernel2 = _through(grad, kernels.values(h, found2), kernel2, second[2], needed[6])
        inner = kernels.backward(own, h, weight2, second[0], found2)
        own, grad_kernel1 = _through(inner.x, kernels.values(x, found1), kernel1, first[2], needed[2])
        outer = kernels.backward(own, x, weight1, first[0], found1, grad if ctx.shortcut_is_x else None)
        added2 = kernels.sum_over_pixels(grad) if needed[7] else None
        gradients = (
            *(outer.weight, outer.bias, grad_kernel1, inner.added),
            *(inner.weight, inner.bias, grad_kernel2, added2),
        )
        gradients = [
            value.to(dtype) if wanted else None
            for value, dtype, wanted in zip(gradients, ctx.dtypes, needed, strict=True)
        ]
        return outer.x, None if ctx.shortcut_is_x else grad, None, *gradients


def _convolved(x: Tensor, kernel: Tensor, padding: tuple) -> Tensor:
    """Channels last, which convolutions leave where one image's strides say little, and outside cuDNN."""
    return F.conv2d(x, kernel, padding=padding).contiguous(memory_format=torch.channels_last)


def _through(grad: Tensor, x: Tensor, kernel: Tensor, padding: tuple, for_kernel: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of a convolution's input and kernel."""
    for_x, for_kernel, _ = torch.ops.aten.convolution_backward(
        grad, x, kernel, None, (1, 1), padding, (1, 1), False, (0, 0), 1, (True, for_kernel, False)
    )
    return for_x, for_kernel
