"""Stage 1: train an image tokenizer.

python ibq/train_tokenizer.py --config yaml/tokenizer_16384.yaml data.train='shards/train-*.tar'
torchrun --nproc-per-node 8 ibq/train_tokenizer.py --config yaml/tokenizer_262144.yaml
"""

import sys
from pathlib import Path

# A script's own folder comes first on sys.path; there `ibq/` would hide other packages, and `ibq` itself be missing.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from ibq import dist
from ibq.config import UserError, exit_on_user_error
from ibq.data.shards import ImageDataConfig
from ibq.engine.base import EngineSettings, OptimizerConfig
from ibq.engine.build import build_engine
from ibq.engine.configs import EngineConfig, LocalEngineConfig, ZeroEngineConfig
from ibq.engine.heartbeat import HeartbeatConfig
from ibq.models.discriminator import PatchDiscriminator
from ibq.models.perceptual import build_perceptual
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.training.checkpoint import CheckpointConfig
from ibq.training.loop import TrainingConfig
from ibq.training.run import (
    bind_data,
    check_schedule,
    check_seed_and_average,
    naming,
    parse_arguments,
    set_up_torch,
    train_in_folder,
)
from ibq.training.run_data import RunData, image_data
from ibq.training.startup import StartUp, TimedBlueprint
from ibq.training.tokenizer_task import (
    CodebookStartConfig,
    MultiStepScheduleConfig,
    TokenizerLossConfig,
    TokenizerScheduleConfig,
    TokenizerTask,
)


@dataclass(frozen=True, kw_only=True)
class TokenizerRunConfig:
    """Everything about one tokenizer run."""

    output: str = "runs/tokenizer"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"  # the quantizer always runs in fp32
    statistics: Literal["rank", "world"] = (
        "rank"  # of batch normalization, batch entropy and LeCAM; "world" gives the same
    )
    # training for every world size with the same world size x micro-batch
    ema_decay: float = 0.999
    ema_warmup: bool = False  # average over fewer steps at first: for short runs
    usage_alarm: float = 0.1  # share of the reachable codes under which the codebook counts as collapsed
    data: ImageDataConfig
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    codebook_start: CodebookStartConfig = field(default_factory=CodebookStartConfig)
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: TokenizerScheduleConfig = field(default_factory=MultiStepScheduleConfig)
    training: TrainingConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=LocalEngineConfig)
    heartbeat: HeartbeatConfig = field(default_factory=HeartbeatConfig)

    def __post_init__(self):
        check_seed_and_average(self.seed, self.ema_decay)
        if self.model.in_channels != 3:
            raise ValueError(f"model.in_channels: images have 3 channels, not {self.model.in_channels}")
        if isinstance(self.engine, ZeroEngineConfig):
            raise ValueError("engine.kind: zero is for the transformer; set engine.kind to local or fsdp")
        gan = self.loss.gan
        if gan.enabled and self.model.resolution < gan.discriminator.smallest_side:
            raise ValueError(
                f"loss.gan.discriminator.layers: {gan.discriminator.layers} layers need images of at least "
                f"{gan.discriminator.smallest_side} pixels, not {self.model.resolution}; take fewer layers"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; the exit code."""
    start_up = StartUp()
    arguments = parse_arguments(
        TokenizerRunConfig, __doc__.splitlines()[0],
        "python ibq/train_tokenizer.py --config yaml/tokenizer_16384.yaml training.micro_batch=8", argv,
    )  # fmt: skip
    config: TokenizerRunConfig = arguments.config
    set_up_torch(training=True)
    device = dist.setup(config.device)
    with start_up.part("model"):
        perceptual = dist.main_first(lambda: build_perceptual(config.loss.perceptual))  # one rank downloads the weights
    with start_up.part("data"), naming(arguments.source):
        data = image_data(config.data, config.model.resolution, config.seed)
    bind_data(data, config.training, device, arguments.source)
    with start_up.part("engine"):
        task = build_task(config, data, device, perceptual, start_up)
    check_schedule(task.learning_rate, arguments.source)
    warmup, total = config.codebook_start.warmup_steps, config.training.total_steps(data.steps_per_epoch)
    if warmup >= total:
        raise UserError(
            f"{arguments.source}: codebook_start.warmup_steps: {warmup} must be below the run's {total} steps"
        )
    return train_in_folder(task, data, config, arguments.fresh, device, title="tokenizer", start_up=start_up)


def build_task(
    config: TokenizerRunConfig, data: RunData, device: torch.device, perceptual, start_up: StartUp
) -> TokenizerTask:
    """Networks, engines and the task that trains them."""
    total_steps = config.training.total_steps(data.steps_per_epoch)
    peak = config.optimizer.peak_learning_rate(config.training.batch_size)
    gan = config.loss.gan
    # Convolutions on tensor cores want channels last; small ones on the CPU do not.
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format

    def engine(kind, name, build, ema_decay):
        return build_engine(
            kind,
            TimedBlueprint(name=name, build=build, seed=config.seed, start_up=start_up),
            EngineSettings(
                optimizer=config.optimizer,
                device=device,
                precision=config.precision,
                accumulation=data.batching.accumulation,
                ema_decay=ema_decay,
                ema_warmup=config.ema_warmup,
                memory_format=memory_format,
            ),
        )

    discriminator = None
    if gan.enabled:  # small, and with batch statistics of its own: never sharded
        build = partial(PatchDiscriminator, gan.discriminator)
        discriminator = engine(LocalEngineConfig(), "discriminator", build, None)
    return TokenizerTask(
        engine(config.engine, "tokenizer", lambda: Tokenizer(config.model), config.ema_decay),
        discriminator,
        config.loss,
        perceptual=None if perceptual is None else perceptual.to(device),
        learning_rate=lambda step: config.schedule.learning_rate(peak, step, data.steps_per_epoch, total_steps),
        statistics=config.statistics,
        usage_alarm=config.usage_alarm,
        memory_format=memory_format,
        codebook_start=config.codebook_start,
        first_batches=lambda: data.training(0, math.ceil(min(data.steps_per_epoch, total_steps)), lambda bad: None),
    )


if __name__ == "__main__":
    exit_on_user_error(main)
