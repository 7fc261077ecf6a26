"""DeepSpeed's ZeRO (arXiv 1910.02054) with offload to CPU and NVMe (ZeRO-Infinity, arXiv 2104.07857).

Stage 1 shards the optimizer's state over the ranks, stage 2 also the gradients, stage 3 also the weights. In bf16 the
module's weights are bfloat16 beside float32 masters (stage 0: float32 weights under autocast, as in the local engine);
gradients are averaged over the ranks in float32 or bfloat16 and summed up over micro-batches in float32.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ibq import dist
from ibq.config import UserError
from ibq.engine.base import EngineSettings, GroupHyper, ParameterState, Reader, StepResult, set_hyper
from ibq.engine.blueprint import Blueprint
from ibq.engine.compilation import compile_units, uncompiled, units_of
from ibq.engine.configs import ZeroEngineConfig
from ibq.engine.groups import freeze
from ibq.engine.pieces import Piece
from ibq.engine.zero_frozen import FrozenWeights
from ibq.engine.zero_setup import (
    InitialWeights,
    NvmeFolder,
    build_operators,
    build_optimizer,
    check_direct_io,
    check_nvme,
    deepspeed_settings,
    freed_at_once,
    load_deepspeed,
    materialize,
    model_size,
    partition_numel,
    silence,
)
from ibq.engine.zero_shortcuts import flattened_on_the_device
from ibq.engine.zero_state import MOMENTS, FlatPartitions, Group, ParameterPartitions, Partitions


class ZeroEngine:
    """Trains one module with DeepSpeed; see `ibq.engine.base.Engine`. Raises UserError for what cannot work here."""

    def __init__(self, config: ZeroEngineConfig, blueprint: Blueprint, settings: EngineSettings):
        self.config, self.settings = config, settings
        self.steps = 0
        initial = InitialWeights(blueprint)
        self.frozen = freeze(initial.module, settings.optimizer)
        numel = {name: partition_numel([math.prod(shape)]) for name, shape in initial.shapes.items()}
        check_nvme(config, settings, sum(numel.values()), sum(numel[name] for name in self.frozen))
        deepspeed = load_deepspeed(settings.device)
        build_operators(config, settings.optimizer)
        self._folder = NvmeFolder(config.nvme_path) if config.uses_nvme else None
        if self._folder is not None:
            try:
                check_direct_io(self._folder.path)
            except UserError:  # after which a process of several ends without clean-up
                self._folder.remove()
                raise
        with freed_at_once():
            self._engine = self._start(deepspeed, initial)
        self.module: nn.Module = self._engine.module
        kind = {0: Partitions, 1: FlatPartitions, 2: FlatPartitions, 3: ParameterPartitions}[config.stage]
        self._partitions = kind(self.module, self._engine)
        self._frozen = FrozenWeights(self.module, self.frozen, initial, settings.device)
        if config.fills_late or (settings.precision == "bf16" and config.stage > 0):
            self._start_masters(initial)
        self._averages: Averages | None = None
        if settings.ema_decay is not None:
            self._averages = Averages(self._partitions.groups, self._folder and self._folder.path)
        self._has_moments = False
        self._micro_batches = 0

    def _start(self, deepspeed: Any, initial: InitialWeights) -> Any:
        config, settings = self.config, self.settings
        raw = deepspeed_settings(config, settings, model_size(initial.module), self._folder and self._folder.path)
        self._compiled = self._prepare_units(deepspeed, initial.module)
        dtype = torch.bfloat16 if settings.precision == "bf16" and config.stage > 0 else torch.float32
        convert = None
        if config.stage == 3:
            context = deepspeed.zero.Init(config_dict_or_path=raw, dtype=None)
            convert = lambda parameter: context._convert_to_zero_parameters([parameter])  # noqa: E731
        late = initial.shapes.keys() - self.frozen if config.fills_late else ()
        module = materialize(initial, dtype, settings.device, convert, late)
        base = build_optimizer(module, initial.shapes, settings.optimizer, config.offload_optimizer != "none")
        with silence(), flattened_on_the_device():
            engine, *_ = deepspeed.initialize(model=module, optimizer=base, config=raw, dist_init_required=False)
        return engine

    def _prepare_units(self, deepspeed: Any, module: nn.Module) -> bool:
        """Let stage 3 gather each unit as a whole, and compile units; whether they are compiled.

        DeepSpeed then has its hooks on a unit alone and none on what is in it, and they stay around what is compiled:
        by the time that its parameters are looked at they are gathered.
        """
        config = self.config
        if config.stage < 3:
            return compile_units(module, config.compile, self.settings.device)
        if not config.whole_units:
            return False
        for unit in units_of(module):
            deepspeed.utils.set_z3_leaf_module(unit, True)
        return compile_units(module, config.compile, self.settings.device, without_hooks=True)

    @torch.no_grad()
    def _start_masters(self, initial: InitialWeights) -> None:
        """Make the masters where they lie, and from them the module's weights if these have no values yet.

        In bf16 that replaces masters that came by way of bfloat16: all engines start from the same float32 weights. On
        NVMe it writes the masters a second time, once per run.
        """
        for group in self._partitions.groups:
            weight = torch.zeros(group.numel) if group.swapped else group.master.data.view(-1).zero_()
            for fragment in group.fragments:
                own = slice(fragment.offset, fragment.offset + fragment.piece.numel)
                weight[own].copy_(initial(fragment.name, fragment.piece, self.settings.device))
            group.write(weight, {}, 0)
            if self.config.fills_late and not group.aliased:
                group.show(weight)
        if self.config.fills_late:
            self._partitions.refresh()

    # --- Training ---

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The precision of the forward pass, for modules that are called besides this one."""
        return torch.autocast(
            self.settings.device.type, dtype=torch.bfloat16, enabled=self.settings.precision == "bf16"
        )

    def __call__(self, *inputs):
        """The module's forward pass in the engine's precision."""
        if self.config.stage == 0:
            with self.autocast():
                return self.module(*inputs)
        # Without gradients the module does: its hooks gather the weights, and DeepSpeed's count of passes stays.
        return self._engine(*inputs) if torch.is_grad_enabled() else self.module(*inputs)

    def micro_batch(self) -> contextlib.AbstractContextManager[None]:
        """Around one micro-batch's passes; `backward` tells DeepSpeed which one is the last."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        self._micro_batches += 1
        self._engine.set_gradient_accumulation_boundary(self._micro_batches == self.settings.accumulation)
        # A loss that is not finite makes every gradient so: their norm, which DeepSpeed waits for in any case, then
        # says to all ranks that the step is to be skipped.
        self._engine.backward(loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan))
        if self._micro_batches == 1:
            self._partitions.begin()

    def step(self, hyper: dict[str, GroupHyper]) -> StepResult:
        """Clip, update and average; a step with a non-finite loss or gradient is skipped by all ranks alike."""
        assert self._micro_batches == self.settings.accumulation
        set_hyper(self._engine.basic_optimizer, hyper)
        apply = self._step_whole if self.config.stage == 0 else self._step_sharded
        done = self._partitions.step(apply, self._update_average if self._averages is not None else None)
        if done:
            self.steps += 1
            self._has_moments = self.settings.optimizer.kind != "sgd"
        self.discard()
        return StepResult(gradient_norm=torch.as_tensor(self._norm, dtype=torch.float32), skipped=not done)

    def _update_average(self, number: int, masters: Tensor) -> None:
        self._averages.update(number, masters, self.settings.decay(self.steps + 1))

    # In stage 3 the host waits for the device once, for the norm (utils.py:233 of DeepSpeed 0.19.8); with the optimizer
    # offloaded also after each backward pass for reductions (stage3.py:1414); and after the step, if several ranks keep
    # parameters gathered (partition_parameters.py:2128).

    def _step_sharded(self) -> bool:
        self._engine.step()
        self._norm = self._engine.get_global_grad_norm()
        return not self._engine.optimizer.overflow

    def _step_whole(self) -> bool:
        """Stage 0, where DeepSpeed gives no norm: the gradients are whole and already averaged."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        # In float64 as DeepSpeed does it: float32 sums on the CPU are off by 1e-4 for large, sparse gradients.
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters]
        self._norm = torch.linalg.vector_norm(torch.stack(norms)).float()
        if not torch.isfinite(self._norm):
            return False
        if self.settings.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.optimizer.clip_norm, self._norm)
        self._engine.basic_optimizer.step()
        return True

    def discard(self) -> None:
        """Forget the accumulated gradients."""
        self._partitions.forget()
        self._micro_batches = 0

    def overwrite(self, name: str, value: Tensor) -> None:
        """Not for sharded weights: only tokenizers set weights otherwise than by training."""
        raise UserError(f"engine.kind: zero cannot set {name} from outside; use engine.kind=local for this model")

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the module carries the averaged weights, if this engine keeps an average.

        Masters on NVMe are read once on the way out.
        """
        with uncompiled(self._compiled):
            if self._averages is None:
                yield
                return
            self._show_all(self._averages.read)
            try:
                yield
            finally:
                self._show_all(lambda number: self._partitions.groups[number].read("weight"))

    @torch.no_grad()
    def _show_all(self, source) -> None:
        for number, group in enumerate(self._partitions.groups):
            if group.aliased:
                self._averages.exchange(number)
            else:
                group.show(source(number))
            group.release()
        self._partitions.refresh()

    # --- State ---

    def pieces(self) -> dict[str, Piece]:
        """This rank's part of every parameter."""
        trained = {part.name: part.piece for group in self._partitions.groups for part in group.fragments}
        return trained | self._frozen.pieces

    def state_parts(self) -> tuple[str, ...]:
        """Which parts `named_state` gives, the same for all ranks, and for all parameters that are not frozen."""
        moments = tuple(MOMENTS) if self._has_moments else ()
        return ("weight", *moments, *(() if self._averages is None else ("ema",)))

    def named_state(self) -> Iterator[tuple[str, ParameterState]]:
        """This rank's part of every parameter; at most one sub-group of what is on NVMe is in memory."""
        parts = self.state_parts()
        for number, group in enumerate(self._partitions.groups):
            values = {part: group.read(part) for part in parts if part != "ema"}
            if "ema" in parts:
                values["ema"] = self._averages.read(number)
            try:
                for fragment in group.fragments:
                    own = slice(fragment.offset, fragment.offset + fragment.piece.numel)
                    yield fragment.name, ParameterState(**{part: flat[own] for part, flat in values.items()})
            finally:
                group.release()
        yield from self._frozen.named_state()

    @torch.no_grad()
    def load_named_state(self, reader: Reader, steps: int) -> None:
        """Restore this rank's part of every parameter, and from all parts the module's own weights."""
        self.discard()
        found = torch.zeros((), dtype=torch.bool, device=self.settings.device)
        for number in range(len(self._partitions.groups)):
            found |= self._load_group(number, reader, steps)
        self._frozen.load(reader)
        self._partitions.refresh()
        self.steps, self._has_moments = steps, dist.any_rank(found)

    def _load_group(self, number: int, reader: Reader, steps: int) -> bool:
        """Restore one group, whose values need not stay in memory; whether there were moments."""
        group = self._partitions.groups[number]
        values = _read_group(group, reader, self._averages is not None)
        weight, average = values.pop("weight"), values.pop("ema", None)
        group.write(weight, values, steps)
        if self._averages is not None:
            self._averages.write(number, weight if average is None else average)
        if not group.aliased:
            group.show(weight)
        return bool(values)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module and remove this process's files on NVMe."""
        self._engine.destroy()
        if self._folder is not None:
            self._folder.remove()


