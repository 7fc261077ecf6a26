"""Labelled images from webdataset tar shards, local or by URL, or from a folder of class folders."""

import glob
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from ibq.config import UserError, require_least
from ibq.data.index import (
    IMAGE_SUFFIXES,
    LABEL_PROBLEM,
    NO_LABEL,
    OTHER_PICTURES,
    ImageIndex,
    ShardIndex,
    index_file,
    index_shard,
    not_read,
    read_shard_index,
)
from ibq.data.storage import ShardStore, cache_root, is_url, open_url, shard_name
from ibq.data.transforms import AugmentConfig
from ibq.files import write_text

CLASSES_FILE = "classes.json"
INDEX_RULES = 3  # of `index_shard`: what older ones have left in the cache is made again


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sets that are mixed for training."""

    train: str  # a place, as in ImageDataConfig
    weight: float = 1.0  # share of the samples, relative to the other sets'

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight: must be positive, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    """Where the images are and in which order they come.

    A place is a glob of tar shards (`shards/train-*.tar`), a folder of class folders, or URLs with braces
    (`https://host/train-{0000..0127}.tar`, `s3://...`, `pipe:COMMAND`).
    """

    train: str | None = None  # a place; give either this or `sources`
    sources: tuple[SourceConfig, ...] = ()  # several places, mixed by weight
    validation: str | None = None  # None: every `validation_every`-th image of the training place is held out
    validation_every: int = 10
    labels: bool = True  # false: a set without labels, for a tokenizer
    buckets: tuple[tuple[int, int], ...] = ()  # heights and widths that pictures go to by aspect ratio; (): squares
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    workers: int = 4  # processes that decode, per rank
    in_memory: bool = False  # keep decoded images: for small sets, with workers: 0
    streams: int = 192  # the order is the same for every number of ranks that divides this
    shuffle_window: int = 2_048  # samples of a stream that are shuffled among each other
    max_bad_fraction: float = 0.05  # of an epoch's samples that may be unusable before the run stops
    retries: int = 3  # of a read that fails, with growing pauses
    cache_folder: str | None = None  # where URLs' shards and quick indexes are kept (default: ~/.cache/ibq)
    cache_gib: float = 50.0  # size of that folder's shards
    unindexed: Literal["index", "in_order"] = "index"  # URLs without index: fetch all first, or read without shuffling

    def __post_init__(self):
        if (self.train is None) == (not self.sources):
            raise ValueError("train: give either `train` or `sources`")
        require_least(self, validation_every=2, workers=0, retries=0, streams=1, shuffle_window=1)
        if self.workers and self.in_memory:
            raise ValueError("workers: must be 0 with in_memory, or every process would keep all images")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction: must lie in [0, 1], got {self.max_bad_fraction}")
        if not 0 < self.cache_gib < math.inf:
            raise ValueError(f"cache_gib: must be positive, got {self.cache_gib}")
        if self.unindexed == "in_order" and self.sources:
            raise ValueError("unindexed: in_order reads a single set; index the shards to mix several")
        self._check_buckets()

    def _check_buckets(self) -> None:
        seen: dict[float, int] = {}
        for number, (height, width) in enumerate(self.buckets):
            if min(height, width) < 1:
                raise ValueError(f"buckets[{number}]: sides must be at least 1 pixel, got {height} x {width}")
            if (same := seen.setdefault(height / width, number)) != number:
                raise ValueError(
                    f"buckets[{number}]: {height} x {width} has the aspect ratio of buckets[{same}], so no picture "
                    "would be nearer to it; leave one out"
                )
        if self.buckets and self.sources:
            raise ValueError("buckets: not with several sources; give one place as `train`, or buckets=[]")
        if self.buckets and self.unindexed == "in_order":
            raise ValueError("buckets: pictures must be indexed to know their sizes; set data.unindexed=index")

    @property
    def places(self) -> list[str]:
        """All training places."""
        return [self.train] if self.train is not None else [source.train for source in self.sources]

    def cache(self) -> Path:
        """The folder for what can be fetched or made again."""
        return cache_root() if self.cache_folder is None else Path(self.cache_folder)

    def store(self, indexes: Sequence[ImageIndex] = ()) -> ShardStore:
        """Reads these sets' shards."""
        checks = {shard: check for index in indexes for shard, check in index.checks.items()}
        return ShardStore(
            cache=self.cache() / "shards", limit_bytes=int(self.cache_gib * 2**30), retries=self.retries, checks=checks
        )


def expand_place(place: str) -> list[str]:
    """The shards that a place names, in order; empty if there is none. A folder has none."""
    if is_url(place):
        from braceexpand import braceexpand  # what webdataset expands braces with

        return list(braceexpand(place)) if not place.startswith("pipe:") or "{" in place else [place]
    return sorted(glob.glob(place))


