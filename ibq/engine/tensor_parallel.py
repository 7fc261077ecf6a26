"""Matrices split over the ranks of a "tensor" mesh by PyTorch's DTensor (Megatron-LM, arXiv 1909.08053).

Which layers are split, and how, the module says itself in `tensor_parallel_layouts`, layer name (with wildcards) ->

- "rows": each rank computes some of the outputs, from the whole input;
- "packed_rows": the same for stacked projections of queries, keys and values: each rank has whole heads of all three;
- "columns": each rank takes some of the inputs, its own outputs of a layer before; the results are added up;
- "rows_gathered": as "rows", and every rank gets all outputs;
- "vocabulary": an embedding, or a head whose loss is computed without gathering the logits.

Everything else, and what the number of ranks does not divide, is computed by all ranks alike. With sequence parallelism
(arXiv 2205.05198) each rank has some of the tokens between the matrices inside the blocks (`units()`, run
one after the other; each maps (x [B, T, C], condition, ...) to [B, T, C]): sums over the ranks become reduce-scatters,
followed by all-gathers.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from functools import partial

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ibq.config import UserError
from ibq.engine.pieces import Piece, Spans, block, take, whole
from ibq.ops.linear_cross_entropy import split_linear_cross_entropy

TOKENS = 1  # the dimension of the tokens in [B, T, C]


def tensor_piece(module: nn.Module, name: str, shape: tuple[int, ...], rank: int, size: int) -> Piece:
    """The elements of a whole parameter that one of `size` tensor ranks holds, in the order in which it holds them."""
    layer = _parent(name)
    match _layout(module, layer, size):
        case None:
            return whole(shape)
        case "columns":
            share = shape[1] // size
            return block(shape, (0, shape[0]), (rank * share, (rank + 1) * share))
        case "packed_rows":
            attention = module.get_submodule(_parent(layer))
            group = attention.heads // attention.kv_heads  # not the heads themselves, which may be this rank's
            kv_rows = shape[0] // (group + 2)
            parts = (group * kv_rows, kv_rows, kv_rows)
        case _:
            parts = (shape[0],)
    spans, first, row = [], 0, math.prod(shape[1:])
    for rows in parts:
        share = rows // size
        spans.append(Spans((first + rank * share) * row, share * row))
        first += rows
    return Piece(shape, tuple(spans))


def partial_gradients(module: nn.Module, ranks: int) -> set[str]:
    """Parameters that each rank uses on its tokens alone under sequence parallelism: their gradients must be summed."""
    within = {id(parameter) for unit in module.units() for parameter in unit.parameters()}
    return {
        name
        for name, parameter in module.named_parameters()
        if id(parameter) in within and _layout(module, _parent(name), ranks) is None
    }


def apply_tensor_parallel(module: nn.Module, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Split the layers of a module over a one-dimensional mesh, in place, without communication.

    The parameters become DTensors of this rank's elements (`tensor_piece`); a module on the meta device stays there.
    Every rank must then be given the same inputs, and the same state of the random number generators. Errors:
    UserError for a module that names no layouts.
    """
    if not hasattr(module, "tensor_parallel_layouts"):
        raise UserError(f"engine.tensor_parallel: a {type(module).__name__} cannot be split; set it to 1")
    layouts = {name: layout for name, _ in module.named_modules() if (layout := _layout(module, name, mesh.size()))}
    between = Split(TOKENS) if sequence_parallel else Replicate()  # how the blocks' hidden states lie on the ranks
    for name, layout in layouts.items():
        _split_parameters(module, name, layout, mesh)
    for name in {_parent(name) for name, layout in layouts.items() if layout in ("rows", "packed_rows")}:
        # One input for all its layers: their gradients are added up before the sum over the ranks.
        module.get_submodule(name).register_forward_pre_hook(partial(_whole_input, mesh, between))
    for name, layout in layouts.items():
        _parallelize(module, name, layout, mesh, between)
    if sequence_parallel:
        _split_tokens(module.units(), mesh, module, layouts)


