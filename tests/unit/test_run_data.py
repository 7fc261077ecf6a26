"""What a run remembers of its data: other codes are refused, changed data are noticed, ranks may change."""

import json
import shutil

import pytest
from support.processes import run_ranks
from support.training import (
    checkpoint_tensors,
    largest_difference,
    make_workplace,
    scalars,
    train_here,
    write_code_folder,
)

import ibq
from ibq.data.codes import CodeDataset, CodesMeta, write_codes
from ibq.training.checkpoint import weights_hash


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("run_data"))


def train(place, folder, *overrides, stage="transformer"):
    return train_here(stage, ["--config", str(place / f"{stage}.yaml"), f"output={folder}", *overrides])


def test_codes_of_another_tokenizer_are_refused(place, tmp_path, capsys):
    write_code_folder(tmp_path / "other", tokenizer="another")
    other = [f"data.train={tmp_path}/other", f"data.validation={tmp_path}/other", "training.max_steps=6"]
    assert train(place, tmp_path / "run") == 0
    config = (tmp_path / "run/config.yaml").read_bytes()
    assert train(place, tmp_path / "run", *other) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "data.train: codes of another tokenizer" in error and "data.allow_other_tokenizer=true" in error
    assert (tmp_path / "run/config.yaml").read_bytes() == config
    assert train(place, tmp_path / "run", *other, "data.allow_other_tokenizer=true") == 0
    assert "other tokenizer" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/best/info.json").read_text())["tokenizer"] == "another"


def test_training_and_validation_codes_of_two_tokenizers(place, tmp_path, capsys):
    write_code_folder(tmp_path / "other", tokenizer="another")
    mixed = [f"data.validation={tmp_path}/other"]
    assert train(place, tmp_path / "run", *mixed) == 2
    assert "data.validation: made with another tokenizer" in capsys.readouterr().err
    assert train(place, tmp_path / "run", *mixed, "data.allow_other_tokenizer=true", "training.max_steps=1") == 0


def test_the_tokenizer_may_be_named(place, tmp_path, capsys):
    assert train(place, tmp_path / "tokenizer", "training.max_steps=1", stage="tokenizer") == 0
    named = [f"data.tokenizer={tmp_path}/tokenizer", "training.max_steps=1"]
    assert train(place, tmp_path / "run", *named) == 2
    assert "data.train: made with another tokenizer than data.tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert train(place, tmp_path / "run", *named, "data.allow_other_tokenizer=true") == 0
    # Codes that carry the hash of the named one are taken.
    digest = weights_hash(ibq.load_tokenizer(tmp_path / "tokenizer", device="cpu").state_dict())
    codes = CodeDataset(place / "data/codes")
    write_codes(
        tmp_path / "codes", codes.codes(), codes.labels(), CodesMeta(**{**vars(codes.meta), "tokenizer": digest})
    )
    own = [f"data.train={tmp_path}/codes", f"data.validation={tmp_path}/codes"]
    assert train(place, tmp_path / "own", *named, *own) == 0


def test_other_data_go_on_with_the_next_epoch(place, tmp_path, capsys):
    """Forty samples, eight a step: after seven steps the run is in its second epoch."""
    assert train(place, tmp_path / "run", "training.max_steps=7") == 0
    shutil.copytree(place / "data/codes", tmp_path / "more")
    write_code_folder(tmp_path / "more", count=48)
    more = [f"data.train={tmp_path}/more", f"data.validation={tmp_path}/more", "training.max_steps=8"]
    assert train(place, tmp_path / "run", *more) == 0
    assert "other size, rows); going on with epoch 3" in capsys.readouterr().err
    state = json.loads((tmp_path / "run/checkpoints/step-00000008/state.json").read_text())
    assert state["position"] == 2 * 48 + 8


def test_the_same_data_elsewhere_are_the_same(place, tmp_path, capsys):
    shutil.copytree(place / "data", tmp_path / "moved")
    steps = ["training.max_steps=5"]
    moved = [f"data.train={tmp_path}/moved/train-*.tar", f"data.validation={tmp_path}/moved/val-*.tar"]
    assert train(place, tmp_path / "whole", *steps, stage="tokenizer") == 0
    assert train(place, tmp_path / "run", "training.max_steps=3", stage="tokenizer") == 0
    assert train(place, tmp_path / "run", *steps, *moved, stage="tokenizer") == 0
    assert "note" not in capsys.readouterr().err
    losses = [scalars(tmp_path / name)["loss/total"] for name in ("whole", "run")]
    assert losses[0] == losses[1]


def test_a_larger_batch_in_the_middle(place, tmp_path):
    """No sample of the epoch is lost or doubled: the position counts samples, not steps."""
    assert train(place, tmp_path / "run", "training.max_steps=2") == 0
    larger = ["training.max_steps=3", "training.batch_size=16", "training.micro_batch=16"]
    assert train(place, tmp_path / "run", *larger) == 0
    assert json.loads((tmp_path / "run/checkpoints/step-00000003/state.json").read_text())["position"] == 32
    assert scalars(tmp_path / "run")["data/epoch"] == pytest.approx({1: 0.2, 2: 0.4, 3: 0.8})


@pytest.mark.slow
def test_ranks_may_change_in_the_middle(place, tmp_path):
    """One process, then two, then one: the losses are those of a run that never changed."""
    command = ["ibq/train_ar.py", "--config", str(place / "transformer.yaml"), f"output={tmp_path}/run"]
    constant = "schedule.end=1.0"  # or the learning rate would depend on where a run ends
    assert train(place, tmp_path / "whole", "training.max_steps=9", constant) == 0
    for steps, ranks in ((3, 1), (6, 2), (9, 1)):
        lengths = [f"training.max_steps={steps}", f"training.micro_batch={8 // ranks}"]
        done = run_ranks(ranks, *command, *lengths, constant)
        assert done.returncode == 0, done.stderr
    states = [json.loads((tmp_path / n / "checkpoints/step-00000009/state.json").read_text()) for n in ("whole", "run")]
    assert states[0]["position"] == states[1]["position"] == 72 and states[0]["order"] == states[1]["order"]
    whole, run = (scalars(tmp_path / name)["loss/total"] for name in ("whole", "run"))
    assert sorted(run) == list(range(1, 10))
    for step, value in whole.items():
        assert run[step] == pytest.approx(value, rel=1e-5)
    tensors = [checkpoint_tensors(tmp_path / name, 9) for name in ("run", "whole")]
    assert largest_difference(*tensors, floor=1e-2) <= 1e-5


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_streams(place, tmp_path):
    command = ["ibq/train_ar.py", "--config", str(place / "transformer.yaml"), f"output={tmp_path}/run"]
    refused = run_ranks(2, *command, "data.streams=9", "training.micro_batch=4")
    assert refused.returncode != 0 and "data.streams: 9 streams cannot be shared by 2 ranks" in refused.stderr
    assert "such as 10" in refused.stderr and not (tmp_path / "run").exists()
