"""Writing safetensors files one tensor after the other: a file may be larger than the memory."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Layout = Mapping[str, tuple[torch.dtype, Sequence[int]]]


class TensorFile:
    """A safetensors file (https://github.com/huggingface/safetensors) that is written in the order of its layout.

    The layout comes first because the header does. `close` flushes the file to the disk, and tells its size and
    SHA-256, which were taken on the way.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None):
        self.path = path
        self._layout = iter(layout.items())
        self._digest, self._bytes = hashlib.sha256(), 0
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (close() or the garbage collector closes it)
        header = json.dumps(_header(layout, metadata)).encode()
        header += b" " * (-len(header) % 8)
        self._put(len(header).to_bytes(8, "little") + header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor of the layout; its elements count, in the order of the layout's shape."""
        expected, (dtype, shape) = next(self._layout)
        assert name == expected and tensor.numel() == math.prod(shape), (name, expected, tensor.shape, shape)
        data = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
        self._put(memoryview(data.numpy()))

    def close(self) -> tuple[int, str]:
        """(bytes, SHA-256) of the whole file, which is then on the disk."""
        assert next(self._layout, None) is None, f"{self.path}: not all tensors were written"
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        return self._bytes, self._digest.hexdigest()

    def _put(self, data) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None):
    """Write a file of tensors that are all there; (bytes, SHA-256)."""
    file = TensorFile(path, {name: (t.dtype, t.shape) for name, t in tensors.items()}, metadata)
    for name, tensor in tensors.items():
        file.write(name, tensor)
    return file.close()


def _header(layout: Layout, metadata: Mapping[str, str] | None) -> dict:
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    return header
