"""The IBQ quantizer against numbers of the public reference implementation, in float32 and float64.

Tolerances: float32 20 times the reference's own error (its float32 against its float64 numbers), never below
1e-6 of the largest value; float64 1e-9 of the largest value. Sums of terms that cancel are measured against
the terms, and entropies, in nats whatever the case, against the reference's worst error in any case. A case
whose codes differ between the reference's two precisions needs no equal codes; what depends on the codes is
then compared only if they are equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from support.golden import (
    DTYPES,
    FLOAT32_FACTOR,
    FLOAT32_FLOOR,
    FLOAT64_TOLERANCE,
    assert_close,
    assert_equal_codes,
    golden_json,
    golden_tensors,
    stored_quantities,
)
from torch import Tensor

from ibq.ops.textbook import index_backprop
from ibq.quantizers import IBQConfig, IndexBackpropQuantizer

NAME = "quantizer_ibq"
ENTROPIES = ("sample_entropy", "avg_entropy", "entropy_loss")
WITHOUT_CODES = (*ENTROPIES, "grad_entropy")  # prefixes of what does not depend on the codes
INFORMATIONAL_FLOAT32 = 1e-5  # of the largest value, where the reference's two precisions took other codes


@dataclass(frozen=True, kw_only=True)
class Result:
    latents: Tensor  # [B, D, h, w]
    codes: Tensor  # [B, h, w]
    quant_loss: Tensor
    sample_entropy: Tensor
    avg_entropy: Tensor
    entropy_loss: Tensor


def by_formula(case: dict, z: Tensor, codebook: Tensor) -> tuple[Result, Tensor]:
    tokens = z.permute(0, 2, 3, 1).reshape(-1, case["D"])
    out = index_backprop(tokens, codebook, beta=case["beta"], temperature=case["entropy_temperature"])
    sample, batch = out.sample_entropy, out.batch_entropy
    shape = (z.shape[0], *z.shape[2:])
    result = Result(
        latents=out.latents.view(*shape, case["D"]).permute(0, 3, 1, 2),
        codes=out.codes.view(shape),
        quant_loss=out.quantization_loss,
        sample_entropy=sample,
        avg_entropy=batch,
        entropy_loss=case["sample_minimization_weight"] * sample - case["batch_maximization_weight"] * batch,
    )
    return result, codebook


def by_module(case: dict, z: Tensor, codebook: Tensor) -> tuple[Result, Tensor]:
    config = IBQConfig(
        num_codes=case["K"],
        dim=case["D"],
        beta=case["beta"],
        entropy_temperature=case["entropy_temperature"],
        sample_entropy_weight=case["sample_minimization_weight"],
        batch_entropy_weight=case["batch_maximization_weight"],
    )
    quantizer = IndexBackpropQuantizer(config).to(codebook.dtype)
    quantizer.load_state_dict({"codebook": codebook.detach()}, strict=True)
    out = quantizer(z)
    result = Result(
        latents=out.latents,
        codes=out.codes,
        quant_loss=out.losses["quantization"],
        sample_entropy=out.metrics["sample_entropy"],
        avg_entropy=out.metrics["batch_entropy"],
        entropy_loss=out.losses["entropy"],
    )
    return result, quantizer.codebook


Implementation = Callable[[dict, Tensor, Tensor], tuple[Result, Tensor]]
IMPLEMENTATIONS = {"formula": by_formula, "module": by_module}


@dataclass(frozen=True, kw_only=True)
class Run:
    result: Result
    scalars: dict[str, Tensor]
    gradients: dict[str, Tensor]  # "lin_z", "lin_codebook", ...: full gradients


def inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tensors, case = golden_tensors(NAME), golden_json(NAME)["cases"][name]
    z = tensors[f"{name}/z"].to(dtype, copy=True).requires_grad_()
    codebook = tensors[case["codebook_tensor"]].to(dtype, copy=True).requires_grad_()
    return z, codebook, tensors[f"{name}/g"].to(dtype)


def run(name: str, dtype: torch.dtype, implementation: Implementation) -> Run:
    case = golden_json(NAME)["cases"][name]
    z, codebook, g = inputs(name, dtype)
    result, codebook = implementation(case, z, codebook)
    lin = (result.latents * g).sum()
    total = lin + result.quant_loss + case["entropy_loss_weight_in_S"] * result.entropy_loss
    scalars = {"lin": lin, "quant": result.quant_loss, "entropy": result.entropy_loss, "total": total}
    gradients = {}
    for key, scalar in scalars.items():
        of_z, of_codebook = torch.autograd.grad(scalar, (z, codebook), retain_graph=True)
        gradients |= {f"{key}_z": of_z, f"{key}_codebook": of_codebook}
    rows = codebook.detach()[result.codes].permute(0, 3, 1, 2)
    named = {key: getattr(result, key) for key in ("quant_loss", "sample_entropy", "avg_entropy", "entropy_loss")}
    named |= {"lin": lin, "S": total, "max_abs_zq_minus_codebook_row": (result.latents - rows).abs().max()}
    return Run(result=result, scalars=named, gradients=gradients)


def term_sizes(name: str) -> dict[str, float]:
    """Size of the terms of sums that (nearly) cancel, from a float64 run of the formulas."""
    case = golden_json(NAME)["cases"][name]
    z, codebook, g = inputs(name, torch.float64)
    out, codebook = by_formula(case, z, codebook)
    lin = float((out.latents.detach() * g).norm())
    sizes = {"lin": lin, "S": lin}
    if case["B"] * case["H"] * case["W"] == 1:  # the entropy of one token is the entropy of the batch
        of_z, of_codebook = torch.autograd.grad(out.sample_entropy, (z, codebook))
        weight = case["sample_minimization_weight"]
        sizes["entropy_loss"] = weight * float(out.sample_entropy.detach())
        sizes["grad_entropy_z"] = weight * float(of_z.abs().max())
        sizes["grad_entropy_codebook"] = weight * float(of_codebook.abs().max())
    return sizes


@cache
def worst_error(quantity: str) -> float:
    """The reference's largest float32 error of a scalar over all cases."""
    cases = golden_json(NAME)["cases"].values()
    return max(abs(case["f32"][quantity] - case["f64"][quantity]) for case in cases)


