"""The order of the training data: a function of seed and position alone, exact epochs, the same for all ranks."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from support.training import CLASSES, png, write_images, write_shard

from ibq.data.codes import CodeDataset, CodesMeta, CodeStream, write_code_shard, write_codes_meta
from ibq.data.images import ImageDataset, ImageStream
from ibq.data.loader import training_batches, validation_batches
from ibq.data.order import CYCLE, Batching, BucketedOrder, MixedOrder, StreamOrder, shuffled
from ibq.data.shards import ImageDataConfig, SourceConfig, open_images, split_sources
from ibq.data.transforms import AugmentConfig
from ibq.training.run_data import image_data

CPU = torch.device("cpu")
# Shards of these sizes, streams, window: more streams than samples, empty shards, one shard, windows across shards.
SHAPES = [([5, 0, 7, 3], 4, 3), ([1] * 40, 192, 8), ([10, 20, 3], 1, 100), ([90, 90, 73], 12, 16), ([0, 3, 0, 2], 3, 2)]


def make(sizes=(13, 20, 7), streams=8, window=4, seed=3, name=0):
    return StreamOrder(sizes, seed=seed, streams=streams, window=window, name=name)


def numbers(order, start, stop):
    return [order.locate(position).number for position in range(start, stop)]


# --- One set ---


@pytest.mark.parametrize(("sizes", "streams", "window"), SHAPES)
def test_epochs_are_exact(sizes, streams, window):
    order = make(sizes, streams, window)
    for epoch in range(5):
        found = [order.locate(p) for p in range(epoch * order.size, (epoch + 1) * order.size)]
        assert sorted(location.number for location in found) == list(range(sum(sizes)))
        assert {location.epoch for location in found} == {epoch}


@pytest.mark.parametrize(("sizes", "streams", "window"), SHAPES)
def test_any_position_can_be_asked_for_first(sizes, streams, window):
    straight = numbers(make(sizes, streams, window), 0, 150)
    order = make(sizes, streams, window)
    for position in shuffled(150, 7).tolist():
        assert order.locate(position).number == straight[position]


def test_epochs_and_seeds_differ():
    order, other = make([200]), make([200], seed=4)
    assert numbers(order, 0, 200) != numbers(order, 200, 400) != numbers(other, 0, 200)
    assert numbers(make([200], name=1), 0, 200) != numbers(order, 0, 200)
    assert numbers(order, 0, 200) != list(range(200))


def test_the_order_is_that_of_every_version():
    """A run that goes on with another NumPy must go on with the same order: these numbers may never change."""
    assert shuffled(8, 1, 2, 3).tolist() == [1, 3, 7, 5, 2, 0, 4, 6]
    assert numbers(make(), 0, 12) == [22, 3, 39, 16, 32, 9, 11, 29, 21, 4, 36, 17]


def test_a_stream_reads_its_piece_window_by_window():
    """Ten shards of 100 samples, five streams: what is read at one time lies close together."""
    order = make([100] * 10, streams=5, window=25)
    for stream in range(5):
        piece = [order.locate(position).number for position in range(stream, 1000, 5)]
        assert len(set(piece)) == 200 and len({number // 100 for number in piece}) <= 4
        for start in range(0, 200, 25):
            window = sorted(piece[start : start + 25])
            runs = np.flatnonzero(np.diff(window) != 1)
            assert len(runs) <= 1, "a window is a stretch of the row of shards, across one border at most"
            assert piece[start : start + 25] != window


def test_every_pair_of_samples_meets():
    """Pieces are cut elsewhere in every epoch, or samples of the same piece would never share a batch."""
    order = make([8], streams=2, window=4)
    together = Counter()
    for epoch in range(400):
        row = numbers(order, epoch * 8, epoch * 8 + 8)
        for start in range(0, 8, 2):
            together[frozenset(row[start : start + 2])] += 1
    assert len(together) == 28 and min(together.values()) > 10


def test_an_empty_set_has_no_order():
    with pytest.raises(ValueError, match="no sample"):
        make([0, 0])


# --- Several sets ---


def mixed(weights=(3, 1), sizes=((100,), (30,)), streams=4):
    return MixedOrder([make(s, streams=streams, name=i) for i, s in enumerate(sizes)], weights, seed=0)


def test_sets_are_mixed_by_weight_and_each_keeps_exact_epochs():
    order = mixed((2, 1, 1), ((100,), (30, 11), (9,)))
    found = [order.locate(position) for position in range(CYCLE * 4)]
    assert Counter(location.source for location in found) == {0: CYCLE * 2, 1: CYCLE, 2: CYCLE}
    assert Counter(location.source for location in found[:400]) != {0: 200, 1: 100, 2: 100}, "in no fixed pattern"
    for source, size in enumerate((100, 41, 9)):
        seen = Counter((loc.epoch, loc.number) for loc in found if loc.source == source)
        assert max(seen.values()) == 1
        epochs = Counter(epoch for epoch, _ in seen)
        assert all(epochs[epoch] == size for epoch in range(max(epochs) - 1)), "a whole epoch holds all samples"


def test_mixed_positions_can_be_asked_for_in_any_order():
    straight = [mixed().locate(position) for position in range(300)]
    order = mixed()
    assert [order.locate(position) for position in reversed(range(300))] == straight[::-1]


def test_a_weight_that_is_too_small():
    with pytest.raises(ValueError, match="weight"):
        mixed((1e6, 1))


# --- Buckets ---


def bucketed(weights=(2, 1, 1), sizes=((30, 31), (25,), (9, 8)), streams=8, batch_size=6):
    orders = [make(s, streams=streams, name=i) for i, s in enumerate(sizes)]
    return BucketedOrder(orders, weights, batch_size=batch_size, seed=0)


def test_every_step_is_of_one_bucket_and_each_bucket_keeps_exact_epochs():
    order = bucketed()
    steps = [[order.locate(position) for position in range(k * 6, k * 6 + 6)] for k in range(CYCLE)]
    assert all(len({location.source for location in step}) == 1 for step in steps)
    assert Counter(step[0].source for step in steps) == {0: CYCLE // 2, 1: CYCLE // 4, 2: CYCLE // 4}
    assert Counter(step[0].source for step in steps[:400]) != {0: 200, 1: 100, 2: 100}, "in no fixed pattern"
    for bucket, size in enumerate((61, 25, 17)):
        row = [(loc.epoch, loc.number) for step in steps for loc in step if loc.source == bucket]
        assert sorted(row[: 3 * size]) == [(epoch, number) for epoch in range(3) for number in range(size)]
        own = bucketed().orders[bucket]
        assert row == [(loc.epoch, loc.number) for loc in map(own.locate, range(len(row)))], "its own order, unbroken"


def test_bucketed_positions_can_be_asked_for_in_any_order():
    straight = [bucketed().locate(position) for position in range(300)]
    order = bucketed()
    assert [order.locate(position) for position in reversed(range(300))] == straight[::-1]


@pytest.mark.parametrize(("streams", "batch_size"), [(8, 6), (8, 16), (24, 36), (6, 4)])
def test_a_rank_owns_the_same_streams_of_every_bucket(streams, batch_size):
    """So it reads its share of every bucket, whatever stands for samples that can't be used."""
    order = bucketed(streams=streams, batch_size=batch_size)
    owners, steps = {}, Counter()  # (bucket, stream) -> ranks; bucket -> its steps before
    for step in range(40):
        start = step * batch_size
        bucket = order.locate(start).source
        for rank in range(2):
            for position in batching(batch_size, 1, streams, rank, 2).positions(start):
                inner = steps[bucket] * batch_size + position - start
                assert order.locate(position) == order.orders[bucket].locate(inner)._replace(source=bucket)
                owners.setdefault((bucket, inner % streams), set()).add(rank)
        steps[bucket] += 1
    assert len(owners) == 3 * streams and all(len(ranks) == 1 for ranks in owners.values())


