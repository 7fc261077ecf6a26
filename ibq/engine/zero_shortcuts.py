"""Shorter ways to what DeepSpeed's stage 3 does: fewer passes over memory, and one wait for the device in a step.

Functions are replaced in DeepSpeed 0.19: at the start one that all of its optimizers use, in the step methods of the
one optimizer that it has made, unless its CPU-Adam does the step. Where one is missing, DeepSpeed's own way stays.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ibq import dist
from ibq.engine.local import clip_divisor, squares

STEP = ("_get_norm_groups", "unscale_and_clip_grads", "_prepare_fp32_grad_for_sub_group")
SCATTER = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"


# --- The start ---


@contextlib.contextmanager
def flattened_on_the_device() -> Iterator[None]:
    """Within this context stage 3 brings its partitions together on the device, where there is room for both.

    DeepSpeed takes them to the CPU and back, at seconds for billions of weights, and collects garbage in between.
    """
    stage3 = importlib.import_module("deepspeed.runtime.zero.stage3")
    original = getattr(stage3, "defragment", None)
    if original is not None:
        stage3.defragment = flatten
    try:
        yield
    finally:
        if original is not None:
            stage3.defragment = original


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Move tensors of one type behind one another into one flat tensor, of which they become parts."""
    flat = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        part.copy_(tensor.view(-1))
        tensor.data = part
    if flat.is_cuda:
        torch.cuda.empty_cache()  # holes of odd sizes would stay
    return flat


# --- The step ---


def shorten(optimizer: Any, gradients: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Let a stage 3 optimizer without offload step in our way.

    `gradients`: the flat buffer in which each sub-group's gradients are summed up; `parts`: the same by parameter.
    """
    base = optimizer.optimizer
    if _has(optimizer, *STEP) and base.defaults.get("fused") and optimizer.loss_scale == 1.0:
        optimizer._get_norm_groups = functools.partial(_norm, optimizer, parts)
        # The fused optimizers divide by `grad_scale` as they read: no pass over the gradients, nothing to wait for.
        optimizer.unscale_and_clip_grads = lambda *_: None
        optimizer._prepare_fp32_grad_for_sub_group = functools.partial(_widen, optimizer, gradients)
    stream = getattr(optimizer, "reduce_and_partition_stream", None)
    if stream is not None:
        # The step waits for the reductions on the device: the host goes on, and has the step's kernels ready.
        stream.synchronize = lambda: torch.cuda.current_stream().wait_stream(stream)
    if dist.world_size() > 1:
        return
    if _has(optimizer, SCATTER):
        setattr(optimizer, SCATTER, _own_gradients)
    if _has(optimizer, "_partition_all_parameters"):
        optimizer._partition_all_parameters = functools.partial(
            _partition_all, optimizer.module, optimizer._partition_all_parameters
        )


def _has(optimizer: Any, *names: str) -> bool:
    return all(callable(getattr(optimizer, name, None)) for name in names)


def _norm(optimizer: Any, parts: Sequence[Tensor]) -> list[Tensor]:
    """The norm of all gradients, which also decides how they are clipped.

    DeepSpeed takes one of each parameter, with a copy in float64, and waits for the device in every sub-group.
    """
    norm = dist.all_reduce_sum(squares(parts).sum()).sqrt()
    optimizer.optimizer.grad_scale = clip_divisor(norm.float(), optimizer.clip_grad or None)
    return [norm]


def _widen(optimizer: Any, gradients: Sequence[Tensor], number: int) -> None:
    """Give a sub-group its gradients in float32, from the buffer in which they lie behind one another."""
    master, gradient = optimizer.fp32_partitioned_groups_flat[number], gradients[number]
    if gradient.dtype != master.dtype:
        wide = torch.empty(gradient.shape, dtype=master.dtype, device=gradient.device)
        torch._foreach_copy_([wide], [gradient])  # twice as fast as `Tensor.to` on GPUs
        gradient = wide
    master.grad = gradient
    optimizer.averaged_gradients[number] = None


def _own_gradients(parameters: Sequence[nn.Parameter], _dtype: torch.dtype) -> list[Tensor]:
    """One rank's share of the gradients: DeepSpeed copies them together, divides by 1 and copies the sum."""
    return [parameter.grad.reshape(-1) for parameter in parameters]


def _partition_all(module: nn.Module, original: Any) -> None:
    """Leave weights of one rank where they are: gathered, they are the partition, which the step writes to.

    DeepSpeed takes them away before the step and waits for the device when it has given them back.
    """
    parameters = list(module.parameters())
    if not all(p.ds_status.name == "AVAILABLE" and p.data_ptr() == p.ds_tensor.data_ptr() for p in parameters):
        original()
        return
    for parameter in parameters:
        parameter.ds_active_sub_modules.clear()
