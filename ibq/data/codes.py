"""Code shards: an image set as codes of a tokenizer, memory-mapped.

A folder holds `codes-00000.npy` [rows, tokens] (uint16, or uint32 above 65,536 codes) and `labels-00000.npy` [rows],
any number of such pairs, and `meta.json`, written last: it says that the rest is whole, and which grid of codes the
images have. With several views per image all images come in the first view, then all in the second, and so on.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ibq.config import UserError, require_least
from ibq.data.order import Order, StreamOrder
from ibq.files import write_array, write_text

META_FILE = "meta.json"
CHECKED_AT_ONCE = 2**24  # values that are read into memory to be checked
CODE_WINDOW = 1_024  # rows are shuffled one by one anyway
CHECKED_WHEN_OPENED = 2**26  # larger sets are checked batch by batch


@dataclass(frozen=True, kw_only=True)
class CodeSourceConfig:
    """One of several sets of codes, such as those of one grid."""

    train: str
    validation: str
    weight: float = 1.0  # share of the steps, relative to the other sets'

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight: must be positive, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class CodeDataConfig:
    """Folders written by tools/encode_shards.py."""

    kind: Literal["codes"] = "codes"
    train: str | None = None  # a folder; give either this and `validation`, or `sources`
    validation: str | None = None  # required: figures on the training codes would look like validation
    sources: tuple[CodeSourceConfig, ...] = ()  # several folders, whose grids may differ: every step is of one of them
    tokenizer: str | None = None  # what the codes must have been made with: a run folder or .ckpt
    allow_other_tokenizer: bool = False  # train on codes of another tokenizer all the same
    workers: int = 0
    streams: int = 192  # the order is the same for every number of ranks that divides this

    def __post_init__(self):
        if (self.train is None) == (not self.sources):
            raise ValueError("train: give either `train` or `sources`")
        if (self.validation is None) == (not self.sources):
            missing = "required and missing (null); add the folder of the validation codes"
            raise ValueError(f"validation: {missing if self.train else 'each of sources has its own; set it to null'}")
        require_least(self, workers=0, streams=1)

    def places(self, part: Literal["train", "validation"]) -> dict[str, str]:
        """Key -> folder."""
        if not self.sources:
            return {f"data.{part}": getattr(self, part)}
        return {f"data.sources[{i}].{part}": getattr(source, part) for i, source in enumerate(self.sources)}


@dataclass(frozen=True, kw_only=True)
class CodesMeta:
    """What a folder of codes holds and which tokenizer made it."""

    num_codes: int
    grid: tuple[int, int]  # rows and columns of codes of an image
    classes: list[str]
    tokenizer: str  # SHA-256 of the weights of the tokenizer whose codes they are
    views: int = 1  # augmented views of each image, one row each
    rows: list[int] = field(default_factory=list)  # of each pair of files
    made_by: dict = field(default_factory=dict)  # settings of the encoder, for the record

    @property
    def num_tokens(self) -> int:
        """Codes of an image."""
        return math.prod(self.grid)


def read_codes_meta(folder: Path) -> CodesMeta:
    """The meta data of a folder; OSError, ValueError or TypeError where they are damaged."""
    found = {**json.loads((folder / META_FILE).read_text())}
    if "tokens_per_side" in found:  # of folders written when all pictures were squares
        found["grid"] = [found.pop("tokens_per_side")] * 2
    height, width = found.pop("grid", (None, None))
    return CodesMeta(**found, grid=(height, width))


def code_files(folder: Path, number: int) -> tuple[Path, Path]:
    """Files of codes and of labels."""
    return folder / f"codes-{number:05d}.npy", folder / f"labels-{number:05d}.npy"


def write_code_shard(folder: Path, number: int, codes: np.ndarray, labels: np.ndarray, meta: CodesMeta) -> None:
    """Write one pair of files: codes [rows, tokens] and labels [rows]; the labels last, which says that both are whole.

    ValueError if a code or a label is out of range: the cast would make another one of it.
    """
    _check_range("code", codes, meta.num_codes)
    _check_range("label", labels, len(meta.classes))
    codes_file, labels_file = code_files(folder, number)
    write_array(codes_file, codes.astype(np.uint16 if meta.num_codes <= 2**16 else np.uint32))
    write_array(labels_file, labels.astype(np.uint32))


def write_codes_meta(folder: Path, meta: CodesMeta) -> None:
    """Write the meta data, when everything else is whole."""
    write_text(folder / META_FILE, json.dumps(asdict(meta), indent=1))


def write_codes(folder: Path, codes: np.ndarray, labels: np.ndarray, meta: CodesMeta) -> None:
    """Write codes [N, T] and labels [N] as a folder with one pair of files."""
    _check_range("code", codes, meta.num_codes)
    _check_range("label", labels, len(meta.classes))
    (folder / META_FILE).unlink(missing_ok=True)
    write_code_shard(folder, 0, codes, labels, meta)
    write_codes_meta(folder, CodesMeta(**{**asdict(meta), "rows": [len(codes)]}))


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
    """(codes int64 [h, w], label) for a row; `codes` and `labels` give rows as arrays."""

    def __init__(self, folder: str | Path):
        self.folder = folder = Path(folder)
        if not (folder / META_FILE).exists():
            raise UserError(f"no codes in {str(folder)!r}: write them with tools/encode_shards.py")
        try:
            self.meta = read_codes_meta(folder)
            files = [code_files(folder, number) for number in range(len(self.meta.rows))]
            self._codes = [np.load(codes, mmap_mode="r", allow_pickle=False) for codes, _ in files]
            self._labels = np.concatenate([np.load(labels, allow_pickle=False) for _, labels in files])
            self._check()
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise UserError(f"codes in {str(folder)!r} cannot be read ({error}); write them again") from error
        self._ends = np.cumsum(self.meta.rows)

    def _check(self) -> None:
        tokens = self.meta.num_tokens
        expected = [(rows, tokens) for rows in self.meta.rows]
        if [part.shape for part in self._codes] != expected or len(self._labels) != sum(self.meta.rows):
            raise ValueError("they do not fit their meta data")
        _check_range("label", self._labels, len(self.meta.classes))
        if sum(self.meta.rows) * tokens <= CHECKED_WHEN_OPENED:
            for part in self._codes:
                _check_range("code", part, self.meta.num_codes)

    def __len__(self) -> int:
        return len(self._labels)

    def codes(self, rows: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """Codes [n, T] of some rows, as they are stored."""
        chosen = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        if len(self._codes) == 1:
            return self._codes[0][chosen]
        found = np.empty((len(chosen), self.meta.num_tokens), self._codes[0].dtype)
        parts = np.searchsorted(self._ends, chosen, side="right")
        for part in np.unique(parts).tolist():
            here = parts == part
            found[here] = self._codes[part][chosen[here] - (self._ends[part] - self.meta.rows[part])]
        return found

    def labels(self) -> np.ndarray:
        """The labels [N] of all rows."""
        return self._labels

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, list]:
        """(codes int64 [B, h, w], labels int64 [B], what had to be left out: nothing)."""
        codes = self.codes(rows)
        if codes.size and codes.max() >= self.meta.num_codes:
            raise UserError(
                f"codes in {str(self.folder)!r}: code {codes.max()} is not one of the {self.meta.num_codes:,} of the "
                "meta data; write them again"
            )
        codes = torch.from_numpy(codes.astype(np.int64)).unflatten(1, self.meta.grid)
        return codes, torch.from_numpy(self._labels[rows].astype(np.int64)), []

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        codes, labels, _ = self.batch([row])
        return codes[0], int(labels[0])

    def order(self, seed: int, streams: int, name: int = 0) -> StreamOrder:
        """The order in which training takes the rows; `name` tells several sets of one run apart."""
        return StreamOrder(
            np.ones(len(self), np.int64),
            seed=seed,
            streams=streams,
            window=CODE_WINDOW,
            name=name,
            identity={"rows": self.meta.rows},
        )


class CodeStream:
    """(codes int64 [B, h, w], labels [B], bad samples: none) for a list of positions of an order.

    Positions of one step, which all are of one set, see `BucketedOrder`.
    """

    def __init__(self, sets: Sequence[CodeDataset], order: Order):
        self.sets, self.order = list(sets), order

    def batch(self, positions: Sequence[int]) -> tuple[Tensor, Tensor, list]:
        """The rows that stand at these positions."""
        found = [self.order.locate(position) for position in positions]
        assert len({location.source for location in found}) == 1, "a batch has one grid"
        return self.sets[found[0].source].batch([location.number for location in found])
