"""Pictures in their own aspect ratios: sizes from headers, the nearest bucket, batches of one shape."""

import io
import itertools
import os

import numpy as np
import pytest
import torch
from PIL import Image
from support.training import picture, png, write_shard

from ibq.config import ConfigError, UserError, parse_config
from ibq.data.buckets import HEADER, Buckets, PicturesByBucket, bucketed, nearest, read_sizes
from ibq.data.images import ImageDataset
from ibq.data.loader import validation_batches
from ibq.data.shards import ImageDataConfig, open_images
from ibq.data.transforms import AugmentConfig, decode_rgb, random_square, upright_size, view
from ibq.evaluation.reconstruction import KeptImages, in_blocks
from ibq.training.ar_config import TokenizedImagesConfig
from ibq.training.checkpoint import TrainingState
from ibq.training.run_data import image_data
from ibq.training.tokenizer_config import TokenizerRunConfig

CPU = torch.device("cpu")
SHAPES = ((16, 16), (12, 20), (20, 12))
SIZES = ((16, 16), (15, 30), (40, 20))  # heights and widths of pictures; the n-th has the n-th in turn
COUNT, DAMAGED = 48, (7, 24, 33)


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def photo(number: int) -> Image.Image:
    height, width = SIZES[number % 3]
    return picture(number, 40).resize((width, height))


def write_set(folder, damaged=()):
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(2):
        members = {}
        for i in range(part * COUNT // 2, (part + 1) * COUNT // 2):
            members |= {f"{i:04d}.png": b"no picture" if i in damaged else png(photo(i)), f"{i:04d}.cls": b"0"}
        write_shard(folder / f"train-{part}.tar", members)
    members = {f"{i:04d}.png": png(photo(i)) for i in range(10)} | {f"{i:04d}.cls": b"0" for i in range(10)}
    write_shard(folder / "val.tar", members)


def config_of(folder, **settings) -> ImageDataConfig:
    place = {"train": f"{folder}/train-*.tar", "validation": f"{folder}/val.tar", "cache_folder": str(folder / "cache")}
    return ImageDataConfig(**place | {"workers": 0, "streams": 8, "buckets": SHAPES, **settings})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_set(folder)
    return folder


# --- The nearest bucket ---


def test_pictures_go_to_the_nearest_ratio():
    sizes = np.array([[100, 100], [300, 500], [500, 300], [10, 1000], [1000, 1100], [100, 130], [0, 0], [0, 0]])
    assert nearest(SHAPES, sizes).tolist() == [0, 1, 2, 1, 0, 1, 1, 1], "unknown ones join the most"
    assert nearest(((16, 16), (16, 64)), np.array([[100, 200], [100, 199], [100, 201]])).tolist() == [0, 0, 1]
    assert nearest(SHAPES, np.zeros((2, 2), np.int32)).tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_are_those_of_the_picture_as_it_is_shown(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(0, 40).resize((40, 24)), kind, exif=exif)
    assert upright_size(data) == ((40, 24) if orientation in (6, 8) else (24, 40)) == decode_rgb(data).size[::-1]


def test_a_header_is_enough_and_a_long_one_is_read_whole(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8))
    data = encoded(noise, "PNG")
    assert len(data) > HEADER and upright_size(data[:HEADER]) == (300, 200)
    late = encoded(photo(1), "JPEG", exif=b"Exif\0\0" + bytes(60_000), icc_profile=bytes(60_000))
    with pytest.raises(ValueError, match="not a readable picture"):
        upright_size(late[:HEADER])
    for name, content in {"a.png": data, "b.jpg": late, "c.png": b"no picture"}.items():
        (tmp_path / name).write_bytes(content)
    config = ImageDataConfig(train=str(tmp_path), labels=False, cache_folder=str(tmp_path / ".cache"))
    told = []
    sizes = read_sizes(open_images(str(tmp_path), config), config, lambda done, total: told.append((done, total)))
    assert sizes.tolist() == [[300, 200], list(SIZES[1]), [0, 0]] and told == [(3, 3)]