def open_images(
    place: str, config: ImageDataConfig | None = None, *, report: Callable[[int, int], None] = lambda done, total: None
) -> ImageIndex:
    """Index a place; UserError if nothing is there. `report` is told (shards indexed, shards), or of class folders.

    In a folder, hidden files and folders (`.name`) are left out, and a sub-folder without images is no class.
    """
    config = config or ImageDataConfig(train=place)
    if not is_url(place) and Path(place).is_dir():
        return _index_folder(Path(place), config, report)
    shards = expand_place(place)
    if not shards:
        raise UserError(
            f"no images at {place!r}: give a glob of tar shards (data/train-*.tar) or a folder of class folders"
        )
    read = partial(read_index, config=config, store=config.store())
    indexes = []
    for number, shard in enumerate(shards):
        indexes.append((shard, read(shard)))
        report(number + 1, len(shards))
    return assemble(place, indexes, config)


def assemble(place: str, shards: Sequence[tuple[str, ShardIndex]], config: ImageDataConfig) -> ImageIndex:
    """The set that these shards make, checked against `max_bad_fraction`."""
    shards, classes = _by_name(shards) if config.labels else (shards, class_names(shards[0][0], 1))
    index = ImageIndex(shards, classes, labelled=config.labels)
    if not len(index):
        raise UserError(f"no images in the shards {place!r}: expected JPEG, PNG or WebP files with a .cls file each")
    return _checked(index, config)


def _checked(index: ImageIndex, config: ImageDataConfig) -> ImageIndex:
    """The set itself; UserError where more of it can't be used than the config allows."""
    problems = index.problems()
    if len(problems) > config.max_bad_fraction * len(index):
        number, reason = problems[0]
        raise UserError(
            f"{len(problems):,} of {len(index):,} samples can't be used, the first in "
            f"{index[number].shard}: image {index.key(number)!r}: {reason}; mend them, or raise "
            f"data.max_bad_fraction{', or set data.labels=false to do without labels' if 'label' in reason else ''}"
        )
    return index


@dataclass(frozen=True)
class ClassLists:
    """What the labels of a place's shards mean."""

    names: list[str] | None  # by label; None: no folder names its classes
    folders: Mapping[str, list[str]] = field(default_factory=dict)  # where they differ: the names by a folder's labels

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def renumbered(self, shard: str, index: ShardIndex) -> ShardIndex:
        """A shard's samples with labels to `names`."""
        if not self.folders:
            return index
        names, places = self.folders[_folder_of(shard)], self._places
        beyond = len(places)  # no class, as it is none of its own list
        labels = [
            label if label == NO_LABEL else places[names[label]] if label < len(names) else beyond + label
            for label in index.labels
        ]
        return ShardIndex(**{**vars(index), "labels": labels})


def class_lists(shards: Sequence[str]) -> ClassLists:
    """The names of the shards' classes; where their folders name others, one list of all, to be matched by name.

    UserError where only some of the folders name their classes: numbers of the others may mean anything.
    """
    folders: dict[str, list[str] | None] = {}
    for shard in shards:
        if (folder := _folder_of(shard)) not in folders:
            folders[folder] = named_classes(shard)
    lists = [names for names in folders.values() if names is not None]
    if not lists:
        return ClassLists(None)
    if len(lists) < len(folders):
        named, unnamed = (next(f for f, names in folders.items() if (names is None) == none) for none in (False, True))
        raise UserError(
            f"{named}/{CLASSES_FILE} names the classes, but {unnamed} has no such file, so what its labels mean is "
            f"unknown; put the {CLASSES_FILE} of its own classes there, or set data.labels=false to do without"
        )
    if all(names == lists[0] for names in lists):
        return ClassLists(lists[0])
    for folder, names in folders.items():
        if len({*names}) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"{folder}/{CLASSES_FILE} has the name {twice!r} twice, so its classes can't be matched by name with "
                "those of the other folders; give every class a name of its own"
            )
    return ClassLists([*dict.fromkeys(name for names in lists for name in names)], folders)


def _by_name(shards: Sequence[tuple[str, ShardIndex]]) -> tuple[list[tuple[str, ShardIndex]], list[str]]:
    """The shards, with labels to one list of classes, and that list."""
    lists = class_lists([shard for shard, _ in shards])
    if lists.names is None:
        top = max((max(index.labels, default=NO_LABEL) for _, index in shards), default=NO_LABEL)
        return [*shards], [str(i) for i in range(top + 1)]
    return [(shard, lists.renumbered(shard, index)) for shard, index in shards], lists.names


def _folder_of(shard: str) -> str:
    return shard.rpartition("/")[0] if "/" in shard else "."


