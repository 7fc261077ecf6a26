"""Data: from files to pixels, places and splits, and code shards."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.training import (
    CLASSES,
    picture,
    png,
    write_images,
    write_shard,
)

from ibq.config import UserError
from ibq.data.codes import CodeDataset, CodesMeta, write_codes
from ibq.data.images import ImageDataset
from ibq.data.shards import ImageDataConfig, open_images, split_sources
from ibq.data.transforms import AugmentConfig, decode_rgb, random_square, square, to_uint8, to_unit_range


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_images(folder)
    return folder


# --- Pictures ---


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def test_every_kind_of_picture_becomes_rgb():
    rgb = picture(1)
    exact = np.asarray(rgb)
    assert np.array_equal(np.asarray(decode_rgb(encoded(rgb))), exact)
    assert np.array_equal(np.asarray(decode_rgb(encoded(rgb, "WEBP", lossless=True))), exact)
    for kind, tolerance in (("JPEG", 30), ("WEBP", 40)):
        near = np.asarray(decode_rgb(encoded(rgb, kind, quality=95))).astype(int)
        assert np.abs(near - exact).mean() < tolerance / 4
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(np.asarray(decode_rgb(encoded(palette))), np.asarray(palette.convert("RGB")))
    grey = rgb.convert("L")
    assert np.array_equal(np.asarray(decode_rgb(encoded(grey))), np.asarray(grey)[..., None].repeat(3, 2))
    one_bit = np.asarray(decode_rgb(encoded(rgb.convert("1"))))
    assert set(one_bit.flatten()) == {0, 255}
    cmyk = decode_rgb(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.asarray(cmyk).astype(int) - (255, 0, 0)).max() < 12  # no cyan, all magenta and yellow: red


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_rgb(encoded(Image.fromarray(ramp)))).astype(int)
    assert np.abs(decoded - np.arange(256).reshape(16, 16, 1)).max() <= 1


def test_transparency_lies_over_white():
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:8] = (255, 0, 0, 255)
    pixels[8:] = (0, 0, 255, 0)
    half = np.zeros((16, 16, 2), np.uint8)
    half[..., 1] = 128
    assert np.array_equal(
        np.asarray(decode_rgb(encoded(Image.fromarray(pixels))))[[0, 15], 0], [[255, 0, 0], [255] * 3]
    )
    assert np.abs(np.asarray(decode_rgb(encoded(Image.fromarray(half)))).astype(int) - 127).max() <= 1
    indexed = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) % 2, "P")
    indexed.putpalette([10, 20, 30, 200, 100, 50])
    found = np.asarray(decode_rgb(encoded(indexed, transparency=1)))
    assert found[0, 0].tolist() == [10, 20, 30] and found[0, 1].tolist() == [255] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cameras_orientation_is_applied(kind):
    upright = picture(4, 32).resize((32, 16))
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright: to be turned by 90 degrees clockwise
    settings = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    found = decode_rgb(encoded(upright.transpose(Image.Transpose.ROTATE_90), kind, exif=turned, **settings))
    assert found.size == (32, 16)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(upright)).mean() < 8


def test_a_damaged_orientation_is_no_damaged_picture():
    image = picture(4)
    found = decode_rgb(encoded(image, exif=b"Exif\x00\x00MM\x00*\x00\x00"))
    assert np.array_equal(np.asarray(found), np.asarray(image))


@pytest.mark.parametrize("data", [b"", b"no picture", png(picture(0))[:80]])
def test_what_is_no_picture(data):
    with pytest.raises(ValueError, match="not a readable picture"):
        decode_rgb(data)


def test_a_picture_that_is_too_large(monkeypatch):
    monkeypatch.setattr("ibq.data.transforms.MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="16 x 16"):
        decode_rgb(png(picture(0)))


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (16, 40), (7, 9), (1, 1)])
def test_square_views(size):
    image = picture(2).resize(size)
    pixels = square(image, 16)
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    if size == (40, 16):
        assert np.array_equal(pixels, np.asarray(image)[:, 12:28])  # the centre, untouched


def test_random_views_follow_their_settings():
    image = picture(3, 32).resize((48, 32))
    still = AugmentConfig(flip=False, crop=False)
    rng = np.random.default_rng
    assert np.array_equal(random_square(image, 32, still, rng(0)), square(image, 32))
    mirrored = [
        np.array_equal(random_square(image, 32, AugmentConfig(crop=False), rng(i)), square(image, 32)[:, ::-1])
        for i in range(60)
    ]
    assert 15 < sum(mirrored) < 45
    views = [random_square(image, 32, AugmentConfig(max_zoom=2.0), rng(i)) for i in range(4)]
    assert not any(np.array_equal(views[0], other) for other in views[1:])
    assert np.array_equal(views[0], random_square(image, 32, AugmentConfig(max_zoom=2.0), rng(0)))


def test_augmentation_changes_with_the_epoch_alone(shards):
    dataset = ImageDataset(open_images(str(shards / "train-*.tar")), 16, augment=AugmentConfig(max_zoom=2.0))
    assert torch.equal(dataset[3, 1][0], dataset[3, 1][0])
    assert not torch.equal(dataset[3, 1][0], dataset[3, 2][0])


def test_ranges_of_values():
    levels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit_range(levels)
    assert unit.dtype == torch.float32 and unit[0] == -1 and unit[255] == 1
    assert torch.allclose(unit, levels.double().div(127.5).sub(1).float(), atol=1e-7)
    # The reference clamps and truncates: every level but for rounding comes back at most one lower.
    assert (levels.int() - to_uint8(unit).int()).abs().max() <= 1
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])).tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.uint8


# --- Places ---


def test_shards_and_class_folders_give_the_same(shards, tmp_path):
    index = open_images(str(shards / "train-*.tar"))
    assert len(index) == 40 and index.classes == ["0", "1", "2"]
    for i in range(40):
        folder = tmp_path / f"class {i % CLASSES}"
        folder.mkdir(exist_ok=True)
        (folder / f"{i:04d}.PNG").write_bytes(png(picture(i)))
    (tmp_path / "README.txt").write_text("no class")
    folders = open_images(str(tmp_path))
    assert folders.classes == ["class 0", "class 1", "class 2"]

    def content(index):
        dataset = ImageDataset(index, 16)
        return sorted((label, image.flatten().tolist()) for image, label in (dataset[i] for i in range(len(dataset))))

    assert content(folders) == content(index)
    assert content(index)[0][0] == 0 and torch.equal(
        ImageDataset(index, 16)[7][0], torch.from_numpy(np.array(picture(7))).permute(2, 0, 1)
    )


def test_what_is_no_class_and_no_image_in_a_folder(tmp_path):
    """Left behind by notebooks and Macs, or empty."""
    elsewhere = tmp_path / "elsewhere"
    place = tmp_path / "place"
    for path in (
        *(elsewhere / "1.png", place / "cats" / "1.png", place / "cats" / "more" / "2.png"),
        *(place / ".ipynb_checkpoints" / "1.png", place / "cats" / ".hidden" / "3.png", place / "cats" / "._1.png"),
        *(place / "empty" / "notes.txt", place / "cats" / "folder.png" / "notes.txt"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(1)))
    (place / "dogs").symlink_to(elsewhere)
    (place / "cats" / "4.png").symlink_to(elsewhere / "1.png")
    (place / "cats" / "notes").symlink_to(elsewhere / "absent")
    index = open_images(str(place))
    assert index.classes == ["cats", "dogs"]
    names = ["cats/1.png", "cats/4.png", "cats/more/2.png", "dogs/1.png"]
    assert [entry.shard.removeprefix(f"{place}/") for entry in index] == names
    assert [index.key(i) for i in range(4)] == names
    assert [entry.label for entry in index] == [0, 0, 0, 1]
    assert len(ImageDataset(index, 16)[1][0]) == 3


def test_names_inside_shards(tmp_path):
    """Labels and pictures match by the path up to the first dot of the file's name."""
    for folder in ("", "./", "set.v1/train/"):
        members = {f"{folder}b.png": png(picture(1)), f"{folder}b.cls": b"2", f"{folder}b.json": b"{}"}
        write_shard(tmp_path / "shard.tar", members | {f"{folder}a.x.cls": b"no label", f"{folder}README": b""})
        (entry,) = open_images(str(tmp_path / "shard.tar"))
        assert entry.label == 2


