"""The Triton kernels against float64: in Triton's interpreter on the CPU, and on a GPU where there is one.

The interpreter is a mode of the whole process, chosen before triton is imported. So a plain run of this file starts
one more pytest on it, in that mode; tests below `DEVICES` run there on the CPU, and here on a GPU.
"""

import copy
import functools
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.frequencies import check_frequencies
from support.models import small_transformer
from torch import Tensor
from torch.nn import functional as F

from ibq.decoding import Decoder
from ibq.editing import Edit
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer_blocks import Attention, RMSNorm, rotary_table
from ibq.models.vqgan import ResBlock
from ibq.noise import uniforms
from ibq.ops import textbook
from ibq.ops.index_backprop import index_backprop
from ibq.sampler import SamplerConfig
from ibq.sampling import Drawing, pick, sample_codes, settled_for

pytest.importorskip("triton", reason="triton is installed with the CUDA builds of torch only")
from ibq.ops import (
    triton_common,
    triton_decode_step,
    triton_draw,
    triton_group_norm_silu,
    triton_index_backprop,
    triton_linear_cross_entropy,
)
from ibq.ops.group_norm_silu import group_norm_silu, res_block

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
DEVICES = ["cpu"] if INTERPRETED else [CUDA]
# The interpreter computes with numpy, which warns of the NaN and of the unused numbers that a GPU passes over.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EPSILON = torch.finfo(torch.float32).eps
# Float32 products by the kernels, and by PyTorch into tables that they read.
FLOAT32 = pytest.mark.parametrize("products", ["ieee", "torch"])


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
def test_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(Path(__file__).resolve())],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.fixture(scope="module", autouse=True)
def quick_interpreter():
    """Every call of a function from a kernel looks through all of Triton's language for what to patch: do that once."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtin(package, *rest):
        for name in builtins(package):
            if tl.core.is_builtin(member := getattr(package, name)):  # or it is patched already
                interpreter._patch_attr(package, name, member, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        yield


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch):
    """Triton 3.8's interpreter keeps bfloat16 as 16-bit integers and multiplies those as they are: widen them first."""
    if INTERPRETED:
        import numpy
        import triton.language as tl
        from triton.runtime import interpreter

        def widened(operand):
            if operand.dtype.scalar != tl.bfloat16:
                return operand
            bits = operand.data.astype(numpy.uint32) << 16
            return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)

        plain = interpreter.InterpreterBuilder.create_dot
        monkeypatch.setattr(
            interpreter.InterpreterBuilder,
            "create_dot",
            lambda self, a, b, *rest: plain(self, widened(a), widened(b), *rest),
        )


def random_case(tokens: int, codes: int, width: int, *, scale: float, device: str) -> SimpleNamespace:
    """Inputs and upstream gradients, in float32; logits have a standard deviation of about `scale`."""
    generator = torch.Generator().manual_seed(tokens + codes + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return SimpleNamespace(
        tokens=normal(tokens, width) * (scale / width**0.5),
        codebook=normal(codes, width),
        grad_latents=normal(tokens, width),
        grad_sample_entropy=normal(tokens),
        grad_usage=normal(codes),
    )


def written_out(case: SimpleNamespace, dtype: torch.dtype, temperature: float, selection_temperature: float) -> dict:
    """Statistics and gradients from the formulas of `textbook.index_backprop`, with autograd, in `dtype`."""
    tokens = case.tokens.to(dtype).requires_grad_()
    codebook = case.codebook.to(dtype).requires_grad_()
    logits = torch.einsum("nd,kd->nk", tokens, codebook)
    below = logits.detach() - logits.detach().amax(dim=1, keepdim=True)
    selection = (logits / selection_temperature).softmax(dim=1)
    soft, log_soft = (logits / temperature).softmax(dim=1), (logits / temperature).log_softmax(dim=1)
    sample_entropy, usage = -(soft * log_soft).sum(dim=1), soft.mean(dim=0)
    latents = selection @ codebook.detach()  # the soft path of the one-hot alone
    entropies = (sample_entropy * case.grad_sample_entropy.to(dtype)).sum() + (usage * case.grad_usage.to(dtype)).sum()
    of_entropies = torch.autograd.grad(entropies, (tokens, codebook), retain_graph=True)
    everything = entropies + (latents * case.grad_latents.to(dtype)).sum()
    *gradients, grad_logits = torch.autograd.grad(everything, (tokens, codebook, logits))
    return {
        "top": logits.amax(dim=1).detach(),
        "log_sum_selection": (below / selection_temperature).logsumexp(dim=1),
        "log_sum_entropy": (below / temperature).logsumexp(dim=1),
        "sample_entropy": sample_entropy.detach(),
        "usage": usage.detach(),
        "grad_tokens": gradients[0],
        "grad_codebook": gradients[1],
        "entropies_grad_tokens": of_entropies[0],
        "entropies_grad_codebook": of_entropies[1],
        "grad_logits": grad_logits,
        "largest_logit": logits.detach().abs().max(),
    }


def by_kernels(case: SimpleNamespace, temperature: float, selection_temperature: float, dot_precision: str) -> dict:
    """The same from the Triton kernels, and the codes."""
    options = {
        "temperature": temperature,
        "selection_temperature": selection_temperature,
        "dot_precision": dot_precision,
    }
    statistics = triton_index_backprop.forward(case.tokens, case.codebook, **options)
    results = statistics._asdict()
    for prefix, grad_latents in (("", case.grad_latents), ("entropies_", None)):
        results[f"{prefix}grad_tokens"], results[f"{prefix}grad_codebook"] = triton_index_backprop.backward(
            case.tokens, case.codebook, statistics, grad_latents, case.grad_sample_entropy, case.grad_usage, **options
        )
    return results


@pytest.mark.parametrize("device", DEVICES)
def test_through_the_public_function(device: str):
    """The operator on these kernels: every gradient of every output, also where some have none."""
    case = random_case(37, 90, 12, scale=4.0, device=device)
    found, expected = [], []
    for form, dtype, options, results in (
        (index_backprop, torch.float32, {"backend": "triton"}, found),
        (textbook.index_backprop, torch.float64, {}, expected),
    ):
        tokens, codebook = (x.to(dtype).requires_grad_() for x in (case.tokens, case.codebook))
        out = form(tokens, codebook, beta=0.25, temperature=0.1, selection_temperature=0.5, **options)
        latents = (out.latents * case.grad_latents.to(dtype)).sum()
        for scalar in (
            latents,
            out.sample_entropy,
            out.batch_entropy,
            out.quantization_loss,
            latents + out.batch_entropy,
        ):
            results += torch.autograd.grad(scalar, (tokens, codebook), retain_graph=True)
        results += [scalar.detach(), out.codes]
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), exact.double(), rtol=1e-4, atol=1e-5)


