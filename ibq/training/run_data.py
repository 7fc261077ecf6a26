"""What a run reads: training batches by position, validation batches, and where the data comes from."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ibq import dist
from ibq.config import UserError
from ibq.data.buckets import Buckets, PicturesByBucket, bucketed
from ibq.data.codes import CodeDataConfig, CodeDataset, CodesMeta, CodeStream
from ibq.data.counts import BadSample, PictureCount, count
from ibq.data.images import (
    ArrivalOrder,
    BadSampleError,
    BatchSource,
    ImageDataset,
    ImageStream,
    ShardSequence,
)
from ibq.data.index import ImageIndex
from ibq.data.loader import Report, training_batches, validation_batches
from ibq.data.order import Batching, BucketedOrder, MixedOrder, Order, StreamOrder
from ibq.data.shards import ImageDataConfig, class_lists, expand_place, is_unindexed, read_index, split_sources
from ibq.data.transforms import Size, sides_of
from ibq.progress import bar_of, say
from ibq.training.checkpoint import TrainingState


@dataclass(kw_only=True)
class RunData:
    """The data of one run, as its loop sees it."""

    stream: ImageStream | CodeStream
    order: Order
    validation_sets: "Sequence[ConcatenatedSets] | Sequence[CodeDataset]"  # each of pictures of one shape
    classes: list[str]
    validation_classes: list[str]
    workers: int
    max_bad_fraction: float = 0.0
    provenance: Mapping = field(default_factory=dict)  # what is written beside the best weights
    pixels_per_image: float | None = None  # of images, on the mean where their shapes differ
    allow_other: bool = False  # go on with codes of another tokenizer
    batching: Batching | None = None
    device: torch.device | None = None
    validation_limit: int | None = None

    def bind(self, batch_size: int, micro_batch: int, validation_limit: int | None, device: torch.device) -> None:
        """Set how the data is batched. ValueError that begins with the setting if it can't be."""
        size = self.order.size
        if size is not None and size < batch_size:
            raise ValueError(f"batch_size: the global batch {batch_size} exceeds the {size} training samples; lower it")
        self.batching = Batching(
            batch_size=batch_size,
            micro_batch=micro_batch,
            streams=self.order.streams,
            rank=dist.data_rank(),
            world_size=dist.data_world_size(),
        )
        self.validation_limit, self.device = validation_limit, device

    def describe(self) -> dict:
        """What the order of the data and their meaning depend on, for the checkpoint."""
        return {**self.order.describe(), **self.provenance}

    @property
    def steps_per_epoch(self) -> float:
        """Global batches in one pass over the data; infinite where its size is not known."""
        return float("inf") if self.order.size is None else self.order.size / self.batching.batch_size

    def training(self, position: int, steps: int, report: Report) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The micro-batches of so many steps from `position` on."""
        return training_batches(
            self.stream, self.batching, position, steps, workers=self.workers, device=self.device, report=report
        )

    def validation(self, report: Report) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation sets once, over all ranks; with a limit the first so many of each."""
        for part in self.validation_sets:
            yield from validation_batches(
                part,
                self.batching.micro_batch,
                rank=dist.data_rank(),
                world_size=dist.data_world_size(),
                workers=self.workers,
                device=self.device,
                limit=self.validation_limit,
                report=report,
            )

    def check_validation(self) -> None:
        """UserError on every rank if no validation picture can be used; it looks no further than the first good one."""
        for part in self.validation_sets:
            if isinstance(part, BatchSource):
                dist.on_main(partial(self._first_good, part))

    def _first_good(self, part: "ConcatenatedSets") -> None:
        numbers, first = range(len(part))[: self.validation_limit], None
        for number in numbers:
            *_, bad = part.batch([number])
            if not bad:
                return
            first = first or bad[0]
        raise UserError(
            f"data.validation: none of its {len(numbers):,} pictures can be used, the first: {BadSampleError(first)}; "
            "give others, or set training.validate_every=null"
        )

    def count_pictures(self, bad: Sequence[BadSample], bad_validation: Sequence[BadSample]) -> dict[str, PictureCount]:
        """Place -> what became of its pictures, given those that could not be used; nothing where codes are read.

        Used is what the batches are drawn from, seen yet or not. Of shards that are read in the order in which they
        arrive, other processes alone know how many pictures they hold: they are not counted.
        """
        if not isinstance(self.validation_sets[0], ConcatenatedSets):
            return {}
        sets = list(self.stream.sets) if isinstance(self.stream.sets, list) else []
        counts = {}
        for number, part in enumerate(sets):
            name = "data.train" if len(sets) == 1 else f"data.sources[{number}].train"
            counts[name] = count(part.index, bad=bad)
        return counts | self.validation_sets[0].count_pictures(self.validation_limit, bad_validation)

    def resume_position(self, saved: TrainingState) -> int:
        """Where a run goes on: where it was, or at the next epoch if its data or their order are others now."""
        now, then = self.describe(), saved.order
        if then == now:
            return saved.position
        if then.get("tokenizer") != now.get("tokenizer") and not self.allow_other:
            raise UserError(
                "data.train: codes of another tokenizer than this run has trained on; give those, "
                "start over with --fresh, or set data.allow_other_tokenizer=true"
            )
        epoch = saved.position // then["size"] + 1 if then.get("size") else 0
        changed = ", ".join(name for name in now if now[name] != then.get(name)) or "settings"
        if dist.is_main():
            say(f"note: the data are not those of the checkpoint (other {changed}); going on with epoch {epoch + 1}")
        first, unit = epoch * (self.order.size or 0), self.order.unit
        return math.ceil(first / unit) * unit


