"""tools/make_shards.py: what is in the shards, that a run goes on after a kill, and what bad input gets."""

import contextlib
import fcntl
import glob
import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import webdataset
from PIL import Image
from support import ROOT
from support.points import HANG_S, Points, wait_for
from support.training import picture, png, write_shard

from ibq.config import UserError, exit_on_user_error
from ibq.data.images import ImageDataset
from ibq.data.index import ShardIndex, read_shard_index
from ibq.data.shards import ImageDataConfig, class_folders, open_images
from ibq.data.transforms import decode_rgb
from tools import make_shards
from tools.lib.shards import labels as shard_labels

SMALL = ("--samples-per-shard", "10", "--processes", "2")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """38 images in three classes whose sorted order is not that of the alphabet; do not change it."""
    files = {f"apple/{i}.png": png(picture(i)) for i in range(12)}
    files |= {f"Zoo/{i:02d}.JPEG": encoded(picture(100 + i), "jpeg") for i in range(12)}
    files |= {f"b.dogs/{i}.v1.webp": encoded(picture(200 + i), "webp") for i in range(10)}
    files |= {
        "apple/.hidden.png": b"",
        "empty/readme.txt": b"no picture",
        ".cache/1.png": png(picture(0)),
        "apple/0.jpg": encoded(picture(300), "jpeg"),  # its key would be that of 0.png
        "apple/0_png.png": png(picture(301)),
        f"apple/deeper/{'x' * 120}.png": png(picture(302)),  # longer than a tar header's field
        "Zoo/00.b.JPEG": encoded(picture(303), "jpeg"),
    }
    return write_files(tmp_path_factory.mktemp("source"), files)


@pytest.fixture
def make(capsys):
    """Run the tool in this process; its exit code, what it printed and what it said on stderr."""

    def run(*argv, check=0):
        with pytest.raises(SystemExit) as end:
            exit_on_user_error(lambda: make_shards.main([str(word) for word in argv]))
        out, err = capsys.readouterr()
        assert end.value.code == check, err
        assert "Traceback" not in err
        return out if not check else err

    return run


