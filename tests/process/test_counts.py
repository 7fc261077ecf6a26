"""Every tool that reads pictures says found = used + left out, for a folder and a tar that hold every oddity."""

import importlib
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import TOKENIZER
from support.training import TOKENIZER_CONFIG, picture, png, train_here, write_best, write_shard

from ibq.config import exit_on_user_error, parse_config
from ibq.data.codes import CodeDataset
from ibq.data.counts import BESIDE, DAMAGED, REASONS
from ibq.data.shards import ImageDataConfig, open_images
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig

GOOD = 300  # the oddities are less than a twentieth of all
LINE = re.compile(r"([\d,]+) pictures found = ([\d,]+) used \+ ([\d,]+) left out(?: \((.*)\))?$", re.MULTILINE)
KIND, LABEL = "of a kind that is not read", "label missing or impossible"
FOLDER = {BESIDE: 2, KIND: 2, DAMAGED: 1}
TAR = {LABEL: 2, KIND: 2, DAMAGED: 1, "several dots in the name": 1, "label without a picture": 1,
       "several pictures of one key": 2, "link to what is not there": 1}  # fmt: skip
WITHOUT_LABELS = {"folder": {KIND: 2, DAMAGED: 1}, "tar": {reason: TAR[reason] for reason in TAR if reason != LABEL}}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("counts")
    write_best(folder / "tokenizer" / "best", Tokenizer(parse_config(TokenizerConfig, TOKENIZER)))
    write_folder(folder / "folder")
    write_tar(folder / "tar")
    return folder


