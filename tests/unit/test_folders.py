"""Folders of pictures: none is lost or renumbered without a word, whoever reads them."""

import os
from pathlib import Path

import pytest
from PIL import Image
from support.training import png

from ibq.config import UserError
from ibq.data.shards import ImageDataConfig, open_images, split_sources
from ibq.evaluation.image_sets import open_set
from tools.lib.shards.labels import read_sources

PICTURE = png(Image.new("RGB", (4, 4)))
LABELLED = ImageDataConfig(train="x", max_bad_fraction=1.0)
FREE = ImageDataConfig(train="x", labels=False)


def tree(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PICTURE)
    return str(folder)


def rows(index) -> list[tuple[str, str]]:
    """(name, class or problem) of each picture."""
    bad = dict(index.problems())
    return [(index.key(n), bad.get(n) or index.classes[entry.label]) for n, entry in enumerate(index)]


def test_loose_pictures_beside_class_folders(tmp_path):
    place = tree(tmp_path, *(f"{n:02d}.png" for n in range(30)), "preview/a.png", "preview/b.jpg")
    assert len(open_images(place, FREE)) == 32 and not open_images(place, FREE).problems()
    index = open_images(place, LABELLED)
    assert len(index) == 32 and len(index.problems()) == 30
    assert rows(index)[:2] == [("preview/a.png", "preview"), ("preview/b.jpg", "preview")]
    assert rows(index)[2] == ("00.png", "the label is missing: it lies beside the class folders")
    with pytest.raises(UserError, match=r"30 of 32 samples can't be used.*set data.labels=false"):
        open_images(place)
    assert len(read_sources(tmp_path, labels=None, classes=None, labelled=False).images) == 32


def test_a_folder_of_pictures_alone(tmp_path):
    place = tree(tmp_path, "a.png", "b.png")
    assert [name for name, _ in rows(open_images(place, FREE))] == ["a.png", "b.png"]
    with pytest.raises(UserError, match=r"expected one sub-folder a class.*set data.labels=false"):
        open_images(place)


def test_links_to_folders_are_followed(tmp_path):
    tree(tmp_path / "elsewhere", "1.png", "2.png")
    place = tree(tmp_path / "set", "a/0.png", "c/3.png")
    (tmp_path / "set/b").mkdir()
    (tmp_path / "set/b/more").symlink_to(tmp_path / "elsewhere")
    assert rows(open_images(place)) == [
        ("a/0.png", "a"),
        ("b/more/1.png", "b"),
        ("b/more/2.png", "b"),
        ("c/3.png", "c"),
    ]
    (tmp_path / "set/b/more/round").symlink_to(tmp_path / "set/b")
    with pytest.raises(UserError, match="is a link to a folder that it lies in"):
        open_images(place)


@pytest.mark.parametrize("suffix", [".bmp", ".GIF", ".tif"])
def test_a_class_of_pictures_that_are_not_read_is_refused(suffix, tmp_path, capsys):
    place = tree(tmp_path, "a/1.png", f"b/1{suffix}", f"b/2{suffix}", "c/1.jfif")
    for read in (
        lambda: open_images(place, LABELLED),
        lambda: read_sources(tmp_path, labels=None, classes=None, labelled=True),
    ):
        with pytest.raises(UserError, match=rf"/b' has 2 pictures, but {suffix.lower()} files are not read"):
            read()
    assert rows(open_images(place, ImageDataConfig(train="x", labels=False, max_bad_fraction=0.5)))[1] == (
        f"b/1{suffix}",
        f"{suffix.lower()} files are not read, only JPEG, PNG and WebP",
    )
    assert len(read_sources(tmp_path, labels=None, classes=None, labelled=False).images) == 2
    assert f"{tmp_path}/b/1{suffix}: {suffix.lower()} files are not read" in capsys.readouterr().err


