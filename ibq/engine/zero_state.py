"""What DeepSpeed's ZeRO optimizers keep on this rank, as groups of flat float32 partitions.

Reading, writing and averaging state is the same for every stage: it goes over groups. A group is one flat partition of
the master weights and what belongs to it: per parameter (stage 0), per optimizer group (stages 1 and 2) or per
sub-group (stage 3, whose groups may live on NVMe). The attributes of DeepSpeed's optimizers are known here and in
`zero_shortcuts` alone.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from ibq.engine.pieces import Piece, stretch, whole
from ibq.engine.zero_shortcuts import shorten

MOMENTS = {"moment1": "exp_avg", "moment2": "exp_avg_sq"}  # our names, torch.optim's
Update = Callable[[int, Tensor], None]  # (number of a group, its new master weights)


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter in a group's flat partition, from `offset` on; it may be empty."""

    name: str
    piece: Piece
    offset: int


class Group:
    """A flat partition [n] in memory.

    `master` is what the optimizer updates and its state is keyed by; `weights` is the module's own copy of the
    partition, None where the master is that copy.
    """

    swapped = False

    def __init__(self, fragments: Sequence[Fragment], master: Tensor, base: torch.optim.Optimizer, weights: Any = None):
        self.fragments = list(fragments)
        self.master = master
        self.numel = master.numel()
        self._state = base.state
        self._weights = weights

    @property
    def aliased(self) -> bool:
        """Whether the module computes with the master weights themselves."""
        return self._weights is None

    def read(self, part: str) -> Tensor:
        """The flat values of "weight", "moment1" or "moment2"; valid until `release`, not to be written to."""
        if part == "weight":
            return self.master.detach().view(-1)
        return self._state[self.master][MOMENTS[part]].view(-1)

    def write(self, weight: Tensor, moments: dict[str, Tensor], steps: int) -> None:
        """Replace the masters and the optimizer's state; no moments: as before the first step."""
        self.master.data.view(-1).copy_(weight)
        state = self._state.get(self.master)
        if not moments:
            self._state.pop(self.master, None)
            return
        if not state:
            state = self._state[self.master] = _new_state(self.master, steps)
        state["step"] = _step_count(state, steps)
        for part, values in moments.items():
            state[MOMENTS[part]].view(-1).copy_(values)

    def release(self) -> None:
        """Give back the memory of what was read."""

    def show(self, values: Tensor) -> None:
        """Put values into the module's own weights: a flat tensor, or `ParameterWeights`."""
        (self._weights.data.view(-1) if isinstance(self._weights, Tensor) else self._weights).copy_(values)


def _new_state(master: Tensor, steps: int) -> dict[str, Any]:
    step = torch.tensor(float(steps), device=master.device)
    return {"step": step, **{key: torch.empty_like(master, requires_grad=False) for key in MOMENTS.values()}}


def _step_count(state: dict[str, Any], steps: int) -> Any:
    """A count of the type that the optimizer keeps: DeepSpeed's CPU-Adam an int, torch.optim a tensor."""
    if torch.is_tensor(state["step"]):
        return torch.full_like(state["step"], float(steps))
    return steps


class Partitions:
    """All groups of one optimizer; this one is that of stage 0, with whole parameters on every rank."""

    def __init__(self, module: nn.Module, engine: Any):
        self.engine = engine
        self.base = engine.basic_optimizer
        self.groups: list[Group] = self._build(module)

    def _build(self, module: nn.Module) -> list[Group]:
        owner = torch_dist.get_rank() == 0
        return [
            Group([Fragment(name, whole(p.shape, owner), 0)], p, self.base)
            for name, p in module.named_parameters()
            if p.requires_grad
        ]

    def step(self, apply: Callable[[], bool], after: Update | None) -> bool:
        """Run `apply`, which says whether the update was done, and show every group's new masters to `after`."""
        done = apply()
        if done and after is not None:
            for number, group in enumerate(self.groups):
                after(number, group.read("weight"))
        return done

    def refresh(self) -> None:
        """Make every rank's module see what `show` has changed on any rank."""

    def begin(self) -> None:
        """After the first backward pass of a step: leave no gradient of an earlier one."""

    def forget(self) -> None:
        """Drop all gradients."""
        for parameter in self.engine.module.parameters():
            parameter.grad = None