def write_folder(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    good = [f"{'ab'[n % 2]}/{n:03d}.png" for n in range(GOOD - 2)] + ["a/x.jfif", "b/two.dots.png"]
    for number, name in enumerate(good):
        (folder / name).write_bytes(png(picture(number)))
    for name in ("a/._000.png", "a/notes.txt", "a/y.bmp", "b/z.TIF", "loose.png", "other.jpg"):
        (folder / name).write_bytes(png(picture(0)))
    (folder / "b/damaged.jpg").write_bytes(b"\xff\xd8\xff nothing")


def write_tar(folder: Path) -> None:
    folder.mkdir()
    image = png(picture(0))
    members = {}
    for number in range(GOOD):
        members |= {f"{number:03d}.png": png(picture(number)), f"{number:03d}.cls": str(number % 2).encode()}
    members |= {"._000.png": image, "000.json": b"{}", "damaged.png": b"nothing", "damaged.cls": b"0"}
    members |= {"kind.bmp": image, "kind.cls": b"0", "alone.gif": image, "empty.cls": b"1", "without.png": image}
    members |= {"wrong.png": image, "wrong.cls": b"cat", "two.png": image, "two.jpg": image, "two.cls": b"0"}
    members |= {"three.dots.png": image}
    write_shard(folder / "s.tar", members)
    with tarfile.open(folder / "s.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "nowhere.png"
        tar.addfile(link)
    (folder / "classes.json").write_text('["a", "b"]')


@pytest.fixture
def run(place, tmp_path, capsys, monkeypatch) -> Callable[..., str]:
    """A tool in this process, on one thread; what it said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(name: str, *argv: object) -> str:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with pytest.raises(SystemExit) as end:
                exit_on_user_error(lambda: importlib.import_module(name).main([str(word) for word in argv]))
        finally:
            torch.set_num_threads(threads)
            torch.set_flush_denormal(False)
        said = capsys.readouterr()
        assert not end.value.code, said.err
        return said.out + said.err

    return run


def where(place: Path, kind: str) -> str:
    return str(place / kind) if kind == "folder" else str(place / "tar/s.tar")


def check(said: str, rows: dict, used: int, left_out: dict[str, int]) -> None:
    """The last line that counts and the JSON say the same, and the sum holds."""
    found, kept, lost, reasons = LINE.findall(said)[-1]
    assert rows == {"found": used + sum(left_out.values()), "used": used, "left_out": dict(sorted(left_out.items()))}
    assert [int(number.replace(",", "")) for number in (found, kept, lost)] == [
        rows["found"], used, sum(left_out.values())]  # fmt: skip
    assert reasons == ", ".join(f"{number:,} {reason}" for reason, number in sorted(left_out.items()))


@pytest.mark.parametrize("options", [[], ["--no-labels"], ["--no-labels", "--check"]])
def test_make_shards(place, run, tmp_path, options):
    said = run("tools.make_shards", place / "folder", tmp_path / "out", *options)
    rows = json.loads((tmp_path / "out/train.make_shards.json").read_text())
    # What is damaged is seen only by who decodes; without labels the pictures beside the class folders count.
    expected = FOLDER if not options else WITHOUT_LABELS["folder"]
    expected = {**expected, DAMAGED: 1} if "--check" in options else {r: n for r, n in expected.items() if r != DAMAGED}
    everything = GOOD + sum(FOLDER.values())
    check(said, rows["pictures"], everything - sum(expected.values()), expected)
    assert rows["images"] == rows["pictures"]["used"]


def test_make_shards_index(place, run, tmp_path):
    (tmp_path / "s.tar").write_bytes(Path(where(place, "tar")).read_bytes())
    said = run("tools.make_shards", "--index", tmp_path / "s.tar")
    expected = {reason: number for reason, number in TAR.items() if reason != DAMAGED} | {LABEL: 1}
    found, used, lost, _ = LINE.findall(said.replace(", in 1 indexed shards", ""))[-1]
    assert (int(found), int(used), int(lost)) == (GOOD + 10, GOOD + 10 - sum(expected.values()), sum(expected.values()))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_encode_shards(place, run, tmp_path, kind):
    said = run("tools.encode_shards", "--tokenizer", place / "tokenizer", "--images", where(place, kind),
               "--output", tmp_path / "codes", "--workers", 0, "--views", 2, "--device", "cpu")  # fmt: skip
    rows = CodeDataset(tmp_path / "codes").meta.made_by["pictures"]
    check(said, rows, GOOD, FOLDER if kind == "folder" else TAR)


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("split", ["all", "validation"])
def test_evaluate_reconstruction(place, run, tmp_path, kind, split):
    said = run("tools.evaluate", "reconstruction", "--tokenizer", place / "tokenizer", "--images", where(place, kind),
               "--split", split, "--workers", 0, "--device", "cpu", "--inception", "none", "--lpips", "none",
               "--lpips-alex", "none", "--json", tmp_path / "r.json")  # fmt: skip
    rows = json.loads((tmp_path / "r.json").read_text())
    found = GOOD + sum((FOLDER if kind == "folder" else TAR).values())
    if split == "all":
        expected = WITHOUT_LABELS[kind]
        check(said, rows["pictures"]["images"], found - sum(expected.values()), expected)
    else:
        counted = rows["pictures"]["images"]
        check(said, counted, rows["image_count"], counted["left_out"])
        assert counted["found"] == found and counted["left_out"]["kept for training"] == found - -(-found // 10)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_evaluate_generation(place, run, tmp_path, kind):
    """References are read strictly, a classifier's pictures are not."""
    np.savez(tmp_path / "s.npz", np.stack([np.asarray(picture(n)) for n in range(8)]), np.arange(8) % 2)
    said = run("tools.evaluate", "generation", "--samples", tmp_path / "s.npz", "--classifier", where(place, kind),
               "--classifier-size", 16, "--classifier-steps", 1, "--device", "cpu",
               "--json", tmp_path / "g.json")  # fmt: skip
    rows = json.loads((tmp_path / "g.json").read_text())["pictures"]
    assert rows["samples"] == {"found": 8, "used": 8, "left_out": {}}
    train, validation = rows["classifier"], rows["classifier validation"]
    everything = GOOD + sum((FOLDER if kind == "folder" else TAR).values())
    assert train["found"] == validation["found"] == everything and train["used"] + validation["used"] == GOOD
    check(said, validation, validation["used"], validation["left_out"])


def test_reconstruct(place, run, tmp_path):
    (tmp_path / "in/more").mkdir(parents=True)
    for name in ("a.png", "b.webp", "more/c.jfif", "more/d.gif", "e.bmp", "._f.png", "g.txt"):
        (tmp_path / "in" / name).write_bytes(png(picture(0)))
    said = run("tools.reconstruct", "--tokenizer", place / "tokenizer", "--images", tmp_path / "in",
               "--output", tmp_path / "out", "--device", "cpu")  # fmt: skip
    assert LINE.findall(said) == [("5", "3", "2", "2 of a kind that is not read")]
    assert len([*(tmp_path / "out").iterdir()]) == 3


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_training_run(place, tmp_path, capsys, kind):
    """In `status.json`, also where the run goes on; a picture that was damaged is known when it has been read."""
    text = TOKENIZER_CONFIG.replace("DATA/train-*.tar, validation: DATA/val-*.tar", f"{where(place, kind)}")
    (tmp_path / "run.yaml").write_text(text.replace("in_memory: true", "validation_every: 20, max_bad_fraction: 0.2"))
    common = ["--config", str(tmp_path / "run.yaml"), f"output={tmp_path}/run", "checkpoint.save_every=50"]
    common += ["training.batch_size=8", "training.validate_every=50", "training.log_every=50"]
    common += [f"data.cache_folder={tmp_path}/cache"]
    assert train_here("tokenizer", [*common, "training.max_steps=1"]) == 0
    first = json.loads((tmp_path / "run/status.json").read_text())["pictures"]
    assert train_here("tokenizer", [*common, "training.max_steps=40"]) == 0
    rows = json.loads((tmp_path / "run/status.json").read_text())["pictures"]
    said = LINE.findall(capsys.readouterr().err)
    everything = GOOD + sum((FOLDER if kind == "folder" else TAR).values())
    train, validation = rows["data.train"], rows["data.validation"]
    assert train["found"] == validation["found"] == first["data.train"]["found"] == everything
    assert train["used"] + validation["used"] == GOOD
    for part in (train, validation):
        assert part["found"] == part["used"] + sum(part["left_out"].values())
    assert len(said) == 4 and said[-2][0] == said[-1][0] == f"{everything:,}"
    again = json.loads((tmp_path / "run/status.json").read_text())
    assert train_here("tokenizer", [*common, "training.max_steps=40"]) == 0
    assert json.loads((tmp_path / "run/status.json").read_text()) == again


def test_every_problem_has_its_reason(place):
    """None of the index's problems falls to what only a decoder finds."""
    for kind in ("folder", "tar"):
        index = open_images(where(place, kind), ImageDataConfig(train="x", max_bad_fraction=1.0))
        for _, problem in index.problems():
            assert any(re.match(beginning, problem) for beginning, _ in REASONS), problem
