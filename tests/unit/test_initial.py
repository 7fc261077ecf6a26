"""Initial weights: numbers of a published generator, normally distributed, and the same whole and in pieces."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from ibq.engine.blueprint import Blueprint
from ibq.engine.pieces import block, stretch, take, whole
from ibq.initial import Initial, fill, key_of, normals, random_bits
from ibq.models.transformer import Transformer, TransformerConfig

SMALL = {"depth": 2, "width": 64, "heads": 4, "vocab_size": 200, "num_classes": 10, "tokens_per_side": 4}


def test_the_generators_published_numbers():
    """SplitMix64 after the seed 1234567."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    found = random_bits(1234567, torch.arange(1, 6))
    assert [number % 2**64 for number in found.tolist()] == wanted


@pytest.mark.parametrize("key", [key_of(0, "a"), key_of(0, "b"), key_of(1, "a"), 12345])
def test_they_are_normal(key):
    found = normals(key, 0, 1_000_000).double()
    assert found.isfinite().all()
    assert stats.kstest(found.numpy(), "norm").pvalue > 1e-4
    assert all(abs(float((found[:-lag] * found[lag:]).mean())) < 5e-3 for lag in (1, 2, 3))
    assert abs(float(found.pow(4).mean()) - 3.0) < 0.05 and 4.3 < float(found.abs().max()) < 6.7


def test_names_and_seeds_tell_sequences_apart():
    sequences = [normals(key_of(seed, name), 0, 100_000) for seed in (0, 1) for name in ("x.weight", "y.weight")]
    products = torch.corrcoef(torch.stack(sequences)) - torch.eye(4)
    assert products.abs().max() < 0.02


@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_what_pytorch_fills_follows_name_and_seed(seed):
    """Its CPU generator has the same numbers for seeds that differ by a multiple of 2**32."""

    def weight(name, seed):
        return Blueprint(name=name, build=lambda: nn.Linear(8, 8), seed=seed).whole().weight

    own = weight("tokenizer", seed)
    assert torch.equal(own, weight("tokenizer", seed))
    for name, other in [("tokenizer", seed + 1), ("tokenizer", seed + 7), ("discriminator", seed)]:
        assert not torch.equal(own, weight(name, other)), (name, other)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_the_far_ends_are_numbers(device):
    """The radius of all zeros and all ones, the largest and the smallest, is finite."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    out = torch.empty(5_000_000, device=device)
    fill(out, Initial(std=2.0, mean=1.0), 3, [(0, len(out), 1, 0)])
    assert out.isfinite().all() and abs(float(out.mean()) - 1) < 5e-3 and abs(float(out.std()) - 2) < 5e-3
    if device == "cuda":
        own = torch.empty(len(out))
        fill(own, Initial(std=2.0, mean=1.0), 3, [(0, len(out), 1, 0)])
        torch.testing.assert_close(out.cpu(), own, rtol=1e-5, atol=1e-5)


def test_a_sequence_is_the_same_from_any_start():
    whole = normals(7, 0, 1000)
    for start, count in [(0, 1), (1, 1), (1, 2), (2, 5), (999, 1), (500, 0)]:
        assert torch.equal(normals(7, start, count), whole[start : start + count])


@pytest.mark.parametrize("shared", [False, True])
def test_pieces_are_parts_of_the_whole(shared):
    blueprint = Blueprint(name="t", build=lambda: Transformer(TransformerConfig(**SMALL, shared_adaln=shared)), seed=3)
    module = blueprint.whole()
    for name, parameter in module.named_parameters():
        shape, numel = parameter.shape, parameter.numel()
        pieces = [stretch(shape, numel // 3, numel // 2), whole(shape)]
        if len(shape) == 2:
            pieces.append(block(shape, (1, shape[0] - 1), (2, shape[1] - 3)))
        for piece in pieces:
            found = blueprint.initial(module, name, piece)
            assert torch.equal(found, take(parameter.detach(), piece)), name
    assert math.isclose(float(module.tok_emb.weight.detach().std()), 0.02, rel_tol=0.05)
    other = Blueprint(name="t", build=blueprint.build, seed=4).whole()
    assert not torch.equal(module.tok_emb.weight, other.tok_emb.weight)