class FlatPartitions(Partitions):
    """Stages 1 and 2: a flattened optimizer group is cut into equal parts, one per rank, wherever the cuts fall."""

    def _build(self, module: nn.Module) -> list[Group]:
        optimizer = self.engine.optimizer
        names = {id(p): name for name, p in module.named_parameters()}
        if hasattr(optimizer, "bit16_groups"):
            self._flats, self._cuts = optimizer.bit16_groups_flat, optimizer.parallel_partitioned_bit16_groups
            parameters, masters = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
        else:  # DeepSpeed's BF16_Optimizer, which it chooses for stage 1 in bf16 without offload
            self._flats, self._cuts = optimizer.bf16_groups_flat, optimizer.bf16_partitioned_groups
            parameters, masters = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
        self._masters = masters
        rank = torch_dist.get_rank()
        return [
            Group([_flat_fragment(names[id(p)], p) for p in params], master, self.base, cuts[rank])
            for params, master, cuts in zip(parameters, masters, self._cuts, strict=True)
        ]

    @torch.no_grad()
    def step(self, apply: Callable[[], bool], after: Update | None) -> bool:
        """As in `Partitions`; with offload DeepSpeed takes only gradients of which the last micro-batch has a part."""
        optimizer = self.engine.optimizer
        if getattr(optimizer, "cpu_offload", False):
            for parameter in itertools.chain(*optimizer.params_in_partition):
                key = optimizer.get_param_id(parameter)
                if key not in optimizer.norm_for_param_grads and (part := self._sum_of(key)) is not None:
                    number, _, offset, numel = optimizer.grad_position[key]
                    self._masters[number].grad[offset : offset + numel].copy_(part)
                    optimizer.norm_for_param_grads[key] = part.double().norm()
        return super().step(apply, after)

    def _sum_of(self, key: int) -> Tensor | None:
        """This rank's part of a parameter's gradient so far, with offload."""
        optimizer = self.engine.optimizer
        number, start, _, numel = optimizer.grad_position[key]
        if optimizer._use_compact_grad_partition_buffer(number):  # bf16
            return optimizer._get_compact_grad_partition_slice(number, torch_dist.get_rank(), key, numel)
        sums = optimizer.accumulated_grads_in_cpu.get(key)
        return None if sums is None else sums[start : start + numel]

    @torch.no_grad()
    def refresh(self) -> None:
        """Gather all ranks' parts."""
        from deepspeed.runtime.utils import all_gather_dp_groups

        optimizer = self.engine.optimizer
        all_gather_dp_groups(
            groups_flat=self._flats,
            partitioned_param_groups=self._cuts,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )

    def forget(self) -> None:
        """Drop all gradients, also those that were accumulated in part."""
        optimizer = self.engine.optimizer
        if not hasattr(optimizer, "averaged_gradients"):  # BF16_Optimizer, whose own step leaves its buffers empty
            if any(map(any, optimizer.fp32_groups_has_gradients)):
                optimizer.zero_grad()
            return
        optimizer.zero_grad(set_to_none=True)
        optimizer.micro_step_id = -1  # the next backward pass overwrites instead of adding
        for number in list(optimizer.averaged_gradients):
            optimizer.averaged_gradients[number] = None
        for number in list(optimizer.all_grad_tensors):
            optimizer.all_grad_tensors[number] = None
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            # A parameter that then gets no gradient counts as one with a gradient of zero.
            torch._foreach_zero_([master.grad for master in self._masters])
            for sums in optimizer.accumulated_grads_in_cpu.values():
                sums.zero_()


def _flat_fragment(name: str, parameter: nn.Parameter) -> Fragment:
    mapping = parameter._hp_mapping
    if mapping is None:
        return Fragment(name, stretch(parameter.shape, 0, 0), 0)
    lower, upper = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(name, stretch(parameter.shape, lower.start, lower.numel), upper.start)


