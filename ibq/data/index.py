"""What lies in a set of image shards: keys, byte offsets, labels and checksums, as arrays.

An index file stands beside its shard (`train-00000.tar` -> `train-00000.index.json`) and holds columns of equal length:

    {"format": 1, "shard": "train-00000.tar", "bytes": 61440, "sha256": "...", "samples": 2,
     "keys": ["a", "b"], "offsets": [512, 20480], "sizes": [18000, 17000], "labels": [3, null],
     "crc32": [123, 456], "problems": {"1": "no label (b.cls)"}}

`sha256` and `crc32` (of the image files) are null in an index that was made in passing, without reading the images.
A sample that can't be used keeps its place, with the reason: the order of all the others does not depend on it.
"""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ibq.config import UserError
from ibq.files import write_text

FORMAT = 1
INDEX_SUFFIX = ".index.json"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
NO_LABEL, NO_CHECKSUM = -1, -1
LABEL_PROBLEM = "the label"  # how such problems begin: they do not matter to a set that is read without labels
END_OF_TAR = 1024  # two blocks of zeros close a tar file


class ImageEntry(NamedTuple):
    """Where one image's bytes lie."""

    shard: str  # tar file, URL of one, or an image file of its own
    offset: int  # into the shard; 0 for a file of its own
    size: int
    label: int
    crc32: int  # of the image file; NO_CHECKSUM if unknown
    problem: str | None  # why it can't be used


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The samples of one shard, in the order in which they lie there."""

    name: str  # the shard's file name, without its folder
    bytes: int
    sha256: str | None
    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    crc32: list[int]
    problems: dict[int, str] = field(default_factory=dict)  # sample -> why it can't be used

    def to_json(self) -> str:
        """The text of an index file."""
        rows = {
            "format": FORMAT,
            "shard": self.name,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "samples": len(self.keys),
            "keys": self.keys,
            "offsets": self.offsets,
            "sizes": self.sizes,
            "labels": [None if label == NO_LABEL else label for label in self.labels],
            "crc32": [None if value == NO_CHECKSUM else value for value in self.crc32],
            "problems": {str(number): reason for number, reason in self.problems.items()},
        }
        return "{" + ",\n ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in rows.items()) + "}\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> "ShardIndex":
        """Read an index file; `source` names it in the UserError for one that is damaged."""
        try:
            rows = json.loads(text)
            if rows["format"] != FORMAT:
                raise ValueError(f"format {rows['format']}, not {FORMAT}")
            index = cls(
                name=str(rows["shard"]),
                bytes=int(rows["bytes"]),
                sha256=rows["sha256"],
                keys=[str(key) for key in rows["keys"]],
                offsets=[int(value) for value in rows["offsets"]],
                sizes=[int(value) for value in rows["sizes"]],
                labels=[NO_LABEL if label is None else int(label) for label in rows["labels"]],
                crc32=[NO_CHECKSUM if value is None else int(value) for value in rows["crc32"]],
                problems={int(number): str(reason) for number, reason in rows["problems"].items()},
            )
            columns = index.keys, index.offsets, index.sizes, index.labels, index.crc32
            if {len(column) for column in columns} - {int(rows["samples"])}:
                raise ValueError("its columns differ in length")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) or type(error).__name__
            raise UserError(
                f"{source}: not an index of a shard ({reason}); remove it or index the shard again"
            ) from error
        return index

    def cut_off(self, size: int) -> "ShardIndex":
        """The same samples in a shard that now ends at byte `size`: what lies behind can't be used."""
        lost = {
            number: f"the shard is cut off at byte {size:,}"
            for number, (offset, length) in enumerate(zip(self.offsets, self.sizes, strict=True))
            if offset + length > size
        }
        return ShardIndex(**{**vars(self), "problems": lost | self.problems})


def index_file(shard: str) -> str:
    """Path or URL of a shard's index file."""
    return shard.removesuffix(".tar") + INDEX_SUFFIX


def read_shard_index(path: Path) -> ShardIndex:
    """The samples of a local shard: from its index file, or else by reading the shard.

    An index file that no longer fits is passed over; that of a shard which has been cut off since still tells what
    was lost. A shard that can't be read counts as one sample that can't be used.
    """
    beside = Path(index_file(str(path)))
    if beside.is_file():
        index = ShardIndex.from_json(beside.read_bytes(), str(beside))
        size = path.stat().st_size
        if index.bytes == size and _still_fits(path, index):
            return index
        if size < index.bytes and not _is_closed(path, size):
            return index.cut_off(size)
    try:
        return index_shard(path, checksums=False)
    except UserError as error:
        return ShardIndex(
            name=path.name,
            bytes=path.stat().st_size if path.exists() else 0,
            sha256=None,
            keys=["(all)"],
            offsets=[0],
            sizes=[0],
            labels=[NO_LABEL],
            crc32=[NO_CHECKSUM],
            problems={0: str(error)},
        )


