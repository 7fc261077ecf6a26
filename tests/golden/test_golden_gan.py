"""GAN losses, LeCAM, adaptive weight and discriminator against the public reference implementation.

Scalars are stored in both precisions, tensors in float32 with the reference's float32-against-float64
difference. A float32 result may differ by 20 times that; a float64 tensor must show just that difference.
"""

import re
from dataclasses import dataclass, field

import pytest
import torch
from support.golden import (
    FLOAT32_FACTOR,
    FLOAT32_FLOOR,
    FLOAT64_TOLERANCE,
    assert_close,
    assert_float32,
    assert_float64,
    golden_json,
    golden_tensors,
)
from torch import Tensor
from torch.nn import functional as F

from ibq.losses import (
    adaptive_weight,
    hinge_discriminator_loss,
    lecam_regularizer,
    lecam_update,
    non_saturating_discriminator_loss,
    non_saturating_generator_loss,
    vanilla_discriminator_loss,
)
from ibq.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig

NAME = "losses_gan"
DTYPES = {"f32": torch.float32, "f64": torch.float64}
ROUNDS = sorted({key.split("/")[0] for key in golden_json(NAME)["scalars"] if key.startswith("B_")})


def steps_of(experiment: str) -> list[int]:
    keys = golden_json(NAME)["scalars"]
    return sorted({int(key.split("/")[1]) for key in keys if re.match(rf"{experiment}/\d+/", key)})


def tensor(key: str, dtype: torch.dtype) -> Tensor:
    return golden_tensors(NAME)[key].to(dtype)


def settings() -> dict:
    return golden_json(NAME)["settings"]


def as_float32(value: float) -> float:
    """The reference feeds constants as float32, also in its float64 run."""
    return float(torch.tensor(value, dtype=torch.float32))


def load_discriminator(dtype: torch.dtype) -> PatchDiscriminator:
    sizes = golden_json(NAME)["discriminator"]
    discriminator = PatchDiscriminator(PatchDiscriminatorConfig(channels=sizes["ndf"], layers=sizes["n_layers"]))
    prefix = "disc_state/"
    tensors = golden_tensors(NAME)
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    discriminator.load_state_dict(state, strict=True)
    return discriminator.to(dtype).train()


@dataclass
class Lecam:
    """Moving averages of the logits, kept by the caller of the pure functions."""

    dtype: torch.dtype
    real: Tensor = field(init=False)
    fake: Tensor = field(init=False)

    def __post_init__(self):
        self.real = self.fake = torch.tensor(settings()["lecam_initial"], dtype=self.dtype)

    def update(self, real: Tensor, fake: Tensor) -> Tensor:
        decay = settings()["lecam_decay"]
        self.real = lecam_update(self.real, real.mean(), decay)
        self.fake = lecam_update(self.fake, fake.mean(), decay)
        return lecam_regularizer(real, fake, self.real, self.fake)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorStep:
    loss: Tensor
    real: Tensor
    fake: Tensor
    scalars: dict[str, Tensor]


def discriminator_step(discriminator: PatchDiscriminator, lecam: Lecam, real: Tensor, fake: Tensor):
    """The discriminator's loss: two passes, real first."""
    real_logits, fake_logits = discriminator(real), discriminator(fake)
    regularizer = lecam.update(real_logits, fake_logits)
    loss = hinge_discriminator_loss(real_logits, fake_logits) + settings()["lecam_loss_weight"] * regularizer
    scalars = {"d_loss": loss, "lecam_loss": regularizer, "ema_real": lecam.real, "ema_fake": lecam.fake}
    return DiscriminatorStep(loss=loss, real=real_logits, fake=fake_logits, scalars=scalars)


def check_scalars(prefix: str, actual: dict[str, Tensor], precision: str) -> None:
    """Compare all scalars that the golden data has under `prefix`, none left out."""
    stored = golden_json(NAME)["scalars"]
    keys = {key.removeprefix(prefix) for key in stored if key.startswith(prefix)}
    assert keys == actual.keys()
    for key in keys:
        values, name = stored[prefix + key], prefix + key
        if precision == "f64":
            floor = 1e-15 if key.startswith("ema_") else 0.0
            assert_float64(actual[key], values["f64"], name, floor=floor)
        else:
            assert_close(actual[key], values["f32"], scalar_tolerance(key, values), name)


