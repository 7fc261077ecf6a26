"""Sets of images to be judged: `.npz` files in ADM's form, folders and shards, read piece by piece.

ADM's form: `arr_0` uint8 [N, H, W, 3], `arr_1` the classes [N] where there are any, and, in a reference file, the
statistics `mu`, `sigma` (pool features) and `mu_s`, `sigma_s` (spatial ones); ours may add `classes`, the names of the
classes. Nothing in such a file is unpickled.
"""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ibq import dist
from ibq.config import UserError
from ibq.data.images import BadSampleError, ImageDataset
from ibq.data.index import ImageIndex, sha256_of
from ibq.data.shards import ImageDataConfig, open_images
from ibq.data.storage import ShardStore
from ibq.data.transforms import decode_rgb
from ibq.evaluation.distances import Gaussian
from ibq.evaluation.features import POOL_DIM, SPATIAL_DIM

REMEDY = "write it again with numpy.savez(FILE, images), images uint8 [N, H, W, 3]"
STATISTICS = {"mu": (POOL_DIM,), "sigma": (POOL_DIM,) * 2, "mu_s": (SPATIAL_DIM,), "sigma_s": (SPATIAL_DIM,) * 2}
DAMAGED = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, OSError, NotImplementedError)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a reference file has computed already; None for what it lacks."""

    pool: Gaussian | None
    spatial: Gaussian | None


class NpzImages:
    """Images of an `.npz` file; UserError if it has none of the right form."""

    def __init__(self, path: str | Path):
        self.path, self.place = Path(path), str(path)
        with _explained(self.path), zipfile.ZipFile(self.path) as archive:
            self.members = set(archive.namelist())
        self.count, self.size = 0, (0, 0)
        if "arr_0.npy" in self.members:
            self._check_images()
        elif "mu.npy" not in self.members:
            raise UserError(f"{self.path}: has neither images (arr_0) nor statistics (mu, sigma); {REMEDY}")

    def _check_images(self) -> None:
        with _explained(self.path), self._open("arr_0") as (_, shape, fortran, dtype):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise UserError(f"{self.path}: arr_0 is {dtype} {list(shape)}, not uint8 [N, H, W, 3]; {REMEDY}")
            if fortran or not min(shape[1:]):
                raise UserError(f"{self.path}: arr_0 is not a C-ordered array of pictures; {REMEDY}")
            if shape[0] < 1:
                raise UserError(f"{self.path}: arr_0 {list(shape)} holds no images; {REMEDY}")
            self._check_length(math.prod(shape))
        self.count, self.size = shape[0], (shape[1], shape[2])

    def _check_length(self, wanted: int) -> None:
        """ValueError if the file does not have as many bytes of images as their header says: none are set aside."""
        with zipfile.ZipFile(self.path) as archive:
            found = archive.getinfo("arr_0.npy").file_size
        if found < wanted:
            raise ValueError(f"arr_0 has {found:,} bytes, its header says {wanted:,}")

    @contextmanager
    def _open(self, name: str):
        """(open member after its header, shape, Fortran order, dtype); ValueError for Python objects."""
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in readers:
                raise ValueError(f"{name} has an unknown .npy version {version}")
            shape, fortran, dtype = readers[version](member)
            if dtype.hasobject:
                raise ValueError(f"{name} holds pickled Python objects, which are never loaded")
            yield member, shape, fortran, dtype

    def blocks(self, size: int, rank: int = 0, world_size: int = 1) -> Iterator[Tensor]:
        """A rank's blocks of so many images, uint8 [n, 3, H, W]: block b is rank (b mod world_size)'s."""
        with _explained(self.path), self._open("arr_0") as (member, shape, _, _):
            bytes_each = int(np.prod(shape[1:]))
            for number, start in enumerate(range(0, self.count, size)):
                wanted = min(size, self.count - start) * bytes_each
                data = member.read(wanted)
                if len(data) != wanted:
                    raise EOFError(f"arr_0 ends after {start:,} of {self.count:,} images")
                if number % world_size == rank:
                    images = np.frombuffer(data, np.uint8).reshape(-1, *shape[1:])
                    yield torch.from_numpy(images.copy()).permute(0, 3, 1, 2)
            if member.read(1):  # the checksum of the member is looked at only at its end
                raise ValueError("arr_0 is longer than its header says")

    def labels(self) -> Tensor | None:
        """Classes [N], None without any; UserError for another form."""
        if "arr_1.npy" not in self.members:
            return None
        labels = self._array("arr_1")
        if labels.shape != (self.count,) or labels.dtype.kind not in "iu":
            raise UserError(
                f"{self.path}: arr_1 is {labels.dtype} {list(labels.shape)}, not a class number for each of "
                f"{self.count} images; write it again with numpy.savez(FILE, images, labels)"
            )
        return torch.from_numpy(labels.astype(np.int64))

    def class_names(self) -> list[str] | None:
        """Names of the classes, by number; None where the file has none, as ADM's do. UserError for another form."""
        if "classes.npy" not in self.members:
            return None
        names = self._array("classes")
        if names.ndim != 1 or names.dtype.kind != "U":
            raise UserError(
                f"{self.path}: classes is {names.dtype} {list(names.shape)}, not a list of names; leave it out"
            )
        return names.tolist()

    def statistics(self) -> Statistics:
        """The statistics in the file, checked."""
        found = {name: self._array(name) for name in STATISTICS if f"{name}.npy" in self.members}
        for name, value in found.items():
            if value.shape != STATISTICS[name] or value.dtype.kind != "f" or not np.isfinite(value).all():
                raise UserError(
                    f"{self.path}: {name} is {value.dtype} {list(value.shape)}, not finite floats "
                    f"{list(STATISTICS[name])}; take a reference file of ADM's evaluator or one with images"
                )
        pairs = []
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if (mean in found) != (covariance in found):
                raise UserError(f"{self.path}: has one of {mean} and {covariance} without the other; take a whole file")
            pairs.append(
                Gaussian(mean=found[mean].astype(np.float64), covariance=found[covariance].astype(np.float64))
                if mean in found
                else None
            )
        return Statistics(pool=pairs[0], spatial=pairs[1])

    def _array(self, name: str) -> np.ndarray:
        with _explained(self.path), np.load(self.path, allow_pickle=False) as file:
            return file[name]

    def sha256(self) -> str:
        """Of the file."""
        return sha256_of(self.path)


