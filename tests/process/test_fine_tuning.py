"""Runs that start from weights: the page's commands on the bundled images, every engine, stops and mistakes."""

import json
import re
import shlex
import shutil
import tarfile

import pytest
import torch
from support import ROOT
from support.models import TOKENIZER, TRANSFORMER, small_transformer
from support.processes import run_ranks, run_script
from support.published import lightning_state, patch_discriminator_state
from support.training import checkpoint_tensors, largest_difference, make_workplace, scalars, train_here, write_best

import ibq
from ibq.config import parse_config
from ibq.interop import seed_voken
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.slow
PAGE = (ROOT / "ibq" / "training" / "start_from" / "README.md").read_text()
EMOJI = ROOT / "tests" / "data" / "emoji64"

# --- The page -------------------------------------------------------------------------------------

# Networks of the published form, small: 16 x 16 tokens of images of 64 pixels.
SMALL = TOKENIZER | {"resolution": 64}
SMALL_AR = {"vocab_size": 32, "num_classes": 12, "depth": 1, "width": 64}


def words_of(table: dict, prefix: str = "model.") -> list[str]:
    return [f"{prefix}{name}={json.dumps(value)}" for name, value in table.items()]


QUICK = ["device=cpu", "precision=fp32", "training.batch_size=4", "training.micro_batch=4", "training.max_steps=2"]
QUICK += ["training.validation_images=4", "training.log_every=1"]
# What each command of the page is given besides, so that it is done in a moment.
ALSO = {
    "ibq/train_tokenizer.py": [
        *QUICK,
        *words_of(SMALL),
        *("start_from.resolution=other", "loss.perceptual.weight=0", "data.workers=0"),
        *("loss.gan.discriminator.channels=8", "loss.gan.discriminator.layers=2"),
    ],
    "ibq/train_ar.py": [*QUICK, *words_of({**SMALL_AR, "num_classes": 9})],
    "tools/convert.py": ["--resolution", "64"],
    "tools/evaluate.py": ["--device", "cpu", "--batch-size", "4"],
    "tools/encode_shards.py": ["--device", "cpu"],
    "tools/sample.py": ["--device", "cpu"],
}


def page_commands() -> list[list[str]]:
    text = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def write_published(folder) -> None:
    """What the page downloads, in the published form."""
    folder.mkdir()
    torch.manual_seed(0)
    config = parse_config(TokenizerConfig, SMALL)
    network = seed_voken._reference_names(Tokenizer(config).state_dict())
    state = lightning_state(network, patch_discriminator_state(8, 2))
    torch.save({"state_dict": state, "global_step": 9}, folder / "imagenet256_16384.ckpt")
    transformer = TransformerConfig(**SMALL_AR)
    pair = (config, Tokenizer(config).state_dict())
    state = seed_voken.write_transformer(transformer, Transformer(transformer).state_dict(), pair)
    torch.save({"state_dict": state}, folder / "AR_256_B.ckpt")


def write_some_emoji(folder, count: int = 12) -> None:
    """Two shards of the bundled ones, of the first pictures of each."""
    folder.mkdir()
    (folder / "classes.json").write_text((EMOJI / "classes.json").read_text())
    for name in ("train-00000.tar", "val-00000.tar"):
        with tarfile.open(EMOJI / name) as whole, tarfile.open(folder / name, "w") as some:
            for member in whole.getmembers()[: 2 * count]:
                some.addfile(member, whole.extractfile(member))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The page's commands, from the first to the last, in a folder of their own."""
    folder = tmp_path_factory.mktemp("page")
    write_published(folder / "published")
    write_some_emoji(folder / "emoji64")
    said = {}
    for _, script, *argv in (words for words in page_commands() if words[0] == "python"):
        argv = [re.sub(r"(^|=)(runs|published)/", rf"\1{folder}/\2/", word) for word in argv]
        argv = [word.replace("tests/data/", f"{folder}/") for word in argv]
        argv = [re.sub("^start_from=", "start_from.place=", word) for word in argv]
        argv = [word for word in argv if not word.startswith("training.max_steps=")] + ALSO[script]
        done = run_script(script, *argv)
        assert done.returncode == 0, f"{script} {argv}: {done.stderr[-2000:]}"
        said[script] = done.stderr
    return folder, said


