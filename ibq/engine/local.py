"""The engines made of PyTorch's own parts: what they share, and the one with whole weights on every rank.

`TorchEngine` trains the tensors that lie in this rank's memory, whichever pieces of the parameters these are. In
`LocalEngine` they are whole parameters, in one process or, by PyTorch's DDP, in several; in `ibq.engine.fsdp` shards.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ibq import dist
from ibq.engine.base import (
    EngineSettings,
    GroupHyper,
    OptimizerConfig,
    ParameterState,
    Reader,
    StepResult,
    move_average,
    set_hyper,
)
from ibq.engine.blueprint import Blueprint
from ibq.engine.compilation import compile_units, uncompiled
from ibq.engine.configs import LocalEngineConfig
from ibq.engine.groups import freeze, optimizer_groups
from ibq.engine.pieces import Piece, take, whole

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Held:
    """This rank's part of one parameter."""

    tensor: nn.Parameter  # plain, in the memory of the module's own parameter
    piece: Piece
    decays: bool  # whether it is in the group "decay": decided by the whole parameter
    copies: int  # ranks that hold these elements


class TorchEngine:
    """Trains `module`, of which this rank holds the given parts; see `ibq.engine.base.Engine`."""

    def __init__(
        self,
        module: nn.Module,
        settings: EngineSettings,
        held: dict[str, Held],
        frozen: frozenset[str],
        *,
        compiled: bool = False,
    ):
        self.module = module
        self.frozen = frozen
        self._compiled = compiled
        self.settings = settings
        self.steps = 0
        self._held = held
        self._trained = {name: own for name, own in held.items() if name not in frozen}
        self._optimizer = _build_optimizer(settings.optimizer, self._trained)
        self._averages: dict[str, Tensor] = {}
        if settings.ema_decay is not None:
            self._averages = {name: own.tensor.detach().clone() for name, own in self._trained.items()}
        self._micro_batches = 0
        self._loss_is_bad = torch.zeros((), dtype=torch.bool, device=settings.device)

    # --- Forward and backward ---

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision of the forward pass."""
        dtype = PRECISIONS[self.settings.precision]
        return torch.autocast(self.settings.device.type, dtype=dtype, enabled=dtype is not None)

    def __call__(self, *inputs):
        """The module's forward pass in the engine's precision."""
        with self.autocast():
            return self.module(*inputs)

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around one micro-batch's forward and backward passes."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        self._loss_is_bad |= ~torch.isfinite(loss.detach())
        (loss / self.settings.accumulation).backward()
        self._micro_batches += 1

    def _collect_gradients(self) -> None:
        """Give every trained tensor the gradient of its elements, averaged over the ranks."""

    # --- The step ---

    def step(self, hyper: dict[str, GroupHyper]) -> StepResult:
        """Clip, update and average; a step with a non-finite loss or gradient is skipped by all ranks alike."""
        self._collect_gradients()
        for own in self._trained.values():
            if own.tensor.grad is None:  # unused in this step; moments and their step count stay those of all
                own.tensor.grad = torch.zeros_like(own.tensor)
        norm, skipped = self._gradient_norm()
        if not skipped:
            self._optimizer.grad_scale = clip_divisor(norm, self.settings.optimizer.clip_norm)
            set_hyper(self._optimizer, hyper)
            self._optimizer.step()
            self.steps += 1
            if self._averages:
                raw = [self._held[name].tensor.detach() for name in self._averages]
                move_average(list(self._averages.values()), raw, self.settings.decay(self.steps))
        self.discard()
        return StepResult(gradient_norm=norm, skipped=skipped)

    def _gradient_norm(self) -> tuple[Tensor, bool]:
        """The norm of all gradients, each element counted once, and whether it or a rank's loss is not finite."""
        parts = [(own.tensor.grad, own.copies) for own in self._trained.values() if own.tensor.numel()]
        found = torch.zeros(2, dtype=torch.float64, device=self._loss_is_bad.device)
        found[1] = self._loss_is_bad
        if parts:
            sums = squares([gradient for gradient, _ in parts])
            copies = torch.tensor([copies for _, copies in parts], dtype=torch.float64, device=sums.device)
            found[0] = (sums / copies).sum()
        dist.all_reduce_sum(found)
        total, bad = found.tolist()
        norm = found[0].sqrt().float()
        return norm, bad > 0 or not total < float("inf")

    def discard(self) -> None:
        """Forget the accumulated gradients."""
        for parameter in self.module.parameters():
            parameter.grad = None
        for own in self._held.values():
            own.tensor.grad = None
        self._micro_batches = 0
        self._loss_is_bad.zero_()

    # --- The average ---

    @torch.no_grad()
    def overwrite(self, name: str, value: Tensor) -> None:
        """Set a parameter, and its average, to a value that was found otherwise than by training; also a frozen one."""
        if name not in self._held:
            return
        own = self._held[name]
        part = take(value, own.piece).view(own.tensor.shape)
        own.tensor.copy_(part)
        if name in self._averages:
            self._averages[name].copy_(part)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the module carries the averaged weights, if this engine keeps an average.

        It also runs uncompiled: what validates has batches of its own sizes, each of which would be compiled for.
        """
        self._swap()
        try:
            with uncompiled(self._compiled):
                yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self._averages.items():
            tensor = self._held[name].tensor
            raw = tensor.clone()
            tensor.copy_(average)
            average.copy_(raw)

    # --- State ---

    def pieces(self) -> dict[str, Piece]:
        """This rank's part of every parameter."""
        return {name: own.piece for name, own in self._held.items()}

    def state_parts(self) -> tuple[str, ...]:
        """Which of PARTS `named_state` gives."""
        moments = ("moment1", "moment2") if self.steps and self.settings.optimizer.kind != "sgd" else ()
        return ("weight", *moments, *(("ema",) if self._averages else ()))

    def named_state(self) -> Iterator[tuple[str, ParameterState]]:
        """This rank's part of every parameter in canonical form."""
        for name, own in self._held.items():
            moments = self._optimizer.state.get(own.tensor, {})
            yield (
                name,
                ParameterState(
                    weight=own.tensor.detach(),
                    moment1=moments.get("exp_avg"),
                    moment2=moments.get("exp_avg_sq"),
                    ema=self._averages.get(name),
                ),
            )

    @torch.no_grad()
    def load_named_state(self, reader: Reader, steps: int) -> None:
        """Restore this rank's part of every parameter from `reader`; `steps` is the number of updates done so far."""
        self.steps = steps
        for name, own in self._held.items():
            tensor, state = own.tensor, reader(name, own.piece)
            tensor.copy_(state.weight.view(tensor.shape))
            if name in self._averages:
                average = state.weight if state.ema is None else state.ema
                self._averages[name].copy_(average.view(tensor.shape))
            self._optimizer.state.pop(tensor, None)
            if name in self.frozen:
                continue
            if state.moment1 is not None and self.settings.optimizer.kind != "sgd" and tensor.numel():
                self._optimizer.state[tensor] = {
                    "step": torch.tensor(float(steps), device=tensor.device),
                    "exp_avg": torch.empty_like(tensor).copy_(state.moment1.view(tensor.shape)),
                    "exp_avg_sq": torch.empty_like(tensor).copy_(state.moment2.view(tensor.shape)),
                }

    def close(self) -> None:
        """Nothing is kept outside of memory."""