def _layout(module: nn.Module, layer: str, ranks: int) -> str | None:
    """How a layer is split over so many ranks; None for one that is not named, or does not divide."""
    layouts: Mapping[str, str] = module.tensor_parallel_layouts
    layout = next((layout for pattern, layout in layouts.items() if fnmatchcase(layer, pattern)), None)
    if layout is None:
        return None
    size = module.get_submodule(layer).weight.shape[1 if layout == "columns" else 0]
    return layout if size % ranks == 0 else None


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


# --- Layers ---


def _split_parameters(module: nn.Module, layer: str, layout: str, mesh: DeviceMesh) -> None:
    """Keep this rank's elements. DTensor is told of blocks of rows or columns; packed rows are its for their number."""
    owner = module.get_submodule(layer)
    assert layout != "columns" or owner.bias is None, f"{layer}: its bias would be added once a rank"
    for name, parameter in [*owner.named_parameters(recurse=False)]:
        shape = tuple(parameter.shape)
        piece = tensor_piece(module, f"{layer}.{name}", shape, mesh.get_local_rank(), mesh.size())
        local = take(parameter.detach(), piece)
        local = local.view(shape[0], -1) if layout == "columns" else local.view(-1, *shape[1:])
        placement = Split(1 if layout == "columns" else 0)
        split = DTensor.from_local(local, mesh, [placement], run_check=False)
        owner.register_parameter(name, nn.Parameter(split, requires_grad=parameter.requires_grad))


def _parallelize(module: nn.Module, name: str, layout: str, mesh: DeviceMesh, between: Placement) -> None:
    """Make a layer whose parameters are split compute with the other ranks."""
    layer = module.get_submodule(name)
    match layout:
        case "rows" | "packed_rows":
            parallelize_module(layer, mesh, ColwiseParallel(input_layouts=Replicate()))
        case "columns":
            parallelize_module(layer, mesh, RowwiseParallel(output_layouts=between))
        case "rows_gathered":
            parallelize_module(layer, mesh, ColwiseParallel(output_layouts=Replicate(), use_local_output=False))
            within = any(layer is part for unit in module.units() for part in unit.modules())
            layer.register_forward_hook(partial(_local_output, between if within else Replicate()))
        case "vocabulary" if isinstance(layer, nn.Embedding):
            layer.forward = partial(_embed, mesh, layer)
        case "vocabulary":
            layer.loss = partial(_head_loss, mesh)
            layer.register_forward_pre_hook(partial(_whole_input_of_logits, mesh))
            layer.register_forward_hook(_whole_logits)
    if layout == "packed_rows":
        attention = module.get_submodule(_parent(name))
        attention.heads //= mesh.size()
        attention.kv_heads //= mesh.size()


def _whole_input(mesh: DeviceMesh, between: Placement, _module, args: tuple) -> tuple:
    x = DTensor.from_local(args[0], mesh, [between], run_check=False)
    return x.redistribute(placements=[Replicate()]), *args[1:]


def _local_output(between: Placement, _module, _args, output: DTensor) -> Tensor:
    """The output on every rank, which uses it for all tokens, or for its own: then gradients are parts of a sum."""
    return output.to_local(grad_placements=[Replicate() if between.is_replicate() else Partial()])