def check_errors(results: dict, plain: dict, exact: dict, floor: float = 8 * EPSILON) -> None:
    """Each result's largest error is at most 1.5 times that of plain float32 plus `floor` times its largest value.

    The default floor is a few roundings: plain float32 may be exact by chance where there are few numbers.
    """
    for name in results.keys() & exact.keys():
        expected = exact[name]
        error = (results[name].double() - expected).abs().max()
        allowed = 1.5 * (plain[name].double() - expected).abs().max() + floor * expected.abs().max()
        assert error <= allowed, f"{name}: error {error:.3e} above {allowed:.3e}"  # also catches NaN


def logit_floor(exact: dict, temperature: float) -> float:
    """A logit's own rounding to float32 moves exp(l / temperature) by this fraction, whoever adds it up.

    Where one code of one token makes up the largest value, plain float32 may have rounded that logit well by luck.
    """
    return EPSILON * float(exact["largest_logit"]) / temperature


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize(
    "tokens, codes, width", [(1, 17, 4), (37, 1000, 16), (130, 300, 48), (130, 17, 256), (37, 100, 30)]
)
@FLOAT32
def test_index_backprop(products, tokens, codes, width, temperature, device):
    case = random_case(tokens, codes, width, scale=3.0, device=device)
    exact = written_out(case, torch.float64, temperature, 1.0)
    results = by_kernels(case, temperature, 1.0, products)
    assert torch.equal(results["codes"], (case.tokens.double() @ case.codebook.double().t()).argmax(dim=1))
    # Libraries add up in an order of their own, on GPUs and by kind of CPU, so that the comparison is partly luck.
    floor = 8 * EPSILON + logit_floor(exact, temperature)
    check_errors(results, written_out(case, torch.float32, temperature, 1.0), exact, floor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature, selection_temperature", [(0.01, 1.0), (1.0, 0.1)])
@FLOAT32
def test_index_backprop_of_large_logits(products, temperature, selection_temperature, device):
    """exp(l / temperature) would overflow float32 by thousands of orders of magnitude."""
    case = random_case(20, 200, 32, scale=30.0, device=device)
    exact = written_out(case, torch.float64, temperature, selection_temperature)
    plain = written_out(case, torch.float32, temperature, selection_temperature)
    floor = logit_floor(exact, min(temperature, selection_temperature))
    check_errors(by_kernels(case, temperature, selection_temperature, products), plain, exact, floor)


def use_small_workspaces(monkeypatch) -> None:
    """Chunks of 256 x 256, full of NaN at first: what the kernels leave unwritten must not matter."""
    monkeypatch.setattr(triton_common, "WORKSPACE_ROWS", 256)
    monkeypatch.setattr(triton_common, "WORKSPACE_BYTES", 1)
    plain = triton_common.workspace
    for module in (triton_index_backprop, triton_linear_cross_entropy):
        monkeypatch.setattr(module, "workspace", lambda *arguments: plain(*arguments).fill_(float("nan")))
    assert triton_common.workspace(300, 600, torch.float32, torch.device("cpu")).shape == (256, 256)


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_of_the_workspace(device, monkeypatch):
    """Gradients do not depend on how tokens and codes are cut into chunks, beyond rounding."""
    case = random_case(260, 300, 8, scale=3.0, device=device)
    whole = by_kernels(case, 1.0, 1.0, "ieee")
    use_small_workspaces(monkeypatch)
    chunked = by_kernels(case, 1.0, 1.0, "ieee")
    for name in ("grad_tokens", "grad_codebook", "entropies_grad_tokens", "entropies_grad_codebook"):
        torch.testing.assert_close(chunked[name], whole[name], rtol=0, atol=8 * EPSILON * whole[name].abs().max())


@pytest.mark.parametrize("device", DEVICES)
def test_strips_of_tables(device, monkeypatch):
    """Nor on how tokens are cut into strips, the last of them a short one."""
    case = random_case(70, 300, 8, scale=3.0, device=device)
    whole = by_kernels(case, 1.0, 1.0, "torch")
    monkeypatch.setattr(triton_index_backprop, "TABLE_BYTES", 1)
    assert [len(logits) for _, (logits,) in triton_index_backprop._tables(case.tokens, case.codebook, 1)][-2:] == [
        16,
        6,
    ]
    for name, value in by_kernels(case, 1.0, 1.0, "torch").items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=8 * EPSILON * whole[name].abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
@FLOAT32
def test_lowest_code_wins_a_tie(products, device):
    """Within a tile, across tiles, and across splits of the codes."""
    tokens = torch.ones(3, 8, device=device)
    codebook = torch.zeros(1000, 8, device=device)
    options = {"temperature": 1.0, "selection_temperature": 1.0, "dot_precision": products}
    uniform = triton_index_backprop.forward(tokens, codebook, **options)
    assert uniform.codes.tolist() == [0, 0, 0]
    torch.testing.assert_close(uniform.sample_entropy, torch.full_like(uniform.top, 1000.0).log())
    torch.testing.assert_close(uniform.usage, torch.full_like(uniform.usage, 1e-3))
    for ties in ([5, 9, 999], [70, 999], [500, 640, 999]):
        codebook.zero_()[ties] = 1.0
        assert triton_index_backprop.forward(tokens, codebook, **options).codes.tolist() == [ties[0]] * 3


@pytest.mark.parametrize("device", DEVICES)
@FLOAT32
def test_nan_gives_valid_codes(products, device):
    """A diverged run must end with an error about its loss, not with an index out of bounds inside a kernel."""
    case = random_case(5, 300, 8, scale=1.0, device=device)
    case.tokens[2] = float("nan")
    options = {"temperature": 1.0, "selection_temperature": 1.0, "dot_precision": products}
    statistics = triton_index_backprop.forward(case.tokens, case.codebook, **options)
    assert statistics.codes.min() >= 0 and statistics.codes.max() < 300
    assert statistics.sample_entropy.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("device", DEVICES)
@FLOAT32
def test_as_the_textbook(products, device):
    """Hard and soft path together, and both entropies, as `textbook.index_backprop` has them."""
    case = random_case(37, 100, 16, scale=3.0, device=device)
    inputs = case.tokens.double().requires_grad_(), case.codebook.double().requires_grad_()
    exact = textbook.index_backprop(*inputs, beta=0.25, temperature=0.5)
    loss = (exact.latents * case.grad_latents).sum() + exact.sample_entropy - exact.batch_entropy
    expected = torch.autograd.grad(loss, inputs)

    options = {"temperature": 0.5, "selection_temperature": 1.0, "dot_precision": products}
    statistics = triton_index_backprop.forward(case.tokens, case.codebook, **options)
    usage = statistics.usage
    grad_usage = (usage + 1e-5).log() + usage / (usage + 1e-5)
    grad_tokens, grad_codebook = triton_index_backprop.backward(
        case.tokens, case.codebook, statistics, case.grad_latents,
        torch.full((), 1 / 37, device=device).expand(37), grad_usage, **options,
    )  # fmt: skip
    grad_codebook.index_add_(0, statistics.codes, case.grad_latents)
    assert torch.equal(statistics.codes, exact.codes)
    torch.testing.assert_close(statistics.sample_entropy.mean().double(), exact.sample_entropy)
    torch.testing.assert_close(grad_tokens.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_codebook.double(), expected[1], rtol=1e-5, atol=1e-5)


def rounded(case: SimpleNamespace, names: tuple[str, ...]) -> SimpleNamespace:
    """The case with some tensors rounded to bfloat16, kept as float32."""
    return SimpleNamespace(**vars(case) | {name: getattr(case, name).bfloat16().float() for name in names})


def check_bfloat16_gradient(gradient: Tensor, expected: Tensor, left: Tensor, right: Tensor) -> None:
    """Of `left . right` in bfloat16 with exact `right`: `left` and perhaps the result are each rounded by up to 2^-8.

    The interpreter cuts off `left` instead of rounding it, which costs up to 2^-7.
    """
    bound = 1.01 * (2**-8 + (2**-7 if INTERPRETED else 2**-8)) * (left.abs() @ right.double().abs())
    assert ((gradient.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
def test_index_backprop_in_bfloat16(device):
    """Operands are rounded, sums are not: on rounded operands the statistics are as exact as in float32."""
    case = rounded(random_case(37, 300, 48, scale=3.0, device=device), ("tokens", "codebook", "grad_latents"))
    exact = written_out(case, torch.float64, 1.0, 1.0)
    results = by_kernels(case, 1.0, 1.0, "bfloat16")
    gradients = {name: results.pop(name) for name in list(results) if "grad" in name}
    check_errors(results, written_out(case, torch.float32, 1.0, 1.0), exact)
    grad_logits = exact["grad_logits"]
    check_bfloat16_gradient(gradients["grad_tokens"], exact["grad_tokens"], grad_logits, case.codebook)
    check_bfloat16_gradient(gradients["grad_codebook"], exact["grad_codebook"], grad_logits.t(), case.tokens)


def head_case(tokens: int, codes: int, width: int, dtype: torch.dtype, scale: float, device: str) -> SimpleNamespace:
    """Inputs of the head, and an upstream gradient; logits have a standard deviation of about `scale`."""
    generator = torch.Generator().manual_seed(tokens + codes + width)
    return SimpleNamespace(
        hidden=(torch.randn(tokens, width, generator=generator) * scale / width**0.5).to(device, dtype),
        weight=torch.randn(codes, width, generator=generator).to(device, dtype),
        targets=torch.randint(codes, (tokens,), generator=generator).to(device),
        grad_nll=torch.randn(tokens, generator=generator).to(device),
    )


def head_written_out(case: SimpleNamespace, dtype: torch.dtype) -> dict:
    hidden, weight = case.hidden.to(dtype).requires_grad_(), case.weight.to(dtype).requires_grad_()
    logits = hidden @ weight.t()
    nll = F.cross_entropy(logits, case.targets, reduction="none")
    gradients = torch.autograd.grad((nll * case.grad_nll.to(dtype)).sum(), (hidden, weight, logits))
    return {
        "nll": nll.detach(),
        "log_sum": logits.logsumexp(dim=1).detach(),
        "grad_hidden": gradients[0],
        "grad_weight": gradients[1],
        "grad_logits": gradients[2],
        "largest_logit": logits.detach().abs().max(),
    }


def head_by_kernels(case: SimpleNamespace, dot_precision: str) -> dict:
    nll, log_sum = triton_linear_cross_entropy.forward(
        case.hidden, case.weight, case.targets, dot_precision=dot_precision
    )
    grad_hidden, grad_weight = triton_linear_cross_entropy.backward(
        case.hidden, case.weight, case.targets, log_sum, case.grad_nll, dot_precision=dot_precision
    )
    assert grad_hidden.dtype == case.hidden.dtype and grad_weight.dtype == torch.float32
    return {"nll": nll, "log_sum": log_sum, "grad_hidden": grad_hidden, "grad_weight": grad_weight}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "tokens, codes, width, scale", [(1, 17, 4, 1.0), (37, 1000, 40, 3.0), (130, 300, 192, 1.0), (20, 200, 32, 100.0)]
)
def test_linear_cross_entropy(tokens, codes, width, scale, device):
    case = head_case(tokens, codes, width, torch.float32, scale, device)
    exact, plain = head_written_out(case, torch.float64), head_written_out(case, torch.float32)
    check_errors(head_by_kernels(case, "ieee"), plain, exact, 8 * EPSILON + logit_floor(exact, 1.0))


@pytest.mark.parametrize("device", DEVICES)
def test_linear_cross_entropy_in_bfloat16(device):
    case = head_case(37, 300, 48, torch.bfloat16, 3.0, device)
    exact, plain = head_written_out(case, torch.float64), head_written_out(case, torch.float32)
    results = head_by_kernels(case, "ieee")
    check_errors({name: results[name] for name in ("nll", "log_sum")}, plain, exact)
    grad_logits = exact["grad_logits"]
    check_bfloat16_gradient(results["grad_hidden"], exact["grad_hidden"], grad_logits, case.weight)
    check_bfloat16_gradient(results["grad_weight"], exact["grad_weight"], grad_logits.t(), case.hidden)


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_of_the_head(device, monkeypatch):
    case = head_case(260, 300, 8, torch.float32, 3.0, device)
    whole = head_by_kernels(case, "ieee")
    use_small_workspaces(monkeypatch)
    for name, chunked in head_by_kernels(case, "ieee").items():
        torch.testing.assert_close(chunked, whole[name], rtol=0, atol=8 * EPSILON * whole[name].abs().max())


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dot_precision, tolerance", [("tf32x3", 1e-5), ("tf32", 2e-2), ("bfloat16", 1e-1)])
def test_tensor_cores(dot_precision, tolerance, device):
    """The interpreter multiplies in float32 whatever the precision, so these need a GPU. Sizes that fill one."""
    case = random_case(5000, 4096, 256, scale=3.0, device=device)
    exact = written_out(case, torch.float64, 1.0, 1.0)
    results = by_kernels(case, 1.0, 1.0, dot_precision)
    for name in results.keys() & exact.keys():
        error = (results[name].double() - exact[name]).norm() / exact[name].norm()
        assert error <= tolerance, f"{name}: {error:.2e}"
    head = head_case(5000, 4096, 320, torch.bfloat16 if dot_precision == "bfloat16" else torch.float32, 3.0, device)
    exact = head_written_out(head, torch.float64)
    for name, result in head_by_kernels(head, dot_precision).items():
        error = (result.double() - exact[name]).norm() / exact[name].norm()
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dot_precision", ["ieee", "torch", "tf32x3", "tf32", "bfloat16"])
@pytest.mark.parametrize("tokens", [64, 5000])  # with and without splits of the codes
def test_same_bits_again(tokens, dot_precision, device):
    case = random_case(tokens, 3000, 100, scale=3.0, device=device)
    first, second = (by_kernels(case, 0.01, 1.0, dot_precision) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(
    ("products", "limit"),
    [("ieee", 1.25 * triton_common.WORKSPACE_BYTES), ("torch", 2.1 * triton_index_backprop.TABLE_BYTES)],
)
def test_memory(products, limit, device):
    """Beside inputs and results there is one workspace, or two tables of some tokens; that of all logits has 1 GiB."""
    case = random_case(4096, 65536, 64, scale=3.0, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    by_kernels(case, 1.0, 1.0, products)
    results = 4 * (case.tokens.nbytes + case.codebook.nbytes)
    assert torch.cuda.max_memory_allocated() - before < limit + results


# --- Group normalization and SiLU ----------------------------------------------------------------

IMAGES = [(2, 32, 7, 5, 8), (1, 24, 3, 4, 3), (3, 128, 16, 9, 32), (2, 8, 1, 1, 2), (1, 300, 5, 6, 10)]


def normalized(shape: tuple, dtype: torch.dtype, device: str) -> dict:
    """What the kernels give and what float64 gives, for images that are far from normalized."""
    batch, channels, height, width, groups = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(batch, channels, height, width, generator=generator) * 2 + 3
    grad = torch.randn(x.shape, generator=generator)
    weight, bias = torch.randn(2, channels, generator=generator)
    x, grad = (part.to(device, dtype).contiguous(memory_format=torch.channels_last) for part in (x, grad))
    weight, bias = weight.to(device), bias.to(device)
    out, found = triton_group_norm_silu.forward(x, weight, bias, groups, 1e-6)
    gradients = triton_group_norm_silu.backward(grad, x, weight, groups, found)[:3]
    exact = [part.double().requires_grad_() for part in (x, weight, bias)]
    expected = F.silu(F.group_norm(exact[0], groups, *exact[1:], eps=1e-6))
    expected.backward(grad.double())
    return {
        "out": (out, expected.detach()),
        **{name: (own, part.grad) for name, own, part in zip(("x", "weight", "bias"), gradients, exact, strict=True)},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("device", DEVICES)
def test_group_norm_and_silu(device: str, shape: tuple, dtype: torch.dtype):
    for name, (found, expected) in normalized(shape, dtype, device).items():
        rounding = 2**-7 if INTERPRETED else 2**-8  # the interpreter cuts digits off
        tolerance = 2e-5 if dtype == torch.float32 or name in ("weight", "bias") else rounding
        error = float((found.double() - expected).norm() / expected.norm().clamp(min=1e-3))
        assert error < tolerance, (name, error)
        if found.dim() == 4:
            assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("part", ["slope", "offset"])
@pytest.mark.parametrize("device", DEVICES)
def test_group_norms_comparison_sees_a_missing_part(device: str, part: str, monkeypatch):
    plain = triton_group_norm_silu.values

    def without(x, found, grad=None, slope=None, offset=None, shortcut=None):
        parts = {"slope": slope, "offset": offset}
        if grad is not None:
            parts[part] = torch.zeros_like(parts[part])
        return plain(x, found, grad, **parts, shortcut=shortcut)

    monkeypatch.setattr(triton_group_norm_silu, "values", without)
    found, expected = normalized(IMAGES[2], torch.float32, device)["x"]
    assert float((found - expected).norm() / expected.norm()) > 1e-4


def block_of(channels: int, out_channels: int, device: str) -> ResBlock:
    """A ResBlock with numbers that are not small, biases and the norms' weights included."""
    config = TokenizerConfig(resolution=8, channels=8, channel_multipliers=(1, 1), norm_groups=4)
    block = ResBlock(channels, out_channels, config)
    generator = torch.Generator().manual_seed(channels + out_channels)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.dim() == 4 else 1.0))
    return block.to(device, memory_format=torch.channels_last)


def by_operator(block: ResBlock, x: Tensor) -> Tensor:
    shortcut = None if block.nin_shortcut is None else block._shortcut(x)
    return res_block(x, shortcut, (block.norm1, block.norm2), (block.conv1, block.conv2))


def gradients_of(form: Callable, block: ResBlock, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    out = form(block, x)
    inputs = {"x": x, **dict(block.named_parameters())}
    return {"out": out.detach()} | dict(zip(inputs, torch.autograd.grad(out, [*inputs.values()], grad), strict=True))


@pytest.mark.parametrize("channels, out_channels", [(8, 8), (8, 24)])
@pytest.mark.parametrize("device", DEVICES)
def test_res_block(device, channels, out_channels):
    """The operator against the layers in float64: result and every gradient."""
    block = block_of(channels, out_channels, device)
    x = (torch.randn(2, channels, 6, 5) * 2 + 1).to(device).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, out_channels, 6, 5).to(device).contiguous(memory_format=torch.channels_last)
    check_res_block(block, x, grad)


def check_res_block(block: ResBlock, x: Tensor, grad: Tensor) -> None:
    with torch.backends.cudnn.flags(allow_tf32=False):  # PyTorch's default for convolutions is tf32
        found = gradients_of(by_operator, block, x, grad)
    exact = gradients_of(lambda block, x: block(x), copy.deepcopy(block).double(), x.double(), grad.double())
    for name, expected in exact.items():
        error = float((found[name] - expected).norm() / expected.norm())
        assert found[name].dtype == torch.float32 and error < 2e-5, (name, error)


@pytest.mark.parametrize("out_channels", [8, 24])
@pytest.mark.parametrize("device", DEVICES)
def test_convolutions_that_give_channels_first(device, out_channels):
    """As to one image [H, W, C] seen as [1, C, H, W], which is channels last but for a stride that is not used."""
    block = block_of(8, out_channels, device).to(memory_format=torch.contiguous_format)
    x = (torch.randn(6, 5, 8) * 2 + 1).to(device).permute(2, 0, 1)[None]
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert device == "cuda" or block.conv1(x).is_contiguous()
    check_res_block(block, x, torch.randn(1, out_channels, 6, 5, device=device))


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", [(False, False), (True, False), (True, True)])
def test_res_block_is_one_operator_on_cuda(recompute):
    """Under autocast, as near to float64 as the layers themselves, and without a gradient of what is frozen."""
    block = block_of(32, 32, "cuda").train()
    block.recompute, block.selective = recompute
    x, grad = (torch.randn(4, 32, 33, 40, device="cuda") for _ in range(2))
    x, grad = (part.bfloat16().contiguous(memory_format=torch.channels_last) for part in (x, grad))

    def run(block: ResBlock, x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return block(x)

    assert block._fuses(x)
    found = gradients_of(run, block, x, grad)
    exact = gradients_of(lambda block, x: block(x), copy.deepcopy(block).double(), x.double(), grad.double())
    for name, expected in exact.items():
        assert float((found[name] - expected).norm() / expected.norm()) < 2e-2, name
    block.conv1.weight.requires_grad_(False)
    run(block, x.requires_grad_()).backward(grad)
    assert block.conv1.weight.grad is None and block.conv2.weight.grad is not None


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
def test_group_norm_and_silu_in_a_network():
    """Through the public function: under autocast, and the same twice."""
    norm = torch.nn.GroupNorm(32, 128, eps=1e-6).cuda()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 128, 33, 40, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
    results = []
    for own in (x, x, x.contiguous()):
        own = own.detach().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            out = group_norm_silu(own, norm)
        out.float().square().mean().backward()
        results.append((out.detach().float(), own.grad.float(), norm.weight.grad.clone(), norm.bias.grad.clone()))
        norm.zero_grad()
    fused, again, native = results
    for one, other, plain in zip(fused, again, native, strict=True):
        assert torch.equal(one, other)
        assert float((one - plain).norm() / plain.norm()) < 1e-2


# --- A step of decoding ---

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "updated"), [(64, True), (200, True), (1920, False)])
def test_residual_norm(width, updated, dtype, device):
    x, update = (normal(3, width, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    modulation, norm = normal(3, 6, width, dtype=dtype, device=device, seed=2), RMSNorm(width).to(device)
    torch.nn.init.normal_(norm.weight)
    gate, scale, shift = modulation[:, 0], modulation[:, 2], modulation[:, 4]
    wanted = norm.after(x, *((update, gate) if updated else (None, None)), scale, shift, fused=False)
    found = norm.after(x, *((update, gate) if updated else (None, None)), scale, shift, fused=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 16), (4, 2, 32)])
def test_attention_of_a_new_position(heads, kv_heads, head_dim, dtype, device, monkeypatch):
    """Position after position over a cache of several tiles; the kernels' has nothing in it but NaN before."""
    side = 6
    monkeypatch.setattr(triton_decode_step, "TILE_BYTES", 1024)
    assert triton_decode_step.tile(head_dim, dtype)["SLOTS"] < side**2
    attention = Attention(heads * head_dim, heads, kv_heads, 0.0)
    table = rotary_table((side, side), head_dim, 10_000.0).to(device, torch.complex64)
    shape = (2, kv_heads, side**2, head_dim)
    plain, fused = ([torch.full(shape, old, dtype=dtype, device=device) for _ in range(2)] for old in (0.0, torch.nan))
    qkv = normal(side**2, 2, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad():
        for position, new in enumerate(qkv):
            wanted = attention._attend(new, table[position : position + 1], *plain, position)
            alone = triton_decode_step.attend(new[1:], table, *(cached[1:].clone() for cached in fused), counter)
            found = triton_decode_step.attend(new, table, *fused, counter)
            torch.testing.assert_close(found, wanted.to(dtype), **TOLERANCE[dtype])
            assert torch.equal(alone[0], found[1]), "a row depends on its company"
            counter += 1
    pairs = fused[0].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # back to their own order
    torch.testing.assert_close(pairs, plain[0])
    assert torch.equal(fused[1], plain[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype, device):
    x = normal(3, 2 * 1300, dtype=dtype, device=device)
    gate, up = x.float().chunk(2, dim=-1)
    torch.testing.assert_close(triton_decode_step.swiglu(x), (F.silu(gate) * up).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "copies"), [(64, 2), (200, 1)])
def test_embedding_of_a_code_and_the_next_position(width, copies, dtype, device):
    table, targets = (normal(7, width, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    codes, position = torch.tensor([6, 0, 3], device=device), torch.tensor([4], device=device)
    out = torch.full((copies, 3, width), torch.nan, dtype=dtype, device=device)
    triton_decode_step.embed(codes, table, targets, position, out)
    torch.testing.assert_close(out, (table[codes] + targets[5]).expand_as(out), **TOLERANCE[dtype])


def drawn(logits: Tensor, numbers: Tensor, guided: bool, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Codes [n] of the same logits [V] with n numbers: the kernels', and those of `pick`.

    Guided, the logits are made of two halves that take other values, by a scale of 2.
    """
    scales = torch.tensor([9.0, 2.0], device=logits.device) if guided else None
    rows = logits.expand(len(numbers), -1)
    halves = torch.cat([rows - 1, rows - 2]) if guided else rows.contiguous()
    both = torch.stack([torch.rand_like(numbers), numbers], dim=1)
    position = torch.tensor([1], device=logits.device)
    found = triton_draw.draw(halves, scales, both, position, temperature)
    plain = halves.float()
    if guided:
        plain = plain[len(rows) :] + 2.0 * (plain[: len(rows)] - plain[len(rows) :])
    return found, pick(plain / temperature, numbers[:, None])[:, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guided", [False, True])
def test_a_draw_is_that_of_pick(guided, dtype, device, monkeypatch):
    """Numbers in the middle of a code's share, where no rounding decides; the first part and others cannot be drawn."""
    monkeypatch.setattr(triton_draw, "PART", 64)
    logits = (normal(300, dtype=torch.float32, device=device) * 24).round().to(dtype) / 8  # halves of it are exact
    logits[:70] = logits[100:200:3] = -50.0 if guided else -torch.inf  # inf - inf would be NaN
    shares = (logits.double() / 0.9).softmax(-1)
    codes = (shares > 1e-5).nonzero()[::4, 0]
    found, expected = drawn(logits, (shares.cumsum(-1) - shares / 2)[codes], guided, temperature=0.9)
    assert torch.equal(found, codes) and torch.equal(expected, codes) and len(codes) > 30


@pytest.mark.parametrize("device", DEVICES)
def test_a_draw_of_unlikely_codes(device, monkeypatch):
    """Codes of 1e-8 each behind one of 1: sums in float32 would pass over nine of ten."""
    monkeypatch.setattr(triton_draw, "PART", 1024)
    logits = torch.full((5001,), math.log(1e-8), device=device)
    logits[0] = 0.0
    codes = torch.arange(1, 5001, 199, device=device)
    numbers = (1 + 1e-8 * (codes.double() - 0.5)) / (1 + 5000e-8)
    assert torch.equal(drawn(logits, numbers, False)[0], codes)


@pytest.mark.parametrize("device", DEVICES)
def test_the_edges_of_a_draw(device, monkeypatch):
    """Numbers next to 0 and 1 where the ends cannot be drawn; and logits of which nothing can be drawn."""
    monkeypatch.setattr(triton_draw, "PART", 8)
    edges = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64, device=device)
    logits = torch.full((30,), -torch.inf, device=device)
    logits[10], logits[21] = 0.0, 1.0
    assert drawn(logits, edges, False)[0].tolist() == [10, 21]
    for bad in (torch.nan, torch.inf):
        logits[12] = bad
        assert drawn(logits, edges, False)[0].tolist() == [29, 29]
    assert drawn(torch.full_like(logits, -torch.inf), edges, False)[0].tolist() == [29, 29]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("codes", [16_384, 262_144])
def test_two_million_draws_of_the_kernels(codes, device):
    logits = normal(codes, dtype=torch.float32, device=device) * 3
    numbers, rows = uniforms(range(500), 4000, device), logits.expand(500, -1).contiguous()
    places = torch.arange(4000, device=device).split(1)
    found = torch.stack([triton_draw.draw(rows, None, numbers, place, 1.0) for place in places])
    check_frequencies(found.cpu(), logits.cpu())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0, "top_p": 0.9}, {"grid": (2, 4)}])
@pytest.mark.parametrize(
    "model",
    [{"tokens_per_side": 3, "kv_heads": 2}, {"grids": [(2, 4), (3, 3)], "order": "random", "heads": 2, "kv_heads": 1}],
)
def test_images_of_the_kernels_are_those_of_the_plain_step(model, settings, device):
    """In float32; on a GPU as a graph, whose codes are those of the same kernels launched one by one."""
    transformer = small_transformer(vocab_size=64, **model).to(device)
    config = SamplerConfig(rows_per_block=2, precision="fp32", **settings)
    plain, fused = (Decoder(transformer, "fp32", config.rows) for _ in range(2))
    plain.fused, fused.fused = False, True
    fused.drawing = Drawing(fused, settled_for(fused, config), graph=None if device == "cuda" else NoGraph)
    request = [1, 2, 3], [5, 6, 7]
    assert torch.equal(sample_codes(fused, *request, config), sample_codes(plain, *request, config))
    if "order" in model and not settings:
        edit = Edit(codes=torch.arange(8).view(2, 4), keep=torch.arange(8).view(2, 4) % 3 == 0)
        drawn = [sample_codes(decoder, [1, 2], [5, 6], config, edit=edit) for decoder in (fused, plain)]
        assert torch.equal(*drawn) and torch.equal(drawn[0][:, edit.keep], edit.codes[edit.keep].expand(2, -1))
    if device == "cuda":
        launched = Decoder(transformer, "fp32", config.rows)
        launched.drawing = Drawing(launched, settled_for(launched, config), graph=NoGraph)
        assert torch.equal(sample_codes(launched, *request, config), sample_codes(fused, *request, config))


class NoGraph:
    """Launches the step."""

    def __init__(self, step, device):
        self.replay = step


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("order", ["raster", "random"])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9, "top_k": 20}])
def test_nothing_in_a_block_waits_for_the_device(filters, order):
    transformer = small_transformer(tokens_per_side=4, vocab_size=64, order=order).to("cuda")
    config = SamplerConfig(rows_per_block=2, precision="bf16", **filters)
    edit = Edit(codes=torch.arange(16).view(4, 4), keep=torch.arange(16).view(4, 4) < 5)
    decoder = Decoder(transformer, "bf16", config.rows)
    drawing = decoder.drawing = Drawing(decoder, settled_for(decoder, config))
    with torch.inference_mode():
        drawing.begin(decoder, [1, 2], [3, 4])  # captures
        torch.cuda.set_sync_debug_mode("error")
        try:
            for label, part in ((0, None), (1, edit), (2, None)):
                drawing.begin(decoder, [label, 2], [3, 4], part)
                for position in range(16):
                    drawing.advance(decoder, position)
            edit.in_raster(drawing.codes)
        finally:
            torch.cuda.set_sync_debug_mode("default")
