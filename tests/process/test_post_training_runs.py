"""Runs that train the decoder alone on other codes: the same codes before and after, stops, engines, and mistakes."""

import json
import shutil

import pytest
import torch
from support.models import TOKENIZER, TRANSFORMER, small_transformer
from support.processes import run_ranks
from support.training import (
    SIDE,
    checkpoint_tensors,
    dying_at,
    largest_difference,
    make_workplace,
    picture,
    scalars,
    train_here,
    write_best,
)
from torchvision.transforms.functional import pil_to_tensor

import ibq
from ibq.config import UserError, parse_config
from ibq.data.transforms import to_unit_range
from ibq.engine.state_files import describe
from ibq.models.heads import BitsHeadConfig
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.training.checkpoint import weights_hash
from ibq.training.post_training import GeneratedCodesConfig, open_transformer
from ibq.training.tokenizer_task import TokenizerTask
from tools import encode_shards, sample
from tools.lib.convert.published import write_safetensors

pytestmark = pytest.mark.slow
PERTURBED = "codes={kind: perturbed, images: 0.7, neighbours: 5, end: 0.5}"
GENERATED = "codes={kind: generated, transformer: %s, keep: 0.5, prefix: %s}"
TWICE = ("training.micro_batch=4",)  # two micro-batches a step; four steps, validated and saved after every second


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trained `tokenizer`, a `transformer` of its codes, and settings of runs that begin with the tokenizer."""
    folder = make_workplace(tmp_path_factory.mktemp("codes"))
    assert train(folder, "tokenizer", start=False) == 0
    write_best(folder / "transformer/best", small_transformer(**TRANSFORMER))
    own = weights_hash(ibq.load_tokenizer(folder / "tokenizer", device="cpu").state_dict())
    (folder / "transformer/best/info.json").write_text(json.dumps({"tokenizer": own}))
    return folder


def train(folder, output: str, *settings: str, start=True) -> int:
    begin = [f"start_from={folder / 'tokenizer'}"] if start else []
    argv = ["--config", str(folder / "tokenizer.yaml"), f"output={folder / output}", *begin, *settings]
    return train_here("tokenizer", argv)


def codes_setting(folder, kind: str) -> str:
    return PERTURBED if kind == "perturbed" else GENERATED % (folder / "transformer", kind)


@pytest.mark.parametrize("kind", ["perturbed", "image", "drawn"])
def test_a_run_goes_on_bit_by_bit_and_leaves_the_codes_as_they_are(place, kind):
    """Killed a step after a checkpoint, in the midst of the annealing."""
    codes = codes_setting(place, kind)
    assert train(place, f"{kind}-whole", codes, *TWICE) == 0
    with dying_at(TokenizerTask, 3):
        train(place, f"{kind}-cut", codes, *TWICE)
    assert train(place, f"{kind}-cut", codes, *TWICE) == 0
    whole, cut = (checkpoint_tensors(place / f"{kind}-{name}", 4) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    ours, theirs = (scalars(place / f"{kind}-{name}") for name in ("whole", "cut"))
    name = "generated" if kind != "perturbed" else kind
    for series in ("loss/total", "codes/changed", f"validation/psnr_{name}", f"validation/l1_{name}"):
        assert ours[series] == theirs[series] and len(ours[series]) >= 2
    assert all(0 < share < 0.95 for share in ours["codes/changed"].values())
    before, after = (ibq.load_tokenizer(place / run, device="cpu") for run in ("tokenizer", f"{kind}-whole"))
    images = to_unit_range(torch.stack([pil_to_tensor(picture(number)) for number in range(20)]))
    assert torch.equal(before.encode(images), after.encode(images))
    found = after.state_dict()
    changed = {part for part, tensor in before.state_dict().items() if not torch.equal(tensor, found[part])}
    assert all(part.startswith(("decoder.", "post_quant_conv.")) for part in changed)
    assert {part for part in found if part.startswith("decoder.") and part.endswith("conv2.weight")} <= changed


def test_codes_and_transformers_of_before_go_with_it(place, tmp_path, capfd):
    """No warning where images are drawn with the new decoder, and codes that the old one wrote are taken."""
    assert train(place, "again", PERTURBED) == 0
    assert train(place, "twice", PERTURBED, f"start_from={place / 'again'}", start=False) == 0
    last = "checkpoints/step-00000004"  # a checkpoint will do as well, whose run says the same
    drawn = GENERATED % (place / "transformer", "image")
    begin = f"start_from={place / 'twice' / last}"
    assert train(place, "thrice", drawn, begin, "training.max_steps=1", start=False) == 0
    what = [f"--tokenizer={place / 'tokenizer'}", f"--images={place / 'data/train-*.tar'}", "--workers=0"]
    encode_shards.main([*what, f"--output={tmp_path / 'codes'}", "--device=cpu"])
    argv = ["--config", str(place / "transformer.yaml"), f"output={tmp_path / 'ar'}", "training.max_steps=1"]
    argv += [f"data.{split}={tmp_path / 'codes'}" for split in ("train", "validation")]
    for tokenizer in ("twice", f"twice/{last}"):
        assert train_here("transformer", [*argv, f"data.tokenizer={place / tokenizer}", "--fresh"]) == 0
    models = [f"--tokenizer={place / 'twice' / last}", f"--transformer={tmp_path / 'ar/checkpoints/step-00000001'}"]
    capfd.readouterr()
    sample.main([*models, "--device=cpu", "--count=1", "--rows=2", f"--output={tmp_path / 'drawn'}"])
    assert "another tokenizer" not in capfd.readouterr().err
    for tokenizer, warned in (("twice", 0), (f"twice/{last}", 0), ("tokenizer", 0), ("other", 1)):
        if tokenizer == "other":
            assert train(place, "other", start=False) == 0
            assert train(place, "other", "seed=1", "--fresh", start=False) == 0
        models = [f"--tokenizer={place / tokenizer}", f"--transformer={place / 'transformer'}", "--device=cpu"]
        sample.main([*models, "--count=1", "--rows=2", f"--output={tmp_path / tokenizer}"])
        assert capfd.readouterr().err.count("was trained on codes of another tokenizer") == warned, tokenizer
    torch.set_flush_denormal(False)


def test_codes_made_with_it_are_those_of_the_first_tokenizer(place, tmp_path):
    """A transformer of the first one's codes goes on with them, from shards or made from images in passing."""
    assert train(place, "later", PERTURBED, "training.max_steps=2") == 0
    first, later = f"{place / 'tokenizer'}", f"{place / 'later'}"
    argv = ["--config", str(place / "transformer.yaml"), "training.max_steps=1", f"start_from={place / 'transformer'}"]
    argv = [*argv, *(f"model.{name}={value}" for name, value in TRANSFORMER.items())]
    for tokenizer in (first, later):
        folder = tmp_path / tokenizer.rpartition("/")[2]
        what = [f"--tokenizer={tokenizer}", f"--images={place / 'data/train-*.tar'}", "--workers=0", "--device=cpu"]
        encode_shards.main([*what, f"--output={folder / 'codes'}"])
        codes = [f"data.{split}={folder / 'codes'}" for split in ("train", "validation")]
        assert train_here("transformer", [*argv, *codes, f"output={folder / 'ar'}"]) == 0
        images = [f"data.{split}={place / 'data/train-*.tar'}" for split in ("train", "validation")]
        images += ["data.kind=images", f"data.tokenizer={tokenizer}", "data.workers=0"]
        assert train_here("transformer", [*argv, *images, f"output={folder / 'images'}"]) == 0
    torch.set_flush_denormal(False)


