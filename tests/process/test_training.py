"""Whole runs of both stages on tiny models: faults, resuming, what they log, the options of the GAN."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.processes import run_ranks, run_script
from support.training import CODES, checkpoint_tensors, make_workplace, scalars, train_here

import ibq
from ibq.config import load_config
from ibq.models.tokenizer_config import TokenizerConfig

STAGES = ("tokenizer", "transformer")
WORKER = "tests/workers/train_worker.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("training"))


@pytest.fixture
def train(place, tmp_path):
    """Train in this process; the run folder."""

    def run(stage, *overrides, name="run", code=0):
        folder = tmp_path / name
        assert train_here(stage, ["--config", str(place / f"{stage}.yaml"), f"output={folder}", *overrides]) == code
        return folder

    return run


def job(place, stage, folder, *overrides, fault=None):
    argv = ["--config", str(place / f"{stage}.yaml"), f"output={folder}", *overrides]
    return {"stage": stage, "argv": argv, "fault": fault}


def run_jobs(path, jobs, ranks=1):
    """The exit codes of the jobs and the worker's stderr."""
    path.write_text(json.dumps(jobs))
    result = run_ranks(ranks, WORKER, path) if ranks > 1 else run_script(WORKER, path)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(file.read_text()) for file in sorted(path.parent.glob(f"{path.name}.*"))]
    assert len(found) == ranks and all(codes == found[0] for codes in found)
    return found[0], result.stderr


