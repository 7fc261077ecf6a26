"""The lean index backpropagation against the textbook form, in values, gradients, rounding errors and memory."""

import inspect
import json
import math
import sys

import pytest
import torch
from support.processes import run_script
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ibq.ops import index_backprop_tiles as tiles
from ibq.ops import textbook
from ibq.ops.index_backprop import best_codes, index_backprop, softmax_entropies

# (tokens, codes, dim, temperature, selection temperature): one strip and several, ragged, one token, two codes.
SIZES = [
    (1, 17, 8, 0.01, 1.0),
    (37, 2, 4, 1.0, 1.0),
    (130, 300, 16, 0.1, 0.5),
    (300, 1000, 64, 0.01, 1.0),
    (300, 1000, 64, 1.0, 0.1),
    (513, 257, 33, 0.05, 1.0),
    (700, 2047, 12, 0.01, 0.2),
    (1100, 5000, 24, 0.3, 1.0),
    (64, 9000, 256, 0.01, 1.0),
]
SCALARS = ("latents", "quantization_loss", "sample_entropy", "batch_entropy")


def draw(tokens: int, codes: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """Tokens, codebook and an upstream gradient: the same numbers in every precision."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(rows, dim, generator=generator).to(dtype) for rows in (tokens, codes, tokens)]
    return drawn[0].requires_grad_(), drawn[1].requires_grad_(), drawn[2]


def everything(form, size: tuple, dtype: torch.dtype, seed: int = 0, **options) -> dict[str, Tensor]:
    """Every output of a form, and the gradients of each of its scalars and of their sum."""
    tokens, codes, dim, temperature, selection = size
    z, codebook, upstream = draw(tokens, codes, dim, dtype, seed)
    out = form(z, codebook, beta=0.25, temperature=temperature, selection_temperature=selection, **options)
    found = {"codes": out.codes, "latents": out.latents.detach()}
    scalars = {name: getattr(out, name) for name in SCALARS[1:]} | {"latents": (out.latents * upstream).sum()}
    scalars["total"] = scalars["latents"] + out.quantization_loss + 0.05 * (out.sample_entropy - out.batch_entropy)
    for name, scalar in scalars.items():
        gradients = torch.autograd.grad(scalar, (z, codebook), retain_graph=True)
        found |= {f"{name}/{of}": gradient for of, gradient in zip(("tokens", "codebook"), gradients, strict=True)}
        found.setdefault(name, scalar.detach())
    return found


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_equals_the_textbook_form(size):
    expected = everything(textbook.index_backprop, size, torch.float64)
    found = everything(index_backprop, size, torch.float64)
    assert torch.equal(found.pop("codes"), expected.pop("codes"))
    for name, value in expected.items():
        # A gradient that is nearly zero because its terms cancel is measured against the whole gradient.
        scale = max(
            float(value.abs().max()), 1e-3 * float(expected.get("total/" + name.split("/")[-1], value).abs().max())
        )
        assert float((found[name] - value).abs().max()) <= 1e-9 * scale, name


def errors(form, size, seed: int, exact: dict[str, Tensor], floor: float = 0.0) -> dict[str, float]:
    """Relative errors of a float32 form, in the Euclidean norm."""
    found = everything(form, size, torch.float32, seed)
    assert torch.equal(found["codes"], exact["codes"])
    return {
        name: float((found[name] - value).norm() / value.norm()) + floor
        for name, value in exact.items()
        if name != "codes" and float(value.norm()) > 1e-6
    }


def worst_ratio(monkeypatched_form=index_backprop) -> dict[str, float]:
    """Root mean square over sizes of our error, over that of the textbook form in the same precision."""
    sums: dict[str, list[float]] = {}
    for seed, size in enumerate(SIZES[2:]):
        exact = everything(textbook.index_backprop, size, torch.float64, seed)
        ours, plain = (errors(form, size, seed, exact) for form in (monkeypatched_form, textbook.index_backprop))
        for name in ours:
            # Below float32's own precision an error is luck.
            pair = sums.setdefault(name, [0.0, 0.0])
            pair[0] += ours[name] ** 2
            pair[1] += max(plain[name], 6e-8) ** 2
    return {name: math.sqrt(ours / plain) for name, (ours, plain) in sums.items()}


def test_rounding_errors_are_those_of_the_textbook_form():
    ratios = worst_ratio()
    assert set(ratios) >= {"total/tokens", "total/codebook", "sample_entropy/tokens", "batch_entropy/codebook"}
    assert max(ratios.values()) <= 1.5, ratios


def test_the_error_bound_sees_a_loss_of_precision(monkeypatch):
    def rounded(tokens, codebook, **options):
        return index_backprop(tokens, codebook + (codebook * 2.0**-21).detach(), **options)

    with pytest.raises(AssertionError):
        assert max(worst_ratio(rounded).values()) <= 1.5


@pytest.mark.parametrize(("part", "target"), [("_SelectionGradient", 1), ("_EntropiesGradient", 0)])
def test_the_comparison_sees_a_missing_part(monkeypatch, part, target):
    size = SIZES[2]
    expected = everything(textbook.index_backprop, size, torch.float64)
    monkeypatch.setattr(getattr(tiles, part), "finish", lambda _self, *tensors: tensors[target].zero_())
    found = everything(index_backprop, size, torch.float64)
    assert float((found["total/codebook"] - expected["total/codebook"]).abs().max()) > 1e-6


def test_strips_do_not_matter(monkeypatch):
    whole = everything(index_backprop, SIZES[3], torch.float64)
    monkeypatch.setitem(tiles.STRIP_BYTES, "cpu", 8 * 1000 * 40)
    monkeypatch.setitem(tiles.CHUNK_ELEMENTS, "cpu", 40 * 70)
    for name, value in everything(index_backprop, SIZES[3], torch.float64).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-12, msg=name)


def test_the_first_of_equal_codes_wins():
    codebook = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).repeat(30, 1)
    tokens = codebook[:40] + 0.01
    codes = index_backprop(tokens, codebook, beta=0.25, temperature=0.01).codes
    assert torch.equal(codes, (tokens @ codebook[:40].t()).argmax(dim=1))
    assert torch.equal(best_codes(tokens, codebook), codes)


def test_best_codes_takes_a_bias():
    z, codebook, _ = draw(500, 700, 5)
    nearest = torch.cdist(z, codebook).argmin(dim=1)
    assert torch.equal(best_codes(2 * z, codebook, -codebook.square().sum(dim=1)), nearest)


@pytest.mark.parametrize("beta_weighs", ["codebook", "commitment"])
def test_beta_weighs_one_of_the_one_sided_terms(beta_weighs):
    z, codebook, _ = draw(50, 30, 6, torch.float64)
    out = index_backprop(z, codebook, beta=0.25, temperature=0.5, beta_weighs=beta_weighs)
    rows = codebook[out.codes]
    to_tokens, to_codes = F.mse_loss(z, rows.detach()), F.mse_loss(rows, z.detach())
    weighted = to_tokens + 0.25 * to_codes if beta_weighs == "codebook" else 0.25 * to_tokens + to_codes
    expected = torch.autograd.grad(F.mse_loss(out.latents, z) + weighted, (z, codebook), retain_graph=True)
    for found, value in zip(torch.autograd.grad(out.quantization_loss, (z, codebook)), expected, strict=True):
        torch.testing.assert_close(found, value)


def test_softmax_entropies_are_the_same_entropies():
    z, codebook, _ = draw(200, 90, 6, torch.float64)
    alone = softmax_entropies(z, codebook, temperature=0.3)
    both = index_backprop(z, codebook, beta=0.25, temperature=0.3)
    for name in ("sample_entropy", "batch_entropy"):
        gradients = [torch.autograd.grad(getattr(out, name), (z, codebook), retain_graph=True) for out in (alone, both)]
        for found, value in zip(*gradients, strict=True):
            torch.testing.assert_close(found, value)


def test_gradients_by_finite_differences():
    z, codebook, _ = draw(5, 7, 3, torch.float64)

    def scalars(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        out = softmax_entropies(z, codebook, temperature=0.7)
        return out.sample_entropy, out.batch_entropy

    assert torch.autograd.gradcheck(scalars, (z, codebook))


def test_batch_entropy_over_ranks():
    """Two halves with the mean of both usages handed in have the batch entropy, and its gradient, of the whole."""
    z, codebook, _ = draw(60, 25, 6, torch.float64)
    whole = index_backprop(z, codebook, beta=0.25, temperature=0.3).batch_entropy
    (expected,) = torch.autograd.grad(whole, z)
    probabilities = (z @ codebook.t() / 0.3).softmax(dim=1)
    found = []
    for own, other in ((slice(0, 30), slice(30, 60)), (slice(30, 60), slice(0, 30))):
        usage = probabilities[other].mean(dim=0).detach()
        half = index_backprop(
            z[own], codebook, beta=0.25, temperature=0.3, mean_over_ranks=lambda mean, usage=usage: (mean + usage) / 2
        )
        torch.testing.assert_close(half.batch_entropy, whole)
        found.append(torch.autograd.grad(half.batch_entropy, z)[0][own])
    torch.testing.assert_close(torch.cat(found), expected)


def test_bfloat16_rounds_the_operands_alone():
    size = (70, 90, 12, 0.2, 1.0)
    z, codebook, upstream = draw(*size[:3])
    out = index_backprop(z, codebook, beta=0.25, temperature=0.2, precision="bfloat16")
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (z, codebook)]
    expected = textbook.index_backprop(*rounded, beta=0.25, temperature=0.2)
    assert torch.equal(out.codes, expected.codes)
    assert torch.equal(out.latents, codebook[out.codes]), "the latents are the rows themselves, not rounded ones"
    for name in ("sample_entropy", "batch_entropy"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-6)
    upstream = upstream.bfloat16().float()
    (found,) = torch.autograd.grad((out.latents * upstream).sum(), z, retain_graph=True)
    (value,) = torch.autograd.grad((expected.latents * upstream).sum(), rounded[0], retain_graph=True)
    torch.testing.assert_close(found.double(), value, rtol=1e-4, atol=1e-4)


def test_autocast_changes_nothing():
    z, codebook, _ = draw(40, 50, 8)
    plain = index_backprop(z, codebook, beta=0.25, temperature=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = index_backprop(z, codebook, beta=0.25, temperature=0.1)
        gradient = torch.autograd.grad(out.sample_entropy, codebook)[0]
    assert torch.equal(gradient, torch.autograd.grad(plain.sample_entropy, codebook)[0])
    assert torch.equal(out.quantization_loss, plain.quantization_loss)


def loss_of(z: Tensor, codebook: Tensor) -> Tensor:
    out = index_backprop(z, codebook, beta=0.25, temperature=0.1)
    return out.latents.sin().sum() + out.quantization_loss + out.sample_entropy - out.batch_entropy


def test_under_torch_compile_and_checkpointing():
    z, codebook, _ = draw(40, 50, 8)
    expected = torch.autograd.grad(loss_of(z, codebook), (z, codebook))
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for loss in (compiled(z, codebook), checkpoint(loss_of, z, codebook, use_reentrant=False)):
        for found, value in zip(torch.autograd.grad(loss, (z, codebook)), expected, strict=True):
            torch.testing.assert_close(found, value)


def test_the_operator_keeps_pytorchs_rules():
    z, codebook, _ = draw(6, 9, 4)
    torch.library.opcheck(torch.ops.ibq.index_backprop, (z, codebook, 0.1, 1.0, "float32", "torch"))


def test_a_frozen_codebook_and_unused_outputs():
    z, codebook, _ = draw(40, 50, 8)
    out = index_backprop(z, codebook.detach(), beta=0.25, temperature=0.1)
    assert torch.autograd.grad(out.sample_entropy, z)[0].abs().max() > 0
    out = index_backprop(z.detach(), codebook, beta=0.25, temperature=0.1)
    (gradient,) = torch.autograd.grad(out.quantization_loss, codebook)
    assert gradient.abs().max() > 0
    with torch.no_grad():
        assert not index_backprop(z, codebook, beta=0.25, temperature=0.1).latents.requires_grad


MEASURE = """
import json, torch
from torch import Tensor
from ibq.ops.index_backprop import index_backprop
from tools.lib.bench.process import extra_peak_gib
{loss_of}
loss_of(torch.randn(4, 4).requires_grad_(), torch.randn(4, 4).requires_grad_()).backward()
z, codebook = torch.randn({tokens}, 8).requires_grad_(), torch.randn({codes}, 8).requires_grad_()
print(json.dumps(extra_peak_gib(lambda: torch.autograd.grad(loss_of(z, codebook), (z, codebook)))))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from Linux's /proc")
def test_memory_does_not_grow_with_tokens_times_codes():
    # One table would be half a GiB.
    code = MEASURE.format(loss_of=inspect.getsource(loss_of), tokens=2048, codes=65_536)
    done = run_script("-c", code, fresh=True)
    assert 0.05 < json.loads(done.stdout.splitlines()[-1]) < 0.25


@pytest.mark.parametrize(
    ("shapes", "options", "problem"),
    [
        (((3, 4), (5, 6)), {}, "set the quantizer's `dim`"),
        (((0, 4), (5, 4)), {}, "give at least one image"),
        (((3, 4), (0, 4)), {}, "at least one image and one code"),
        (((3, 4), (5, 4)), {"temperature": 0.0}, "temperature: must be positive"),
        (((3, 4), (5, 4)), {"selection_temperature": -1.0}, "selection_temperature: must be positive"),
        (((3, 4), (5, 4)), {"temperature": math.nan}, "temperature: must be positive"),
    ],
)
def test_bad_input_names_the_remedy(shapes, options, problem):
    z, codebook = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=problem):
        index_backprop(z, codebook, beta=0.25, **({"temperature": 0.01} | options))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_on_cuda(backend):
    size = SIZES[3]
    expected, found = everything(textbook.index_backprop, size, torch.float64), {}
    z, codebook, upstream = (x.cuda() for x in draw(*size[:3]))
    out = index_backprop(z, codebook, beta=0.25, temperature=0.01, backend=backend)
    loss = (out.latents * upstream).sum() + out.quantization_loss + 0.05 * (out.sample_entropy - out.batch_entropy)
    found["total/tokens"], found["total/codebook"] = torch.autograd.grad(loss, (z, codebook))
    assert torch.equal(out.codes.cpu(), expected["codes"])
    for name, value in found.items():
        assert float((value.cpu() - expected[name]).norm() / expected[name].norm()) < 1e-4, name