def test_what_the_order_of_buckets_depends_on():
    description = bucketed().describe()
    assert description["batch_size"] == 6 and description["size"] == 103 and len(description["buckets"]) == 3
    assert json.loads(json.dumps(description)) == description, "a checkpoint compares what it has read"
    assert bucketed(batch_size=8).describe() != description != bucketed((1, 1, 2)).describe()
    assert bucketed().unit == 6 and mixed().unit == make().unit == 1


@pytest.mark.parametrize("order", [make(), mixed(), bucketed(batch_size=8)])
def test_a_later_turn_is_of_the_same_stream(order):
    """The next position of the stream; of a bucketed order, in the steps of the same bucket."""
    later = [order.locate(position, 1) for position in range(8)]
    bucket = order.locate(0).source
    straight = [order.locate(position) for position in range(order.streams, 120)]
    if isinstance(order, BucketedOrder):
        straight = [location for location in straight if location.source == bucket]
    assert later == straight[:8]


# --- Batches and ranks ---


def batching(batch_size=48, micro_batch=2, streams=64, rank=0, world_size=1):
    return Batching(batch_size=batch_size, micro_batch=micro_batch, streams=streams, rank=rank, world_size=world_size)


@pytest.mark.parametrize(("batch_size", "streams"), [(48, 64), (8, 192), (192, 8), (24, 24), (40, 24)])
@pytest.mark.parametrize("start", [0, 5, 1001])
def test_ranks_share_the_global_batch(batch_size, streams, start):
    for world_size in (1, 2, 4, 8):
        shares = [batching(batch_size, 1, streams, rank, world_size) for rank in range(world_size)]
        owned = [set() for _ in shares]
        for step in range(50):
            first = start + step * batch_size
            parts = [p.positions(first) for p in shares]
            assert {len(part) for part in parts} == {batch_size // world_size}
            whole = list(itertools.chain.from_iterable(parts))
            assert whole == batching(batch_size, 1, streams).positions(first), (
                "joined they are the batch of one process"
            )
            assert sorted(whole) == list(range(first, first + batch_size))
            for own, part in zip(owned, parts, strict=True):
                own.update(position % streams for position in part)
        assert sum(map(len, owned)) == streams and len(set.union(*owned)) == streams, "every stream has one owner"


def test_micro_batches_cut_a_ranks_part():
    whole = list(batching(micro_batch=24, world_size=2, rank=1).micro_batches(96, 3))
    parts = list(batching(micro_batch=4, world_size=2, rank=1).micro_batches(96, 3))
    assert len(whole) == 3 and [len(part) for part in parts] == [4] * 18
    assert list(itertools.chain.from_iterable(whole)) == list(itertools.chain.from_iterable(parts))


def test_impossible_plans():
    for settings, words in (
        ({"micro_batch": 5}, "micro_batch"),
        ({"micro_batch": 48, "world_size": 2}, "micro_batch"),
        ({"batch_size": 50, "micro_batch": 1, "world_size": 5}, "streams: 64 .* 5 ranks.*65"),
    ):
        with pytest.raises(ValueError, match=words):
            batching(**settings)


# --- Batches of images ---


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def stream(shards):
    return image_stream(str(shards / "train-*.tar"))


def image_stream(place, *, streams=8, augment=AugmentConfig(max_zoom=1.5), in_memory=False):  # noqa: B008
    index = open_images(place)
    order = make(index.unit_sizes(), streams=streams)
    return ImageStream([ImageDataset(index, 16, augment=augment, seed=5, in_memory=in_memory)], order)


def batches(stream, start, steps, *, workers=0, micro_batch=8, rank=0, world_size=1):
    """The joined micro-batches of each step."""
    chosen = batching(8, micro_batch, stream.order.streams, rank, world_size)
    steps = training_batches(stream, chosen, start, steps, workers=workers, device=CPU)
    return [tuple(torch.cat(parts) for parts in zip(*step, strict=True)) for step in steps]


def assert_same_batches(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def of_ranks(stream, start, steps, world_size, workers, micro_batch=1):
    parts = [
        batches(stream, start, steps, workers=workers, micro_batch=micro_batch, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    return [tuple(torch.cat(both) for both in zip(*step, strict=True)) for step in zip(*parts, strict=True)]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 1), (1, 3), (2, 0), (2, 3), (4, 0), (4, 1)])
def test_batches_are_the_same_for_all_ranks_and_workers_also_when_resumed(stream, world_size, workers):
    expected = batches(stream, 0, 12)  # over two borders between epochs, 40 samples each
    assert_same_batches(of_ranks(stream, 0, 12, world_size, workers), expected)
    assert_same_batches(of_ranks(stream, 7 * 8, 5, world_size, workers), expected[7:])
    assert not torch.equal(expected[0][0], expected[5][0])


def test_no_sample_is_lost_or_doubled_over_an_epoch(shards):
    """By key, for 1, 2 and 4 ranks, changing in the middle."""
    index = open_images(str(shards / "train-*.tar"))
    order = make(index.unit_sizes())
    keys = []
    for start, steps, world_size in ((0, 2, 1), (16, 1, 4), (24, 2, 2)):
        for rank in range(world_size):
            for positions in batching(8, 2, 8, rank, world_size).micro_batches(start, steps):
                keys += [index.key(order.locate(position).number) for position in positions]
    assert sorted(keys) == sorted(index.key(i) for i in range(40)) and len(set(keys)) == 40


def test_a_larger_batch_goes_on_where_the_smaller_stopped(stream):
    order = stream.order
    small = [p for positions in batching(8, 8, 8).micro_batches(0, 3) for p in positions]
    large = [p for positions in batching(16, 16, 8).micro_batches(24, 1) for p in positions]
    assert sorted(order.locate(p).number for p in small + large) == list(range(40))


def test_each_rank_reads_its_share(shards, stream):
    for world_size in (2, 4):
        for rank in range(world_size):
            positions = itertools.chain.from_iterable(batching(8, 1, 8, rank, world_size).micro_batches(0, 5))
            index = stream.sets[0].index
            share = sum(int(index.size[stream.order.locate(p).number]) for p in positions) / int(index.size.sum())
            assert share == pytest.approx(1 / world_size, abs=0.05)


def test_batches_do_not_depend_on_memory_and_micro_batch(shards, stream):
    place = str(shards / "train-*.tar")
    expected = batches(stream, 0, 7)
    assert_same_batches(batches(stream, 0, 7, micro_batch=2, workers=1), expected)
    assert_same_batches(batches(image_stream(place, in_memory=True), 0, 7), expected)
    assert not torch.equal(expected[0][0], batches(image_stream(place, augment=None), 0, 1)[0][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_numbers_alone(stream, workers):
    """Dropout after a restart depends on it."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches(stream, 0, 1, workers=workers)
    assert torch.equal(torch.rand(3), expected)


def test_batches_are_bytes_until_the_device(stream):
    images, labels = batches(stream, 0, 1)[0]
    assert images.dtype == torch.uint8 and images.shape == (8, 3, 16, 16) and labels.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_sources_are_mixed(tmp_path):
    """The second set has one red picture only: its share of the batches is its weight's."""
    write_images(tmp_path / "a")
    red = np.full((16, 16, 3), (255, 0, 0), np.uint8)
    write_shard(tmp_path / "b.tar", {"r.png": png(Image.fromarray(red)), "r.cls": b"1"})
    sources = (
        SourceConfig(train=f"{tmp_path}/a/train-*.tar", weight=1),
        SourceConfig(train=f"{tmp_path}/b.tar", weight=3),
    )
    config = ImageDataConfig(sources=sources, validation=f"{tmp_path}/a/val-0.tar", streams=8, workers=0)
    data = image_data(config, 16, 0)
    data.bind(8, 8, None, CPU)
    images = torch.cat([images for step in data.training(0, 1000, lambda bad: None) for images, _ in step])
    share = (images == torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)).all(dim=(1, 2, 3))
    assert share.float().mean() == pytest.approx(0.75, abs=1e-6)
    train, validation = split_sources(config)
    assert len(train) == 2 and len(validation) == 1 and len(data.validation_sets[0]) == 8


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_takes_every_sample_once(shards, world_size):
    dataset = ImageDataset(open_images(str(shards / "val-*.tar")), 16)

    def images(**settings):
        parts = [
            images
            for rank in range(world_size)
            for images, _ in validation_batches(dataset, 3, rank=rank, world_size=world_size, device=CPU, **settings)
        ]
        return sorted(image.flatten().tolist() for image in torch.cat(parts))

    assert images() == sorted(dataset[i][0].flatten().tolist() for i in range(8))
    assert images(workers=2) == images()
    assert len(images(limit=4)) == 4


# --- Batches of codes ---


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (4, 1)])
def test_codes_come_in_the_same_order(tmp_path, world_size, workers):
    meta = CodesMeta(num_codes=99, grid=(2, 2), classes=["a"] * CLASSES, tokenizer="hash", rows=[20, 7, 13])
    for number, rows in enumerate(meta.rows):
        first = sum(meta.rows[:number])
        codes = np.repeat(np.arange(first, first + rows)[:, None], 4, axis=1)
        write_code_shard(tmp_path, number, codes, np.arange(first, first + rows) % CLASSES, meta)
    write_codes_meta(tmp_path, meta)
    dataset = CodeDataset(tmp_path)
    stream = CodeStream([dataset], dataset.order(seed=1, streams=8))
    expected = batches(stream, 0, 10)
    assert_same_batches(of_ranks(stream, 0, 10, world_size, workers), expected)
    assert_same_batches(of_ranks(stream, 32, 6, world_size, workers), expected[4:])
    first_epoch = torch.cat([codes.flatten(1) for codes, _ in expected[:5]])
    assert sorted(first_epoch[:, 0].tolist()) == list(range(40)), "across the borders of the files"
    assert (first_epoch == first_epoch[:, :1]).all()
    assert torch.equal(torch.cat([labels for _, labels in expected[:5]]), first_epoch[:, 0] % CLASSES)
    assert json.loads((tmp_path / "meta.json").read_text())["rows"] == [20, 7, 13]
