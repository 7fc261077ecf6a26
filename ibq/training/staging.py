"""Memory of the CPU for a copy of what the next steps change, to which a GPU copies at full speed."""

import threading
from pathlib import Path

import torch
from torch import Tensor

from ibq.progress import say


class Staging:
    """One block of float32 elements, pinned where a GPU copies to it, which takes seconds: `prepare` begins early.

    On a CPU it is given back after each use, on a GPU it is kept.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._flat: Tensor | None = None
        self._thread: threading.Thread | None = None

    def prepare(self, numel: int) -> None:
        """Begin to take so many elements, beside the steps."""
        if self.device.type == "cuda":
            self._thread = threading.Thread(target=self._allocate, args=(numel,), name="staging", daemon=True)
            self._thread.start()

    def take(self, numel: int) -> Tensor:
        """So many elements [numel], whose content means nothing; what was taken before is used again."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._flat is None or self._flat.numel() < numel:
            self._allocate(numel)
        return self._flat[:numel]

    def give_back(self) -> None:
        """What was taken is not needed any more."""
        if self.device.type != "cuda":
            self._flat = None

    def _allocate(self, numel: int) -> None:
        flat = torch.empty(numel)
        if self.device.type == "cuda":
            # Not `pin_memory`, which rounds up to a power of two.
            runtime = torch.cuda.cudart()
            with torch.cuda.device(self.device):
                if self._flat is not None:
                    runtime.cudaHostUnregister(self._flat.data_ptr())
                if failed := int(runtime.cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)):
                    say(f"note: memory for checkpoints can't be pinned (CUDA error {failed}): copies take longer")
        self._flat = flat


def available_bytes() -> float:
    """Memory that this machine could give, without swapping; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return min(free, _left_of_group())
    except (OSError, StopIteration):
        return float("inf")


def _left_of_group() -> float:
    """What the limit of this process's control group leaves, as Slurm and containers set it."""
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()[-1].rpartition("::")[2]
        group = Path(f"/sys/fs/cgroup/{own}")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return float("inf") if limit == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return float("inf")
