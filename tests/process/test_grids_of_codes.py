"""Pictures of several shapes from end to end: the commands of ibq/data/README.md, engines, ranks, stops, bad input."""

import json
import re
import shlex
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT
from support.processes import run_ranks
from support.training import checkpoint_tensors, largest_difference, scalars, train_here, write_best

import ibq
from ibq.config import UserError, load_section
from ibq.data.codes import CodeDataset, write_codes
from ibq.data.images import ImageDataset
from ibq.data.shards import open_images
from ibq.data.transforms import to_unit_range
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from tools import encode_shards, sample

CONFIG = "yaml/quickstart/grids.yaml"
GRIDS = {"64x64": (16, 16), "32x48": (8, 12)}
SMALL = [
    *("device=cpu", "model.depth=1", "model.width=64", "model.heads=2", "training.max_steps=6", "schedule.end=1.0"),
    *("training.batch_size=8", "training.micro_batch=4", "training.validate_every=3", "training.log_every=1"),
    *("checkpoint.save_every=3", "optimizer.eps=1e-3"),
]
COUNTS = {"train": 24, "val": 11}


def of_section(name: str) -> list[list[str]]:
    """The words of the commands in a section of ibq/data/README.md."""
    section = (ROOT / "ibq/data/README.md").read_text().split(f"## {name}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```bash\n(.*?)^```$", section, flags=re.S | re.M)
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def run_tool(tool, argv: list[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tool.main(argv)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the section's commands were typed: few pictures, an untrained tokenizer, a short training."""
    folder = tmp_path_factory.mktemp("grids")
    (folder / "yaml").symlink_to(ROOT / "yaml")
    images = folder / "tests/data/emoji64"
    images.mkdir(parents=True)
    for part, count in COUNTS.items():
        name = f"tests/data/emoji64/{part}-00000.tar"
        with tarfile.open(ROOT / name) as source, tarfile.open(folder / name, "w") as tar:
            for member in source.getmembers()[: 2 * count]:
                tar.addfile(member, source.extractfile(member))
    shutil.copy(ROOT / "tests/data/emoji64/classes.json", images)
    torch.manual_seed(0)
    model = Tokenizer(load_section(TokenizerConfig, str(ROOT / "yaml/quickstart/tokenizer.yaml"), "model", []))
    write_best(folder / "runs/quickstart/tokenizer/best", model)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for _, script, *argv in of_section("Other sizes and shapes"):
            match script:
                case "tools/encode_shards.py":
                    run_tool(encode_shards, [*argv, "--device=cpu", "--workers=0"])
                case "tools/sample.py":
                    run_tool(sample, [*argv, "--device=cpu", "--count=2"])
                case "ibq/train_ar.py":
                    assert train_here("transformer", [*argv, *SMALL]) == 0
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


def train(output, *overrides: str) -> int:
    return train_here("transformer", ["--config", CONFIG, *SMALL, f"output={output}", *overrides])


def test_codes_are_those_of_the_tokenizer_at_that_size(place):
    tokenizer = ibq.load_tokenizer("runs/quickstart/tokenizer", device="cpu")
    for name, grid in GRIDS.items():
        codes = CodeDataset(f"runs/grids/{name}/val")
        assert codes.meta.grid == grid and len(codes) == COUNTS["val"]
        size = grid[0] * 4, grid[1] * 4
        images = ImageDataset(open_images("tests/data/emoji64/val-*.tar"), size)
        pixels = to_unit_range(torch.stack([images[i][0] for i in range(len(images))]))
        agree = torch.from_numpy(codes.codes().astype(np.int64)).view(-1, *grid) == tokenizer.encode(pixels)
        assert agree.double().mean() > 0.999, "but for ties that other batches round otherwise"


def test_each_grid_has_its_figure(place):
    found = scalars(Path("runs/grids/transformer"))
    one, other, both = (found[f"validation/{name}"] for name in ("nll_16x16", "nll_8x12", "nll"))
    tokens = [COUNTS["val"] * grid[0] * grid[1] for grid in GRIDS.values()]
    for step in (3, 6):
        assert found["validation/tokens"][step] == sum(tokens)
        mean = (one[step] * tokens[0] + other[step] * tokens[1]) / sum(tokens)
        assert both[step] == pytest.approx(mean, rel=1e-9) and one[step] != other[step]
    rates = [found["tokens_per_second"][step] / found["images_per_second"][step] for step in range(1, 7)]
    assert {round(rate) for rate in rates} == {256, 96}, "every step is of one grid"
    assert both[6] < both[3] < np.log(1024)


def test_a_run_that_was_stopped_goes_on_the_same(place, tmp_path):
    assert train(tmp_path, "training.max_steps=3") == 0
    assert train(tmp_path) == 0
    whole, stopped = (checkpoint_tensors(folder, 6) for folder in (Path("runs/grids/transformer"), tmp_path))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    losses = [scalars(folder)["loss/total"] for folder in (Path("runs/grids/transformer"), tmp_path)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        ["engine.kind=fsdp", "training.micro_batch=2"],
        ["engine.kind=fsdp", "engine.tensor_parallel=2", "engine.sequence_parallel=true"],
    ],
    ids=["sharded", "sequence parallel"],
)
def test_two_ranks_have_the_same_batches(place, tmp_path, engine):
    """And the same figures, though one has an image more than the other to validate on, and so a batch more."""
    none = [f"model.{name}_dropout=0" for name in ("residual", "ffn", "token", "class")]
    none.append("training.validation_images=9")
    assert train(tmp_path / "one", *none) == 0
    sources = SOURCES.replace("runs/", f"{place}/runs/")
    argv = ["--config", CONFIG, *SMALL, *none, f"output={tmp_path}/two", sources, *engine]
    done = run_ranks(2, "ibq/train_ar.py", *argv)
    assert done.returncode == 0, done.stderr
    one, two = (scalars(tmp_path / name) for name in ("one", "two"))
    for name in ("loss/total", "validation/nll_16x16", "validation/nll_8x12"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)
    tensors = [checkpoint_tensors(tmp_path / name, 6) for name in ("two", "one")]
    assert largest_difference(*tensors, floor=1e-2) <= 1e-4


def test_samples_of_each_grid(place):
    tokenizer = ibq.load_tokenizer("runs/quickstart/tokenizer", device="cpu")
    transformer = ibq.load_transformer("runs/grids/transformer", device="cpu")
    assert transformer.config.code_grids == ((16, 16), (8, 12))
    with np.load("runs/grids/samples/samples.npz", allow_pickle=False) as found:
        images = found["arr_0"]
    assert images.shape == (2, 32, 48, 3)
    assert json.loads(Path("runs/grids/samples/samples.json").read_text())["sampler"]["grid"] == [8, 12]
    own = ibq.generate(tokenizer, transformer, [3, 3], grid=(8, 12)).permute(0, 2, 3, 1)
    assert np.array_equal(own.numpy(), images)
    assert ibq.generate(tokenizer, transformer, [3]).shape == (1, 3, 64, 64)
    assert ibq.generate(tokenizer, transformer, [3], grid=(2, 5)).shape == (1, 3, 8, 20), "any other, too"


def test_images_may_be_of_one_other_shape(place, tmp_path):
    images = [*IMAGES, "data.validation=tests/data/emoji64/val-*.tar", "training.max_steps=1"]
    config = ["--config", "yaml/quickstart/transformer.yaml", *SMALL, *images]
    assert train_here("transformer", [*config, f"output={tmp_path}/run", "model.grids=[[8,12]]"]) == 0
    assert scalars(tmp_path / "run")["validation/tokens"] == {1: COUNTS["val"] * 96}


# --- Bad input ---

SOURCES = ", ".join(f"{{train: runs/grids/{name}/train, validation: runs/grids/{name}/val}}" for name in GRIDS)
SOURCES = f"data.sources=[{SOURCES}]"
OTHER = "data.sources=[{train: runs/grids/64x64/train, validation: runs/grids/32x48/val}]"
ONE = "data.sources=[{train: runs/grids/32x48/train, validation: runs/grids/32x48/val}]"
IMAGES = ["data.kind=images", "data.tokenizer=runs/quickstart/tokenizer", "data.sources=[]"]
IMAGES += ["data.train=tests/data/emoji64/train-*.tar", "data.workers=0"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["model.grids=null"],
            "model.grids: is 8 x 8 but the data has 16 x 16, 8 x 12; set model.grids=[[16,16],[8,12]]",
        ),
        (["model.grids=[[16,16],[12,8]]"], "model.grids: is 16 x 16, 12 x 8 but the data has 16 x 16, 8 x 12; set"),
        ([ONE], "model.grids: is 16 x 16, 8 x 12 but the data has 8 x 12; set model.grids=[[8,12]]"),
        ([OTHER], "data.sources[0].validation: has 8 x 12 codes, data.sources[0].train 16 x 16; encode both at one"),
        (["data.sources=[{train: nowhere, validation: a}]"], "data.sources[0].train: no codes in 'nowhere'"),
        (IMAGES, "model.grids: images are cut to one shape as they are read; for several, write codes with"),
    ],
)
def test_grids_that_do_not_fit_the_data(place, tmp_path, capsys, overrides, said):
    assert train(tmp_path / "run", *overrides) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert said in line and not (tmp_path / "run").exists()