class ParameterPartitions(Partitions):
    """Stage 3: every flattened parameter is cut into equal stretches; sub-groups are updated one after the other."""

    def _build(self, module: nn.Module) -> list[Group]:
        optimizer = self.engine.optimizer
        starts = itertools.accumulate(optimizer.fp16_partitioned_groups_flat_numel, initial=0)
        self._gradients = [
            optimizer.grad_partitions_flat_buffer.narrow(0, start, numel)
            for start, numel in zip(starts, optimizer.fp16_partitioned_groups_flat_numel, strict=False)
        ]
        if optimizer.offload_optimizer:
            self._share_gradients()
        names = {p.ds_id: name for name, p in module.named_parameters()}
        self._parts: dict[int, Tensor] = {}  # of the gradients, by parameter
        for parameters, gradients in zip(optimizer.fp16_groups, self._gradients, strict=True):
            parts = gradients.split([parameter.partition_numel() for parameter in parameters])
            self._parts |= {parameter.ds_id: part for parameter, part in zip(parameters, parts, strict=True)}
        if not optimizer.offload_optimizer:
            shorten(optimizer, self._gradients, list(self._parts.values()))
        return [self._group(number, names) for number in range(len(optimizer.fp16_groups))]

    def _group(self, number: int, names: dict[int, str]) -> Group:
        optimizer, fragments = self.engine.optimizer, []
        for parameter in optimizer.fp16_groups[number]:
            size = parameter.partition_numel()
            piece = stretch(parameter.ds_shape, torch_dist.get_rank() * size, size)
            fragments.append(Fragment(names[parameter.ds_id], piece, optimizer.grad_position[parameter.ds_id][1]))
        master = optimizer.fp32_partitioned_groups_flat[number]
        if optimizer._swappable_optimizer_subgroup(number):
            return SwappedGroup(fragments, master, self.base, ParameterWeights(optimizer, number), optimizer)
        weights = optimizer.fp16_partitioned_groups_flat[number]
        if weights is None:
            weights = ParameterWeights(optimizer, number)
        elif weights.data_ptr() == master.data_ptr():
            weights = None  # in fp32 DeepSpeed keeps no second copy
        return Group(fragments, master, self.base, weights)

    def step(self, apply: Callable[[], bool], after: Update | None) -> bool:
        """As in `Partitions`, but while a sub-group is in memory: one on NVMe is not read again."""
        optimizer = self.engine.optimizer
        if optimizer.offload_optimizer:
            self._complete_norms()
        if after is None:
            return apply()
        original = optimizer._optimizer_step

        def update(number: int) -> None:
            original(number)
            after(number, self.groups[number].master.detach())

        optimizer._optimizer_step = update
        try:
            return apply()
        finally:
            del optimizer._optimizer_step

    @torch.no_grad()
    def refresh(self) -> None:
        """Gather again what stays gathered."""
        optimizer = self.engine.optimizer
        optimizer._partition_all_parameters()
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def begin(self) -> None:
        """As in `Partitions`: a parameter without a gradient counts as one with a gradient of zero.

        The first gradients of a step replace the last step's. So only those parameters are to be cleared that have none
        in the first micro-batch, and not the whole buffer.
        """
        written = self.engine.optimizer._offload_boundary_param_ids
        for key, gradient in self._parts.items():
            if key not in written:
                gradient.zero_()

    def forget(self) -> None:
        """Drop all gradients: the next ones replace them."""
        optimizer = self.engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer._offload_boundary_param_ids.clear()
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
            self._offer_gradients()

    def _share_gradients(self) -> None:
        """Let offloaded sub-groups take their gradients from the buffer that accumulates them.

        For those in memory DeepSpeed has a second buffer, for those on NVMe it writes them out and reads them back, at
        their places in the sub-group, where direct I/O needs multiples of 512 bytes: at any other place the read fails,
        nothing says so, and the parameter gets no gradient. In both it misses parameters without a gradient in the last
        micro-batch.
        """
        optimizer = self.engine.optimizer
        for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            if not optimizer._swappable_optimizer_subgroup(number):
                master.grad = self._gradients[number]
        if optimizer.swap_optimizer:
            optimizer.optimizer_swapper.swap_out_gradients = lambda **_: None
        self._offer_gradients()

    def _offer_gradients(self) -> None:
        """Tell the swapper again what it forgets with every update."""
        optimizer = self.engine.optimizer
        for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            if optimizer._swappable_optimizer_subgroup(number):
                info = optimizer.optimizer_swapper._get_param_swap_info(master)
                info.unswapped_gradients = {0: self._gradients[number]}

    def _complete_norms(self) -> None:
        """Norms that DeepSpeed does not have, for it takes them in the last micro-batch."""
        optimizer = self.engine.optimizer
        for group, gradients, parameters in zip(self.groups, self._gradients, optimizer.fp16_groups, strict=True):
            for fragment, parameter in zip(group.fragments, parameters, strict=True):
                key = optimizer.get_param_id(parameter)
                if key not in optimizer.norm_for_param_grads:
                    part = gradients[fragment.offset : fragment.offset + fragment.piece.numel]
                    optimizer.norm_for_param_grads[key] = part.double().norm()


