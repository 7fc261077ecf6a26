"""What damaged data gets: converted where sensible, else replaced by the next good sample, counted and named."""

import io
import json
import shutil
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from support.processes import run_ranks, run_script
from support.training import (
    CLASSES,
    TOKENIZER_CONFIG,
    picture,
    png,
    scalars,
    train_here,
    write_images,
    write_shard,
)

from ibq.config import UserError
from ibq.data import storage
from ibq.data.images import BadSampleError, ImageDataset
from ibq.data.index import index_file, index_shard, read_shard_index, sha256_of, write_shard_index
from ibq.data.shards import ImageDataConfig, SourceConfig, open_images
from ibq.data.transforms import FORMATS, decode_rgb
from ibq.training.run_data import image_data

CPU = torch.device("cpu")
SHARDS, SAMPLES = 5, 80
SIZE = SHARDS * SAMPLES


def members(numbers):
    found = {}
    for i in numbers:
        found |= {f"{i:04d}.png": png(picture(i)), f"{i:04d}.cls": str(i % CLASSES).encode()}
    return found


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_that_are_decoded(kind):
    image = decode_rgb(encoded(picture(1), kind))
    assert image.size == (16, 16) and image.mode == "RGB"


def test_programs_are_never_started_for_a_picture():
    """Pillow hands an EPS file to Ghostscript, whatever the file's name."""
    with pytest.raises(ValueError, match="not a readable picture: of no known format"):
        decode_rgb(encoded(picture(1), "EPS"))


def huge_png() -> bytes:
    """200 megapixels of white in some kilobytes."""
    return encoded(Image.new("1", (20_000, 10_000), 1))


def unusual() -> dict[str, bytes]:
    """What looks odd but is a picture."""
    image = picture(1)
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    return {
        "palette": encoded(image.convert("P")),
        "grey": encoded(image.convert("L")),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "16 bit": encoded(deep),
        "transparent": encoded(image.convert("RGBA")),
    }


def write_set(folder, *, damage=True, indexed=()):
    """A set of 400 samples, of which four are damaged in different ways; shards in `indexed` were indexed before."""
    folder.mkdir()
    for shard in range(SHARDS):
        content = members(range(shard * SAMPLES, (shard + 1) * SAMPLES))
        if shard == 0:  # these stay: they are converted
            for number, data in enumerate(unusual().values()):
                content[f"{number:04d}.png"] = data
        path = folder / f"train-{shard}.tar"
        write_shard(path, content)
        if shard in indexed:
            write_shard_index(path)
        if damage:
            spoil(path, content, shard)
    (folder / "classes.json").write_text(json.dumps(["a", "b", "c"]))
    write_shard(folder / "val.tar", members(range(900, 908)))


def spoil(path, content, shard):
    first = shard * SAMPLES
    match shard:
        case 1:
            content[f"{first + 3:04d}.png"] = content[f"{first + 3:04d}.png"][:70]
        case 2:
            content[f"{first + 5:04d}.png"] = huge_png()
        case 3:
            del content[f"{first + 7:04d}.cls"]
            content[f"{first + 8:04d}.cls"] = b"7"
        case 4:  # cut in the middle of its last picture
            size = index_shard(path, checksums=False)
            path.write_bytes(path.read_bytes()[: size.offsets[-1] + 20])
            return
    write_shard(path, content)


BAD = {"0083", "0165", "0247", "0248", "0399"}
REASONS = {"0083": "picture", "0165": "pixels", "0247": "no label", "0248": "label 7", "0399": "cut off"}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "set"
    write_set(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.01)


def data_of(folder, **settings):
    place = {"train": f"{folder}/train-*.tar", "validation": f"{folder}/val.tar"}
    # The cache is the test's own: what is in the user's says nothing about these shards.
    config = ImageDataConfig(**place, workers=0, streams=8, cache_folder=str(folder / "cache"), **settings)
    return image_data(config, 16, 0)