def test_engines_train_alike(place):
    """Two ranks under FSDP2 as under DDP, whose random numbers are the same; discriminator and accumulation too."""
    settings = ("training.micro_batch=2", "training.validate_every=3", "training.max_steps=3", "optimizer.kind=sgd")
    jobs = []
    for engine, own in {"DDP": (), "FSDP2": ("engine.kind=fsdp",)}.items():
        for kind in ("perturbed", "image"):
            argv = ["--config", str(place / "tokenizer.yaml"), f"output={place / engine / kind}", *settings, *own]
            argv += [f"start_from={place / 'tokenizer'}", codes_setting(place, kind)]
            jobs.append({"stage": "tokenizer", "argv": argv, "fault": None})
    (place / "jobs.json").write_text(json.dumps(jobs))
    result = run_ranks(2, "tests/workers/train_worker.py", place / "jobs.json")
    assert result.returncode == 0, result.stderr[-4000:]
    for rank in range(2):
        assert json.loads((place / f"jobs.json.{rank}").read_text()) == [0] * len(jobs), result.stderr[-4000:]
    for kind in ("perturbed", "image"):
        ours, theirs = (checkpoint_tensors(place / engine / kind, 3) for engine in ("FSDP2", "DDP"))
        ours, theirs = ({n: t for n, t in some.items() if "own" not in n} for some in (ours, theirs))
        assert largest_difference(ours, theirs, floor=1e-2) < 1e-4
        name = "generated" if kind == "image" else kind
        found = [scalars(place / engine / kind) for engine in ("FSDP2", "DDP")]
        for series in ("codes/changed", "loss/total", f"validation/psnr_{name}"):
            assert found[0][series] == pytest.approx(found[1][series], rel=1e-4)