class PlaceImages:
    """Images of a folder or of tar shards; all of one size, or cropped and resized to `size`."""

    def __init__(self, place: str, size: int | None):
        self.place = place
        self.index: ImageIndex = open_images(place, ImageDataConfig(train=place, labels=False))
        self.store = ShardStore(checks=self.index.checks)
        self.dataset = ImageDataset(self.index, size, store=self.store) if size else None
        self.count = len(self.index)
        self.size = (size, size) if size else self._pixels(0).shape[:2]

    def _pixels(self, number: int) -> np.ndarray:
        entry = self.index[number]
        name = f"{entry.shard}: image {self.index.key(number)!r}"
        try:
            if self.dataset is not None:
                return self.dataset.pixels(number, 0)
            if entry.problem is not None:
                raise ValueError(entry.problem)
            return np.asarray(decode_rgb(self.store.read(entry)))
        except (ValueError, OSError, BadSampleError) as error:
            reason = error.sample.reason if isinstance(error, BadSampleError) else error
            raise UserError(f"{name}: {reason}; mend it or take it out") from error

    def blocks(self, size: int, rank: int = 0, world_size: int = 1) -> Iterator[Tensor]:
        """A rank's blocks of so many images, uint8 [n, 3, H, W]: block b is rank (b mod world_size)'s."""
        starts = range(0, self.count, size)
        for start in starts[rank::world_size]:
            yield torch.from_numpy(
                np.stack([self._sized(number) for number in range(start, min(start + size, self.count))])
            ).permute(0, 3, 1, 2)

    def _sized(self, number: int) -> np.ndarray:
        pixels = self._pixels(number)
        if pixels.shape[:2] != self.size:
            found, first = (f"{shape[1]} x {shape[0]}" for shape in (pixels.shape, self.size))
            raise UserError(
                f"{self.index[number].shard}: image {self.index.key(number)!r} has {found} pixels, the first one "
                f"{first}; --size N crops and resizes all to N x N"
            )
        return pixels

    def labels(self) -> None:
        """A folder of samples does not say which classes were meant."""
        return None

    def statistics(self) -> Statistics:
        """None."""
        return Statistics(pool=None, spatial=None)

    def sha256(self) -> str:
        """Over the images' files, in order."""
        digest = hashlib.sha256()
        for number in range(self.count):
            digest.update(hashlib.sha256(self.store.read(self.index[number])).digest())
        return digest.hexdigest()


ImageSet = NpzImages | PlaceImages


def open_set(place: str, size: int | None = None) -> ImageSet:
    """The set that a place names: an `.npz` file, a folder, or a glob of shards; `size` is for the last two."""
    if place.endswith(".npz"):
        return NpzImages(place)
    if Path(place).is_file() and not place.endswith(".tar"):
        raise UserError(f"{place}: neither an .npz file nor a tar shard; {REMEDY}, or give a folder of images")
    return PlaceImages(place, size)


class PixelHash:
    """A hash of a set of images that depends neither on their order nor on batches and ranks.

    The sum, in four lanes of 64 bits, of the SHA-256 of every image's pixels and size.
    """

    def __init__(self):
        self.lanes = torch.zeros(4, dtype=torch.int64)

    def add(self, images: Tensor) -> None:
        """Take in uint8 images [B, 3, H, W]."""
        for image in images.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            digest = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).digest()
            self.lanes += torch.frombuffer(bytearray(digest), dtype=torch.int64)  # wraps around

    def hexdigest(self, *, own: bool = False) -> str:
        """Over all ranks, or of this one alone."""
        lanes = self.lanes if own else dist.all_reduce_sum(self.lanes.clone())
        return lanes.numpy().tobytes().hex()


@contextmanager
def _explained(path: Path):
    """What is wrong with a file is the user's to solve."""
    if not path.is_file():
        raise UserError(f"no file {str(path)!r}; give an .npz file, a folder of images, or a glob of tar shards")
    try:
        yield
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not a readable .npz file ({reason}); {REMEDY}") from error
