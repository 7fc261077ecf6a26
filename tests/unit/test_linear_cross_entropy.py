"""Head and cross-entropy without the table of logits: against the textbook form in float64, in every way of use."""

import statistics
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ibq.ops import backend as backends
from ibq.ops import linear_cross_entropy as module
from ibq.ops.linear_cross_entropy import linear_cross_entropy

CUDA = pytest.param("cuda", marks=[
    pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
])  # fmt: skip
# N, V, C, scale of the hidden states: one token, ragged tiles, several tiles each way, large and tiny logits.
SIZES = [(1, 2, 1, 1.0), (3, 3000, 30, 3.0), (700, 2049, 37, 1.0), (513, 5001, 64, 8.0), (1100, 700, 16, 0.01)]


def textbook(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="none")


def inputs(tokens: int, codes: int, width: int, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, ...]:
    """hidden, weight, targets (every other one the likeliest code, whose loss is small) and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator) * scale
    weight = torch.randn(codes, width, generator=generator)
    targets = torch.randint(codes, (tokens,), generator=generator)
    targets[::2] = (hidden[::2] @ weight.t()).argmax(dim=1)
    return hidden, weight, targets, torch.randn(tokens, generator=generator)


def results(loss, hidden, weight, targets, upstream, dtype=None, autocast=None) -> dict[str, Tensor]:
    """nll and gradients, in float64."""
    hidden, weight = (x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in (hidden, weight))
    with torch.autocast(hidden.device.type, autocast, enabled=autocast is not None):
        nll = loss(hidden, weight, targets)
    nll.backward(upstream.to(nll.dtype))
    return {"nll": nll.detach().double(), "hidden": hidden.grad.double(), "weight": weight.grad.double()}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Distance from the exact results relative to their size."""
    return {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact}


# --- Values and gradients ---


@pytest.mark.parametrize("size", SIZES)
def test_float64_equals_the_textbook(size):
    batch = inputs(*size)
    exact, found = (results(loss, *batch, torch.float64) for loss in (textbook, linear_cross_entropy))
    for name, value in found.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_error_is_at_most_that_of_the_textbook(size, autocast):
    theirs, ours = {}, {}
    for seed in range(100 if size[0] < 10 else 1):  # few numbers may be exact by luck
        batch = inputs(*size, seed=seed)
        exact = results(textbook, *batch, torch.float64)
        for loss, found in ((textbook, theirs), (linear_cross_entropy, ours)):
            for name, error in errors(results(loss, *batch, None, autocast), exact).items():
                found.setdefault(name, []).append(error)
    for name in ours:
        assert statistics.median(ours[name]) <= 1.5 * statistics.median(theirs[name]), name


def test_coarser_products_are_noticed():
    batch = inputs(*SIZES[2])
    exact = results(textbook, *batch, torch.float64)
    theirs = errors(results(textbook, *batch), exact)
    coarse = errors(results(linear_cross_entropy, batch[0].bfloat16().float(), *batch[1:]), exact)
    assert all(error > 100 * theirs[name] for name, error in coarse.items())


def test_autocast_rounds_as_a_linear_layer_does():
    """The logits are the same bfloat16 numbers, so the losses differ only by float32 rounding."""
    batch = inputs(600, 3000, 48)
    expected, found = (results(loss, *batch, None, torch.bfloat16) for loss in (textbook, linear_cross_entropy))
    torch.testing.assert_close(found["nll"], expected["nll"], rtol=1e-5, atol=1e-5)
    exact = results(linear_cross_entropy, *batch)
    assert (exact["nll"] - found["nll"]).abs().max() > 1e-3
    for name in ("hidden", "weight"):
        bound = 2**-7 * float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=2**-7, atol=bound)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_under_autocast(hidden_dtype):
    hidden, weight, targets, _ = inputs(5, 7, 3)
    hidden, weight = hidden.to(hidden_dtype).requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        nll = linear_cross_entropy(hidden, weight, targets)
    nll.sum().backward()
    assert (nll.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, hidden_dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_precisions(dtype):
    hidden, weight, targets, _ = inputs(5, 7, 3)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    nll = linear_cross_entropy(hidden, weight, targets)
    nll.sum().backward()
    assert nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    torch.testing.assert_close(nll, textbook(hidden, weight, targets))


def test_gradcheck(monkeypatch):
    monkeypatch.setitem(module.TILES, "cpu", (4, 3))  # several ragged tiles each way
    hidden, weight, targets, _ = inputs(7, 10, 3)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight))