class ParameterWeights:
    """The module's own weights of a sub-group, parameter by parameter, some of them on NVMe."""

    def __init__(self, optimizer: Any, number: int):
        self._optimizer, self._number = optimizer, number

    @torch.no_grad()
    def copy_(self, values: Tensor) -> None:
        """Replace them by flat values [n]."""
        optimizer, number = self._optimizer, self._number
        flat = optimizer.fp16_partitioned_groups_flat[number]
        if flat is not None:
            flat.copy_(values)
            return
        show_partitions(optimizer.fp16_groups[number], values)


def show_partitions(parameters: Sequence[nn.Parameter], values: Tensor) -> None:
    """Replace this rank's partitions of parameters by flat values [n], on NVMe too (stage 3)."""
    offset, swapped, sources = 0, [], []
    for parameter in parameters:
        part = parameter.ds_tensor
        source = values[offset : offset + part.ds_numel]
        offset += part.ds_numel
        if part.status.name == "AVAILABLE":
            part.data.copy_(source)
        else:
            swapped.append(parameter)
            sources.append(source)
    if swapped:
        swapped[0].nvme_swapper.swap_out_partitioned_params(dst_fp16_params=swapped, src_fp32_params=sources)


class SwappedGroup(Group):
    """A sub-group whose masters and moments lie in files: DeepSpeed's, read and written through its buffers."""

    swapped = True

    def __init__(self, fragments, master, base, weights, optimizer: Any):
        super().__init__(fragments, master, base, weights)
        self._swapper = optimizer.optimizer_swapper
        self.numel = self._info().numel()
        self._buffers: list[Tensor] = []

    def _info(self) -> Any:
        return self._swapper._get_param_swap_info(self.master)

    def _buffer(self) -> Tensor:
        aligned = self._swapper._io_aligned_numel(self.numel)
        buffers = self._swapper.swap_buffer_manager.allocate(aligned, 1, torch.float32)
        assert buffers is not None, "all swap buffers are in use"
        self._buffers += buffers
        return buffers[0]

    def _path(self, part: str) -> str:
        return self._info().tensors[("weight", *MOMENTS).index(part)].swap_path

    def read(self, part: str) -> Tensor:
        """The flat values, in one of the swapper's buffers."""
        buffer, handle = self._buffer(), self._swapper.aio_handle
        assert handle.async_pread(buffer, self._path(part), 0) == 0
        handle.wait()
        return buffer[: self.numel]

    def write(self, weight: Tensor, moments: dict[str, Tensor], steps: int) -> None:
        """Replace the files; DeepSpeed's own checkpoints do not restore moments on NVMe."""
        state = self._state.get(self.master)
        if moments and not state:
            # Lengths alone: the memory is never touched, and DeepSpeed's entry for these tensors takes it away.
            empty = {key: torch.empty(self.numel) for key in MOMENTS.values()}
            self._state[self.master] = {"step": steps, **empty}
            self._info().release_memory()
        elif state and not moments:
            # DeepSpeed has no way to take a tensor out of its table: zeros at step 0 are what a fresh start has.
            moments = {part: torch.zeros_like(weight) for part in MOMENTS}
            state["step"] = 0
        elif state:
            state["step"] = steps
        for part, values in (("weight", weight), *moments.items()):
            self._write_file(self._path(part), values)

    def _write_file(self, path: str, values: Tensor) -> None:
        buffer, handle = self._buffer(), self._swapper.aio_handle
        buffer[: self.numel].copy_(values)
        assert handle.async_pwrite(buffer, path, 0) == 0
        handle.wait()
        self.release()

    def release(self) -> None:
        """Give the buffers back to the swapper."""
        self._swapper.swap_buffer_manager.free(self._buffers)
        self._buffers = []
