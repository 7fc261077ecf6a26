"""Code shards: an image set as codes of a tokenizer, memory-mapped."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ibq.config import UserError

META_FILE, CODES_FILE, LABELS_FILE = "meta.json", "codes.npy", "labels.npy"


@dataclass(frozen=True, kw_only=True)
class CodeDataConfig:
    """Folders written by tools/encode_shards.py."""

    kind: Literal["codes"] = "codes"
    train: str
    validation: str | None = None
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
    """Write codes [N, T] and labels [N] as uint16 (uint32 above 65,536 codes) with their meta data."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if meta.num_codes <= 2**16 else np.uint32
    (folder / META_FILE).unlink(missing_ok=True)  # the meta data is written last: it says that the rest is whole
    np.save(folder / CODES_FILE, codes.astype(dtype))
    np.save(folder / LABELS_FILE, labels.astype(np.uint32))
    temporary = folder / (META_FILE + ".tmp")
    temporary.write_text(json.dumps(asdict(meta), indent=1))
    temporary.rename(folder / META_FILE)


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
        if len(self.codes) != len(self.labels) or self.codes.shape[1] != self.meta.tokens_per_side**2:
            raise UserError(f"codes in {str(folder)!r} do not fit their meta data; write them again")

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        number = key[0] if isinstance(key, tuple) else key
        return torch.from_numpy(self.codes[number].astype(np.int64)), int(self.labels[number])
