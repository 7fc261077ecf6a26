"""Random folders and shards: which picture is read with which class, by training and all tools, against a model.

The model (`support.places`) states the rules of `ibq/data/README.md` in its own words. A failure names its seed;
`IBQ_FUZZ=SEED` or `IBQ_FUZZ=FIRST-LAST` runs others in place of the fixed ones.
"""

import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import pytest
import torch
from support.models import TOKENIZER
from support.places import BROKEN, KNOWN, LEVELS, SIDE, Content, Draw, Row, Shards, Tree, number_of, pictures_below
from torch import Tensor, nn

from ibq.config import UserError, parse_config
from ibq.data.codes import CodeDataset
from ibq.data.images import BadSampleError, ImageDataset
from ibq.data.index import ImageIndex
from ibq.data.shards import ImageDataConfig, open_images
from ibq.data.transforms import decode_rgb
from ibq.evaluation.image_sets import open_set
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.training.run_data import image_data
from tools import encode_shards, evaluate, make_shards
from tools.lib.evaluate import reconstruction
from tools.lib.options import open_images_of
from tools.lib.shards.labels import Options, ShardSet, read_sources

TREES, LABEL_FILES, WHOLE, BLOCK = 300, 80, 24, 50  # seeds of each kind; of one test at most
SHARE = 0.05  # of a set that may be unusable where nothing else is said
T = TypeVar("T")


@pytest.fixture(autouse=True)
def place_of_its_own(tmp_path, monkeypatch):
    """A cache of its own; and nothing here is to outlast a power cut."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda file: None)


def blocks(count: int):
    """The tests of so many seeds: several, so that one that fails does not hide all others."""
    return pytest.mark.parametrize("seeds", [range(n, min(n + BLOCK, count)) for n in range(0, count, BLOCK)], ids=str)


def for_each(seeds: range, folder: Path, check: Callable[[int, Path], None]) -> None:
    """Run a check for each seed in a folder of its own; a failure says how to see it again."""
    if wanted := os.environ.get("IBQ_FUZZ"):
        first, _, last = wanted.partition("-")
        seeds = range(int(first), int(last or first) + 1) if seeds.start == 0 else range(0)
    test = os.environ["PYTEST_CURRENT_TEST"].split("[")[0]
    for seed in seeds:
        try:
            check(seed, folder / f"{seed}")
        except (Exception, pytest.fail.Exception) as error:
            pytest.fail(f"seed {seed}: {error!r}; again: IBQ_FUZZ={seed} python -m pytest {test} -n 0")


# --- What is read, and what should be ---


def outcome(expected: Content | None, read: Callable[[], T]) -> T | None:
    """What a place gives; None where it is refused by one clear line, which the model must say too."""
    if expected is not None:
        return read()
    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return None


def in_order(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=repr)


def good(content: Content) -> list[Row]:
    """The rows whose pictures can be decoded."""
    return in_order(row for row in content.rows if row[1] != BROKEN)


def unlabelled(content: Content | None) -> Content | None:
    return content and content._replace(rows=[(None, picture) for _, picture in content.rows])


def rows_of(index: ImageIndex, labelled: bool) -> list[Row]:
    """(class, picture) of every sample of an index, as far as that knows of nothing wrong."""
    dataset, rows = ImageDataset(index, SIDE), []
    for number, entry in enumerate(index):
        if entry.problem is None:
            try:
                picture = number_of(dataset.pixels(number, 0))
            except BadSampleError:
                picture = BROKEN
            rows.append((index.classes[entry.label] if labelled else None, picture))
    return rows


def assert_same(index: ImageIndex | None, expected: Content | None, labelled: bool) -> None:
    if index is not None:
        assert in_order(rows_of(index, labelled)) == in_order(expected.rows)
        assert len(index.problems()) == expected.unusable


def drawn(batch: tuple[Tensor, Tensor, list], classes: Sequence[str] | None) -> list[Row]:
    """(class, picture) of each image of a batch."""
    numbers = [number_of(image) for image in batch[0].permute(0, 2, 3, 1).numpy()]
    return [(classes and classes[label], number) for label, number in zip(batch[1].tolist(), numbers, strict=True)]


def check_training(config: ImageDataConfig, expected: Content | None, named: bool) -> None:
    """What a run takes in its first epoch and its validation; what it can't use is replaced by other samples."""
    expected = expected and expected.within(config.max_bad_fraction)
    data = outcome(expected, lambda: image_data(config, SIDE, 0))
    if data is None:
        return
    if not good(expected):
        outcome(None, data.check_validation)
        return
    classes = data.classes if config.labels else None
    assert not named or not classes or classes == expected.classes
    samples, lost = len(expected.rows) + expected.unusable, len(expected.rows) + expected.unusable - len(good(expected))
    validation = data.validation_sets[0].batch(range(len(data.validation_sets[0])))
    held_out = len(data.validation_sets[0]) if config.validation is None else 0
    training = data.stream.batch(range(samples - held_out))
    replaced = {sample.position for sample in training[2]}
    own = [row for position, row in enumerate(drawn(training, classes)) if position not in replaced]
    assert in_order(own + (drawn(validation, classes) if held_out else [])) == good(expected)
    assert len(replaced) == len(training[2]) == lost and {*drawn(training, classes)} <= {*good(expected)}
    assert held_out or (in_order(drawn(validation, classes)) == good(expected) and len(validation[2]) == lost)


