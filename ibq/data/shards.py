"""Labelled images from webdataset tar shards or from a folder of class folders."""

import glob
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ibq.config import UserError
from ibq.data.transforms import AugmentConfig, decode_rgb, random_square, square

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
CLASSES_FILE = "classes.json"


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    """Where the images are. A place is a glob of tar shards or a folder of class folders."""

    train: str
    validation: str | None = None  # None: every `validation_every`-th image of the training place is held out
    validation_every: int = 10
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    workers: int = 4
    cache: bool = False  # keep decoded images in memory: for sets that fit

    def __post_init__(self):
        if self.validation_every < 2:
            raise ValueError(f"validation_every: must be at least 2, got {self.validation_every}")
        if self.workers < 0:
            raise ValueError(f"workers: must not be negative, got {self.workers}")


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """Where one image's bytes lie."""

    path: str  # a tar shard or an image file
    offset: int  # into the shard; 0 for a file
    size: int
    label: int


class ImageIndex:
    """The images of one place: their entries, and the class names."""

    def __init__(self, entries: Sequence[ImageEntry], classes: Sequence[str]):
        self.entries = list(entries)
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, number: int) -> bytes:
        """The bytes of one image file."""
        entry = self.entries[number]
        # Not seek and read: forked workers share the position in a file that was open before.
        return os.pread(_open_shard(entry.path).fileno(), entry.size, entry.offset)

    def subset(self, numbers: Sequence[int]) -> "ImageIndex":
        """The same place with only some of its images."""
        return ImageIndex([self.entries[i] for i in numbers], self.classes)


@lru_cache(maxsize=64)
def _open_shard(path: str) -> BinaryIO:
    # Kept open per worker process: a shard is read thousands of times.
    return open(path, "rb")


def open_images(place: str) -> ImageIndex:
    """Index a glob of tar shards or a folder of class folders; UserError if nothing is there.

    In a folder, hidden files and folders (`.name`) are left out, and a sub-folder without images is no class.
    """
    if Path(place).is_dir():
        return _index_folder(Path(place))
    paths = sorted(glob.glob(place))
    if not paths:
        raise UserError(
            f"no images at {place!r}: give a glob of tar shards (data/train-*.tar) or a folder of class folders"
        )
    entries = [entry for path in paths for entry in _index_shard(path)]
    if not entries:
        raise UserError(f"no images in the shards {place!r}: expected JPEG, PNG or WebP files with a .cls file each")
    return ImageIndex(entries, _class_names(Path(paths[0]).parent, entries))


def _index_folder(folder: Path) -> ImageIndex:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    images = {name: _images_below(folder / name) for name in names}
    classes = [name for name in names if images[name]]
    if not classes:
        raise UserError(f"no images in {str(folder)!r}: expected one sub-folder a class with JPEG, PNG or WebP files")
    entries = [
        ImageEntry(path=str(path), offset=0, size=path.stat().st_size, label=label)
        for label, name in enumerate(classes)
        for path in images[name]
    ]
    return ImageIndex(entries, classes)


def _images_below(folder: Path) -> list[Path]:
    """All image files in a folder and its sub-folders, without hidden ones: a Mac's `._1.jpg` is no picture."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]


def _index_shard(path: str) -> list[ImageEntry]:
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")  # folders may have dots, as in ./0001.png
                name, dot, suffix = name.partition(".")
                key = folder + slash + name
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    images[key] = (member.offset_data, member.size)
                elif dot and suffix == "cls":
                    labels[key] = int(tar.extractfile(member).read())
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"cannot read shard {path}: {error}; write it again or leave it out of the glob") from error
    missing = sorted(images.keys() - labels.keys())
    if missing:
        raise UserError(f"shard {path}: image {missing[0]!r} has no label ({missing[0]}.cls)")
    return [ImageEntry(path=path, offset=o, size=s, label=labels[key]) for key, (o, s) in images.items()]


def _class_names(folder: Path, entries: Sequence[ImageEntry]) -> list[str]:
    count = 1 + max((entry.label for entry in entries), default=-1)
    if (folder / CLASSES_FILE).exists():
        try:
            names = [str(name) for name in json.loads((folder / CLASSES_FILE).read_text())]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder / CLASSES_FILE}: not a JSON list of class names ({error})") from error
        if len(names) < count:
            raise UserError(f"{folder / CLASSES_FILE} names {len(names)} classes but labels go up to {count - 1}")
        return names
    return [str(i) for i in range(count)]


def _open_named(name: str, place: str) -> ImageIndex:
    try:
        return open_images(place)
    except UserError as error:
        raise UserError(f"data.{name}: {error}") from error


def split_images(config: ImageDataConfig) -> tuple[ImageIndex, ImageIndex]:
    """(training, validation) images as the config says."""
    train = _open_named("train", config.train)
    if config.validation is not None:
        return train, _open_named("validation", config.validation)
    held_out = set(range(0, len(train), config.validation_every))
    keep = [i for i in range(len(train)) if i not in held_out]
    return train.subset(keep), train.subset(sorted(held_out))


def open_split(place: str, split: str, validation_every: int) -> ImageIndex:
    """The images of a place: "all", or the "train" or "validation" part that `split_images` makes of it."""
    if split == "all":
        return open_images(place)
    train, validation = split_images(ImageDataConfig(train=place, validation_every=validation_every))
    return train if split == "train" else validation


class ImageDataset(torch.utils.data.Dataset):
    """(image uint8 [3, S, S], label) for a sample number, or for (number, epoch) with that epoch's augmentation."""

    def __init__(self, index: ImageIndex, size: int, *, augment: AugmentConfig | None = None, seed=0, cache=False):
        self.index = index
        self.size = size
        self.augment = augment
        self.seed = seed
        self._decoded = {} if cache else None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        number, epoch = key if isinstance(key, tuple) else (key, 0)
        image = self._image(number)
        if self.augment is None:
            pixels = square(image, self.size)
        else:
            rng = np.random.default_rng([self.seed, epoch, number])
            pixels = random_square(image, self.size, self.augment, rng)
        return torch.from_numpy(pixels).permute(2, 0, 1), self.index.entries[number].label

    def _image(self, number: int):
        if self._decoded is None:
            return self._decode(number)
        if number not in self._decoded:
            self._decoded[number] = self._decode(number)
        return self._decoded[number]

    def _decode(self, number: int):
        try:
            return decode_rgb(self.index.read(number))
        except ValueError as error:
            raise UserError(f"image {number} in {self.index.entries[number].path}: {error}") from error


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Float [-1, 1] -> uint8 by clamping and truncation, the reference's convention."""
    return ((images.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