def error_line(err: str) -> str:
    """The one line that a run ended with, without its bar and notes."""
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
    return lines[-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def raw(place) -> dict[str, tuple[bytes, int]]:
    """key -> (bytes of the image file, label), through the index."""
    labelled = make_shards.CLASSES_FILE in os.listdir(Path(place).parent)
    index = open_images(str(place), ImageDataConfig(train=str(place), labels=labelled))
    found = {}
    for number, entry in enumerate(index):
        assert entry.problem is None
        with open(entry.shard, "rb") as file:
            file.seek(entry.offset)
            found[index.key(number)] = file.read(entry.size), entry.label
    assert len(found) == len(index)
    return found


def sizes(place) -> dict[str, tuple[str, tuple[int, int]]]:
    """key -> (format, size)."""
    images = {key: Image.open(io.BytesIO(data)) for key, (data, _) in raw(place).items()}
    return {key: (image.format, image.size) for key, image in images.items()}


# --- What is in the shards ---


def test_shards_hold_the_files_with_the_labels_of_the_folder(source, make, tmp_path):
    out = make(source, tmp_path / "out", *SMALL)
    assert re.search(r"38 images in 4 shards \(0\.\d MB, 3 classes\): .*train-\*\.tar\nnext: python ibq/train_", out)
    classes, images = class_folders(source)
    assert classes == ["Zoo", "apple", "b.dogs"]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == classes
    found = raw(tmp_path / "out" / "train-*.tar")
    expected = sorted((path.read_bytes(), label) for path, label in images)
    assert sorted(found.values()) == expected and len(expected) == 38
    assert open_images(str(tmp_path / "out" / "train-*.tar")).classes == classes
    # Keys come from paths.
    assert found["b_dogs/3_v1"] == ((source / "b.dogs/3.v1.webp").read_bytes(), 2)
    assert found["Zoo/00"] == ((source / "Zoo/00.JPEG").read_bytes(), 0)
    assert found["Zoo/00_b"] == ((source / "Zoo/00.b.JPEG").read_bytes(), 0)
    assert found["apple/0"][0] == (source / "apple/0.jpg").read_bytes()
    assert found["apple/0_png"][0] == (source / "apple/0.png").read_bytes()
    assert found["apple/0_png_png"][0] == (source / "apple/0_png.png").read_bytes()
    assert f"apple/deeper/{'x' * 120}" in found


def test_training_reads_the_same_pixels_from_shards_and_folder(source, make, tmp_path):
    make(source, tmp_path / "out", *SMALL, "--order", "sorted")
    shards, folder = open_images(str(tmp_path / "out" / "train-*.tar")), open_images(str(source))
    assert shards.label.tolist() == folder.label.tolist()
    first, second = ImageDataset(shards, 16), ImageDataset(folder, 16)
    for number in range(38):
        assert np.array_equal(first.pixels(number, 0), second.pixels(number, 0))


def test_index_files_are_right(source, make, tmp_path):
    make(source, tmp_path / "out", *SMALL)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert [shard.name for shard in shards] == [f"train-{i:05d}.tar" for i in range(4)]
    images = {path.read_bytes() for path, _ in class_folders(source)[1]}
    counts = []
    for shard in shards:
        index = json.loads(shard.with_name(f"{shard.stem}.index.json").read_text())
        data = shard.read_bytes()
        assert index["bytes"] == len(data) and index["sha256"] == hashlib.sha256(data).hexdigest()
        assert not index["problems"]
        for offset, size, crc in zip(index["offsets"], index["sizes"], index["crc32"], strict=True):
            image = data[offset : offset + size]
            assert image in images and zlib.crc32(image) == crc
        counts.append(index["samples"])
    assert counts == [10, 10, 10, 8]


def test_webdataset_reads_them(source, make, tmp_path):
    folder = write_files(tmp_path / "in", {"__odd__/1.png": png(picture(1)), "b/1.JPG": encoded(picture(2), "jpeg")})
    for place, count in ((source, 38), (folder, 2)):
        out = tmp_path / f"out{count}"
        make(place, out, *SMALL)
        shards = sorted(str(path) for path in out.glob("*.tar"))
        rows = list(webdataset.WebDataset(shards, shardshuffle=False))
        assert len(rows) == count
        for row in rows:
            (suffix,) = {name for name in row if not name.startswith("__")} - {"cls"}
            assert suffix in ("jpg", "png", "webp")
            assert raw(out / "train-*.tar")[row["__key__"]] == (row[suffix], int(row["cls"]))


def test_bytes_do_not_depend_on_the_number_of_processes(source, make, tmp_path):
    for processes in ("1", "3"):
        make(source, tmp_path / processes, "--samples-per-shard", "10", "--size", "8", "--processes", processes)
    one = contents(tmp_path / "1")
    assert len(one) == 2 * 4 + 3 and one == contents(tmp_path / "3")


def test_order_is_that_of_the_seed(source, make, tmp_path):
    labels = {}
    for name, *options in (("0",), ("1", "--seed", "1"), ("sorted", "--order", "sorted")):
        make(source, tmp_path / name, *options)
        labels[name] = open_images(str(tmp_path / name / "train-*.tar")).label.tolist()
    assert labels["sorted"] == sorted(labels["0"]) == sorted(labels["1"])
    assert labels["0"] != labels["1"] != labels["sorted"] != labels["0"]
    assert all({*labels["0"][first : first + 13]} == {0, 1, 2} for first in (0, 12, 25))  # classes are mixed


def test_classes_file_fixes_the_numbers(source, make, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(["b.dogs", "more", "apple", "Zoo"]))
    make(source, tmp_path / "out", "--classes", tmp_path / "classes.json")
    found = raw(tmp_path / "out" / "train-*.tar")
    assert {key.split("/")[0]: label for key, (_, label) in found.items()} == {"b_dogs": 0, "apple": 2, "Zoo": 3}
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["b.dogs", "more", "apple", "Zoo"]


def test_set_without_labels(source, make, tmp_path):
    out = make(source / "apple", tmp_path / "out", "--no-labels")
    assert "data.labels=false" in out
    assert not (tmp_path / "out/classes.json").exists()
    assert len(raw(tmp_path / "out" / "train-*.tar")) == 15
    assert all("cls" not in row for row in webdataset.WebDataset(str(tmp_path / "out/train-00000.tar"), shardshuffle=0))


def test_keys_are_unique_and_end_at_no_dot():
    paths = ["a/1.jpg", "a/1.png", "a/1.PNG", "a/1_png.jpg", "a.b/1.c.jpg", "a_b/1_c.jpg", "x\ny.jpg", "a/1_png.png"]
    keys = shard_labels.sample_keys(paths)
    assert keys[:4] == ["a/1", "a/1_png", "a/1_PNG", "a/1_png_jpg"]
    assert keys[4:] == ["a_b/1_c", "a_b/1_c_jpg", "x_y", "a/1_png_png"]
    assert shard_labels.sample_keys(["b.jpg", "b.jpg", "b.jpg"]) == ["b", "b_jpg", "b_jpg_2"]


# --- Label files ---

FLAT = {f"ILSVRC2012_val_0000000{i}.JPEG": encoded(picture(i), "jpeg") for i in range(1, 5)}
NAMES = ["n02", "n01", "n02", "n10"]  # of the four images


def label_lines(form: str, labels=NAMES) -> str:
    return "".join(form.format(name=PurePosixPath(name), stem=Path(name).stem, label=label) + "\n"
                   for name, label in zip(FLAT, labels, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        label_lines("{name} {label}"),
        label_lines("{stem}\t{label}"),
        label_lines("val/{name},{label}"),
        label_lines('"{name}", "{label}"'),
        "\ufeffImageId,PredictionString\r\n" + label_lines("{stem},{label} 85 1 499 272 {label} 1 2 3 4 "),
        "filename label\n\n" + "".join(reversed(label_lines("./{name}   {label}").splitlines(True))),
    ],
    ids=["blanks", "tab", "comma and folder", "quotes", "kaggle", "header, other order"],
)
def test_label_file_with_names(make, tmp_path, text):
    write_files(tmp_path / "val", FLAT)
    (tmp_path / "labels").write_text(text, encoding="utf-8")
    make(tmp_path / "val", tmp_path / "out", "--labels", tmp_path / "labels", "--prefix", "val")
    found = raw(tmp_path / "out" / "val-*.tar")
    assert found == {
        Path(name).stem: (data, label) for (name, data), label in zip(FLAT.items(), [1, 0, 1, 2], strict=True)
    }
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["n01", "n02", "n10"]


@pytest.mark.parametrize(
    "labels, classes, values, names",
    [
        (NAMES, ["n00", "n01", "n02", "n10"], [2, 1, 2, 3], ["n00", "n01", "n02", "n10"]),
        ([3, 0, 3, 1], None, [3, 0, 3, 1], ["0", "1", "2", "3"]),
        ([3, 0, 3, 1], ["a", "b", "c", "d", "e"], [3, 0, 3, 1], ["a", "b", "c", "d", "e"]),
        (["3", "three", "0", "3"], None, [1, 2, 0, 1], ["0", "3", "three"]),
    ],
)
def test_label_file_with_numbers_or_a_class_list(make, tmp_path, labels, classes, values, names):
    write_files(tmp_path / "val", FLAT)
    (tmp_path / "labels").write_text(label_lines("{name} {label}", labels))
    (tmp_path / "c.json").write_text(json.dumps(classes))
    more = ["--classes", tmp_path / "c.json"] if classes else []
    make(tmp_path / "val", tmp_path / "out", "--labels", tmp_path / "labels", *more)
    found = raw(tmp_path / "out" / "train-*.tar")
    assert [found[Path(name).stem][1] for name in FLAT] == values
    assert json.loads((tmp_path / "out/classes.json").read_text()) == names


def test_names_with_blanks_and_equal_names_in_folders(make, tmp_path):
    files = {"a/1.png": png(picture(1)), "b/1.png": png(picture(2)), "b/my cat.png": png(picture(3))}
    write_files(tmp_path / "in", files)
    (tmp_path / "labels").write_text("x/a/1.png tabby cat\nb/1 dog\nmy cat.png tabby cat\n")
    make(tmp_path / "in", tmp_path / "out", "--labels", tmp_path / "labels")
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["dog", "tabby cat"]
    labels = {key: label for key, (_, label) in raw(tmp_path / "out" / "train-*.tar").items()}
    assert labels == {"a/1": 1, "b/1": 0, "b/my cat": 1}


def test_numbers_that_may_be_meant_otherwise_are_pointed_out(make, tmp_path, capsys):
    write_files(tmp_path / "val", FLAT)
    (tmp_path / "labels").write_text(label_lines("{name} {label}", [1, 2, 2, 1]))
    (tmp_path / "c.json").write_text('["0", "1", "10", "2"]')
    arguments = [tmp_path / "val", tmp_path / "out", "--labels", tmp_path / "labels", "--classes", tmp_path / "c.json"]
    make_shards.main([str(word) for word in arguments])
    err = capsys.readouterr().err
    assert "no label in" in err and "subtract 1" in err
    assert "2 is class '10'" in err


# --- Resizing and formats ---


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """One class: a wide JPEG, a tall PNG with transparency, a WebP, a small JPEG, a JPEG that lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees to see it upright
    wide = picture(1, 60).resize((90, 60))
    glass = picture(2, 60).resize((60, 121)).convert("RGBA")
    glass.putalpha(128)
    files = {
        "c/wide.jpg": encoded(wide, "jpeg", quality=80),
        "c/tall.png": png(glass),
        "c/web.webp": encoded(picture(3, 64), "webp"),
        "c/small.jpg": encoded(picture(4, 20), "jpeg"),
        "c/side.jpg": encoded(wide, "jpeg", exif=exif),
        "c/is_png.JPEG": png(picture(5, 20)),  # as one of ImageNet's is
    }
    return write_files(tmp_path_factory.mktemp("mixed"), files)


def test_resized_to_the_shorter_side(mixed, make, tmp_path):
    make(mixed, tmp_path / "out", "--size", "32")
    place = tmp_path / "out" / "train-*.tar"
    assert sizes(place) == {
        "c/wide": ("JPEG", (48, 32)),
        "c/tall": ("PNG", (32, 65)),
        "c/web": ("WEBP", (32, 32)),
        "c/small": ("JPEG", (20, 20)),
        "c/side": ("JPEG", (32, 48)),
        "c/is_png": ("PNG", (20, 20)),
    }
    found = {key: data for key, (data, _) in raw(place).items()}
    assert found["c/small"] == (mixed / "c/small.jpg").read_bytes()
    assert found["c/is_png"] == (mixed / "c/is_png.JPEG").read_bytes()
    # The pixels are those of a Lanczos filter; PNG loses nothing.
    expected = decode_rgb((mixed / "c/tall.png").read_bytes()).resize((32, 65), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found["c/tall"]))), np.asarray(expected))
    expected = decode_rgb((mixed / "c/side.jpg").read_bytes()).resize((32, 48), Image.Resampling.LANCZOS)
    difference = np.asarray(Image.open(io.BytesIO(found["c/side"]))).astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 4
    rows = {row["__key__"]: row for row in webdataset.WebDataset(glob.glob(str(place)), shardshuffle=False)}
    assert all(rows[key][suffix] == found[key] for key, suffix in (
        ("c/wide", "jpg"), ("c/tall", "png"), ("c/web", "webp"), ("c/small", "jpg"), ("c/is_png", "png")
    ))  # fmt: skip


@pytest.mark.parametrize("kind, suffix", [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_one_format_for_all(mixed, make, tmp_path, kind, suffix):
    make(mixed, tmp_path / "out", "--format", kind)
    place = tmp_path / "out" / "train-*.tar"
    assert {form for form, _ in sizes(place).values()} == {kind.upper()}
    assert all(suffix in row for row in webdataset.WebDataset(glob.glob(str(place)), shardshuffle=False))
    kept = {key for key, (data, _) in raw(place).items() if any(data == p.read_bytes() for p in mixed.glob("c/*"))}
    assert kept == {
        "jpeg": {"c/wide", "c/small", "c/side"},
        "png": {"c/tall", "c/is_png"},
        "webp": {"c/web"},
    }[kind]  # fmt: skip


def test_quality_is_that_of_the_option(mixed, make, tmp_path):
    make(mixed, tmp_path / "default", "--size", "32")
    for quality in ("95", "50"):
        make(mixed, tmp_path / quality, "--size", "32", "--quality", quality)
    found = {name: raw(tmp_path / name / "train-*.tar") for name in ("default", "95", "50")}
    assert found["default"] == found["95"]
    for key in ("c/wide", "c/web"):
        assert len(found["50"][key][0]) < len(found["95"][key][0])


def test_no_metadata_of_other_pixels_is_written(make, tmp_path):
    metadata = {"icc_profile": b"not that of RGB pixels", "comment": b"as the camera made it"}
    write_files(tmp_path / "in", {"c/1.jpg": encoded(picture(1, 40).convert("CMYK"), "jpeg", **metadata)})
    for kind in ("jpeg", "png", "webp"):
        make(tmp_path / "in", tmp_path / kind, "--size", "20", "--format", kind)
        ((data, _),) = raw(tmp_path / kind / "train-*.tar").values()
        image = Image.open(io.BytesIO(data))
        assert image.mode == "RGB" and not metadata.keys() & image.info.keys()


# --- Damaged images ---


@pytest.fixture
def damaged(tmp_path):
    """40 images, of which one ends early."""
    files = {f"c{i % 2}/{i:02d}.jpg": encoded(picture(i, 40), "jpeg") for i in range(40)}
    files["c1/07.jpg"] = files["c1/07.jpg"][:300]
    return write_files(tmp_path / "in", files)


@pytest.mark.parametrize("option", [("--check",), ("--size", "20"), ("--format", "png")])
def test_damaged_image_is_left_out_and_named(damaged, make, tmp_path, option):
    out = tmp_path / "out"
    assert "+ 1 left out" in make(damaged, out, *SMALL, *option)
    found = raw(out / "train-*.tar")
    assert len(found) == 39 and "c1/07" not in found
    text = (out / "train.make_shards.json").read_text()
    (row,) = json.loads(text)["left_out"]
    assert row["image"] == "c1/07.jpg" and "not a readable picture" in row["reason"]
    # A later call finds out again what is missing, and why.
    (shard,) = [path for path in out.glob("*.tar") if len(read_shard_index(path).keys) == 9]
    before = shard.stat().st_mtime_ns
    (out / "train.make_shards.json").unlink()
    make(damaged, out, *SMALL, *option)
    assert (out / "train.make_shards.json").read_text() == text and shard.stat().st_mtime_ns == before


def test_kept_images_are_not_looked_at(damaged, make, tmp_path):
    assert "+ 0 left out" in make(damaged, tmp_path / "out", *SMALL)
    assert raw(tmp_path / "out" / "train-*.tar")["c1/07"][0] == (damaged / "c1/07.jpg").read_bytes()


def test_too_many_damaged_images_are_an_error_at_the_end(damaged, make, tmp_path):
    for number in (8, 9):
        write_files(damaged, {f"c{number % 2}/{number:02d}.jpg": b"nothing"})
    for _ in range(2):  # a second call says so again
        line = error_line(make(damaged, tmp_path / "out", *SMALL, "--check", check=2))
        assert "3 of 40 images had to be left out, the first: c0/08.jpg: not a readable picture" in line
        assert len(raw(tmp_path / "out" / "train-*.tar")) == 37
        assert len(json.loads((tmp_path / "out/train.make_shards.json").read_text())["left_out"]) == 3


def test_image_that_could_not_be_read_comes_in_when_it_can(damaged, make, tmp_path, monkeypatch):
    def away(job, sample):
        if sample.key == "c0/02":
            raise ValueError("cannot be read: the disk is away")
        return load(job, sample)

    load = make_shards.load
    make(damaged, tmp_path / "whole", *SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(make_shards, "load", away)
        assert "+ 1 left out" in make(damaged, tmp_path / "out", *SMALL)
    assert "+ 0 left out" in make(damaged, tmp_path / "out", *SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- Going on ---


SHARDS = 12


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Images of which many shards are made, and what an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("large")
    pictures = [encoded(picture(i, 120), "jpeg", quality=60) for i in range(3)]
    write_files(folder / "in", {f"c{i % 3}/{i:02d}.jpg": pictures[i % 3] for i in range(2 * SHARDS)})
    make_shards.main([str(word) for word in command(folder, folder / "whole")])
    return folder


def command(large: Path, out: Path) -> list:
    return [large / "in", out, "--size", "64", "--samples-per-shard", "2", "--processes", "2"]


@pytest.fixture
def start(large, tmp_path):
    """Start the tool as processes of their own, of which two stand in the middle of a shard each."""
    processes = []

    def start(out: Path) -> tuple[subprocess.Popen, Points]:
        # Each has taken some shards before; what it stands at is open, and its images are not read.
        points = Points(tmp_path / "points", {"shard": ("open", r"/in/c\d/\d\d\.jpg r", 7)})
        words = [sys.executable, ROOT / "tools/make_shards.py", *command(large, out)]
        process = subprocess.Popen(
            [str(word) for word in words],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | points.environment,
        )
        processes.append(process)
        points.wait("shard", process, count=2)
        return process, points

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_end(group: int) -> None:
    """Wait until no process of the group is left."""

    def ended() -> bool:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        return False

    wait_for(ended, what="the end of processes whose parent has died")


@pytest.mark.parametrize("whom", ["group", "main process"])
def test_killed_run_goes_on(large, start, make, tmp_path, whom):
    out = tmp_path / "out"
    process, _ = start(out)
    (os.killpg if whom == "group" else os.kill)(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    wait_for_end(process.pid)
    finished = [path for path in out.glob("*.tar") if path.with_suffix(".index.json").exists()]
    assert 0 < len(finished) < SHARDS and not (out / "train.make_shards.json").exists()
    assert len(list(out.glob(".tmp-*.tar"))) == 2  # of the shards in whose middle they were
    (out / ".tmp-1-train-00011.tar").write_bytes(b"half a shard")
    times = {path: path.stat().st_mtime_ns for path in finished}
    make(*command(large, out))
    assert contents(out) == contents(large / "whole")
    assert {path: path.stat().st_mtime_ns for path in finished} == times  # and were not made again


def test_ctrl_c_ends_at_once_and_quietly(large, start, make, tmp_path):
    process, _ = start(tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=HANG_S)  # though the processes stand in the middle of a shard
    assert process.returncode == 130
    assert "Traceback" not in err and "the same command goes on" in err
    wait_for_end(process.pid)
    assert not glob.glob(f"{tmp_path}/out/.*")
    assert len(list((tmp_path / "out").glob("*.tar"))) < SHARDS
    make(*command(large, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(large / "whole")


def test_finished_set_stays_as_it_is(source, make, tmp_path):
    make(source, tmp_path / "out", *SMALL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert make(source, tmp_path / "out", *SMALL, "--processes", "1").startswith("finished already: 38 images in 4 sha")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("damage", ["cut", "no index", "damaged index", "no shard", "no summary", "no classes"])
def test_what_is_missing_is_made_again(source, make, tmp_path, damage):
    out = tmp_path / "out"
    make(source, out, *SMALL)
    before = contents(out)
    match damage:
        case "cut":
            os.truncate(out / "train-00001.tar", 5000)
        case "damaged index":
            (out / "train-00001.index.json").write_text('{"format": 1}')
        case "no index":
            (out / "train-00001.index.json").unlink()
        case "no shard":
            (out / "train-00001.tar").unlink()
        case "no summary":
            (out / "train.make_shards.json").unlink()
        case "no classes":
            (out / "classes.json").unlink()
    assert contents(out) != before
    make(source, out, *SMALL)
    assert contents(out) == before


@pytest.mark.parametrize(
    "options, words",
    [
        (["--size", "8"], "--size None instead of 8"),
        (["--seed", "3"], "--seed 0 instead of 3"),
        (["--samples-per-shard", "5"], "--samples-per-shard 10 instead of 5"),
        (["--no-labels"], "--no-labels False instead of True"),
        ("image", "other images or labels"),
        ("description", "train.plan.json is damaged"),
        ("no description", "whose train.plan.json is missing"),
    ],
)
def test_another_set_is_refused(source, make, tmp_path, options, words):
    out, folder = tmp_path / "out", tmp_path / "in"
    shutil.copytree(source, folder)
    make(folder, out, *SMALL)
    match options:
        case "image":
            write_files(folder, {"apple/new.png": png(picture(7))})
        case "description":
            (out / "train.plan.json").write_text("[]")
        case "no description":
            (out / "train.plan.json").unlink()
    before = contents(out)
    line = error_line(make(folder, out, *SMALL, *(options if isinstance(options, list) else []), check=2))
    assert words in line and "--fresh" in line
    assert contents(out) == before


def test_fresh_replaces_this_prefix_alone(source, make, tmp_path):
    out = tmp_path / "out"
    make(source, out, *SMALL, "--prefix", "train-b")
    make(source, out, *SMALL)
    kept = {name: data for name, data in contents(out).items() if not re.match(r"train(-0|\.)", name)}
    assert len(kept) == 4 * 2 + 3
    (out / "train-notes.tar").write_bytes(b"somebody's")
    make(source, out, "--size", "8", "--samples-per-shard", "20", "--fresh")
    after = contents(out)
    assert {name for name in after if re.match(r"train-0.*tar", name)} == {"train-00000.tar", "train-00001.tar"}
    assert kept.items() <= after.items() and after["train-notes.tar"] == b"somebody's"
    assert {max(size) for _, size in sizes(out / "train-0*.tar").values()} == {8}


def test_fresh_removes_nothing_for_bad_input(source, make, tmp_path):
    make(source, tmp_path / "out", *SMALL)
    before = contents(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", tmp_path / "out", "--fresh", check=2)
    assert contents(tmp_path / "out") == before


def test_other_classes_are_refused(source, make, tmp_path):
    out = tmp_path / "out"
    make(source, out, *SMALL)
    shutil.copytree(source / "b.dogs", tmp_path / "val" / "b.dogs")
    before = contents(out)
    line = error_line(make(tmp_path / "val", out, "--prefix", "val", check=2))
    assert f"add --classes {out}/classes.json" in line and contents(out) == before
    printed = make(tmp_path / "val", out, "--prefix", "val", "--classes", out / "classes.json")
    assert f"data.train={out}/train-*.tar" in printed and f"data.validation={out}/val-*.tar" in printed
    assert {label for _, label in raw(out / "val-*.tar").values()} == {2}
    make(tmp_path / "val", out, "--prefix", "val", "--fresh")
    assert json.loads((out / "classes.json").read_text()) == ["b.dogs"]


def test_two_runs_at_once_are_refused(source, make, tmp_path, monkeypatch):
    make(source, tmp_path / "out", *SMALL)
    (tmp_path / "out/train-00002.tar").unlink()
    (tmp_path / "out/.tmp-1-train-00002.tar").write_bytes(b"the other's")
    monkeypatch.setattr(shard_labels.time, "sleep", lambda seconds: None)
    with open(tmp_path / "out/train.plan.json", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run is making train-*.tar" in error_line(make(source, tmp_path / "out", *SMALL, check=2))
        assert (tmp_path / "out/.tmp-1-train-00002.tar").exists()
    make(source, tmp_path / "out", *SMALL)
    assert not (tmp_path / "out/.tmp-1-train-00002.tar").exists()


def test_full_disk_is_one_line_and_the_run_goes_on(large, make, tmp_path):
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, limits[1]))  # a shard has 10,240 bytes
    try:
        err = make(*command(large, out), check=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(rf"cannot write {out}/train-0000\d\.tar: File too large; make room", error_line(err))
    assert {path.name for path in out.iterdir()} == {"classes.json", "train.plan.json"}
    make(*command(large, out))
    assert contents(out) == contents(large / "whole")


def test_process_that_dies_is_one_line(source, make, tmp_path, monkeypatch):
    monkeypatch.setattr(make_shards, "load", lambda job, sample: os.kill(os.getpid(), signal.SIGKILL))
    assert "a process was killed" in error_line(make(source, tmp_path / "out", *SMALL, check=2))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"classes.json", "train.plan.json"}


def count_or_sleep(job):
    """Work for `in_processes`: so many images; 0 fails; a path is written to after a time in which all should end."""
    if job == 0:
        raise UserError("job 0 fails")
    if isinstance(job, Path):
        time.sleep(HANG_S)
        job.touch()
        return 0
    for _ in range(job):
        make_shards.count_one()
    return job


def press_ctrl_c(job):
    os.kill(os.getpid(), signal.SIGINT)
    return job


def test_ctrl_c_is_the_main_process_s_matter():
    results = []
    try:
        make_shards.in_processes(press_ctrl_c, range(4), 2, done=results.append, tick=lambda count: None)
    except KeyboardInterrupt:
        pytest.fail("a process was interrupted by itself")
    assert sorted(results) == [0, 1, 2, 3]


def test_processes_tell_how_many_images_are_done():
    counts, results = [], []
    make_shards.in_processes(count_or_sleep, range(1, 10), 2, done=results.append, tick=counts.append)
    assert sorted(results) == [*range(1, 10)] and counts[-1] == 45 and counts == sorted(counts)


def test_one_failure_ends_all_processes(tmp_path):
    late = tmp_path / "late"
    with pytest.raises(UserError, match="job 0 fails"):
        make_shards.in_processes(count_or_sleep, [late, 0, late, late], 2, done=print, tick=lambda count: None)
    assert not late.exists() and not multiprocessing.active_children()


def test_label_lines_tell_names_apart_by_capitals_alone(tmp_path):
    write_files(tmp_path / "in", {"1.png": png(picture(1)), "1.PNG": png(picture(2))})
    (tmp_path / "labels").write_text("1.png ant\n1.PNG bee\n")
    found = shard_labels.read_sources(tmp_path / "in", labels=tmp_path / "labels", classes=None, labelled=True)
    assert [(image.path, found.classes[image.label]) for image in found.images] == [("1.PNG", "bee"), ("1.png", "ant")]


# --- Shards of others ---


@pytest.fixture
def foreign(tmp_path):
    """Shards in other people's manner: 0 is whole, 1 cut off, 2 no tar file at all."""
    for shard in range(3):
        members = {}
        for i in range(4):
            members |= {f"./{i}.cls": b"%d" % i, f"./{i}.jpeg": encoded(picture(i, 40), "jpeg"), f"./{i}.json": b"{}"}
        write_shard(tmp_path / f"set-{shard}.tar", members)
    whole = read_shard_index(tmp_path / "set-1.tar")
    os.truncate(tmp_path / "set-1.tar", whole.offsets[2] + 100)
    (tmp_path / "set-2.tar").write_bytes(b"<html>not found</html>" * 100)
    return tmp_path


def test_foreign_shards_are_indexed(foreign, make):
    err = make("--index", f"{foreign}/set-*.tar", "--processes", "2", check=2)
    assert "1 of 3 shards could not be indexed" in error_line(err)
    assert f"cannot read shard {foreign}/set-2.tar" in err
    assert re.search(
        rf"{foreign}/set-1\.tar: \d of \d samples can't be used, the first: \./2: the shard is cut off", err
    )
    assert sorted(path.name for path in foreign.glob("*.json")) == ["set-0.index.json", "set-1.index.json"]
    index = ShardIndex.from_json((foreign / "set-0.index.json").read_text(), "")
    data = (foreign / "set-0.tar").read_bytes()
    assert index.labels == [0, 1, 2, 3] and index.sha256 == hashlib.sha256(data).hexdigest()
    for i, (offset, size) in enumerate(zip(index.offsets, index.sizes, strict=True)):
        assert data[offset : offset + size] == encoded(picture(i, 40), "jpeg")
    cut = ShardIndex.from_json((foreign / "set-1.index.json").read_text(), "")
    assert min(cut.problems) == 2 and cut.keys[:3] == ["./0", "./1", "./2"]


def test_indexes_that_fit_are_kept(foreign, make):
    (foreign / "set-2.tar").unlink()
    make("--index", f"{foreign}/set-0.tar", f"{foreign}/set-1.tar")
    before = {path: path.stat().st_mtime_ns for path in foreign.glob("*.json")}
    assert "2 of which had their index already" in make("--index", f"{foreign}/*.tar")
    assert {path: path.stat().st_mtime_ns for path in foreign.glob("*.json")} == before
    # One without checksums, a damaged one, and one of another shard are replaced.
    good = (foreign / "set-0.index.json").read_text()
    index = ShardIndex.from_json(good, "")
    write_shard(foreign / "other.tar", {"a.png": png(picture(1)), "a.cls": b"0"})
    other = make_shards.write_shard_index(foreign / "other.tar").to_json()
    for text in (ShardIndex(**{**vars(index), "sha256": None}).to_json(), "{", other):
        (foreign / "set-0.index.json").write_text(text)
        make("--index", f"{foreign}/set-*.tar")
        assert (foreign / "set-0.index.json").read_text() == good


def test_index_of_a_shard_that_was_cut_off_since_is_kept(foreign, make):
    make("--index", f"{foreign}/set-0.tar")
    before = (foreign / "set-0.index.json").read_text()
    os.truncate(foreign / "set-0.tar", ShardIndex.from_json(before, "").offsets[1] + 10)
    err = make("--index", f"{foreign}/set-0.tar", check=2)
    assert "3 of 4 samples can't be used" in err and "1 of 1 shards could not be indexed" in error_line(err)
    assert (foreign / "set-0.index.json").read_text() == before


# --- Bad input ---


def bad_inputs():
    """(name, words of the error line, arguments, files); IN and OUT stand for the folders."""
    lines = label_lines("{name} {label}")
    flat = ["IN", "OUT", "--labels", "LABELS"]
    yield "no folder", "is no folder", ["IN/nothing", "OUT"], {}
    yield "file", "is no folder", ["IN/c/1.png", "OUT"], {}
    yield "one place", "give a folder of images and a folder", ["IN"], {}
    yield "empty", "no images in", ["EMPTY", "OUT"], {}
    yield "flat", "4 images but no class folders; give their labels with --labels FILE", ["FLAT", "OUT"], {}
    yield "same folder", "would be taken for a class", ["IN", "IN"], {}
    yield "out in folder", "would be taken for a class", ["IN", "IN/c/out"], {}
    yield "out is a file", "LABELS is a file", ["IN", "LABELS"], {"LABELS": ""}
    yield "prefix", "--prefix 'a/b'", ["IN", "OUT", "--prefix", "a/b"], {}
    yield "size", "--size must be 1 to 65535, got 0", ["IN", "OUT", "--size", "0"], {}
    yield "quality", "--quality must be 1 to 100, got 101", ["IN", "OUT", "--quality", "101"], {}
    yield "shard", "--samples-per-shard must be at least 1", ["IN", "OUT", "--samples-per-shard", "0"], {}
    yield "processes", "--processes must be at least 1", ["IN", "OUT", "--processes", "0"], {}
    yield "seed", "--seed must be at least 0", ["IN", "OUT", "--seed", "-1"], {}
    yield "no labels", "leave out --labels", [*flat, "--no-labels"], {"LABELS": lines}
    yield "index and folder", "leave out FOLDER", ["IN", "OUT", "--index", "x.tar"], {}
    yield "no shard", "no shards at", ["--index", "OUT/*.tar"], {}
    known = {"CLASSES": '["a", "b"]'}
    yield "unknown folder", "1 of 1 folders", ["IN", "OUT", "--classes", "CLASSES"], known
    yield "classes twice", "'a' is there twice", ["IN", "OUT", "--classes", "CLASSES"], {"CLASSES": '["a", "a"]'}
    yield "no list", "not a JSON list", ["IN", "OUT", "--classes", "CLASSES"], {"CLASSES": "{}"}
    yield "no classes file", "No such file", ["IN", "OUT", "--classes", "CLASSES"], {}
    flat[0] = "FLAT"
    yield "no label file", "No such file", flat, {}
    yield "empty label file", "empty", flat, {"LABELS": "\n"}
    yield "one value a line", "in another order than the sorted classes", flat, {"LABELS": "490\n361\n171\n822\n"}
    yield "one value in a line", "line 5 is not of the form", flat, {"LABELS": lines + "alone\n"}
    yield "three values", "line 1 is not of the form", flat, {"LABELS": "a.jpg,1,2\n"}
    yield "image without line", "2 of 4 images in", flat, {"LABELS": "".join(lines.splitlines(True)[1:3])}
    yield "line without image", "2 of 6 lines name no image", flat, {"LABELS": "a.jpg n01\n" + lines + "b n01\n"}
    yield "two labels", "lines 1 and 5 give", flat, {"LABELS": lines + lines.splitlines()[0].replace("n02", "n01")}
    numbers = label_lines("{name} {label}", [0, 1, 2, 1])
    yield "too large", "1 of 4 labels lie outside 0 to 1", [*flat, "--classes", "CLASSES"], known | {"LABELS": numbers}
    yield "negative", "1 of 4 labels lie outside 0", flat, {"LABELS": numbers.replace(" 0\n", " -1\n")}
    yield "huge", "1 of 4 labels lie outside 0", flat, {"LABELS": numbers.replace(" 0\n", " 90000000\n")}
    yield "unknown name", "4 of 4 labels are no class", [*flat, "--classes", "CLASSES"], known | {"LABELS": lines}
    twins = ["TWINS", "OUT", "--labels", "LABELS"]
    yield "ambiguous", "'1.png' may be a/1.png or b/1.png", twins, {"LABELS": "1.png x\n"}


@pytest.mark.parametrize("words, arguments, files", [row[1:] for row in bad_inputs()], ids=[r[0] for r in bad_inputs()])
def test_bad_input_is_one_line_and_leaves_nothing_behind(make, tmp_path, words, arguments, files):
    write_files(tmp_path / "IN", {"c/1.png": png(picture(1))})
    write_files(tmp_path / "FLAT", FLAT)
    write_files(tmp_path / "TWINS", {"a/1.png": png(picture(1)), "b/1.png": png(picture(2))})
    (tmp_path / "EMPTY").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    places = re.compile(r"^(IN|OUT|FLAT|TWINS|EMPTY|LABELS|CLASSES)\b")
    err = make(*(places.sub(rf"{tmp_path}/\1", word) for word in arguments), check=2)
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and words in err
    assert sorted(tmp_path.rglob("*")) == before


def test_class_folder_that_cannot_be_read_shifts_no_labels(source, make, tmp_path, monkeypatch):
    def scandir(path="."):
        if Path(path) == source / "apple":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    real = os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        err = make(source, tmp_path / "out", check=2)
    assert f"cannot read {source}/apple: Permission denied" in error_line(err)
    assert not (tmp_path / "out").exists()


def test_script_ends_with_code_2_and_one_line(tmp_path):
    words = [sys.executable, str(ROOT / "tools/make_shards.py"), str(tmp_path), str(tmp_path / "out")]
    run = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_notes_name_what_is_passed_over(make, tmp_path, capsys):
    write_files(
        tmp_path / "in", {"c/1.png": png(picture(1)), "loose.png": png(picture(1)), "empty/x": b"", ".1.png": b""}
    )
    make_shards.main([str(tmp_path / "in"), str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert "note: 1 images that lie directly in" in err
    assert "note: 1 folders without images are no classes, the first: 'empty'" in err


def test_examples_of_the_help_are_commands():
    text = make_shards.EXAMPLES.replace("\\\n", " ")
    examples = re.findall(r"python tools/make_shards.py (.*)", text)
    assert len(examples) == 5
    for example in examples:
        arguments = make_shards.parse(shlex.split(example))
        assert arguments.index or arguments.out