def config_of(draw: Draw, place: str, expected: Content | None, **settings) -> ImageDataConfig:
    """Settings of a run; where all can be used, perhaps with a part that is held out for validation."""
    clean = expected is not None and not expected.unusable and len(good(expected)) == len(expected.rows) > 1
    settings |= {"streams": draw.rng.randint(1, 3), "shuffle_window": draw.rng.choice([1, 3, 99]), "workers": 0}
    settings |= {"max_bad_fraction": draw.rng.choice([1.0, 1.0, 0.3, SHARE]), "retries": 0}
    held_out = clean and settings.get("unindexed") != "in_order" and draw.chance(0.5)
    more = {"validation_every": draw.rng.randint(2, 4)} if held_out else {"validation": place}
    return ImageDataConfig(train=place, **settings, **more)


def check_tools(place: str, labelled: Content | None, free: Content | None, limit: float) -> None:
    """What encoding, and figures of reconstructions and of generated images, open and read."""
    words = ["--tokenizer", "x", "--output", "x", "--images", place, "--max-bad-fraction", str(limit)]
    wanted = labelled and labelled.within(limit)
    assert_same(outcome(wanted, lambda: encode_shards.open_usable(encode_shards.parse(words))), wanted, True)
    arguments = evaluate.parse(["reconstruction", "--tokenizer", "x", "--images", place])
    wanted = unlabelled(free and free.within(SHARE))
    config = ImageDataConfig(train=place, labels=False)
    assert_same(outcome(wanted, lambda: open_images_of(arguments, config)), wanted, False)
    whole = wanted if wanted and not wanted.unusable and good(wanted) == in_order(wanted.rows) else None
    if (images := outcome(whole, lambda: [*open_set(place, SIDE).blocks(3)])) is not None:
        numbers = [number_of(image) for block in images for image in block.permute(0, 2, 3, 1).numpy()]
        assert sorted(numbers) == sorted(number for _, number in whole.rows)


# --- Folders ---


def check_folder(seed: int, root: Path) -> None:
    tree = Tree(seed, root)
    labelled, free = tree.expected(True), unlabelled(tree.expected(False))
    place = str(tree.place) + tree.rng.choice(["", "/"])
    for labels, expected in ((True, labelled), (False, free)):
        check_training(config_of(tree, place, expected, labels=labels), expected, named=True)
        check_sources(tree, expected, labelled=labels)
    check_tools(place, labelled, free, tree.rng.choice([1.0, 0.3]))


def check_sources(tree: Tree, expected: Content | None, *, labelled: bool, **files: Path | None) -> None:
    """What tools/make_shards.py makes shards of: what it can't use it passes over."""
    files = {"labels": None, "classes": None} | files
    sources = outcome(expected, lambda: read_sources(tree.place, labelled=labelled, **files))
    if sources is None:
        return
    more = {"order": "shuffled", "seed": 0, "check": False, "no_labels": not labelled}
    options, rows = Options(size=None, format="keep", quality=95, samples_per_shard=3, **more), []
    for job in ShardSet(tree.place, tree.root / "out", "train", sources, options).jobs():
        for sample in job.samples:
            try:
                picture = number_of(np.asarray(decode_rgb(make_shards.load(job, sample)[1])))
            except ValueError:
                picture = BROKEN
            rows.append((sources.classes[sample.label] if labelled else None, picture))
    assert in_order(rows) == in_order(expected.rows)
    assert sources.classes == (expected.classes if labelled else None)