def test_gradcheck_would_notice_a_gradient_without_the_one_hot(monkeypatch):
    backward = module._backward

    def without(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_places", lambda targets, codes: (torch.zeros_like(targets), targets < 0))
            return backward(*arguments)

    monkeypatch.setattr(module, "_backward", without)
    hidden, weight, targets, _ = inputs(7, 10, 3)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    assert not torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight), raise_exception=False
    )


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_what_needs_no_gradient_gets_none(trained):
    hidden, weight, targets, upstream = inputs(600, 3000, 8)
    both = results(linear_cross_entropy, hidden, weight, targets, upstream)
    tensors = {"hidden": hidden, "weight": weight}
    tensors[trained].requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward(upstream)
    assert {name: x.grad is not None for name, x in tensors.items()} == {name: name == trained for name in tensors}
    torch.testing.assert_close(tensors[trained].grad.double(), both[trained])


def test_without_gradients():
    hidden, weight, targets, _ = inputs(20, 30, 4)
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), textbook(hidden, weight, targets))


def test_large_and_broken_logits():
    hidden, weight, targets, _ = inputs(4, 3000, 8, scale=1e4)
    nll = linear_cross_entropy(hidden, weight, targets)
    assert torch.isfinite(nll).all() and (nll >= 0).all() and nll[0] == 0  # its target is far above all others
    hidden[1, 0] = torch.nan
    assert linear_cross_entropy(hidden, weight, targets).isnan().tolist() == [False, True, False, False]


def test_strided_inputs():
    hidden, weight, targets, upstream = inputs(40, 30, 8)
    expected = results(textbook, hidden[::2, ::2], weight[:, ::2], targets[::2], upstream[::2])
    found = results(linear_cross_entropy, hidden[::2, ::2], weight[:, ::2], targets[::2], upstream[::2])
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


# --- Memory ---


def peak_bytes(loss, tokens: int, codes: int, width: int, autocast: bool = False) -> int:
    """The most memory that tensors of one forward and backward pass hold beside the inputs."""
    hidden, weight = torch.randn(tokens, width).requires_grad_(), torch.randn(codes, width).requires_grad_()
    targets = torch.randint(codes, (tokens,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss_value = loss(hidden, weight, targets).mean()
        loss_value.backward()
    events = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())])
    return int(held.cumsum(0).max())


@pytest.mark.parametrize("autocast", [False, True])
def test_memory_does_not_grow_with_tokens_times_codes(autocast):
    tokens, codes, width = 1024, 16_384, 16
    table = 4 * tokens * codes
    inputs_bytes = 4 * width * (tokens + codes)
    assert peak_bytes(textbook, tokens, codes, width, autocast) > 2 * table  # the measure sees what it should
    peak = peak_bytes(linear_cross_entropy, tokens, codes, width, autocast)
    assert peak < 12 * 2**20 + 3 * inputs_bytes < table / 2
    larger = peak_bytes(linear_cross_entropy, 2 * tokens, 2 * codes, width, autocast)
    assert larger - peak < 2 * inputs_bytes


# --- Ways of use ---


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 50, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(self.layer(x).sin(), self.head.weight, targets)


