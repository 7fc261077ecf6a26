"""Tokenizers against the discriminator on frozen features: ranks, engines, resuming, refusals; by the entry script."""

import json
import shutil

import pytest
import torch
from support.processes import run_ranks
from support.training import checkpoint_tensors, largest_difference, make_workplace, scalars, train_here

pytestmark = pytest.mark.slow
STEPS = 3
FEATURES = "{kind: features, weights: random, side: 16, backbone: {width: 16, depth: 2, heads: 2, patch: 4, side: 16}, layers: [0, 1, 2]"  # noqa: E501 (one setting)
# Everything that does not depend on which rank draws: no augmentation, nothing to crop.
STILL = (
    f"loss.gan.discriminator={FEATURES}, augment: 0}}",
    "loss.gram={weight: 10, features: discriminator}",
    "model.quantizer.entropy_temperature=0.5",
    "statistics=world",
    f"training.max_steps={STEPS}",
    "training.validate_every=null",
    f"checkpoint.save_every={STEPS}",
)
# Every image 16 pixels: cropped to 8 or shrunk, and augmented.
MOVED = (
    f"loss.gan.discriminator={FEATURES.replace('side: 16, b', 'side: 8, b')}}}",
    "loss.gan.adaptive=true",
    "training.micro_batch=4",
    "training.validate_every=null",
)
LAST = "checkpoints/step-00000001"
GROUPS = "loss.gan.discriminator.norm_images=4"
ALONE = {"one group": (), "groups of 4": (GROUPS,), "adaptive": ("loss.gan.adaptive=true",)}
TOGETHER = {
    "one group": ("one group", ("training.micro_batch=4",)),
    "groups of 4": ("groups of 4", (GROUPS, "training.micro_batch=4")),
    "adaptive": ("adaptive", ("loss.gan.adaptive=true", "training.micro_batch=4")),
    "FSDP2": ("one group", ("training.micro_batch=4", "engine.kind=fsdp")),
    "per rank": ("one group", ("training.micro_batch=4", "statistics=rank")),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("features"))


def train(place, output, *overrides) -> int:
    return train_here("tokenizer", ["--config", str(place / "tokenizer.yaml"), f"output={output}", *overrides])


@pytest.fixture(scope="module")
def runs(place):
    """The runs alone/NAME and, of two ranks, together/NAME."""
    for name, overrides in ALONE.items():
        assert train(place, place / "alone" / name, *STILL, *overrides) == 0
    jobs = [
        {
            "stage": "tokenizer",
            "argv": [
                "--config",
                str(place / "tokenizer.yaml"),
                f"output={place / 'together' / name}",
                *STILL,
                *changes,
            ],
            "fault": None,
        }
        for name, (_, changes) in TOGETHER.items()
    ]
    (place / "jobs.json").write_text(json.dumps(jobs))
    result = run_ranks(2, "tests/workers/train_worker.py", place / "jobs.json")
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(2):
        assert json.loads((place / f"jobs.json.{rank}").read_text()) == [0] * len(jobs)
    return place


def deviation(runs, name: str) -> float:
    """The largest relative difference of losses, norms and weights to one process."""
    folders = runs / "together" / name, runs / "alone" / TOGETHER[name][0]
    found, expected = (scalars(folder) for folder in folders)
    names = [n for n in expected if n.startswith(("loss/", "gan/", "gradient_norm/"))]
    assert {"gan/lecam", "gan/weight", "loss/gram", "gradient_norm/discriminator"} <= {*names}
    largest = max(
        abs(found[n][step] - value) / max(abs(value), 1e-6) for n in names for step, value in expected[n].items()
    )
    ours, theirs = (
        {n: t for n, t in checkpoint_tensors(folder, STEPS).items() if "/moment" not in n and "rank-1" not in n}
        for folder in folders
    )
    return max(largest, largest_difference(ours, theirs, floor=1e-2))


@pytest.mark.parametrize("name", [name for name in TOGETHER if name != "per rank"])
def test_two_ranks_train_as_one(runs, name):
    assert deviation(runs, name) <= 1e-4