def read_index(shard: str, config: ImageDataConfig, store: ShardStore) -> ShardIndex:
    """The samples of a shard: from the index file beside it, from the cache, or by reading the shard."""
    if not is_url(shard):
        path = Path(shard)
        if Path(index_file(shard)).is_file():
            return read_shard_index(path)
        status = path.stat()
        stamp = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        return _cached(stamp, config, lambda: read_shard_index(path))
    try:
        return _remote_index(shard)
    except (OSError, UserError):
        return _cached(shard, config, lambda: _index_url(shard, store))


def is_unindexed(place: str, config: ImageDataConfig) -> bool:
    """Whether a place is URLs of which the first has no index, neither beside it nor in the cache."""
    if not is_url(place):
        return False
    try:
        _remote_index(expand_place(place)[0])
    except (OSError, UserError):
        return True
    return False


def _remote_index(url: str) -> ShardIndex:
    """The index file beside a URL; OSError if there is none."""
    if url.startswith("pipe:") or not url.endswith(".tar"):
        raise OSError(f"{url}: where its index would be is unknown")
    with open_url(index_file(url)) as stream:
        return ShardIndex.from_json(stream.read(), index_file(url))


def _index_url(url: str, store: ShardStore) -> ShardIndex:
    try:
        path = store.fetch(url)
    except OSError as error:
        raise UserError(f"cannot fetch {url}: {error}") from error
    index = index_shard(path, checksums=True)
    return ShardIndex(**{**vars(index), "name": shard_name(url)})


def _cached(stamp: str, config: ImageDataConfig, make: Callable[[], ShardIndex]) -> ShardIndex:
    """What `make` gives, kept in the cache under `stamp` where that can be written."""
    name = hashlib.sha256(f"{INDEX_RULES} {stamp}".encode()).hexdigest()[:32]
    path = config.cache() / "indexes" / f"{name}.json"
    if path.is_file():
        try:
            return ShardIndex.from_json(path.read_bytes(), str(path))
        except UserError:
            path.unlink(missing_ok=True)
    index = make()
    try:
        write_text(path, index.to_json())
    except OSError:  # no home, or a full one: it is made again the next time
        return index
    return index


def _index_folder(folder: Path, config: ImageDataConfig, report: Callable[[int, int], None]) -> ImageIndex:
    """The images below a folder. Without labels these are all; with labels, those in no class folder are unusable."""
    classes, images = class_folders(folder, report) if config.labels else _without_labels(folder)
    rows = [(path, label, problem_of_file(path)) for path, label in images]
    if config.labels:
        loose = pictures_below(folder, deep=False)
        beside = f"{LABEL_PROBLEM} is missing: it lies beside the class folders"
        rows += [(path, NO_LABEL, problem_of_file(path) or beside) for path in loose]
        if not classes:
            hint = "" if all(map(problem_of_file, loose)) else "; for a set without labels set data.labels=false"
            raise UserError(
                f"no images in {str(folder)!r}: expected one sub-folder a class with JPEG, PNG or WebP files{hint}"
            )
    if all(problem for _, _, problem in rows):
        raise UserError(f"no images in {str(folder)!r}: expected JPEG, PNG or WebP files")
    problems = {number: problem for number, (_, _, problem) in enumerate(rows) if problem}
    index = ImageIndex.of_files(folder, [(path, label) for path, label, _ in rows], classes, problems)
    return _checked(index, config)


