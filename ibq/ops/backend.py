"""Which form of an operator runs: Triton kernels or plain PyTorch."""

import importlib.util
from functools import cache
from typing import Literal

import torch
from torch import Tensor

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


@cache
def triton_is_installed() -> bool:
    """Whether the Triton kernels can be had; looks without importing them."""
    return importlib.util.find_spec("triton") is not None


def float32_products() -> str:
    """How Triton is to multiply float32: as PyTorch's own products on CUDA. Its default, tf32, is never left to it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
