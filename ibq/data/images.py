"""Images as uint8 arrays: one by one, or as the batches that training takes in the order of its positions."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ibq.config import UserError
from ibq.data.buckets import Buckets
from ibq.data.counts import BadSample
from ibq.data.index import ImageIndex
from ibq.data.order import Location, Order
from ibq.data.storage import ShardStore
from ibq.data.transforms import AugmentConfig, FixedView, Size, decode_rgb, random_square, sides_of, square, view

GIVE_UP = 10_000  # unusable samples in a row after which a stream counts as lost


class BadSampleError(ValueError):
    """Raised for a sample that can't be used."""

    def __init__(self, sample: BadSample):
        super().__init__(f"shard {sample.shard}: image {sample.key!r}: {sample.reason}")
        self.sample = sample


class BatchSource:
    """Images by number, in batches, of what has a `fill`."""

    sample_shape: tuple[int, int, int]  # of an image as `fill` writes it, or of the largest

    def shape_of(self, _number: int) -> tuple[int, int, int]:
        """Of one image as `fill` writes it; those of a batch must have the same."""
        return self.sample_shape

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, list[BadSample]]:
        """What `fill` gives, as tensors: images uint8 [B, 3, H, W], channels last in memory, and labels [B]."""
        shape = self.shape_of(numbers[0]) if len(numbers) else self.sample_shape
        out = np.empty((len(numbers), *shape), np.uint8)
        labels, bad = self.fill(numbers, out)
        images = torch.from_numpy(out[: len(labels)]).permute(0, 3, 1, 2)
        return images, torch.tensor(labels, dtype=torch.int64), bad


class ImageDataset(BatchSource, torch.utils.data.Dataset):
    """(image uint8 [3, H, W], label) for a sample number, or for (number, epoch) with that epoch's augmentation.

    `augment`: random views, one fixed view, or None for the centre crop. `size`: of all images, or the buckets
    that tell each one's. Raises BadSampleError.
    """

    def __init__(
        self,
        index: ImageIndex,
        size: Size | Buckets,
        *,
        augment: AugmentConfig | FixedView | None = None,
        seed: int = 0,
        in_memory: bool = False,
        store: ShardStore | None = None,
    ):
        self.index = index
        self.size = size
        largest = max(size.shapes, key=math.prod) if isinstance(size, Buckets) else sides_of(size)
        self.sample_shape = (*largest, 3)
        self.augment = augment
        self.seed = seed
        self.store = store or ShardStore(checks=index.checks)
        self._decoded = {} if in_memory else None
        self._bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        number, epoch = key if isinstance(key, tuple) else (key, 0)
        return torch.from_numpy(self.pixels(number, epoch).copy()).permute(2, 0, 1), int(self.index.label[number])

    def shape_of(self, number: int) -> tuple[int, int, int]:
        """Of an image as `fill` writes it."""
        return (*sides_of(self._size_of(number)), 3)

    def _size_of(self, number: int) -> Size:
        return self.size.shapes[self.size.of[number]] if isinstance(self.size, Buckets) else self.size

    def fill(self, numbers: Sequence[int], out: np.ndarray) -> tuple[list[int], list[BadSample]]:
        """Write images to `out` [B, H, W, 3]; (labels of those that could be written, what had to be left out)."""
        labels, bad = [], []
        for number in numbers:
            try:
                out[len(labels)] = self.pixels(number, 0)
                labels.append(int(self.index.label[number]))
            except BadSampleError as error:
                bad.append(error.sample)
        return labels, bad

    def pixels(self, number: int, epoch: int) -> np.ndarray:
        """One view: uint8 [H, W, 3], read-only."""
        image, size = self._image(number), self._size_of(number)
        match self.augment:
            case None:
                return square(image, size)
            case FixedView(zoom=zoom, x=x, y=y, flip=flip):
                return view(image, size, zoom=zoom, x=x, y=y, flip=flip)
        rng = np.random.default_rng([self.seed, epoch, number])
        return random_square(image, size, self.augment, rng)

    def _image(self, number: int):
        if self._decoded is None:
            return self._decode(number)
        if number not in self._decoded:
            self._decoded[number] = self._decode(number)
        return self._decoded[number]

    def _decode(self, number: int):
        entry = self.index[number]
        problem = entry.problem or self._bad.get(number)
        if problem is None:
            try:
                return decode_rgb(self.store.read(entry))
            except OSError as error:  # the shard may come back
                problem = str(error)
            except ValueError as error:
                problem = self._bad[number] = str(error)
        raise BadSampleError(BadSample(entry.shard, self.index.key(number), problem, number=number))


