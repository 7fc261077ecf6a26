"""Code shards: an image set as codes of a tokenizer, memory-mapped."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ibq.config import UserError
from ibq.files import write_text

META_FILE, CODES_FILE, LABELS_FILE = "meta.json", "codes.npy", "labels.npy"
CHECKED_AT_ONCE = 2**24  # values that are read into memory to be checked


@dataclass(frozen=True, kw_only=True)
class CodeDataConfig:
    """Folders written by tools/encode_shards.py."""

    kind: Literal["codes"] = "codes"
    train: str
    validation: str  # required: figures on the training codes would look like validation
    workers: int = 0

    def __post_init__(self):
        if self.workers < 0:
            raise ValueError(f"workers: must not be negative, got {self.workers}")


@dataclass(frozen=True, kw_only=True)
class CodesMeta:
    """What a folder of codes holds and which tokenizer made it."""

    num_codes: int
    tokens_per_side: int
    classes: list[str]
    tokenizer: str  # SHA-256 of the tokenizer's weights
    views: int = 1  # augmented views of each image, one row each


def write_codes(folder: Path, codes: np.ndarray, labels: np.ndarray, meta: CodesMeta) -> None:
    """Write codes [N, T] and labels [N] as uint16 (uint32 above 65,536 codes) with their meta data.

    ValueError if a code or a label is out of range: the cast would make another one of it.
    """
    _check_range("code", codes, meta.num_codes)
    _check_range("label", labels, len(meta.classes))
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if meta.num_codes <= 2**16 else np.uint32
    (folder / META_FILE).unlink(missing_ok=True)  # the meta data is written last: it says that the rest is whole
    np.save(folder / CODES_FILE, codes.astype(dtype))
    np.save(folder / LABELS_FILE, labels.astype(np.uint32))
    write_text(folder / META_FILE, json.dumps(asdict(meta), indent=1))


def _check_range(what: str, values: np.ndarray, limit: int) -> None:
    """ValueError unless all values are whole and lie in [0, limit); read in parts, for they may be a memory map."""
    if values.dtype.kind not in "iu":
        raise ValueError(f"{what}s must be whole numbers, got {values.dtype}")
    if values.dtype.kind == "u" and np.iinfo(values.dtype).max < limit:
        return
    rows = max(1, CHECKED_AT_ONCE // max(1, math.prod(values.shape[1:])))
    for start in range(0, len(values), rows):
        part = values[start : start + rows]
        lowest, highest = part.min(), part.max()
        if lowest < 0 or highest >= limit:
            raise ValueError(f"{what} {lowest if lowest < 0 else highest} is not one of the {limit:,} of the meta data")


class CodeDataset(torch.utils.data.Dataset):
    """(codes int64 [T], label) for a sample number or a (number, epoch) pair."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / META_FILE).exists():
            raise UserError(f"no codes in {str(folder)!r}: write them with tools/encode_shards.py")
        try:
            self.meta = CodesMeta(**json.loads((folder / META_FILE).read_text()))
            self.codes = np.load(folder / CODES_FILE, mmap_mode="r", allow_pickle=False)
            self.labels = np.load(folder / LABELS_FILE, allow_pickle=False)
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise UserError(f"codes in {str(folder)!r} cannot be read ({error}); write them again") from error
        if self.codes.shape != (len(self.labels), self.meta.tokens_per_side**2):
            raise UserError(f"codes in {str(folder)!r} do not fit their meta data; write them again")
        try:
            _check_range("code", self.codes, self.meta.num_codes)
            _check_range("label", self.labels, len(self.meta.classes))
        except ValueError as error:
            raise UserError(f"codes in {str(folder)!r} do not fit ({error}); write them again") from error

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        number = key[0] if isinstance(key, tuple) else key
        return torch.from_numpy(self.codes[number].astype(np.int64)), int(self.labels[number])