def test_classes_file_names_the_classes(tmp_path):
    write_images(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(["red", "green", "blue", "none"]))
    assert open_images(str(tmp_path / "train-*.tar")).classes == ["red", "green", "blue", "none"]
    (tmp_path / "classes.json").write_text(json.dumps(["red"]))
    with pytest.raises(UserError, match=r"classes\.json"):
        open_images(str(tmp_path / "train-*.tar"))


def test_a_shard_without_labels(tmp_path):
    write_shard(tmp_path / "shard.tar", {"a.png": png(picture(0)), "a.cls": b"0", "b.png": png(picture(1))})
    with pytest.raises(UserError, match=r"shard\.tar.*'b'.*b\.cls"):
        open_images(str(tmp_path / "shard.tar"))


def test_validation_is_held_out(shards):
    place = str(shards / "train-*.tar")
    (train,), (validation,) = split_sources(ImageDataConfig(train=place, validation_every=5))
    assert (len(train), len(validation)) == (32, 8)
    keys = [{(e.shard, e.offset) for e in index} for index in (train, validation, open_images(place))]
    assert keys[0] | keys[1] == keys[2] and not keys[0] & keys[1]
    (train,), (validation,) = split_sources(ImageDataConfig(train=place, validation=str(shards / "val-*.tar")))
    assert (len(train), len(validation)) == (40, 8)


