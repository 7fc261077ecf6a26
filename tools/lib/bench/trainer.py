"""A transformer and its training step under a given engine, for benches: what `ibq/train_ar.py` does."""

from collections.abc import Callable

import torch
from torch import Tensor

from ibq import dist
from ibq.engine.base import EngineSettings, GroupHyper, OptimizerConfig
from ibq.engine.blueprint import Blueprint
from ibq.engine.build import build_engine
from ibq.engine.configs import EngineConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.training.ar_task import ARTask
from ibq.training.metrics import Stopwatch

OPTIMIZER = OptimizerConfig(kind="adamw", learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.05, clip_norm=1.0)


def blueprint_of(model: TransformerConfig) -> Blueprint:
    """The transformer that all benches train."""
    return Blueprint(name="transformer", build=lambda: Transformer(model), seed=0)


class Trainer:
    """An engine and its task; a model of random orders learns all images in them."""

    def __init__(
        self,
        engine: EngineConfig,
        model: TransformerConfig,
        device: torch.device,
        optimizer: OptimizerConfig = OPTIMIZER,
    ):
        settings = EngineSettings(optimizer=optimizer, device=device, precision="bf16")
        self.engine = build_engine(engine, blueprint_of(model), settings)
        self.module, self.stopwatch = self.engine.module.train(), Stopwatch(device)
        hyper = GroupHyper(learning_rate=optimizer.learning_rate, weight_decay=optimizer.weight_decay)
        share = (lambda step: 1.0) if model.order == "random" else None
        self._task = ARTask(self.engine, hyper=lambda step: {"decay": hyper, "no_decay": hyper}, random_share=share)

    def step(self, codes: Tensor, classes: Tensor) -> Tensor:
        """Train on a batch; this rank's loss."""
        return self._task.step(0, [(codes, classes)], self.stopwatch).metrics["loss/total"]


def step_on_one_batch(trainer: Trainer, model: TransformerConfig, images: int, device: torch.device) -> Callable:
    """A function that trains on this rank's images, always the same, with dropout that is alike under every engine."""
    codes, classes = (part.to(device) for part in random_batch(model, images, seed=dist.rank()))
    steps = iter(range(1_000 * dist.rank(), 2**31))

    def step() -> float:
        torch.manual_seed(next(steps))
        return float(trainer.step(codes, classes))

    return step


def random_batch(model: TransformerConfig, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes [images, tokens] and classes [images]."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(model.vocab_size, (images, model.num_tokens), generator=generator)
    return codes, torch.randint(model.num_classes, (images,), generator=generator)