def test_a_difference_is_noticed(runs):
    """Statistics of each rank alone, and groups of other sizes, are another training."""
    assert deviation(runs, "per rank") > 1e-3
    whole, parts = (scalars(runs / "alone" / name)["gan/discriminator"] for name in ("one group", "groups of 4"))
    assert abs(whole[2] / parts[2] - 1) > 1e-4


def test_directions_are_equal_on_all_ranks(runs):
    tensors = checkpoint_tensors(runs / "together" / "one group", STEPS)
    first, second = (
        {n.removeprefix(f"rank-{rank}/"): t for n, t in tensors.items() if n.startswith(f"rank-{rank}/discriminator/")}
        for rank in range(2)
    )
    assert len(first) == 9 and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("judged_by", ["updated", "previous"])
def test_a_run_that_goes_on_is_bit_identical(place, tmp_path, judged_by):
    settings = (*MOVED, f"loss.gan.judged_by={judged_by}", "checkpoint.save_every=2", "checkpoint.keep=9")
    assert train(place, tmp_path / "whole", *settings) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000004")
    assert train(place, tmp_path / "again", *settings) == 0
    whole, again = (checkpoint_tensors(tmp_path / name, 4) for name in ("whole", "again"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert any("discriminator/heads" in name for name in whole) and not any("backbone" in name for name in whole)
    other = scalars(tmp_path / "whole")["gan/discriminator"]
    assert train(place, tmp_path / "other", *settings, "seed=1") == 0
    assert scalars(tmp_path / "other")["gan/discriminator"] != other


@pytest.fixture(scope="module")
def trained(place):
    assert train(place, place / "trained", *MOVED, "training.max_steps=1", "precision=bf16") == 0
    return place / "trained"


def test_bf16_trains(trained):
    found = scalars(trained)
    assert all(0 < found[f"gradient_norm/{name}"][1] < 100 for name in ("tokenizer", "discriminator"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("loss.gan.discriminator.layers=[0, 1, 1]", "has learned from other features (vit_16x2_patch4 "),
        ("loss.gan.discriminator.backbone.heads=4", "give the same backbone and weights, or use --fresh"),
        ("loss.gan.discriminator.layers=[1, 2]", "holds another model than the config describes"),
    ],
)
def test_other_features_do_not_go_on(place, trained, tmp_path, capsys, change, words):
    shutil.copytree(trained, tmp_path / "run")
    assert train(place, tmp_path / "run", *MOVED, "training.max_steps=2", "precision=bf16", change) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1] and lines[-1].startswith("error: ")


def test_a_patch_discriminator_does_not_go_on_from_one_on_features(place, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    assert train(place, tmp_path / "run", "training.max_steps=2", "precision=bf16") == 2
    assert "holds another model than the config describes" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_may_start_from_one_with_another_discriminator(place, trained, tmp_path, capsys):
    """Its weights are taken, but for the discriminator's; both ways."""
    assert train(place, tmp_path / "patch", f"start_from={trained / LAST}", "training.max_steps=1") == 0
    assert "of another kind, on frozen features" in (said := capsys.readouterr()).err + said.out
    assert (
        train(place, tmp_path / "back", *MOVED, f"start_from={tmp_path / 'patch' / LAST}", "training.max_steps=1") == 0
    )
    assert "loss.gan.discriminator.kind is features" in (said := capsys.readouterr()).err + said.out


def test_nothing_is_written_without_the_weights(place, tmp_path, capsys):
    """One line says what to do."""
    assert train(place, tmp_path / "run", *MOVED, "loss.gan.discriminator.weights=nowhere.pth") == 2
    assert "no file at 'nowhere.pth'" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_groups_that_fit_no_rank_are_refused_before_the_first_step(place, tmp_path):
    """Pairs of the six images of two ranks: not when the discriminator starts, days later."""
    sizes = ("training.batch_size=6", "training.micro_batch=3", "loss.gan.discriminator.norm_images=2")
    settings = (f"output={tmp_path / 'run'}", *STILL, *sizes, "loss.gan.start_step=2")
    done = run_ranks(2, "ibq/train_tokenizer.py", "--config", place / "tokenizer.yaml", *settings)
    assert done.returncode == 2 and "groups of 2 images do not fit ranks of 3 in a micro-batch" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
