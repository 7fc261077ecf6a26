"""A linear head and its cross-entropy without the logits of tokens x vocabulary.

The same values and gradients as `F.linear` and `F.cross_entropy`, computed in tiles and recomputed in the backward
pass, as in Cut Cross-Entropy (arXiv 2411.09009) but without leaving small gradients out: memory grows with tokens +
vocabulary, not with their product. On CUDA by Triton kernels (`triton_linear_cross_entropy.py`), elsewhere, and where
Triton is missing, in plain PyTorch.

Tiles have codes as rows and tokens as columns: sums over the codes then run along whole rows, and one buffer serves
all tiles. Exponentials are taken to the base 2, which CPUs do several times faster than to the base e.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ibq.ops.backend import Backend, float32_products, use_triton

LOG2_E = math.log2(math.e)
# (codes, tokens) of a tile: on a CPU it stays in the cache, and fewer tokens would make products that only move memory.
TILES = {"cpu": (2048, 512)}
GPU_TILE = (2048, 2048)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Negative log likelihood in nats of every target under softmax(hidden . weight^T).

    hidden [N, C], weight [V, C], targets [N] int64 -> [N] float32, or float64 for float64 inputs. Under autocast the
    operands of the matrix products are rounded to its dtype; everything after is float32 or more exact. `backend`
    forces plain PyTorch or Triton; `auto` takes Triton on CUDA where it is installed.

    Errors: ValueError for an empty batch, wrong shapes or types, on the CPU only (elsewhere the check would wait for
    the device) for targets out of range, and for a forced backend that cannot be had.
    """
    _check(hidden, weight, targets)
    nll, _ = _operator(hidden, weight, targets, _product_dtype(hidden, weight), backend)
    return nll


def split_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    first_code: int,
    num_codes: int,
    gather: Callable[[Tensor], Tensor],
    backend: Backend = "auto",
) -> Tensor:
    """`linear_cross_entropy` where the vocabulary is split over processes, without gathering logits or weights.

    weight [V / P, C] has the rows from `first_code` on of the `num_codes` = V; hidden and targets are the same in all P
    processes, and so is the result. `gather` gives the tensors of all processes, [P, ...], in the order of their codes.
    The gradient of hidden is this process's part: the caller adds up those of all. Errors as there.
    """
    _check(hidden, weight, targets)
    dtype = _product_dtype(hidden, weight)
    return _SplitLoss.apply(hidden, weight, targets, first_code, num_codes, gather, dtype, backend)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit; they must be [N, C] and [V, C] "
            "with one C: flatten batch and positions, and give the head's weight as nn.Linear keeps it"
        )
    if hidden.numel() == 0 or weight.numel() == 0:
        raise ValueError(
            f"nothing to predict: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}; "
            "give at least one token and one code"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: shape {tuple(targets.shape)}, expected [{len(hidden)}]: one code per token")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: dtype {targets.dtype}; convert to torch.int64")


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which `F.linear` would multiply."""
    kind = hidden.device.type
    has_autocast = not hidden.is_meta  # asked of PyTorch 2.11, it could not be compiled
    if has_autocast and torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(
            f"hidden is {hidden.dtype} but weight is {weight.dtype}; convert one, or run under torch.autocast"
        )
    return hidden.dtype


# --- The operator: opaque to torch.compile, differentiated by hand --------------------------------------


@torch.library.custom_op("ibq::linear_cross_entropy", mutates_args=())
def _operator(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    backend: str,
    first_code: int = 0,
    num_codes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """nll [N], and log sum_v exp(logit_v) as the sum of two terms [2, N]: the largest logit, and what it leaves.

    The backward pass subtracts them one after the other from the logits: that is exact to the last digits where both
    are large, and one number would not be. The weight may have only the rows from `first_code` on of `num_codes`: then
    the sum is over these, and the nll right for targets among them.
    """
    if targets.is_cpu:  # here and not in the caller: the values exist, also when the caller is compiled
        low, high = (int(value) for value in targets.aminmax())
        limit = len(weight) if num_codes is None else num_codes
        if low < 0 or high >= limit:
            raise ValueError(f"targets: values {low} to {high} outside 0 to {limit - 1}; the head is too small")
    targets = targets - first_code
    with torch.autocast(hidden.device.type, enabled=False):
        if not use_triton(hidden, dtype, backend):
            return _forward(hidden.to(dtype), weight, targets)
        from ibq.ops import triton_linear_cross_entropy as kernels

        operands = (x.to(dtype).contiguous() for x in (hidden, weight))
        nll, log_sum = kernels.forward(*operands, targets.contiguous(), dot_precision=float32_products())
        return nll, torch.stack([log_sum, torch.zeros_like(log_sum)])


@_operator.register_fake
def _(hidden, weight, targets, dtype, backend, first_code=0, num_codes=None):
    return tuple(hidden.new_empty(shape, dtype=_exact(dtype)) for shape in ((len(hidden),), (2, len(hidden))))


@torch.library.custom_op("ibq::linear_cross_entropy_backward", mutates_args=())
def _backward_operator(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    grad_nll: Tensor,
    wanted: list[bool],
    dtype: torch.dtype,
    backend: str,
    first_code: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight, in their dtypes; one that is not wanted is empty.

    With rows of the weight from `first_code` on and the log sum over all codes, hidden's is the part from these rows.
    """
    targets = targets - first_code
    with torch.autocast(hidden.device.type, enabled=False):
        if not use_triton(hidden, dtype, backend):
            return _backward(hidden, weight, targets, log_sum, grad_nll, wanted, dtype)
        from ibq.ops import triton_linear_cross_entropy as kernels

        operands = (x.to(dtype).contiguous() for x in (hidden, weight))
        rest = (x.contiguous() for x in (targets, log_sum.sum(dim=0), grad_nll))
        gradients = kernels.backward(*operands, *rest, dot_precision=float32_products())
        parts = zip((hidden, weight), gradients, wanted, strict=True)
        return tuple(grad.to(like.dtype) if want else like.new_empty(0) for like, grad, want in parts)


