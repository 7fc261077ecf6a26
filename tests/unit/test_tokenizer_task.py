"""Parts of the tokenizer's training step."""

from contextlib import nullcontext
from types import SimpleNamespace

import lpips
import pytest
import torch
from torch.nn import functional as F

from ibq.engine.base import EngineSettings, OptimizerConfig, StepResult
from ibq.engine.blueprint import Blueprint
from ibq.engine.local import LocalEngine
from ibq.losses import gram_loss
from ibq.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from ibq.models.feature_discriminator import FeaturesDiscriminatorConfig
from ibq.models.frozen_features import FrozenFeatures
from ibq.models.perceptual import PerceptualConfig, build_perceptual, perceptual_features
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.vision_transformer import VisionTransformerConfig
from ibq.quantizers import IBQConfig
from ibq.training.metrics import Stopwatch
from ibq.training.tokenizer_config import GanConfig, GramConfig, TokenizerLossConfig
from ibq.training.tokenizer_task import TokenizerTask

CPU = torch.device("cpu")


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_lecam_remembers_as_long_however_many_micro_batches_a_step_has(micro_batches):
    """A hundred steps after logits of 1 have become 0, as one update a step leaves it."""
    task = SimpleNamespace(reduce=None, lecam={"real": torch.tensor(1.0), "fake": torch.tensor(1.0)})
    for _ in range(100 * micro_batches):
        TokenizerTask._update_lecam(task, torch.zeros(4), torch.zeros(4), 1 / micro_batches)
    assert float(task.lecam["real"]) == pytest.approx(0.999**100, rel=1e-4)
    assert task.lecam["real"] == task.lecam["fake"]


def task_of(judged_by: str) -> tuple[TokenizerTask, list[int]]:
    """A small task, and the images of every pass through its tokenizer."""
    model = TokenizerConfig(
        resolution=32,
        channels=8,
        channel_multipliers=(1, 1),
        res_blocks=1,
        latent_channels=8,
        norm_groups=4,
        quantizer=IBQConfig(num_codes=16, dim=8),
    )
    # Plain descent: a step is the gradient, whatever its size.
    settings = EngineSettings(optimizer=OptimizerConfig(kind="sgd"), device=CPU, accumulation=2)
    discriminator = PatchDiscriminatorConfig(channels=4)
    task = TokenizerTask(
        LocalEngine(Blueprint(name="tokenizer", build=lambda: Tokenizer(model), seed=0), settings),
        LocalEngine(Blueprint(name="judge", build=lambda: PatchDiscriminator(discriminator), seed=0), settings),
        TokenizerLossConfig(gan=GanConfig(weight=1.0, judged_by=judged_by, discriminator=discriminator)),
        perceptual=None,
        learning_rate=lambda step: 0.1,
    )
    passes: list[int] = []
    task.tokenizer.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    return task, passes


def change(task: TokenizerTask) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step of two micro-batches does to the tokenizer's and the discriminator's weights."""
    modules = task.tokenizer, task.discriminator.module
    images = torch.randint(256, (2, 3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = [torch.nn.utils.parameters_to_vector(module.parameters()).clone() for module in modules]
    outcome = task.step(0, [(batch, torch.zeros(3)) for batch in images], Stopwatch(CPU))
    assert not outcome.skipped and float(outcome.metrics["gan/generator"]) != 0
    after = [torch.nn.utils.parameters_to_vector(module.parameters()) for module in modules]
    return tuple(new.detach() - old.detach() for new, old in zip(after, before, strict=True))


def test_judged_by_the_previous_discriminator_needs_one_pass(monkeypatch):
    """The tokenizer learns as if the discriminator had not, and that learns as before."""
    (updated, passes), (previous, fewer) = task_of("updated"), task_of("previous")
    tokenizer, discriminator = change(previous)
    of_updated, same = change(updated)
    assert (passes, fewer) == ([3] * 4, [3] * 2)
    torch.testing.assert_close(discriminator, same)
    assert float((tokenizer - of_updated).norm() / of_updated.norm()) > 1e-4

    unmoved, _ = task_of("updated")

    def stay(hyper) -> StepResult:
        unmoved.discriminator.discard()
        return StepResult(gradient_norm=torch.zeros(()), skipped=False)

    monkeypatch.setattr(unmoved.discriminator, "step", stay)
    torch.testing.assert_close(tokenizer, change(unmoved)[0])


def test_gram_losses_are_of_what_lpips_compares_or_of_the_discriminators_features():
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    perceptual = build_perceptual(PerceptualConfig(weights="random"))
    taps = [perceptual_features(perceptual, images) for images in (x, y)]
    distance = sum(
        lin((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()).mean(dim=(2, 3))
        for lin, a, b in zip(perceptual.lins, *taps, strict=True)
    )
    torch.testing.assert_close(distance, perceptual(x, y).flatten(1), rtol=1e-4, atol=1e-7)

    backbone = VisionTransformerConfig(width=16, depth=2, heads=2, patch=8, side=32)
    features = FrozenFeatures(FeaturesDiscriminatorConfig(backbone=backbone, layers=(1, 2), side=32, weights="random"))
    seen = {"perceptual": taps, "discriminator": [features.plain(images) for images in (x, y)]}
    for kind, (wanted, found) in seen.items():
        task = SimpleNamespace(
            config=SimpleNamespace(gram=GramConfig(weight=1.0, features=kind)),
            perceptual=perceptual,
            features=features,
            generator=SimpleNamespace(autocast=nullcontext),
        )
        expected = gram_loss(found, wanted)
        assert float(expected) > 0
        torch.testing.assert_close(TokenizerTask._gram_loss(task, x, y), expected)


@pytest.mark.parametrize("judged_by", ["updated", "previous"])
def test_a_bad_discriminator_step_undoes_nothing_that_was_done(judged_by, monkeypatch):
    """Whoever is judged by whom: neither network moves, nor LeCAM's averages."""
    task, _ = task_of(judged_by)
    own = task.discriminator.backward
    monkeypatch.setattr(task.discriminator, "backward", lambda loss: own(loss * float("nan")))
    modules, lecam = (task.tokenizer, task.discriminator.module), dict(task.lecam)
    before = [torch.nn.utils.parameters_to_vector(module.parameters()).clone() for module in modules]
    images = torch.randint(256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    assert task.step(0, [(batch, torch.zeros(3)) for batch in images], Stopwatch(CPU)).skipped
    for module, old in zip(modules, before, strict=True):
        assert torch.equal(torch.nn.utils.parameters_to_vector(module.parameters()), old)
    assert all(torch.equal(task.lecam[name], value) for name, value in lecam.items())


@pytest.mark.filterwarnings("ignore:.*'weights'")  # lpips calls torchvision so
def test_perceptual_weights_are_those_of_lpips_whatever_is_drawn_for_them(tmp_path):
    """Random ones as after seed 0, and a file's; both leave the generator as it was."""
    before = torch.random.get_rng_state()
    random = build_perceptual(PerceptualConfig(weights="random"))
    backbone = {f"features.{name.split('.', 1)[1]}": value for name, value in random.net.state_dict().items()}
    torch.save(backbone, tmp_path / "vgg16.pth")
    loaded = build_perceptual(PerceptualConfig(weights=str(tmp_path / "vgg16.pth")))
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).state_dict()
    for built in (random, loaded):
        found = built.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
