"""The engine seam: how a module is trained on one process or many, hidden from the tasks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ibq.engine.pieces import Piece


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer of one module; learning rate and weight decay come from the schedule at every step."""

    kind: Literal["adam", "adamw", "sgd"] = "adam"  # sgd: plain, without momentum
    learning_rate: float = 1e-4
    scale_learning_rate: bool = False  # multiply by global batch / 256, the paper's rule
    betas: tuple[float, float] = (0.5, 0.9)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    # Name of a parameter (with wildcards; the first pattern that matches counts) -> factor of its learning rate, or
    # frozen: then it has no gradient, moments or weight decay, and its average is its weight.
    groups: dict[str, float | Literal["frozen"]] = field(default_factory=dict)

    def __post_init__(self):
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate: must not be negative, got {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: must lie in [0, 1), got {self.betas}")
        if self.eps < 0:
            raise ValueError(f"eps: must not be negative, got {self.eps}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm: must be positive, got {self.clip_norm}; null switches clipping off")
        for pattern, factor in self.groups.items():
            if factor != "frozen" and not 0 < factor < math.inf:
                raise ValueError(
                    f"groups: the factor of {pattern} must be positive and finite, got {factor}; or write frozen"
                )

    def peak_learning_rate(self, batch_size: int) -> float:
        """The learning rate for a global batch, scaled by the paper's rule if that is switched on."""
        return self.learning_rate * (batch_size / 256 if self.scale_learning_rate else 1.0)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an optimizer step gives: the global gradient norm before clipping, and whether it was skipped."""

    gradient_norm: Tensor
    skipped: bool


@dataclass(frozen=True, kw_only=True)
class GroupHyper:
    """What the schedule sets at one step for parameters that decay, or do not; `OptimizerConfig.groups` come on top."""

    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ParameterState:
    """A rank's part of one parameter in canonical form: what a checkpoint holds of it, in float32.

    Each tensor has the elements of the piece in its order, in whatever shape; none is for keeping: an engine may use
    its memory again for the next parameter.
    """

    weight: Tensor
    moment1: Tensor | None = None  # first and second moment of the optimizer; None before the first step
    moment2: Tensor | None = None
    # The average; None where the engine keeps none. This name, and `ema_decay` and `ema_warmup` in configs, stand in
    # users' files and stay; everywhere else the code says average.
    ema: Tensor | None = None


PARTS = tuple(part.name for part in fields(ParameterState))
Reader = Callable[[str, Piece], ParameterState]  # (parameter, the part that is wanted) -> its state, on the CPU


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What every engine is told beside its own config."""

    optimizer: OptimizerConfig
    device: torch.device
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulation: int = 1  # micro-batches per step
    ema_decay: float | None = None  # None keeps no average
    ema_warmup: bool = False  # average over fewer steps at first
    memory_format: torch.memory_format = torch.contiguous_format

    def decay(self, steps: int) -> float:
        """The decay of the average at the update that makes `steps` of them."""
        if not self.ema_warmup:
            return self.ema_decay
        # A short run should not remember its initial weights (the ramp of TensorFlow's moving average).
        return min(self.ema_decay, (1 + steps) / (10 + steps))


class Engine(Protocol):
    """Trains one module.

    `micro_batch` surrounds the forward and backward passes of one micro-batch; `backward` owns accumulation (the
    loss is divided by the number of micro-batches) and the sync of gradients; `step` clips, updates the parameters
    and the average.
    """

    module: nn.Module
    steps: int  # updates done so far
    frozen: frozenset[str]  # parameters that are not trained, which have a weight and nothing else

    def __call__(self, *inputs):
        """The module's forward pass in the engine's precision."""

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of the forward pass, for modules that are called besides this one."""

    def micro_batch(self) -> AbstractContextManager[None]:
        """Around the forward and backward passes of one micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch."""

    def step(self, hyper: dict[str, GroupHyper]) -> StepResult:
        """Update the parameters with the settings of the groups "decay" and "no_decay"."""

    def discard(self) -> None:
        """Forget the accumulated gradients."""

    def overwrite(self, name: str, value: Tensor) -> None:
        """Set a parameter, and its average, to a value that was found otherwise than by training; also a frozen one."""

    def averaged(self) -> AbstractContextManager[None]:
        """Within this context the module carries the averaged (EMA) weights."""

    def pieces(self) -> dict[str, Piece]:
        """This rank's part of every parameter."""

    def state_parts(self) -> tuple[str, ...]:
        """Which of PARTS `named_state` gives, the same for all ranks, and for all parameters that are not frozen."""

    def named_state(self) -> Iterator[tuple[str, ParameterState]]:
        """This rank's part of every parameter in canonical form, in the order of `pieces`; a copy where it must be.

        Every rank iterates to the end: an engine may need all of them.
        """

    def load_named_state(self, reader: Reader, steps: int) -> None:
        """Restore this rank's part of every parameter from `reader`; `steps` is the number of updates so far."""

    def close(self) -> None:
        """Remove what the engine keeps outside of this process's memory; it trains no more."""


def set_hyper(optimizer: torch.optim.Optimizer, hyper: Mapping[str, GroupHyper]) -> None:
    """Set the learning rates and weight decays of a step in the groups that `ibq.engine.groups` has made."""
    for group in optimizer.param_groups:
        wanted = hyper[group["name"]]
        group["lr"] = wanted.learning_rate * group["factor"]
        group["weight_decay"] = wanted.weight_decay


@torch.no_grad()
def snapshot(engine: Engine) -> Callable[[], None]:
    """A function that takes the engine back to this moment; it copies everything, so it is for small modules."""
    steps = engine.steps
    copies = {
        name: ParameterState(**{part: None if (t := getattr(state, part)) is None else t.clone() for part in PARTS})
        for name, state in engine.named_state()
    }
    return lambda: engine.load_named_state(lambda name, _shard: copies[name], steps)


@torch.no_grad()
def move_average(averages: Sequence[Tensor], raw: Sequence[Tensor], decay: float) -> None:
    """average <- average - (1 - decay) * (average - raw) for every pair, in place."""
    torch._foreach_lerp_(list(averages), list(raw), 1.0 - decay)
