"""Stage 1: train an image tokenizer.

python ibq/train_tokenizer.py --config yaml/tokenizer_16384.yaml data.train='shards/train-*.tar'
torchrun --nproc-per-node 8 ibq/train_tokenizer.py --config yaml/tokenizer_262144.yaml
"""

import gc
import sys
from pathlib import Path

# A script's own folder comes first on sys.path; there `ibq/` would hide other packages, and `ibq` itself be missing.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    gc.disable()  # until all is imported, which stays: looking for garbage in it took a fifth of the start

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from ibq import dist
from ibq.config import UserError, exit_on_user_error
from ibq.engine.configs import LocalEngineConfig
from ibq.engine.local import PRECISIONS
from ibq.models.discriminator import build_discriminator
from ibq.models.feature_discriminator import FeaturesDiscriminatorConfig, images_of_group
from ibq.models.frozen_features import FrozenFeatures
from ibq.models.perceptual import build_perceptual
from ibq.models.tokenizer import Tokenizer
from ibq.ops.backend import image_format
from ibq.training.post_training import (
    ChangeCodes,
    GeneratedCodesConfig,
    Generation,
    Perturbation,
    PerturbedCodesConfig,
    check_origin,
    frozen_groups,
    open_transformer,
)
from ibq.training.run import Command, naming
from ibq.training.run_data import RunData, image_data
from ibq.training.start_from.config import TokenizerStartConfig
from ibq.training.start_from.fit import Fit, fit_tokenizer
from ibq.training.start_from.places import Source, open_place
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
            features = dist.main_first(lambda: frozen_features(config))
        with command.part("data"), naming(command.source):
            data = image_data(config.data, config.model.resolution, config.seed, config.training.batch_size)
        command.bind(data)
        start = command.start(partial(open_fit, config))
        with command.part("engine"):
            task = build_task(command, data, perceptual, features)
        command.check_schedule(task.learning_rate)
        warmup, total = config.codebook_start.warmup_steps, config.training.total_steps(data.steps_per_epoch)
        if warmup >= total:
            raise UserError(
                f"{command.source}: codebook_start.warmup_steps: {warmup} must be below the run's {total} steps"
            )
        return command.train(task, data, title="tokenizer", start=start)


def open_fit(config: TokenizerRunConfig, start: TokenizerStartConfig) -> tuple[Source, Fit]:
    """The weights at the place of `start_from`, and how they become those of the run."""
    source = open_place(Tokenizer, start)
    if isinstance(config.codes, GeneratedCodesConfig):
        check_origin(config.codes, source)
    return source, fit_tokenizer(source, config, start)


def frozen_features(config: TokenizerRunConfig) -> FrozenFeatures | None:
    """What the discriminator sees of images; None where it sees the images themselves, or there is none."""
    gan = config.loss.gan
    on_features = gan.enabled and isinstance(gan.discriminator, FeaturesDiscriminatorConfig)
    return FrozenFeatures(gan.discriminator) if on_features else None


def build_task(
    command: Command, data: RunData, perceptual: torch.nn.Module | None, features: FrozenFeatures | None
) -> TokenizerTask:
    """Networks, engines and the task that trains them."""
    config: TokenizerRunConfig = command.config
    steps_per_epoch = data.steps_per_epoch
    total_steps = config.training.total_steps(steps_per_epoch)
    peak = config.optimizer.peak_learning_rate(config.training.batch_size)
    memory_format = image_format(command.device)
    engine = partial(command.engine, data=data, memory_format=memory_format)
    gan, discriminator = config.loss.gan, None
    if features is not None and config.statistics == "world":  # else the step at which the discriminator starts fails
        images_of_group(gan.discriminator.norm_images, data.batching.micro_batch, dist.world_size())
    if gan.enabled:  # small, and with batch statistics of its own: never sharded
        build = partial(build_discriminator, gan.discriminator)
        whole = replace(config.optimizer, groups={})  # which name parameters of the tokenizer
        discriminator = engine("discriminator", build, config=LocalEngineConfig(), optimizer=whole, ema_decay=None)
    build, optimizer = partial(Tokenizer, config.model), config.optimizer
    if config.codes is not None:  # what makes codes comes first: the first pattern counts
        optimizer = replace(optimizer, groups={**frozen_groups(build), **optimizer.groups})
    generator = engine("tokenizer", build, config=config.engine, optimizer=optimizer, ema_decay=config.ema_decay)
    return TokenizerTask(
        generator,
        discriminator,
        config.loss,
        perceptual=None if perceptual is None else perceptual.to(command.device),
        features=None if features is None else features.to(command.device),
        learning_rate=lambda step: config.schedule.learning_rate(peak, step, steps_per_epoch, total_steps),
        statistics=config.statistics,
        usage_alarm=config.usage_alarm,
        tokens_per_image=data.pixels_per_image / config.model.downsampling**2,
        memory_format=memory_format,
        codebook_start=config.codebook_start,
        change_codes=change_of_codes(command, data, generator.module, total_steps),
        first_batches=lambda: data.training(0, math.ceil(min(steps_per_epoch, total_steps)), lambda bad: None),
    )


def change_of_codes(command: Command, data: RunData, tokenizer: Tokenizer, total_steps: int) -> ChangeCodes | None:
    """What makes the codes of a decoder that is trained alone; None where the tokenizer is trained as a whole."""
    match command.config.codes:
        case None:
            return None
        case PerturbedCodesConfig() as codes:
            return Perturbation(codes, tokenizer.code_vectors, progress=lambda step: step / total_steps)
        case GeneratedCodesConfig() as codes:
            dtype = PRECISIONS[command.config.precision] or torch.float32
            with naming(f"{command.source}: codes.transformer"):
                model, buckets, classes = command.config.model, command.config.data.buckets, len(data.classes)
                return Generation(codes, open_transformer(codes, model, classes, command.device, dtype, buckets))


if __name__ == "__main__":
    exit_on_user_error(main)