def test_some_pictures_of_a_class_that_are_not_read(tmp_path):
    place = tree(tmp_path, "a/1.png", "a/2.bmp", "b/1.JFIF", "empty/readme.txt", ".hidden/1.png", "b/._1.png")
    assert rows(open_images(place, LABELLED)) == [
        ("a/1.png", "a"),
        ("a/2.bmp", ".bmp files are not read, only JPEG, PNG and WebP"),
        ("b/1.JFIF", "b"),
    ]
    with pytest.raises(UserError, match="1 of 3 samples can't be used"):
        open_images(place)


def test_loose_pictures_of_other_kinds_are_counted(tmp_path):
    place = tree(tmp_path, "a/1.png", "1.bmp", "2.png")
    assert rows(open_images(place, LABELLED))[1:] == [
        ("1.bmp", ".bmp files are not read, only JPEG, PNG and WebP"),
        ("2.png", "the label is missing: it lies beside the class folders"),
    ]


def test_links_to_nothing(tmp_path, capsys):
    """A picture is missed, a class would shift all labels, and what was neither does not matter."""
    place = tree(tmp_path / "set", "a/1.png", "c/1.png")
    for name in ("a/2.png", "a/notes.txt"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "gone")
    problem = f"a link to '{tmp_path}/gone', which is not there"
    assert rows(open_images(place, LABELLED)) == [("a/1.png", "a"), ("a/2.png", problem), ("c/1.png", "c")]
    sources = read_sources(tmp_path / "set", labels=None, classes=None, labelled=True)
    assert [image.path for image in sources.images] == ["a/1.png", "c/1.png"]
    assert sources.passed_over == {"link to what is not there": 1}
    assert f"1 pictures in {place}/a are passed over, such as {place}/a/2.png: {problem}" in capsys.readouterr().err
    for number, (link, words) in enumerate({"b": "if it was a class", "b/1.png": "has 1 pictures, but a link"}.items()):
        tree(tmp_path / f"{number}", "a/1.png", "c/1.png")
        (tmp_path / f"{number}" / link).parent.mkdir(exist_ok=True)
        (tmp_path / f"{number}" / link).symlink_to("gone")
        for read in (
            lambda folder: open_images(str(folder), LABELLED),
            lambda folder: read_sources(folder, labels=None, classes=None, labelled=True),
        ):
            with pytest.raises(UserError, match=words):
                read(tmp_path / f"{number}")


def test_names_that_are_no_text(tmp_path):
    place = tree(tmp_path, os.fsdecode(b"a/\xff.png"), "b/1.png")
    index = open_images(place)
    assert index.classes == ["a", "b"] and index.fingerprint() != index.subset([1]).fingerprint()


def test_a_single_picture_can_t_be_split(tmp_path):
    with pytest.raises(UserError, match=r"data\.train: .* has 1 image, and none is left .* data\.validation"):
        split_sources(ImageDataConfig(train=tree(tmp_path, "a/1.png")))


def test_figures_are_of_all_pictures(tmp_path):
    place = tree(tmp_path, "1.png", "2.png", "preview/3.png")
    assert len(open_set(place, 4).index) == 3


def test_classes_of_another_set_are_matched_by_name(tmp_path):
    """As where a validation folder lacks the first class."""
    train = open_images(tree(tmp_path / "train", "ant/1.png", "bee/1.png", "cat/1.png"))
    validation = open_images(tree(tmp_path / "val", "bee/2.png", "cat/2.png"))
    assert validation.label.tolist() == [0, 1]
    same = validation.numbered_as(train.classes)
    assert same.label.tolist() == [1, 2] and same.classes == train.classes == ["ant", "bee", "cat"]
    assert validation.label.tolist() == [0, 1]
    other = open_images(tree(tmp_path / "other", "bee/2.png", "dog/2.png"))
    with pytest.raises(ValueError, match="its class 'dog' is none of theirs"):
        other.numbered_as(train.classes)
