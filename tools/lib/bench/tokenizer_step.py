"""A training step of the tokenizer's GAN: images/s, share of what the machine's products allow, memory, time by part.

All of it: encoder, quantizer, decoder, LPIPS over VGG-16 (random weights), the discriminator's step, both optimizers
and the average. Against a plain form with equal weights: tables for the quantizer, optimizers and average one operation
after the other.
"""

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq import losses
from ibq.config import UserError, load_section
from ibq.data.transforms import to_unit_range
from ibq.engine.base import EngineSettings, OptimizerConfig
from ibq.engine.blueprint import Blueprint
from ibq.engine.configs import LocalEngineConfig
from ibq.engine.local import LocalEngine
from ibq.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from ibq.models.perceptual import build_lpips
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.ops import textbook
from ibq.ops.backend import image_format
from ibq.quantizers import IBQConfig
from ibq.scaling.tokenizer import quantizer_flops, tokenizer_flops
from ibq.scaling.tokenizer_losses import discriminator_flops, perceptual_flops
from ibq.training.metrics import Stopwatch
from ibq.training.run import set_up_torch
from ibq.training.tokenizer_config import TokenizerLossConfig
from ibq.training.tokenizer_task import TokenizerTask
from tools.lib.bench import step as bench_step

RATE = 1e-4
OPTIMIZER = OptimizerConfig(kind="adam", learning_rate=RATE, betas=(0.5, 0.9))
EMA_DECAY = 0.999
IBQ_PRODUCTS, IBQ_TEXTBOOK_PRODUCTS = 5, 8  # of tokens x codes x dim


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    bench_step.add_options(parser, config="yaml/tokenizer_262144.yaml", batch=1, steps=2, compiled="auto")


def measure(arguments: argparse.Namespace) -> dict:
    """Each form in a process of its own, then the machine's own rates."""
    model = load_section(TokenizerConfig, arguments.config, "model")  # errors before the wait
    loss = load_section(TokenizerLossConfig, arguments.config, "loss")
    if not isinstance(loss.gan.discriminator, PatchDiscriminatorConfig):
        raise UserError("loss.gan.discriminator.kind: the bench has patch alone; give a config with that")
    figures = bench_step.measure_forms(arguments, measure_form, measure_rates)
    flops = needed_flops(model, loss)
    floor = arguments.batch * sum(flops[precision] / figures["rates"][precision] for precision in flops)
    for form in bench_step.FORMS:
        figures[form]["images_per_second"] = arguments.batch / figures[form]["seconds"]
        figures[form]["of_limit"] = floor / figures[form]["seconds"]
    return figures | {"flops_per_image": flops, "floor_seconds": floor}


def needed_flops(model: TokenizerConfig, loss: TokenizerLossConfig) -> dict[str, float]:
    """FLOPs of a step that an image cannot do without, by precision: the quantizer's are float32, nothing recomputed.

    Of index backpropagation's, the five products of tokens x codes x dim that its gradients need.
    """
    quantizer, networks = model.quantizer, tokenizer_flops(model)
    own = quantizer_flops(quantizer, model.tokens_per_side**2).textbook
    others = discriminator_flops(loss.gan.discriminator, model.resolution).textbook
    others += perceptual_flops(model.resolution).textbook
    lean = IBQ_PRODUCTS / IBQ_TEXTBOOK_PRODUCTS if isinstance(quantizer, IBQConfig) else 1
    return {"bf16": networks.textbook - own + others, "fp32": own * lean}


def table(figures: dict) -> str:
    """The figures for people."""
    rows = {
        "images/s": "images_per_second",
        "seconds a step": "seconds",
        "peak GiB": "peak_gib",
        "of the products' limit": "of_limit",
    }
    return f"{bench_step.table(figures, rows)}; at these rates the products alone take {figures['floor_seconds']:.3f} s"


# --- In a process of its own ---


def measure_rates(*, config: str, batch: int, device: str) -> dict[str, float]:
    """The machine's own limits, for products at the shapes of the widest convolutions and of the quantizer."""
    set_up_torch(training=True)
    model = load_section(TokenizerConfig, config, "model")
    convolutions = []
    for level, multiplier in enumerate(model.channel_multipliers):
        channels, side = model.channels * multiplier, model.resolution // 2**level
        convolutions.append((batch * side * side, 9 * channels, channels))
    codes, dim = model.quantizer.num_codes, model.quantizer.dim
    return bench_step.machine_rates(convolutions, [(codes, dim, batch * model.tokens_per_side**2)], device)


