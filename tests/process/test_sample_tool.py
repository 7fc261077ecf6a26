"""tools/sample.py: balanced sets over any number of processes, killed and continued, in ADM's form."""

import json
import os
import re
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import TOKENIZER, TRANSFORMER
from support.points import Points
from support.processes import DEVNULL, run_ranks, run_script, script_environment, start_script
from support.training import CLASSES, picture, write_best

import ibq
from ibq.config import parse_config
from ibq.data.shards import ImageDataConfig, open_split
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    write_best(folder / "tokenizer" / "best", Tokenizer(parse_config(TokenizerConfig, TOKENIZER)))
    transformer = Transformer(parse_config(TransformerConfig, TRANSFORMER))
    torch.nn.init.normal_(transformer.head.weight, std=0.5)
    write_best(folder / "transformer" / "best", transformer)
    return folder


def options(models: Path, output: Path, *more: str) -> list[str]:
    argv = ["--tokenizer", str(models / "tokenizer"), "--transformer", str(models / "transformer"), "--device", "cpu"]
    return ["tools/sample.py", *argv, "--output", str(output), *more]


def drawn(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz", allow_pickle=False) as found:
        return found["arr_0"], found["arr_1"]


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory):
    """600 images of one process: three pieces of 256, the last smaller."""
    folder = tmp_path_factory.mktemp("one") / "samples"
    result = run_script(*options(models, folder, "--total", "600", "--files", "shards"))
    assert result.returncode == 0, result.stderr
    return folder


def test_a_balanced_set_in_adms_form(one_process, models):
    images, labels = drawn(one_process)
    assert images.shape == (600, 16, 16, 3) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [200] * CLASSES
    assert len(np.unique(images.reshape(600, -1), axis=0)) > 590  # each has a seed of its own
    info = json.loads((one_process / "samples.json").read_text())
    assert info["count"] == 600 and info["classes"] == CLASSES and info["sampler"]["guidance_scale"] == 2.0
    assert len(info["tokenizer"]) == len(info["transformer"]) == 64 and info["tokenizer"] != info["transformer"]
    assert not (one_process / ".pieces").exists()


def test_the_shards_are_read_by_the_other_tools(one_process):
    images, labels = drawn(one_process)
    index = open_split(str(one_process / "samples-*.tar"), "all", 10, ImageDataConfig(train="x"))
    assert len(index) == 600
    with tarfile.open(one_process / "samples-00000.tar") as tar:
        names = tar.getnames()
        first = np.asarray(Image.open(tar.extractfile(names[0])))
        assert int(tar.extractfile(names[1]).read()) == labels[0]
    assert np.array_equal(first, images[0])


def test_two_processes_draw_the_same(one_process, models, tmp_path):
    result = run_ranks(2, *options(models, tmp_path / "two", "--total", "600", "--files", "none"))
    assert result.returncode == 0, result.stderr
    for ours, theirs in zip(drawn(tmp_path / "two"), drawn(one_process), strict=True):
        assert np.array_equal(ours, theirs)
    assert not list((tmp_path / "two").glob("*.tar"))


def test_killed_and_continued(one_process, models, tmp_path):
    folder = tmp_path / "killed"
    command = options(models, folder, "--total", "600", "--files", "none")
    points = Points(tmp_path / "points", {"second piece": ("open", r"/\.pieces/\.tmp-\d+-\d+\.npy w", 2)})
    process = start_script(*command, environment=script_environment(**points.environment), stderr=DEVNULL)
    points.wait("second piece", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "samples.npz").exists()
    first = (folder / ".pieces" / "000000.npy").stat().st_mtime_ns
    other = run_script(*options(models, folder, "--total", "600", "--seed", "1"))
    assert other.returncode == 2 and "another command" in other.stderr
    assert (folder / ".pieces" / "000000.npy").stat().st_mtime_ns == first
    result = run_script(*command)
    assert result.returncode == 0, result.stderr
    assert np.array_equal(drawn(folder)[0], drawn(one_process)[0])
    again = run_script(*command)
    assert again.returncode == 0 and "600 images" in again.stdout
    (folder / ".pieces").mkdir()  # as it is left by a kill while the pieces are removed
    (folder / ".pieces" / "plan.json").write_text("{}")
    again = run_script(*command)
    assert again.returncode == 0 and "600 images" in again.stdout and not (folder / ".pieces").exists()
    assert run_script(*options(models, folder, "--total", "300")).returncode == 2
    (folder / "samples.json").write_text("{")  # cut, as a full disk leaves it
    broken = run_script(*command)
    assert broken.returncode == 2 and "another command" in broken.stderr and broken.stderr.count("\n") == 1


