"""tools/inspect_codebook.py on a run that collapses, as the page has it, on published files and on other kinds."""

import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil

import pytest
import torch
from PIL import Image
from support import ROOT
from support.golden import golden_dir
from support.models import TOKENIZER
from support.processes import run_script
from support.training import scalars, train_here, write_best, write_images

from ibq.config import UserError, parse_config
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.training.tokenizer_task import COLLAPSE_PAGE
from tools import inspect_codebook

PAGE = (ROOT / COLLAPSE_PAGE).read_text()
TRAIN, INSPECT = (
    shlex.split(line)[1:]
    for line in re.search(r"```bash\n(.*?)```", PAGE, flags=re.S)[1].replace("\\\n", " ").splitlines()
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the page's first two commands have been run; what the first has said is in `said.txt`."""
    folder, before = tmp_path_factory.mktemp("collapse"), os.getcwd()
    for name in ("yaml", "tests"):
        (folder / name).symlink_to(ROOT / name)
    said = io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(said):
            assert TRAIN[0] == "ibq/train_tokenizer.py" and train_here("tokenizer", TRAIN[1:]) == 0
        (folder / "said.txt").write_text(said.getvalue())
        with contextlib.redirect_stdout(printed := io.StringIO()):
            inspect_codebook.main(INSPECT[1:])
        (folder / "printed.txt").write_text(printed.getvalue())
    finally:
        os.chdir(before)
    return folder


def test_the_alarm_says_what_there_is_to_see(place):
    alarm, *lines = re.search(r"ALARM.*(?:\n  .*)+", (place / "said.txt").read_text())[0].split("\n  ")
    assert "codebook collapse" in alarm and len(lines) == 3
    norms, entropies, page = lines
    latents, codes = map(float, re.match(r"norms: latents ([\d.]+), codes ([\d.]+)", norms).groups())
    assert 0 < latents < codes / 2 and "a token's gradient reaches" in norms
    batch, most = map(float, re.search(r"batch entropy ([\d.]+) nats, of at most ([\d.]+)", entropies).groups())
    assert 0 < batch < most == pytest.approx(math.log(1024), abs=1e-3)
    assert COLLAPSE_PAGE in page and "tools/inspect_codebook.py" in page


def test_what_the_page_shows(place):
    record, printed = json.loads((place / "collapsed.json").read_text()), (place / "printed.txt").read_text()
    images = record["images"]
    assert record["codebook"]["num_codes"] == 1024 and images["images"] == 343
    assert len(record["dead_codes"]) == images["dead"] == round(1024 * (1 - images["usage"])) > 900
    assert f"{images['usage']:.2%}" in printed and "dead codes" in printed and "do not find themselves" in printed
    logged = scalars(place / "runs/collapsed")
    assert images["usage"] == pytest.approx(logged["validation/usage"][60])
    assert record["training"]["codebook/usage"] == logged["codebook/usage"][60]
    assert record["codes"]["compared"] == 1024
    with Image.open(place / "collapsed.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_without_images_a_sample_of_neighbours_and_a_checkpoint(place, capsys):
    run = place / "runs/collapsed"
    inspect_codebook.main([str(run), "--neighbours", "100"])
    out = capsys.readouterr().out
    assert "100 codes, each among all" in out and "training: usage" in out and "dead codes" not in out
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    inspect_codebook.main([str(checkpoint), "--weights", "raw"])
    assert "training: usage" in capsys.readouterr().out


def test_a_published_file(capsys, tmp_path):
    inspect_codebook.main([str(golden_dir() / "tokenizer_small.ckpt"), "--output", str(tmp_path / "codes.png")])
    out = capsys.readouterr().out
    assert "128 codes" in out and "nearest other code" in out and "training" not in out
    assert Image.open(tmp_path / "codes.png").format == "PNG"


@pytest.mark.parametrize("quantizer", [
    {"kind": "vq", "num_codes": 32, "dim": 4, "normalize": "vectors"},
    {"kind": "vq", "num_codes": 32, "dim": 4, "projector": {"kind": "linear"}},
    {"kind": "simvq", "num_codes": 32, "dim": 4},
    {"kind": "lfq", "dim": 5},
    {"kind": "bsq", "dim": 5},
    {"kind": "fsq", "levels": [4, 3]},
], ids=lambda q: q["kind"])  # fmt: skip
def test_every_kind(quantizer, tmp_path, capsys):
    write_best(tmp_path / "best", Tokenizer(parse_config(TokenizerConfig, TOKENIZER | {"quantizer": quantizer})))
    write_images(tmp_path / "data", count=4)
    argv = [str(tmp_path), "--images", str(tmp_path / "data/val-0.tar"), "--workers", "0", "--device", "cpu"]
    inspect_codebook.main([*argv, "--output", str(tmp_path / "picture.png")])
    out = capsys.readouterr().out
    assert (tmp_path / "picture.png").exists() and "dead codes" in out
    grid = quantizer["kind"] in ("lfq", "bsq", "fsq")
    assert ("evenness of the channels" in out) == grid != ("nearest other code" in out)
    assert ("all 1" in out) == (quantizer.get("normalize") == "vectors")


def test_mistakes_end_with_2_and_write_nothing(tmp_path):
    tokenizer = Tokenizer(parse_config(TokenizerConfig, TOKENIZER))
    write_best(tmp_path / "good" / "best", tokenizer)
    with torch.no_grad():
        tokenizer.quantizer.codebook[3] = math.nan
    write_best(tmp_path / "bad" / "best", tokenizer)
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "empty", tmp_path / "odd")
    (tmp_path / "odd" / "broken.png").write_text("no picture")
    before = sorted(tmp_path.rglob("*"))
    files = ["--output", str(tmp_path / "new.png"), "--json", str(tmp_path / "new.json"), "--workers", "0"]
    good = str(tmp_path / "good")
    for argv, said in (
        ([str(tmp_path / "absent")], "absent.*: give a run folder"),
        ([str(tmp_path / "text.safetensors")], "text.safetensors: not a model of this project"),
        ([str(tmp_path / "bad")], "bad: 1 codes are not finite; give an earlier checkpoint"),
        ([good, "--images", str(tmp_path / "empty")], "empty"),
        ([good, "--images", str(tmp_path / "odd")], "odd.*"),
        ([good, "--neighbours", "0"], "--neighbours must be at least 1"),
        ([good, "--weights", "raw"], "raw ones are in a run's checkpoints"),
    ):
        with pytest.raises(UserError, match=said):
            inspect_codebook.main([*argv, *files])
    with pytest.raises(UserError, match="the picture is a PNG file"):
        inspect_codebook.main([good, "--output", str(tmp_path / "new.jpg")])
    done = run_script("tools/inspect_codebook.py", str(tmp_path / "bad"), *files)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
