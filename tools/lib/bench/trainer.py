"""A transformer and its training step under a given engine, for benches: what `ibq/train_ar.py` does, on one batch."""

import torch
from torch import Tensor

from ibq import dist
from ibq.config import parse_config
from ibq.engine.base import EngineSettings, GroupHyper, OptimizerConfig
from ibq.engine.blueprint import Blueprint
from ibq.engine.build import build_engine
from ibq.engine.configs import EngineConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.training.ar_task import ARTask
from ibq.training.metrics import Stopwatch

OPTIMIZER = OptimizerConfig(kind="adamw", learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.05, clip_norm=1.0)


def engine_config(section: dict) -> EngineConfig:
    """The section `engine` of a run's config."""
    return parse_config(EngineConfig, section)


class Trainer:
    """An engine, its task, and this rank's share of the data, which stays the same."""

    def __init__(self, engine: dict, model: TransformerConfig, images: int, device: torch.device):
        blueprint = Blueprint(name="transformer", build=lambda: Transformer(model), seed=0)
        settings = EngineSettings(optimizer=OPTIMIZER, device=device, precision="bf16")
        self.engine = build_engine(engine_config(engine), blueprint, settings)
        self.engine.module.train()
        hyper = GroupHyper(learning_rate=OPTIMIZER.learning_rate, weight_decay=OPTIMIZER.weight_decay)
        self._task = ARTask(self.engine, hyper=lambda step: {"decay": hyper, "no_decay": hyper})
        self.stopwatch = Stopwatch(device)
        self._batch, self._steps = _batch(model, images, device), 0

    def step(self) -> float:
        """Train on the batch; this rank's loss."""
        torch.manual_seed(1_000 * dist.rank() + self._steps)  # the same dropout under every engine
        self._steps += 1
        return float(self._task.step(0, [self._batch], self.stopwatch).metrics["loss/total"])


def _batch(model: TransformerConfig, images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes [images, tokens] and classes of this rank."""
    generator = torch.Generator().manual_seed(dist.rank())
    codes = torch.randint(model.vocab_size, (images, model.num_tokens), generator=generator)
    return codes.to(device), torch.randint(model.num_classes, (images,), generator=generator).to(device)