@_backward_operator.register_fake
def _(hidden, weight, targets, log_sum, grad_nll, wanted, dtype, backend, first_code=0):
    parts = zip((hidden, weight), wanted, strict=True)
    return tuple(like.new_empty(like.shape if want else 0) for like, want in parts)


def _save(ctx, inputs, output) -> None:
    hidden, weight, targets, *ctx.settings, _ = inputs
    _, log_sum = output
    ctx.mark_non_differentiable(log_sum)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, log_sum)


def _differentiate(ctx, grad_nll, _log_sum):
    wanted = list(ctx.needs_input_grad[:2])
    if grad_nll is None:
        return (None,) * 7
    gradients = _backward_operator(*ctx.saved_tensors, grad_nll, wanted, *ctx.settings)
    hidden, weight = (grad if want else None for grad, want in zip(gradients, wanted, strict=True))
    return hidden, weight, None, None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything but the products' operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _SplitLoss(torch.autograd.Function):
    """The operator on each process's rows, and what joins them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, first_code, num_codes, gather, dtype, backend):
        own_nll, own_log_sum = _operator(hidden, weight, targets, dtype, backend, first_code, num_codes)
        parts = gather(torch.cat([own_nll[None], own_log_sum]))  # [P, 3, N]
        nll, log_sum = _join(parts[:, 0], parts[:, 1:], targets // len(weight))
        ctx.save_for_backward(hidden, weight, targets, log_sum)
        ctx.settings = (dtype, backend, first_code)
        return nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_nll):
        wanted = list(ctx.needs_input_grad[:2])
        gradients = _backward_operator(*ctx.saved_tensors, grad_nll, wanted, *ctx.settings)
        return *(grad if want else None for grad, want in zip(gradients, wanted, strict=True)), *(None,) * 6


def _join(nll: Tensor, log_sum: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """nll [N] and log sum [2, N] over all codes from those over each part [P, N], [P, 2, N].

    `owner` [N]: the part with the target. The loss is what it is there plus the share of the other parts in the sum,
    log(1 + sum_other exp(log_sum_other - log_sum_owner)): two numbers that are both small where the loss is small.
    """
    own = log_sum.gather(0, owner.expand(1, 2, -1))  # [1, 2, N]
    distance = (log_sum - own).sum(dim=1).double()  # [P, N]; the large terms cancel first
    others = distance.scatter(0, owner[None], -math.inf).logsumexp(dim=0)
    joined = nll.gather(0, owner[None])[0] + torch.logaddexp(others, torch.zeros_like(others)).to(nll.dtype)
    top = log_sum[:, 0].amax(dim=0)
    rest = ((log_sum[:, 0] - top) + log_sum[:, 1]).double().logsumexp(dim=0)
    return joined, torch.stack([top, rest.to(top.dtype)])


# --- In plain PyTorch -----------------------------------------------------------------------------------


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """nll [N] and [2, N], see `_operator`; hidden [N, C] is in the products' dtype."""
    exact = _exact(hidden.dtype)
    top = hidden.new_full((len(hidden),), -math.inf, dtype=exact)
    target_logit = hidden.new_zeros(len(hidden), dtype=exact)
    total = hidden.new_zeros(len(hidden), dtype=torch.float64)  # sum of exp(logit - top) so far
    for codes, _, rows, logits in _tiles(hidden, weight):
        place, inside = _places(targets[rows], codes)
        target_logit[rows] += torch.where(inside, logits.gather(0, place[None])[0], 0)
        new_top = torch.maximum(top[rows], logits.amax(dim=0))
        total[rows] *= (top[rows] - new_top).double().exp()
        total[rows] += logits.sub_(new_top).mul_(LOG2_E).exp2_().sum(dim=0)
        top[rows] = new_top
    log_total = total.log().to(exact)
    # The difference of the logits first: both are large where the loss is small.
    return (top - target_logit) + log_total, torch.stack([top, log_total])