def test_pictures_that_an_interruption_left_uncompressed(one_process, models, tmp_path):
    """Killed between a piece's images and its pictures; and other files are asked for than before."""
    folder = tmp_path / "cut"
    points = Points(tmp_path / "points", {"pictures": ("open", r"/\.pieces/\.tmp-\d+-\d+\.tar w", 1)})
    environment = script_environment(**points.environment)
    command = options(models, folder, "--total", "600", "--files", "shards")
    process = start_script(*command, environment=environment, stderr=DEVNULL, start_new_session=True)
    points.wait("pictures", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (folder / ".pieces" / "000000.npy").exists() and not list((folder / ".pieces").glob("*.tar"))
    result = run_script(*options(models, folder, "--total", "600", "--files", "png"))
    assert result.returncode == 0, result.stderr
    images, labels = drawn(folder)
    assert np.array_equal(images, drawn(one_process)[0])
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == 600
    name = f"class{labels[299]:04d}_seed{299 - 200:06d}.png"
    assert np.array_equal(np.asarray(Image.open(folder / name)), images[299])


def test_what_it_says(models, tmp_path):
    result = run_script(*options(models, tmp_path / "a", "--count", "2", "--files", "none", "--compile"))
    assert "--compile is not needed any more" in result.stderr
    assert "16 images together (--rows), fp32, cpu: one operator after the other" in result.stderr
    assert re.search(r"6 images in [\d.]+ s: [\d.]+ images/s; codes \d+%, pixels \d+% of the time", result.stderr)
    info = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert info["sampler"]["rows_per_block"] == 16 and info["sampler"]["precision"] == "fp32"
    other = run_script(*options(models, tmp_path / "a", "--count", "2", "--rows", "4"))
    assert other.returncode == 2 and "(rows_per_block 16, not 4)" in other.stderr


def random_order(folder: Path) -> Transformer:
    """A transformer of random orders, written there."""
    torch.manual_seed(1)
    transformer = Transformer(parse_config(TransformerConfig, TRANSFORMER | {"order": "random"}))
    torch.nn.init.normal_(transformer.head.weight, std=0.5)
    write_best(folder, transformer)
    return transformer.eval()


def test_a_part_of_a_picture_is_drawn_anew(models, tmp_path):
    """By a box and by a mask that mean the same, as the Python API draws it; samples.json says so, and it goes on."""
    transformer = random_order(tmp_path / "random" / "best")
    image, mask = picture(3), Image.new("L", (64, 64))
    image.save(tmp_path / "image.png")
    mask.paste(255, (16, 32, 48, 64))  # 4 to 12 and 8 to 16 of 16 pixels: tokens 1, 2 of the last two rows
    mask.save(tmp_path / "mask.png")
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[2:, 1:3] = False
    models_of = ["--transformer", str(tmp_path / "random"), "--classes", "1", "--count", "3"]
    shown = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    tokenizer = ibq.load_tokenizer(models / "tokenizer", device="cpu")
    expected = ibq.generate(tokenizer, transformer, [1] * 3, keep=keep, images=shown)
    for name, part in (("box", ["8", "4", "15", "12"]), ("mask", [str(tmp_path / "mask.png")])):
        command = options(
            models, tmp_path / name, *models_of, "--image", str(tmp_path / "image.png"), f"--{name}", *part
        )
        result = run_script(*command)
        assert result.returncode == 0, result.stderr
        assert np.array_equal(drawn(tmp_path / name)[0], expected.permute(0, 2, 3, 1).numpy())
        found = json.loads((tmp_path / name / "samples.json").read_text())["edit"]
        assert (found["kept"], found["tokens"], found["image"]) == (12, 16, str(tmp_path / "image.png"))
        assert found[name] == ([8, 4, 15, 12] if name == "box" else part[0])
    again = run_script(*command)
    assert again.returncode == 0 and "3 images" in again.stdout
    other = run_script(*command[:-2], "--box", "0", "0", "4", "4")
    assert other.returncode == 2 and "another command" in other.stderr
    beyond = run_script(*options(models, tmp_path / "beyond", *models_of, "--grid", "5", "4"))
    assert beyond.returncode == 2 and beyond.stderr.startswith("error: --grid: 5 x 4 codes are beyond the 4 x 4 that")


def test_pictures_in_bf16(models, tmp_path):
    more = ["--classes", "0", "2", "--count", "2", "--precision", "bf16", "--guidance-schedule", "cosine"]
    result = run_script(*options(models, tmp_path, *more))
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        f"class{label:04d}_seed{seed:06d}.png" for label in (0, 2) for seed in (0, 1)
    ]
    assert json.loads((tmp_path / "samples.json").read_text())["sampler"]["precision"] == "bf16"
    assert json.loads((tmp_path / "samples.json").read_text())["sampler_version"] == ibq.SAMPLER_VERSION


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--total", "100"], ["--total", "99 or 102"]),
        (["--total", "2"], ["--total", "use 3\n"]),
        (["--total", "0"], ["--total"]),
        (["--guidance-scale", "-1"], ["--guidance-scale", "use 0 or more; 1 is off"]),
        (["--count", "0"], ["--count"]),
        (["--classes", "7"], ["--classes", "0 to 2"]),
        (["--classes", "1", "1"], ["--classes", "twice"]),
        (["--seed", "-1"], ["--seed"]),
        (["--top-p", "2"], ["--top-p"]),
        (["--rows", "0"], ["--rows: 0"]),
        (["--precision", "int8"], ["--precision: int8 is gone", "use bf16"]),
        (["--guidance-schedule", "sine"], ["--guidance-schedule", "constant, linear"]),
        (["--guidance-power", "0"], ["--guidance-power", "MDTv2"]),
        (["--guidance-interval", "0.7", "0.2"], ["--guidance-interval"]),
        (["--box", "0", "0", "4", "4"], ["--box: is a part of a picture; give that by --image"]),
        (["--image", "x.png"], ["--image: needs what is drawn anew, either by --mask or by --box"]),
        (["--image", "x.png", "--box", "4", "0", "4", "4"], ["--box: 4 0 4 4 holds no pixel"]),
        (["--image", "x.png", "--box", "0", "0", "4", "4"], ["--image: x.png is no picture that can be read"]),
        (["--image", "PICTURE", "--mask", "x.png"], ["--mask: x.png is no picture that can be read"]),
        (["--image", "PICTURE", "--mask", "BLACK"], ["--mask", "nowhere white"]),
        (["--image", "PICTURE", "--box", "0", "0", "4", "17"], ["--box: 0 0 4 17 goes beyond the image of 16 x 16"]),
        (["--image", "PICTURE", "--box", "0", "0", "4", "4"], ["--box: a model of raster order", "order: random"]),
    ],
)
def test_impossible_options(models, tmp_path, more, words):
    picture(1).save(models / "picture.png")
    Image.new("L", (16, 16)).save(models / "black.png")
    files = {"PICTURE": str(models / "picture.png"), "BLACK": str(models / "black.png")}
    more = [files.get(word, word) for word in more]
    result = run_script(*options(models, tmp_path / "out", *more))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert not (tmp_path / "out").exists()
