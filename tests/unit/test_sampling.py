"""Sampling: reproducible images, guidance, greedy decoding, filters and bad settings."""

import math

import pytest
import torch
from support.frequencies import check_frequencies
from support.models import VARIANTS, small_transformer
from torch import Tensor

from ibq.models.transformer import Transformer
from ibq.noise import uniforms
from ibq.sampler import SamplerConfig
from ibq.sampling import decoder_for, filter_logits, pick, sample_codes, sample_rows

# A spread distribution with many codes: a rounding difference would soon show in what is drawn.
SIZES = {"tokens_per_side": 8, "width": 64, "vocab_size": 200}


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return small_transformer(**SIZES)


def images(transformer: Transformer, requests: list[tuple[int, int]], **settings) -> list[Tensor]:
    config = SamplerConfig(**({"rows_per_block": 4} | settings))
    classes, seeds = zip(*requests, strict=True)
    codes = sample_codes(transformer, classes, seeds, config)
    side = transformer.config.tokens_per_side
    assert codes.shape == (len(requests), side, side) and codes.dtype == torch.int64 and codes.is_cpu
    assert codes.min() >= 0 and codes.max() < transformer.config.vocab_size
    return list(codes)


@pytest.mark.parametrize(
    ("variant", "settings", "threads"),
    [
        ("plain", {}, 2),
        ("plain", {"guidance_scale": 1.0}, 1),
        ("plain", {"top_k": 20, "top_p": 0.9, "temperature": 1.3}, 2),
        ("shared_grouped", {}, 2),
    ],
)
def test_an_image_does_not_depend_on_its_company(variant, settings, threads):
    transformer = small_transformer(**SIZES, **VARIANTS[variant])
    image, others = (3, 11), [(i % 5, 100 + i) for i in range(8)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = images(transformer, [image], **settings)[0]
        for position in range(4):
            company = [*others[:position], image, *others[position:3]]
            assert torch.equal(images(transformer, company, **settings)[position], alone)
        # In the second block, which is padded.
        assert torch.equal(images(transformer, [*others[3:8], image], **settings)[5], alone)
        assert torch.equal(images(transformer, [image] * 3, **settings)[2], alone)
    finally:
        torch.set_num_threads(before)


def test_seed_and_class_decide_the_image(transformer):
    first, same, other_seed, other_class = images(transformer, [(1, 5), (1, 5), (1, 6), (2, 5)])
    assert torch.equal(first, same)
    assert not torch.equal(first, other_seed) and not torch.equal(first, other_class)


def test_global_random_state_neither_matters_nor_changes(transformer):
    torch.manual_seed(0)
    expected = images(transformer, [(1, 5)])[0]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(images(transformer, [(1, 5)])[0], expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_guidance_changes_the_image_and_scale_one_is_the_plain_model(transformer):
    request = [(1, 5)]
    plain = images(transformer, request, guidance_scale=1.0, temperature=0)[0]
    guided = images(transformer, request, guidance_scale=3.0, temperature=0)[0]
    assert not torch.equal(plain, guided)
    # Without guidance, greedy codes are the argmax of the teacher-forced logits of the class.
    logits = transformer.logits(plain.flatten()[None], torch.tensor([1]))
    assert torch.equal(logits.argmax(-1)[0], plain.flatten())


def test_guided_logits(transformer):
    codes = images(transformer, [(2, 0)], guidance_scale=3.0, temperature=0)[0].flatten()[None]
    cond = transformer.logits(codes, torch.tensor([2]))
    uncond = transformer.logits(codes, torch.tensor([transformer.null_class]))
    assert torch.equal((uncond + 3.0 * (cond - uncond)).argmax(-1), codes)


def test_scale_zero_ignores_the_class(transformer):
    first, second, null = images(transformer, [(1, 5), (2, 5), (transformer.null_class, 5)], guidance_scale=0.0)
    assert torch.equal(first, second) and torch.equal(first, null)


def test_greedy_equals_top_k_one_and_top_p_zero(transformer):
    requests = [(1, 5), (2, 6)]
    greedy = images(transformer, requests, temperature=0)
    for settings in ({"top_k": 1}, {"top_p": 0.0}):
        for actual, expected in zip(images(transformer, requests, **settings), greedy, strict=True):
            assert torch.equal(actual, expected)
    assert not torch.equal(images(transformer, requests)[0], greedy[0])


def test_codes_are_drawn_from_the_model():
    """Frequencies of the first code over many seeds, with temperature and guidance, against probabilities."""
    transformer = small_transformer(tokens_per_side=1, vocab_size=8)
    draws, temperature, scale = 4000, 1.5, 2.0
    config = SamplerConfig(guidance_scale=scale, temperature=temperature, rows_per_block=500)
    codes = sample_codes(transformer, [1] * draws, range(draws), config).flatten()
    any_codes = torch.zeros(2, 1, dtype=torch.int64)
    with torch.no_grad():
        cond, uncond = transformer.logits(any_codes, torch.tensor([1, transformer.null_class]))[:, 0]
    expected = ((uncond + scale * (cond - uncond)) / temperature).softmax(-1)
    deviation = (expected * (1 - expected) / draws).sqrt()
    frequencies = codes.bincount(minlength=8) / draws
    assert ((frequencies - expected).abs() < 5 * deviation + 1e-3).all()


DRAWS = 2_000_000


@pytest.mark.parametrize("codes", [16_384, 262_144])
@pytest.mark.parametrize(
    ("spread", "filters"), [(1.0, {}), (3.0, {}), (40.0, {}), (3.0, {"top_k": 1000}), (3.0, {"top_p": 0.9})], ids=str
)
def test_two_million_draws_follow_their_probabilities(codes, spread, filters):
    """Extreme logits too."""
    generator = torch.Generator().manual_seed(codes)
    logits = filter_logits(torch.randn(1, codes, generator=generator) * spread, **filters)
    drawn = pick(logits, uniforms(range(DRAWS // 1000), 1000, "cpu").reshape(1, -1))
    check_frequencies(drawn, logits[0])


def test_the_edges_of_the_distribution():
    """The smallest and the largest number find codes that can be drawn, also where the first and last cannot."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    numbers = torch.tensor([[2.0**-53, 0.26894, 0.26895, 1 - 2.0**-53]], dtype=torch.float64)
    assert pick(logits, numbers).tolist() == [[1, 1, 3, 3]]


def test_unlikely_codes_behind_a_likely_one_are_drawn():
    """100,000 codes of 1e-8 each share the last thousandth: sums in float32 would pass over nine of ten."""
    logits = torch.full((1, 100_001), math.log(1e-8))
    logits[0, 0] = 0.0
    total = 1 + 1e-3
    middles = (1 + 1e-8 * (torch.arange(100_000, dtype=torch.float64) + 0.5)) / total
    drawn = pick(logits, middles[None])[0]
    assert (drawn - torch.arange(1, 100_001)).abs().max() <= 1


def test_float64_and_autocast(transformer):
    requests = [(1, 5), (2, 6)]
    expected = images(transformer, requests, temperature=0)
    double = small_transformer(**SIZES).double()
    assert torch.equal(torch.stack(images(double, requests, temperature=0)), torch.stack(expected))
    with torch.autocast("cpu", torch.bfloat16):
        first, again = (images(transformer, requests)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_mode_is_restored_and_dropout_stays_off():
    transformer = small_transformer(**SIZES, residual_dropout=0.5, class_dropout=0.5)
    expected = images(transformer, [(1, 5)])[0]
    transformer.train()
    assert torch.equal(images(transformer, [(1, 5)])[0], expected)
    assert transformer.training and transformer.blocks[0].training


def test_progress_and_no_request(transformer):
    calls = []
    config = SamplerConfig(rows_per_block=2)
    sample_codes(transformer, [0, 1, 2], [0, 1, 2], config, lambda done, total: calls.append((done, total)))
    assert calls == [(2, 3), (3, 3)]
    assert sample_codes(transformer, [], [], config).shape == (0, 8, 8)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0, "top_p": 0.9}])
def test_watched_row_by_row_the_image_is_the_same(transformer, settings):
    config = SamplerConfig(rows_per_block=4, **settings)
    expected = sample_codes(transformer, [1, 2, 3], [5, 6, 7], config)
    seen = list(sample_rows(decoder_for(transformer, config), [1, 2, 3], [5, 6, 7], config))
    assert [codes.shape for codes in seen] == [(3, rows, 8) for rows in range(1, 9)]
    assert all(torch.equal(codes, expected[:, : codes.shape[1]]) for codes in seen)
    assert not seen[0].is_inference() and torch.is_grad_enabled()


@pytest.mark.parametrize("classes", [[], [1] * 5])
def test_only_one_block_is_watched(transformer, classes):
    with pytest.raises(ValueError, match="give 1 to 4"):
        next(sample_rows(transformer, classes, classes, SamplerConfig(rows_per_block=4)))


def test_filters_work_row_by_row():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 3
    for settings in ((5, 1.0), (0, 0.8), (10, 0.8), (0, 0.0)):
        filtered = filter_logits(logits, *settings)
        for row in range(6):
            assert torch.equal(filter_logits(logits[row], *settings), filtered[row])
        assert torch.equal(filtered.argmax(-1), logits.argmax(-1))
    assert torch.equal(filter_logits(logits), logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale: -1.0 .*use 0 or more"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"temperature": -0.1}, "temperature: -0.1 .*greedy"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k: -1 is negative"),
        ({"top_p": 1.5}, "top_p: 1.5 is not a probability"),
        ({"top_p": float("nan")}, "top_p"),
        ({"rows_per_block": 0}, "rows_per_block: 0 .*at least 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**settings)


@pytest.mark.parametrize(
    ("classes", "seeds", "message"),
    [
        ([0, 1], [0], "seeds: 1 for 2 classes; give one seed per image"),
        ([6], [0], "classes: 6 is out of range; use 0 to 4, or 5 for no class"),
        ([-1], [0], "classes: -1 is out of range"),
        ([0], [-1], "seeds: -1 is out of range"),
        ([0], [2**63], "seeds: .*out of range"),
    ],
)
def test_bad_requests(transformer, classes, seeds, message):
    with pytest.raises(ValueError, match=message):
        sample_codes(transformer, classes, seeds, SamplerConfig())
