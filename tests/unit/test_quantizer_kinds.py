"""What belongs to one kind of quantizer only: formulas, initialisation, settings that cannot work."""

import dataclasses
import math

import pytest
import torch
from support.quantizer import BRIDGE, KINDS, SMALL, build, draw_latents, objective
from torch import Tensor

from ibq.ops.textbook import index_backprop
from ibq.quantizers import (
    BSQConfig,
    FSQConfig,
    IBQConfig,
    LFQConfig,
    LinearProjectorConfig,
    SimVQConfig,
    VQBridgeConfig,
    VQConfig,
    build_quantizer,
)

# --- IBQ ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_codes", 0),
        ("num_codes", -3),
        ("dim", 0),
        ("entropy_temperature", 0.0),
        ("entropy_temperature", float("nan")),
        ("init_scale", float("inf")),
        ("beta", -0.1),
        ("beta", float("nan")),
        ("sample_entropy_weight", float("nan")),
        ("batch_entropy_weight", float("inf")),
        ("init", "zeros"),
        ("beta_weighs", "both"),
        ("logits", "float16"),
    ],
)
def test_ibq_settings_that_cannot_work(field: str, value: object):
    with pytest.raises(ValueError, match=f"^{field}: .*; "):
        dataclasses.replace(KINDS["ibq"].config, **{field: value})


def test_ibq_initialisation():
    torch.manual_seed(0)
    normal = build_quantizer(IBQConfig(num_codes=512, dim=32, init_scale=0.3)).codebook.detach()
    assert float(normal.std()) == pytest.approx(0.3, rel=0.02) and float(normal.abs().max()) > 0.9
    uniform = build_quantizer(IBQConfig(num_codes=512, dim=32, init="uniform", init_scale=0.3)).codebook.detach()
    assert float(uniform.abs().max()) <= 0.3 and float(uniform.std()) == pytest.approx(0.3 / 3**0.5, rel=0.02)


def test_ibq_lowest_code_wins_a_tie():
    quantizer = build_quantizer(KINDS["ibq"].config)
    with torch.no_grad():
        quantizer.codebook[8:] = quantizer.codebook[:8]
    for dtype in (torch.float32, torch.float64):
        z = draw_latents().to(dtype)
        out = quantizer.to(dtype)(z)
        assert int(out.codes.max()) < 8 and int(quantizer.encode(z).max()) < 8


def test_ibq_entropy_weights():
    z = draw_latents()
    for sample, batch in ((1.0, 1.0), (0.5, 2.0), (0.0, 0.0)):
        config = IBQConfig(num_codes=16, dim=4, sample_entropy_weight=sample, batch_entropy_weight=batch)
        out = build_quantizer(config)(z)
        expected = sample * out.metrics["sample_entropy"] - batch * out.metrics["batch_entropy"]
        assert torch.allclose(out.losses["entropy"].detach(), expected)