# --- Images ---


def image_data(config: ImageDataConfig, size: Size, seed: int, batch_size: int | None = None) -> RunData:
    """The images of a config at a size, or in its buckets, of which each step of `batch_size` takes one.

    Rank 0 indexes them first, with a progress bar.
    """
    if config.unindexed == "in_order" and is_unindexed(config.train, config):
        return _images_in_order(config, size, seed)
    train, validation = dist.main_first(lambda: split_sources(config, _report))
    if config.buckets:
        return _bucketed_data(config, train[0], validation[0], seed, batch_size)
    stream, order = _image_stream(config, train, size, seed)
    return RunData(
        stream=stream,
        order=order,
        validation_sets=[_validation_set(config, validation, size)],
        classes=_common_classes(train),
        validation_classes=_common_classes(validation),
        workers=config.workers,
        max_bad_fraction=config.max_bad_fraction,
        pixels_per_image=math.prod(sides_of(size)),
    )


def _bucketed_data(
    config: ImageDataConfig, train: ImageIndex, validation: ImageIndex, seed: int, batch_size: int
) -> RunData:
    """Pictures of several shapes, each at that of its bucket; every step is of one."""
    sizes = dist.main_first(lambda: [bucketed(index, config, _report_sizes(config)) for index in (train, validation)])
    order = PicturesByBucket(
        train, sizes[0], batch_size=batch_size, seed=seed, streams=config.streams, window=config.shuffle_window
    )
    _say_problems(train)
    _say_buckets(sizes[0])
    store = config.store([train])
    dataset = ImageDataset(train, sizes[0], augment=config.augment, seed=seed, in_memory=config.in_memory, store=store)
    return RunData(
        stream=ImageStream([dataset], order),
        order=order,
        validation_sets=[_validation_set(config, [validation], sizes[1])],
        classes=train.classes,
        validation_classes=validation.classes,
        workers=config.workers,
        max_bad_fraction=config.max_bad_fraction,
        pixels_per_image=sizes[0].mean_pixels(),
    )


def _say_buckets(buckets: Buckets) -> None:
    if dist.is_main():
        parts = [
            f"{len(members):,} at {height} x {width}"
            for (height, width), members in zip(buckets.shapes, buckets.members, strict=True)
        ]
        say(f"buckets (height x width): {', '.join(parts)}")