def _without_labels(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """As `class_folders`, with the pictures that are in none; labels say nothing."""
    pictures = [(path, path.relative_to(folder).parts[0]) for path in pictures_below(folder)]
    names = sorted({top for path, top in pictures if path.parent != folder})
    place = {name: number for number, name in enumerate(names)}
    return names or ["0"], [(path, place.get(top, 0)) for path, top in pictures]


def class_folders(
    folder: Path, report: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[str], list[tuple[Path, int]]]:
    """(class names, (file, label) of every picture) of a folder of class folders; classes are in sorted order.

    A sub-folder without pictures is no class. UserError for one whose pictures are all of kinds that are not read: it
    would be none, and all later labels others.
    """
    names = names_of_class_folders(folder)
    for name in names:  # one that can't be read would be no class either
        try:
            os.scandir(folder / name).close()
        except OSError as error:
            raise UserError(f"the class folder '{folder / name}' cannot be read ({error.strerror})") from error
    images = {}
    for number, name in enumerate(names):
        images[name] = pictures_below(folder / name)
        check_is_class(folder / name, images[name])
        report(number + 1, len(names))
    classes = [name for name in names if images[name]]
    return classes, [(path, label) for label, name in enumerate(classes) for path in images[name]]


def names_of_class_folders(folder: Path) -> list[str]:
    """The visible sub-folders in sorted order; UserError for a link to nothing, which may have been another one."""
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    for path in entries:
        if path.is_symlink() and not path.exists() and path.suffix.lower() not in IMAGE_SUFFIXES | OTHER_PICTURES:
            raise UserError(
                f"'{path}' is a link to '{os.readlink(path)}', which is not there: if it was a class, all later labels "
                "would be others; bring that back, or remove the link"
            )
    return sorted(path.name for path in entries if path.is_dir())


def check_is_class(folder: Path, pictures: Sequence[Path]) -> None:
    """UserError for a class folder with pictures of which none is read."""
    if pictures and all(map(problem_of_file, pictures)):
        raise UserError(
            f"the class folder '{folder}' has {len(pictures):,} pictures, but {problem_of_file(pictures[0])}; mend or "
            "convert them, or move the folder away"
        )


def pictures_below(folder: Path, *, deep: bool = True) -> list[Path]:
    """The pictures of any kind of a folder and, if `deep`, its sub-folders, in sorted order.

    Hidden files and folders are left out: a Mac's `._1.jpg` is no picture. Links are followed; UserError for a loop.
    A link to nothing is there if it is called a picture.
    """
    kinds = IMAGE_SUFFIXES | OTHER_PICTURES
    return [path for path in _files_below(folder, (), deep) if path.suffix.lower() in kinds]


def _files_below(folder: Path, above: tuple[Path, ...], deep: bool) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        raise UserError(f"'{folder}' is a link to a folder that it lies in, which has no end; remove the link")
    # Entries know what they are: to ask the file system about each of a million names takes minutes.
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            if deep:
                yield from _files_below(folder / entry.name, (*above, real), deep)
        elif entry.is_file() or entry.is_symlink():
            yield folder / entry.name


def problem_of_file(path: Path) -> str | None:
    """Why a picture can't be used, as far as its name and place tell; None if it can."""
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return not_read(path.suffix.lower())
    return None if path.exists() else f"a link to '{os.readlink(path)}', which is not there"


def class_names(shard: str, count: int) -> list[str]:
    """The names in the `classes.json` beside a shard, or else the numbers below `count`."""
    names = named_classes(shard)
    return [str(i) for i in range(count)] if names is None else names


def named_classes(shard: str) -> list[str] | None:
    """The names in the `classes.json` beside a shard; None without one."""
    beside = shard.rsplit("/", 1)[0] + f"/{CLASSES_FILE}" if "/" in shard else CLASSES_FILE
    text = None
    if is_url(shard):
        if not shard.startswith("pipe:"):
            try:
                with open_url(beside) as stream:
                    text = stream.read()
            except OSError:
                text = None
    elif os.path.exists(beside):
        text = Path(beside).read_bytes()
    return None if text is None else parse_classes(text, beside)


def parse_classes(text: str | bytes, source: str) -> list[str]:
    """The names in the text of a `classes.json`; UserError that names `source` if it is none."""
    try:
        names = json.loads(text)
        if not isinstance(names, list) or not names:
            raise ValueError("it holds something else")
    except ValueError as error:
        raise UserError(f"{source}: not a JSON list of class names ({error})") from error
    return [str(name) for name in names]


# --- Training and validation sets ---


Report = Callable[[str], Callable[[int, int], None]]  # a place -> what is told (shards indexed, shards)


def _open_named(name: str, place: str, config: ImageDataConfig, report: Report) -> ImageIndex:
    try:
        return open_images(place, config, report=report(place))
    except UserError as error:
        raise UserError(f"data.{name}: {error}") from error


def split_sources(
    config: ImageDataConfig, report: Report = lambda place: lambda done, total: None
) -> tuple[list[ImageIndex], list[ImageIndex]]:
    """(training sets, validation sets) as the config says; one validation set of each source where none is given."""
    names = ["train"] if config.train is not None else [f"sources[{i}].train" for i in range(len(config.sources))]
    places = zip(names, config.places, strict=True)
    train = [_open_named(name, place, config, report) for name, place in places]
    if config.validation is not None:
        return train, [_open_named("validation", config.validation, config, report)]
    parts = [hold_out(index, config.validation_every) for index in train]
    for name, place, index in zip(names, config.places, train, strict=True):
        if len(index) == 1:
            raise UserError(f"data.{name}: {place!r} has 1 image, and none is left to train on; set data.validation")
    return [kept for kept, _ in parts], [held for _, held in parts]


def hold_out(index: ImageIndex, every: int) -> tuple[ImageIndex, ImageIndex]:
    """(the rest, every so many-th image) of a set."""
    kept, held_out = [i for i in range(len(index)) if i % every], range(0, len(index), every)
    return index.subset(kept, "held out for validation"), index.subset(held_out, "kept for training")


def open_split(place: str, split: str, validation_every: int, config: ImageDataConfig | None = None) -> ImageIndex:
    """The images of a place: "all", or the "train" or "validation" part that `split_sources` makes of it."""
    index = open_images(place, config)
    if split == "all":
        return index
    train, validation = hold_out(index, validation_every)
    return train if split == "train" else validation