class ImageStream(BatchSource):
    """(images uint8 [B, 3, H, W], labels [B], bad samples) for a list of positions of an order.

    A sample that can't be used is replaced by the next good one of its stream, whatever the ranks and workers.
    """

    def __init__(self, sets: Sequence[ImageDataset], order: Order):
        self.sets, self.order = sets, order

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Of an image as `fill` writes it, or of the largest."""
        return self.sets[0].sample_shape

    def shape_of(self, position: int) -> tuple[int, int, int]:
        """Of the image at a position."""
        source, number, _ = self.order.locate(position)
        return self.sets[source].shape_of(number)

    def fill(self, positions: Sequence[int], out: np.ndarray) -> tuple[list[int], list[BadSample]]:
        """Write images to `out` [B, H, W, 3]; (their labels, the samples that were replaced)."""
        labels, bad = [], []
        for place, position in enumerate(positions):
            out[place], label, problem = self._first_good(position)
            labels.append(label)
            if problem is not None:
                bad.append(problem._replace(position=position))
        return labels, bad

    def _first_good(self, position: int) -> tuple[np.ndarray, int, BadSample | None]:
        """(pixels, label, what is wrong with the sample that stands at the position)."""
        problem = None
        for turn in range(GIVE_UP):
            source, number, epoch = self.order.locate(position, turn)
            chosen = self.sets[source]
            try:
                return chosen.pixels(number, epoch), int(chosen.index.label[number]), problem
            except BadSampleError as error:
                problem = problem or error.sample
        raise UserError(f"{GIVE_UP:,} samples in a row can't be used, the first: {BadSampleError(problem)}")


class Subset(BatchSource):
    """Some images of a set, in the form of the whole set."""

    def __init__(self, dataset: ImageDataset, numbers: Sequence[int]):
        self.dataset, self.numbers, self.sample_shape = dataset, numbers, dataset.sample_shape

    def __len__(self) -> int:
        return len(self.numbers)

    def shape_of(self, place: int) -> tuple[int, int, int]:
        """As the set's own."""
        return self.dataset.shape_of(self.numbers[place])

    def fill(self, places: Sequence[int], out: np.ndarray) -> tuple[list[int], list[BadSample]]:
        """As the set's own."""
        return self.dataset.fill([self.numbers[place] for place in places], out)


class ShardSequence(Sequence[ImageDataset]):
    """The shards of an unindexed place, each a set of its own that `build` makes when it is first asked for."""

    def __init__(self, shards: Sequence[str], build: Callable[[str], ImageDataset]):
        self.shards = list(shards)
        self._build = lru_cache(maxsize=None)(lambda number: build(self.shards[number]))

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> ImageDataset:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._build(number)

    def __iter__(self) -> Iterator[ImageDataset]:
        return (self[number] for number in range(len(self)))


class ArrivalOrder:
    """The samples as they stand in their shards, one after the other, and again from the start: no shuffling.

    How many there are is known only when the last shard has been read.
    """

    size, unit = None, 1

    def __init__(self, sets: Sequence[ImageDataset], streams: int, place: str):
        self.sets, self.streams, self.place = sets, streams, place
        self._ends: list[int] = []  # how many samples the first shard holds, the first two, ...

    def describe(self) -> dict:
        """What the sequence depends on."""
        return {"size": None, "streams": self.streams, "place": self.place}

    def locate(self, position: int, later: int = 0) -> Location:
        """What stands at a position, or so many further on."""
        position += later
        while len(self._ends) < len(self.sets) and (not self._ends or self._ends[-1] <= position):
            self._ends.append(len(self.sets[len(self._ends)]) + (self._ends[-1] if self._ends else 0))
        if self._ends[-1] == 0:
            raise UserError(f"no images in the shards {self.place!r}")
        epoch, place = divmod(position, self._ends[-1]) if position >= self._ends[-1] else (0, position)
        shard = int(np.searchsorted(self._ends, place, side="right"))
        return Location(shard, place - (self._ends[shard - 1] if shard else 0), epoch)
