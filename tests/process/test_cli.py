"""What bad input gets from the entry scripts: exit code 2 and one line with file, key and remedy."""

import hashlib
import importlib
import shutil

import pytest
import torch
from support.processes import run_script
from support.training import make_workplace, picture, png, scalars, train_here, write_code_folder, write_shard

from ibq.config import exit_on_user_error


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def error_of(place, tmp_path, monkeypatch, capsys):
    """The one line that a run with these settings ends with."""

    def run(stage, *overrides, config=None, output="run", bar=False):
        argv = ["--config", str(config or place / f"{stage}.yaml"), f"output={tmp_path / output}", *overrides]
        with pytest.raises(SystemExit) as end:
            exit_on_user_error(lambda: main_of(stage)(argv))
        return check(end.value.code, capsys.readouterr().err, bar)

    return run


def main_of(stage):
    def main(argv):
        module = importlib.import_module("ibq.train_tokenizer" if stage == "tokenizer" else "ibq.train_ar")
        try:
            module.main(argv)
        finally:
            torch.set_flush_denormal(False)

    return main


def check(code, stderr, bar=False):
    assert code == 2, stderr
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    if bar:  # a run that has started has shown its progress
        lines = [line for line in lines if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    return lines[0]


# --- Configuration: (stage, overrides, what the line must say) ---

CASES = {
    "misspelt key": ("tokenizer", ["trainig.batch_size=8"], ["command line", "trainig", "did you mean", "training"]),
    "misspelt inner key": ("transformer", ["model.dept=3"], ["model.dept", "depth"]),
    "wrong type": ("tokenizer", ["training.batch_size=many"], ["training.batch_size", "whole number"]),
    "wrong list": ("tokenizer", ["optimizer.betas=[0.5]"], ["optimizer.betas", "2 values"]),
    "unknown choice": ("tokenizer", ["precision=fp8"], ["precision", "fp32, bf16"]),
    "unknown kind": ("tokenizer", ["schedule.kind=cosin"], ["schedule.kind", "cosine"]),
    "no equals sign": ("tokenizer", ["seed"], ["command line", "seed", "key.path=value"]),
    "micro-batch": ("tokenizer", ["training.micro_batch=3"], ["tokenizer.yaml", "training.micro_batch", "8", "3"]),
    "batch above data": ("tokenizer", ["training.batch_size=64"], ["tokenizer.yaml", "batch_size", "40"]),
    "steps and epochs": ("transformer", ["training.epochs=3"], ["training.epochs", "max_steps"]),
    "negative seed": ("tokenizer", ["seed=-1"], ["seed", "negative"]),
    "average": ("transformer", ["ema_decay=1.5"], ["ema_decay", "[0, 1)"]),
    "two warm-ups": (
        "transformer",
        ["schedule.warmup_steps=3", "schedule.warmup_epochs=1"],
        ["schedule.warmup_epochs", "not both"],
    ),
    "negative warm-up": (
        "transformer",
        ["schedule.warmup_steps=-3"],
        ["schedule.warmup_steps", "negative"],
    ),
    "resolution": ("tokenizer", ["model.resolution=18"], ["model.resolution", "multiple", "4"]),
    "channels": ("tokenizer", ["model.channels=20"], ["model.channels", "32"]),
    "image channels": ("tokenizer", ["model.in_channels=1"], ["tokenizer.yaml", "model.in_channels", "3"]),
    "discriminator too deep": (
        "tokenizer",
        ["loss.gan.discriminator.layers=3"],
        ["tokenizer.yaml", "loss.gan.discriminator.layers", "24", "16"],
    ),
    "small images": ("tokenizer", ["model.resolution=4", "model.channel_multipliers=[1]"], ["model.resolution", "7"]),
    "no groups": ("tokenizer", ["model.norm_groups=0"], ["model.norm_groups", "at least 1"]),
    "negative entropy weight": ("tokenizer", ["loss.entropy_weight=-1"], ["loss.entropy_weight", "negative"]),
    "cosine's end": ("tokenizer", ["schedule.kind=cosine", "schedule.end=2"], ["schedule.end", "[0, 1]"]),
    "no validation codes": ("transformer", ["data.validation=null"], ["data.validation", "null"]),
    "negative GAN weight": ("tokenizer", ["loss.gan.weight=-1"], ["loss.gan.weight", "negative"]),
    "few images to start from": (
        "tokenizer",
        ["codebook_start={kmeans: true, images: 1}", "model.quantizer.num_codes=1024", "training.batch_size=8"],
        ["codebook_start.images", "more images"],
    ),
    "negative start": ("tokenizer", ["loss.gan.start_step=-1"], ["loss.gan.start_step", "negative"]),
    "validation images": ("tokenizer", ["training.validation_images=0"], ["training.validation_images", "at least 1"]),
    "held out": ("tokenizer", ["data.validation=null", "data.validation_every=1"], ["data.validation_every", "2"]),
    "workers": ("tokenizer", ["data.workers=-1"], ["data.workers", "at least 0"]),
    "zoom": ("tokenizer", ["data.augment.max_zoom=0.5"], ["data.augment.max_zoom", "at least 1"]),
    "vocabulary": ("transformer", ["model.vocab_size=64"], ["transformer.yaml", "model.vocab_size", "64", "32"]),
    "classes": ("transformer", ["model.num_classes=4"], ["transformer.yaml", "model.num_classes", "4", "3"]),
    "tokens": ("transformer", ["model.tokens_per_side=8"], ["transformer.yaml", "model.tokens_per_side", "8", "4"]),
    "heads": ("transformer", ["model.heads=3"], ["model.heads", "width"]),
    "no images": ("tokenizer", ["data.train=nowhere/*.tar"], ["tokenizer.yaml", "data.train", "nowhere", "glob"]),
    "no validation images": ("tokenizer", ["data.validation=nowhere"], ["tokenizer.yaml", "data.validation"]),
    "no codes": ("transformer", ["data.train=nowhere"], ["transformer.yaml", "data.train", "encode_shards"]),
    "no tokenizer": (
        "transformer",
        ["data.kind=images", "data.tokenizer=nowhere", "data.train=nowhere"],
        ["transformer.yaml", "data.tokenizer", "nowhere"],
    ),
    "no VGG file": (
        "tokenizer",
        ["loss.perceptual={weight: 1, weights: no.pth}"],
        ["no.pth", "loss.perceptual.weight"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_settings(error_of, name):
    stage, overrides, words = CASES[name]
    line = error_of(stage, *overrides, bar=name == "few images to start from")
    missing = [word for word in words if word not in line]
    assert not missing, line


def test_bad_config_files(error_of, tmp_path):
    assert "absent.yaml" in error_of("tokenizer", config=tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("training: {max_steps: 3\n")
    assert "broken.yaml" in error_of("tokenizer", config=tmp_path / "broken.yaml")
    (tmp_path / "few.yaml").write_text("seed: 1\n")
    line = error_of("tokenizer", config=tmp_path / "few.yaml")
    assert "few.yaml" in line and "data" in line and "missing" in line
    (tmp_path / "few.yaml").write_text("data: {kind: codes, train: codes}\ntraining: {max_steps: 1}\n")
    line = error_of("transformer", config=tmp_path / "few.yaml")
    assert "few.yaml" in line and "data.validation" in line and "missing" in line


# --- Data ---


def test_folders_without_images(error_of, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "sub-folder" in error_of("tokenizer", f"data.train={empty}")
    (empty / "cats").mkdir()
    (empty / "cats" / "notes.txt").write_text("no picture")
    assert "sub-folder" in error_of("tokenizer", f"data.train={empty}")


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_pictures(place, tmp_path, workers):
    folder = tmp_path / "images" / "cats"
    folder.mkdir(parents=True)
    for i in range(10):
        (folder / f"{i}.png").write_bytes(png(picture(i))[: 60 if i == 5 else None])
    result = run_script(
        *("ibq/train_tokenizer.py", "--config", str(place / "tokenizer.yaml"), f"output={tmp_path / 'run'}"),
        *(f"data.train={tmp_path / 'images'}", f"data.workers={workers}", "data.in_memory=false"),
    )
    line = check(result.returncode, result.stderr, bar=True)
    assert "5.png" in line and "picture" in line


def test_damaged_shards(error_of, tmp_path):
    shard = tmp_path / "shard.tar"
    shard.write_bytes(b"no tar" * 200)
    assert "shard.tar" in error_of("tokenizer", f"data.train={shard}")
    write_shard(shard, {"a.txt": b"text"})
    assert "no images" in error_of("tokenizer", f"data.train={shard}")
    write_shard(shard, {"a.png": png(picture(0))})
    assert "a.cls" in error_of("tokenizer", f"data.train={shard}")
    write_shard(shard, {"a.png": png(picture(0)), "a.cls": b"cat"})
    assert "shard.tar" in error_of("tokenizer", f"data.train={shard}")
    write_shard(shard, {"a.png": png(picture(0)), "a.cls": b"2"})
    for text in ("[", "3", '["only one"]'):
        (tmp_path / "classes.json").write_text(text)
        assert "classes.json" in error_of("tokenizer", f"data.train={shard}")


def test_damaged_codes(error_of, tmp_path):
    folder = tmp_path / "codes"
    for name in ("meta.json", "codes-00000.npy", "labels-00000.npy"):
        write_code_folder(folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
        line = error_of("transformer", f"data.train={folder}")
        assert "data.train" in line and "again" in line
    write_code_folder(folder)
    write_code_folder(tmp_path / "others", tokenizer="another")
    line = error_of("transformer", f"data.train={folder}", f"data.validation={tmp_path / 'others'}")
    assert "data.validation" in line and "encode both again" in line


def test_output_is_a_file(error_of, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert "output" in error_of("tokenizer")
    assert (tmp_path / "run").read_text() == "mine"


# --- LPIPS weights ---


def test_no_network(place, tmp_path):
    unreachable = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    unreachable |= {"no_proxy": "", "NO_PROXY": "", "TORCH_HOME": str(tmp_path / "cache")}
    result = run_script(
        *("ibq/train_tokenizer.py", "--config", str(place / "tokenizer.yaml"), f"output={tmp_path / 'run'}"),
        *("loss.perceptual.weight=1", "loss.perceptual.weights=download"),
        **unreachable,
    )
    line = check(result.returncode, result.stderr)
    assert "vgg16-397923af.pth" in line and "loss.perceptual.weights=FILE" in line
    assert "loss.perceptual.weight=0" in line
    assert not (tmp_path / "run").exists()


def test_wrong_vgg_files(error_of, tmp_path):
    file = tmp_path / "vgg.pth"

    def error(*more):
        return error_of("tokenizer", "loss.perceptual.weight=1", f"loss.perceptual.weights={file}", *more)

    file.write_bytes(b"no checkpoint")
    assert "vgg.pth" in error() and "vgg16-397923af.pth" in error()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert "SHA-256" in error(f"loss.perceptual.sha256={'a' * 64}")
    assert "SHA-256" not in error(f"loss.perceptual.sha256={digest}")
    for content in ({"features.0.weight": torch.zeros(1)}, [1, 2], torch.zeros(3)):
        torch.save(content, file)
        line = error()
        assert "vgg.pth" in line and "vgg16-397923af.pth" in line


@pytest.mark.slow
def test_random_lpips_weights_train(place, tmp_path):
    argv = ["--config", str(place / "tokenizer.yaml"), f"output={tmp_path}", "training.max_steps=1"]
    assert train_here("tokenizer", [*argv, "loss.perceptual.weight=1", "loss.perceptual.weights=random"]) == 0
    found = scalars(tmp_path)
    assert found["loss/perceptual"][1] > 0 and found["validation/lpips"][1] > 0


# --- Checkpoints ---


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for stage in ("tokenizer", "transformer"):
        argv = ["--config", str(place / f"{stage}.yaml"), f"output={folder / stage}", "training.max_steps=2"]
        assert train_here(stage, argv) == 0
    return folder


DAMAGE = {
    "cut off": ("tokenizer-0000.safetensors", lambda data: data[: len(data) // 2]),
    "empty": ("tokenizer-0000.safetensors", lambda data: b""),
    "no discriminator": ("discriminator-0000.safetensors", None),
    "no state": ("state.json", None),
    "state is no JSON": ("state.json", lambda data: data[:20]),
    "state is a list": ("state.json", lambda data: b"[]"),
    "state lacks entries": ("state.json", lambda data: b'{"format": 1}'),
    "rank's own tensors": ("rank-0.safetensors", lambda data: data[:100]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints(error_of, trained, tmp_path, name):
    shutil.copytree(trained / "tokenizer", tmp_path / "run")
    file, damage = DAMAGE[name]
    path = tmp_path / "run" / "checkpoints" / "step-00000002" / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    line = error_of("tokenizer")
    assert "step-00000002" in line and "--fresh" in line


def test_checkpoint_of_another_model(error_of, trained, tmp_path):
    shutil.copytree(trained / "tokenizer", tmp_path / "run")
    for setting in ("model.res_blocks=2", "model.channels=64", "loss.gan.discriminator.layers=1"):
        line = error_of("tokenizer", setting)
        assert "step-00000002" in line and "--fresh" in line, setting


def test_damaged_models(error_of, trained, tmp_path, place):
    images = ["data.kind=images", f"data.train={place}/data/train-*.tar", f"data.tokenizer={tmp_path / 'tokenizer'}"]
    for file in ("best/model.safetensors", "best/config.yaml"):
        shutil.rmtree(tmp_path / "tokenizer", ignore_errors=True)
        shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
        path = tmp_path / "tokenizer" / file
        path.write_bytes(path.read_bytes()[:30])
        line = error_of("transformer", *images)
        assert "data.tokenizer" in line and str(path.parent) in line
    shutil.copytree(trained / "tokenizer", tmp_path / "other")
    shutil.copy(trained / "transformer/best/model.safetensors", tmp_path / "other/best/model.safetensors")
    assert "do not fit" in error_of("transformer", *images[:2], f"data.tokenizer={tmp_path / 'other'}")


# --- Tools and help ---


def test_encode_shards_errors(trained, tmp_path, place):
    def error(*argv):
        result = run_script("tools/encode_shards.py", "--output", str(tmp_path / "codes"), *argv)
        return check(result.returncode, result.stderr)

    assert "no model" in error("--tokenizer", "nowhere", "--images", f"{place}/data/val-*.tar")
    assert "no images" in error("--tokenizer", str(trained / "tokenizer"), "--images", "nowhere")
    (tmp_path / "broken.ckpt").write_bytes(b"no checkpoint")
    assert "broken.ckpt" in error("--tokenizer", str(tmp_path / "broken.ckpt"), "--images", "nowhere")
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize("script", ["ibq/train_tokenizer.py", "ibq/train_ar.py", "tools/encode_shards.py"])
def test_help(script):
    result = run_script(script, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert "usage:" in result.stdout and "--" in result.stdout