def test_a_published_tokenizer_on_own_images(tuned):
    folder, said = tuned
    record = json.loads((folder / "runs" / "my_tokenizer" / "first_weights.json").read_text())
    assert {row["part"]: row["became"] for row in record["table"]}.items() >= {
        **dict.fromkeys(("encoder", "decoder", "quantizer.codebook", "discriminator"), "taken"),
        **{"LeCAM's averages": "new", "raw weights": "left"},
    }.items()
    assert re.search(r"discriminator +taken +16 tensors", said["ibq/train_tokenizer.py"])
    published = ibq.load_tokenizer(folder / "published" / "imagenet256_16384.ckpt", device="cpu").state_dict()
    tuned_ones = ibq.load_tokenizer(folder / "runs" / "my_tokenizer", device="cpu").state_dict()
    moved = max(float((tuned_ones[name] - tensor).abs().max()) for name, tensor in published.items())
    assert 0 < moved < 0.01, "not two steps away from where it began"
    info = json.loads((folder / "runs" / "my_tokenizer" / "best" / "info.json").read_text())
    assert info["start_from"] == {name: record[name] for name in ("place", "weights_sha256")}


def test_a_published_transformer_on_own_classes(tuned):
    folder, said = tuned
    published = ibq.load_transformer(folder / "published" / "AR_256_B.ckpt", device="cpu").state_dict()
    tuned_ones = ibq.load_transformer(folder / "runs" / "my_ar", device="cpu").state_dict()
    assert tuned_ones["class_emb.weight"].shape[0] == 10 and published["class_emb.weight"].shape[0] == 13
    assert torch.allclose(tuned_ones["class_emb.weight"][-1], published["class_emb.weight"][-1], atol=1e-2)
    assert torch.allclose(tuned_ones["tok_emb.weight"], published["tok_emb.weight"], atol=1e-2)
    assert "9 new classes" in said["ibq/train_ar.py"]
    assert len(list((folder / "runs" / "my_samples").glob("*.png"))) >= 2


# --- Engines --------------------------------------------------------------------------------------

AR_ENGINES = {
    "DDP": (2, ()),
    "FSDP2": (2, ("engine.kind=fsdp",)),
    "FSDP2 x tensor": (4, ("engine.kind=fsdp", "engine.tensor_parallel=2")),
    "ZeRO-2": (2, ("engine.kind=zero", "engine.stage=2")),
    "ZeRO-3": (2, ("engine.kind=zero", "engine.stage=3")),
}
TOKENIZER_ENGINES = {"DDP": (2, ()), "FSDP2": (2, ("engine.kind=fsdp",))}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Weights to start from: a transformer of other classes, and a tokenizer's checkpoint with all that it holds."""
    folder = make_workplace(tmp_path_factory.mktemp("start"))
    write_best(folder / "ar", small_transformer(**{**TRANSFORMER, "num_classes": 5}))
    assert train_here("tokenizer", ["--config", str(folder / "tokenizer.yaml"), f"output={folder / 't'}"]) == 0
    return folder


def argv_of(place, stage: str, name: str, *overrides: str) -> list[str]:
    start = {"transformer": [f"start_from.place={place / 'ar'}", "start_from.classes=new"]}
    start["tokenizer"] = [f"start_from.place={place / 't' / 'checkpoints' / 'step-00000004'}"]
    start["tokenizer"] += ["start_from.codebook=rows", "model.quantizer.dim=24", "statistics=world"]
    argv = ["--config", str(place / f"{stage}.yaml"), f"output={place / name}", *start[stage], "training.max_steps=2"]
    return [*argv, "training.validate_every=null", *overrides]


@pytest.fixture(scope="module")
def engines(place):
    """A run of two steps of every engine, and of one process."""
    jobs: dict[int, list] = {1: []}
    for stage, kinds in (("transformer", AR_ENGINES), ("tokenizer", TOKENIZER_ENGINES)):
        jobs[1].append({"stage": stage, "argv": argv_of(place, stage, f"{stage} one process")})
        for name, (ranks, settings) in kinds.items():
            share = ranks // 2 if "tensor" in name else ranks
            argv = argv_of(place, stage, f"{stage} {name}", f"training.micro_batch={8 // share}", *settings)
            jobs.setdefault(ranks, []).append({"stage": stage, "argv": argv})
    for ranks, some in jobs.items():
        file = place / f"jobs-{ranks}.json"
        file.write_text(json.dumps(some))
        done = run_ranks(ranks, "tests/workers/train_worker.py", file)
        assert done.returncode == 0, done.stderr[-4000:]
        assert json.loads((place / f"{file.name}.0").read_text()) == [0] * len(some), done.stderr[-4000:]
    return place


