"""Stage 1: one step of the tokenizer's GAN."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ibq import dist, losses
from ibq.config import UserError
from ibq.data.transforms import to_unit_range
from ibq.engine.base import Engine, GroupHyper, snapshot
from ibq.evaluation.codebook import latent_scale, reachable
from ibq.evaluation.reconstruction import CodeUsage, evaluate_reconstruction
from ibq.models.frozen_features import FrozenFeatures
from ibq.models.perceptual import perceptual_features
from ibq.models.tokenizer import Tokenizer, TokenizerOutput
from ibq.ops.kmeans import kmeans
from ibq.progress import say
from ibq.training.checkpoint import OWN, save_pretrained
from ibq.training.metrics import Stopwatch
from ibq.training.post_training import ChangeCodes, origin_of_codes, same_numbers
from ibq.training.task import Batch, StepOutcome, Validation
from ibq.training.tokenizer_config import CodebookStartConfig, TokenizerLossConfig

GRID_IMAGES = 8
COLLAPSE_PAGE = "ibq/quantizers/COLLAPSE.md"
FEATURES = "features"  # of a checkpoint's tensors: which frozen features the discriminator sees, as UTF-8


class TokenizerTask:
    """Trains a tokenizer against a discriminator.

    Order of the reference: one pass through the tokenizer; the discriminator's step on it; the generator's step on
    the same reconstruction with the discriminator already updated. With accumulation the reconstructions for the
    discriminator's step are made without a graph, so that memory stays that of one micro-batch. Where the generator is
    to be judged by the previous discriminator, its passes come first, and the discriminator learns from their results.
    """

    def __init__(
        self,
        generator: Engine,
        discriminator: Engine | None,
        config: TokenizerLossConfig,
        *,
        perceptual: torch.nn.Module | None,
        learning_rate,
        features: FrozenFeatures | None = None,
        statistics: Literal["rank", "world"] = "rank",
        usage_alarm: float = 0.1,
        tokens_per_image: float | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        codebook_start: CodebookStartConfig | None = None,
        first_batches: Callable[[], Iterable[list[Batch]]] | None = None,
        change_codes: ChangeCodes | None = None,
    ):
        self.engines = {"tokenizer": generator}
        if discriminator is not None:
            self.engines["discriminator"] = discriminator
        self.generator, self.discriminator, self.config = generator, discriminator, config
        self.perceptual, self.learning_rate, self.usage_alarm = perceptual, learning_rate, usage_alarm
        self.features = features
        self.memory_format = memory_format
        self.codebook_start = codebook_start or CodebookStartConfig()
        self.first_batches, self.change_codes = first_batches, change_codes
        self.tokenizer: Tokenizer = generator.module
        self._to_training()
        self.tokens_per_image = tokens_per_image or self.tokenizer.config.tokens_per_side**2
        if self.codebook_start.kmeans and not self.tokenizer.quantizer.learned_codebook:
            kind = self.tokenizer.config.quantizer.kind
            raise UserError(
                f"codebook_start.kmeans: model.quantizer.kind {kind} has no trained codebook to start from latents; "
                "set codebook_start.kmeans=false and codebook_start.warmup_steps=0"
            )
        if discriminator is not None and config.gan.adaptive and not self.tokenizer.last_layer.requires_grad:
            raise UserError(
                "optimizer.groups: the tokenizer's last layer is frozen, whose gradient loss.gan.adaptive needs; train "
                "it, or set loss.gan.adaptive=false"
            )
        device = next(self.tokenizer.parameters()).device
        self.reduce = dist.statistics_reduction(statistics)
        self.tokenizer.quantizer.mean_over_ranks = self.reduce
        if discriminator is not None and self.reduce is not None:
            discriminator.module.use_world_statistics(self.reduce, dist.world_size())
        self.lecam = {"real": torch.zeros((), device=device), "fake": torch.zeros((), device=device)}
        self.usage = CodeUsage(self.tokenizer.quantizer.num_codes, device)
        # Of the last step, for the alarm: images of a micro-batch, and the quantizer's metrics on the device.
        self._last: tuple[Tensor, Mapping[str, Tensor]] | None = None

    def step(self, step: int, batches: list[Batch], stopwatch: Stopwatch) -> StepOutcome:
        """Train both networks on the micro-batches (uint8 images, labels) of one step."""
        images = [to_unit_range(batch).contiguous(memory_format=self.memory_format) for batch, _ in batches]
        self._start_codebook(step)
        hyper = {name: GroupHyper(learning_rate=self.learning_rate(step)) for name in ("decay", "no_decay")}
        gan = self.discriminator is not None and step >= self.config.gan.start_step
        updated = gan and self.config.gan.judged_by == "updated"
        shared = len(images) == 1  # one forward pass serves both steps
        undo = self._snapshot(gan)
        metrics: dict[str, Tensor] = {"learning_rate": torch.tensor(hyper["decay"].learning_rate)}
        given = [None] * len(images)
        if self.change_codes is not None:
            with stopwatch.part("codes"):
                given = self._given_codes(images, batches, step, metrics)
        skipped, codes, fakes = False, [], []
        if updated and not shared:
            with torch.no_grad(), stopwatch.part("forward"):
                fakes = [self._decode(*pair, losses=False).reconstruction for pair in zip(images, given, strict=True)]
            with stopwatch.part("discriminator"):
                skipped |= self._discriminator_step(images, fakes, hyper, metrics)
        for x, instead in zip(images, given, strict=True):
            with self.generator.micro_batch():
                with stopwatch.part("forward"):
                    out = self._decode(x, instead)
                if updated and shared:
                    with stopwatch.part("discriminator"):
                        skipped |= self._discriminator_step([x], [out.reconstruction.detach()], hyper, metrics)
                with stopwatch.part("losses"):
                    loss = self._generator_loss(x, out, gan, metrics, share=1 / len(images))
                with stopwatch.part("backward"):
                    self.generator.backward(loss)
            codes.append(out.codes)
            if gan and not updated:
                fakes.append(out.reconstruction.detach())
        if gan and not updated:
            with stopwatch.part("discriminator"):
                skipped |= self._discriminator_step(images, fakes, hyper, metrics)
        self._last = batches[-1][0], out.metrics
        if not skipped:
            with stopwatch.part("optimizer"):
                result = self.generator.step(hyper)
            metrics["gradient_norm/tokenizer"] = result.gradient_norm
            skipped = result.skipped
        if skipped:  # both networks skip it: neither may run ahead of the other
            self.generator.discard()
            undo()
        elif not self.tokenizer.quantizer.passthrough:  # its codes mean nothing yet
            self.usage.add(torch.cat(codes))
        return StepOutcome(metrics=metrics, skipped=skipped)

    def _decode(self, images: Tensor, codes: Tensor | None, losses: bool = True) -> TokenizerOutput:
        """A pass through the tokenizer; only through its decoder where codes are given in place of the images'."""
        return self.generator(images, losses) if codes is None else self.generator(None, False, codes)

    @torch.no_grad()
    def _given_codes(self, images: list[Tensor], batches: list[Batch], step: int, metrics: dict) -> list[Tensor]:
        """Of each micro-batch the codes that are decoded in place of its own, where the decoder is trained alone."""
        given = []
        for x, (_, classes) in zip(images, batches, strict=True):
            with self.generator.autocast():
                own = self.tokenizer.encode(x)
            given.append(self.change_codes(own, classes, step))
            _add(metrics, "codes/changed", (given[-1] != own).float().mean(), 1 / len(images))
        return given

    def _to_training(self) -> None:
        """The tokenizer's training mode; an encoder that is not trained has no dropout, so that codes stay the same."""
        self.tokenizer.train()
        if self.change_codes is not None:
            self.tokenizer.encoder.eval()

    def _snapshot(self, gan: bool) -> Callable[[], None]:
        """A function that undoes what a step does before it is known to be good: the discriminator's update."""
        before = {name: tensor.clone() for name, tensor in self._averages().items()}
        restore = snapshot(self.discriminator) if gan else None

        def undo() -> None:
            for name, current in self._averages().items():
                current.copy_(before[name])
            if restore is not None:
                restore()

        return undo

    def _start_codebook(self, step: int) -> None:
        """Leave the quantizer out during its warm-up, and initialise its codebook at the end of it."""
        start = self.codebook_start
        self.tokenizer.quantizer.passthrough = step < start.warmup_steps
        if start.kmeans and step == start.warmup_steps:
            # From one rank: sums on an accelerator may differ in the last digit.
            self.generator.overwrite("quantizer.codebook", dist.from_main(self._latent_centres()))

    @torch.no_grad()
    def _latent_centres(self) -> Tensor:
        """k-means centres [K, D] of the latents of the first training images, the same on every rank."""
        quantizer, start = self.tokenizer.quantizer, self.codebook_start
        latents, images = [], 0
        for micro_batches in self.first_batches():
            with self.generator.autocast():
                own = [
                    quantizer.tokens(self.tokenizer.encode_latents(to_unit_range(batch))) for batch, _ in micro_batches
                ]
            # Gathered step by step they are in the order of the global batch, whatever the number of ranks.
            latents.append(dist.all_gather_rows(torch.cat(own)))
            images += sum(len(batch) for batch, _ in micro_batches) * dist.world_size()
            if images >= start.images:
                break
        try:
            return kmeans(
                torch.cat(latents),
                quantizer.num_codes,
                iterations=start.iterations,
                spherical=quantizer.spherical,
                generator=torch.Generator().manual_seed(0),
            )
        except ValueError as error:
            raise UserError(f"codebook_start.images: {error}") from error

    def _discriminator_step(self, reals, fakes, hyper, metrics) -> bool:
        """One update of the discriminator; whether it was skipped."""
        engine, gan = self.discriminator, self.config.gan
        share = 1 / len(reals)
        for real, fake in zip(reals, fakes, strict=True):
            with engine.micro_batch():
                # Two separate passes, real first: batch normalization sees them apart.
                real_logits = self._judged(engine, real)
                fake_logits = self._judged(engine, fake)
                self._update_lecam(real_logits, fake_logits, share)
                loss = losses.discriminator_loss(gan.loss, real_logits, fake_logits)
                lecam = losses.lecam_regularizer(real_logits, fake_logits, self.lecam["real"], self.lecam["fake"])
                engine.backward(loss + gan.lecam_weight * lecam)
            _add(metrics, "gan/discriminator", loss, share)
            _add(metrics, "gan/lecam", lecam, share)
            _add(metrics, "gan/logits_real", real_logits.mean(), share)
            _add(metrics, "gan/logits_fake", fake_logits.mean(), share)
        result = engine.step(hyper)
        metrics["gradient_norm/discriminator"] = result.gradient_norm
        return result.skipped

    def _judged(self, judge: Callable[[Any], Tensor], images: Tensor) -> Tensor:
        """A discriminator's logits of the images, which it may see through frozen features."""
        with self.discriminator.autocast():
            return judge(images if self.features is None else self.features(images)).float()

    @torch.no_grad()
    def _update_lecam(self, real: Tensor, fake: Tensor, share: float) -> None:
        """With a `share` of a step's images: however many micro-batches there are, a step counts as one update."""
        decay = losses.LECAM_DECAY**share
        for name, logits in (("real", real), ("fake", fake)):
            mean = logits.mean()
            if self.reduce is not None:
                mean = self.reduce(mean)
            self.lecam[name] = losses.lecam_update(self.lecam[name], mean, decay)

    def _generator_loss(self, x: Tensor, out, gan: bool, metrics: dict[str, Tensor], share: float) -> Tensor:
        config = self.config
        reconstruction = out.reconstruction.float()
        nll = l1 = (reconstruction - x).abs().mean()
        _add(metrics, "loss/l1", l1, share)
        if self.perceptual is not None:
            with self.generator.autocast():
                lpips = self.perceptual(x, reconstruction).float().mean()
            _add(metrics, "loss/perceptual", lpips, share)
            nll = nll + config.perceptual.weight * lpips
        if config.gram.weight:
            gram = self._gram_loss(x, reconstruction)
            _add(metrics, "loss/gram", gram, share)
            nll = nll + config.gram.weight * gram
        loss = nll
        if "quantization" in out.losses:
            loss = loss + config.quantization_weight * out.losses["quantization"]
        if "entropy" in out.losses:
            loss = loss + config.entropy_weight * out.losses["entropy"]
        for name, value in {**out.losses, **out.metrics}.items():
            _add(metrics, f"quantizer/{name}", value, share)
        if gan:
            gan_loss, weight = self._gan_loss(reconstruction, nll)
            _add(metrics, "gan/generator", gan_loss, share)
            _add(metrics, "gan/weight", weight, share)
            loss = loss + weight * gan_loss
        _add(metrics, "loss/total", loss, share)
        return loss

    def _gram_loss(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        see = partial(perceptual_features, self.perceptual)
        if self.config.gram.features == "discriminator":
            see = self.features.plain
        with self.generator.autocast():
            found, wanted = see(reconstruction), see(x)
        return losses.gram_loss([layer.float() for layer in found], [layer.float() for layer in wanted])

    def _gan_loss(self, reconstruction: Tensor, nll: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's loss against the frozen discriminator, and its weight."""
        discriminator = self.discriminator.module.requires_grad_(False)
        logits = self._judged(discriminator, reconstruction)
        discriminator.requires_grad_(True)
        gan_loss = losses.non_saturating_generator_loss(logits)
        weight = torch.full((), self.config.gan.weight, device=logits.device)
        if self.config.gan.adaptive:
            layer = self.tokenizer.last_layer
            gradients = [torch.autograd.grad(loss, layer, retain_graph=True)[0] for loss in (nll, gan_loss)]
            if self.reduce is not None:
                gradients = [self.reduce(gradient) for gradient in gradients]
            weight = losses.adaptive_weight(*gradients, self.config.gan.weight)
        return gan_loss, weight

    def interval_metrics(self, step: int) -> dict[str, float]:
        """Codebook figures over the codes seen since the last call, with an alarm when the codebook collapses."""
        figures = self.usage.reduce().figures()
        # So many tokens can't touch all codes, however evenly they are spread.
        most = reachable(figures["tokens_per_code"])
        share = figures["usage"] / most if most else 1.0
        started = step > self.codebook_start.warmup_steps  # before, the codebook is not in use
        if share < self.usage_alarm and started:  # the same on all ranks
            self._alarm(step, figures["usage"], share)
        self.usage = CodeUsage(self.tokenizer.quantizer.num_codes, self.usage.counts.device)
        return {
            "codebook/usage": figures["usage"],
            "codebook/perplexity": figures["perplexity"],
            "codebook/usage_of_reachable": share,
            "tokens_per_image": self.tokens_per_image,
        }

    @torch.no_grad()
    def _alarm(self, step: int, usage: float, share: float) -> None:
        """Say that the codebook collapses, and what there is to see; all ranks call it: the encoder may be sharded."""
        quantizer, lines = self.tokenizer.quantizer, []
        if self._last is not None:
            images, metrics = self._last
            with self.generator.autocast():
                z = self.tokenizer.encode_latents(to_unit_range(images))
            lines.append(str(latent_scale(quantizer, quantizer.tokens(z), quantizer.encode(z).flatten())))
            if metrics:
                found = {name.replace("_", " "): float(value) for name, value in metrics.items()}
                text = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
                lines.append(f"{text} nats, of at most {math.log(quantizer.num_codes):.3f}")
        if dist.is_main():
            lines.append(f"what to look at and to try: {COLLAPSE_PAGE}, python tools/inspect_codebook.py RUN")
            say(
                f"ALARM step {step}: codebook collapse: {usage:.2%} of the codes in use, "
                f"{share:.2%} of what this many tokens could use" + "".join(f"\n  {line}" for line in lines)
            )

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> Validation:
        """Reconstruction figures with averaged weights; the score is the PSNR.

        Where the decoder is trained alone, also those of the codes that it is trained on, whose PSNR is the score then.
        """
        change, score, others = self.change_codes, "psnr", {}
        if change is not None:
            score, others = f"psnr_{change.config.kind}", {change.config.kind: partial(change, step=0)}
        self.tokenizer.eval()
        with self.generator.averaged(), self.generator.autocast(), same_numbers(self.usage.counts.device):
            report = evaluate_reconstruction(
                self.tokenizer, batches, perceptual=self.perceptual, keep=GRID_IMAGES, others=others
            )
        self._to_training()
        grid = torch.stack([report.originals, report.reconstructions]) if len(report.originals) else torch.empty(0)
        return Validation(
            metrics=report.metrics, score=report.metrics[score], images={"original_above_reconstruction": grid}
        )

    def _averages(self) -> dict[str, Tensor]:
        """LeCAM's averages and the discriminator's batch statistics."""
        tensors = {f"lecam/{name}": value for name, value in self.lecam.items()}
        if self.discriminator is not None:
            tensors |= {f"discriminator/{name}": b for name, b in self.discriminator.module.named_buffers()}
        return tensors

    def rank_tensors(self) -> dict[str, Tensor]:
        """The averages, and the codes counted since the last log."""
        tensors = self._averages() | {f"{OWN}code_counts": self.usage.counts}
        if self.features is not None:
            tensors[FEATURES] = torch.tensor([*self.features.identity.encode()], dtype=torch.uint8)
        return tensors

    def load_rank_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore them; UserError where the discriminator has learned from other features."""
        own = self.rank_tensors()
        if FEATURES in own and not torch.equal(there := tensors[FEATURES], own.pop(FEATURES)):
            raise UserError(
                "loss.gan.discriminator: the checkpoint's has learned from other features "
                f"({bytes(there.tolist()).decode()}, here {self.features.identity}); give the same backbone and "
                "weights, or use --fresh to start over"
            )
        for name, current in own.items():
            if name in tensors or not name.startswith(OWN):
                current.copy_(tensors[name])

    def save_pretrained(self, folder: Path, info: Mapping) -> None:
        """Write the averaged weights for `ibq.load_tokenizer`; of a decoder alone also whose codes they are for."""
        if self.change_codes is not None:
            info = {**info, **origin_of_codes(info)}
        save_pretrained(folder, self.generator, info)


def _add(metrics: dict[str, Tensor], name: str, value: Tensor, share: float) -> None:
    metrics[name] = metrics.get(name, 0) + value.detach() * share
