"""Which elements of a parameter a rank holds: what lets a checkpoint outlive the layout that it was made in."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Runs:
    """`count` runs of `length` elements of a flattened parameter, the first at `start`, `stride` elements apart.

    Rows of a matrix are one run; a block of its columns is one run per row.
    """

    start: int
    length: int
    count: int = 1
    stride: int = 0

    @property
    def numel(self) -> int:
        """Elements in all."""
        return self.length * self.count


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter: the elements of `runs`, one after the other, in the order in which it holds them.

    Of several ranks that hold the same elements one is the `owner`, which writes them.
    """

    shape: tuple[int, ...]  # of the whole parameter
    runs: tuple[Runs, ...]
    owner: bool = True

    @property
    def numel(self) -> int:
        """Elements on this rank."""
        return sum(runs.numel for runs in self.runs)

    @property
    def is_whole(self) -> bool:
        """Whether these are all elements in their natural order."""
        return self.runs == (Runs(0, math.prod(self.shape)),)


def whole(shape: Sequence[int], owner: bool = True) -> Shard:
    """All of a parameter."""
    return Shard(tuple(shape), (Runs(0, math.prod(shape)),), owner)


def interval(shape: Sequence[int], start: int, length: int, owner: bool = True) -> Shard:
    """`length` elements of a flattened parameter from `start` on, cut off at its end; none where it is over before."""
    end = min(start + length, math.prod(shape))
    return Shard(tuple(shape), (Runs(start, end - start),) if end > start else (), owner)


def block(shape: Sequence[int], rows: tuple[int, int], columns: tuple[int, int], owner: bool = True) -> Shard:
    """Rows [first, end) and columns [first, end) of a matrix [R, C]."""
    width = shape[1]
    (first_row, end_row), (first_column, end_column) = rows, columns
    if first_row >= end_row or first_column >= end_column:
        return Shard(tuple(shape), (), owner)
    if end_column - first_column == width:
        return Shard(tuple(shape), (Runs(first_row * width, (end_row - first_row) * width),), owner)
    start, length = first_row * width + first_column, end_column - first_column
    return Shard(tuple(shape), (Runs(start, length, end_row - first_row, width),), owner)


def take(full: Tensor, shard: Shard) -> Tensor:
    """The elements [numel] of a shard from the whole parameter, a copy."""
    flat = full.reshape(-1)
    parts = [_view(flat, runs).reshape(-1) for runs in shard.runs]
    return torch.cat(parts) if parts else flat.new_empty(0)


def place(full: Tensor, shard: Shard, values: Tensor) -> None:
    """Write a shard's elements [numel] to where they belong in the whole, contiguous parameter."""
    flat, values, first = full.view(-1), values.reshape(-1), 0
    for runs in shard.runs:
        _view(flat, runs).copy_(values[first : first + runs.numel].view(runs.count, runs.length))
        first += runs.numel


def _view(flat: Tensor, runs: Runs) -> Tensor:
    size, stride = (runs.count, runs.length), (runs.stride or runs.length, 1)
    return flat.as_strided(size, stride, flat.storage_offset() + runs.start)


def overlaps(wanted: Sequence[Runs], stored: Sequence[Runs]) -> Iterator[tuple[int, int, int]]:
    """(place among the wanted elements, place among the stored ones, length) of every piece that both have."""
    stored_pieces = sorted(_pieces(stored))
    wanted_pieces = sorted(_pieces(wanted))
    position = 0
    for start, length, place_wanted in wanted_pieces:
        while position < len(stored_pieces) and stored_pieces[position][0] + stored_pieces[position][1] <= start:
            position += 1
        for number in range(position, len(stored_pieces)):
            first, size, place_stored = stored_pieces[number]
            if first >= start + length:
                break
            low, high = max(first, start), min(first + size, start + length)
            if low < high:
                yield place_wanted + low - start, place_stored + low - first, high - low


def _pieces(all_runs: Sequence[Runs]) -> Iterator[tuple[int, int, int]]:
    """(start in the parameter, length, place among the held elements) of every single run."""
    position = 0
    for runs in all_runs:
        for number in range(runs.count):
            yield runs.start + number * runs.stride, runs.length, position
            position += runs.length


def part(shard: Shard, first: int, numel: int) -> Shard:
    """Of the elements that a rank holds, `numel` from the `first` on."""
    runs, end = [], min(first + numel, shard.numel)
    position = 0
    for whole_runs in shard.runs:
        low, high = max(first - position, 0), min(end - position, whole_runs.numel)
        if low < high:
            runs += _cut(whole_runs, low, high)
        position += whole_runs.numel
    return Shard(shard.shape, tuple(runs), shard.owner)


def _cut(runs: Runs, low: int, high: int) -> list[Runs]:
    """The elements [low, high) of some runs: a broken first run, whole ones, a broken last one."""
    length, stride = runs.length, runs.stride
    (first, skipped), (last, left) = divmod(low, length), divmod(high, length)
    if first == last:
        return [Runs(runs.start + first * stride + skipped, left - skipped)]
    found = []
    if skipped:
        found.append(Runs(runs.start + first * stride + skipped, length - skipped))
        first += 1
    if first < last:
        count = last - first
        found.append(Runs(runs.start + first * stride, length, count, stride if count > 1 else 0))
    if left:
        found.append(Runs(runs.start + last * stride, left))
    return found