@blocks(TREES)
def test_folders(seeds, tmp_path):
    for_each(seeds, tmp_path, check_folder)


# --- Folders with a label file ---


def check_label_file(seed: int, root: Path) -> None:
    """A folder of pictures, and a file with a class for each of them, or not quite."""
    tree = Tree(seed, root)
    files = {path: data for path, data in (pictures_below(tree.place) or {}).items() if data is not None}
    form = tree.rng.choice(["whole", "whole", "twice", "missing", "extra", "contrary"])
    numbers = tree.chance(0.3)
    labels = {path: tree.rng.choice("012" if numbers else ["ant", "Bee", "cat 2"]) for path in sorted(files)}
    lines = tree.rng.sample([*labels.items()], len(labels)) or [("none.png", "0")]
    (path, label), rest = lines[0], lines[1:]
    more = {"twice": (path, label), "extra": ("none.png", label), "contrary": (path, f"{label}1")}
    lines = rest if form == "missing" else [*lines, more[form]] if form in more else lines
    separator = tree.rng.choice(["\t", ","])
    text = "".join(f"{path}{separator}{label}\n" for path, label in lines)
    (root / "labels").write_text(text, "utf-8", "surrogateescape")
    classes = (
        [str(n) for n in range(1 + max(map(int, labels.values()), default=0))]
        if numbers
        else sorted({*labels.values()})
    )
    if given := tree.chance(0.4):
        classes = tree.rng.sample(["ant", "Bee", "cat 2", "dog"], 4 if tree.chance(0.8) else 2)
        (root / "list.json").write_text(json.dumps(classes))
    places = {path: int(label) if numbers else (*classes, label).index(label) for path, label in labels.items()}
    expected = None
    if files and form in ("whole", "twice") and max(places.values()) < len(classes):
        expected = Content(classes, [(classes[places[path]], KNOWN.get(files[path], BROKEN)) for path in places], 0)
    check_sources(tree, expected, labelled=True, labels=root / "labels", classes=root / "list.json" if given else None)


@blocks(LABEL_FILES)
def test_label_files(seeds, tmp_path):
    for_each(seeds, tmp_path, check_label_file)


# --- Shards ---


def urls_of(shards: Shards) -> Iterator[tuple[str, bool]]:
    """(place, whether the lists of classes can be seen beside it): the same shards by URLs, in the same order."""
    paths = [str(path) for path in shards.paths]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = ",".join(os.path.relpath(path, folder) for path in paths)
    place = f"{folder}/{{{names}}}" if len(paths) > 1 else paths[0]
    if shards.chance(0.5):
        yield f"file://{place}", True
    if shards.chance(0.2):
        yield f"pipe:cat {shlex.quote(place)}", False


def check_shards(seed: int, root: Path) -> None:
    shards = Shards(seed, root)
    for path in shards.paths:
        if shards.chance(0.3):
            assert not make_shards.index_one(path).broken
    place = str(root / "shards" / "*" / "*.tar")
    labelled, free = shards.expected(True), shards.expected(False)
    for labels, expected in ((True, labelled), (False, free)):
        check_training(config_of(shards, place, expected, labels=labels), expected, named=any(shards.lists.values()))
    check_tools(place, labelled, free, shards.rng.choice([1.0, 0.3]))
    for url, seen in urls_of(shards):
        labels = shards.chance(0.8)
        expected = shards.expected(labels, lists=seen)
        settings = {"labels": labels, "cache_folder": str(root / "cache")}
        settings["unindexed"] = shards.rng.choice(["index", "in_order"])
        check_training(config_of(shards, url, expected, **settings), expected, seen and any(shards.lists.values()))


@blocks(TREES)
def test_shards(seeds, tmp_path):
    for_each(seeds, tmp_path, check_shards)


# --- Whole scripts ---


