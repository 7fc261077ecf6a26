"""Safetensors files that may be larger than the memory: written one tensor after the other, and read in parts."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
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
TYPES = {name: dtype for dtype, name in DTYPES.items()}
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


class StoredTensors:
    """The tensors of such a file, of which elements are read from the disk when they are asked for.

    There is no mapping: all of its pages that were read so far would count as this process's memory. SafetensorError
    for what is not a safetensors file.
    """

    def __init__(self, path: Path):
        with safe_open(path, "pt"):
            pass  # the header is whole, and fits the file
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._entries = json.loads(file.read(length))
        self._path, self._begin = path, 8 + length

    def elements(self, name: str, first: int, end: int) -> Tensor:
        """Elements [first, end) of a tensor, flat; OSError if they are not there."""
        if name not in self._entries:
            raise OSError(f"{self._path.name} holds no {name}")
        start, stop = self._entries[name]["data_offsets"]
        values = torch.empty(end - first, dtype=TYPES[self._entries[name]["dtype"]])
        place = start + first * values.itemsize
        with open(self._path, "rb") as file:
            file.seek(self._begin + place)
            if place + values.nbytes > stop or file.readinto(values.view(torch.uint8).numpy()) < values.nbytes:
                raise OSError(f"{self._path.name} does not hold all of {name}")
        return values


def _header(layout: Layout, metadata: Mapping[str, str] | None) -> dict:
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    return header
