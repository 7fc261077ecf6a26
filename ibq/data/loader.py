"""Batches for training and validation, on the device."""

import math
import mmap
import signal
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ibq.config import UserError
from ibq.data.codes import CodeDataset, CodeStream
from ibq.data.counts import BadSample
from ibq.data.images import ImageDataset, ImageStream
from ibq.data.order import Batching

PREFETCH = 4  # batches that a worker is ahead
SLOTS = PREFETCH + 2
Report = Callable[[Sequence[BadSample]], None]


def training_batches(
    stream: ImageStream | CodeStream,
    batching: Batching,
    position: int,
    steps: int,
    *,
    workers: int,
    device: torch.device,
    report: Report = lambda bad: None,
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """One list of micro-batches (inputs, labels) per step from `position` on, on the device.

    The batches do not depend on the number of workers, nor on what was read before. `report` is told of samples that
    were replaced, when the batch with them is given out.
    """
    positions = batching.micro_batches(position, steps)
    micro_batches = _ahead(_read(stream, positions, batching.micro_batch, workers), device)
    for _ in range(steps):
        step = []
        for _ in range(batching.accumulation):
            inputs, labels, bad = next(micro_batches)
            report(bad)
            step.append((inputs, labels))
        yield step


def validation_batches(
    dataset: ImageDataset | CodeDataset,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device,
    limit: int | None = None,
    report: Report = lambda bad: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sample once over all ranks: rank r takes samples r, r + world_size, ...

    Those of one shape come together. Samples that can't be used are left out, and `report` is told.
    """
    alike = by_shape(dataset, range(len(dataset))[:limit][rank::world_size])
    batches = [numbers[i : i + batch_size] for numbers in alike for i in range(0, len(numbers), batch_size)]
    for inputs, labels, bad in _ahead(_read(dataset, batches, batch_size, workers), device):
        report(bad)
        if len(inputs):
            yield inputs, labels


def by_shape(dataset, numbers: Sequence[int]) -> list[list[int]]:
    """The numbers in groups of one shape each, in their order."""
    shape_of = getattr(dataset, "shape_of", lambda number: None)
    groups: dict[tuple | None, list[int]] = {}
    for number in numbers:
        groups.setdefault(shape_of(number), []).append(number)
    return [*groups.values()]


class _Source(Dataset):
    """The batches of a data set for lists of numbers, with images in memory that all processes share.

    Passing every batch in memory of its own, as DataLoader does by itself, costs as much as a tenth of the decoding.
    A worker has `SLOTS` places for batches and uses them in turn; when it comes to one again, the batch that was there
    has been copied out (see `_read`), as a worker is never asked for more than `PREFETCH` batches ahead.
    """

    def __init__(self, dataset, batch_size: int, workers: int):
        self.dataset, self.taken = dataset, 0
        self.shape = getattr(dataset, "sample_shape", None)
        self.slots = None
        if self.shape is not None and workers:
            shape = (workers * SLOTS, batch_size * math.prod(self.shape))
            # Anonymous, so that a container's small /dev/shm does not matter; its pages are made now, not one by one.
            flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
            self.slots = np.frombuffer(mmap.mmap(-1, math.prod(shape), flags=flags), np.uint8).reshape(shape)

    def __getitem__(self, numbers: Sequence[int]) -> tuple[Tensor | tuple, Tensor | list[int], list[BadSample]]:
        worker = torch.utils.data.get_worker_info()
        if self.slots is None or worker is None:
            return self.dataset.batch(numbers)
        slot = worker.id * SLOTS + self.taken % SLOTS
        self.taken += 1
        shape = self.dataset.shape_of(numbers[0])
        return (slot, shape), *self.dataset.fill(numbers, self._images(slot, shape, len(numbers)))

    def _images(self, slot: int, shape: Sequence[int], count: int) -> np.ndarray:
        """The first images [count, H, W, 3] of a slot."""
        return self.slots[slot, : count * math.prod(shape)].reshape(count, *shape)

    def copy_out(self, slot: int, shape: Sequence[int], labels: list[int]) -> tuple[Tensor, Tensor]:
        """(images uint8 [B, 3, H, W], labels [B]) of a batch that a worker has put into a slot."""
        images = torch.from_numpy(self._images(slot, shape, len(labels)).copy())
        return images.permute(0, 3, 1, 2), torch.tensor(labels, dtype=torch.int64)


def _read(dataset, batches, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor, list[BadSample]]]:
    """(inputs, labels, bad samples) of every batch; a user's error in a worker comes without the worker's traceback."""
    source = _Source(dataset, batch_size, workers)
    loader = DataLoader(
        source,
        sampler=batches,
        batch_size=None,  # the data set makes whole batches
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_ignore_signals,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # a loader draws a number: not from the generator of the step's dropout
    )
    try:
        for inputs, labels, bad in loader:
            yield *((inputs, labels) if isinstance(inputs, Tensor) else source.copy_out(*inputs, labels)), bad
    except UserError as error:
        raise UserError(str(error).rsplit(f"{UserError.__name__}: ", 1)[-1].strip()) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that decodes images has died ({str(error).splitlines()[0]}); if memory ran out, take fewer "
            "workers; the same command goes on from what was saved"
        ) from error


def _ignore_signals(_worker: int) -> None:
    """What stops a run is meant for its main process, which still wants its batches; workers end when it does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _ahead(batches: Iterator[tuple], device: torch.device) -> Iterator[tuple]:
    """The batches on the device; on CUDA the next one is copied while the last is worked on."""
    if device.type != "cuda":
        yield from batches
        return
    copies, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    waiting = None
    for inputs, labels, bad in batches:
        with torch.cuda.stream(copies):
            coming = tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in (inputs, labels))
            arrived = copies.record_event()
        if waiting is not None:
            yield _handed_over(*waiting, current)
        waiting = coming, bad, arrived
    if waiting is not None:
        yield _handed_over(*waiting, current)


def _handed_over(tensors: tuple[Tensor, Tensor], bad, arrived: torch.cuda.Event, current: torch.cuda.Stream) -> tuple:
    current.wait_event(arrived)
    for tensor in tensors:
        tensor.record_stream(current)  # its memory is not given away while the step still reads it
    return *tensors, bad