def test_sizes_are_read_once(tmp_path):
    (tmp_path / "a.png").write_bytes(png(photo(1)))
    config = ImageDataConfig(train=str(tmp_path), labels=False, cache_folder=str(tmp_path / ".cache"))

    def sizes() -> list:
        return read_sizes(open_images(str(tmp_path), config), config, lambda done, total: None).tolist()

    assert sizes() == [[15, 30]]
    (file,) = (tmp_path / ".cache/sizes").iterdir()
    np.save(file, np.array([[7, 8]], np.int32))
    assert sizes() == [[7, 8]], "from the cache"
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert sizes() == [[15, 30]], "of a file that was written again"
    for file in (tmp_path / ".cache/sizes").iterdir():
        file.write_bytes(b"damaged")
    assert sizes() == [[15, 30]]


def test_sizes_of_pictures_on_urls(whole, tmp_path):
    """Their shards are fetched, each once."""
    log = tmp_path / "fetched"
    place = f"pipe:echo x >> {log}; cat {whole}/train-{{0..1}}.tar"
    config = config_of(tmp_path, train=place, validation=f"{whole}/val.tar")
    index = open_images(place, config)
    for _ in range(2):
        assert read_sizes(index, config, lambda done, total: None).tolist() == [
            list(SIZES[i % 3]) for i in range(COUNT)
        ]
    assert log.read_text().splitlines() == ["x", "x"], "for the index and the sizes together"


# --- Views ---


@pytest.mark.parametrize("shape", SHAPES)
def test_a_view_covers_its_bucket_without_distortion(shape):
    """A picture of coordinates: every pixel tells where it comes from."""
    height, width = shape
    across, down = np.meshgrid(np.linspace(0, 250, 100), np.linspace(0, 250, 60))
    image = Image.fromarray(np.stack([across, down, 0 * across], axis=-1).astype(np.uint8))
    pixels = view(image, shape, zoom=1.0, x=0.5, y=0.5, flip=False).astype(int)
    assert pixels.shape == (height, width, 3)
    seen = [np.ptp(pixels[..., 0]) / 250 * 100, np.ptp(pixels[..., 1]) / 250 * 60]
    scale = min(100 / width, 60 / height)
    assert seen == pytest.approx([scale * (width - 1), scale * (height - 1)], abs=4), "one scale for both sides"
    left = view(image, shape, zoom=2.0, x=0.0, y=0.0, flip=False).astype(int)
    assert np.ptp(left[..., 0]) == pytest.approx(np.ptp(pixels[..., 0]) / 2, abs=6) and left[0, 0, :2].max() < 8
    mirrored = view(image, shape, zoom=2.0, x=0.0, y=0.0, flip=True)
    assert np.array_equal(mirrored, left[:, ::-1])
    still = AugmentConfig(flip=False, crop=False)
    assert np.array_equal(random_square(image, shape, still, np.random.default_rng(0)), pixels)


@pytest.mark.parametrize("size", [(16, 16), (100, 60), (31, 97), (7, 7)])
def test_squares_are_what_they_always_were(size):
    image = picture(0, 100).resize(size)
    for zoom, x, y in itertools.product((1.0, 1.37), (0.0, 0.5, 0.7), (0.3, 1.0)):
        side = min(image.size) / zoom
        left, top = (image.width - side) * x, (image.height - side) * y
        box = (left, top, left + side, top + side)
        if side == 16 and float(left).is_integer() and float(top).is_integer():
            expected = image.crop(tuple(int(v) for v in box))
        else:
            resample = Image.Resampling.LANCZOS if side > 16 else Image.Resampling.BICUBIC
            expected = image.resize((16, 16), resample, box=box)
        for form in (16, (16, 16)):
            assert np.array_equal(view(image, form, zoom=zoom, x=x, y=y, flip=False), np.asarray(expected))


# --- Batches ---