def _image_stream(config: ImageDataConfig, train: Sequence[ImageIndex], size: Size, seed: int):
    store = config.store(train)
    sets = [
        ImageDataset(index, size, augment=config.augment, seed=seed, in_memory=config.in_memory, store=store)
        for index in train
    ]
    orders = [
        StreamOrder(
            index.unit_sizes(),
            seed=seed,
            streams=config.streams,
            window=config.shuffle_window,
            name=number,
            identity={"images": index.fingerprint()},
        )
        for number, index in enumerate(train)
    ]
    order = orders[0]
    if len(orders) > 1:
        try:
            order = MixedOrder(orders, [source.weight for source in config.sources], seed=seed)
        except ValueError as error:
            raise UserError(f"data.sources: {error}") from error
    for index in train:
        _say_problems(index)
    return ImageStream(sets, order), order


def _say_problems(index: ImageIndex) -> None:
    problems = index.problems()
    if problems and dist.is_main():
        number, reason = problems[0]
        say(
            f"note: {len(problems):,} of {len(index):,} training samples can't be used and will be replaced, the first "
            f"in shard {index[number].shard}: image {index.key(number)!r}: {reason}"
        )


def _validation_set(config: ImageDataConfig, indexes: Sequence[ImageIndex], size: Size | Buckets) -> "ConcatenatedSets":
    store = config.store(indexes)
    return ConcatenatedSets([ImageDataset(i, size, in_memory=config.in_memory, store=store) for i in indexes])


