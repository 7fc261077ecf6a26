"""Heads for large vocabularies: likelihoods against formulas written out, draws against likelihoods, settings."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from support.models import small_transformer
from torch import Tensor

import ibq
from ibq.config import ConfigError, UserError, parse_config
from ibq.decoding import Decoder
from ibq.engine import compilation
from ibq.models import heads
from ibq.models.heads import (
    BitsHeadConfig,
    FactorisedHeadConfig,
    HeadConfig,
    MaskedBitsHeadConfig,
    PlainHeadConfig,
    bits_in,
    draw_masks,
    join,
    split,
)
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.noise import uniforms
from ibq.quantizers import LFQConfig, build_quantizer
from ibq.sampler import SamplerConfig
from ibq.sampling import draw, sample_codes
from ibq.training.ar_config import ARRunConfig

CODES, BITS = 64, 6
HEADS: dict[str, HeadConfig] = {
    "plain": PlainHeadConfig(),
    "factorised": FactorisedHeadConfig(),
    "three sub-codes": FactorisedHeadConfig(sub_codes=(2, 8, 4), layers=1),
    "bits": BitsHeadConfig(),
    "masked bits": MaskedBitsHeadConfig(layers=2, width=24, steps=4),
}
NEW = [name for name in HEADS if name != "plain"]
SIZE = {"vocab_size": CODES, "num_classes": 3, "tokens_per_side": 3, "depth": 2, "heads": 2, "width": 16}


def model_of(name: str, seed: int = 0, **settings) -> Transformer:
    return small_transformer(seed, **SIZE | {"head": HEADS[name]} | settings)


def request(rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, classes, orders."""
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(9, generator=generator) for _ in range(rows)])
    return torch.randint(CODES, (rows, 3, 3), generator=generator), torch.arange(rows), order


# --- Digits ---


