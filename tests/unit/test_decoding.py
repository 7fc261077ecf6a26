"""Decoding: every precision against the plain forward pass, guidance over the image, packed layers."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.models import VARIANTS, decoder_inputs, small_transformer
from torch import nn

from ibq.config import UserError
from ibq.decoding import DTYPES, Decoder, PackedLinear, settle
from ibq.engine.compilation import compile_units
from ibq.models.heads import BitsHeadConfig, MaskedBitsHeadConfig
from ibq.models.transformer import TransformerConfig
from ibq.ops.backend import missing_for_compile, triton_is_installed
from ibq.sampler import SCHEDULES, SamplerConfig
from ibq.sampling import sample_codes

ROWS = 3
SIZES = {"tokens_per_side": 4, "width": 64, "vocab_size": 200}
# KL from float32 in nats, for logits with a spread of about one.
LARGEST_KL = {"fp32": 1e-9, "bf16": 1e-3}


def spread_transformer(**overrides):
    """One whose logits have a spread of about one, so that differences mean the same for all."""
    found = small_transformer(**SIZES, **overrides)
    with torch.no_grad():
        found.head.weight.div_(found.logits(*random_request(found)).std())
    return found


@pytest.fixture(params=VARIANTS)
def transformer(request):
    return spread_transformer(**VARIANTS[request.param])


def forced(decoder: Decoder, codes: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Logits [rows, T, V] of given codes, one step after the other."""
    condition, cache = decoder.condition(classes), decoder.new_cache()
    inputs = decoder_inputs(decoder, condition, codes, cache.grid)
    return torch.stack([decoder.step(x, condition, cache, i) for i, x in enumerate(inputs)], dim=1)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(exact || other) in nats of what logits say."""
    exact, other = (logits.double().log_softmax(-1) for logits in (exact, other))
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def random_request(transformer):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(transformer.config.vocab_size, (ROWS, transformer.config.num_tokens), generator=generator)
    return codes, torch.arange(ROWS)


@torch.no_grad()
@pytest.mark.parametrize("precision", LARGEST_KL)
def test_every_precision_follows_the_forward_pass(transformer, precision):
    codes, classes = random_request(transformer)
    exact = transformer.logits(codes, classes)
    found = forced(Decoder(transformer, precision, ROWS), codes, classes)
    assert found.dtype == DTYPES[precision] and found.shape == exact.shape
    assert -1e-12 < divergence(exact, found) < LARGEST_KL[precision]
    if precision == "fp32":
        assert (found - exact).abs().max() < 1e-5


@torch.no_grad()
def test_greedy_codes_are_those_of_the_forward_pass(transformer):
    """Code by code by the whole forward pass, with the guidance on."""
    classes = [0, 2]
    drawn = sample_codes(transformer, classes, [0, 0], SamplerConfig(temperature=0, guidance_scale=1.5)).flatten(1)
    labels = torch.tensor([*classes, transformer.null_class, transformer.null_class])
    codes = torch.zeros(2, transformer.config.num_tokens, dtype=torch.int64)
    for position in range(transformer.config.num_tokens):
        cond, uncond = transformer.logits(codes.repeat(2, 1), labels)[:, position].chunk(2)
        codes[:, position] = (uncond + 1.5 * (cond - uncond)).argmax(-1)
    assert torch.equal(codes, drawn)


def test_modulations_are_computed_once_an_image(monkeypatch):
    transformer = small_transformer(**SIZES)
    calls = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(self) or forward(self, x))
    sample_codes(transformer, [0, 1], [0, 1], SamplerConfig(rows_per_block=2))
    # One for each block and one for the head; all other layers are packed ones.
    assert len(calls) == transformer.config.depth + 1


def test_the_transformer_stays_as_it_is(transformer):
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    for precision in LARGEST_KL:
        Decoder(transformer, precision, 2)
    after = transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_weights_that_a_step_reads(transformer):
    config = transformer.config
    read = [p for block in transformer.blocks for m in (block.attention, block.feed_forward) for p in m.parameters()]
    count = sum(p.numel() for p in read) + config.vocab_size * config.width
    found = {precision: Decoder(transformer, precision, 2).weight_bytes() for precision in LARGEST_KL}
    assert found == {"fp32": 4 * count, "bf16": 2 * count}


@pytest.mark.parametrize("head", [BitsHeadConfig(), MaskedBitsHeadConfig(layers=1)])
def test_weights_of_a_head_of_bits(head):
    transformer = small_transformer(vocab_size=64, head=head)
    blocks = [p for block in transformer.blocks for m in (block.attention, block.feed_forward) for p in m.parameters()]
    count = sum(p.numel() for p in [*blocks, *transformer.head.parameters()])
    assert Decoder(transformer, "bf16", 2).weight_bytes() == 2 * count


def test_an_unknown_precision(transformer):
    with pytest.raises(ValueError, match="'fp8' does not exist; use one of auto, fp32, bf16"):
        Decoder(transformer, "fp8", 1)


def test_no_compiler(transformer, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"^engine.compile: no C\+\+ compiler .*, or set engine.compile=false$"):
        compile_units(transformer, True, torch.device("cpu"))
    if triton_is_installed():  # which builds a module in C
        assert missing_for_compile("cuda") == "no C compiler was found; install gcc"
        (tmp_path / "clang").touch(mode=0o755)
        assert missing_for_compile("cuda") == ""
        monkeypatch.setenv("CC", "icx")
        assert missing_for_compile("cuda")
    else:
        assert missing_for_compile("cuda") == "triton is not installed; pip install triton"


# --- Layers ---


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_are_linear_ones(rows, bias, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(96, 200, bias=bias).to(dtype)
    packed = PackedLinear(layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), rows)
    x = torch.randn(rows, 1, 96, dtype=dtype)
    expected = layer(x).float()
    assert packed(x).dtype == dtype
    assert (packed(x).float() - expected).abs().max() <= {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype] * 4


# --- Guidance ---


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [3, 3, 3, 3, 3]),
        ("linear", [1, 1.5, 2, 2.5, 3]),
        ("cosine", [1, 2 - math.sqrt(0.5), 2, 2 + math.sqrt(0.5), 3]),
        ("power-cosine", [1, *(2 - math.cos(math.pi * t**2) for t in (0.25, 0.5, 0.75)), 3]),
        ("interval", [1, 3, 3, 1, 1]),
    ],
)
def test_guidance_by_hand(schedule, expected):
    config = SamplerConfig(
        guidance_scale=3.0, guidance_schedule=schedule, guidance_power=2.0, guidance_interval=(0.2, 0.5)
    )
    assert config.scales(5) == pytest.approx(expected)


def test_guidance_of_every_schedule_is_used():
    transformer = small_transformer(**SIZES)
    drawn = {}
    for schedule in SCHEDULES:
        config = SamplerConfig(guidance_scale=6.0, guidance_schedule=schedule, guidance_interval=(0.5, 1.0))
        drawn[schedule] = tuple(sample_codes(transformer, [0] * 4, range(4), config).flatten().tolist())
    assert len(set(drawn.values())) == len(SCHEDULES)
    assert SamplerConfig(guidance_scale=4.0, guidance_schedule="linear").scales(1) == [1.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guidance_schedule": "sine"}, "'sine' does not exist; use one of constant, linear"),
        ({"guidance_power": 0.0}, "guidance_power: 0.0 is not positive"),
        ({"guidance_interval": (0.6, 0.5)}, "guidance_interval: 0.6 to 0.5 is no part of the image"),
        ({"precision": "fp8"}, "precision: 'fp8' does not exist"),
        (
            {"precision": "int8"},
            "precision: int8 is gone, as it was slower than bf16",
        ),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError) as caught:
        SamplerConfig(**settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(("gib", "guidance", "rows"), [(139, 2.0, 256), (24, 2.0, 256), (12, 2.0, 128), (12, 1.0, 256)])
def test_rows_follow_from_the_memory_of_a_gpu(gib, guidance, rows, monkeypatch):
    """For the B model, whose image takes 34 MB of keys and values with guidance in bf16."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib * 2**30))
    config = SamplerConfig(guidance_scale=guidance)
    found = settle(config, TransformerConfig(), torch.device("cuda"))
    assert (found.rows_per_block, found.precision) == (rows, "bf16")
    fixed = settle(replace(config, rows_per_block=3, precision="fp32"), None, torch.device("cuda"))
    assert (fixed.rows_per_block, fixed.precision) == (3, "fp32")


def test_the_settings_of_the_cpu():
    config = SamplerConfig()
    found = settle(config, TransformerConfig(), torch.device("cpu"))
    assert (found.rows_per_block, found.precision, found.rows) == (16, "fp32", 32)
    with pytest.raises(ValueError, match="rows_per_block: auto is no number yet"):
        config.rows  # noqa: B018