def measure_form(*, form: str, config: str, batch: int, steps: int, compile: str, device: str) -> dict:
    """A form's figures."""
    bench_step.set_up(form)
    model = load_section(TokenizerConfig, config, "model")
    settings = load_section(TokenizerLossConfig, config, "loss")
    networks = model, settings, torch.device(device)
    trainer = PlainStep(*networks) if form == "plain" else OurStep(*networks, bench_step.engine_config(config, compile))
    generator = torch.Generator().manual_seed(0)
    shape = (batch, model.in_channels, model.resolution // 8, model.resolution // 8)
    coarse = torch.rand(shape, generator=generator)
    images = F.interpolate(coarse * 255, scale_factor=8, mode="bilinear").to(torch.uint8).to(device)
    return bench_step.time_steps(
        lambda: float(trainer.step(images)), trainer.stopwatch, trainer.held_bytes(), steps, device
    )


def _blueprints(model: TokenizerConfig, settings: TokenizerLossConfig) -> tuple[Blueprint, Blueprint]:
    discriminator = settings.gan.discriminator
    return (
        Blueprint(name="tokenizer", build=lambda: Tokenizer(model), seed=0),
        Blueprint(name="discriminator", build=lambda: PatchDiscriminator(discriminator), seed=0),
    )


def _bytes(*modules: nn.Module) -> int:
    return sum(4 * parameter.numel() for module in modules for parameter in module.parameters())


class OurStep:
    """What `ibq/train_tokenizer.py` does."""

    def __init__(
        self, model: TokenizerConfig, settings: TokenizerLossConfig, device: torch.device, engine: LocalEngineConfig
    ):
        memory_format = image_format(device)
        common = {"optimizer": OPTIMIZER, "device": device, "precision": "bf16", "memory_format": memory_format}
        generator, discriminator = _blueprints(model, settings)
        gan = replace(settings, gan=replace(settings.gan, start_step=0))
        self.task = TokenizerTask(
            LocalEngine(generator, EngineSettings(**common, ema_decay=EMA_DECAY), engine),
            LocalEngine(discriminator, EngineSettings(**common)),
            gan,
            perceptual=build_lpips("vgg", "random", remedy="").to(device),
            learning_rate=lambda step: RATE,
            memory_format=memory_format,
        )
        self.stopwatch = Stopwatch(device)

    def held_bytes(self) -> int:
        """Weights, moments and average, which are there before a step."""
        return 4 * _bytes(self.task.tokenizer) + 3 * _bytes(self.task.discriminator.module)

    def step(self, images: Tensor) -> Tensor:
        """Train on a batch; its loss."""
        return self.task.step(0, [(images, None)], self.stopwatch).metrics["loss/total"]


class PlainStep:
    """The published structure, which stays as it is: the baseline."""

    def __init__(self, model: TokenizerConfig, settings: TokenizerLossConfig, device: torch.device):
        generator, discriminator = _blueprints(model, settings)
        self.tokenizer: Tokenizer = generator.whole().to(device).train()
        self.discriminator: PatchDiscriminator = discriminator.whole().to(device).train()
        self.average = [parameter.detach().clone() for parameter in self.tokenizer.parameters()]
        self.perceptual = build_lpips("vgg", "random", remedy="").to(device)
        self.settings, self.device, self.stopwatch = settings, device, Stopwatch(device)
        self.lecam = [torch.zeros((), device=device), torch.zeros((), device=device)]
        plain = {"lr": RATE, "betas": OPTIMIZER.betas, "foreach": False, "fused": False}
        self.optimizers = [torch.optim.Adam(m.parameters(), **plain) for m in (self.tokenizer, self.discriminator)]

    def held_bytes(self) -> int:
        """Weights, moments and average, which are there before a step."""
        return 4 * _bytes(self.tokenizer) + 3 * _bytes(self.discriminator)

    def step(self, images: Tensor) -> Tensor:
        """Train on a batch; its loss."""
        part, x = self.stopwatch.part, to_unit_range(images)
        with part("forward"), self._autocast():
            latents = self.tokenizer.encode_latents(x)
            quantized, quantization, entropy = self._quantize(latents)
            reconstruction = self.tokenizer.decode_latents(quantized)
        with part("discriminator"):
            self._discriminator_step(x, reconstruction.detach())
        with part("losses"), self._autocast():
            nll = (reconstruction.float() - x).abs().mean() + self.perceptual(x, reconstruction.float()).float().mean()
            logits = self.discriminator(reconstruction).float()
            gan = self.settings.gan.weight * losses.non_saturating_generator_loss(logits)
            loss = nll + self.settings.quantization_weight * quantization + self.settings.entropy_weight * entropy + gan
        with part("backward"):
            loss.backward()
        with part("optimizer"):
            self.optimizers[0].step()
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for own, parameter in zip(self.average, self.tokenizer.parameters(), strict=True):
                    own.mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.tokenizer.quantizer.config
        with torch.autocast(self.device.type, enabled=False):
            tokens = latents.float().flatten(2).transpose(1, 2).flatten(0, 1)
            found = textbook.index_backprop(
                tokens, self.tokenizer.quantizer.codebook, beta=config.beta, temperature=config.entropy_temperature
            )
        batch, dim, height, width = latents.shape
        quantized = found.latents.view(batch, height * width, dim).transpose(1, 2).reshape(latents.shape)
        return quantized, found.quantization_loss, found.sample_entropy - found.batch_entropy

    def _discriminator_step(self, real: Tensor, fake: Tensor) -> None:
        with self._autocast():
            real_logits, fake_logits = self.discriminator(real).float(), self.discriminator(fake).float()
            logits = (real_logits, fake_logits)
            self.lecam = [losses.lecam_update(e, v.detach().mean()) for e, v in zip(self.lecam, logits, strict=True)]
            loss = losses.hinge_discriminator_loss(*logits)
            loss = loss + self.settings.gan.lecam_weight * losses.lecam_regularizer(*logits, *self.lecam)
        loss.backward()
        self.optimizers[1].step()
        self.optimizers[1].zero_grad(set_to_none=True)