class LocalEngine(TorchEngine):
    """Whole weights on this rank; see `ibq.engine.base.Engine`."""

    def __init__(self, blueprint: Blueprint, settings: EngineSettings, config: LocalEngineConfig | None = None):
        module = blueprint.whole(settings.device).to(memory_format=settings.memory_format)
        held, frozen = _held(module), freeze(module, settings.optimizer)
        compiled = config is not None and compile_units(module, config.compile, settings.device)
        super().__init__(module, settings, held, frozen, compiled=compiled)
        self._callable = self._parallel() if dist.world_size() > 1 else module

    def _parallel(self) -> DistributedDataParallel:
        device = self.settings.device
        ids = [device.index] if device.type == "cuda" else None
        # Buffers (batch-norm statistics) are per rank; whoever wants them global reduces them in the module.
        with warnings.catch_warnings():
            # PyTorch 2.15 announces a new name that 2.14 does not know.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            return DistributedDataParallel(self.module, device_ids=ids, broadcast_buffers=False)

    def __call__(self, *inputs):
        """The module's forward pass in the engine's precision."""
        with self.autocast():
            return (self._callable if torch.is_grad_enabled() else self.module)(*inputs)

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around one micro-batch's forward and backward passes: gradients are synced only in the last."""
        last = self._micro_batches == self.settings.accumulation - 1
        if last or self._callable is self.module:
            yield
        else:
            with self._callable.no_sync():
                yield


def _held(module: nn.Module) -> dict[str, Held]:
    """All parameters, whole; the ranks write about equally many elements of them."""
    load = [0] * dist.world_size()
    held = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            writer = load.index(min(load))
            load[writer] += parameter.numel()
            piece = whole(parameter.shape, owner=writer == dist.rank())
            held[name] = Held(tensor=parameter, piece=piece, decays=parameter.dim() >= 2, copies=dist.world_size())
    return held


def clip_divisor(norm: Tensor, limit: float | None) -> Tensor | None:
    """What clipping divides gradients by; the fused optimizers do it as they read them, if it is their `grad_scale`."""
    return None if limit is None else ((norm + 1e-6) / limit).clamp(min=1.0)  # as torch.nn.utils.clip_grad_norm_


def squares(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of each gradient's squares, float64 [gradients]."""
    if gradients[0].is_cpu:
        return torch.stack([_squares_by_row(gradient) for gradient in gradients])
    return torch.stack(torch._foreach_norm(gradients, dtype=torch.float64)).square()


def _squares_by_row(gradient: Tensor) -> Tensor:
    """The same of one gradient on a CPU, at the speed of its memory.

    There one sum in float32 over all of a large gradient that is mostly zero is off by 1e-4, and one in float64 makes
    a copy first: the norms of its rows are short sums.
    """
    if gradient.dim() < 2:
        return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    rows = torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.dim())))
    return rows.double().square().sum()


def _build_optimizer(config: OptimizerConfig, trained: dict[str, Held]) -> torch.optim.Optimizer:
    tensors = ((name, own.tensor, own.decays) for name, own in trained.items() if own.tensor.numel())
    # Where little is trained, a rank that shares it may hold nothing of that.
    settings = optimizer_groups(tensors, config) or [{"params": [], "name": "decay", "factor": 1.0}]
    match config.kind:
        case "sgd":
            return torch.optim.SGD(settings, lr=0.0, weight_decay=0.0, fused=True)
        case "adam":
            kind: Callable = torch.optim.Adam
        case "adamw":
            kind = torch.optim.AdamW
    return kind(settings, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True)
