"""`optimizer.groups`: which parameters are trained, how fast, and what is said where a pattern is wrong."""

import copy
import re

import pytest
import torch
from support import ROOT
from torch import nn

from ibq.config import UserError, load_config
from ibq.engine.base import EngineSettings, GroupHyper, OptimizerConfig
from ibq.engine.blueprint import Blueprint
from ibq.engine.groups import freeze, optimizer_groups
from ibq.engine.local import Held, LocalEngine, TorchEngine
from ibq.engine.pieces import stretch
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.quantizers import IBQConfig
from ibq.training.tokenizer_config import TokenizerRunConfig

TOKENIZER = TokenizerConfig(
    resolution=16,
    channels=32,
    channel_multipliers=(1, 1),
    res_blocks=1,
    attention_resolutions=(),
    latent_channels=16,
    quantizer=IBQConfig(num_codes=16, dim=16),
)
HYPER = {"decay": GroupHyper(learning_rate=0.25, weight_decay=0.5), "no_decay": GroupHyper(learning_rate=0.25)}
HALF = {name: GroupHyper(learning_rate=0.125, weight_decay=h.weight_decay) for name, h in HYPER.items()}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def engine(groups: dict, **optimizer) -> LocalEngine:
    config = OptimizerConfig(groups=groups, **optimizer)
    settings = EngineSettings(optimizer=config, device=torch.device("cpu"), ema_decay=0.5)
    return LocalEngine(Blueprint(name="net", build=network, seed=1), settings)


def train(groups: dict, hyper=HYPER, steps=3, **optimizer) -> tuple[LocalEngine, list[float]]:
    """The engine after some steps on the same inputs, and its gradient norms."""
    trained, norms = engine(groups, **optimizer), []
    inputs = torch.linspace(-1, 1, 24).view(6, 4)
    for _ in range(steps):
        trained.backward(trained(inputs).square().mean())
        norms.append(float(trained.step(hyper).gradient_norm))
    return trained, norms


def weights(of: LocalEngine) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in of.module.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_a_factor_is_another_learning_rate(kind):
    """Half of the rate, for all or, in the one step after which gradients are still the same, for some."""
    (halved, _), (expected, _) = train({"*": 0.5}, kind=kind), train({}, HALF, kind=kind)
    assert all(torch.equal(halved.module.get_parameter(name), value) for name, value in weights(expected).items())
    mixed, whole, half = (
        weights(train(groups, hyper, steps=1, kind=kind)[0])
        for groups, hyper in (({"2.*": 0.5}, HYPER), ({}, HYPER), ({}, HALF))
    )
    for name, value in mixed.items():
        assert torch.equal(value, half[name] if name.startswith("2.") else whole[name]), name
        assert not torch.equal(half[name], whole[name])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_what_is_frozen_takes_no_part(kind):
    """Nor does clipping count it: the same module of which the rest alone is trained."""
    frozen, norms = train({"0.*": "frozen", "2.weight": "frozen"}, kind=kind, clip_norm=0.01)
    start, now = weights(engine({})), weights(frozen)
    assert {name for name in now if torch.equal(start[name], now[name])} == {"0.weight", "0.bias", "2.weight"}
    gradient = [p.grad for p in plain_gradients({"2.bias", "4.weight", "4.bias"})]
    assert norms[0] == pytest.approx(float(torch.stack([g.norm() for g in gradient]).norm()), rel=1e-5)
    states = dict(frozen.named_state())
    for name, state in states.items():
        parts = [state.moment1, state.moment2, state.ema]
        assert name not in frozen.frozen or parts == [None] * 3, name
        assert torch.equal(state.weight, now[name])
    with frozen.averaged():
        averaged = weights(frozen)
    assert {name for name in now if torch.equal(averaged[name], now[name])} == {"0.weight", "0.bias", "2.weight"}


def plain_gradients(wanted: set[str]) -> list[nn.Parameter]:
    module = engine({}).module
    module(torch.linspace(-1, 1, 24).view(6, 4)).square().mean().backward()
    return [parameter for name, parameter in module.named_parameters() if name in wanted]


