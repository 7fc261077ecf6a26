"""One contract for every quantizer, and what belongs to one kind only."""

import dataclasses

import pytest
import torch
from torch import Tensor

from ibq.ops.textbook import index_backprop
from ibq.quantizers import IBQConfig, QuantizerConfig, build_quantizer
from ibq.quantizers.base import Quantizer

# One small configuration of every kind: 16 codes of 4 dimensions.
KINDS = {
    "ibq": IBQConfig(num_codes=16, dim=4, entropy_temperature=0.5),
    "ibq-uniform": IBQConfig(num_codes=16, dim=4, entropy_temperature=0.5, init="uniform", init_scale=0.5),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def config(request: pytest.FixtureRequest) -> QuantizerConfig:
    return request.param


@pytest.fixture
def quantizer(config: QuantizerConfig) -> Quantizer:
    torch.manual_seed(0)
    return build_quantizer(config)


def draw_latents(dim: int = 4, batch: int = 3) -> Tensor:
    return torch.randn(batch, dim, 5, 2, generator=torch.Generator().manual_seed(1))


# --- The contract ------------------------------------------------------------


def test_shapes_and_types(config: QuantizerConfig, quantizer: Quantizer):
    assert (quantizer.num_codes, quantizer.dim) == (config.num_codes, config.dim)
    assert config.kind and quantizer.mean_over_ranks is None
    z = draw_latents()
    out = quantizer(z)
    assert out.latents.shape == z.shape and out.latents.dtype == z.dtype
    assert out.codes.shape == (3, 5, 2) and out.codes.dtype == torch.int64
    assert int(out.codes.min()) >= 0 and int(out.codes.max()) < config.num_codes
    assert out.losses and all(loss.shape == () and loss.requires_grad for loss in out.losses.values())
    assert all(value.shape == () and not value.requires_grad for value in out.metrics.values())


def test_lookup_of_the_codes_is_the_latents(quantizer: Quantizer):
    out = quantizer(draw_latents())
    assert torch.equal(quantizer.lookup(out.codes), out.latents)
    assert len(out.codes.unique()) > 1


def test_encode_gives_the_codes_without_a_graph(quantizer: Quantizer):
    z = draw_latents().requires_grad_()
    codes = quantizer.encode(z)
    assert torch.equal(codes, quantizer(z).codes) and not codes.requires_grad


def test_every_code_can_be_looked_up(quantizer: Quantizer):
    codes = torch.arange(quantizer.num_codes).view(1, 4, -1)
    latents = quantizer.lookup(codes)
    assert latents.shape == (1, quantizer.dim, 4, quantizer.num_codes // 4)
    rows = latents.permute(0, 2, 3, 1).reshape(-1, quantizer.dim)
    assert len(rows.unique(dim=0)) == quantizer.num_codes


@pytest.mark.parametrize("what", ["latents", "losses"])
def test_gradients_reach_the_input_and_every_code(quantizer: Quantizer, what: str):
    z = draw_latents().requires_grad_()
    out = quantizer(z)
    scalar = (out.latents * draw_latents()).sum() if what == "latents" else sum(out.losses.values())
    scalar.backward()
    assert bool((z.grad != 0).flatten(2).any(dim=1).all()), "a token without gradient"
    unused = set(range(quantizer.num_codes)) - set(out.codes.flatten().tolist())
    assert unused, "the case must leave some codes unused"
    for name, parameter in quantizer.named_parameters():
        assert bool(parameter.grad.isfinite().all()), name
        rows = parameter.grad.flatten(1).abs().sum(dim=1)
        assert bool((rows > 0).all()), f"{name}: codes {rows.eq(0).nonzero().flatten().tolist()} get no gradient"


def test_each_loss_reaches_the_input(quantizer: Quantizer):
    z = draw_latents().requires_grad_()
    for name, loss in quantizer(z).losses.items():
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        assert float(gradient.abs().max()) > 0, name


def test_images_are_quantized_independently(quantizer: Quantizer):
    z = draw_latents()
    together = quantizer(z)
    for i in range(len(z)):
        alone = quantizer(z[i : i + 1])
        assert torch.equal(alone.codes, together.codes[i : i + 1])
        assert torch.equal(alone.latents, together.latents[i : i + 1])


def test_memory_format_does_not_matter(quantizer: Quantizer):
    z = draw_latents()
    plain, other = quantizer(z), quantizer(z.contiguous(memory_format=torch.channels_last))
    assert torch.equal(plain.codes, other.codes) and torch.equal(plain.latents, other.latents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_quantized_in_float32(quantizer: Quantizer, dtype: torch.dtype):
    z = draw_latents().to(dtype)
    expected = quantizer(z.float())
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = quantizer(z)
        assert torch.equal(out.codes, expected.codes)
        for name, loss in expected.losses.items():
            assert out.losses[name].dtype == torch.float32
            assert torch.equal(out.losses[name], loss), name


def test_double_precision_stays(quantizer: Quantizer):
    out = quantizer.double()(draw_latents().double())
    values = (out.latents, *out.losses.values(), *out.metrics.values())
    assert {value.dtype for value in values} == {torch.float64}


def test_state_is_complete(config: QuantizerConfig, quantizer: Quantizer):
    torch.manual_seed(7)
    other = build_quantizer(config)
    other.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(other(draw_latents()).latents, quantizer(draw_latents()).latents)


def test_wrong_dimension_names_the_remedy(quantizer: Quantizer):
    for call in (quantizer, quantizer.encode):
        with pytest.raises(ValueError, match=r"\[B, 4, h, w\].*set the quantizer's `dim`"):
            call(draw_latents(dim=5))
        with pytest.raises(ValueError, match=r"\[B, 4, h, w\]"):
            call(draw_latents()[0])


@pytest.mark.parametrize("shape", [(0, 4, 5, 2), (2, 4, 0, 2)])
def test_empty_batch_names_the_remedy(quantizer: Quantizer, shape: tuple[int, ...]):
    for call in (quantizer, quantizer.encode):
        with pytest.raises(ValueError, match=r"empty.*give at least one image"):
            call(torch.zeros(shape))


@pytest.mark.parametrize("code", [-1, 16, 10**9])
def test_codes_out_of_range(quantizer: Quantizer, code: int):
    with pytest.raises(ValueError, match=r"16 codes.*another tokenizer"):
        quantizer.lookup(torch.full((1, 2, 2), code))


@pytest.mark.parametrize("codes", [torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, 2, 2)])
def test_codes_of_another_shape_or_type(quantizer: Quantizer, codes: Tensor):
    with pytest.raises(ValueError, match=r"integers of shape \[B, h, w\]"):
        quantizer.lookup(codes)


def test_batch_statistics_over_ranks_are_those_of_the_whole_batch(config: QuantizerConfig):
    """Two ranks in turn: the mean of the ranks' losses and gradients is that of the joint batch."""
    torch.manual_seed(0)
    quantizer = build_quantizer(config).double()
    halves = draw_latents(batch=4).double().chunk(2)

    def statistics(z: Tensor) -> list[Tensor]:
        seen = []
        quantizer.mean_over_ranks = lambda value: seen.append(value.detach()) or value
        quantizer(z)
        return seen

    def losses(z: Tensor, others: list[Tensor] | None) -> dict[str, Tensor]:
        remaining = iter(others or [])
        mean = None if others is None else lambda value: (value + next(remaining)) / 2
        quantizer.mean_over_ranks = mean
        return quantizer(z).losses

    joint = losses(torch.cat(halves), None)
    ranks = [losses(half, statistics(other)) for half, other in (halves, halves[::-1])]
    for name, expected in joint.items():
        assert torch.allclose((ranks[0][name] + ranks[1][name]) / 2, expected, rtol=1e-12), name


def test_kinds_that_do_not_exist():
    with pytest.raises(ValueError, match="object"):
        build_quantizer(object())


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
    ],
)
def test_ibq_settings_that_cannot_work(field: str, value: object):
    with pytest.raises(ValueError, match=f"^{field}: .*; "):
        dataclasses.replace(KINDS["ibq"], **{field: value})


def test_ibq_initialisation():
    torch.manual_seed(0)
    normal = build_quantizer(IBQConfig(num_codes=512, dim=32, init_scale=0.3)).codebook.detach()
    assert float(normal.std()) == pytest.approx(0.3, rel=0.02) and float(normal.abs().max()) > 0.9
    uniform = build_quantizer(IBQConfig(num_codes=512, dim=32, init="uniform", init_scale=0.3)).codebook.detach()
    assert float(uniform.abs().max()) <= 0.3 and float(uniform.std()) == pytest.approx(0.3 / 3**0.5, rel=0.02)


def test_ibq_lowest_code_wins_a_tie():
    quantizer = build_quantizer(KINDS["ibq"])
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