def head_results(head: Head, call, autocast: bool = False) -> list[Tensor]:
    head.zero_grad()
    generator = torch.Generator().manual_seed(0)
    x, targets = torch.randn(20, 8, generator=generator), torch.randint(50, (20,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nll = call(x, targets)
    (nll * nll.detach()).sum().backward()
    return [nll.detach(), *(parameter.grad for parameter in head.parameters())]


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_in_one_graph(autocast):
    head = Head()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for expected, found in zip(head_results(head, head, autocast), head_results(head, compiled, autocast), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.needs("g++")
def test_compiled_by_inductor():
    head = Head()
    compiled = torch.compile(head, fullgraph=True)
    for expected, found in zip(head_results(head, head), head_results(head, compiled), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    head = Head()

    def call(x: Tensor, targets: Tensor) -> Tensor:
        return checkpoint(head, x.requires_grad_(), targets, use_reentrant=use_reentrant)

    for expected, found in zip(head_results(head, head), head_results(head, call), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_operator_is_registered_as_torch_wants_it():
    hidden, weight, targets, _ = inputs(6, 10, 4)
    arguments = (hidden.requires_grad_(), weight.requires_grad_(), targets, torch.float32, "auto")
    torch.library.opcheck(module._operator, arguments)


def test_backward_under_autocast_changes_nothing():
    hidden, weight, targets, upstream = inputs(20, 30, 8)
    expected = results(linear_cross_entropy, hidden, weight, targets, upstream)
    nll = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        nll.backward(upstream)
    torch.testing.assert_close(hidden.grad.double(), expected["hidden"])


# --- Backends ---


class Kernels(types.ModuleType):
    """What `triton_linear_cross_entropy` promises, in plain PyTorch."""

    seen: list

    def forward(self, hidden, weight, targets, *, dot_precision):
        self.seen.append((hidden.dtype, weight.dtype, dot_precision))
        assert hidden.is_contiguous() and weight.is_contiguous() and targets.is_contiguous()
        logits = hidden.float() @ weight.float().t()
        return F.cross_entropy(logits, targets, reduction="none"), logits.logsumexp(1)

    def backward(self, hidden, weight, targets, log_sum, grad_nll, *, dot_precision):
        assert log_sum.dtype == grad_nll.dtype == torch.float32 and grad_nll.is_contiguous()
        logits = hidden.float() @ weight.float().t()
        gradient = grad_nll[:, None] * ((logits - log_sum[:, None]).exp() - F.one_hot(targets, len(weight)))
        return (gradient @ weight.float()).to(hidden.dtype), gradient.t() @ hidden.float()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_triton_kernels_are_called_as_agreed(monkeypatch, autocast):
    name = "ibq.ops.triton_linear_cross_entropy"
    kernels = Kernels(name)
    kernels.seen = []
    monkeypatch.setitem(sys.modules, name, kernels)
    monkeypatch.setattr(sys.modules["ibq.ops"], "triton_linear_cross_entropy", kernels, raising=False)
    monkeypatch.setattr(backends, "triton_is_installed", lambda: True)
    batch = inputs(20, 30, 8)

    def through_kernels(*arguments):
        return linear_cross_entropy(*arguments, backend="triton")

    expected = results(linear_cross_entropy, *batch, None, autocast)
    found = results(through_kernels, *batch, None, autocast)
    dtype = autocast or torch.float32
    assert kernels.seen == [(dtype, dtype, "ieee")]
    tolerance = 1e-5 if autocast is None else 0.1
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("device", [CUDA])
def test_backends_on_cuda(device, autocast, backend):
    batch = [tensor.to(device) for tensor in inputs(700, 5001, 64)]

    def loss(*arguments):
        return linear_cross_entropy(*arguments, backend=backend)

    exact = results(textbook, *batch, torch.float64)
    theirs, ours = (errors(results(form, *batch, None, autocast), exact) for form in (textbook, loss))
    for name, error in ours.items():
        assert error <= 1.5 * theirs[name] + 1e-7, (name, error, theirs[name])


# --- Errors ---


BAD_INPUTS = [
    (lambda h, w, t: (h[:0], w, t[:0]), r"nothing to predict: hidden \(0, 3\).*at least one token"),
    (lambda h, w, t: (h, w[:0], t), r"nothing to predict: .*weight \(0, 3\).*one code"),
    (lambda h, w, t: (h[None], w, t), r"hidden \(1, 4, 3\) .*flatten batch and positions"),
    (lambda h, w, t: (h, w.t(), t), r"weight \(3, 5\) do not fit; .*\[V, C\]"),
    (lambda h, w, t: (h, w, t[:2]), r"targets: shape \(2,\), expected \[4\]: one code per token"),
    (lambda h, w, t: (h, w, t.int()), r"targets: dtype torch.int32; convert to torch.int64"),
    (lambda h, w, t: (h, w, t + 5), r"targets: values \d to \d outside 0 to 4"),
    (lambda h, w, t: (h, w, t - 5), r"targets: values -\d to -\d outside 0 to 4"),
    (lambda h, w, t: (h.double(), w, t), r"hidden is torch.float64 but weight is torch.float32; convert one"),
    (lambda h, w, t: (h.long(), w.long(), t), r"hidden is torch.int64.*convert"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_INPUTS)
def test_bad_input(spoil, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*spoil(*inputs(4, 5, 3)[:3]))


def test_bad_backends(monkeypatch):
    hidden, weight, targets, _ = inputs(4, 5, 3)
    with pytest.raises(ValueError, match="backend: 'fast' is unknown; use auto"):
        linear_cross_entropy(hidden, weight, targets, backend="fast")
    monkeypatch.setattr(backends, "triton_is_installed", lambda: True)
    with pytest.raises(ValueError, match=r"backend: triton takes .* not torch.float64; use"):
        linear_cross_entropy(hidden.double(), weight.double(), targets, backend="triton")
    monkeypatch.setattr(backends, "triton_is_installed", lambda: False)
    with pytest.raises(ValueError, match="backend: triton is not installed; pip install triton"):
        linear_cross_entropy(hidden, weight, targets, backend="triton")


def test_shapes_are_known_without_values():
    hidden, weight = torch.empty(4, 3, device="meta"), torch.empty(5, 3, device="meta")
    targets = torch.empty(4, dtype=torch.int64, device="meta")
    nll = linear_cross_entropy(hidden, weight, targets)
    assert nll.shape == (4,) and nll.dtype == torch.float32