def test_index_backprop_gradcheck_of_the_smooth_losses():
    """The entropies are smooth: their gradients must agree with finite differences."""
    generator = torch.Generator().manual_seed(3)
    tokens, codebook = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (4, 6))

    def entropies(tokens: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        out = index_backprop(tokens, codebook, beta=0.25, temperature=0.7)
        return out.sample_entropy, out.batch_entropy

    assert torch.autograd.gradcheck(entropies, (tokens.requires_grad_(), codebook.requires_grad_()))


@pytest.mark.parametrize("rows", [16, 17])
def test_ibq_code_is_the_row_of_the_largest_inner_product(rows: int):
    generator = torch.Generator().manual_seed(4)
    tokens, codebook = torch.randn(9, 4, generator=generator), torch.randn(rows, 4, generator=generator)
    out = index_backprop(tokens, codebook, beta=0.25, temperature=0.01)
    assert torch.equal(out.codes, (tokens @ codebook.t()).argmax(dim=1))
    assert torch.equal(out.latents, codebook[out.codes])


# --- Settings that cannot work, of the other kinds ---------------------------

BAD_SETTINGS = [
    (IBQConfig(**SMALL), "projector", VQBridgeConfig(group=3)),
    (VQConfig(), "num_codes", 0),
    (VQConfig(), "dim", -1),
    (VQConfig(), "beta", -0.1),
    (VQConfig(), "beta_weighs", "both"),
    (VQConfig(), "normalize", "l2"),
    (VQConfig(), "entropy_temperature", 0.0),
    (VQConfig(), "sample_entropy_weight", math.nan),
    (VQConfig(), "batch_entropy_weight", -1.0),
    (VQConfig(), "init", "zeros"),
    (VQConfig(), "init_scale", 0.0),
    (VQConfig(**SMALL), "projector", VQBridgeConfig(group=3)),
    (VQBridgeConfig(), "group", 0),
    (VQBridgeConfig(), "width", 0),
    (VQBridgeConfig(), "blocks", -1),
    (VQBridgeConfig(), "heads", 7),
    (SimVQConfig(), "num_codes", 0),
    (SimVQConfig(), "beta", math.inf),
    (SimVQConfig(), "beta_weighs", ""),
    (SimVQConfig(), "init_scale", -1.0),
    (SimVQConfig(), "codebook_seed", -1),
    (LFQConfig(), "dim", 0),
    (LFQConfig(), "dim", 36),
    (LFQConfig(), "entropy_temperature", 0.0),
    (LFQConfig(), "beta", -1.0),
    (BSQConfig(), "dim", 21),
    (BSQConfig(), "entropy_group", 0),
    (BSQConfig(), "entropy_temperature", math.nan),
    (BSQConfig(), "batch_entropy_weight", -1.0),
    (FSQConfig(), "levels", ()),
    (FSQConfig(), "levels", (8, 1, 5)),
    (FSQConfig(), "levels", (1024, 1025)),
]


@pytest.mark.parametrize(("config", "field", "value"), BAD_SETTINGS)
def test_settings_that_cannot_work(config: object, field: str, value: object):
    with pytest.raises(ValueError, match=f"^{field}: .*; "):
        dataclasses.replace(config, **{field: value})


# --- VQ and SimVQ ------------------------------------------------------------


def test_vq_initialisation():
    torch.manual_seed(0)
    codebook = build_quantizer(VQConfig(num_codes=512, dim=32)).codebook.detach()
    assert float(codebook.abs().max()) <= 1 / 512 and float(codebook.std()) == pytest.approx(1 / 512 / 3**0.5, rel=0.02)
    normal = build_quantizer(VQConfig(num_codes=512, dim=32, init="normal")).codebook.detach()
    assert float(normal.std()) == pytest.approx(1, rel=0.02)
    scaled = build_quantizer(VQConfig(num_codes=512, dim=32, init_scale=0.5)).codebook.detach()
    assert float(scaled.abs().max()) == pytest.approx(0.5, rel=0.02)
    simvq = build_quantizer(SimVQConfig(num_codes=512, dim=64)).codebook
    assert float(simvq.std()) == pytest.approx(1 / 8, rel=0.02)


def test_vq_lowest_code_wins_a_tie():
    for normalize in ("none", "search", "vectors"):
        quantizer = build_quantizer(VQConfig(**SMALL, normalize=normalize, init="normal"))
        with torch.no_grad():
            quantizer.codebook[8:] = quantizer.codebook[:8]
        assert int(quantizer(draw_latents()).codes.max()) < 8


def test_vq_entropy_is_that_of_the_distances():
    for normalize in ("none", "vectors"):
        config = VQConfig(
            **SMALL, normalize=normalize, init="normal", sample_entropy_weight=2.0, batch_entropy_weight=3.0,
            entropy_temperature=0.3,
        )  # fmt: skip
        quantizer = build_quantizer(config)
        out = quantizer(draw_latents())
        distances = torch.cdist(quantizer.tokens(draw_latents()), quantizer.code_vectors()).square()
        p = (-distances / 0.3).softmax(dim=1)
        # A code far away has a probability of zero, and 0 log 0 is 0.
        sample, batch = torch.special.entr(p).sum(dim=1).mean(), -(p.mean(dim=0) * (p.mean(dim=0) + 1e-5).log()).sum()
        assert torch.allclose(out.losses["entropy"], 2 * sample - 3 * batch, rtol=1e-5)
        assert torch.allclose(out.metrics["batch_entropy"], batch, rtol=1e-5)


def test_simvq_codebook_is_frozen_and_comes_from_its_own_seed():
    torch.manual_seed(0)
    first = build_quantizer(SimVQConfig(**SMALL))
    torch.manual_seed(1)
    second = build_quantizer(SimVQConfig(**SMALL))
    assert torch.equal(first.codebook, second.codebook)
    assert not torch.equal(first.projector.weight, second.projector.weight)
    assert not torch.equal(first.codebook, build_quantizer(SimVQConfig(**SMALL, codebook_seed=1)).codebook)
    assert {name for name, _ in first.named_parameters()} == {"projector.weight", "projector.bias"}
    assert "codebook" in first.state_dict()
    expected = first.codebook @ first.projector.weight.t() + first.projector.bias
    assert torch.allclose(first.code_vectors(), expected, atol=1e-6)


# --- Projectors --------------------------------------------------------------


@pytest.mark.parametrize("projector", [LinearProjectorConfig(), BRIDGE])
def test_projectors_start_as_the_identity(projector: LinearProjectorConfig | VQBridgeConfig):
    quantizer = build_quantizer(VQConfig(**SMALL, projector=projector))
    assert torch.equal(quantizer.code_vectors(), quantizer.codebook)
    before = {name: p.detach().clone() for name, p in quantizer.named_parameters()}
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.1)
    quantizer.passthrough = True  # does not move them either: the k-means start finds them as they were
    objective(quantizer(draw_latents()), draw_latents()).backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in quantizer.named_parameters())