def test_digits_are_those_of_lookup_free_codes():
    codes, quantizer = torch.arange(CODES), build_quantizer(LFQConfig(dim=BITS))
    signs = quantizer.lookup(codes[:, None, None])[:, :, 0, 0]
    bits = bits_in(codes, BITS)
    assert torch.equal(2 * bits - 1, signs.long()) and torch.equal(join(bits.unbind(-1), (2,) * BITS), codes)
    digits = split(codes, (4, 16))  # Open-MAGVIT2: the first channels are the first sub-code, each from its own bit 0
    assert torch.equal(digits, torch.stack([join(bits[:, :2].unbind(-1), (2, 2)), codes // 4], dim=-1))
    assert torch.equal(join(digits.unbind(-1), (4, 16)), codes)


def test_sizes_of_the_published_codes():
    assert FactorisedHeadConfig().digits(2**18) == (64, 4096)
    assert BitsHeadConfig().digits(2**18) == (2,) * 18
    groups = MaskedBitsHeadConfig().groups(18)
    assert [group.stop - group.start for group in groups] == [4, 5, 4, 5] and groups[-1].stop == 18


# --- Likelihoods ---


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
def test_probabilities_of_all_codes_add_up_to_one(name):
    """Of the last code, whatever the others are."""
    model = model_of(name).double()
    codes = request()[0][:1].expand(CODES, -1, -1).clone()
    codes[:, -1, -1] = torch.arange(CODES)
    nll = model(codes, torch.zeros(CODES, dtype=torch.int64))
    assert float((-nll[:, -1].double()).exp().sum()) == pytest.approx(1, abs=1e-6)
    assert nll[:, -1].std() > 0.1
    assert torch.allclose(nll[:, :-1], nll[:1, :-1], atol=1e-9), "a code was seen before it was predicted"


def stream_of(model: Transformer, codes: Tensor, classes: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """The stream after the last outer block and the final norm's modulation: what heads are given."""
    return model._stream(codes, classes, order)


def normed(x: Tensor, weight: Tensor, scale: float | Tensor = 0.0, shift: float | Tensor = 0.0) -> Tensor:
    return x / (x.square().mean() + 1e-5).sqrt() * weight * (1 + scale) + shift


def factorised_nll(model: Transformer, x: Tensor, scale: Tensor, shift: Tensor, code: int) -> Tensor:
    """-log p of a code by the stream [C] of its position: Open-MAGVIT2's inner transformer, one input after another.

    Inputs are the stream, then the embeddings of the sub-codes so far. The first position has no rotation at all: its
    query and key vanish. The second is at row 0, column 0 and so is not turned; a third is at column 1.
    """
    weights, config = {name: p.detach() for name, p in model.named_parameters()}, model.config
    size, past, nll = config.head_dim, [([], []) for _ in range(config.head.layers)], torch.zeros((), dtype=x.dtype)

    def turned(heads: Tensor, position: int) -> Tensor:
        if position == 0:
            return torch.zeros_like(heads)
        out, quarter = heads.clone(), size // 4
        for pair in range(quarter, size // 2):  # the second half of the pairs turns with the column
            angle = (position - 1) * config.rope_base ** -((pair - quarter) / quarter)
            (a, b), cos, sin = heads[:, 2 * pair : 2 * pair + 2].T, math.cos(angle), math.sin(angle)
            out[:, 2 * pair], out[:, 2 * pair + 1] = a * cos - b * sin, a * sin + b * cos
        return out

    for position, values in enumerate(config.digits):
        digit, code = code % values, code // values
        for number, (keys, kept) in enumerate(past):
            prefix = f"inner.blocks.{number}."
            own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
            h = normed(x, own["attention_norm.weight"])
            q, k, v = (own["attention.wqkv.weight"] @ h).view(3, config.num_heads, size)
            keys.append(turned(k, position))
            kept.append(v)
            scores = torch.stack([(turned(q, position) * key).sum(-1) / size**0.5 for key in keys])
            x = x + own["attention.wo.weight"] @ (scores.softmax(0)[..., None] * torch.stack(kept)).sum(0).flatten()
            h = normed(x, own["ffn_norm.weight"])
            gate, up = (own[f"feed_forward.{w}.weight"] @ h for w in ("w1", "w3"))
            x = x + own["feed_forward.w2.weight"] @ (gate * gate.sigmoid() * up)
        hidden = normed(x, weights["head_nm.rmsnorm.weight"], scale, shift)
        nll = nll - (weights[f"head.parts.{position}.weight"] @ hidden).log_softmax(0)[digit]
        x = weights[f"tok_emb.tables.{position}.weight"][digit]
    return nll


def masked_log_odds(model: Transformer, hidden: Tensor, bits: list[int | None]) -> Tensor:
    """Log odds [D] by BAR's network, where None is a masked bit."""
    weights = {n.removeprefix("head."): p.detach() for n, p in model.named_parameters() if n.startswith("head.")}
    signs = [0 if bit is None else 2 * bit - 1 for bit in bits]
    known = [float(bit is not None) for bit in bits]
    x = weights["inputs.weight"] @ torch.tensor([*signs, *known], dtype=hidden.dtype) + weights["inputs.bias"]
    for number in range(model.config.head.layers):
        prefix = f"layers.{number}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        gate, scale, shift = (
            own["modulation.1.weight"] @ (hidden * hidden.sigmoid()) + own["modulation.1.bias"]
        ).chunk(3)
        h = normed(x, own["norm.weight"], scale, shift)
        a, b = (own[f"feed_forward.{w}.weight"] @ h for w in ("w1", "w3"))
        x = x + gate * (own["feed_forward.w2.weight"] @ (a * a.sigmoid() * b))
    return weights["outputs.weight"] @ normed(x, weights["norm.weight"]) + weights["outputs.bias"]


def bit_nll(log_odds: Tensor, bit: int) -> Tensor:
    return -(log_odds if bit else -log_odds).sigmoid().log()


def masked_nll(model: Transformer, hidden: Tensor, code: int, groups: list[list[int]]) -> Tensor:
    """-log p of a code whose bits are filled in by these groups."""
    true, bits = [code >> place & 1 for place in range(BITS)], [None] * BITS
    nll = torch.zeros((), dtype=hidden.dtype)
    for group in groups:
        log_odds = masked_log_odds(model, hidden, bits)
        for place in group:
            nll = nll + bit_nll(log_odds[place], true[place])
            bits[place] = true[place]
    return nll


def written_out(model: Transformer, x: Tensor, scale: Tensor, shift: Tensor, code: int) -> Tensor:
    """-log p of a code by the stream [C] of its position and the final norm's modulation."""
    if model.config.head.kind == "factorised":
        return factorised_nll(model, x, scale, shift, code)
    hidden = normed(x, model.head_nm.rmsnorm.weight.detach(), scale, shift)
    if model.config.head.kind == "bits":
        log_odds = model.head.linear.weight.detach() @ hidden + model.head.linear.bias.detach()
        return sum(bit_nll(log_odds[place], code >> place & 1) for place in range(BITS))
    return masked_nll(model, hidden, code, [[0], [1, 2], [3], [4, 5]])


@torch.no_grad()
@pytest.mark.parametrize("adaln", [True, False])
@pytest.mark.parametrize("order", ["raster", "random"])
@pytest.mark.parametrize("name", NEW)
def test_likelihoods_are_their_formulas_written_out(name, order, adaln):
    model = model_of(name, order=order, adaln=adaln).double()
    codes, classes, orders = request()
    orders = orders if order == "random" else None
    found = model(codes, classes, orders)
    x, modulation = stream_of(model, codes, classes, orders)
    targets = codes.flatten(1) if orders is None else codes.flatten(1).gather(1, orders)
    for image, position in itertools.product(range(3), (0, 4, 8)):
        scale, shift = modulation.expand(3, 2, 16)[image]
        exact = written_out(model, x[image, position], scale, shift, int(targets[image, position]))
        assert float(found[image, position]) == pytest.approx(float(exact), rel=1e-6)


@torch.no_grad()
def test_plain_norms_are_adaptive_ones_with_nothing_to_add():
    adaptive = model_of("factorised", shared_adaln=True)
    for name, parameter in adaptive.named_parameters():
        if "ada_lin" in name:
            parameter.zero_()
        if name.endswith("ada_gss"):
            parameter.copy_(torch.tensor([1.0, 1, 0, 0, 0, 0])[None, None, :, None].expand_as(parameter))
    plain = Transformer(replace(adaptive.config, adaln=False, shared_adaln=False)).eval()
    plain.load_state_dict({n: p for n, p in adaptive.state_dict().items() if "ada_" not in n})
    codes, classes, _ = request()
    torch.testing.assert_close(plain(codes, classes), adaptive(codes, classes), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_training_of_masked_bits_is_the_mean_over_orders_of_one_bit_at_a_time(monkeypatch):
    """Every number of masked bits and every choice of so many, in one batch of equal shares of the expectation."""
    model = model_of("masked bits", residual_dropout=0.0, ffn_dropout=0.0, token_dropout=0.0, class_dropout=0.0)
    model.double().train()
    code, hidden, total = 37, torch.linspace(-1, 1, 16, dtype=torch.float64), 0.0
    for count in range(1, BITS + 1):
        for chosen in (choices := list(itertools.combinations(range(BITS), count))):
            mask = torch.tensor([[place in chosen for place in range(BITS)]])
            monkeypatch.setattr(heads, "draw_masks", lambda _bits, mask=mask: mask)
            total += float(model.head(hidden[None], torch.tensor([code]))) / (BITS * len(choices))
    orders = list(itertools.permutations(range(BITS)))[::7]  # the mean over all is that over the sets that come before
    sums = {}
    for order in itertools.permutations(range(BITS)):
        for place, bit in enumerate(order):
            sums.setdefault((frozenset(order[:place]), bit), 0)
            sums[frozenset(order[:place]), bit] += 1 / math.factorial(BITS)
    exact = 0.0
    for (known, bit), share in sums.items():
        bits = [code >> place & 1 if place in known else None for place in range(BITS)]
        exact += share * float(bit_nll(masked_log_odds(model, hidden, bits)[bit], code >> bit & 1))
    assert total == pytest.approx(exact, rel=1e-9)
    some = [float(masked_nll(model, hidden, code, [[bit] for bit in order])) for order in orders[:5]]
    assert max(some) - min(some) > 1e-3, "orders do not matter, and the test would see nothing"


def test_masks_are_uniform_in_their_number_and_in_the_bits():
    torch.manual_seed(0)
    rows = 6000
    masked = draw_masks(torch.zeros(rows, BITS, dtype=torch.int64))
    counts = masked.sum(1).bincount(minlength=BITS + 1) / rows
    assert counts[0] == 0 and (counts[1:] - 1 / BITS).abs().max() < 5 * (1 / BITS * (1 - 1 / BITS) / rows) ** 0.5
    assert (masked.double().mean(0) - (BITS + 1) / (2 * BITS)).abs().max() < 5 * 0.5 / rows**0.5


@pytest.mark.parametrize("name", HEADS)
def test_the_first_loss_is_that_of_equal_probabilities_and_everything_learns(name):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SIZE, head=HEADS[name]))
    codes, classes, _ = request()
    nll = model(codes, classes)
    torch.testing.assert_close(nll, torch.full_like(nll, math.log(CODES)), rtol=1e-5, atol=0)
    trained = model_of(name)
    trained.train()(codes, classes).mean().backward()
    idle = {n for n, p in trained.named_parameters() if p.grad is None or not p.grad.any()}
    assert not idle - {"inner.blocks.0.attention.wqkv.weight"}


# --- Draws ---


class Replay:
    """Draws what it is told, and adds up what that would have cost."""

    def __init__(self, sizes: tuple[int, ...], rows: int):
        self.sizes, self.rows, self.targets, self.nll = sizes, rows, None, torch.zeros(rows, dtype=torch.float64)

    def code(self, logits: Tensor, number: int) -> Tensor:
        digit = split(self.targets, self.sizes)[:, number]
        self.nll -= logits[: self.rows].double().log_softmax(-1).gather(1, digit[:, None])[:, 0]
        return digit

    def bits(self, log_odds: Tensor, first: int) -> Tensor:
        bits = split(self.targets, self.sizes)[:, first : first + log_odds.shape[1]]
        self.nll -= ((2 * bits - 1) * log_odds[: self.rows].double()).sigmoid().log().sum(1)
        return bits


@torch.inference_mode()
@pytest.mark.parametrize("adaln", [True, False])
@pytest.mark.parametrize("order", ["raster", "random"])
@pytest.mark.parametrize("name", HEADS)
def test_what_is_drawn_has_the_likelihood_that_is_measured(name, order, adaln):
    """Step by step from the cache, with and without class at once, as guidance has it."""
    model = model_of(name, order=order, adaln=adaln)
    codes, classes, _ = request()
    decoder, expected = Decoder(model, "fp32", 6), model(codes, classes).double()
    both = torch.cat([classes, torch.full_like(classes, model.null_class)])
    condition, cache, targets = decoder.condition(both), decoder.new_cache(), decoder.target_rows((3, 3))
    x = condition.embedding if targets is None else condition.embedding + targets[0]
    for position, wanted in enumerate(codes.flatten(1).unbind(1)):
        replay = Replay(model.config.digits, 3)
        replay.targets = wanted
        drawn = decoder.draw(decoder.step(x, condition, cache, position), condition, replay)
        assert torch.equal(drawn, wanted)
        torch.testing.assert_close(replay.nll, expected[:, position], rtol=1e-4, atol=1e-4)
        x = torch.empty_like(x)
        decoder.embed(drawn, targets, position, x.view(2, 3, -1))


@torch.no_grad()
@pytest.mark.parametrize("name", NEW)
def test_codes_are_drawn_as_often_as_they_are_likely(name):
    model = model_of(name, vocab_size=16, tokens_per_side=1, head=replace(HEADS[name], **SMALLER.get(name, {})))
    count, config = 4000, SamplerConfig(guidance_scale=1.0, rows_per_block=500)
    often = sample_codes(model, [1] * count, range(count), config).flatten().bincount(minlength=16) / count
    likely = (-model(torch.arange(16)[:, None, None], torch.ones(16, dtype=torch.int64))[:, 0].double()).exp()
    assert ((often - likely).abs() < 5 * (likely * (1 - likely) / count).sqrt() + 1e-9).all()
    assert likely.max() < 0.9


SMALLER = {"three sub-codes": {"sub_codes": (2, 4, 2)}, "masked bits": {"steps": 3}}


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}, {"temperature": 0.0}, {"temperature": 0.7}])
@pytest.mark.parametrize("name", NEW)
def test_an_image_does_not_depend_on_its_company(name, settings):
    model, config = model_of(name), SamplerConfig(rows_per_block=4, **settings)
    alone = sample_codes(model, [1], [7], config)
    assert torch.equal(sample_codes(model, [0, 2, 1], [3, 4, 7], config)[2:], alone)
    assert alone.unique().numel() > 1


