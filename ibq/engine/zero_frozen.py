"""The parameters of a ZeRO engine that are not trained: DeepSpeed's optimizers do not know them."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from ibq import dist
from ibq.engine.base import ParameterState, Reader
from ibq.engine.pieces import Piece, stretch, take, whole
from ibq.engine.zero_setup import InitialWeights, partition_numel
from ibq.engine.zero_state import show_partitions


class FrozenWeights:
    """What checkpoints hold of them: every rank has an equal stretch of each, in float32 on the CPU.

    The module has weights of its own, as it has of trained parameters: in its precision, and in stage 3 partitioned.
    """

    def __init__(self, module: nn.Module, frozen: Collection[str], initial: InitialWeights, device: torch.device):
        self._parameters = {name: p for name, p in module.named_parameters() if name in frozen}
        self.pieces: dict[str, Piece] = {}
        for name in self._parameters:
            size = partition_numel([torch.Size(initial.shapes[name]).numel()])
            self.pieces[name] = stretch(initial.shapes[name], dist.rank() * size, size)
        self._values = {name: initial(name, piece, device).cpu() for name, piece in self.pieces.items()}

    def named_state(self) -> Iterator[tuple[str, ParameterState]]:
        """This rank's stretch of every weight."""
        for name, values in self._values.items():
            yield name, ParameterState(weight=values)

    @torch.no_grad()
    def load(self, reader: Reader) -> None:
        """Restore them; in stage 3 a rank reads its own stretch, else all that its module has."""
        for name, parameter in self._parameters.items():
            piece, own = self.pieces[name], self._values[name]
            if hasattr(parameter, "ds_tensor"):
                own.copy_(reader(name, piece).weight.view(-1))
                show_partitions([parameter], _padded(own, parameter.ds_tensor.ds_numel))
            else:
                values = reader(name, whole(piece.shape)).weight.view(piece.shape)
                own.copy_(take(values, piece))
                parameter.copy_(values)


def _padded(values: Tensor, numel: int) -> Tensor:
    return torch.cat([values, values.new_zeros(numel - len(values))])
