"""Classes of shards in several folders: matched by name, or refused; never by number alone."""

import json
import shutil

import pytest
from PIL import Image
from support.training import CLASSES, png, write_shard

from ibq.config import UserError
from ibq.data.shards import ImageDataConfig, open_images, open_split, split_sources
from ibq.training.run_data import image_data

CONFIG = ImageDataConfig(train="x")


def folder(path, names, labels) -> str:
    """A shard of one picture for each label, and the names of its classes."""
    path.mkdir(parents=True)
    picture = png(Image.new("RGB", (4, 4)))
    members = {}
    for number, label in enumerate(labels):
        members |= {f"{path.name}{number}.png": picture, f"{path.name}{number}.cls": str(label).encode()}
    write_shard(path / "s.tar", members)
    if names is not None:
        (path / "classes.json").write_text(json.dumps(names))
    return str(path / "s.tar")


def named(index) -> list[str]:
    """Key and class name of every image that can be used."""
    bad = dict(index.problems())
    return [f"{index.key(n)} {index.classes[entry.label]}" for n, entry in enumerate(index) if n not in bad]


def test_other_classes_in_another_folder(tmp_path):
    folder(tmp_path / "a", ["cat", "dog"], [0, 1, 1])
    folder(tmp_path / "b", ["car", "cat"], [0, 1])
    index = open_images(str(tmp_path / "*" / "s.tar"), CONFIG)
    assert index.classes == ["cat", "dog", "car"]
    assert named(index) == ["a0 cat", "a1 dog", "a2 dog", "b0 car", "b1 cat"]
    train, validation = split_sources(ImageDataConfig(train=str(tmp_path / "*" / "s.tar"), validation_every=2))
    assert train[0].classes == validation[0].classes == index.classes
    part = open_split(str(tmp_path / "*" / "s.tar"), "validation", 2, CONFIG)
    assert named(part) == ["a0 cat", "a2 dog", "b1 cat"]


def test_the_same_classes_stay_as_they_are(tmp_path):
    for name in "ab":
        folder(tmp_path / name, ["cat", "dog"], [1, 0])
    index = open_images(str(tmp_path / "*" / "s.tar"), CONFIG)
    assert index.classes == ["cat", "dog"] and [entry.label for entry in index] == [1, 0, 1, 0]


def test_a_label_beyond_its_own_list_is_bad_though_the_merged_one_is_longer(tmp_path):
    folder(tmp_path / "a", ["cat", "dog"], [0, 2, *[1] * 40])
    folder(tmp_path / "b", ["car", "bus"], [0, 1])
    index = open_images(str(tmp_path / "*" / "s.tar"), CONFIG)
    (problem,) = index.problems()
    assert problem[0] == 1 and "out of range" in problem[1]
    assert named(index)[-2:] == ["b0 car", "b1 bus"]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (["cat", "dog"], None, "b has no such file"),
        (None, ["cat", "dog"], "a has no such file"),
        (["crane", "crane"], ["cat", "dog"], "has the name 'crane' twice"),
    ],
)
def test_what_cannot_be_matched_is_refused(first, second, words, tmp_path):
    folder(tmp_path / "a", first, [0, 1])
    folder(tmp_path / "b", second, [0, 1])
    with pytest.raises(UserError) as caught:
        open_images(str(tmp_path / "*" / "s.tar"), CONFIG)
    assert words in str(caught.value) and "classes.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(open_images(str(tmp_path / "*" / "s.tar"), ImageDataConfig(train="x", labels=False))) == 4


def in_order(tmp_path, **settings):
    """The data of a run that reads the shards of both folders as URLs, one after the other."""
    place = f"file://{tmp_path}/{{a,b}}/s.tar"
    settings |= {"validation": folder(tmp_path / "v", ["cat"], [0]), "cache_folder": str(tmp_path / "cache")}
    return image_data(ImageDataConfig(train=place, unindexed="in_order", streams=1, retries=0, **settings), 4, 0)


def test_shards_that_are_read_in_order_are_matched_by_name(tmp_path):
    folder(tmp_path / "a", ["cat", "dog"], [0, 1, 1])
    folder(tmp_path / "b", ["car", "cat"], [0, 1, 2])
    data = in_order(tmp_path)
    assert data.order.size is None and data.classes == ["cat", "dog", "car"]
    _, labels, bad = data.stream.batch(range(6))
    assert labels[:5].tolist() == [0, 1, 1, 2, 0] and [sample.key for sample in bad] == ["b2"]


@pytest.mark.parametrize(("second", "words"), [(None, "b has no such file"), (["car", "car"], "'car' twice")])
def test_shards_that_are_read_in_order_are_refused_too(second, words, tmp_path):
    folder(tmp_path / "a", ["cat", "dog"], [0, 1])
    folder(tmp_path / "b", second, [0, 1])
    with pytest.raises(UserError, match=rf"^data\.train: .*{words}"):
        in_order(tmp_path)
    shutil.rmtree(tmp_path / "v")
    assert in_order(tmp_path, labels=False).stream.batch(range(4))[1].tolist() == [0, 1, 0, 1]


def test_numbers_are_names_where_no_folder_has_others(tmp_path):
    for name in "ab":
        folder(tmp_path / name, None, range(CLASSES))
    assert open_images(str(tmp_path / "*" / "s.tar"), CONFIG).classes == [str(i) for i in range(CLASSES)]