def tolerance(quantity: str, precision: str, same_codes: bool, stored: dict[str, Tensor], scale: float) -> float:
    """Absolute tolerance, given what the reference stored in both precisions and the size of the terms."""
    scale = max(scale, float(stored["f64"].abs().max()))
    if precision == "f64":
        return FLOAT64_TOLERANCE * scale
    if not same_codes:
        return INFORMATIONAL_FLOAT32 * scale
    error = float((stored["f32"].double() - stored["f64"].double()).abs().max())
    if quantity in ENTROPIES:
        error = worst_error(quantity)
    return max(FLOAT32_FACTOR * error, FLOAT32_FLOOR * scale)


def actual_quantity(quantity: str, got: Run, rows: Tensor | None) -> tuple[Tensor, float]:
    """Our value of a stored quantity, and the size of the terms that are summed in it (0: of the value)."""
    if quantity in got.scalars:
        return got.scalars[quantity], 0.0
    if quantity == "z_q":
        return got.result.latents, 0.0
    assert quantity.startswith("grad_"), f"the golden data has {quantity}, which this test does not know"
    key, _, reduction = quantity.removeprefix("grad_").partition("_codebook_")
    full = got.gradients[f"{key}_codebook" if reduction else key]
    match reduction:
        case "colsum":
            return full.sum(dim=0), float(full.abs().sum(dim=0).max())
        case "fro":
            return full.double().norm(), 0.0
    return (full[rows] if rows is not None and key.endswith("_codebook") else full), 0.0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", golden_json(NAME)["cases"])
def test_every_stored_quantity(name: str, precision: str, implementation: Implementation):
    case, tensors = golden_json(NAME)["cases"][name], golden_tensors(NAME)
    got = run(name, DTYPES[precision], implementation)
    stored = stored_quantities(NAME, name)
    indices = stored.pop("indices")[precision]
    binding = case["indices_same_f32_f64"]
    if binding:
        assert_equal_codes(got.result.codes, indices, name)
    equal_codes = torch.equal(got.result.codes.flatten(), indices)
    sizes = term_sizes(name)
    for quantity, values in stored.items():
        free_of_codes = quantity.startswith(WITHOUT_CODES)
        if not equal_codes and not free_of_codes:
            continue
        actual, scale = actual_quantity(quantity, got, tensors.get(f"{name}/grad_rows"))
        scale = max(scale, sizes.get(quantity, 0.0))
        allowed = tolerance(quantity, precision, binding or free_of_codes, values, scale)
        assert_close(actual, values[precision], allowed, f"{name}/{precision}/{quantity}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", golden_json(NAME)["cases"])
def test_codes_are_the_best_up_to_rounding(name: str, precision: str, implementation: Implementation):
    """Also where equal codes are not required, rounding cannot tell the code taken from the best."""
    dtype = DTYPES[precision]
    z, codebook, _ = inputs(name, dtype)
    codes = implementation(golden_json(NAME)["cases"][name], z, codebook)[0].codes.flatten()
    logits = z.detach().double().permute(0, 2, 3, 1).flatten(0, 2) @ codebook.detach().double().t()
    gap = logits.max(dim=1).values - logits.gather(1, codes[:, None]).squeeze(1)
    assert float(gap.max()) <= 8 * torch.finfo(dtype).eps * max(1.0, float(logits.abs().max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", [n for n, case in golden_json(NAME)["cases"].items() if case.get("pairs")])
def test_the_lower_of_equal_rows_wins(name: str, precision: str, implementation: Implementation):
    case = golden_json(NAME)["cases"][name]
    z, codebook, _ = inputs(name, DTYPES[precision])
    codes = implementation(case, z, codebook)[0].codes
    for low, high in case["pairs"]:
        if torch.equal(codebook[low], codebook[high]):
            wins = [int((codes == code).sum()) for code in (low, high)]
            assert wins[1] == 0
            if case["indices_same_f32_f64"]:
                assert wins == case["pair_win_counts"][f"{low},{high}"][precision]


@pytest.mark.parametrize("name", golden_json(NAME)["cases"])
def test_number_of_distinct_codes(name: str):
    case = golden_json(NAME)["cases"][name]
    if case["indices_same_f32_f64"]:
        z, codebook, _ = inputs(name, torch.float64)
        assert len(by_module(case, z, codebook)[0].codes.unique()) == case["distinct_indices"]