CASES = [("transformer", name) for name in AR_ENGINES] + [("tokenizer", name) for name in TOKENIZER_ENGINES]


@pytest.mark.parametrize(("stage", "name"), CASES)
def test_every_engine_starts_from_the_same_weights(engines, stage, name):
    one, other = engines / f"{stage} one process", engines / f"{stage} {name}"
    losses = [scalars(folder)["loss/total"] for folder in (one, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 2
    found, expected = (
        {n: t for n, t in checkpoint_tensors(folder, 2).items() if not n.startswith("rank-")} for folder in (other, one)
    )
    assert largest_difference(found, expected, floor=1e-2) < 1e-4  # weights, moments and averages
    records = [json.loads((folder / "first_weights.json").read_text()) for folder in (one, other)]
    assert records[0]["weights_sha256"] == records[1]["weights_sha256"]


def test_optimizers_and_lecam_go_on(engines):
    """Of what has been turned the optimizer begins anew; of all else it goes on."""
    state = json.loads((engines / "tokenizer one process" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["updates"] == {"tokenizer": 6, "discriminator": 6} and state["step"] == 2
    record = json.loads((engines / "tokenizer one process" / "first_weights.json").read_text())
    rows = {row["part"]: row["became"] for row in record["table"] if row["part"] != "post_quant_conv"}
    assert {rows.pop("quantizer.codebook"), rows.pop("quant_conv")} == {"made"} and {*rows.values()} == {"taken"}


# --- Stops and mistakes ---------------------------------------------------------------------------


def test_a_run_goes_on_without_its_place(place, tmp_path, capsys):
    write_best(tmp_path / "ar", small_transformer(**TRANSFORMER))
    argv = ["--config", str(place / "transformer.yaml"), "training.validate_every=null"]
    argv += [f"output={tmp_path / 'run'}", f"start_from={tmp_path / 'ar'}"]
    assert train_here("transformer", argv) == 0
    expected = checkpoint_tensors(tmp_path / "run", 4)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    (tmp_path / "ar").rename(tmp_path / "gone")
    capsys.readouterr()
    assert train_here("transformer", argv) == 0
    assert "note: start_from" not in capsys.readouterr().err
    found = checkpoint_tensors(tmp_path / "run", 4)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    record = json.loads((tmp_path / "run" / "first_weights.json").read_text())
    assert record["place"] == str(tmp_path / "ar")
    others = (("start_from=null", "is not given"), (f"start_from={place / 'ar'}", f"is {place / 'ar'}"))
    for other, said in (*others, (f"start_from={{place: {tmp_path / 'ar'}, classes: new}}", "has other options")):
        assert train_here("transformer", [*argv, other]) == 0
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "note: start_from" in line]
        assert said in line and f"began from {tmp_path / 'ar'} and goes on" in line and "--fresh" in line
    assert json.loads((tmp_path / "run" / "first_weights.json").read_text()) == record
    assert train_here("transformer", [*argv, "start_from=null", "--fresh", "training.max_steps=1"]) == 0
    assert not (tmp_path / "run" / "first_weights.json").exists()


@pytest.mark.parametrize(
    ("stage", "overrides", "said"),
    [
        ("transformer", ["start_from=PLACE/ar"], r"class_emb.weight is \[6, 32\] .*start_from.classes=new"),
        ("transformer", ["start_from=PLACE/t/checkpoints/step-00000004"], "holds no Transformer"),
        ("tokenizer", ["start_from=PLACE/t", "model.channels=64"], r"decoder.conv_out.weight .*set model.channels=32"),
        ("tokenizer", ["start_from=PLACE/absent"], "no model at .*absent"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(place, tmp_path, stage, overrides, said):
    argv = ["--config", str(place / f"{stage}.yaml"), f"output={tmp_path / 'run'}"]
    done = run_script(
        f"ibq/train_{'ar' if stage == 'transformer' else stage}.py",
        *argv,
        *(o.replace("PLACE", str(place)) for o in overrides),
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and re.search(said, line), line
    assert not (tmp_path / "run").exists()