def _still_fits(path: Path, index: ShardIndex, probes: int = 5) -> bool:
    """Whether most of some samples' headers stand where the index says: not in a shard that was written anew."""
    samples = [number for number, size in enumerate(index.sizes) if size]
    chosen = samples[:: max(1, len(samples) // probes)]
    with open(path, "rb") as file:
        fit = 0
        for number in chosen:
            file.seek(index.offsets[number] - 512)
            header = file.read(512)
            fit += header[257:262] == b"ustar" and header[124:135].strip(b"\0 ") == b"%011o" % index.sizes[number]
    return 2 * fit >= len(chosen)


def _is_closed(path: Path, size: int) -> bool:
    """Whether a tar file ends as it should."""
    with open(path, "rb") as file:
        file.seek(max(0, size - END_OF_TAR))
        tail = file.read()
    return len(tail) == END_OF_TAR and not any(tail)


def write_shard_index(path: Path) -> ShardIndex:
    """Index a local shard with checksums and write the index file beside it."""
    index = index_shard(path, checksums=True)
    write_text(Path(index_file(str(path))), index.to_json())
    return index


def index_shard(path: Path, *, checksums: bool) -> ShardIndex:
    """Index a tar file; UserError if it is none.

    Pictures and labels (`KEY.cls`, a whole number) belong together by the member's name up to the first dot of its last
    part, as in webdataset. Other members are passed over, unread.
    """
    try:
        walk = _Walk(path, checksums)
        walk.run()
    except (tarfile.TarError, OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read shard {path}: {error}; write it again or leave it out") from error
    return walk.result()


class _Walk:
    """One pass over the members of a tar file."""

    def __init__(self, path: Path, checksums: bool):
        self.path, self.checksums = path, checksums
        self.size = path.stat().st_size
        self.images: dict[str, tuple[int, int, int]] = {}  # key -> offset, size, CRC
        self.labels: dict[str, str] = {}
        self.order: dict[str, None] = {}  # keys as they come
        self.problems: dict[str, str] = {}

    def run(self) -> None:
        with open(self.path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                for member in tar:
                    if member.isfile():
                        self._take(tar, member)
                    tar.members = []  # or the whole list would stay in memory
            except tarfile.ReadError:  # cut off in the middle of a member
                if not self.order:
                    raise
            self._check_end(file, tar.offset)

    def _take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        folder, slash, name = member.name.rpartition("/")  # folders may have dots, as in ./0001.png
        name, dot, suffix = name.partition(".")
        key = (folder + slash + name).replace("\n", " ")
        if f".{suffix.lower()}" in IMAGE_SUFFIXES:
            crc = NO_CHECKSUM
            if member.offset_data + member.size > self.size:
                self.problems[key] = f"the shard is cut off at byte {self.size:,}"
            elif self.checksums:
                crc = zlib.crc32(tar.extractfile(member).read())
            self.images[key] = member.offset_data, member.size, crc
            self.order[key] = None
        elif dot and suffix == "cls":
            self.order[key] = None
            data = tar.extractfile(member).read(64)
            self.labels[key] = data.decode("utf-8", "replace").strip()

    def _check_end(self, file, offset: int) -> None:
        """A tar file ends with zeros; one that does not has lost its end."""
        file.seek(min(offset, self.size))
        rest = file.read(512)
        if len(rest) == 512 and not any(rest):
            return
        if offset == self.size:  # between two members: whether something is missing cannot be told
            return
        cut = offset + 512 > self.size
        last = next(reversed(self.order), "(end)")
        if last in self.problems:
            return
        if not cut or (last in self.images and last in self.labels):
            last = "(end)"  # a sample of which nothing is left
        self.order[last] = None
        self.problems[last] = f"the shard is {'cut off' if cut else 'damaged'} at byte {min(offset, self.size):,}"

    def result(self) -> ShardIndex:
        keys = list(self.order)
        problems = {}
        labels = []
        for number, key in enumerate(keys):
            label, problem = self._label(key)
            problem = self.problems.get(key) or (None if key in self.images else "no picture") or problem
            labels.append(label)
            if problem:
                problems[number] = problem
        images = [self.images.get(key, (0, 0, NO_CHECKSUM)) for key in keys]
        return ShardIndex(
            name=self.path.name,
            bytes=self.size,
            sha256=sha256_of(self.path) if self.checksums else None,
            keys=keys,
            offsets=[offset for offset, _, _ in images],
            sizes=[size for _, size, _ in images],
            labels=labels,
            crc32=[crc for _, _, crc in images],
            problems=problems,
        )

    def _label(self, key: str) -> tuple[int, str | None]:
        text = self.labels.get(key)
        if text is None:
            return NO_LABEL, None  # whether that is a problem depends on who reads the set
        try:
            label = int(text)
        except ValueError:
            return NO_LABEL, f"{LABEL_PROBLEM} {text[:20]!r} ({key}.cls) is no whole number"
        if not 0 <= label < 2**31 - 1:
            return NO_LABEL, f"{LABEL_PROBLEM} {label} ({key}.cls) is out of range"
        return label, None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ImageIndex:
    """The images of a whole set: shards one after the other, and the class names.

    Columns are arrays, so that worker processes share them; `index[i]` is the i-th image.
    """

    def __init__(self, shards: Sequence[tuple[str, ShardIndex]], classes: Sequence[str], *, labelled: bool = True):
        indexes = [index for _, index in shards]
        counts = [len(index.keys) for index in indexes]
        self.shards = [path for path, _ in shards]
        self.classes = list(classes)
        self.checks = {path: (index.bytes, index.sha256) for path, index in shards}
        self.shard = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        self.place = np.concatenate([np.arange(n, dtype=np.int32) for n in counts] or [np.zeros(0, np.int32)])
        self.offset = _column(indexes, "offsets", np.int64)
        self.size = _column(indexes, "sizes", np.int64)
        self.label = _column(indexes, "labels", np.int32)
        self.crc32 = _column(indexes, "crc32", np.int64)
        self._keys = ["\n".join(index.keys) for index in indexes]  # one object a shard: forks share it
        self._problems = {
            _id(shard, place): reason for shard, index in enumerate(indexes) for place, reason in index.problems.items()
        }
        self._check_labels(labelled)

    @classmethod
    def of_files(cls, folder: Path, files: Sequence[tuple[Path, int]], classes: Sequence[str]) -> "ImageIndex":
        """The image files of a folder, (path, label) each: every file is a shard of its own."""
        index, count = cls([], classes), len(files)
        index.shards = [str(path) for path, _ in files]
        index.shard = np.arange(count, dtype=np.int32)
        index.place = np.zeros(count, np.int32)
        index.offset = np.zeros(count, np.int64)
        index.size = np.fromiter((path.stat().st_size for path, _ in files), np.int64, count)
        index.label = np.fromiter((label for _, label in files), np.int32, count)
        index.crc32 = np.full(count, NO_CHECKSUM, np.int64)
        index._keys = [str(path.relative_to(folder)) for path, _ in files]
        return index

    def _check_labels(self, labelled: bool) -> None:
        if not labelled:
            self.label[self.label == NO_LABEL] = 0
            self._problems = {at: why for at, why in self._problems.items() if not why.startswith(LABEL_PROBLEM)}
            return
        ids = self._ids()
        for number in np.flatnonzero((self.label == NO_LABEL) | (self.label >= len(self.classes))).tolist():
            at = int(ids[number])
            if at not in self._problems:
                label, key = int(self.label[number]), self.key(number)
                missing = f"no label ({key}.cls)"
                known = f"there are {len(self.classes)} classes (classes.json)"
                beyond = f"{LABEL_PROBLEM} {label} ({key}.cls) is out of range: {known}"
                self._problems[at] = missing if label == NO_LABEL else beyond

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, number: int) -> ImageEntry:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard, place = int(self.shard[number]), int(self.place[number])
        return ImageEntry(
            shard=self.shards[shard],
            offset=int(self.offset[number]),
            size=int(self.size[number]),
            label=int(self.label[number]),
            crc32=int(self.crc32[number]),
            problem=self._problems.get(_id(shard, place)),
        )

    def __iter__(self) -> Iterator[ImageEntry]:
        return (self[number] for number in range(len(self)))

    def key(self, number: int) -> str:
        """The name of an image in its shard."""
        return self._keys[self.shard[number]].split("\n", int(self.place[number]) + 1)[self.place[number]]

    def problems(self) -> list[tuple[int, str]]:
        """(number, reason) of the images that can't be used, as far as the index tells."""
        ids = self._ids()
        flagged = np.flatnonzero(np.isin(ids, np.fromiter(self._problems, np.int64, len(self._problems))))
        return [(int(number), self._problems[int(ids[number])]) for number in flagged]

    def _ids(self) -> np.ndarray:
        return _id(self.shard.astype(np.int64), self.place)

    def unit_sizes(self) -> np.ndarray:
        """How many images stand together in each shard: what is shuffled as a whole."""
        if not len(self):
            return np.zeros(0, np.int64)
        starts = np.flatnonzero(np.diff(self.shard, prepend=-1))
        return np.diff(starts, append=len(self)).astype(np.int64)

    def subset(self, numbers: Sequence[int]) -> "ImageIndex":
        """The same set with only some of its images."""
        part = object.__new__(ImageIndex)
        part.__dict__.update(self.__dict__)
        chosen = np.asarray(numbers, dtype=np.int64)
        for name in ("shard", "place", "offset", "size", "label", "crc32"):
            setattr(part, name, getattr(self, name)[chosen])
        return part

    def fingerprint(self) -> str:
        """A hash of what the set holds: it stays when the files move elsewhere."""
        digest = hashlib.sha256()
        for shard in np.unique(self.shard).tolist():
            digest.update(f"{Path(self.shards[shard]).name}\0{self._keys[shard]}\0".encode())
        for column in (self.shard, self.place, self.size, self.label):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]


def _id(shard, place):
    """One number for a place in a shard."""
    return shard << 32 | place


def _column(indexes: Sequence[ShardIndex], name: str, dtype) -> np.ndarray:
    parts = [np.asarray(getattr(index, name), dtype=dtype) for index in indexes]
    return np.concatenate(parts or [np.zeros(0, dtype)])
