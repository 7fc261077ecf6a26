"""How the quickstart keeps to its time: what it takes of a large set, and how many steps."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from ibq.config import UserError
from ibq.data.shards import open_images
from tools.lib.quickstart import recipe
from tools.lib.quickstart.pace import Load, Pace
from tools.lib.quickstart.pictures import MOST_VALIDATION, in_turn, prepare, splits

LATE = Load(late=0.75, extra=0.5)
LONG = Load(late=0.85, extra=0.5, long=900)


class Training:
    """A training on a fake clock: every unit of work takes `unit(now)` seconds, every start `start` seconds."""

    def __init__(self, pace, total, unit, start=5.0):
        self.pace, self.total, self.unit, self.start = pace, total, unit, start
        self.now, self.step, self.corrections = 0.0, 0, []

    def run(self):
        while True:
            self.pace.begin(self.now)
            self.now += self.start
            while self.step < self.total:
                load = self.pace.load
                self.now += self.unit(self.now) * (
                    load.left(self.step, self.total) - load.left(self.step + 1, self.total)
                )
                self.step += 1
                self.pace.see(self.now, self.step)
                if self.pace.wanted(self.now, self.total) is not None:
                    break
            if self.step >= self.total:
                return self
            self.pace.measured = True
            self.total = self.pace.fitting(self.now + self.pace.restart_s, self.step)
            self.corrections.append(self.total)


@pytest.mark.parametrize("load", [Load(), LATE, LONG])
@pytest.mark.parametrize("unit", [0.02, 0.17, 0.38, 2.0])
def test_steps_fill_the_time_after_one_measurement(load, unit):
    done = Training(Pace(end=260.0, load=load, low=20, high=40_000), 1_000, lambda now: unit).run()
    assert abs(done.now - 260) < 0.1 * 260 and len(done.corrections) <= 2


@pytest.mark.parametrize("load", [Load(), LATE, LONG])
@pytest.mark.parametrize(("before", "after"), [(0.2, 0.6), (0.6, 0.2), (0.2, 0.3)])
def test_a_machine_that_others_begin_or_end_to_use(load, before, after):
    pace = Pace(end=300.0, load=load, low=20, high=10_000)
    done = Training(pace, 1_000, lambda now: before if now < 120 else after).run()
    assert abs(done.now - 300) < 0.1 * 300 and 1 <= len(done.corrections) <= 4


def test_a_right_number_is_left_alone():
    done = Training(Pace(end=205.0, load=Load(), low=20, high=4_000), 950, lambda now: 0.2).run()
    assert done.corrections == []


def test_steps_have_bounds():
    pace = Pace(end=100.0, load=Load(), low=60, high=400, seconds=0.01)
    assert pace.fitting(5.0, 10) == 400
    pace.seconds = 10.0
    assert pace.fitting(5.0, 10) == 60
    assert pace.fitting(200.0, 70) == 71  # too late: the step that lets it end
    slow = Training(Pace(end=10.0, load=LATE, low=60, high=400), 400, lambda now: 1.0).run()
    assert slow.total == 60


@pytest.mark.parametrize(("done", "units"), [(0, 100.0), (40, 500.0), (700, 20.0), (950, 20.0), (0, 2_000.0)])
@pytest.mark.parametrize("load", [Load(), LATE, LONG])
def test_load_counts_the_costly_end(load, done, units):
    total = load.fitting(done, units)
    assert load.left(done, total) <= units < load.left(done, total + 1)
    assert LONG.costly(899) == 899 and LONG.costly(1_000) == 850


# --- Pictures ---


def test_any_beginning_holds_all_classes_alike():
    labels = np.repeat(np.arange(7), [3, 500, 40, 1, 900, 60, 8])
    numbers, turns = in_turn(labels)
    assert sorted(numbers) == list(range(len(labels)))
    assert np.array_equal(numbers, in_turn(labels)[0])  # the same every time
    for beginning in (7, 20, 200):
        counts = np.bincount(labels[numbers[:beginning]], minlength=7)
        whole = np.bincount(labels, minlength=7)
        most = counts.max()
        assert all(count >= min(most - 1, size) for count, size in zip(counts, whole, strict=True))
    first = numbers[turns == 0]
    assert sorted(labels[first]) == list(range(7))
    drawn = numbers[labels[numbers] == 4][:30]  # not the first of a folder alone
    assert drawn.max() - drawn.min() > 450


@pytest.mark.parametrize("classes", [1, 2, 10, 97, 1_000])
def test_held_out_pictures_are_of_all_classes_and_bounded(classes):
    labels = np.arange(20_000) % classes
    numbers, turns = in_turn(labels)
    found = list(splits(labels[numbers], turns, 8_000))
    training = [place for place, split in found if split == "train"]
    validation = [place for place, split in found if split == "val"]
    assert len(training) == 8_000 and len(validation) == MOST_VALIDATION
    assert len(set(labels[numbers[training]])) == classes
    assert len(set(labels[numbers[validation]])) >= min(classes, 300)


@pytest.mark.parametrize("sizes", [[50], [25, 25], [5] * 10, [10] * 5])
def test_small_sets_have_both_parts(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    numbers, turns = in_turn(labels)
    parts = [split for _, split in splits(labels[numbers], turns, 1_000)]
    assert len(parts) == len(labels) and 2 <= parts.count("val") <= 10


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("a", 150), ("b", 90), ("c", 30)):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (80, 100, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "own" / name / f"{i}.jpg")
    (tmp_path / "own" / "c" / "0.jpg").write_bytes(b"no picture")
    return tmp_path / "own"


def test_pictures_become_small_shards(folder, tmp_path):
    counts = prepare(open_images(str(folder)), tmp_path / "small", most=100, in_time=lambda: True)
    assert counts["found"] == 270 and counts["classes"] == counts["classes_found"] == 3
    assert 99 <= counts["training"] <= 100 and counts["unreadable"] <= 1
    train = open_images(str(tmp_path / "small/train-*.tar"))
    validation = open_images(str(tmp_path / "small/val-*.tar"))
    assert (len(train), len(validation)) == (counts["training"], counts["validation"])
    assert train.classes == validation.classes == ["a", "b", "c"]
    assert np.bincount(train.label).min() >= 25
    assert len(train.unit_sizes()) == 10 and set(train.label[train.shard < 2]) == {0, 1, 2}
    entry = train[0]
    with open(entry.shard, "rb") as file:
        file.seek(entry.offset)
        assert Image.open(io.BytesIO(file.read(entry.size))).size == (80, 64)
    again = tmp_path / "again"
    prepare(open_images(str(folder)), again, most=100, in_time=lambda: True)
    assert (again / "train-00000.tar").read_bytes() == (tmp_path / "small/train-00000.tar").read_bytes()


def test_no_more_pictures_than_there_is_time_for(folder, tmp_path):
    counts = prepare(open_images(str(folder)), tmp_path / "small", most=1_000, in_time=lambda: False)
    assert 100 <= counts["training"] + counts["validation"] + counts["unreadable"] < 140  # the least
    asked = []
    counts = prepare(
        open_images(str(folder)), tmp_path / "more", most=1_000, in_time=lambda: asked.append(1) or len(asked) < 3
    )
    assert 140 < counts["training"] + counts["validation"] < 240


def test_pictures_that_cannot_be_read(tmp_path):
    for name in "ab":
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "own" / name / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="too few pictures can be read"):
        prepare(open_images(str(tmp_path / "own")), tmp_path / "small", most=100, in_time=lambda: True)
    assert not (tmp_path / "small/classes.json").exists()


# --- The recipe ---


def run_of(tmp_path, minutes=4.0, clock=lambda: 0.0, **choices):
    (tmp_path / "plan.json").write_text(json.dumps(choices))
    place = recipe.Place(train=str(tmp_path / "own"), validation=None)
    return recipe.Quickstart(tmp_path, place, minutes, smoke=False, clock=clock)


def test_time_counts_over_calls_and_failures(tmp_path):
    now = [100.0]
    quickstart = run_of(tmp_path, clock=lambda: now[0], seconds={"encode": 20.0})
    with pytest.raises(KeyError), quickstart.part("sample"):
        now[0] += 7
        assert quickstart.elapsed() == 27
        quickstart.save_choices()
        now[0] += 3
        raise KeyError
    assert json.loads((tmp_path / "plan.json").read_text())["seconds"] == {"encode": 20.0, "sample": 10.0}


def test_bad_data_leave_no_plan(tmp_path):
    place = recipe.Place(train=str(tmp_path / "none"), validation=None)
    quickstart = recipe.Quickstart(tmp_path / "run", place, 4.0, smoke=False)
    with pytest.raises(UserError, match="no images"), quickstart.part("take_pictures"):
        recipe.take_pictures(quickstart)
    assert not (tmp_path / "run").exists()


def test_what_is_left_out_is_said_and_written(tmp_path, capsys):
    quickstart = run_of(tmp_path)
    counts = {"found": 40_000, "training": 8_000, "validation": 400, "unreadable": 3}
    recipe.say_pictures(quickstart, counts | {"classes": 990, "classes_found": 1_000})
    said = capsys.readouterr().out
    assert "31,597 of 40,000 are not used" in said and "3 can't be read" in said and "10 of 1,000 have no" in said
    assert set(quickstart.left_out) == {"pictures", "unreadable pictures", "classes"}
    recipe.say_pictures(run_of(tmp_path), {**counts, "found": 8_403, "classes": 9, "classes_found": 9})
    assert "pictures: " not in capsys.readouterr().out.replace("unreadable pictures", "").replace("8,403 pictures", "")


@pytest.mark.parametrize(
    ("ms", "sizes", "encoded"),
    [
        (100, [900, 900, 900, 738], (4, None)),
        (230, [900, 900, 900, 738], (2, None)),
        (10, [4] * 10, (4, None)),
        (230, [2_000] * 10, (1, 3)),
        (2_300, [2_000] * 10, (1, 1)),
    ],
)
def test_no_more_is_encoded_than_there_is_time_for(tmp_path, ms, sizes, encoded):
    quickstart = run_of(tmp_path, minutes=8.5, precision="bf16", ms_per_step={"tokenizer": ms})
    assert recipe.encoded_in_time(quickstart, sizes) == encoded
    assert ("views" in quickstart.left_out) == (encoded[0] < 4)
    assert ("images of the transformer" in quickstart.left_out) == (encoded[1] is not None)


def test_samples_are_bounded():
    assert recipe.sampled(9, 272) == (None, 8)
    assert recipe.sampled(100, 272) == (None, 2)
    classes, count = recipe.sampled(1_000, 128)
    assert count == 1 and len(classes) == len(set(classes)) == 128 and min(classes) >= 0 and max(classes) < 1_000
    assert recipe.sampled(9, 3) == ([0, 1, 2, 3, 4, 5, 6, 7], 1)


@pytest.mark.parametrize(("elapsed", "ms", "steps"), [(200, 100, 250), (210, 600, 100), (230, 2_000, 50)])
def test_the_classifier_is_bounded(tmp_path, elapsed, ms, steps):
    quickstart = run_of(tmp_path, seconds={"encode": elapsed}, ms_per_step={"tokenizer": ms})
    assert recipe.classifier_steps(quickstart) == steps


def test_the_codebook_starts_once(tmp_path, monkeypatch):
    """Where the number of steps changes, k-means still has a step of its own to come, or is over."""
    quickstart = run_of(tmp_path, precision="fp32")
    asked = {}
    monkeypatch.setattr(recipe, "train", lambda *arguments: asked.update(settings=arguments[-1]))
    recipe.train_tokenizer(quickstart)

    def start(steps, done):
        settings = dict(setting.split("=", 1) for setting in asked["settings"](steps, done))
        return int(settings["codebook_start.warmup_steps"])

    assert start(1_000, 0) == 125 and start(480, 20) == 60 and start(80, 30) == 30
    assert start(480, 31) == 30  # it has come
    assert start(2_000, 400) == 30
