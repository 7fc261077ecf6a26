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
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ibq.config import UserError
from ibq.files import write_text

FORMAT = 1
INDEX_SUFFIX = ".index.json"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp"}
# Pictures of other kinds, which are counted and named.
OTHER_PICTURES = {".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".ppm", ".jxl"}
NO_LABEL, NO_CHECKSUM = -1, -1
LABEL_PROBLEM = "the label"  # how such problems begin: they do not matter to a set that is read without labels
# First bytes, name and command of what tar files are compressed by.
COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"\xfd7zXZ\x00", "xz", "unxz"),
)
WEBDATASET_OWN = re.compile(r"__[^/]*__(/|$)")  # names of what webdataset keeps for itself, and passes over
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
    """Index a tar file, or several one after the other; UserError if it is none.

    Pictures and labels (`KEY.cls`, a whole number) belong together by the member's name up to the first dot of its last
    part, as in webdataset. A key that comes again later in the shard is another sample. Links are followed within the
    shard, to the nearest member of that name before them, or else behind. Other members are passed over, unread.
    """
    try:
        walk = _Walk(path, checksums)
        walk.run()
    except (tarfile.TarError, OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read shard {path}: {error}; write it again or leave it out") from error
    return walk.result()


@dataclass(kw_only=True, slots=True, eq=False)
class _Member:
    """A picture or label in a tar file, or what looks like one."""

    key: str
    field: str  # what follows the key, in small letters
    name: str
    offset: int = 0
    size: int = 0
    crc32: int = NO_CHECKSUM
    text: str = ""  # of a label
    run: int = 0  # members of one key side by side have the same
    link: str | None = None  # the name of the member that it stands for
    target: "_Member | None" = None  # that member, once it is found
    problem: str | None = None

    @property
    def is_image(self) -> bool:
        return f".{self.field}" in IMAGE_SUFFIXES

    @property
    def is_label(self) -> bool:
        return self.field == "cls"


class _Walk:
    """One pass over the members of a tar file."""

    def __init__(self, path: Path, checksums: bool):
        self.path, self.checksums = path, checksums
        self.size = path.stat().st_size
        self.members: list[_Member] = []  # pictures and labels, in order
        self.places: dict[str, _Member] = {}  # everything that a link may name, the latest of each name
        self.waiting: dict[str, list[_Member]] = {}  # links to what has not come yet
        self.key, self.run_number = None, 0  # of the last member
        self.end: str | None = None  # what is wrong at the end

    def run(self) -> None:
        with open(self.path, "rb") as file:
            check_not_compressed(self.path, file.read(8))
            start: int | None = 0
            while start is not None:
                start = self._archive(file, start)
            for member in self.members:
                self._follow(file, member)
                if member.is_label and not member.problem:
                    file.seek(member.offset)
                    member.text = file.read(min(member.size, 64)).decode("utf-8", "replace").strip()

    def _archive(self, file: BinaryIO, start: int) -> int | None:
        """Read the archive that begins at `start`; where the next one does, as of `cat a.tar b.tar`."""
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                for member in tar:
                    self._take(tar, member)
                    tar.members = []  # or the whole list would stay in memory
            except tarfile.ReadError:  # cut off in the middle of a member
                if not self.members:
                    raise
            return self._check_end(file, tar.offset)

    def _take(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        folder, slash, name = info.name.rpartition("/")  # folders may have dots, as in ./0001.png
        if name.startswith(".") or WEBDATASET_OWN.match(info.name):  # a Mac's ._1.jpg is no picture
            return
        name, _, suffix = name.partition(".")
        key, name = (folder + slash + name).replace("\n", " "), posixpath.normpath(info.name)
        member = _Member(key=key, field=suffix.lower(), name=name, offset=info.offset_data, size=info.size)
        if info.islnk() or info.issym():
            target = info.linkname if info.islnk() else posixpath.join(folder, info.linkname)
            self._link(member, posixpath.normpath(target))
        elif not info.isfile():
            return
        elif info.issparse():
            member.problem = "a sparse file, which can't be read in place: write the shard without --sparse"
        elif info.offset_data + info.size > self.size:
            member.problem = f"the shard is cut off at byte {self.size:,}"
        elif self.checksums and member.is_image:
            member.crc32 = zlib.crc32(tar.extractfile(info).read())
        for link in self.waiting.pop(name, ()):
            link.target = member
        self.places[name] = member
        if suffix:
            self.run_number += key != self.key
            self.key, member.run = key, self.run_number
        if member.is_label or f".{member.field.rpartition('.')[2]}" in IMAGE_SUFFIXES | OTHER_PICTURES:
            self.members.append(member)

    def _link(self, member: _Member, name: str) -> None:
        """Tie a link to the nearest member of a name: a name may come again, above all where archives follow."""
        member.link, member.target = name, self.places.get(name)
        if member.target is None:
            self.waiting.setdefault(name, []).append(member)

    def _follow(self, file: BinaryIO, member: _Member) -> None:
        """Take a link's place from what it names."""
        target, seen = member, set()
        while target is not None and target.link is not None:
            seen.add(target)
            target = target.target if target.target not in seen else None
        if target is None:
            member.problem = f"{member.name} is a link to {member.link}, which the shard does not hold"
        elif target is not member:
            member.offset, member.size, member.problem = target.offset, target.size, target.problem
            if self.checksums and member.is_image and not member.problem:
                file.seek(member.offset)
                member.crc32 = zlib.crc32(file.read(member.size))

    def _check_end(self, file: BinaryIO, offset: int) -> int | None:
        """A tar file ends with zeros; one that does not has lost its end. Where another one follows."""
        file.seek(min(offset, self.size))
        rest = file.read(512)
        if len(rest) == 512 and not any(rest):
            return self._next_archive(file, offset)
        if offset == self.size:  # between two members: whether something is missing cannot be told
            return None
        cut = offset + 512 > self.size
        problem = f"the shard is {'cut off' if cut else 'damaged'} at byte {min(offset, self.size):,}"
        last = next((member for member in reversed(self.members) if member.is_image or member.is_label), None)
        if last is not None and last.problem:
            return None
        fields = [member for member in self.members if last is not None and member.key == last.key]
        complete = any(member.is_image for member in fields) and any(member.is_label for member in fields)
        if last is None or not cut or complete:
            self.end = problem  # of a sample of which nothing is left
        else:
            last.problem = problem
        return None

    def _next_archive(self, file: BinaryIO, offset: int) -> int | None:
        """Behind the zeros at `offset`: another archive, nothing, or what is none and so is told."""
        file.seek(offset)
        while block := file.read(512):
            if any(block):
                start = file.tell() - len(block)
                if block[257:262] == b"ustar":
                    return start
                self.end = f"what is no tar member follows its end, at byte {start:,}"
                return None
        return None

    def result(self) -> ShardIndex:
        samples = sorted(self._samples(), key=lambda sample: sample[0])
        columns: dict[str, list] = {name: [] for name in ("keys", "offsets", "sizes", "labels", "crc32")}
        problems = {}
        for number, (_, key, image, label, problem) in enumerate(samples):
            found, wrong = _label(label)
            image = image or _Member(key=key, field="", name="")
            row = (key, image.offset, image.size, found, image.crc32)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
            if problem or wrong:
                problems[number] = problem or wrong
        return ShardIndex(
            name=self.path.name,
            bytes=self.size,
            sha256=sha256_of(self.path) if self.checksums else None,
            problems=problems,
            **columns,
        )

    def _samples(self) -> Iterator[tuple[int, str, _Member | None, _Member | None, str | None]]:
        """(place in the order, key, picture, label, problem) of each sample."""
        by_key: dict[str, list[tuple[int, _Member]]] = {}
        for place, member in enumerate(self.members):
            by_key.setdefault(member.key, []).append((place, member))
        for key, found in by_key.items():
            runs = [found] if _is_one(found) else [[*run] for _, run in groupby(found, key=lambda each: each[1].run)]
            for group in runs:
                yield from self._of_run(key, group)
        if self.end:
            yield len(self.members), "(end)", None, None, self.end

    def _of_run(self, key: str, group: list[tuple[int, _Member]]) -> Iterator[tuple]:
        """The samples of members of one key that stand together."""
        images = [(place, member) for place, member in group if member.is_image]
        labels = [member for _, member in group if member.is_label]
        others = [(place, member) for place, member in group if not member.is_image and not member.is_label]
        first = group[0][0]
        if _is_one(group) and (images or labels) and not (others and not images):
            image = images[0][1] if images else None
            label = labels[0] if labels else None
            problem = image.problem if image else (label.problem or "no picture")
            if image and not problem and label and label.problem:
                problem = f"{LABEL_PROBLEM}: {label.problem}"
            yield first, key, image, label, problem
        elif images or labels:
            names = ", ".join(member.name for _, member in group if member.is_image or member.is_label)
            several = f"several members of one key stand together ({names}): rename them"
            for place, member in images or others or [(first, None)]:
                problem = several if not _is_one(group) else _no_picture(member)
                yield place, key, member if images else None, None, problem
        else:
            for place, member in others:
                yield place, key, None, None, _no_picture(member)


def _is_one(group: Sequence[tuple[int, _Member]]) -> bool:
    """Whether there is at most one picture and one label."""
    members = [member for _, member in group]
    return sum(member.is_image for member in members) <= 1 and sum(member.is_label for member in members) <= 1


def _no_picture(member: _Member) -> str:
    if "." not in member.field:
        return not_read(f".{member.field}")
    return (
        f"no picture: a key ends at the first dot, so {member.name} is field {member.field!r} of "
        f"{posixpath.basename(member.key)!r}; rename it"
    )


def _label(member: _Member | None) -> tuple[int, str | None]:
    if member is None or member.problem:
        return NO_LABEL, None  # whether that is a problem depends on who reads the set
    try:
        label = int(member.text)
    except ValueError:
        return NO_LABEL, f"{LABEL_PROBLEM} {member.text[:20]!r} ({member.key}.cls) is no whole number"
    if not 0 <= label < 2**31 - 1:
        return NO_LABEL, f"{LABEL_PROBLEM} {label} ({member.key}.cls) is out of range"
    return label, None


def not_read(suffix: str) -> str:
    """What is said of a picture of another kind."""
    return f"{suffix} files are not read, only JPEG, PNG and WebP"


def check_not_compressed(path: Path, start: bytes) -> None:
    """UserError for a file that begins as compressed ones do."""
    for magic, kind, command in COMPRESSED:
        if start.startswith(magic):
            raise UserError(
                f"cannot read shard {path}: it is compressed ({kind}), but images are read in place; "
                f"unpack it first: {command} < {path.name} > unpacked.tar"
            )


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
        self.elsewhere: dict[str, int] = {}  # why images of the place are not in this set -> how many
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
    def of_files(
        cls, folder: Path, files: Sequence[tuple[Path, int]], classes: Sequence[str], problems: Mapping[int, str]
    ) -> "ImageIndex":
        """The image files of a folder, (path, label) each: every file is a shard of its own.

        `problems`: file -> why it can't be used.
        """
        index, count = cls([], classes), len(files)
        index._problems = {_id(number, 0): problem for number, problem in problems.items()}
        index.shards = [str(path) for path, _ in files]
        index.shard = np.arange(count, dtype=np.int32)
        index.place = np.zeros(count, np.int32)
        index.offset = np.zeros(count, np.int64)
        index.size = np.fromiter((_size_of(path) for path, _ in files), np.int64, count)
        index.label = np.fromiter((label for _, label in files), np.int32, count)
        index.crc32 = np.full(count, NO_CHECKSUM, np.int64)
        start = len(str(folder / "x")) - 1  # Path.relative_to would take longer than all the rest
        index._keys = [path[start:] for path in index.shards]
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

    def has(self, number: int, shard: str, key: str) -> bool:
        """Whether that is what the set calls its image of this number."""
        return 0 <= number < len(self) and self.shards[self.shard[number]] == shard and self.key(number) == key

    def subset(self, numbers: Sequence[int], rest: str = "not chosen") -> "ImageIndex":
        """The same set with only some of its images; `rest` says where the others are, for counts."""
        part = object.__new__(ImageIndex)
        part.__dict__.update(self.__dict__)
        chosen = np.asarray(numbers, dtype=np.int64)
        if len(chosen) < len(self):
            part.elsewhere = {**self.elsewhere, rest: self.elsewhere.get(rest, 0) + len(self) - len(chosen)}
        for name in ("shard", "place", "offset", "size", "label", "crc32"):
            setattr(part, name, getattr(self, name)[chosen])
        return part

    def numbered_as(self, classes: Sequence[str]) -> "ImageIndex":
        """The same set with its classes, matched by name, numbered as in a list. ValueError for a class not in it."""
        places = {name: number for number, name in enumerate(classes)}
        missing = [name for name in self.classes if name not in places]
        if missing or len(places) < len(classes):
            raise ValueError(f"its class {missing[0]!r} is none of theirs" if missing else "two classes have one name")
        same = self.subset(range(len(self)))
        known = np.array([places[name] for name in self.classes], dtype=np.int32)
        inside = (self.label >= 0) & (self.label < len(known))
        same.label = np.where(inside, known[np.where(inside, self.label, 0)], self.label)
        same.classes = list(classes)
        return same

    def fingerprint(self) -> str:
        """A hash of what the set holds: it stays when the files move elsewhere."""
        digest = hashlib.sha256()
        for shard in np.unique(self.shard).tolist():
            digest.update(f"{Path(self.shards[shard]).name}\0{self._keys[shard]}\0".encode("utf-8", "surrogateescape"))
        for column in (self.shard, self.place, self.size, self.label):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]


def _size_of(path: Path) -> int:
    """Of a file; of a link to nothing its own."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return path.lstat().st_size


def _id(shard, place):
    """One number for a place in a shard."""
    return shard << 32 | place


def _column(indexes: Sequence[ShardIndex], name: str, dtype) -> np.ndarray:
    parts = [np.asarray(getattr(index, name), dtype=dtype) for index in indexes]
    return np.concatenate(parts or [np.zeros(0, dtype)])