def assert_identical(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, different


# --- Losses that are not finite ---

FAULTS = {
    "transformer": {"kind": "nan", "steps": [2]},
    "generator": {"kind": "nan", "steps": [2], "engine": "tokenizer"},
    "discriminator": {"kind": "nan", "steps": [2], "engine": "discriminator"},
    "infinite": {"kind": "nan", "steps": [2], "engine": "tokenizer", "value": "inf"},
}


def without_step_two(place, folder, stage, name, overrides, rank=None):
    """A run of four steps of which step 2 is bad, with a checkpoint after every step."""
    fault = FAULTS[name] | ({} if rank is None else {"rank": rank})
    settings = ["checkpoint.save_every=1", "checkpoint.keep=9", "training.validate_every=9"]
    return job(place, stage, folder, *settings, *overrides, fault=fault)


def check_skipped(folder, stderr):
    before, after, end = (checkpoint_tensors(folder, step) for step in (2, 3, 4))
    assert_identical(after, before)  # weights, averages, moments, batch normalization, LeCAM
    assert any(not torch.equal(end[name], after[name]) for name in end), "training went on"
    assert all(torch.isfinite(tensor).all() for tensor in end.values())
    state = json.loads((folder / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["bad_steps"] == 1 and set(state["updates"].values()) == {3}
    found = scalars(folder)
    assert found["bad_steps"] == {1: 0, 2: 0, 3: 1, 4: 1}
    assert 3 not in found["loss/total"] and math.isfinite(found["loss/total"][4])
    assert "skipped step 2" in stderr


@pytest.mark.slow
def test_a_bad_step_is_skipped_by_all_ranks(place, tmp_path):
    half = ["training.micro_batch=4"]
    jobs = {
        "transformer": without_step_two(place, tmp_path / "transformer", "transformer", "transformer", half, rank=1),
        "generator": without_step_two(place, tmp_path / "generator", "tokenizer", "generator", half, rank=1),
        "discriminator": without_step_two(
            place, tmp_path / "discriminator", "tokenizer", "discriminator", [*half, "statistics=world"], rank=0
        ),
        # Two micro-batches per rank: the bad one may be any.
        "infinite": without_step_two(
            place, tmp_path / "infinite", "tokenizer", "infinite", ["training.micro_batch=2"], rank=1
        ),
    }
    codes, stderr = run_jobs(tmp_path / "jobs.json", list(jobs.values()), ranks=2)
    assert codes == [0] * len(jobs)
    for name in jobs:
        check_skipped(tmp_path / name, stderr)


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_step_is_skipped(place, tmp_path, name, monkeypatch, capsys):
    import workers.train_worker as worker

    from ibq.engine.local import TorchEngine
    from ibq.training import loop

    stage = "transformer" if name == "transformer" else "tokenizer"
    monkeypatch.setattr(TorchEngine, "backward", worker.backward)
    monkeypatch.setattr(loop, "seed_step", worker.seed_step)
    task = without_step_two(place, tmp_path / "run", stage, name, [])
    worker.plant(task["fault"])
    assert train_here(stage, task["argv"]) == 0
    check_skipped(tmp_path / "run", capsys.readouterr().err)


@pytest.mark.parametrize("stage", STAGES)
def test_too_many_bad_steps_stop_the_run(place, tmp_path, stage):
    fault = {"kind": "nan", "steps": [1, 3, 4, 5]}
    task = job(place, stage, tmp_path / "run", "training.max_steps=9", "training.max_bad_steps=3", fault=fault)
    codes, stderr = run_jobs(tmp_path / "jobs.json", [task])
    assert codes == [2]
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in stderr
    assert "3 bad steps in a row" in errors[0] and "step 5" in errors[0] and "learning rate" in errors[0]
    found = scalars(tmp_path / "run")
    assert found["bad_steps"][6] == 4 and 7 not in found["bad_steps"]


# --- Resuming ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("tokenizer", ["loss.gan.start_step=2", "data.in_memory=false", "data.augment.max_zoom=1.3"]),
        ("tokenizer", ["codebook_start={kmeans: true, warmup_steps: 2}", "ema_warmup=true"]),
        ("transformer", ["model.residual_dropout=0.1", "model.class_dropout=0.1", "training.micro_batch=4"]),
    ],
)
def test_a_resumed_run_is_bit_identical(place, tmp_path, train, stage, overrides):
    overrides = [*overrides, "training.max_steps=6", "checkpoint.save_every=3", "training.validate_every=3"]
    whole = train(stage, *overrides, name="whole")
    again = train(stage, *overrides, name="again")
    shutil.rmtree(again / "checkpoints" / "step-00000006")  # as if it had died after three steps and a bit
    with open(again / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss/to')
    result = run_script(
        f"ibq/train_{'tokenizer' if stage == 'tokenizer' else 'ar'}.py",
        *("--config", str(place / f"{stage}.yaml"), f"output={again}", *overrides),
    )
    assert result.returncode == 0, result.stderr
    assert_identical(checkpoint_tensors(again, 6), checkpoint_tensors(whole, 6))
    assert_identical(load_file(again / "best/model.safetensors"), load_file(whole / "best/model.safetensors"))
    one, two = scalars(whole), scalars(again)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].keys() == two[name].keys()
        if not name.startswith(("seconds", "images_per", "tokens_per_s", "peak")):
            assert one[name] == two[name], name
    state = [json.loads((f / "checkpoints/step-00000006/state.json").read_text()) for f in (whole, again)]
    assert state[0] == state[1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_started_again_changes_nothing(train, stage):
    folder = train(stage)
    files = [p for p in folder.rglob("*") if p.is_file() and "tensorboard" not in p.parts]
    before = {path: path.read_bytes() for path in files}
    train(stage)
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_a_longer_run_goes_on(train):
    folder = train("transformer")
    train("transformer", "training.max_steps=6")
    assert sorted(scalars(folder)["loss/total"]) == [1, 2, 3, 4, 5, 6]


def test_fresh_removes_only_our_files(train, place):
    folder = train("transformer")
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoints" / ".tmp-step-00000099").mkdir()
    first = checkpoint_tensors(folder, 2)
    train("transformer", "training.max_steps=2", "--fresh")
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert sorted(scalars(folder)["loss/total"]) == [1, 2]
    # The schedule is another one, for two steps only.
    assert first.keys() == checkpoint_tensors(folder, 2).keys()


def test_leftovers_of_a_killed_run_do_no_harm(train):
    folder = train("transformer", "training.max_steps=2")
    for name in (".tmp-step-00000003", ".tmp-step-00000004"):
        (folder / "checkpoints" / name).mkdir()
        (folder / "checkpoints" / name / "state.json").write_text("{")
    (folder / ".tmp-best").mkdir()
    train("transformer", "training.max_steps=4", "checkpoint.save_every=1")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004"]


# --- Validation and the best model ---


@pytest.mark.parametrize("stage", STAGES)
def test_the_best_model_is_kept_and_loads(train, stage):
    # A learning rate that ruins the model later: the best validation comes before the end.
    folder = train(stage, "training.max_steps=6", "training.validate_every=1", "optimizer.learning_rate=0.3")
    info = json.loads((folder / "best/info.json").read_text())
    found = scalars(folder)
    scores = found["validation/psnr"] if stage == "tokenizer" else {s: -v for s, v in found["validation/nll"].items()}
    assert info["score"] == max(scores.values()) == scores[info["step"]]
    model = ibq.load_tokenizer(folder) if stage == "tokenizer" else ibq.load_transformer(folder)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    state = json.loads((folder / "checkpoints/step-00000006/state.json").read_text())
    assert state["best_score"] == info["score"]


@pytest.mark.parametrize("stage", STAGES)
def test_validation_and_best_use_averaged_weights(train, stage):
    folder = train(stage, "ema_decay=0.999", "training.max_steps=2")
    tensors = checkpoint_tensors(folder, 2)
    best = load_file(folder / "best/model.safetensors")
    names = [n.removeprefix(f"{stage}/ema/") for n in tensors if n.startswith(f"{stage}/ema/")]
    assert set(names) == set(best)
    assert_identical({n: best[n] for n in names}, {n: tensors[f"{stage}/ema/{n}"] for n in names})
    assert any(not torch.equal(best[n], tensors[f"{stage}/weight/{n}"]) for n in names)
    nothing = train(stage, "ema_decay=0.0", "training.max_steps=2", name="raw")
    score = "validation/l1" if stage == "tokenizer" else "validation/nll"
    assert scalars(folder)[score] != scalars(nothing)[score]
    raw = checkpoint_tensors(nothing, 2)
    assert all(torch.equal(raw[f"{stage}/ema/{n}"], raw[f"{stage}/weight/{n}"]) for n in names)
    # The averages do not disturb the training itself.
    assert scalars(folder)["loss/total"] == scalars(nothing)["loss/total"]


# --- What is logged ---

COMMON = ("loss/total", "learning_rate", "images_per_second", "tokens_per_second", "peak_memory_gib", "bad_steps")
PARTS = ("seconds/step", "seconds/data", "seconds/forward", "seconds/backward", "seconds/optimizer")
LOGGED = {
    "tokenizer": (
        *("loss/l1", "quantizer/quantization", "quantizer/entropy", "gan/discriminator", "gan/generator"),
        *("gan/lecam", "gan/weight", "gradient_norm/tokenizer", "gradient_norm/discriminator"),
        *("codebook/usage", "codebook/perplexity", "seconds/discriminator", "seconds/losses"),
        *("validation/psnr", "validation/ssim", "validation/usage", "validation/perplexity"),
        "validation/effective_rank",
    ),
    "transformer": ("weight_decay", "gradient_norm/transformer", "validation/nll"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_tensorboard_and_jsonl_carry_the_same_scalars(train, stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Clipping is far below the norm: what is logged is the norm before it.
    folder = train(stage, "optimizer.clip_norm=1e-3")
    found = scalars(folder)
    for name in (*COMMON, *PARTS, *LOGGED[stage]):
        assert name in found, name
        assert all(isinstance(value, int | float) for value in found[name].values()), name
        assert sorted(found[name]) == ([2, 4] if name.startswith("validation/") else [1, 2, 3, 4]), name
    assert min(found[f"gradient_norm/{stage}"].values()) > 1e-2
    parts = sum(value[4] for name, value in found.items() if name in PARTS and name != "seconds/step")
    assert 0 < parts <= found["seconds/step"][4] * 1.01
    tokens = found["tokens_per_second"][4] / found["images_per_second"][4]
    assert tokens == pytest.approx(16)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert set(events.Tags()["scalars"]) == set(found)
    for name, series in found.items():
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx(series, rel=1e-6), name
    if stage == "tokenizer":
        (tag,) = events.Tags()["images"]
        images = events.Images(tag)
        assert [image.step for image in images] == [2, 4]
        assert (images[0].height, images[0].width) == (2 * 16, 8 * 16)  # originals above reconstructions


def test_a_collapsed_codebook_raises_the_alarm(train, capsys):
    # A codebook of equal rows (zeros in float32): the lowest code wins every tie.
    folder = train("tokenizer", "model.quantizer.init_scale=1e-99", "optimizer.learning_rate=0", "training.max_steps=1")
    lines = [line for line in capsys.readouterr().err.splitlines() if "ALARM" in line]
    assert len(lines) == 1 and "step 1" in lines[0] and "codebook collapse" in lines[0]
    assert scalars(folder)["codebook/usage"] == {1: 1 / CODES}
    train("tokenizer", "training.max_steps=1", name="healthy")
    assert "ALARM" not in capsys.readouterr().err


# --- Options ---


def test_the_gan_starts_at_its_step(train):
    found = scalars(train("tokenizer", "loss.gan.start_step=2"))
    assert sorted(found["loss/l1"]) == [1, 2, 3, 4]
    for name in ("gan/generator", "gan/discriminator", "gradient_norm/discriminator"):
        assert sorted(found[name]) == [3, 4]


def test_without_the_gan(train):
    found = scalars(train("tokenizer", "loss.gan.enabled=false"))
    assert not [name for name in found if name.startswith("gan/")]


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("loss", ["hinge", "vanilla", "non_saturating"])
def test_gan_losses_and_weights(train, adaptive, loss):
    found = scalars(
        train("tokenizer", f"loss.gan.adaptive={str(adaptive).lower()}", f"loss.gan.loss={loss}", "loss.gan.weight=0.4",
              "training.max_steps=2")
    )  # fmt: skip
    weights = list(found["gan/weight"].values())
    assert all(math.isfinite(w) and w > 0 for w in weights)
    assert (weights == pytest.approx([0.4, 0.4])) != adaptive


def test_accumulation_with_the_gan(train):
    """Micro-batches have batch statistics of their own, so only the first losses are nearly those of one batch."""
    one, two = (scalars(train("tokenizer", f"training.micro_batch={n}", name=str(n))) for n in (8, 4))
    assert one.keys() == two.keys()
    assert two["loss/l1"][1] == pytest.approx(one["loss/l1"][1], rel=1e-5)
    assert two["quantizer/quantization"][1] == pytest.approx(one["quantizer/quantization"][1], rel=1e-5)
    assert two["gan/discriminator"][1] == pytest.approx(one["gan/discriminator"][1], rel=0.1)
    assert all(sorted(series) == [1, 2, 3, 4] for name, series in two.items() if name.startswith("gan/"))


@pytest.mark.parametrize("stage", STAGES)
def test_bf16(train, stage):
    # At the paper's entropy temperature of 0.01 the gradient amplifies rounding a hundredfold at every step.
    calm = ["model.quantizer.entropy_temperature=0.5"] if stage == "tokenizer" else []
    full, half = (scalars(train(stage, f"precision={p}", *calm, name=p)) for p in ("fp32", "bf16"))
    for step, value in full["loss/total"].items():
        assert half["loss/total"][step] == pytest.approx(value, rel=0.05)
    assert half["loss/total"] != full["loss/total"]


def test_gradient_checkpointing_changes_nothing(train):
    for stage in STAGES:
        plain, checkpointed = (
            scalars(train(stage, f"model.gradient_checkpointing={on}", "training.max_steps=2", name=f"{stage}-{on}"))
            for on in ("false", "true")
        )
        assert checkpointed["loss/total"] == pytest.approx(plain["loss/total"], rel=1e-6)


def test_schedules_reach_the_optimizer(train):
    rates = scalars(train("transformer", "schedule.warmup_steps=2", "training.max_steps=6"))["learning_rate"]
    # scale_learning_rate is off in a config that writes the optimizer out; the peak is the first after the warm-up.
    assert rates[1] < rates[2] < rates[3] > rates[6]
    drops = scalars(train("tokenizer", "schedule.drop_epochs=[1]", "training.max_steps=7", name="drops"))
    assert drops["learning_rate"] == pytest.approx({s: 1e-3 if s <= 5 else 1e-4 for s in range(1, 8)})
    cosine = scalars(train("tokenizer", "schedule.kind=cosine", "schedule.end=0.1", name="cosine"))["learning_rate"]
    assert list(cosine.values()) == sorted(cosine.values(), reverse=True)


def test_learning_rate_scales_with_the_batch(train):
    rates = scalars(train("tokenizer", "optimizer.scale_learning_rate=true", "training.max_steps=1"))["learning_rate"]
    assert rates[1] == pytest.approx(1e-3 * 8 / 256)


def test_the_transformer_trains_from_images(train, place):
    tokenizer = train("tokenizer", name="tokenizer")
    images = [f"data.tokenizer={tokenizer}", f"data.train={place}/data/train-*.tar", "data.workers=0"]
    folder = train("transformer", "data.kind=images", *images, f"data.validation={place}/data/val-*.tar", name="ar")
    found = scalars(folder)
    assert sorted(found["loss/total"]) == [1, 2, 3, 4] and "seconds/tokenizer" in found
    assert found["validation/tokens"][4] == 8 * 16


def test_the_run_folder_tells_its_config(train, place):
    folder = train("tokenizer", "seed=7")
    text = (folder / "config.yaml").read_text()
    assert "seed: 7" in text and "drop_rate" in text  # with defaults
    assert load_config(TokenizerConfig, folder / "best/config.yaml").resolution == 16
    again = folder.parent / "again"
    assert train_here("tokenizer", ["--config", str(folder / "config.yaml"), f"output={again}"]) == 0
    assert_identical(checkpoint_tensors(again, 4), checkpoint_tensors(folder, 4))
