"""Batches for training and validation, on the device."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ibq.config import UserError
from ibq.data.order import BatchOrder


class MicroBatchSampler:
    """The (sample, epoch) lists of the steps [start, stop), in the form that DataLoader takes."""

    def __init__(self, order: BatchOrder, start: int, stop: int):
        self.order, self.start, self.stop = order, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.order.micro_batches(self.start, self.stop)


def training_batches(
    dataset: Dataset, order: BatchOrder, start: int, stop: int, *, workers: int, device: torch.device
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """One list of micro-batches (inputs, labels) per step in [start, stop), on the device.

    The batches do not depend on the number of workers, nor on what was read before `start`.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=MicroBatchSampler(order, start, stop),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # a loader draws a number: not from the generator of the step's dropout
    )
    micro_batches = _read(loader)
    for _ in range(start, stop):
        yield [_to_device(next(micro_batches), device) for _ in range(order.accumulation)]


def validation_batches(
    dataset: Dataset,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device,
    limit: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sample once over all ranks: rank r takes samples r, r + world_size, ..."""
    numbers = list(range(len(dataset)))[:limit][rank::world_size]
    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda")
    for batch in _read(loader):
        yield _to_device(batch, device)


def _read(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches; a user's error in a worker comes without the worker's traceback."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).rsplit(f"{UserError.__name__}: ", 1)[-1].strip()) from error


def _to_device(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    inputs, labels = batch
    return inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