def _summed_gradient(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same tensor, whose gradient will be summed over the ranks."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


# --- The vocabulary ---


def _embed(mesh: DeviceMesh, layer: nn.Embedding, codes: Tensor) -> Tensor:
    """Rows [..., C] of a table of which each rank has some.

    Not RowwiseParallel: the gradient that it leaves behind on every rank is that of the whole table.
    """
    weight = layer.weight.to_local()
    place = codes - mesh.get_local_rank() * len(weight)
    inside = (place >= 0) & (place < len(weight))
    rows = F.embedding(place.where(inside, 0), weight).where(inside[..., None], 0)
    rows = DTensor.from_local(rows, mesh, [Partial()], run_check=False)
    return rows.redistribute(placements=[Replicate()]).to_local()


def _head_loss(mesh: DeviceMesh, hidden: Tensor, weight: DTensor, targets: Tensor) -> Tensor:
    """Negative log likelihoods [N] of hidden [N, C], as `Head.loss`, with each rank's rows of the weight."""
    local = weight.to_local()
    return split_linear_cross_entropy(
        _summed_gradient(hidden, mesh),
        local,
        targets,
        first_code=mesh.get_local_rank() * len(local),
        num_codes=len(weight),
        gather=partial(_gather, mesh),
    )


def _gather(mesh: DeviceMesh, tensor: Tensor) -> Tensor:
    """Every rank's tensor, in their order, [ranks, ...]."""
    result = tensor.new_empty(mesh.size(), *tensor.shape)
    torch_dist.all_gather([*result], tensor.contiguous(), group=mesh.get_group())
    return result


def _whole_input_of_logits(mesh: DeviceMesh, _head, args: tuple) -> tuple | None:
    if len(args) == 1:
        return (DTensor.from_local(args[0], mesh, [Replicate()], run_check=False),)
    return None


def _whole_logits(_head, _args, output: Tensor) -> Tensor:
    return output.redistribute(placements=[Replicate()]).to_local() if isinstance(output, DTensor) else output


# --- Sequence parallelism ---


def _split_tokens(blocks: Sequence[nn.Module], mesh: DeviceMesh, module: nn.Module, layouts: Mapping) -> None:
    """Give each rank its tokens before the first block, and all tokens after the last."""
    region = _TokenRegion(mesh)
    makes_modulation = {id(module.get_submodule(name)) for name, kind in layouts.items() if kind == "rows_gathered"}
    blocks[0].register_forward_pre_hook(region.enter)
    blocks[-1].register_forward_hook(region.leave)
    for part in blocks:
        if not makes_modulation.intersection(id(layer) for layer in part.modules()):
            part.register_forward_pre_hook(region.condition)


class _TokenRegion:
    """Where a rank has some of the tokens; it draws random numbers (dropout) of its own there."""

    def __init__(self, mesh: DeviceMesh):
        self._mesh = mesh
        self._common_numbers: AbstractContextManager

    def enter(self, block: nn.Module, args: tuple) -> tuple:
        """This rank's tokens of x [B, T, C]."""
        x, *rest = args
        if block.training:
            self._draw_own_numbers(x.device)
        x = DTensor.from_local(x, self._mesh, [Replicate()], run_check=False)
        return x.redistribute(placements=[Split(TOKENS)]).to_local(), *rest

    def leave(self, block: nn.Module, _args, x: Tensor) -> Tensor:
        """All ranks' tokens, [B, T, C]."""
        if block.training:
            self._draw_common_numbers()
        x = DTensor.from_local(x, self._mesh, [Split(TOKENS)], run_check=False)
        return x.redistribute(placements=[Replicate()]).to_local().clone()  # FSDP warns of blocks that return a view

    def condition(self, _block: nn.Module, args: tuple) -> tuple:
        """A modulation made outside of the block: the ranks' gradients of it are parts of a sum."""
        x, condition, *rest = args
        return x, _summed_gradient(condition, self._mesh), *rest

    @torch.compiler.disable
    def _draw_own_numbers(self, device: torch.device) -> None:
        seed = int(torch.randint(2**62, (), device="cpu"))  # of the CPU's generator: no other device is waited for
        devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
        self._common_numbers = torch.random.fork_rng(devices=devices, device_type=kind)
        self._common_numbers.__enter__()
        torch.manual_seed(seed + self._mesh.get_local_rank())

    @torch.compiler.disable
    def _draw_common_numbers(self) -> None:
        self._common_numbers.__exit__(None, None, None)
