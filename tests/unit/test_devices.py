"""Which GPU is a rank's."""

import pytest
import torch

from ibq import dist
from ibq.config import UserError


@pytest.fixture
def gpus(monkeypatch):
    """So many are seen, by a stand-in: Slurm's ways of showing them can't be had without GPUs."""
    chosen = []

    def see(count: int, local_rank: int, **environment: str) -> torch.device:
        for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"LOCAL_RANK": str(local_rank), **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        device = dist.own_device("cuda")
        assert chosen.pop() == device.index
        return device

    return see


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_GPUS_PER_TASK": "1"},
        {"SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=1"},
        {"SLURM_GPU_BIND": "per_task:1"},
        {"SLURM_GPU_BIND": "single:1", "CUDA_VISIBLE_DEVICES": "MIG-GPU-5c89f4d3/1/0"},
    ],
    ids=str,
)
def test_a_task_that_sees_its_own_gpu_alone(gpus, environment):
    assert gpus(1, 3, **environment).index == 0


def test_tasks_that_see_all_gpus(gpus):
    assert gpus(8, 3).index == 3
    assert gpus(8, 3, SLURM_GPUS_PER_TASK="1").index == 3


def test_more_processes_than_gpus(gpus):
    with pytest.raises(UserError, match="process 1 of this machine finds 1 CUDA devices; start fewer"):
        gpus(1, 1)
