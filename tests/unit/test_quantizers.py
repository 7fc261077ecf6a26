"""One contract for every quantizer; what belongs to one kind only is in test_quantizer_kinds.py."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import run_ranks
from support.quantizer import KINDS, Kind, build, draw_latents, objective
from support.training import checkpoint_tensors, make_workplace, train_here
from torch import Tensor
from torch.nn import functional as F

from ibq import load_tokenizer
from ibq.config import config_to_dict, dump_config, parse_config
from ibq.evaluation.reconstruction import CodeUsage, effective_rank
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.quantizers import QuantizerConfig, build_quantizer
from ibq.quantizers.base import Quantizer


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def config(kind: Kind) -> QuantizerConfig:
    return kind.config


@pytest.fixture
def quantizer(config: QuantizerConfig) -> Quantizer:
    return build(config)


def test_shapes_and_types(config: QuantizerConfig, quantizer: Quantizer):
    assert (quantizer.num_codes, quantizer.dim) == (config.num_codes, config.dim)
    assert config.kind and quantizer.mean_over_ranks is None
    z = draw_latents().requires_grad_()
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


def test_usage_and_effective_rank(quantizer: Quantizer):
    codes = quantizer.encode(draw_latents())
    usage = CodeUsage(quantizer.num_codes)
    usage.add(codes)
    statistics = usage.figures()
    assert statistics["usage"] == len(codes.unique()) / quantizer.num_codes
    assert 1 < statistics["perplexity"] <= len(codes.unique()) + 1e-9
    vectors = quantizer.code_vectors()
    assert vectors.shape == (quantizer.num_codes, quantizer.dim)
    assert 1 < effective_rank(vectors.detach()[usage.used()]) <= quantizer.dim + 1e-9


@pytest.mark.parametrize("what", ["latents", "losses"])
def test_gradients_reach_the_input_and_the_codes(kind: Kind, quantizer: Quantizer, what: str):
    z = draw_latents().requires_grad_()
    out = quantizer(z)
    scalar = (out.latents * draw_latents(seed=2)).sum() if what == "latents" else sum(out.losses.values())
    scalar.backward()
    if what == "latents" or kind.losses_pull:
        assert bool((z.grad != 0).flatten(2).any(dim=1).all()), "a token without gradient"
    else:
        assert int(z.grad.count_nonzero()) == 0
    reached = kind.from_latents if what == "latents" else kind.from_losses
    gradient = dict(quantizer.named_parameters()).get("codebook", torch.empty(0)).grad
    rows = set() if gradient is None else set(gradient.abs().sum(dim=1).nonzero().flatten().tolist())
    used, every = set(out.codes.flatten().tolist()), set(range(quantizer.num_codes))
    assert used != every, "the case must leave some codes unused"
    assert rows == {"every code": every, "codes in use": used, "no code": set()}[reached]


def test_every_parameter_gets_a_gradient(quantizer: Quantizer):
    """Data parallelism waits for all of them."""
    for passthrough in (False, quantizer.learned_codebook):
        quantizer.zero_grad()
        quantizer.passthrough = passthrough
        objective(quantizer(draw_latents().requires_grad_()), draw_latents(seed=2)).backward()
        for name, parameter in quantizer.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
            assert passthrough or int(parameter.grad.count_nonzero()) > 0, name


def test_each_loss_reaches_the_input(kind: Kind, quantizer: Quantizer):
    z = draw_latents().requires_grad_()
    losses = quantizer(z).losses
    assert "quantization" in losses and losses.keys() <= {"quantization", "entropy"}
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        assert (float(gradient.abs().max()) > 0) == kind.losses_pull, name


def test_straight_through_gradient_of_the_latents(kind: Kind, quantizer: Quantizer):
    """Where the codes get none of it, the decoder's gradient goes to the tokens as it is."""
    if kind.from_latents == "every code":
        return  # index backpropagation has its own, which the golden data tests
    z, upstream = draw_latents().requires_grad_(), draw_latents(seed=2)
    (gradient,) = torch.autograd.grad((quantizer(z).latents * upstream).sum(), z)
    tokens = quantizer.tokens(z)
    (expected,) = torch.autograd.grad((tokens * upstream.permute(0, 2, 3, 1).reshape(tokens.shape)).sum(), z)
    assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-7)