def batches(config, start=0, steps=18, *, rank=0, world_size=1, workers=0, bad=None):
    """The joined micro-batches of each step, of two or more."""
    data = image_data(config, 16, 0, 8)
    data.bind(8, 2, None, CPU)
    data.batching = type(data.batching)(batch_size=8, micro_batch=2, streams=8, rank=rank, world_size=world_size)
    data.workers = workers
    report = (lambda found: None) if bad is None else bad.extend
    return [torch.cat([images for images, _ in step]) for step in data.training(start, steps, report)]


def test_every_batch_has_one_shape_and_none_depends_on_ranks_and_workers(whole):
    config = config_of(whole, augment=AugmentConfig(max_zoom=1.5))
    expected = batches(config)
    assert {tuple(images.shape[2:]) for images in expected} == set(SHAPES) and len(expected[0]) == 8
    for workers in (0, 2):
        halves = [batches(config, 7 * 8, 11, rank=rank, world_size=2, workers=workers) for rank in range(2)]
        for images, *parts in zip(expected[7:], *halves, strict=True):
            assert torch.equal(images, torch.cat(parts))


def test_a_pictures_shape_is_its_buckets(whole):
    config = config_of(whole)
    index = open_images(config.train, config)
    buckets = bucketed(index, config, lambda done, total: None)
    assert buckets.of.tolist() == [number % 3 for number in range(COUNT)]
    assert buckets.mean_pixels() == pytest.approx((256 + 240 + 240) / 3)
    dataset = ImageDataset(index, buckets)
    for number in range(3):
        expected = view(photo(number), SHAPES[number], zoom=1.0, x=0.5, y=0.5, flip=False)
        assert np.array_equal(dataset.pixels(number, 0), expected)


def test_bad_pictures_are_replaced_within_their_bucket_and_the_count_balances(tmp_path, whole):
    """Damage is seen in the header: such pictures join the fullest bucket; others of theirs stand for them."""
    write_set(tmp_path, DAMAGED)
    config, bad = config_of(tmp_path, max_bad_fraction=0.5), []
    found = batches(config, steps=60, bad=bad)
    assert {sample.number for sample in bad} == set(DAMAGED) and {sample.key for sample in bad} == {
        "0007",
        "0024",
        "0033",
    }
    assert {tuple(images.shape[2:]) for images in found} == set(SHAPES)
    halves = [batches(config, steps=60, rank=rank, world_size=2) for rank in range(2)]
    assert all(torch.equal(images, torch.cat(parts)) for images, *parts in zip(found, *halves, strict=True))
    data = image_data(config, 16, 0, 8)
    count = data.count_pictures(bad, [])["data.train"]
    assert (count.found, count.used, count.left_out) == (COUNT, COUNT - 3, {"damaged or not readable": 3})


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_validation_takes_every_picture_once_at_its_shape(whole, world_size, workers):
    validation = image_data(config_of(whole), 16, 0, 8).validation_sets[0]
    seen = []
    for rank in range(world_size):
        for images, _ in validation_batches(
            validation, 3, rank=rank, world_size=world_size, workers=workers, device=CPU, limit=9
        ):
            seen += [image.flatten().tolist() + list(image.shape) for image in images]
    expected = [validation.batch([number])[0][0] for number in range(9)]
    assert sorted(seen) == sorted(image.flatten().tolist() + list(image.shape) for image in expected)
    assert [tuple(image.shape[1:]) for image in expected[:3]] == list(SHAPES)


def test_what_a_checkpoint_knows_of_the_order(whole):
    def described(batch_size=8, **settings):
        return image_data(config_of(whole, **settings), 16, 0, batch_size).describe()

    assert described() == described() != described(buckets=SHAPES[:2])
    assert described() != described(4) and described() != described(buckets=(*SHAPES[:2], (24, 16)))


def test_a_run_with_other_buckets_begins_an_epoch_at_a_step(whole):
    data, other = (image_data(config_of(whole, buckets=SHAPES[:n]), 16, 0, 7) for n in (3, 2))
    saved = TrainingState(step=3, position=21, order=data.describe())
    assert data.resume_position(saved) == 21
    assert other.resume_position(saved) == 49, "the first step behind the 48 pictures of an epoch"


# --- Figures ---


