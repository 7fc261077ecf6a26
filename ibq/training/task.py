"""The task seam: what the loop asks of the thing that is trained, and what it gets."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ibq.engine.base import Engine
from ibq.training.metrics import Stopwatch

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """One step of a task: detached scalars, and whether the update was skipped because something was not finite."""

    metrics: dict[str, Tensor]
    skipped: bool


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A task's figures on the validation set; the checkpoint with the highest score is the best."""

    metrics: dict[str, float]
    score: float
    images: dict[str, Tensor] = field(default_factory=dict)  # uint8 grids [rows, columns, 3, H, W]


class Task(Protocol):
    """What is trained."""

    engines: dict[str, Engine]

    def step(self, step: int, batches: list[Batch], stopwatch: Stopwatch) -> StepOutcome:
        """Train on the micro-batches of one step."""

    def interval_metrics(self, step: int) -> dict[str, float]:
        """Figures over the steps since the last call; every rank calls it."""

    def validate(self, batches: Iterable[Batch]) -> Validation:
        """Evaluate with averaged weights; every rank calls it."""

    def rank_tensors(self) -> dict[str, Tensor]:
        """State that each rank keeps for itself, for the checkpoint; `own/...` is for the very rank that kept it."""

    def load_rank_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore it."""

    def save_pretrained(self, folder: Path, info: Mapping) -> None:
        """Write the averaged weights for use, and where they come from."""
