"""Stage 2: train a class-conditional autoregressive transformer on a tokenizer's codes.

deepspeed ibq/train_ar.py --config yaml/xxl.yaml
torchrun --nproc-per-node 8 ibq/train_ar.py --config yaml/b.yaml data.train=codes/train
"""

import sys
from pathlib import Path

# A script's own folder comes first on sys.path; there `ibq/` would hide other packages, and `ibq` itself be missing.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ibq import dist
from ibq.api import load_tokenizer
from ibq.config import UserError, exit_on_user_error
from ibq.data.codes import CodeDataConfig
from ibq.data.shards import ImageDataConfig
from ibq.engine.base import EngineSettings, OptimizerConfig
from ibq.engine.build import build_engine
from ibq.engine.configs import EngineConfig, LocalEngineConfig, check_tensor_parallel
from ibq.engine.heartbeat import HeartbeatConfig
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.training.ar_task import ARScheduleConfig, ARTask
from ibq.training.checkpoint import CheckpointConfig, weights_hash
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
from ibq.training.run_data import RunData, code_data, image_data
from ibq.training.startup import StartUp, TimedBlueprint


@dataclass(frozen=True, kw_only=True)
class TokenizedImagesConfig(ImageDataConfig):
    """Images that a frozen tokenizer turns into codes at every step."""

    kind: Literal["images"] = "images"
    tokenizer: str  # what ibq.load_tokenizer reads
    allow_other_tokenizer: bool = False  # go on with another tokenizer than the run began with


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
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=LocalEngineConfig)
    heartbeat: HeartbeatConfig = field(default_factory=HeartbeatConfig)

    def __post_init__(self):
        check_seed_and_average(self.seed, self.ema_decay)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; the exit code."""
    start_up = StartUp()
    arguments = parse_arguments(
        ARRunConfig, __doc__.splitlines()[0],
        "torchrun --nproc-per-node 8 ibq/train_ar.py --config yaml/b.yaml data.train=codes/train", argv,
    )  # fmt: skip
    config: ARRunConfig = arguments.config
    set_up_torch(training=True)
    device = dist.setup(config.device)
    share_model(config)
    with start_up.part("data"), naming(arguments.source):
        data, tokenizer = open_data(config, device)
    bind_data(data, config.training, device, arguments.source)
    with start_up.part("engine"):
        task = build_task(config, data, device, tokenizer, start_up)
    check_schedule(task.hyper, arguments.source)
    return train_in_folder(task, data, config, arguments.fresh, device, title="transformer", start_up=start_up)


def share_model(config: ARRunConfig) -> None:
    """Say how many ranks share each matrix, and so their data; UserError where the model's sizes do not allow it."""
    ranks = getattr(config.engine, "tensor_parallel", 1)
    model = config.model
    if ranks > 1:
        check_tensor_parallel(
            ranks,
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            tokens=model.num_tokens if config.engine.sequence_parallel else None,
        )
        config.engine.mesh_sizes(dist.world_size())
    dist.share_data(ranks)


def open_data(config: ARRunConfig, device: torch.device) -> tuple[RunData, Tokenizer | None]:
    """(data, frozen tokenizer or None), checked against the model."""
    data, tokenizer = (_open_codes if isinstance(config.data, CodeDataConfig) else _open_images)(config, device)
    if data.validation_classes != data.classes[: len(data.validation_classes)]:
        raise UserError(
            "data.validation: its classes are not those of data.train; give every class a folder with images in both"
        )
    return data, tokenizer


def _open_codes(config: ARRunConfig, _device: torch.device) -> tuple[RunData, None]:
    data = code_data(config.data, config.seed)
    meta = data.validation_set.meta
    _check_model(config, num_codes=meta.num_codes, tokens_per_side=meta.tokens_per_side, classes=data.classes)
    if config.data.tokenizer is not None and not config.data.allow_other_tokenizer:
        with naming("data.tokenizer"):
            wanted = weights_hash(load_tokenizer(config.data.tokenizer, device="cpu").state_dict())
        if wanted != data.provenance["tokenizer"]:
            raise UserError(
                "data.train: made with another tokenizer than data.tokenizer; encode the images again with it, or set "
                "data.allow_other_tokenizer=true"
            )
    return data, None


def _open_images(config: ARRunConfig, device: torch.device) -> tuple[RunData, Tokenizer]:
    with naming("data.tokenizer"):
        tokenizer = load_tokenizer(config.data.tokenizer, device=device)
    data = image_data(config.data, tokenizer.config.resolution, config.seed)
    _check_model(
        config,
        num_codes=tokenizer.quantizer.num_codes,
        tokens_per_side=tokenizer.config.tokens_per_side,
        classes=data.classes,
    )
    data.provenance = {"tokenizer": weights_hash(tokenizer.state_dict())}
    data.allow_other = config.data.allow_other_tokenizer
    return data, tokenizer


def _check_model(config: ARRunConfig, *, num_codes: int, tokens_per_side: int, classes: Sequence[str]) -> None:
    """UserError unless the model is made for such data."""
    if not classes:
        raise UserError("data.sources: their classes differ; a transformer wants one numbering of classes for all")
    found = {"vocab_size": num_codes, "tokens_per_side": tokens_per_side, "num_classes": len(classes)}
    for name, value in found.items():
        if getattr(config.model, name) != value:
            raise UserError(f"model.{name}: is {getattr(config.model, name)} but the data has {value}; set it so")


def build_task(config: ARRunConfig, data: RunData, device: torch.device, tokenizer, start_up: StartUp) -> ARTask:
    """Network, engine and the task that trains it."""
    total_steps = config.training.total_steps(data.steps_per_epoch)
    peak = config.optimizer.peak_learning_rate(config.training.batch_size)

    engine = build_engine(
        config.engine,
        TimedBlueprint(
            name="transformer", build=lambda: Transformer(config.model), seed=config.seed, start_up=start_up
        ),
        EngineSettings(
            optimizer=config.optimizer,
            device=device,
            precision=config.precision,
            accumulation=data.batching.accumulation,
            ema_decay=config.ema_decay,
            ema_warmup=config.ema_warmup,
        ),
    )
    return ARTask(
        engine,
        tokenizer=tokenizer,
        hyper=lambda step: config.schedule.hyper(
            step,
            peak=peak,
            weight_decay=config.optimizer.weight_decay,
            steps_per_epoch=data.steps_per_epoch,
            total_steps=total_steps,
        ),
    )


if __name__ == "__main__":
    exit_on_user_error(main)
