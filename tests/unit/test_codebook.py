"""Figures of a codebook, against their definitions written out in full."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from ibq.evaluation import codebook as figures
from ibq.quantizers import FSQConfig, IBQConfig, VQConfig, build_quantizer


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(figures, "ROWS", 7)
    monkeypatch.setattr(figures, "COLUMNS", 11)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("count", [50, 13])
def test_neighbours_are_those_of_the_whole_table(count):
    vectors = torch.randn(50, 6)
    vectors[17] = vectors[40]  # twice the same code
    vectors[3] = 0.0
    rows, told = figures.sample_rows(50, count), []
    found = figures.nearest_neighbours(vectors, rows, progress=told.append)
    table = torch.cdist(vectors.double(), vectors.double()).fill_diagonal_(math.inf)
    torch.testing.assert_close(found.distances.double(), table.min(dim=1).values[rows], rtol=1e-5, atol=1e-6)
    assert len(rows.unique()) == count == sum(told) and bool((rows.diff() > 0).all())
    assert torch.equal(found.own, found.distances > 0)
    assert found.own.sum() == count - sum(row in (17, 40) for row in rows.tolist())


@pytest.mark.usefixtures("small_tiles")
def test_by_inner_products_long_codes_take_the_place_of_short_ones():
    vectors = torch.randn(60, 3) * torch.linspace(0.1, 3, 60)[:, None]
    found = figures.nearest_neighbours(vectors, torch.arange(60), inner_product=True)
    selected = (vectors @ vectors.t()).argmax(dim=1)
    assert torch.equal(found.own, selected == torch.arange(60))
    assert 0 < found.own.sum() < 60


def test_one_code_has_no_neighbour():
    with pytest.raises(ValueError, match="at least two"):
        figures.nearest_neighbours(torch.ones(1, 4), torch.tensor([0]))


@pytest.mark.parametrize("config", [
    IBQConfig(num_codes=40, dim=5, selection_temperature=0.5),
    IBQConfig(num_codes=40, dim=5, l2_normalize=True),
    VQConfig(num_codes=40, dim=5),
    FSQConfig(levels=(3, 4)),
])  # fmt: skip
def test_latents_against_codes(config):
    quantizer = build_quantizer(config)
    z = torch.randn(2, quantizer.dim, 4, 4) + 1
    tokens, codes, vectors = quantizer.tokens(z), quantizer.encode(z).flatten(), quantizer.code_vectors().detach()
    found = figures.latent_scale(quantizer, tokens, codes)
    assert found.latent_norm == pytest.approx(float(tokens.norm(dim=1).median()))
    assert found.code_norm == pytest.approx(float(vectors.norm(dim=1).median()))
    error = F.mse_loss(vectors[codes], tokens) / (tokens - tokens.mean(dim=0)).square().mean()
    assert found.error == pytest.approx(float(error), rel=1e-5)
    if not isinstance(config, IBQConfig):
        assert found.logit_spread is None and "logits" not in str(found)
        return
    logits = tokens @ vectors.t() / config.selection_temperature
    p = logits.softmax(dim=1)
    sharing = (-(p * p.log()).sum(dim=1)).exp().mean()
    assert found.codes_sharing == pytest.approx(float(sharing), rel=1e-4) and 1 < found.codes_sharing < 40
    assert found.logit_spread == pytest.approx(float(logits.std(dim=1).mean()), rel=1e-4)
    assert f"reaches {found.codes_sharing:.1f} codes" in str(found)


def test_channels_that_are_always_the_same():
    vectors = build_quantizer(FSQConfig(levels=(2, 4))).code_vectors()
    counts = torch.tensor([0, 3, 0, 3, 0, 3, 0, 3])  # the first channel always above, the second even
    assert figures.channel_evenness(vectors, counts) == pytest.approx([0, 1])


def test_the_plane_holds_what_lies_between_two_clouds():
    codes, latents = torch.randn(300, 5) * 0.1, torch.randn(20, 5) * 0.1
    latents[:, 3] += 4
    one, other = figures.principal_plane(codes, latents)
    assert (one.mean(dim=0) - other.mean(dim=0)).norm() == pytest.approx(4, rel=0.05)
    alone, none = figures.principal_plane(codes[:, :1], latents[:0, :1])
    assert alone.shape == (300, 2) and none.shape == (0, 2)


def test_the_last_of_every_logged_figure(tmp_path):
    assert figures.last_logged(tmp_path) == {}
    rows = [{"step": 5, "codebook/usage": 0.5, "loss/total": 1.0}, {"step": 10, "codebook/usage": "nan"}]
    rows += [{"step": 10, "validation/usage": 0.25}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 15, "codebook/us'
    (tmp_path / "metrics.jsonl").write_text(text)
    found = figures.last_logged(tmp_path)
    assert math.isnan(found.pop("codebook/usage"))
    assert found == {"validation/usage": 0.25, "step": 10}


def test_spread_and_reachable():
    assert figures.spread(torch.arange(101.0)) == {"min": 0, "1%": 1, "median": 50, "99%": 99, "max": 100}
    assert figures.spread(torch.empty(0)) == {}
    drawn = torch.randint(1000, (500,)).unique().numel() / 1000
    assert figures.reachable(0.5) == pytest.approx(drawn, abs=0.03)
