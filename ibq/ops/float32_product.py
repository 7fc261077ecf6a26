"""Products with one fixed matrix in float32: on tensor cores, which have none, as six products of bfloat16.

A float32 number is the sum of three of bfloat16, to its last bit. Of the nine products of such parts the three smallest
are below the rounding of float32 (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype
for higher-precision computations", 2019); the other six are one product of matrices six times as wide.
"""

import torch
from torch import Tensor

TENSOR_CORES = (8, 0)  # compute capability from which on they multiply bfloat16


class Float32Product:
    """x . matrix^T for matrix [K, D]; memory for the matrix's parts is three times its own."""

    def __init__(self, matrix: Tensor, *, split: bool | None = None):
        self._matrix = matrix
        self._split = _pays(matrix) if split is None else split
        if self._split:
            high, middle, low = _parts(matrix)
            self._matrix = torch.cat([high, middle, low, high, middle, high], dim=1)

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """The product [N, K] of x [N, D], written to `out`."""
        if not self._split:
            return torch.mm(x, self._matrix.t(), out=out)
        high, middle, low = _parts(x)
        x = torch.cat([high, high, high, middle, middle, low], dim=1)
        if x.is_cuda:
            return torch.mm(x, self._matrix.t(), out_dtype=torch.float32, out=out)
        return torch.mm(x.float(), self._matrix.float().t(), out=out)


def _pays(matrix: Tensor) -> bool:
    return matrix.is_cuda and torch.cuda.get_device_capability(matrix.device) >= TENSOR_CORES


def _parts(x: Tensor) -> list[Tensor]:
    """Three bfloat16 tensors whose sum is the float32 x."""
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return parts
