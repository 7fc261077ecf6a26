"""Batches for training and validation, on the device."""

import signal
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ibq.config import UserError
from ibq.data.images import BadSample, ImageDataset
from ibq.data.order import BatchPlan

Report = Callable[[Sequence[BadSample]], None]


class MicroBatchSampler:
    """The positions of a rank's micro-batches for so many steps, in the form that DataLoader takes."""

    def __init__(self, plan: BatchPlan, position: int, steps: int):
        self.plan, self.position, self.steps = plan, position, steps

    def __iter__(self) -> Iterator[list[int]]:
        return self.plan.micro_batches(self.position, self.steps)


def training_batches(
    stream: Dataset,
    plan: BatchPlan,
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
    loader = _loader(stream, MicroBatchSampler(plan, position, steps), workers, device)
    micro_batches = _ahead(_read(loader), device)
    for _ in range(steps):
        step = []
        for _ in range(plan.accumulation):
            inputs, labels, bad = next(micro_batches)
            report(bad)
            step.append((inputs, labels))
        yield step


class _Batches(Dataset):
    """The batches of lists of sample numbers."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, list[BadSample]]:
        return self.dataset.batch(numbers)


def validation_batches(
    dataset: ImageDataset,
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

    `dataset` has `__len__` and `batch(numbers)`. Samples that can't be used are left out, and `report` is told.
    """
    numbers = range(len(dataset))[:limit][rank::world_size]
    batches = [list(numbers[i : i + batch_size]) for i in range(0, len(numbers), batch_size)]
    for inputs, labels, bad in _ahead(_read(_loader(_Batches(dataset), batches, workers, device)), device):
        report(bad)
        if len(inputs):
            yield inputs, labels


def _loader(dataset: Dataset, batches, workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        dataset,
        sampler=batches,
        batch_size=None,  # the data set makes whole batches
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # a loader draws a number: not from the generator of the step's dropout
    )


def _ignore_signals(_worker: int) -> None:
    """What stops a run is meant for its main process, which still wants its batches; workers end when it does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _read(loader: DataLoader) -> Iterator[tuple]:
    """The loader's batches; a user's error in a worker comes without the worker's traceback."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).rsplit(f"{UserError.__name__}: ", 1)[-1].strip()) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that decodes images has died ({str(error).splitlines()[0]}); if memory ran out, lower "
            "data.workers; the run goes on from its last checkpoint when it is started again"
        ) from error


def _ahead(batches: Iterator[tuple], device: torch.device) -> Iterator[tuple]:
    """The batches on the device; on CUDA the next one is copied while the last is worked on."""
    if device.type != "cuda":
        yield from batches
        return
    copies, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    waiting = None
    for inputs, labels, bad in batches:
        with torch.cuda.stream(copies):
            coming = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
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