class ConcatenatedSets(BatchSource):
    """Several image sets, one after the other."""

    def __init__(self, sets: Sequence[ImageDataset]):
        self.sets, self.sample_shape = list(sets), sets[0].sample_shape
        self._ends = np.cumsum([len(part) for part in sets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def count_pictures(self, limit: int | None, bad: Sequence[BadSample]) -> dict[str, PictureCount]:
        """Set -> what became of its pictures, if only the first `limit` of all sets are taken."""
        counts = {}
        for number, (part, end) in enumerate(zip(self.sets, self._ends.tolist(), strict=True)):
            size = len(part)
            kept = size if limit is None else min(size, max(0, limit - (end - size)))
            index = part.index.subset(range(kept), "beyond training.validation_images")
            name = "data.validation" if len(self.sets) == 1 else f"data.sources[{number}].validation"
            counts[name] = count(index, bad=bad)
        return counts

    def _place(self, number: int) -> tuple[ImageDataset, int]:
        """(set, number in it)."""
        part = int(np.searchsorted(self._ends, number, side="right"))
        return self.sets[part], number - (int(self._ends[part]) - len(self.sets[part]))

    def shape_of(self, number: int) -> tuple[int, int, int]:
        """Of an image as `fill` writes it."""
        part, own = self._place(number)
        return part.shape_of(own)

    def fill(self, numbers: Sequence[int], out: np.ndarray) -> tuple[list[int], list[BadSample]]:
        """Write the images of these numbers; see ImageDataset.fill."""
        labels, bad = [], []
        for number in numbers:
            part, own = self._place(number)
            found, problems = part.fill([own], out[len(labels) :])
            labels += found
            bad += problems
        return labels, bad


def _common_classes(indexes: Sequence[ImageIndex] | Sequence[CodesMeta]) -> list[str]:
    """The class names of all sets; none where they differ: then labels say nothing."""
    classes = indexes[0].classes
    return classes if all(index.classes == classes for index in indexes) else []


def _images_in_order(config: ImageDataConfig, size: Size, seed: int) -> RunData:
    """Shards without index, read one after the other."""
    if config.validation is None:
        raise UserError("data.validation: needed with data.unindexed=in_order, as nothing can be held out unseen")
    _, validation = dist.main_first(
        lambda: split_sources(ImageDataConfig(**{**vars(config), "train": config.validation}), _report)
    )
    shards, store = expand_place(config.train), config.store()
    try:  # without labels it does not matter whether the folders' classes can be matched
        lists = class_lists(shards if config.labels else shards[:1])
    except UserError as error:
        raise UserError(f"data.train: {error}") from error
    classes = lists.names or validation[0].classes

    def build(shard: str) -> ImageDataset:
        index = read_index(shard, config, store)
        part = ImageIndex([(shard, lists.renumbered(shard, index))], classes, labelled=config.labels)
        return ImageDataset(part, size, augment=config.augment, seed=seed, in_memory=config.in_memory, store=store)

    sets = ShardSequence(shards, build)
    order = ArrivalOrder(sets, config.streams, config.train)
    return RunData(
        stream=ImageStream(sets, order),
        order=order,
        validation_sets=[_validation_set(config, validation, size)],
        classes=classes,
        validation_classes=validation[0].classes,
        workers=config.workers,
        max_bad_fraction=config.max_bad_fraction,
        pixels_per_image=math.prod(sides_of(size)),
    )


def _report_sizes(config: ImageDataConfig) -> Callable[[int, int], None]:
    return bar_of(f"sizes of {config.train[-40:]}", "image", least=10_000, disable=not dist.is_main())


def _report(place: str) -> Callable[[int, int], None]:
    return bar_of(f"index {place[-40:]}", "part", least=8, disable=not dist.is_main())


# --- Codes ---


def code_data(config: CodeDataConfig, seed: int, batch_size: int) -> RunData:
    """The codes of a config. UserError if they were made with different tokenizers, or validation does not match."""
    train, validation = (_open_codes(config.places(part)) for part in ("train", "validation"))
    first = next(iter(train.values()))
    if not config.allow_other_tokenizer:
        _check_same_tokenizer(first, train | validation)
    _check_pairs(train, validation)
    orders = [part.order(seed, config.streams, name=number) for number, part in enumerate(train.values())]
    order = orders[0]
    if len(orders) > 1:
        try:
            weights = [source.weight for source in config.sources]
            order = BucketedOrder(orders, weights, batch_size=batch_size, seed=seed)
        except ValueError as error:
            raise UserError(f"data.sources: {error}") from error
    return RunData(
        stream=CodeStream([*train.values()], order),
        order=order,
        validation_sets=[*validation.values()],
        classes=_common_classes([part.meta for part in train.values()]),
        validation_classes=max((part.meta.classes for part in validation.values()), key=len),
        workers=config.workers,
        provenance={"tokenizer": first.meta.tokenizer},
        allow_other=config.allow_other_tokenizer,
    )


def _open_codes(places: Mapping[str, str]) -> dict[str, CodeDataset]:
    sets = {}
    for key, place in places.items():
        try:
            sets[key] = CodeDataset(place)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    return sets


def _check_same_tokenizer(first: CodeDataset, sets: Mapping[str, CodeDataset]) -> None:
    for key, part in sets.items():
        if part.meta.tokenizer != first.meta.tokenizer:
            raise UserError(
                f"{key}: made with another tokenizer than {next(iter(sets))}; encode both again, or set "
                "data.allow_other_tokenizer=true"
            )


def _check_pairs(train: Mapping[str, CodeDataset], validation: Mapping[str, CodeDataset]) -> None:
    """UserError unless validation has the classes and the grid of what it goes with."""
    for (key, own), (other_key, other) in zip(train.items(), validation.items(), strict=True):
        if other.meta.classes != own.meta.classes[: len(other.meta.classes)]:
            raise UserError(
                f"{other_key}: its classes are not those of {key}; give every class a folder with images in both"
            )
        grids = [" x ".join(map(str, part.meta.grid)) for part in (own, other)]
        if grids[0] != grids[1]:
            raise UserError(f"{other_key}: has {grids[1]} codes, {key} {grids[0]}; encode both at one --size")
