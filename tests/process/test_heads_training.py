"""Training with every head: engines equal, a run that dies goes on bit by bit, files are read, and it learns."""

import json
import math
import re

import pytest
import torch
from support.processes import run_ranks
from support.training import (
    CODES,
    SIDE,
    checkpoint_tensors,
    dying_at,
    largest_difference,
    make_workplace,
    scalars,
    train_here,
)

import ibq
from ibq.sampler import SamplerConfig
from ibq.sampling import sample_codes
from ibq.training.ar_task import ARTask

pytestmark = pytest.mark.slow
LOSS, WEIGHTS, STEPS = 1e-5, 1e-5, 4
HEADS = {
    "factorised": (
        *("model.head.kind=factorised", "model.adaln=false", "model.gradient_checkpointing=true"),
        "schedule.end_weight_decay=0.2",
    ),
    "bits": ("model.head.kind=bits",),
    "masked_bits": ("model.head={kind: masked_bits, layers: 2, width: 16, steps: 2}", "model.order=random"),
}
ENGINES = {
    "DDP": (),
    "FSDP2": ("engine.kind=fsdp",),
    "ZeRO-2": ("engine.kind=zero", "engine.stage=2"),
    "ZeRO-3": ("engine.kind=zero", "engine.stage=3"),
}
QUIET = (
    "optimizer.learning_rate=0.1",
    f"training.max_steps={STEPS}",
    f"checkpoint.save_every={STEPS}",
    "training.validate_every=null",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs HEAD/ENGINE, the first of "one process", where nothing is drawn at random but by rank."""
    folder = make_workplace(tmp_path_factory.mktemp("heads"))
    base = ["--config", str(folder / "transformer.yaml"), *QUIET]
    for name, settings in HEADS.items():
        assert train_here("transformer", [*base, *settings, f"output={folder / name / 'one process'}"]) == 0
    jobs = [
        {
            "stage": "transformer",
            "argv": [*base, *settings, *own, "training.micro_batch=4", f"output={folder / name / engine}"],
        }
        for name, settings in HEADS.items()
        for engine, own in ENGINES.items()
    ]
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    result = run_ranks(2, "tests/workers/train_worker.py", file)
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads((folder / "jobs.json.0").read_text()) == [0] * len(jobs), result.stderr[-4000:]
    return folder


def training_of(folder) -> dict[str, torch.Tensor]:
    return {n: t for n, t in checkpoint_tensors(folder, STEPS).items() if not n.startswith("rank-")}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", HEADS)
def test_an_engine_trains_as_any_other(place, name, engine):
    """Masks and orders are drawn by rank: there the engines of two processes are equal."""
    expected = place / name / ("DDP" if name == "masked_bits" else "one process")
    ours, theirs = (scalars(folder)["loss/total"] for folder in (place / name / engine, expected))
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, rel=LOSS)
    found = largest_difference(training_of(place / name / engine), training_of(expected), floor=1e-2)
    assert found <= WEIGHTS
    assert theirs[1] == pytest.approx(math.log(CODES), rel=1e-5) and abs(theirs[STEPS] - theirs[1]) > 100 * LOSS


@pytest.mark.parametrize("name", HEADS)
def test_a_run_goes_on_bit_by_bit(place, name, tmp_path):
    argv = ["--config", str(place / "transformer.yaml"), *HEADS[name]]
    argv += [*QUIET, "checkpoint.save_every=2", f"output={tmp_path}"]
    with dying_at(ARTask, 3):
        train_here("transformer", argv)
    assert train_here("transformer", argv) == 0
    whole, cut = (checkpoint_tensors(folder, STEPS) for folder in (place / name / "one process", tmp_path))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize("name", HEADS)
def test_what_was_trained_is_read_and_sampled(place, name, tmp_path):
    checkpoint = place / name / "one process/checkpoints" / f"step-{STEPS:08d}"
    model = ibq.load_transformer(checkpoint, device="cpu")
    assert model.config.head.kind == name
    codes = sample_codes(model, [0, 1], [1, 2], SamplerConfig(rows_per_block=2))
    assert codes.shape == (2, SIDE, SIDE) and int(codes.max()) < CODES


@pytest.mark.parametrize("name", HEADS)
def test_a_run_starts_from_weights_of_its_own_head_alone(place, name, tmp_path, capfd):
    checkpoint = place / name / "one process/checkpoints" / f"step-{STEPS:08d}"
    start, base = [f"start_from={checkpoint}", *QUIET], ["--config", str(place / "transformer.yaml")]
    assert train_here("transformer", [*base, *start, f"output={tmp_path / 'other'}"]) == 2
    assert re.search(r"model\.\S+ is \S+ there and \S+ here; set model", capfd.readouterr().err)
    assert train_here("transformer", [*base, *HEADS[name], *start, f"output={tmp_path / 'own'}"]) == 0
    assert scalars(tmp_path / "own")["loss/total"][1] < math.log(CODES)