def scalar_tolerance(quantity: str, values: dict) -> float:
    """20 times the reference's largest error of the quantity over all steps; at least 1e-6 of the value."""
    stored = golden_json(NAME)["scalars"]
    same = [value for key, value in stored.items() if key.rsplit("/", 1)[-1] == quantity]
    error = max(abs(value["f32"] - value["f64"]) for value in same)
    return max(FLOAT32_FACTOR * error, FLOAT32_FLOOR * abs(values["f64"]))


def check_tensor(key: str, actual: Tensor, dtype: torch.dtype) -> None:
    expected = golden_tensors(NAME)[key]
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), key
    elif dtype == torch.float32:
        assert_float32(actual, expected, NAME, key)
    else:
        entry = golden_json(NAME)["float32_vs_float64"][key]
        allowed = 1.001 * entry["max_abs_diff"] + FLOAT64_TOLERANCE * entry["max_abs_value"]
        assert_close(actual, expected, allowed, key)


def check_all(prefix: str, actual: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Compare every tensor stored under `prefix` with our tensor of the same name."""
    keys = [key for key in golden_tensors(NAME) if key.startswith(prefix)]
    assert keys, prefix
    for key in keys:
        check_tensor(key, actual[key.removeprefix(prefix)], dtype)


@pytest.mark.parametrize("precision", DTYPES)
def test_discriminator_losses_with_fixed_weights(precision: str):
    """Experiment A: BatchNorm statistics and LeCAM averages go on, the weights stay."""
    dtype = DTYPES[precision]
    discriminator, lecam = load_discriminator(dtype), Lecam(dtype)
    for t in steps_of("A"):
        got = discriminator_step(discriminator, lecam, tensor(f"real/{t}", dtype), tensor(f"fake/{t}", dtype))
        real, fake = got.real, got.fake
        scalars = got.scalars | {"logits_real_mean": real.mean(), "logits_fake_mean": fake.mean()}
        others = {
            "hinge_d_loss": hinge_discriminator_loss(real, fake),
            "vanilla_d_loss": vanilla_discriminator_loss(real, fake),
            "non_saturating_d_loss": non_saturating_discriminator_loss(real, fake),
            "non_saturating_gen_loss": non_saturating_generator_loss(fake),
        }
        stored = golden_json(NAME)["scalars"]
        scalars |= {key: value for key, value in others.items() if f"A/{t}/{key}" in stored}
        check_scalars(f"A/{t}/", scalars, precision)
        parameters = dict(discriminator.named_parameters())
        gradients = torch.autograd.grad(got.loss, list(parameters.values()))
        check_all(f"A/{t}/grad/", dict(zip(parameters, gradients, strict=True)), dtype)
        check_all(f"A/{t}/after/", discriminator.state_dict(), dtype)
        if f"A/{t}/logits_real" in golden_tensors(NAME):
            check_tensor(f"A/{t}/logits_real", real, dtype)
            check_tensor(f"A/{t}/logits_fake", fake, dtype)


@pytest.mark.parametrize("precision", DTYPES)
def test_discriminator_in_eval_mode(precision: str):
    dtype = DTYPES[precision]
    discriminator = load_discriminator(dtype).eval()
    before = {key: value.clone() for key, value in discriminator.state_dict().items()}
    logits = discriminator(tensor("real/0", dtype))
    check_tensor("A/eval_mode_logits_real", logits, dtype)
    assert all(torch.equal(value, before[key]) for key, value in discriminator.state_dict().items())


def adam(discriminator: PatchDiscriminator) -> torch.optim.Adam:
    """The optimizer that the settings describe in words."""
    text = settings()["adam"]
    number = r"([\d.e+-]+)"
    rate = float(re.search(rf"lr {number}", text)[1])
    beta1, beta2 = (float(value) for value in re.search(rf"betas \({number}, {number}\)", text).groups())
    eps = float(re.search(rf"eps {number}", text)[1])
    return torch.optim.Adam(discriminator.parameters(), lr=rate, betas=(beta1, beta2), eps=eps)


def generator_scalars(
    discriminator: PatchDiscriminator, real: Tensor, reconstruction: Tensor, weight: Tensor, adaptive: bool
) -> dict[str, Tensor]:
    fed, config = settings()["codebook_losses_fed"], settings()
    nll = (real - reconstruction).abs().mean()
    gan = non_saturating_generator_loss(discriminator(reconstruction))
    if adaptive:
        of_nll, of_gan = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (nll, gan))
        gan_weight = adaptive_weight(of_nll, of_gan, config["disc_weight"])
        assert not gan_weight.requires_grad
    else:
        gan_weight = torch.tensor(as_float32(config["gen_loss_weight_fixed"]), dtype=real.dtype)
    codebook = config["quant_loss_weight"] * as_float32(fed["quant_loss"])
    codebook += config["entropy_loss_weight"] * as_float32(fed["entropy_loss"])
    return {
        "total_loss": nll + gan_weight * gan + codebook,
        "codebook_loss": torch.tensor(codebook, dtype=real.dtype),
        "nll_loss": nll,
        "reconstruct_loss": nll,
        "d_weight": gan_weight,
        "g_loss": gan_weight * gan,
        "unscaled_g_loss": gan,
    }


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("experiment", ROUNDS)
def test_training_rounds(experiment: str, precision: str):
    """Experiments B: discriminator loss, Adam step, generator loss; the generator is not stepped."""
    dtype = DTYPES[precision]
    discriminator, lecam = load_discriminator(dtype), Lecam(dtype)
    optimizer = adam(discriminator)
    weight, bias = (tensor(f"gen/last_layer_{key}", dtype).requires_grad_() for key in ("weight", "bias"))
    for t in steps_of(experiment):
        real = tensor(f"real/{t}", dtype)
        reconstruction = F.conv2d(tensor(f"gen/hidden/{t}", dtype), weight, bias, padding=1)
        got = discriminator_step(discriminator, lecam, real, reconstruction.detach())
        optimizer.zero_grad()
        got.loss.backward()
        optimizer.step()
        adaptive = experiment.endswith("adaptive")
        scalars = generator_scalars(discriminator, real, reconstruction, weight, adaptive)
        check_scalars(f"{experiment}/{t}/", got.scalars | scalars, precision)
        gradients = torch.autograd.grad(scalars["total_loss"], (weight, bias))
        for key, gradient in zip(("weight", "bias"), gradients, strict=True):
            check_tensor(f"{experiment}/{t}/grad_last_layer_{key}", gradient, dtype)
        check_all(f"{experiment}/{t}/after/", discriminator.state_dict(), dtype)


@pytest.mark.parametrize("precision", DTYPES)
def test_losses_of_bare_logits(precision: str):
    """Experiment C."""
    dtype = DTYPES[precision]
    real, fake = (tensor(f"C/logits_{kind}", dtype).requires_grad_() for kind in ("real", "fake"))
    ema = {kind: torch.tensor(value, dtype=dtype) for kind, value in settings()["C_lecam_ema"].items()}
    losses = {
        "hinge_d": hinge_discriminator_loss(real, fake),
        "vanilla_d": vanilla_discriminator_loss(real, fake),
        "non_saturating_d": non_saturating_discriminator_loss(real, fake),
        "non_saturating_gen": non_saturating_generator_loss(fake),
        "lecam": lecam_regularizer(real, fake, ema["real"], ema["fake"]),
    }
    check_scalars("C/", losses, precision)
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, (real, fake), allow_unused=True)
        check_all(f"C/grad/{name}/", dict(zip(("real", "fake"), gradients, strict=True)), dtype)


def test_default_decay_is_the_references():
    ema, mean = torch.tensor(0.3), torch.tensor(-1.0)
    assert torch.equal(lecam_update(ema, mean), lecam_update(ema, mean, 0.999))