@torch.no_grad()
def test_sub_codes_are_drawn_with_guidance_temperature_and_filters_one_by_one():
    """A single code, by the formulas: each sub-code's logits are guided, divided and filtered by themselves."""
    model = model_of("factorised", tokens_per_side=1)
    config = SamplerConfig(rows_per_block=2, guidance_scale=1.7, temperature=0.8, top_k=3, precision="fp32")
    found = sample_codes(model, [1, 2], [5, 6], config).flatten()
    decoder = Decoder(model, "fp32", 4)
    condition = decoder.condition(torch.tensor([1, 2, 3, 3]))
    numbers = uniforms([5, 6], 2, "cpu")

    class Plain:
        def code(self, logits: Tensor, number: int) -> Tensor:
            cond, uncond = logits.chunk(2)
            return draw(uncond + 1.7 * (cond - uncond), numbers[:, number : number + 1], config)[:, 0]

    step = decoder.step(condition.embedding, condition, decoder.new_cache(), 0)
    assert torch.equal(decoder.draw(step, condition, Plain()), found)


@pytest.mark.parametrize("name", ["bits", "masked bits"])
@pytest.mark.parametrize("setting", ["top_k", "top_p"])
def test_bits_are_not_filtered(name, setting):
    config = SamplerConfig(rows_per_block=1, **{setting: {"top_k": 2, "top_p": 0.5}[setting]})
    with pytest.raises(ValueError, match=f"{setting}: .*draws bits.*use temperature"):
        sample_codes(model_of(name), [1], [7], config)