class Reader(nn.Module):
    """A tokenizer whose codes say which picture it has seen."""

    def __init__(self):
        super().__init__()
        quantizer = TOKENIZER["quantizer"] | {"num_codes": LEVELS**3}
        self.config = parse_config(TokenizerConfig, TOKENIZER | {"quantizer": quantizer})
        self.quantizer = SimpleNamespace(num_codes=LEVELS**3, dim=1, code_vectors=lambda: torch.ones(LEVELS**3, 1))
        self.weight = nn.Parameter(torch.zeros(1))
        self.downsampling = SIDE // self.config.tokens_per_side

    def encode(self, images: Tensor) -> Tensor:
        levels = ((images[:, :, :: self.downsampling, :: self.downsampling] + 1) * 127.5).round().long() // 32
        return (levels * torch.tensor([LEVELS**2, LEVELS, 1]).view(1, 3, 1, 1)).sum(1)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.zeros(len(codes), 3, SIDE, SIDE)


def encoded(place: str, output: Path) -> list[Row]:
    """(class, picture) of each image that tools/encode_shards.py makes codes of."""
    words = ["--tokenizer", "x", "--images", place, "--output", str(output), "--device", "cpu", "--workers", "0"]
    encode_shards.main([*words, "--rows-per-shard", "5", "--batch-size", "2", "--max-bad-fraction", "1"])
    found = CodeDataset(output)
    codes, labels = found.codes(), found.labels().tolist()
    assert (codes == codes[:, :1]).all()
    return [(found.meta.classes[label], code) for label, code in zip(labels, codes[:, 0].tolist(), strict=True)]


def evaluated(place: str, file: Path) -> tuple[int, list[int]]:
    """(how many pictures tools/evaluate.py makes figures of, the first of them)."""
    words = ["reconstruction", "--tokenizer", "x", "--images", place, "--device", "cpu", "--workers", "0"]
    none = [word for option in ("--lpips", "--lpips-alex", "--inception") for word in (option, "none")]
    assert evaluate.main([*words, *none, "--npz", str(file), "--json", str(file.with_suffix(".json"))]) == 0
    count = json.loads(file.with_suffix(".json").read_text())["image_count"]
    return count, [number_of(image) for image in np.load(file)["originals"].transpose(0, 2, 3, 1)]


def check_readers(place: str, labelled: Content | None, free: Content | None, root: Path) -> None:
    """What tools/encode_shards.py and tools/evaluate.py write."""
    wanted = labelled if labelled and good(labelled) else None
    if (rows := outcome(wanted, lambda: encoded(place, root / "codes"))) is not None:
        assert in_order(rows) == good(wanted)
    wanted = free and free.within(SHARE)
    wanted = wanted if wanted and good(wanted) else None
    if (found := outcome(wanted, lambda: evaluated(place, root / "figures.npz"))) is not None:
        numbers = [number for _, number in good(wanted)]
        assert found[0] == len(numbers) and len(found[1]) == min(len(numbers), reconstruction.PICTURES)
        assert sorted(found[1]) == sorted(numbers) or ({*found[1]} < {*numbers} and len(found[1]) < len(numbers))


def check_whole(seed: int, root: Path) -> None:
    """Of every four: shards that are indexed, folders with labels, shards without an index, folders without labels."""
    if seed % 2 == 0:
        shards, place = Shards(seed, root), str(root / "shards" / "*" / "*.tar")
        if seed % 4 == 0:
            make_shards.main(["--index", place, "--processes", "1"])
        check_readers(place, shards.expected(True), shards.expected(False), root)
        return
    tree, labels = Tree(seed, root), seed % 4 == 1
    labelled, free = tree.expected(True), unlabelled(tree.expected(False))
    check_readers(str(tree.place), labelled, free, root)
    expected, words = (labelled, []) if labels else (free, ["--no-labels"])
    words += [str(tree.place), str(root / "out"), "--samples-per-shard", "3", "--processes", "1"]
    if outcome(expected, lambda: make_shards.main(words)) is not None:
        place = str(root / "out" / "train-*.tar")
        index = open_images(place, ImageDataConfig(train=place, labels=labels))
        assert_same(index, expected._replace(unusable=0), labels)  # it passes them over
        assert not labels or index.classes == expected.classes


@pytest.fixture
def reader(monkeypatch):
    for module in (encode_shards, reconstruction):
        monkeypatch.setattr(module, "load_tokenizer", lambda *words, **settings: Reader())


@blocks(WHOLE)
def test_whole_scripts(seeds, tmp_path, reader):
    for_each(seeds, tmp_path, check_whole)


def test_there_are_no_figures_of_no_image(tmp_path, reader):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of its images can be used"):
        evaluated(str(tmp_path / "set"), tmp_path / "figures.npz")
    assert not (tmp_path / "figures.json").exists()