def test_vqbridge_trains_every_code_from_few():
    """One image a step, by plain VQ: without a projector the codes that are not selected never move."""
    torch.manual_seed(0)
    for projector, moved in ((None, False), (BRIDGE, True)):
        quantizer = build_quantizer(VQConfig(**SMALL, projector=projector))
        before, used = quantizer.code_vectors().detach(), set()
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            out = quantizer(draw_latents(batch=1)[:, :, :1, :1])
            out.losses["quantization"].backward()
            optimizer.step()
            used |= set(out.codes.flatten().tolist())
        changed = (quantizer.code_vectors() != before).any(dim=1)
        idle = [code for code in range(16) if code not in used]
        assert idle and bool(changed[idle].all()) == moved and bool(changed[idle].any()) == moved


def test_vqbridge_sees_all_groups():
    """Every code depends on every row of the codebook."""
    quantizer = build(VQConfig(**SMALL, projector=BRIDGE)).double()
    jacobian = torch.autograd.functional.jacobian(quantizer.projector, quantizer.codebook.detach())
    assert bool((jacobian.abs().amax(dim=(1, 3)) > 0).all())


# --- Lookup-free kinds -------------------------------------------------------


def test_binary_index_has_channel_0_as_the_least_significant_bit():
    z = torch.tensor([1.0, -1.0, 0.0, 2.0]).view(1, 4, 1, 1)  # zero counts as negative
    for config in (LFQConfig(dim=4), BSQConfig(dim=4)):
        assert int(build_quantizer(config).encode(z)) == 1 + 8


def test_bsq_entropies():
    """The sum over bits is the exact entropy of a token; one group of all bits is that of the batch."""
    config = BSQConfig(dim=4, entropy_temperature=0.3, entropy_group=4)
    quantizer = build_quantizer(config).double()
    z = draw_latents().double()
    p = (2 * quantizer.tokens(z) @ quantizer.code_vectors().t() / 0.3).softmax(dim=1)
    sample, mean = -(p * p.log()).sum(dim=1).mean(), p.mean(dim=0)
    metrics = quantizer(z).metrics
    assert torch.allclose(metrics["sample_entropy"], sample, rtol=1e-12)
    assert torch.allclose(metrics["batch_entropy"], -(mean * (mean + 1e-5).log()).sum(), rtol=1e-12)
    by_group = [
        build_quantizer(dataclasses.replace(config, entropy_group=bits)).double()(z).metrics["batch_entropy"]
        for bits in (4, 2, 1)
    ]
    assert by_group[0] < by_group[1] < by_group[2]  # taking parts for independent can only raise it
    high = (2 / 0.3) * 2 / math.sqrt(4) * quantizer.tokens(z)  # log-odds of each bit
    bits = torch.sigmoid(high).mean(dim=0)
    expected = -(bits * (bits + 1e-5).log() + (1 - bits) * (1 - bits + 1e-5).log()).sum()
    assert torch.allclose(by_group[2], expected, rtol=1e-12)


def test_bsq_entropy_is_finite_where_it_saturates():
    quantizer = build_quantizer(BSQConfig(dim=4, entropy_temperature=1e-5))
    z = draw_latents()
    z[0, :, 0, 0] = 0
    out = quantizer(z.requires_grad_())
    sum(out.losses.values()).backward()
    assert bool(z.grad.isfinite().all()) and all(bool(loss.isfinite()) for loss in out.losses.values())


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3), (7,), (4, 4, 4, 4, 4, 4, 4, 4, 4)])
def test_fsq_levels(levels: tuple[int, ...]):
    quantizer = build_quantizer(FSQConfig(levels=levels))
    assert (quantizer.num_codes, quantizer.dim) == (math.prod(levels), len(levels))
    line = torch.linspace(-20, 20, 4001).expand(len(levels), -1)
    latents = quantizer(line.reshape(1, len(levels), 1, -1)).latents[0, :, 0]
    for channel, count in zip(latents, levels, strict=True):
        half = count // 2
        assert torch.allclose(channel.unique(), (torch.arange(count) - half) / half)
        assert bool((channel.diff() >= 0).all())
    codes = torch.arange(quantizer.num_codes).view(1, 1, -1)
    digits, rest = quantizer.lookup(codes)[0, :, 0], codes.flatten()
    for channel, count in zip(digits, levels, strict=True):  # channel 0 counts fastest
        assert torch.equal(channel, (rest % count - count // 2) / (count // 2))
        rest = rest // count


def test_fsq_bound_of_the_paper():
    """(L - 1) / 2 (1 - 1e-3) tanh(z + tan(o / half)) - o with o = 1/2 for even levels, over floor(L / 2)."""
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for count in (2, 5, 8):
        half, offset = (count - 1) * (1 - 1e-3) / 2, 0.5 if count % 2 == 0 else 0.0
        expected = (torch.tanh(z + math.tan(offset / half)) * half - offset) / (count // 2)
        tokens = build_quantizer(FSQConfig(levels=(count,))).double().tokens(z.view(1, 1, 1, -1))
        assert torch.allclose(tokens.flatten(), expected, rtol=1e-12)
