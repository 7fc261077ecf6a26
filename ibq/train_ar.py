"""Stage 2: train a class-conditional autoregressive transformer on a tokenizer's codes.

deepspeed ibq/train_ar.py --config yaml/xxl.yaml
torchrun --nproc-per-node 8 ibq/train_ar.py --config yaml/b.yaml data.train=codes/train
"""

import sys
from pathlib import Path

# A script's own folder comes first on sys.path; there `ibq/` would hide other packages, and `ibq` itself be missing.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ibq import dist
from ibq.api import load_tokenizer
from ibq.config import UserError, exit_on_user_error
from ibq.data.codes import CodeDataConfig, CodeDataset
from ibq.data.loader import training_batches, validation_batches
from ibq.data.shards import ImageDataConfig, ImageDataset, split_images
from ibq.engine import EngineConfig, LocalEngineConfig, OptimizerConfig, build_engine
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.training.ar_task import ARScheduleConfig, ARTask
from ibq.training.loop import TrainingConfig, train
from ibq.training.run import (
    build_seeded,
    check_schedule,
    check_seed_and_average,
    make_order,
    naming,
    parse_arguments,
    prepare_folder,
    set_up_torch,
)


@dataclass(frozen=True, kw_only=True)
class TokenizedImagesConfig(ImageDataConfig):
    """Images that a frozen tokenizer turns into codes at every step."""

    kind: Literal["images"] = "images"
    tokenizer: str  # what ibq.load_tokenizer reads


@dataclass(frozen=True, kw_only=True)
class ARRunConfig:
    """Everything about one transformer run."""

    output: str = "runs/ar"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    ema_decay: float | None = 0.9999  # null keeps no average: saves memory, and validates the raw weights
    ema_warmup: bool = False  # average over fewer steps at first: for short runs
    data: CodeDataConfig | TokenizedImagesConfig
    model: TransformerConfig = field(default_factory=TransformerConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            kind="adamw", betas=(0.9, 0.95), weight_decay=0.05, clip_norm=1.0, scale_learning_rate=True
        )
    )
    schedule: ARScheduleConfig = field(default_factory=ARScheduleConfig)
    training: TrainingConfig
    engine: EngineConfig = field(default_factory=LocalEngineConfig)

    def __post_init__(self):
        check_seed_and_average(self.seed, self.ema_decay)


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    arguments = parse_arguments(
        ARRunConfig, __doc__.splitlines()[0],
        "torchrun --nproc-per-node 8 ibq/train_ar.py --config yaml/b.yaml data.train=codes/train", argv,
    )  # fmt: skip
    config: ARRunConfig = arguments.config
    set_up_torch(training=True)
    device = dist.setup(config.device)
    with naming(arguments.source):
        train_set, validation_set, tokenizer = open_data(config, device)
    order = make_order(config.training, len(train_set), config.seed, arguments.source)
    task = build_task(config, order, device, tokenizer)
    check_schedule(task.hyper, arguments.source)
    folder = prepare_folder(config.output, config, arguments.fresh)
    workers = config.data.workers
    train(
        task,
        folder=folder,
        config=config.training,
        total_steps=config.training.total_steps(order.steps_per_epoch),
        seed=config.seed,
        device=device,
        training_batches=lambda start, stop: training_batches(
            train_set, order, start, stop, workers=workers, device=device
        ),
        validation_batches=lambda: validation_batches(
            validation_set,
            config.training.micro_batch,
            rank=dist.rank(),
            world_size=dist.world_size(),
            workers=workers,
            device=device,
            limit=config.training.validation_images,
        ),
        title="transformer",
    )
    dist.shutdown()


def open_data(config: ARRunConfig, device: torch.device):
    """(training set, validation set, frozen tokenizer or None), checked against the model."""
    data, model = config.data, config.model
    if isinstance(data, CodeDataConfig):
        with naming("data.train"):
            train_set = CodeDataset(data.train)
        with naming("data.validation"):
            validation_set = CodeDataset(data.validation)
        tokenizer, meta = None, train_set.meta
        found = meta.num_codes, meta.tokens_per_side, len(meta.classes)
        if validation_set.meta.tokenizer != meta.tokenizer:
            raise UserError("data.validation: made with another tokenizer than data.train; encode both again")
        classes = meta.classes, validation_set.meta.classes
    else:
        with naming("data.tokenizer"):
            tokenizer = load_tokenizer(data.tokenizer, device=device)
        size = tokenizer.config.resolution
        train_index, validation_index = split_images(data)
        train_set = ImageDataset(train_index, size, augment=data.augment, seed=config.seed, cache=data.cache)
        validation_set = ImageDataset(validation_index, size, cache=data.cache)
        found = tokenizer.quantizer.num_codes, tokenizer.config.tokens_per_side, len(train_index.classes)
        classes = train_index.classes, validation_index.classes
    if classes[1] != classes[0][: len(classes[1])]:
        raise UserError(
            "data.validation: its classes are not those of data.train; give every class a folder with images in both"
        )
    names = "vocab_size", "tokens_per_side", "num_classes"
    for name, value in zip(names, found, strict=True):
        if getattr(model, name) != value:
            raise UserError(f"model.{name}: is {getattr(model, name)} but the data has {value}; set it so")
    return train_set, validation_set, tokenizer


def build_task(config: ARRunConfig, order, device: torch.device, tokenizer) -> ARTask:
    """Network, engine and the task that trains it."""
    total_steps = config.training.total_steps(order.steps_per_epoch)
    peak = config.optimizer.peak_learning_rate(config.training.batch_size)

    engine = build_engine(
        config.engine,
        build_seeded("transformer", lambda: Transformer(config.model), config.seed).to(device),
        config.optimizer,
        precision=config.precision,
        accumulation=order.accumulation,
        ema_decay=config.ema_decay,
        ema_warmup=config.ema_warmup,
    )
    return ARTask(
        engine,
        tokenizer=tokenizer,
        hyper=lambda step: config.schedule.hyper(
            step,
            peak=peak,
            weight_decay=config.optimizer.weight_decay,
            steps_per_epoch=order.steps_per_epoch,
            total_steps=total_steps,
        ),
    )


if __name__ == "__main__":
    exit_on_user_error(main)