def test_passthrough_hands_on_the_latents(quantizer: Quantizer):
    """Only kinds that can be initialised from latents have it."""
    z = draw_latents().requires_grad_()
    codes = quantizer(z).codes
    quantizer.passthrough = quantizer.learned_codebook
    if not quantizer.learned_codebook:
        assert "codebook" not in dict(quantizer.named_parameters())
        return
    out = quantizer(z)
    rows = out.latents.permute(0, 2, 3, 1).reshape(-1, quantizer.dim)
    assert torch.equal(rows, quantizer.tokens(z)) and torch.equal(out.codes, codes)
    assert all(float(loss.detach()) == 0 for loss in out.losses.values())
    assert float(torch.autograd.grad(out.latents.square().sum(), z)[0].abs().max()) > 0 or quantizer.spherical


def test_a_codebook_from_tokens_is_what_the_codes_stand_for(config: QuantizerConfig):
    """As k-means does it, before anything was trained: projectors start as the identity."""
    quantizer = build_quantizer(config)
    if quantizer.learned_codebook:
        tokens = quantizer.tokens(draw_latents())[: quantizer.num_codes]
        with torch.no_grad():
            quantizer.codebook.copy_(tokens)
        assert torch.allclose(quantizer.code_vectors(), tokens, rtol=1e-6)


def test_unit_vectors_where_a_kind_is_spherical(quantizer: Quantizer):
    lengths = quantizer.tokens(draw_latents()).norm(dim=1), quantizer.code_vectors().norm(dim=1)
    ones = [torch.allclose(x, torch.ones_like(x), atol=1e-6) for x in lengths]
    assert ones[0] == quantizer.spherical
    assert ones[1] or not quantizer.spherical


def test_codes_are_the_nearest(config: QuantizerConfig, quantizer: Quantizer):
    """All kinds but IBQ, whose similarity is the inner product, take the code at the smallest distance."""
    tokens, codes = quantizer.tokens(draw_latents()), quantizer.code_vectors()
    if getattr(config, "normalize", "") == "search":
        tokens, codes = F.normalize(tokens, dim=1), F.normalize(codes, dim=1)
    similarity = tokens @ codes.t() if config.kind == "ibq" else -torch.cdist(tokens, codes)
    assert torch.equal(quantizer.encode(draw_latents()).flatten(), similarity.argmax(dim=1))


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
    with torch.device("meta"):
        bare = build_quantizer(config)
    bare.load_state_dict(quantizer.state_dict(), strict=True, assign=True)
    assert torch.equal(bare(draw_latents()).latents, quantizer(draw_latents()).latents)
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


