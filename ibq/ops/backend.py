"""Which form of an operator runs: Triton kernels or plain PyTorch."""

import importlib.util
import os
import shutil
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ibq.config import UserError

Backend = Literal["auto", "torch", "triton"]
TRITON_DTYPES = (torch.float32, torch.bfloat16)


def use_triton(operand: Tensor, dtype: torch.dtype, backend: str) -> bool:
    """Whether an operator on `operand`, multiplied in `dtype`, runs as Triton kernels.

    `auto`: on CUDA, where Triton is installed. Raises ValueError for kernels that cannot be had.
    """
    match backend:
        case "torch":
            return False
        case "auto":
            return operand.is_cuda and dtype in TRITON_DTYPES and triton_is_installed()
        case "triton":
            if not triton_is_installed():
                raise ValueError("backend: triton is not installed; pip install triton, or use auto or torch")
            if dtype not in TRITON_DTYPES:
                raise ValueError(f"backend: triton takes float32 and bfloat16, not {dtype}; use auto or torch")
            return True
    raise ValueError(f"backend: {backend!r} is unknown; use auto, torch or triton")


# Looked for once, without importing it: PyTorch 2.11 cannot compile a function that looks.
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_is_installed() -> bool:
    """Whether the Triton kernels can be had."""
    return _TRITON_IS_INSTALLED


def image_format(device: torch.device | str) -> torch.memory_format:
    """How images and the weights of convolutions lie there: tensor cores want channels last, small ones on CPUs not."""
    return torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format


@cache
def own_stream(purpose: str, device: torch.device) -> torch.cuda.Stream:
    """The one stream of a CUDA device for a purpose: PyTorch would hand out the same few in turn."""
    return torch.cuda.Stream(device)


def cxx_is_installed() -> bool:
    """Whether there is a C++ compiler, as PyTorch and DeepSpeed look for one."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def missing_for_compile(device: str) -> str:
    """What torch.compile lacks on "cpu" or "cuda", and how to get it; nothing if all is there.

    On the CPU it writes C++; on CUDA it writes Triton kernels, and Triton a module in C that starts them.
    """
    if device != "cuda":
        return "" if cxx_is_installed() else "no C++ compiler was found; install g++"
    if not triton_is_installed():
        return "triton is not installed; pip install triton"
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return "" if any(map(shutil.which, names)) else "no C compiler was found; install gcc"


def require_compile(device: str, setting: str, otherwise: str) -> None:
    """UserError that names the setting and the remedy where torch.compile cannot run on "cpu" or "cuda"."""
    if missing := missing_for_compile(device):
        raise UserError(f"{setting}: {missing}, or {otherwise}")


def float32_products() -> str:
    """How Triton is to multiply float32: as PyTorch's own products on CUDA. Its default, tf32, is never left to it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