def _read_group(group: Group, reader: Reader, with_average: bool) -> dict[str, Tensor]:
    """The flat values [n] of those parts that the reader gives, zero in the padding."""
    flats: dict[str, Tensor] = {"weight": torch.zeros(group.numel)}
    for fragment in group.fragments:
        if fragment.piece.numel == 0:
            continue
        state = reader(fragment.name, fragment.piece)
        for part in ("weight", *MOMENTS, *(("ema",) if with_average else ())):
            if (values := getattr(state, part)) is not None:
                if part not in flats:
                    flats[part] = torch.zeros(group.numel)
                flats[part][fragment.offset : fragment.offset + fragment.piece.numel] = values.reshape(-1)
    return flats


# --- The average ---


class Averages:
    """The averages of all groups, in float32: in memory beside masters in memory, in files where those are on NVMe.

    Files go through one buffer of the largest such group, with ordinary reads and writes.
    """

    def __init__(self, groups: Sequence[Group], folder: Path | None):
        self._folder = folder
        self._groups = groups
        largest = max((group.numel for group in groups if group.swapped), default=0)
        self._buffer = torch.empty(largest)
        self._tensors: list[Tensor | None] = []
        for number, group in enumerate(groups):
            masters = group.read("weight")
            self._tensors.append(None if group.swapped else masters.clone())
            if group.swapped:
                self.write(number, masters)
            group.release()

    def read(self, number: int) -> Tensor:
        """The average of a group [n], float32; one from a file is valid until the next call."""
        if (tensor := self._tensors[number]) is not None:
            return tensor
        buffer = self._buffer[: self._groups[number].numel]
        with open(self._path(number), "rb", buffering=0) as file:
            _transfer(file.readinto, buffer)
        return buffer

    def write(self, number: int, values: Tensor) -> None:
        """Replace the average of a group."""
        if (tensor := self._tensors[number] if number < len(self._tensors) else None) is not None:
            tensor.copy_(values)
            return
        with contextlib.closing(open(self._path(number), "wb", buffering=0)) as file:
            _transfer(file.write, values)

    def update(self, number: int, masters: Tensor, decay: float) -> None:
        """average <- average - (1 - decay) * (average - masters)."""
        average = self.read(number)
        average.lerp_(masters, 1.0 - decay)
        if self._tensors[number] is None:
            self.write(number, average)

    def exchange(self, number: int) -> None:
        """Swap the average with the module's weights, for a group whose masters these are."""
        group, average = self._groups[number], self._tensors[number]
        masters = group.master.data.view(-1)
        kept = masters.clone()
        masters.copy_(average)
        average.copy_(kept)

    def _path(self, number: int) -> str:
        return os.path.join(self._folder, f"average-{number}")


def _transfer(move: Callable[[memoryview], int], values: Tensor) -> None:
    """All bytes of a tensor; one system call moves at most 2 GiB."""
    view = memoryview(values.detach().contiguous().numpy()).cast("B")
    done = 0
    while done < len(view):
        count = move(view[done:])
        if not count:
            raise OSError("the file of an average ended early")
        done += count
