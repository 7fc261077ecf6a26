"""Rank, world size and the few collectives the project needs; everything works without a launcher."""

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from ibq.config import UserError
from ibq.meeting import Meeting, meet, number, own_gpu, place, telling_others

TIMEOUT = timedelta(minutes=30)
T = TypeVar("T")
_sharing = 1  # neighbouring ranks that work on the same samples


def setup(device: str = "auto", meeting: Meeting | None = None) -> torch.device:
    """Join the process group that the launcher's variables describe, if any; returns this rank's device.

    `device`: "auto" takes CUDA when there is one. NCCL for tensors on CUDA, gloo for those on the CPU. A task of `srun`
    needs no launcher: rank and rendezvous follow from Slurm's variables. `meeting`: where the ranks have met before.
    Errors: UserError, as of `own_device` and `meet`.
    """
    with telling_others():
        chosen = own_device(device)
    if not torch_dist.is_initialized() and (meeting := meeting or meet()) is not None:
        meeting.store.set_timeout(TIMEOUT)
        torch_dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            timeout=TIMEOUT,
            device_id=chosen if chosen.type == "cuda" else None,
            store=torch_dist.PrefixStore("group", meeting.store),
            rank=meeting.place.rank,
            world_size=meeting.place.ranks,
        )
    return chosen


def own_device(device: str) -> torch.device:
    """The device of this rank; UserError if its machine has fewer than ranks."""
    place()  # takes over what srun says
    own = own_gpu()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cuda":
        return torch.device(device)
    if own >= torch.cuda.device_count():
        raise UserError(
            f"device: process {own} of this machine finds {torch.cuda.device_count()} CUDA devices; "
            "start fewer processes, or set device=cpu"
        )
    torch.cuda.set_device(own)
    return torch.device(device, own)


def ensure_group() -> None:
    """A process group of one, for engines that want a group, where no launcher has made a larger one."""
    if not torch_dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1)


def shutdown() -> None:
    """Leave the process group, all ranks at a time: gloo has been seen to abort a process that left early."""
    if torch_dist.is_initialized():
        torch_dist.barrier()
        torch_dist.destroy_process_group()


def rank() -> int:
    """This process's number among all."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def local_world_size() -> int:
    """Number of this job's processes on this machine."""
    return number("LOCAL_WORLD_SIZE", "1")


def share_data(ranks: int) -> None:
    """Say that so many neighbouring ranks work on the same samples, each on a part of the model."""
    global _sharing
    _sharing = ranks


def data_rank() -> int:
    """The number of this rank's share of the data; ranks that work on the same samples have one."""
    return rank() // _sharing


def data_world_size() -> int:
    """Number of shares of the data."""
    return world_size() // _sharing


def is_main() -> bool:
    """Whether this process writes logs and checkpoints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if torch_dist.is_initialized():
        torch_dist.barrier()


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, tensor: Tensor) -> Tensor:
        return all_reduce_mean(tensor.clone())

    @staticmethod
    def backward(_ctx, gradient: Tensor) -> Tensor:
        # Data-parallel engines average the gradients over the ranks once more, which makes this exact: each
        # rank's loss depends on every rank's input, and the average counts each dependence once.
        return all_reduce_mean(gradient.clone())


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean over all ranks, with a gradient (for engines that average gradients over ranks)."""
    return _MeanOverRanks.apply(tensor) if world_size() > 1 else tensor


def statistics_reduction(statistics: str) -> Callable[[Tensor], Tensor] | None:
    """The reduction for batch statistics: None for "rank" (and for one process), the mean for "world"."""
    return mean_over_ranks if statistics == "world" and world_size() > 1 else None


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """In-place mean over all ranks, without a gradient."""
    if world_size() > 1:
        torch_dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """In-place sum over all ranks, without a gradient."""
    if world_size() > 1:
        torch_dist.all_reduce(tensor)
    return tensor


def sum_over_data(tensor: Tensor) -> Tensor:
    """In-place sum in which each share of the data counts once, without a gradient."""
    all_reduce_sum(tensor)
    return tensor.div_(_sharing) if _sharing > 1 else tensor


def all_gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks, in the order of the ranks; every rank has equally many."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    torch_dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def any_rank(flag: Tensor) -> bool:
    """Whether the boolean scalar is true on any rank; every rank gets the same answer."""
    value = flag.to(torch.float32)
    if world_size() > 1:
        torch_dist.all_reduce(value, op=torch_dist.ReduceOp.MAX)
    return bool(value.item())


def largest(value: int) -> int:
    """The largest of the ranks' numbers; by way of the CPU, so that nothing waits for an accelerator."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64)
    torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX)
    return int(tensor)


def with_all_ranks(items: Iterable[T]) -> Iterator[T | None]:
    """This rank's items, then None until every rank is through with its own.

    A network whose weights the ranks share is called by all of them, or they wait for ever.
    """
    iterator = iter(items)
    while largest(int((item := next(iterator, None)) is not None)):
        yield item


def gather_texts(text: str) -> list[str]:
    """Every rank's text, in the order of the ranks."""
    if world_size() == 1:
        return [text]
    data = text.encode()
    length = largest(len(data))
    own = torch.zeros(length + 8, dtype=torch.uint8)
    own[:8] = torch.tensor([len(data)]).view(torch.uint8)
    own[8 : 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else own[8:8]
    parts = [torch.empty_like(own) for _ in range(world_size())]
    torch_dist.all_gather(parts, own)
    return [bytes(part[8 : 8 + int(part[:8].view(torch.int64))].numpy()).decode() for part in parts]


def text_from_main(text: str) -> str:
    """Rank 0's text on every rank."""
    return gather_texts(text if is_main() else "")[0]


def from_main(tensor: Tensor) -> Tensor:
    """Rank 0's values of a tensor that every rank has in the same shape."""
    if world_size() > 1:
        torch_dist.broadcast(tensor, src=0)
    return tensor


def main_first(action: Callable[[], T]) -> T:
    """The action's result on every rank; rank 0 acts first, so that a download happens once.

    An error on rank 0 is raised there after the others have been let go on.
    """
    if not is_main():
        barrier()
    try:
        return action()
    finally:
        if is_main():
            barrier()


def on_main(action: Callable[[], T]) -> T:
    """Rank 0's result, which JSON can say, on every rank; an error of rank 0 ends all of them, and it alone says so."""
    result, problem = None, None
    if is_main():
        try:
            result = action()
        except Exception as caught:
            problem = caught
    result, failed = json.loads(text_from_main(json.dumps([result, problem is not None])))
    if problem is not None:
        raise problem
    if failed:
        raise SystemExit(2)
    return result