def test_blocks_and_pictures_that_are_kept_are_of_one_shape():
    shapes = [(12, 20)] * 3 + [(16, 16)] * 5
    images = [torch.full((1, 3, *shape), number, dtype=torch.uint8) for number, shape in enumerate(shapes)]
    given = [(torch.cat(images[:2]), None), (torch.cat(images[3:7]), None), (images[2], None), (images[7], None)]
    blocks = [(tuple(block.shape), block[:count, 0, 0, 0].tolist()) for block, count in in_blocks(given, 4)]
    assert blocks == [((4, 3, 16, 16), [3, 4, 5, 6]), ((4, 3, 12, 20), [0, 1, 2]), ((4, 3, 16, 16), [7])]
    kept = KeptImages(5)
    for part, _ in given:
        kept.add(part, part + 100)
    originals, others = kept.rows()
    assert originals.shape == (5, 3, 16, 20) and originals[:, 0, 0, 0].tolist() == [0, 3, 1, 4, 2]
    assert others[:, 0, 0, 0].tolist() == [100, 103, 101, 104, 102]
    assert (originals[0, :, 12:] == 255).all() and (originals[1, :, :, 16:] == 255).all()


# --- Refusals ---

RUN = {"training": {"max_steps": 1}, "model": {"resolution": 16, "channel_multipliers": [1, 1, 1]}}
RUN |= {"loss": {"perceptual": {"weight": 0}, "gan": {"discriminator": {"layers": 2}}}}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"buckets": [[16, 18]]}, r"data\.buckets\[0\]: 16 x 18 are not multiples of 4; take such as 16 x 16"),
        ({"buckets": [[16, 16], [4, 16]]}, r"data\.buckets\[1\]: sides must be at least 7 pixels, got 4 x 16"),
        ({"buckets": [[16, 16], [0, 16]]}, r"data: buckets\[1\]: sides must be at least 1 pixel, got 0 x 16"),
        ({"buckets": [[16, 24], [32, 48]]}, r"data: buckets\[1\]: 32 x 48 has the aspect ratio of buckets\[0\]"),
        ({"buckets": [[16, 16, 3]]}, r"data.buckets\[0\]: expected 2 values, got 3"),
        ({"buckets": [[8, 32]]}, r"discriminator\.layers: 2 layers need images of at least 12 pixels, not 8"),
        ({"buckets": [[16, 16]], "unindexed": "in_order"}, r"data.buckets: .*set data\.unindexed=index"),
        ({"buckets": [[16, 16]], "train": None, "sources": [{"train": "x"}]}, r"data.buckets: not with several"),
    ],
)
def test_impossible_buckets_are_refused(data, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(TokenizerRunConfig, RUN | {"data": {"train": "x", **data}})


def test_transformers_are_not_trained_on_buckets():
    with pytest.raises(ValueError, match="buckets: for tokenizers alone"):
        TokenizedImagesConfig(train="x", tokenizer="y", buckets=((16, 16),))


@pytest.mark.parametrize(
    ("shapes", "batch_size", "words"),
    [
        (SHAPES, 17, r"data\.buckets\[0\]: 16 of 48 .*nearest to 16 x 16, and one batch of 17 are the least; leave"),
        (((16, 16), (64, 8)), 4, r"data\.buckets\[1\]: 0 of 48 .*64 x 8, and one batch of 4 are the least"),
    ],
)
def test_a_bucket_with_few_pictures_is_refused(whole, shapes, batch_size, words):
    with pytest.raises(UserError, match=words):
        image_data(config_of(whole, buckets=shapes), 16, 0, batch_size)


def test_a_rare_bucket_is_refused(whole):
    index = open_images(config_of(whole).train)
    many = index.subset([*range(40)] * 126)
    buckets = Buckets(((16, 16), (12, 20)), np.array([0] * 5_036 + [1] * 4))
    with pytest.raises(UserError, match=r"buckets\[1\]: 4 of 5,040 .* and 6, 1 of 1,000, are the least"):
        PicturesByBucket(many, buckets, batch_size=4, seed=0, streams=8, window=8)