@torch.no_grad()
@pytest.mark.parametrize("name", NEW)
def test_a_folder_for_the_hub_holds_it(name, tmp_path):
    model = model_of(name, adaln=False)
    ibq.save_pretrained(model, tmp_path)
    again, (codes, classes, _) = ibq.from_pretrained(tmp_path), request()
    assert again.config == model.config
    assert torch.equal(again(codes, classes), model(codes, classes))


# --- Settings ---

RUN = {
    "data": {"kind": "codes", "train": "a", "validation": "b"},
    "training": {"batch_size": 8, "micro_batch": 8, "max_steps": 1},
}
WRONG = {
    "no power of two": ({"vocab_size": 50, "head": {"kind": "bits"}}, "head: the 50 codes .* power of two"),
    "not its product": ({"head": {"kind": "factorised", "sub_codes": [4, 8]}}, "4 x 8 are 32 codes, .*is 64"),
    "one sub-code": ({"head": {"kind": "factorised", "sub_codes": [64]}}, r"sub_codes: \[64\]; use two"),
    "more steps than bits": ({"head": {"kind": "masked_bits", "steps": 7}}, "steps: 7 are more than the 6 bits"),
    "nothing to share": ({"shared_adaln": True, "adaln": False}, "shared_adaln: plain norms share nothing"),
    "unknown": ({"head": {"kind": "factorized"}}, "head.kind.*did you mean factorised"),
}


