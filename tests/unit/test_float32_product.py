"""Float32 products by parts in bfloat16: as exact as those in float32."""

import pytest
import torch

from ibq.ops.float32_product import Float32Product, _parts

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


def test_the_parts_add_up_to_the_last_bit():
    x = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    parts = _parts(x)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), x.double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_as_exact_as_a_product_in_float32(scale, device):
    x, matrix = (torch.randn(rows, 256, device=device) * scale for rows in (64, 3000))
    exact = x.double() @ matrix.double().t()
    plain = (x @ matrix.t() - exact).square().mean()
    found = Float32Product(matrix, split=True)(x, torch.empty(64, 3000, device=device))
    assert (found - exact).square().mean() <= 1.5**2 * plain


def test_the_bound_sees_a_missing_part(monkeypatch):
    x, matrix = torch.randn(64, 256), torch.randn(3000, 256)
    exact = x.double() @ matrix.double().t()
    plain = (x @ matrix.t() - exact).square().mean()
    whole = _parts
    monkeypatch.setattr("ibq.ops.float32_product._parts", lambda x: [*whole(x)[:2], torch.zeros_like(x).bfloat16()])
    found = Float32Product(matrix, split=True)(x, torch.empty(64, 3000))
    assert (found - exact).square().mean() > 1.5**2 * plain


def test_whole_where_nothing_multiplies_parts():
    x, matrix = torch.randn(5, 8), torch.randn(7, 8)
    assert torch.equal(Float32Product(matrix)(x, torch.empty(5, 7)), x @ matrix.t())
