"""The moving average (EMA) of a ZeRO engine's weights: this rank's partitions, in float32."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ibq.engine.zero_state import Group


class Averages:
    """The averages of all groups: in memory beside masters in memory, in files where those are on NVMe.

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
