"""Plain VQ, LlamaGen's VQ and LFQ against numbers of the public reference implementations, in float32 and float64.

A case whose codes differ between the reference's two precisions needs no equal codes; what depends on the codes is
then compared only if they are equal.

Tolerances: float32 as `golden_support` states it; float64 1e-9 of the largest value. Sums of terms that cancel are
measured against the terms, and entropies and their gradients, which are differences of terms of the size of the
entropies, against the reference's worst error of the quantity in any case.
"""

import dataclasses
from collections.abc import Callable
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

from ibq.quantizers import LFQConfig, QuantizerOutput, VQConfig, build_quantizer
from ibq.quantizers.base import Quantizer

FILES = ("quantizer_vq2", "quantizer_vq_lfq", "quantizer_vq_llamagen")
CASES = [(file, case) for file in FILES for case in golden_json(file)["cases"]]
OF_CODES = "max_abs_zq_minus_codebook_row"


def inputs(file: str, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """z (called x for LFQ), the codebook where there is one, and the upstream gradient g."""
    prefix = golden_json(file)["cases"][name].get("inputs", name)
    tensors = golden_tensors(file)
    found = {key: tensors[f"{prefix}/{key}"] for key in ("z", "x", "codebook", "g") if f"{prefix}/{key}" in tensors}
    return {key: value.to(dtype, copy=True).requires_grad_(key != "g") for key, value in found.items()}


def build(config: VQConfig | LFQConfig, given: dict[str, Tensor]) -> Quantizer:
    quantizer = build_quantizer(config).to(given["g"].dtype)
    if "codebook" in given:
        quantizer.load_state_dict({"codebook": given["codebook"].detach()}, strict=True)
    return quantizer


def vq2(case: dict, given: dict[str, Tensor]) -> tuple[Quantizer, QuantizerOutput, dict[str, Tensor]]:
    config = VQConfig(
        num_codes=case["K"],
        dim=case["D"],
        beta=case["beta"],
        beta_weighs="codebook" if case["legacy"] else "commitment",
        normalize="search" if case["l2_normalize"] else "none",
    )
    quantizer = build(config, given)
    out = quantizer(given["z"])
    return quantizer, out, {"loss": out.losses["quantization"]}


def llamagen(case: dict, given: dict[str, Tensor]) -> tuple[Quantizer, QuantizerOutput, dict[str, Tensor]]:
    ratio = case["entropy_loss_ratio"]
    config = VQConfig(
        num_codes=case["K"],
        dim=case["D"],
        beta=case["beta"],
        beta_weighs="commitment",
        normalize="vectors" if case["l2_norm"] else "none",
        sample_entropy_weight=ratio,
        batch_entropy_weight=ratio,
        entropy_temperature=case["entropy_temperature"],
    )
    quantizer = build(config, given)
    out = quantizer(given["z"])
    # With beta 0 on one term the other one remains.
    terms = {}
    for term, weakened in (("vq_loss", "commitment"), ("commit_loss", "codebook")):
        alone = build(dataclasses.replace(config, beta=0.0, beta_weighs=weakened), given)
        alone.codebook = quantizer.codebook
        terms[term] = alone(given["z"]).losses["quantization"]
    terms["commit_loss"] = case["beta"] * terms["commit_loss"]
    assert torch.allclose(terms["vq_loss"] + terms["commit_loss"], out.losses["quantization"], rtol=1e-6)
    nothing = 0.0 * out.losses["quantization"]
    return quantizer, out, {**terms, "entropy_loss": out.losses.get("entropy", nothing)}


def lfq(case: dict, given: dict[str, Tensor]) -> tuple[Quantizer, QuantizerOutput, dict[str, Tensor]]:
    config = LFQConfig(
        dim=case["D"],
        beta=1.0,
        entropy_temperature=case["entropy_temperature"],
        sample_entropy_weight=case["sample_minimization_weight"],
        batch_entropy_weight=case["batch_maximization_weight"],
    )
    quantizer = build(config, given)
    out = quantizer(given["x"])
    scalars = {
        "commit_loss": out.losses["quantization"],
        "entropy_loss": out.losses["entropy"],
        "sample_entropy": out.metrics["sample_entropy"],
        "avg_entropy": out.metrics["batch_entropy"],
    }
    return quantizer, out, scalars


RUNS: dict[str, Callable] = dict(zip(FILES, (vq2, lfq, llamagen), strict=True))


def actual_quantities(file: str, name: str, dtype: torch.dtype, case: dict) -> tuple[dict[str, Tensor], Tensor]:
    """Our value of everything that the golden data may have of a case with these settings, and the codes."""
    given = inputs(file, name, dtype)
    quantizer, out, scalars = RUNS[file](case, given)
    lin = (out.latents * given["g"]).sum()
    total = lin
    for key, value in scalars.items():
        if key.endswith("loss"):
            weights = {
                "entropy_loss": case.get("entropy_loss_weight_in_S", 1.0),
                "commit_loss": case.get("commit_weight_in_S", 1.0),
            }
            total = total + weights.get(key, 1.0) * value
    found = {"z_q": out.latents, **scalars, "lin": lin, "S": total}
    where = {key: given[key] for key in ("z", "x") if key in given}
    if "codebook" in given:
        where["codebook"] = quantizer.codebook
        rows = quantizer.lookup(out.codes)
        found[OF_CODES] = (out.latents - rows).abs().max()
    losses = {k.removesuffix("_loss"): v for k, v in scalars.items() if "loss" in k}
    differentiated = {"lin": lin, "total": total, **losses}
    for key, scalar in differentiated.items():
        gradients = torch.autograd.grad(
            scalar, list(where.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        found |= {f"grad_{key}_{of}": gradient for of, gradient in zip(where, gradients, strict=True)}
    return found, out.codes


@cache
def worst_error(file: str, quantity: str) -> float:
    """The reference's largest float32 error of a quantity over all cases of a file."""
    errors = []
    for name in golden_json(file)["cases"]:
        values = stored_quantities(file, name).get(quantity, {})
        if values.keys() == DTYPES.keys():
            errors.append(float((values["f32"].double() - values["f64"].double()).abs().max()))
    return max(errors, default=0.0)


def tolerance(file: str, quantity: str, precision: str, stored: dict[str, Tensor], scale: float) -> float:
    scale = max(scale, *(float(value.abs().max()) for value in stored.values()))
    if precision == "f64":
        return FLOAT64_TOLERANCE * scale
    if "entropy" in quantity or "f64" not in stored:
        error = worst_error(file, quantity)
    else:
        error = float((stored["f32"].double() - stored["f64"].double()).abs().max())
    return max(FLOAT32_FACTOR * error, FLOAT32_FLOOR * scale)


def compare(file: str, name: str, precision: str, changes: dict | None = None) -> None:
    """Fail unless all stored quantities of a case are ours, with some settings changed."""
    case, stored = golden_json(file)["cases"][name] | (changes or {}), stored_quantities(file, name)
    found, codes = actual_quantities(file, name, DTYPES[precision], case)
    indices, binding = stored.pop("indices", {}).get(precision), case["indices_same_f32_f64"]
    if binding and indices is not None:
        assert_equal_codes(codes, indices, name)
    if binding and "distinct_indices" in case:
        assert len(codes.unique()) == case["distinct_indices"]
    equal_codes = binding or (indices is not None and torch.equal(codes.flatten(), indices))
    given = inputs(file, name, torch.float64)
    terms = float((found["z_q"].detach().double() * given["g"]).norm())  # lin and S add what cancels
    for quantity, values in stored.items():
        if precision not in values or not (equal_codes or "entropy" in quantity):
            continue
        if quantity == OF_CODES:  # the reference adds and subtracts the latent; we hand on the row itself
            assert float(found[quantity].detach()) == 0.0
            continue
        scale = terms if quantity in ("lin", "S") else 0.0
        allowed = tolerance(file, quantity, precision, values, scale)
        assert_close(found[quantity], values[precision], allowed, f"{file}/{name}/{precision}/{quantity}")


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("file", "name"), CASES)
def test_every_stored_quantity(file: str, name: str, precision: str):
    compare(file, name, precision)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    ("file", "setting", "change"),
    [
        ("quantizer_vq2", "legacy", lambda value: not value),
        ("quantizer_vq2", "beta", lambda value: 1.001 * value),
        ("quantizer_vq2", "l2_normalize", lambda value: not value),
        ("quantizer_vq_llamagen", "l2_norm", lambda value: not value),
        ("quantizer_vq_llamagen", "beta", lambda value: 1.001 * value),
        ("quantizer_vq_llamagen", "entropy_loss_ratio", lambda value: 1.001 * value + 0.001),
        ("quantizer_vq_lfq", "entropy_temperature", lambda value: 1.001 * value),
        ("quantizer_vq_lfq", "batch_maximization_weight", lambda value: 1.001 * value),
    ],
)
def test_other_settings_are_noticed(file: str, setting: str, change: Callable, precision: str):
    noticed = 0
    for name, case in golden_json(file)["cases"].items():
        try:
            compare(file, name, precision, {setting: change(case[setting])})
        except AssertionError:
            noticed += 1
    assert noticed


@pytest.mark.parametrize("name", golden_json("quantizer_vq_lfq")["cases"])
def test_lfq_codes_of_indices(name: str):
    case, tensors = golden_json("quantizer_vq_lfq")["cases"][name], golden_tensors("quantizer_vq_lfq")
    quantizer = build_quantizer(LFQConfig(dim=case["D"]))
    indices = tensors[f"{name}/code_probe_indices"]
    assert torch.equal(quantizer.code_vectors()[indices], tensors[f"{name}/code_probe_codes"])
    assert torch.equal(quantizer.lookup(indices.view(1, 1, -1))[0, :, 0].t(), tensors[f"{name}/code_probe_codes"])
