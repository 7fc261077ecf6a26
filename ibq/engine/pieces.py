"""Which elements of a parameter a rank holds: what lets a checkpoint outlive the layout that it was made in."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """`count` spans of `length` elements of a flattened parameter, the first at `start`, `stride` elements apart.

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
class Piece:
    """A rank's part of a parameter: the elements of `spans`, one after the other, in the order in which it holds them.

    Of several ranks that hold the same elements one is the `owner`, which writes them.
    """

    shape: tuple[int, ...]  # of the whole parameter
    spans: tuple[Spans, ...]
    owner: bool = True

    @property
    def numel(self) -> int:
        """Elements on this rank."""
        return sum(spans.numel for spans in self.spans)

    @property
    def is_whole(self) -> bool:
        """Whether these are all elements in their natural order."""
        return self.spans == (Spans(0, math.prod(self.shape)),)


def whole(shape: Sequence[int], owner: bool = True) -> Piece:
    """All of a parameter."""
    return Piece(tuple(shape), (Spans(0, math.prod(shape)),), owner)


def stretch(shape: Sequence[int], start: int, length: int, owner: bool = True) -> Piece:
    """`length` elements of a flattened parameter from `start` on, cut off at its end; none where it is over before."""
    end = min(start + length, math.prod(shape))
    return Piece(tuple(shape), (Spans(start, end - start),) if end > start else (), owner)


def block(shape: Sequence[int], rows: tuple[int, int], columns: tuple[int, int], owner: bool = True) -> Piece:
    """Rows [first, end) and columns [first, end) of a matrix [R, C]."""
    width = shape[1]
    (first_row, end_row), (first_column, end_column) = rows, columns
    if first_row >= end_row or first_column >= end_column:
        return Piece(tuple(shape), (), owner)
    if end_column - first_column == width:
        return Piece(tuple(shape), (Spans(first_row * width, (end_row - first_row) * width),), owner)
    start, length = first_row * width + first_column, end_column - first_column
    return Piece(tuple(shape), (Spans(start, length, end_row - first_row, width),), owner)


def take(full: Tensor, piece: Piece) -> Tensor:
    """The elements [numel] of a piece from the whole parameter, a copy."""
    flat = full.reshape(-1)
    parts = [_view(flat, spans).reshape(-1) for spans in piece.spans]
    return torch.cat(parts) if parts else flat.new_empty(0)


def place(full: Tensor, piece: Piece, values: Tensor) -> None:
    """Write a shard's elements [numel] to where they belong in the whole, contiguous parameter."""
    flat, values, first = full.view(-1), values.reshape(-1), 0
    for spans in piece.spans:
        _view(flat, spans).copy_(values[first : first + spans.numel].view(spans.count, spans.length))
        first += spans.numel


def _view(flat: Tensor, spans: Spans) -> Tensor:
    size, stride = (spans.count, spans.length), (spans.stride or spans.length, 1)
    return flat.as_strided(size, stride, flat.storage_offset() + spans.start)


def overlaps(wanted: Sequence[Spans], stored: Sequence[Spans]) -> Iterator[tuple[int, int, int]]:
    """(place among the wanted elements, place among the stored ones, length) of every stretch that both have."""
    stored_spans = sorted(_single_spans(stored))
    wanted_spans = sorted(_single_spans(wanted))
    position = 0
    for start, length, place_wanted in wanted_spans:
        while position < len(stored_spans) and stored_spans[position][0] + stored_spans[position][1] <= start:
            position += 1
        for number in range(position, len(stored_spans)):
            first, size, place_stored = stored_spans[number]
            if first >= start + length:
                break
            low, high = max(first, start), min(first + size, start + length)
            if low < high:
                yield place_wanted + low - start, place_stored + low - first, high - low


def _single_spans(all_spans: Sequence[Spans]) -> Iterator[tuple[int, int, int]]:
    """(start in the parameter, length, place among the held elements) of every single run."""
    position = 0
    for spans in all_spans:
        for number in range(spans.count):
            yield spans.start + number * spans.stride, spans.length, position
            position += spans.length


def part(piece: Piece, first: int, numel: int) -> Piece:
    """Of the elements that a rank holds, `numel` from the `first` on."""
    spans, end = [], min(first + numel, piece.numel)
    position = 0
    for whole_spans in piece.spans:
        low, high = max(first - position, 0), min(end - position, whole_spans.numel)
        if low < high:
            spans += _cut(whole_spans, low, high)
        position += whole_spans.numel
    return Piece(piece.shape, tuple(spans), piece.owner)


def _cut(spans: Spans, low: int, high: int) -> list[Spans]:
    """The elements [low, high) of some spans: a broken first one, whole ones, a broken last one."""
    length, stride = spans.length, spans.stride
    (first, skipped), (last, left) = divmod(low, length), divmod(high, length)
    if first == last:
        return [Spans(spans.start + first * stride + skipped, left - skipped)]
    found = []
    if skipped:
        found.append(Spans(spans.start + first * stride + skipped, length - skipped))
        first += 1
    if first < last:
        count = last - first
        found.append(Spans(spans.start + first * stride, length, count, stride if count > 1 else 0))
    if left:
        found.append(Spans(spans.start + last * stride, left))
    return found