def _backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    grad_nll: Tensor,
    wanted: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [N, C] and weight [V, C]: d logits = grad_nll (softmax - one-hot)."""
    wants_hidden, wants_weight = wanted
    exact = _exact(dtype)
    operand = hidden.to(dtype)
    grad_hidden = torch.zeros_like(hidden, dtype=exact) if wants_hidden else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else weight.new_empty(0)
    top, minus_log2_total = log_sum[0], log_sum[1] * -LOG2_E
    for codes, some_weight, rows, logits in _tiles(operand, weight):
        torch.add(minus_log2_total[rows], logits.sub_(top[rows]), alpha=LOG2_E, out=logits)
        gradient = logits.exp2_().mul_(grad_nll[rows])
        place, inside = _places(targets[rows], codes)
        gradient.scatter_add_(0, place[None], torch.where(inside, -grad_nll[rows], 0)[None])
        gradient = gradient.to(dtype)
        if wants_hidden:
            _add_product(grad_hidden[rows], gradient.t(), some_weight)
        if wants_weight:
            _add_product(grad_weight[codes], gradient, operand[rows])
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)


def _tiles(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, slice, Tensor]]:
    """(codes, their weight in the dtype of hidden, tokens, logits [codes, tokens]) of one tile after the other.

    All logits lie in the same memory, which may be overwritten. Slices of the vocabulary come in the outer loop: a
    slice of the weight is converted once, and its gradient stays in the cache.
    """
    num_codes, num_rows = TILES.get(hidden.device.type, GPU_TILE)
    num_codes, num_rows = min(num_codes, len(weight)), min(num_rows, len(hidden))
    product = hidden.new_empty(num_codes * num_rows)
    buffer = product if hidden.dtype == _exact(hidden.dtype) else product.new_empty(len(product), dtype=torch.float32)
    for first_code in range(0, len(weight), num_codes):
        codes = slice(first_code, min(first_code + num_codes, len(weight)))
        some_weight = weight[codes].to(hidden.dtype)
        for first_row in range(0, len(hidden), num_rows):
            rows = slice(first_row, first_row + num_rows)
            some = hidden[rows]
            shape = (len(some_weight), len(some))
            size = math.prod(shape)
            logits = torch.mm(some_weight, some.t(), out=product[:size].view(shape))
            if buffer is not product:
                logits = buffer[:size].view(shape).copy_(logits)
            yield codes, some_weight, rows, logits


def _places(targets: Tensor, codes: slice) -> tuple[Tensor, Tensor]:
    """Row of each target in a tile of these codes, and whether it lies there at all (if not, the row is any)."""
    inside = (targets >= codes.start) & (targets < codes.stop)
    return torch.where(inside, targets - codes.start, 0), inside


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a . b, with additions in the dtype of the total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b))
