"""Weights, gradients and optimizer sharded by PyTorch's FSDP2 (`fully_shard`), optionally with split matrices.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html. The mesh has up to three dimensions: groups that
hold the same shards ("replicate"), ranks that share one model ("shard"), ranks that share each matrix ("tensor"). Ranks
of one tensor group are neighbours and see the same data.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as make_forward_method
from torch.distributed.tensor import DTensor

from ibq import dist
from ibq.engine.base import EngineSettings, Reader
from ibq.engine.blueprint import Blueprint, in_pieces
from ibq.engine.compilation import compile_units, units_of
from ibq.engine.configs import FsdpEngineConfig
from ibq.engine.local import Held, TorchEngine
from ibq.engine.pieces import Piece, part, whole
from ibq.engine.tensor_parallel import apply_tensor_parallel, partial_gradients, tensor_piece

DIMENSIONS = ("replicate", "shard", "tensor")


class FsdpEngine(TorchEngine):
    """Shards on this rank; see `ibq.engine.base.Engine`.

    The module may offer `units()`: its parts whose weights are gathered one at a time; `kept_whole()`:
    parameters that are not sharded; `forward_methods`: (path of a module, name) of methods that use weights when they
    are called outside `forward`; `tensor_parallel_layouts`.
    """

    def __init__(self, config: FsdpEngineConfig, blueprint: Blueprint, settings: EngineSettings):
        dist.ensure_group()
        self.config = config
        self._mesh = _build_mesh(config, settings.device)
        module = blueprint.skeleton()
        sharded_at_birth = in_pieces(module)
        if not sharded_at_birth:
            module = blueprint.whole(settings.device)
        self._whole = {id(p) for p in module.kept_whole()} if hasattr(module, "kept_whole") else set()
        compiled = self._wrap(module, settings)
        if sharded_at_birth:
            module.to_empty(device="cpu" if config.offload == "cpu" else settings.device)
        module._get_fsdp_state()._lazy_init()  # else the first forward pass may move the shards to other memory
        held = {name: self._hold(module, name, p) for name, p in module.named_parameters() if p.requires_grad}
        if sharded_at_birth:
            for name, own in held.items():
                values = blueprint.initial(module, name, own.piece, own.tensor.device)
                own.tensor.data.copy_(values.view(own.tensor.shape))
        super().__init__(module, settings, held, compiled=compiled)
        self._parameters = dict(module.named_parameters())
        # Parameters that each tensor rank uses on its tokens alone: FSDP does not add up their gradients.
        self._partial = partial_gradients(module, config.tensor_parallel) if config.sequence_parallel else set()

    def _wrap(self, module: nn.Module, settings: EngineSettings) -> bool:
        """Split, compile and shard the module; whether it is compiled."""
        config = self.config
        if config.tensor_parallel > 1:
            apply_tensor_parallel(module, self._mesh["tensor"], sequence_parallel=config.sequence_parallel)
        # Matrices that are split over ranks are compiled only when that is asked for.
        setting = False if config.compile is None and config.tensor_parallel > 1 else config.compile
        compiled = compile_units(module, setting, settings.device)
        ignored = {p for p in module.parameters() if id(p) in self._whole}
        mesh = self._mesh["replicate", "shard"] if "replicate" in self._mesh.mesh_dim_names else self._mesh["shard"]
        offload = CPUOffloadPolicy(pin_memory=settings.device.type == "cuda") if config.offload == "cpu" else None
        common = {"mesh": mesh, "offload_policy": offload or OffloadPolicy(), "ignored_params": ignored}
        # The blocks are gathered in bf16. What is left (embeddings, final norm, head, quantizer) stays in fp32 under
        # autocast, as in one process.
        bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = bf16 if settings.precision == "bf16" else MixedPrecisionPolicy()
        reshard = config.reshards(self._mesh["shard"].size())
        for unit in (units := units_of(module)):
            fully_shard(unit, **common, mp_policy=policy, reshard_after_forward=reshard)
        for unit, following in itertools.pairwise(units):
            unit.set_modules_to_forward_prefetch([following])  # asked for before this one's kernels, not after
        fully_shard(module, **common)
        for path, method in getattr(module, "forward_methods", ()):
            make_forward_method(module.get_submodule(path), method)
        return compiled

    def _hold(self, module: nn.Module, name: str, parameter: nn.Parameter) -> Held:
        """This rank's part of a parameter, as a plain tensor in the same memory."""
        names = self._mesh.mesh_dim_names
        replicate, share, tensor = (self._mesh[dim].size() if dim in names else 1 for dim in DIMENSIONS)
        place = {dim: self._mesh.get_local_rank(dim) for dim in names}
        split = isinstance(parameter, DTensor) and "tensor" in parameter.device_mesh.mesh_dim_names
        piece = whole(parameter.shape)
        if split:
            piece = tensor_piece(module, name, tuple(parameter.shape), place["tensor"], tensor)
        copies = replicate * (1 if split else tensor)
        owner = place.get("replicate", 0) == 0 and (split or place.get("tensor", 0) == 0)
        local = parameter.data
        if isinstance(parameter, DTensor):
            local = parameter.to_local().detach()
            row = math.prod(local.shape[1:])  # elements; of the rows, every rank has as many as the first, or less
            chunk = -(-piece.numel // row // share) * row
            piece = part(piece, place["shard"] * chunk, chunk)
        else:
            copies, owner = copies * share, owner and place["shard"] == 0
        assert piece.numel == local.numel(), (name, piece, tuple(local.shape))
        piece = Piece(piece.shape, piece.spans, owner)
        own = nn.Parameter(local, requires_grad=False)
        return Held(tensor=own, piece=piece, decays=parameter.dim() >= 2, copies=copies)

    # --- The step ---

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around one micro-batch's forward and backward passes; see `FsdpEngineConfig.reduce`."""
        last = self._micro_batches == self.settings.accumulation - 1
        self.module.set_requires_gradient_sync(last or self.config.reduce == "each")
        yield

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        for name, own in self._held.items():
            gradient = self._parameters[name].grad
            if isinstance(gradient, DTensor):
                gradient = gradient.to_local()
            elif gradient is not None:  # a parameter that FSDP does not know
                dist.all_reduce_mean(gradient)
            if name in self._partial and gradient is not None:
                torch_dist.all_reduce(gradient, group=self._mesh.get_group("tensor"))
            own.tensor.grad = gradient

    # --- Weights that change otherwise than by a step: gathered ones are stale then ---

    def overwrite(self, name: str, value: Tensor) -> None:
        """See `Engine.overwrite`."""
        self._free_gathered()
        super().overwrite(name, value)

    def _swap(self) -> None:
        self._free_gathered()
        super()._swap()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """See `Engine.averaged`; methods of the module find the weights of its outermost level gathered."""
        with super().averaged():
            self.module.unshard()
            yield

    def load_named_state(self, reader: Reader, steps: int) -> None:
        """See `Engine.load_named_state`."""
        self._free_gathered()
        super().load_named_state(reader, steps)

    def _free_gathered(self) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.unshard()  # takes in what was asked for ahead: `reshard` alone leaves it to the next pass
                module.reshard()


def _build_mesh(config: FsdpEngineConfig, device: torch.device) -> DeviceMesh:
    sizes = dict(zip(DIMENSIONS, config.mesh_sizes(dist.world_size()), strict=True))
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