def test_classes_that_are_not_those_of_the_training_codes(place, tmp_path, capsys):
    """Of the second folder, whose labels would say something else."""
    codes = CodeDataset("runs/grids/32x48/val")
    meta = replace(codes.meta, classes=codes.meta.classes[::-1])
    write_codes(tmp_path / "val", codes.codes(), codes.labels(), meta)
    assert train(tmp_path / "run", SOURCES.replace("runs/grids/32x48/val", str(tmp_path / "val"))) == 2
    assert "data.sources[1].validation: its classes are not those of data.sources[1].train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (["30"], "--size: 30 x 30 pixels are no multiples of 4; use 32 x 32"),
        (["32", "0"], "--size: 32 x 0 pixels are no multiples of 4; use 32 x 4"),
        (["1", "2", "3"], "--size: expected height and width, or one number, got 3"),
    ],
)
def test_sizes_that_are_none(place, tmp_path, size, said):
    models = ["--tokenizer", "runs/quickstart/tokenizer", "--device=cpu", "--size", *size]
    output = ["--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=said):
        run_tool(encode_shards, [*models, *output, "--images", "tests/data/emoji64/val-*.tar"])
    with pytest.raises(UserError, match=said):
        run_tool(sample, [*models, *output, "--transformer", "runs/grids/transformer"])
    assert not (tmp_path / "out").exists()


def test_one_folder_has_one_grid(place, tmp_path):
    command = ["--tokenizer", "runs/quickstart/tokenizer", "--images", "tests/data/emoji64/val-*.tar", "--device=cpu"]
    with pytest.raises(
        UserError, match=r"holds codes that were made otherwise \(resolution: \[32, 48\], now \[48, 32\]"
    ):
        run_tool(encode_shards, [*command, "--output", "runs/grids/32x48/val", "--size", "48", "32"])
    both = ["--transformer", "runs/grids/transformer", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--size: says the same as --grid"):
        run_tool(sample, [*command[:2], *both, "--size", "32", "--grid", "8", "8"])