MISTAKES = {
    "other classes": ({"num_classes": 5}, "its num_classes is 5, but the classes of data.train are 3"),
    "other codes": ({"vocab_size": 64}, "its vocab_size is 64, but the tokenizer's codes are 32"),
    "another grid": ({"tokens_per_side": SIDE + 1}, "is for 5 x 5 codes, not for 4 x 4"),
    "another head": ({"head": BitsHeadConfig()}, "its head.kind is bits, but codes are drawn here by the logits of"),
    "another tokenizer": ({}, "was trained on codes of another tokenizer than"),
    "another tokenizer, one file": ({}, "was trained on codes of another tokenizer than"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_transformer_of_something_else_is_refused(place, tmp_path, capfd, name):
    settings, words = MISTAKES[name]
    transformer, given = small_transformer(**TRANSFORMER | settings), tmp_path
    write_best(tmp_path / "best", transformer)
    if name == "another tokenizer":
        (tmp_path / "best/info.json").write_text(json.dumps({"tokenizer": "0" * 64}))
    if name == "another tokenizer, one file":  # as tools/convert.py writes
        given = tmp_path / "t.safetensors"
        write_safetensors(
            given, transformer.state_dict(), {"model": json.dumps(describe(transformer)), "tokenizer": "0"}
        )
    assert train(place, "refused", GENERATED % (given, "image")) == 2
    error = capfd.readouterr().err
    assert words in error and error.count("error:") == 1 and not (place / "refused").exists()


def test_a_transformer_knows_the_grids_of_all_buckets(tmp_path):
    """And need not know that of a square which no image has."""
    grids = {"tokens_per_side": 3, "grids": ((3, 4), (4, 3))}
    write_best(tmp_path / "best", small_transformer(**TRANSFORMER | grids))
    config, model = GeneratedCodesConfig(transformer=str(tmp_path)), parse_config(TokenizerConfig, TOKENIZER)
    request = config, model, TRANSFORMER["num_classes"], torch.device("cpu"), torch.float32
    assert open_transformer(*request, [(12, 16), (16, 12)]).config.code_grids == grids["grids"]
    with pytest.raises(UserError, match=r"for 3 x 4, 4 x 3 codes, not for 3 x 5; set data.buckets"):
        open_transformer(*request, [(12, 16), (12, 20)])


def test_a_run_goes_on_without_the_place_that_it_began_with(place):
    shutil.copytree(place / "tokenizer", place / "gone")
    start = f"start_from={place / 'gone'}"
    assert train(place, "alone", PERTURBED, start, "training.max_steps=2", start=False) == 0
    shutil.rmtree(place / "gone")
    assert train(place, "alone", PERTURBED, start, start=False) == 0
    origin = json.loads((place / "tokenizer/best/info.json").read_text())
    assert "codes_of" not in origin
    info = json.loads((place / "alone/best/info.json").read_text())
    own = weights_hash(ibq.load_tokenizer(place / "tokenizer", device="cpu").state_dict())
    assert info["codes_of"] == info["start_from"]["weights_sha256"] == own
