"""Everything that the config of a tokenizer run says: stage 1."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ibq.config import require_least
from ibq.data.buckets import check_shapes
from ibq.data.shards import ImageDataConfig
from ibq.engine.base import OptimizerConfig
from ibq.engine.configs import EngineConfig, LocalEngineConfig, ZeroEngineConfig
from ibq.engine.heartbeat import HeartbeatConfig
from ibq.losses import DiscriminatorLoss
from ibq.models.discriminator import DiscriminatorConfig, PatchDiscriminatorConfig
from ibq.models.feature_discriminator import FeaturesDiscriminatorConfig
from ibq.models.perceptual import BACKBONES, PerceptualConfig
from ibq.models.tokenizer_config import SMALLEST_IMAGE, TokenizerConfig
from ibq.training.checkpoint import CheckpointConfig
from ibq.training.loop import TrainingConfig
from ibq.training.post_training import CodesConfig, check_codes
from ibq.training.run import check_seed_and_average
from ibq.training.schedule import MultiStepScheduleConfig, TokenizerScheduleConfig
from ibq.training.start_from.config import TokenizerStartConfig, settled
from ibq.training.writers import LogConfig


@dataclass(frozen=True, kw_only=True)
class GanConfig:
    """The discriminator and its losses."""

    enabled: bool = True
    start_step: int = 0  # steps before it train without the discriminator
    weight: float = 0.1  # of the generator loss, or of the adaptive weight
    adaptive: bool = False  # balance the gradients of the last layer (VQGAN, which takes `weight: 0.4`)
    loss: DiscriminatorLoss = "hinge"
    lecam_weight: float = 0.05
    # Whose judgement the generator's loss is: the discriminator's after its own step on these images, as the reference
    # has it, or before, which with accumulation needs one pass through the tokenizer instead of two.
    judged_by: Literal["updated", "previous"] = "updated"
    discriminator: DiscriminatorConfig = field(default_factory=PatchDiscriminatorConfig)

    def __post_init__(self):
        for name in ("start_step", "weight", "lecam_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class GramConfig:
    """Distance of the Gram matrices of frozen features (Johnson et al., arXiv 1603.08155). Weight 0 switches it off."""

    weight: float = 0.0
    # Of VGG-16, those that LPIPS compares, or of the discriminator's backbone, at its `layers`.
    features: Literal["perceptual", "discriminator"] = "perceptual"

    def __post_init__(self):
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight: must be finite and not negative, got {self.weight}; 0 leaves it out")


@dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    """Weights of the losses: L1 + LPIPS + Gram + GAN + quantization + entropy."""

    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    gram: GramConfig = field(default_factory=GramConfig)
    quantization_weight: float = 1.0
    entropy_weight: float = 0.05
    gan: GanConfig = field(default_factory=GanConfig)

    def __post_init__(self):
        for name in ("quantization_weight", "entropy_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be finite and not negative, got {getattr(self, name)}; 0 leaves it out")
        self._check_gram()

    def _check_gram(self) -> None:
        if not self.gram.weight:
            return
        if self.gram.features == "perceptual" and not self.perceptual.weight:
            raise ValueError(
                "gram.features: perceptual are those of LPIPS, which perceptual.weight=0 leaves out; take discriminator"
            )
        on_features = self.gan.enabled and isinstance(self.gan.discriminator, FeaturesDiscriminatorConfig)
        if self.gram.features == "discriminator" and not on_features:
            raise ValueError(
                "gram.features: discriminator needs gan.enabled=true and gan.discriminator.kind=features; or take "
                "perceptual"
            )


@dataclass(frozen=True, kw_only=True)
class CodebookStartConfig:
    """Initialise the codebook from latents instead of at random.

    For the first `warmup_steps` the decoder sees the latents unquantized; then the codebook becomes the k-means centres
    of the latents of `images` training images.
    """

    kmeans: bool = False
    warmup_steps: int = 0
    images: int = 1_024
    iterations: int = 8

    def __post_init__(self):
        require_least(self, warmup_steps=0, images=1, iterations=1)
        if self.warmup_steps and not self.kmeans:
            raise ValueError("warmup_steps: makes sense only with kmeans: true")


@dataclass(frozen=True, kw_only=True)
class TokenizerRunConfig:
    """Everything about one tokenizer run."""

    output: str = "runs/tokenizer"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"  # the quantizer always runs in fp32
    # Of batch normalization, batch entropy and LeCAM; "world" gives the same training for every world size with the
    # same world size x micro-batch.
    statistics: Literal["rank", "world"] = "rank"
    ema_decay: float = 0.999
    ema_warmup: bool = False  # average over fewer steps at first: for short runs
    usage_alarm: float = 0.1  # share of the reachable codes under which the codebook counts as collapsed
    data: ImageDataConfig
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    start_from: str | TokenizerStartConfig | None = None  # a place with weights, alone or with options
    codebook_start: CodebookStartConfig = field(default_factory=CodebookStartConfig)
    codes: CodesConfig | None = None  # train the decoder alone, on other codes than those of the images
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: TokenizerScheduleConfig = field(default_factory=MultiStepScheduleConfig)
    training: TrainingConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=LocalEngineConfig)
    heartbeat: HeartbeatConfig = field(default_factory=HeartbeatConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        check_seed_and_average(self.seed, self.ema_decay)
        if self.model.in_channels != 3:
            raise ValueError(f"model.in_channels: images have 3 channels, not {self.model.in_channels}")
        if isinstance(self.engine, ZeroEngineConfig):
            raise ValueError("engine.kind: zero is for the transformer; set engine.kind to local or fsdp")
        start = self.start
        if start is not None and self.codebook_start.kmeans and start.codebook != "new":
            raise ValueError(
                "codebook_start.kmeans: would replace the codebook of start_from; set codebook_start.kmeans=false and "
                "codebook_start.warmup_steps=0, or start_from.codebook=new"
            )
        if self.codes is not None:
            check_codes(self.codes, start, self.optimizer.groups)
            if self.codes.kind == "generated" and self.training.micro_batch == "auto":
                raise ValueError("training.micro_batch: auto does not count codes.transformer; give a number")
        smallest = BACKBONES["vgg"].smallest if self.loss.perceptual.weight else SMALLEST_IMAGE
        check_shapes(self.data.buckets, self.model.downsampling, smallest)
        side, gan = min((min(shape) for shape in self.data.buckets), default=self.model.resolution), self.loss.gan
        patch = gan.enabled and isinstance(gan.discriminator, PatchDiscriminatorConfig)
        if patch and side < gan.discriminator.smallest_side:
            raise ValueError(
                f"loss.gan.discriminator.layers: {gan.discriminator.layers} layers need images of at least "
                f"{gan.discriminator.smallest_side} pixels, not {side}; take fewer layers"
            )

    @property
    def start(self) -> TokenizerStartConfig | None:
        """`start_from` with all its options; None for new weights."""
        return settled(self.start_from, TokenizerStartConfig)