def test_batch_statistics_over_ranks_are_those_of_the_whole_batch(kind: Kind, config: QuantizerConfig):
    """Two ranks in turn: the mean of the ranks' losses is that of the joint batch."""
    quantizer = build(config).double()
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

    assert bool(statistics(halves[0])) == kind.over_batch
    joint = losses(torch.cat(halves), None)
    ranks = [losses(half, statistics(other)) for half, other in (halves, halves[::-1])]
    for name, expected in joint.items():
        assert torch.allclose((ranks[0][name] + ranks[1][name]) / 2, expected, rtol=1e-12), name


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    path = tmp_path_factory.mktemp("ranks") / "result"
    result = run_ranks(2, "tests/workers/quantizer_worker.py", path)
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(f"{path}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_equal_one(of_two_ranks: dict[str, Tensor], name: str):
    quantizer = build(KINDS[name].config).double()
    z, upstream = (draw_latents(batch=4, seed=seed).double() for seed in (1, 2))
    out = quantizer(z.requires_grad_())
    objective(out, upstream).backward()
    expected = {f"loss/{key}": loss.detach() for key, loss in out.losses.items()}
    expected |= {f"metric/{key}": value for key, value in out.metrics.items()}
    expected |= {f"gradient/{key}": parameter.grad for key, parameter in quantizer.named_parameters()}
    expected |= {"gradient/z": z.grad, "codes": out.codes, "latents": out.latents.detach()}
    found = {k.removeprefix(f"{name}/"): v for k, v in of_two_ranks.items() if k.startswith(f"{name}/")}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = max(1e-3, float(value.abs().max()))
        assert float((found[key] - value).abs().max()) <= 1e-9 * scale, key


def test_the_tokenizer_around_it(config: QuantizerConfig):
    """Images to codes to images, in the precision that the model has."""
    model = TokenizerConfig(
        resolution=16, channels=32, channel_multipliers=(1, 1), res_blocks=1, attention_resolutions=(),
        latent_channels=8, quantizer=config,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = Tokenizer(model).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    for dtype in (torch.float32, torch.float64):
        tokenizer.to(dtype)
        codes = tokenizer.encode(images.to(dtype))
        assert codes.shape == (2, 8, 8)
        with torch.no_grad():
            reconstruction = tokenizer(images.to(dtype)).reconstruction
        assert torch.equal(tokenizer.decode(codes), reconstruction) and reconstruction.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tokenizer.float()(images)
        assert torch.equal(tokenizer.encode(images), out.codes)


def test_kinds_that_do_not_exist():
    with pytest.raises(ValueError, match="object"):
        build_quantizer(object())


# --- In training -------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("quantizers"))


def train(place: Path, output: Path, config: QuantizerConfig, *overrides: str) -> int:
    settings = f"model.quantizer={config_to_dict(config)}".replace("None", "null").replace("False", "false")
    return train_here(
        "tokenizer",
        ["--config", str(place / "tokenizer.yaml"), f"output={output}", settings.replace("True", "true"), *overrides],
    )


def test_settings_survive_yaml(config: QuantizerConfig):
    model = TokenizerConfig(quantizer=config)
    assert parse_config(TokenizerConfig, config_to_dict(model)) == model
    assert f"kind: {config.kind}" in dump_config(model)


TRAINED = ["ibq-vqbridge", "vq", "vq-llamagen-entropy", "vq-linear", "simvq", "lfq", "bsq", "fsq"]


@pytest.mark.parametrize("name", TRAINED)
def test_training_writes_a_tokenizer(place: Path, tmp_path: Path, name: str):
    config = KINDS[name].config
    start = ["codebook_start={kmeans: true, warmup_steps: 1, images: 20}"] if build(config).learned_codebook else []
    assert train(place, tmp_path / "run", config, "training.max_steps=2", *start) == 0
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer.config.quantizer == config
    codes = tokenizer.encode(torch.zeros(1, 3, 16, 16))
    assert bool(tokenizer.decode(codes).isfinite().all())


@pytest.mark.parametrize("name", ["simvq", "lfq", "bsq", "fsq"])
def test_kmeans_without_a_trained_codebook(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str):
    config = KINDS[name].config
    assert train(place, tmp_path / "run", config, "codebook_start.kmeans=true") == 2
    error = capsys.readouterr().err
    assert f"codebook_start.kmeans: model.quantizer.kind {name} has no trained codebook" in error


def test_a_frozen_codebook_is_the_same_after_going_on(place: Path, tmp_path: Path):
    """It is in no checkpoint."""
    config = KINDS["simvq"].config
    assert train(place, tmp_path / "whole", config) == 0
    assert train(place, tmp_path / "parts", config, "training.max_steps=2") == 0
    assert train(place, tmp_path / "parts", config, "training.max_steps=4") == 0
    whole, parts = (checkpoint_tensors(tmp_path / name, 4) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
