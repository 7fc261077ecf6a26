"""Random orders (RAR, arXiv 2411.00776): what is drawn, the model against its formulas written out, annealing."""

import math
from dataclasses import replace

import pytest
import torch
from support.models import SMALL, small_transformer
from torch import Tensor

from ibq.config import ConfigError, parse_config
from ibq.engine.base import EngineSettings, GroupHyper, OptimizerConfig
from ibq.engine.blueprint import Blueprint
from ibq.engine.local import LocalEngine
from ibq.interop.seed_voken_transformer import transformer_state
from ibq.models.code_order import draw_orders
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.training.ar_task import ARTask
from ibq.training.metrics import Stopwatch
from ibq.training.schedule import OrderAnnealingConfig

GRID, GRIDS = (3, 2), ((2, 4), (3, 2))  # the second of two grids: its positions are rows and columns of 3 x 4
DROPOUTS = dict.fromkeys(("residual_dropout", "ffn_dropout", "token_dropout", "class_dropout"), 0.2)


def request(grid=GRID, rows=3, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(SMALL["vocab_size"], (rows, *grid), generator=generator)
    order = torch.stack([torch.randperm(math.prod(grid), generator=generator) for _ in range(rows)])
    return codes, torch.arange(rows), order


# --- Orders ---


def test_every_order_is_a_permutation_and_a_share_of_them_is_not_raster():
    torch.manual_seed(0)
    rows, share = 4000, 0.3
    orders, raster = draw_orders(torch.zeros(rows, 2, 4, dtype=torch.int64), share), torch.arange(8)
    assert torch.equal(orders.sort(-1).values, raster.expand(rows, -1))
    permuted = orders[(orders != raster).any(-1)]
    assert abs(len(permuted) - share * rows) < 5 * math.sqrt(share * (1 - share) * rows)
    # Uniform: every code is at every place equally often, within five standard deviations.
    often = torch.stack([(permuted == code).sum(0) for code in range(8)]) / len(permuted)
    assert (often - 1 / 8).abs().max() < 5 * math.sqrt(1 / 8 * 7 / 8 / len(permuted))
    assert (draw_orders(torch.zeros(50, 4, 4), 1.0) != torch.arange(16)).any(-1).all()


def test_orders_are_drawn_from_the_generator_of_dropout_unless_all_are_raster():
    codes, state = torch.zeros(3, 4, 4), torch.get_rng_state()
    assert draw_orders(codes, 0.0) is None and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    first, second = draw_orders(codes, 1.0), draw_orders(codes, 1.0)
    torch.manual_seed(3)
    assert torch.equal(draw_orders(codes, 1.0), first) and not torch.equal(first, second)


# --- The model ---


def written_out(model: Transformer, codes: Tensor, label: Tensor, order: list[int]) -> Tensor:
    """Negative log likelihoods [T] of one image's codes [h, w], one prediction after the other, in float64.

    The input of step i is the code that was predicted at step i - 1 (at first the class) plus the embedding of the
    position that is predicted now: RAR, section 3.3. Heads turn with the position of the input; the class has none.
    """
    config, (_, width), table_width = model.config, GRID, 4
    size, weights = config.head_dim, {name: p.detach() for name, p in model.named_parameters()}
    condition = weights["class_emb.weight"][label]

    def modulation(name: str) -> tuple[Tensor, ...]:
        activated = condition * condition.sigmoid()
        linear = weights[f"{name}.ada_lin.1.weight"] @ activated + weights[f"{name}.ada_lin.1.bias"]
        return linear.unflatten(0, (-1, config.model_width)).unbind(0)

    def norm(x: Tensor, name: str, scale: Tensor, shift: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-5).sqrt() * weights[f"{name}.weight"] * (1 + scale) + shift

    def turned(heads: Tensor, index: int | None) -> Tensor:
        if index is None:
            return torch.zeros_like(heads)
        out, quarter = torch.empty_like(heads), size // 4
        for pair in range(size // 2):
            place = index // width if pair < quarter else index % width
            angle = place * config.rope_base ** -((pair % quarter) / quarter)
            (a, b), cos, sin = heads[:, 2 * pair : 2 * pair + 2].T, math.cos(angle), math.sin(angle)
            out[:, 2 * pair], out[:, 2 * pair + 1] = a * cos - b * sin, a * sin + b * cos
        return out

    nll, past = [], [([], []) for _ in model.blocks]
    for step, index in enumerate(order):
        before = order[step - 1] if step else None
        x = condition if before is None else weights["tok_emb.weight"][codes.flatten()[before]]
        x = x + weights["target_emb.weight"][index // width * table_width + index % width]
        for number, (keys, values) in enumerate(past):
            name = f"blocks.{number}"
            gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation(name)
            h = norm(x, f"{name}.attention_norm", scale1, shift1)
            q, k, v = (weights[f"{name}.attention.wqkv.weight"] @ h).view(3, config.num_heads, size)
            keys.append(turned(k, before))
            values.append(v)
            scores = torch.stack([(turned(q, before) * key).sum(-1) / size**0.5 for key in keys])
            attended = (scores.softmax(0)[..., None] * torch.stack(values)).sum(0).flatten()
            x = x + gamma1 * (weights[f"{name}.attention.wo.weight"] @ attended)
            h = norm(x, f"{name}.ffn_norm", scale2, shift2)
            gate, up = (weights[f"{name}.feed_forward.{w}.weight"] @ h for w in ("w1", "w3"))
            x = x + gamma2 * (weights[f"{name}.feed_forward.w2.weight"] @ (gate * gate.sigmoid() * up))
        logits = weights["head.weight"] @ norm(x, "head_nm.rmsnorm", *modulation("head_nm"))
        nll.append(logits.logsumexp(0) - logits[codes.flatten()[index]])
    return torch.stack(nll)


@torch.no_grad()
def test_the_model_is_its_formulas_written_out():
    model = small_transformer(grids=GRIDS, order="random").double()
    codes, classes, order = request()
    found = model(codes, classes, order)
    for image, steps in enumerate(order.tolist()):
        exact = written_out(model, codes[image], classes[image], steps)
        torch.testing.assert_close(found[image].double(), exact, rtol=1e-6, atol=1e-6)
        logits = model.logits(codes, classes, order)[image].log_softmax(-1)
        targets = codes[image].flatten()[order[image]]
        torch.testing.assert_close(-logits.gather(-1, targets[:, None])[:, 0], exact, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_raster_is_an_order_too():
    model = small_transformer(grids=GRIDS, order="random")
    codes, classes, order = request()
    raster = torch.arange(6).expand(3, -1)
    assert torch.equal(model(codes, classes, raster), model(codes, classes))
    assert not torch.allclose(model(codes, classes, order).sum(1), model(codes, classes).sum(1), atol=1e-2)


@torch.no_grad()
def test_predictions_see_only_what_came_before_in_the_order():
    model = small_transformer(grids=GRIDS, order="random").double()
    codes, classes, order = request()
    changed = codes.flatten(1).clone()
    changed.scatter_(1, order[:, 2:3], (changed.gather(1, order[:, 2:3]) + 1) % SMALL["vocab_size"])
    before, after = (model.logits(some.view(3, *GRID), classes, order) for some in (codes, changed))
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-12)
    assert ((before - after)[:, 3:].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("dropouts", [{}, DROPOUTS])
def test_in_raster_order_with_embeddings_of_zero_it_is_the_raster_model_bit_by_bit(dropouts):
    """Values, random numbers and gradients."""
    raster, random = (small_transformer(**dropouts, order=order).train() for order in ("raster", "random"))
    random.load_state_dict(raster.state_dict(), strict=False)
    torch.nn.init.zeros_(random.target_emb.weight)
    codes, classes, _ = request((4, 4))
    found = []
    for model, order in ((raster, None), (random, draw_orders(codes, 0.0))):
        torch.manual_seed(1)
        nll = model(codes, classes, order)
        nll.mean().backward()
        found.append((nll, torch.get_rng_state()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    gradients = {name: parameter.grad for name, parameter in random.named_parameters()}
    assert gradients.pop("target_emb.weight").any()
    assert all(torch.equal(gradients[name], parameter.grad) for name, parameter in raster.named_parameters())


def test_a_raster_model_has_no_embeddings_and_takes_no_order():
    model = small_transformer()
    assert "target_emb.weight" not in model.state_dict()
    codes, classes, order = request((4, 4))
    with pytest.raises(ValueError, match="order: this model has no embeddings of positions"):
        model(codes, classes, order)


def test_a_grid_without_embeddings():
    model, (codes, classes, _) = small_transformer(order="random"), request((2, 8))
    for call in (lambda: model(codes, classes), lambda: model.target_rows((5, 1))):
        with pytest.raises(ValueError, match=r"codes: . x . are beyond the 4 x 4 positions .* grids before training"):
            call()
    assert model(codes[:, :, :3], classes).shape == (3, 6)


def test_other_implementations_have_no_such_transformer():
    config = TransformerConfig(**SMALL, order="random")
    with pytest.raises(ValueError, match=r"^order: 'random' does not fit SEED-Voken, .* export \.safetensors$"):
        transformer_state(config, {})
    assert transformer_state(replace(config, order="raster"), {"a": 1}) == {"transformer.a": 1}


# --- Training ---


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_a_step_is_in_the_orders_that_are_drawn(share):
    """Two micro-batches, one after the other from the same generator."""
    model = small_transformer(grids=GRIDS, order="random", **dict.fromkeys(DROPOUTS, 0.0))
    settings = EngineSettings(optimizer=OptimizerConfig(kind="sgd"), device=torch.device("cpu"), accumulation=2)
    engine = LocalEngine(Blueprint(name="transformer", build=lambda: Transformer(model.config), seed=0), settings)
    hyper = dict.fromkeys(("decay", "no_decay"), GroupHyper(learning_rate=0.0))
    task = ARTask(engine, hyper=lambda step: hyper, random_share=lambda step: share if step == 5 else math.nan)
    engine.module.load_state_dict(model.state_dict())
    batches = [request(seed=seed)[:2] for seed in (0, 1)]
    torch.manual_seed(2)
    metrics = task.step(5, batches, Stopwatch(torch.device("cpu"))).metrics
    torch.manual_seed(2)
    with torch.no_grad():
        expected = [float(model(codes, classes, draw_orders(codes, share)).mean()) for codes, classes in batches]
    assert float(metrics["loss/total"]) == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert float(metrics["random_share"]) == share


# --- Annealing ---


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 1, 499: 1, 500: 1, 625: 0.5, 749: 1 / 250, 750: 0, 999: 0}),
        ({"unit": "epochs", "start": 2, "end": 4.5}, {19: 1, 20: 1, 30: 0.6, 44: 0.04, 45: 0, 46: 0}),
        ({"unit": "steps", "start": 3, "end": 3}, {2: 1, 3: 0, 4: 0}),
        ({"start": 0, "end": 0}, {0: 0, 1: 0}),
        ({"start": 1, "end": 1}, {0: 1, 999: 1}),
        ({"last": 0.2}, {0: 1, 500: 1, 625: 0.6, 750: 0.2, 999: 0.2}),
    ],
)
def test_annealing_by_hand(settings, expected):
    config = OrderAnnealingConfig(**settings)
    found = {step: config.random_share(step, steps_per_epoch=10, total_steps=1000) for step in expected}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.8}, "start: must lie between 0 and end, got 0.8 and 0.75"),
        ({"end": 300}, "end: 300.0 is no share of the run; use at most 1, or set unit to epochs or steps"),
        ({"unit": "images"}, "unit: "),
        ({"last": 1.5}, "last: must lie in [0, 1], got 1.5; it is a share of the images"),
    ],
)
def test_impossible_annealing(settings, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(OrderAnnealingConfig, settings, "a file")
    assert message in str(caught.value)
