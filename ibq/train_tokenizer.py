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
from functools import partial

import torch

from ibq import dist
from ibq.config import UserError, exit_on_user_error
from ibq.engine.configs import LocalEngineConfig
from ibq.models.discriminator import PatchDiscriminator
from ibq.models.perceptual import build_perceptual
from ibq.models.tokenizer import Tokenizer
from ibq.ops.backend import image_format
from ibq.training.run import Command, naming
from ibq.training.run_data import RunData, image_data
from ibq.training.tokenizer_config import TokenizerRunConfig
from ibq.training.tokenizer_task import TokenizerTask

EXAMPLE = "python ibq/train_tokenizer.py --config yaml/tokenizer_16384.yaml training.micro_batch=8"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; the exit code."""
    with Command.begin(TokenizerRunConfig, __doc__.splitlines()[0], EXAMPLE, argv) as command:
        config: TokenizerRunConfig = command.config
        with command.part("model"):
            # One rank downloads the weights.
            perceptual = dist.main_first(lambda: build_perceptual(config.loss.perceptual))
        with command.part("data"), naming(command.source):
            data = image_data(config.data, config.model.resolution, config.seed, config.training.batch_size)
        command.bind(data)
        with command.part("engine"):
            task = build_task(command, data, perceptual)
        command.check_schedule(task.learning_rate)
        warmup, total = config.codebook_start.warmup_steps, config.training.total_steps(data.steps_per_epoch)
        if warmup >= total:
            raise UserError(
                f"{command.source}: codebook_start.warmup_steps: {warmup} must be below the run's {total} steps"
            )
        return command.train(task, data, title="tokenizer")


def build_task(command: Command, data: RunData, perceptual: torch.nn.Module | None) -> TokenizerTask:
    """Networks, engines and the task that trains them."""
    config: TokenizerRunConfig = command.config
    steps_per_epoch = data.steps_per_epoch
    total_steps = config.training.total_steps(steps_per_epoch)
    peak = config.optimizer.peak_learning_rate(config.training.batch_size)
    memory_format = image_format(command.device)
    engine = partial(command.engine, data=data, memory_format=memory_format)
    gan, discriminator = config.loss.gan, None
    if gan.enabled:  # small, and with batch statistics of its own: never sharded
        build = partial(PatchDiscriminator, gan.discriminator)
        discriminator = engine("discriminator", build, config=LocalEngineConfig(), ema_decay=None)
    return TokenizerTask(
        engine("tokenizer", lambda: Tokenizer(config.model), config=config.engine, ema_decay=config.ema_decay),
        discriminator,
        config.loss,
        perceptual=None if perceptual is None else perceptual.to(command.device),
        learning_rate=lambda step: config.schedule.learning_rate(peak, step, steps_per_epoch, total_steps),
        statistics=config.statistics,
        usage_alarm=config.usage_alarm,
        tokens_per_image=data.pixels_per_image / config.model.downsampling**2,
        memory_format=memory_format,
        codebook_start=config.codebook_start,
        first_batches=lambda: data.training(0, math.ceil(min(steps_per_epoch, total_steps)), lambda bad: None),
    )


if __name__ == "__main__":
    exit_on_user_error(main)