def test_no_gradient_is_computed_for_what_is_frozen():
    trained = engine({"0.*": "frozen"})
    trained.backward(trained(torch.ones(1, 4)).sum())
    assert [name for name, p in trained.module.named_parameters() if p.grad is None] == ["0.weight", "0.bias"]


def test_the_first_pattern_counts():
    config = OptimizerConfig(groups={"4.bias": 2.0, "4.*": "frozen", "*.bias": 0.5})
    module = network()
    assert freeze(module, config) == {"4.weight"}
    trained = [(name, p, p.dim() > 1) for name, p in module.named_parameters() if p.requires_grad]
    found = [(g["name"], g["factor"], len(g["params"])) for g in optimizer_groups(trained, config)]
    assert found == [("decay", 1.0, 2), ("no_decay", 0.5, 2), ("no_decay", 2.0, 1)]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_rank_may_hold_nothing_of_what_is_trained(kind):
    config, module = OptimizerConfig(kind=kind, groups={"[02].*": "frozen", "4.weight": "frozen"}), network()
    held = {"4.bias": Held(tensor=nn.Parameter(torch.empty(0)), piece=stretch((2,), 2, 1), decays=False, copies=1)}
    settings = EngineSettings(optimizer=config, device=torch.device("cpu"))
    result = TorchEngine(module, settings, held, freeze(module, config)).step(HYPER)
    assert not result.skipped and result.gradient_norm == 0


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"encodr.*": "frozen"}, r"optimizer\.groups: encodr\.\* matches no parameter of the Tokenizer; .*encoder\.\*"),
        ({"encoder": 0.5}, r"encoder matches no parameter .*the nearest are encoder\.\*"),
        ({"decoder.conv_ot.weight": 0.5}, r"the nearest are decoder\.conv_out\.weight"),
        ({"*": 0.5, "encoder.*": "frozen"}, r"encoder\.\* comes after patterns that match all of its parameters"),
        ({"*": "frozen"}, r"everything is frozen"),
    ],
)
def test_a_wrong_pattern(groups, words):
    with torch.device("meta"):
        module = Tokenizer(TOKENIZER)
    with pytest.raises(UserError, match=words) as error:
        freeze(module, OptimizerConfig(groups=groups))
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("factor", "words"), [("0", "positive and finite"), ("forzen", "float or frozen"), ("-1", "0")]
)
def test_a_wrong_factor(factor, words):
    with pytest.raises(ValueError, match=rf"command line: optimizer\.groups.*{words}"):
        load(f"optimizer.groups={{decoder.*: {factor}}}")


def load(*overrides: str) -> TokenizerRunConfig:
    return load_config(TokenizerRunConfig, ROOT / "yaml/tokenizer_16384.yaml", overrides)


def test_the_example_of_the_page_trains_the_decoder_alone(tmp_path):
    text = (ROOT / "yaml/README.md").read_text()
    (example,) = re.findall(r"^```yaml\n(optimizer:\n.*?)^```$", text, flags=re.S | re.M)
    assert len(example.splitlines()) == 3
    file = tmp_path / "decoder.yaml"
    file.write_text(f"inherit: {ROOT / 'yaml/tokenizer_16384.yaml'}\n{example}")
    config = load_config(TokenizerRunConfig, file)
    with torch.device("meta"):
        module = Tokenizer(config.model)
    freeze(module, config.optimizer)
    trained = {name.split(".")[0] for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {"decoder", "post_quant_conv"}


def test_a_frozen_codebook_still_gives_the_encoder_gradients():
    module = Tokenizer(TOKENIZER)
    images, whole = torch.rand(2, 3, 16, 16) * 2 - 1, copy.deepcopy(module)
    freeze(module, OptimizerConfig(groups={"quantizer.*": "frozen"}))
    for tokenizer in (module, whole):
        out = tokenizer(images)
        (out.reconstruction.square().mean() + sum(out.losses.values())).backward()
    assert module.quantizer.codebook.grad is None and whole.quantizer.codebook.grad is not None
    for (name, found), expected in zip(module.encoder.named_parameters(), whole.encoder.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad) and found.grad.any(), name