# --- Codes ---


@pytest.mark.parametrize(("num_codes", "dtype"), [(1024, np.uint16), (2**16, np.uint16), (2**18, np.uint32)])
def test_codes_come_back(tmp_path, num_codes, dtype):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, num_codes, (6, 9))
    codes[0, 0] = num_codes - 1
    labels = rng.integers(0, 1000, 6)
    meta = CodesMeta(num_codes=num_codes, grid=(3, 3), classes=["a"] * 1000, tokenizer="hash", views=2)
    write_codes(tmp_path / "codes", codes, labels, meta)
    dataset = CodeDataset(tmp_path / "codes")
    assert dataset.meta == replace(meta, rows=[6]) and len(dataset) == 6
    assert np.load(tmp_path / "codes" / "codes-00000.npy").dtype == dtype
    for i in range(6):
        row, label = dataset[i]
        assert row.dtype == torch.int64 and row.tolist() == codes[i].reshape(3, 3).tolist() and label == labels[i]


def test_codes_that_are_missing_or_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="encode_shards"):
        CodeDataset(tmp_path)
    meta = CodesMeta(num_codes=8, grid=(3, 3), classes=["a"], tokenizer="hash")
    write_codes(tmp_path, np.zeros((4, 4), int), np.zeros(4, int), meta)
    with pytest.raises(UserError, match="do not fit"):
        CodeDataset(tmp_path)


@pytest.mark.parametrize(("code", "label"), [(70_000, 0), (8, 0), (-1, 0), (0, 1), (0, -1)])
def test_codes_out_of_range(tmp_path, monkeypatch, code, label):
    """The cast to 16 bits would make code 4,464 of code 70,000."""
    monkeypatch.setattr("ibq.data.codes.CHECKED_AT_ONCE", 5)
    meta = CodesMeta(num_codes=8, grid=(2, 2), classes=["a"], tokenizer="hash")
    codes, labels = np.zeros((6, 4), int), np.zeros(6, int)
    write_codes(tmp_path, codes, labels, meta)
    codes[3, 2], labels[5] = code, label
    wrong = "code" if code else "label"
    with pytest.raises(ValueError, match=f"{wrong} {code or label} is not one of the {8 if code else 1} "):
        write_codes(tmp_path, codes, labels, meta)
    assert len(CodeDataset(tmp_path)) == 6  # the whole ones are still there
    np.save(tmp_path / "codes-00000.npy", codes)
    np.save(tmp_path / "labels-00000.npy", labels)
    with pytest.raises(UserError, match=f"{wrong} {code or label} is not one .*write them again"):
        CodeDataset(tmp_path)