@pytest.mark.parametrize(("model", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_one_line(model, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(ARRunConfig, RUN | {"model": SIZE | model})


def test_tensor_parallelism_is_refused():
    engine = {"kind": "fsdp", "tensor_parallel": 2}
    for model in ({"head": {"kind": "bits"}}, {"adaln": False}):
        config = parse_config(ARRunConfig, RUN | {"model": SIZE | model, "engine": engine})
        with pytest.raises(UserError, match=r"engine.tensor_parallel: .*set it to 1"):
            config.sharing_ranks()


def test_other_heads_have_no_logits():
    with pytest.raises(ValueError, match="head: of kind bits has no logits"):
        model_of("bits").logits(*request()[:2])


@pytest.mark.parametrize(("model", "compiled"), [("plain", True), ("factorised", True), ("tokenizer", False)])
def test_what_is_compiled_unasked_on_a_gpu(model, compiled, monkeypatch):
    """Outer and inner blocks are two kinds, which takes seconds; a tokenizer has one for each level."""
    with torch.device("meta"):
        module = Tokenizer(TokenizerConfig()) if model == "tokenizer" else model_of_shapes(model)
    found = []
    monkeypatch.setattr(compilation, "missing_for_compile", lambda _: "")
    monkeypatch.setattr(compilation, "require_compile", lambda *_: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: found.append(self))
    assert compilation.compile_units(module, None, torch.device("cuda")) == compiled
    assert found == (module.units() if compiled else [])
    assert not compilation.compile_units(torch.nn.Linear(2, 2), None, torch.device("cuda")), "has no units"


def model_of_shapes(name: str) -> Transformer:
    return Transformer(TransformerConfig(**SIZE, head=HEADS[name]))


def test_an_inner_block_is_one_graph_for_the_compiler():
    block = model_of("factorised").inner.blocks[0]
    inputs = torch.randn(4, 2, 16, requires_grad=True), torch.randn(1, 16), torch.polar(*torch.rand(2, 2, 4))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), block(*inputs), rtol=1e-5, atol=1e-5)