def epoch(data, *, rank=0, world_size=1, workers=0, epochs=1):
    """(images, labels, bad samples) of this rank."""
    data.bind(8, 4, None, CPU)
    data.batching = type(data.batching)(batch_size=8, micro_batch=2, streams=8, rank=rank, world_size=world_size)
    data.workers = workers
    bad, images, labels = [], [], []
    for step in data.training(0, epochs * SIZE // 8, bad.extend):
        for micro_batch in step:
            images.append(micro_batch[0])
            labels.append(micro_batch[1])
    return torch.cat(images), torch.cat(labels), bad


# --- Over an epoch ---


def test_an_epoch_of_a_damaged_set(spoilt):
    data = data_of(spoilt)
    images, labels, bad = epoch(data)
    assert len(images) == len(labels) == SIZE
    assert {sample.key for sample in bad} == BAD and len(bad) == len(BAD)
    for sample in bad:
        assert REASONS[sample.key] in sample.reason and "train-" in sample.shard
    # All good samples are there once; a replaced one stands twice, and is the next good one of the same stream.
    stream = data.stream
    standing = [stream.order.locate(position) for position in range(SIZE)]
    keys = [stream.sets[0].index.key(location.number) for location in standing]
    expected = {}
    for position, key in enumerate(keys):
        turn = position
        while stream.sets[0].index.key(stream.order.locate(turn).number) in BAD:
            turn += 8
        location = stream.order.locate(turn)
        pixels = stream.sets[0].pixels(location.number, location.epoch)
        expected[position] = torch.tensor(pixels.copy()).permute(2, 0, 1)
        assert (turn == position) == (key not in BAD)
    order = [position for start in range(0, SIZE, 8) for position in data.batching.positions(start)]
    for position, image in zip(order, images, strict=True):
        assert torch.equal(image, expected[position])


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (2, 1), (4, 0)])
def test_the_same_on_all_ranks_and_workers(spoilt, world_size, workers):
    images, labels, bad = epoch(data_of(spoilt))
    parts = [epoch(data_of(spoilt), rank=rank, world_size=world_size, workers=workers) for rank in range(world_size)]
    joined = [torch.cat([part[0].view(-1, 8 // world_size, 3, 16, 16) for part in parts], dim=1).flatten(0, 1)]
    assert torch.equal(joined[0], images)
    assert sorted(sample for part in parts for sample in part[2]) == sorted(bad)
    assert sum(len(part[1]) for part in parts) == len(labels)


def test_every_epoch_counts_them_anew(spoilt):
    bad = epoch(data_of(spoilt), epochs=3)[2]
    assert Counter(sample.position // SIZE for sample in bad) == {0: 5, 1: 5, 2: 5}


def test_an_index_made_before_the_damage(tmp_path):
    """The samples that a truncated shard has lost are known, and keep their places in the order."""
    write_set(tmp_path / "set", indexed=(1, 4))
    path = tmp_path / "set/train-4.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    index = open_images(f"{tmp_path}/set/train-*.tar", ImageDataConfig(train="", max_bad_fraction=0.5))
    assert len(index) == SIZE
    lost = [index.key(number) for number, reason in index.problems() if "cut off" in reason]
    assert 35 < len(lost) < 45 and lost == [f"{i:04d}" for i in range(SIZE - len(lost), SIZE)]
    bad = epoch(data_of(tmp_path / "set", max_bad_fraction=0.5))[2]
    assert {sample.key for sample in bad} == BAD | set(lost)


@pytest.mark.slow
def test_a_whole_run_counts_names_and_goes_on(tmp_path):
    """One process and two: the same counts, in the log and in the metrics."""
    write_set(tmp_path / "set")
    text = TOKENIZER_CONFIG.replace("DATA/val-*", f"{tmp_path}/set/val").replace("DATA", f"{tmp_path}/set")
    text = text.replace("max_steps: 4", "epochs: 1").replace("log_every: 1", "log_every: 7")
    text = text.replace("validate_every: 2", "validate_every: 50").replace("save_every: 2", "save_every: 20")
    (tmp_path / "config.yaml").write_text(text)
    common = ["ibq/train_tokenizer.py", "--config", str(tmp_path / "config.yaml"), "data.in_memory=false"]
    common += [f"data.cache_folder={tmp_path}/cache"]
    runs = {"one": 1, "two": 2}
    for name, ranks in runs.items():
        own = [f"output={tmp_path}/{name}", "data.workers=1", f"training.micro_batch={8 // ranks}"]
        done = run_ranks(ranks, *common, *own)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / name / "bad_samples.jsonl").read_text().splitlines()]
        assert {row["key"] for row in rows} == BAD and len(rows) == len(BAD)
        assert scalars(tmp_path / name)["data/bad_samples"][50] == 5
        state = json.loads((tmp_path / name / "checkpoints/step-00000050/state.json").read_text())
        assert state["bad_samples"] == {"0": 5} and state["position"] == SIZE
        for key in BAD:
            assert done.stderr.count(f"'{key}'") >= 1 and f"{tmp_path}/set/train-" in done.stderr
    one, two = ([json.loads(r) for r in (tmp_path / n / "bad_samples.jsonl").read_text().splitlines()] for n in runs)
    assert one == two


@pytest.mark.slow
def test_too_many_bad_samples_stop_the_run(tmp_path):
    write_set(tmp_path / "set", damage=False)
    content = members(range(SAMPLES))
    for number in range(20):
        content[f"{number:04d}.png"] = b"no picture"
    write_shard(tmp_path / "set/train-0.tar", content)
    text = TOKENIZER_CONFIG.replace("DATA/val-*", f"{tmp_path}/set/val").replace("DATA", f"{tmp_path}/set")
    (tmp_path / "config.yaml").write_text(text.replace("max_steps: 4", "epochs: 1"))
    argv = ["ibq/train_tokenizer.py", "--config", str(tmp_path / "config.yaml"), f"output={tmp_path}/run"]
    argv += [f"data.cache_folder={tmp_path}/cache"]
    stopped = run_script(*argv, "data.max_bad_fraction=0.04")
    assert stopped.returncode == 2
    error = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "17 of 400" in error[0] and "data.max_bad_fraction=0.04" in error[0]
    assert "train-0.tar" in error[0] and "not a readable picture" in error[0]
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed" and "max_bad_fraction" in status["reason"]
    allowed = run_script(*argv, "--fresh", "data.max_bad_fraction=0.05", "training.validate_every=50")
    assert allowed.returncode == 0, allowed.stderr


def test_what_the_index_tells_is_refused_at_once(spoilt, tmp_path):
    place = f"{spoilt}/train-*.tar"
    config = ImageDataConfig(train=place, max_bad_fraction=0.005, cache_folder=str(tmp_path))
    with pytest.raises(UserError, match=r"3 of 400 samples.*train-3\.tar.*'0247'.*no label \(0247\.cls\)"):
        open_images(place, config)


def test_a_validation_without_a_good_picture_is_refused_before_the_training(tmp_path, capsys):
    write_set(tmp_path / "set", damage=False)
    bad = {f"{i}.png": b"no picture" for i in range(8)} | {f"{i}.cls": b"0" for i in range(8)}
    write_shard(tmp_path / "set/val.tar", bad)
    text = TOKENIZER_CONFIG.replace("DATA/val-*", f"{tmp_path}/set/val").replace("DATA", f"{tmp_path}/set")
    (tmp_path / "config.yaml").write_text(text)
    argv = ["--config", str(tmp_path / "config.yaml"), f"output={tmp_path}/run", f"data.cache_folder={tmp_path}/cache"]
    assert train_here("tokenizer", argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: data.validation: none of its 8 pictures can be used, the first: shard ")
    assert "'0'" in error and "not a readable picture" in error
    assert not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text()
    write_shard(tmp_path / "set/val.tar", {**bad, **members([900])})
    assert train_here("tokenizer", [*argv, "--fresh"]) == 0


def test_a_set_without_a_good_sample_ends(tmp_path):
    write_shard(
        tmp_path / "x.tar", {f"{i}.png": b"no picture" for i in range(20)} | {f"{i}.cls": b"0" for i in range(20)}
    )
    write_shard(tmp_path / "val.tar", members([1]))
    config = ImageDataConfig(
        train=f"{tmp_path}/x.tar", validation=f"{tmp_path}/val.tar", workers=0, streams=4, max_bad_fraction=1
    )
    data = image_data(config, 16, 0)
    data.bind(4, 4, None, CPU)
    with pytest.raises(UserError, match=r"in a row can't be used.*x\.tar"):
        next(data.training(0, 1, lambda bad: None))


def test_a_shard_that_disappears(tmp_path):
    """Tried again, then replaced, counted and named like any other."""
    write_set(tmp_path / "set", damage=False)
    data = data_of(tmp_path / "set", max_bad_fraction=0.5, retries=1)
    path = tmp_path / "set/train-2.tar"
    storage._open_file.cache_clear()
    path.unlink()
    images, _, bad = epoch(data)
    assert len(images) == SIZE
    assert {sample.key for sample in bad} == {f"{i:04d}" for i in range(2 * SAMPLES, 3 * SAMPLES)}
    assert all("cannot be read" in sample.reason for sample in bad)


def test_an_open_shard_may_be_removed(tmp_path):
    write_set(tmp_path / "set", damage=False)
    dataset = ImageDataset(open_images(f"{tmp_path}/set/train-*.tar"), 16)
    dataset[0]
    (tmp_path / "set/train-0.tar").unlink()
    assert dataset[40][1] == 40 % CLASSES


def test_a_shard_is_read_as_it_was_indexed(tmp_path, monkeypatch):
    """One of the same name, in another folder or written anew, is another one; the working folder may change."""
    for name, count in (("small", 4), ("large", 40)):
        write_images(tmp_path / name, count=count)
    read = []
    for name in ("small", "large"):
        monkeypatch.chdir(tmp_path / name)
        read.append(ImageDataset(open_images("train-*.tar"), 16))
        assert all(int(label) == number % CLASSES for number, (_, label) in enumerate(read[-1])), name
    monkeypatch.chdir(tmp_path)
    before = [image for image, _ in read[1]]
    for shard in ("train-0.tar", "train-1.tar"):
        (tmp_path / "small" / shard).rename(tmp_path / "large" / shard)
    assert all(image.equal(other) for image, (other, _) in zip(before, read[1], strict=True))
    assert len([*ImageDataset(open_images("large/train-*.tar"), 16)]) == 4


# --- Single samples ---


def test_unusual_pictures_are_converted():
    for name, data in unusual().items():
        assert decode_rgb(data).mode == "RGB", name


def test_two_hundred_megapixels_are_not_decoded():
    data = huge_png()
    with pytest.raises(ValueError, match="more pixels than the 100,000,000 allowed"):
        decode_rgb(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_no_damage_of_a_picture_ends_the_run(kind):
    """Whatever bytes a picture holds, it decodes or is refused as one: no other error comes out."""
    data = encoded(picture(3, 64), kind)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 20)):
            damaged[place] = rng.integers(0, 256)
        try:
            assert decode_rgb(bytes(damaged[: rng.integers(1, len(data) + 1)])).mode == "RGB"
        except ValueError as error:
            refused += 1
            assert "picture" in str(error) or "pixels" in str(error)
    assert refused > 20


def test_bytes_that_have_changed_since_they_were_indexed(tmp_path):
    path = tmp_path / "train.tar"
    write_shard(path, members(range(10)))
    index = write_shard_index(path)
    content = bytearray(path.read_bytes())
    content[index.offsets[4] + index.sizes[4] - 3] ^= 1  # in a chunk that no decoder looks at
    path.write_bytes(content)
    dataset = ImageDataset(open_images(str(path)), 16)
    dataset[3]
    with pytest.raises(BadSampleError, match=r"train\.tar: image '0004'.*checksum"):
        dataset[4]


def test_sets_without_labels(tmp_path):
    write_shard(tmp_path / "x.tar", {f"{i}.png": png(picture(i)) for i in range(4)})
    with pytest.raises(UserError, match=r"x\.tar.*no label.*data\.labels=false"):
        open_images(f"{tmp_path}/x.tar")
    index = open_images(f"{tmp_path}/x.tar", ImageDataConfig(train="", labels=False))
    assert not index.problems() and index.label.tolist() == [0] * 4
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(picture(i)))
    assert len(open_images(str(tmp_path), ImageDataConfig(train="", labels=False))) == 3


# --- The index ---


def test_what_an_index_says(tmp_path):
    path = tmp_path / "a.tar"
    content = members(range(5))
    write_shard(path, content)
    index = write_shard_index(path)
    raw = path.read_bytes()
    for key, offset, size, label, crc in zip(
        index.keys, index.offsets, index.sizes, index.labels, index.crc32, strict=True
    ):
        assert raw[offset : offset + size] == content[f"{key}.png"]
        assert label == int(content[f"{key}.cls"]) and crc == zlib.crc32(content[f"{key}.png"])
    assert index.bytes == len(raw) and index.sha256 == sha256_of(path)
    rows = json.loads((tmp_path / "a.index.json").read_text())
    assert rows["samples"] == 5 and rows["shard"] == "a.tar"
    assert read_shard_index(path) == index


def test_a_stale_index_is_passed_over(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, members(range(5)))
    write_shard_index(path)
    for numbers in (range(3), range(9)):  # written again, whole
        write_shard(path, members(numbers))
        assert len(read_shard_index(path).keys) == len(numbers)
    (tmp_path / "a.index.json").write_text('{"format": 1, "shard": ')
    with pytest.raises(UserError, match=r"a\.index\.json: not an index"):
        read_shard_index(path)


def test_a_truncated_shard_with_labels_first(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, dict(reversed(members(range(9, -1, -1)).items())))
    index = index_shard(path, checksums=False)
    for cut, lost in (
        (index.offsets[6] + 10, "0006"),
        (index.offsets[6] - 600, "0006"),
        (index.offsets[6] - 1100, "(end)"),
    ):
        path.write_bytes(path.read_bytes()[:cut])
        found = read_shard_index(path)
        assert [found.keys[number] for number in found.problems] == [lost] and "cut off" in found.problems[6]


@pytest.mark.parametrize("at", ["picture", "label", "header", "padding", "between"])
def test_truncated_shards_without_an_index(tmp_path, at):
    path = tmp_path / "a.tar"
    write_shard(path, members(range(10)))
    index = index_shard(path, checksums=False)
    end = index.offsets[6]
    size = -(-index.sizes[6] // 512) * 512
    cut = {
        "picture": end + 10,
        "label": end + size + 512,
        "header": end + size + 100,
        "padding": end + index.sizes[6] + 1,
        "between": end + size,
    }[at]
    path.write_bytes(path.read_bytes()[:cut])
    found = read_shard_index(path)
    assert found.keys == [f"{i:04d}" for i in range(7)]
    if at == "between":  # between two members nothing tells that more should come, but the label is missing
        assert found.problems == {} and found.labels[6] == -1
    else:
        assert list(found.problems) == [6] and "cut off" in found.problems[6]


def test_shards_that_are_none(tmp_path):
    good, garbage, empty = (tmp_path / f"{name}.tar" for name in ("good", "garbage", "nothing"))
    write_shard(good, members(range(90)))
    garbage.write_bytes(b"no tar" * 200)
    empty.write_bytes(b"")
    index = open_images(f"{tmp_path}/*.tar")
    problems = {index[number].shard: reason for number, reason in index.problems()}
    assert set(problems) == {str(garbage), str(empty)} and len(index) == 92
    assert all("cannot read shard" in reason for reason in problems.values())


def test_a_quick_index_is_kept_for_the_next_time(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, members(range(5)))
    config = ImageDataConfig(train=str(path), cache_folder=str(tmp_path / "cache"))
    first = open_images(str(path), config)
    (kept,) = (tmp_path / "cache/indexes").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert open_images(str(path), config).fingerprint() == first.fingerprint()
    assert kept.stat().st_mtime_ns == stamp
    write_shard(path, members(range(6)))
    assert len(open_images(str(path), config)) == 6
    assert not (tmp_path / index_file("a.tar")).exists(), "nothing is written beside somebody's shards unasked"
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    assert len(open_images(str(path), config)) == 6


def test_impossible_settings():
    for settings, words in (
        ({}, "train"),
        ({"train": "a", "sources": (SourceConfig(train="b"),)}, "train"),
        ({"train": "a", "max_bad_fraction": 2}, "max_bad_fraction"),
        ({"train": "a", "cache_gib": 0}, "cache_gib"),
        ({"train": "a", "streams": 0}, "streams"),
        ({"train": "a", "in_memory": True, "workers": 2}, "workers"),
        ({"sources": (SourceConfig(train="b"),), "unindexed": "in_order"}, "unindexed"),
    ):
        with pytest.raises(ValueError, match=f"^{words}: "):
            ImageDataConfig(**settings)
    with pytest.raises(ValueError, match=r"^weight: "):
        SourceConfig(train="a", weight=0)
