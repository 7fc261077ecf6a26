"""One process, or data parallelism over several (PyTorch's DDP)."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ibq import dist
from ibq.engine.base import GroupHyper, OptimizerConfig, ParameterState, StepResult, ema_update

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class LocalEngineConfig:
    """Whole weights on every rank; DDP averages the gradients when a launcher starts several."""

    kind: Literal["local"] = "local"


class LocalEngine:
    """Trains `module` with whole weights on this rank; see `ibq.engine.base.Engine`."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        *,
        precision: Literal["fp32", "bf16"] = "fp32",
        accumulation: int = 1,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
    ):
        self.module = module
        self.config = optimizer
        self.accumulation = accumulation
        self.ema_decay = ema_decay
        self.ema_warmup = ema_warmup
        self.steps = 0
        self._dtype = PRECISIONS[precision]
        self._device = next(module.parameters()).device
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._callable = self._parallel() if dist.world_size() > 1 else module
        self._optimizer = self._build_optimizer()
        self._shadows: dict[str, Tensor] = {}
        if ema_decay is not None:
            self._shadows = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._micro_batches = 0
        self._loss_is_bad = torch.zeros((), dtype=torch.bool, device=self._device)

    def _parallel(self) -> DistributedDataParallel:
        ids = [self._device.index] if self._device.type == "cuda" else None
        # Buffers (batch-norm statistics) are per rank; whoever wants them global reduces them in the module.
        with warnings.catch_warnings():
            # PyTorch 2.15 announces a new name that 2.14 does not know.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            return DistributedDataParallel(self.module, device_ids=ids, broadcast_buffers=False)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        groups = {"decay": [], "no_decay": []}
        for parameter in self._parameters.values():
            groups["decay" if parameter.dim() >= 2 else "no_decay"].append(parameter)
        settings = [{"params": params, "name": name} for name, params in groups.items() if params]
        match self.config.kind:
            case "adam":
                kind = torch.optim.Adam
            case "adamw":
                kind = torch.optim.AdamW
        return kind(settings, lr=0.0, betas=self.config.betas, eps=self.config.eps, weight_decay=0.0, fused=True)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision of the forward pass."""
        return torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None)

    def __call__(self, *inputs):
        """The module's forward pass in the engine's precision."""
        with self.autocast():
            if not torch.is_grad_enabled():
                return self.module(*inputs)
            return self._callable(*inputs)

    @contextlib.contextmanager
    def micro_batch(self):
        """Around one micro-batch's forward and backward passes: gradients are synced only in the last."""
        last = self._micro_batches == self.accumulation - 1
        if last or self._callable is self.module:
            yield
        else:
            with self._callable.no_sync():
                yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        self._loss_is_bad |= ~torch.isfinite(loss.detach())
        (loss / self.accumulation).backward()
        self._micro_batches += 1

    def step(self, hyper: dict[str, GroupHyper]) -> StepResult:
        """Clip, update and average; a step with a non-finite loss or gradient is skipped by all ranks alike."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        skipped = dist.any_rank(self._loss_is_bad | ~torch.isfinite(norm))
        if not skipped:
            if self.config.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self.config.clip_norm, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = hyper[group["name"]].learning_rate
                group["weight_decay"] = hyper[group["name"]].weight_decay
            self._optimizer.step()
            self.steps += 1
            if self._shadows:
                raw = [self._parameters[name].detach() for name in self._shadows]
                ema_update(list(self._shadows.values()), raw, self._decay())
        self.discard()
        return StepResult(gradient_norm=norm, skipped=skipped)

    def _decay(self) -> float:
        if not self.ema_warmup:
            return self.ema_decay
        # A short run should not remember its initial weights (the ramp of TensorFlow's moving average).
        return min(self.ema_decay, (1 + self.steps) / (10 + self.steps))

    def discard(self) -> None:
        """Forget the accumulated gradients."""
        self._optimizer.zero_grad(set_to_none=True)
        self._micro_batches = 0
        self._loss_is_bad.zero_()

    @torch.no_grad()
    def overwrite(self, name: str, value: Tensor) -> None:
        """Set a parameter, and its average, to a value that was found otherwise than by training."""
        for target in (self._parameters.get(name), self._shadows.get(name)):
            if target is not None:
                target.copy_(value)

    @contextlib.contextmanager
    def averaged(self):
        """Within this context the module carries the averaged weights, if this engine keeps an average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, shadow in self._shadows.items():
            parameter = self._parameters[name]
            parameter.data, self._shadows[name] = shadow, parameter.data

    def named_state(self) -> Iterator[tuple[str, ParameterState]]:
        """Every parameter in canonical form."""
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state.get(parameter, {})
            yield (
                name,
                ParameterState(
                    weight=parameter.detach(),
                    moment1=moments.get("exp_avg"),
                    moment2=moments.get("exp_avg_sq"),
                    ema=self._shadows.get(name),
                ),
            )

    def load_named_state(self, reader: Callable[[str], ParameterState], steps: int) -> None:
        """Restore every parameter from `reader`; `steps` is the number of updates done so far."""
        self.steps = steps
        for name, parameter in self._parameters.items():
            state = reader(name)
            parameter.data.copy_(state.weight)
            if name in self._shadows:
                self._shadows[name].copy_(state.weight if state.ema is None else state.ema)
            self._optimizer.state.pop(parameter, None)
            if state.moment1 is not None:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(steps), device=parameter.device),
                    "exp_avg": torch.empty_like(parameter).copy_(state.moment1),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(state.moment2),
                }
