"""Runs with `training.micro_batch: auto`: what they take, write down, and take again when they go on."""

import pytest
import torch
from support.processes import run_ranks
from support.training import SCRIPTS, checkpoint_tensors, make_workplace, train_here

from ibq.config import load_section
from ibq.training.loop import TrainingConfig

AUTO = "training.micro_batch=auto"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("auto"))


def arguments(place, stage, folder, *overrides):
    return ["--config", str(place / f"{stage}.yaml"), f"output={folder}", *overrides]


def taken(folder):
    return load_section(TrainingConfig, folder / "config.yaml", "training").micro_batch


@pytest.mark.slow
def test_a_run_goes_on_with_the_micro_batch_that_it_had(place, tmp_path, capsys):
    """Stage 1, whose batch statistics depend on it: resumed with auto, bit by bit the run that never stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_here("tokenizer", arguments(place, "tokenizer", whole, "training.micro_batch=2")) == 0
    first = ("training.micro_batch=2", "training.max_steps=2")
    assert train_here("tokenizer", arguments(place, "tokenizer", parts, *first)) == 0
    capsys.readouterr()
    assert train_here("tokenizer", arguments(place, "tokenizer", parts, AUTO)) == 0
    assert "training.micro_batch: auto takes 2 as before, 4 a step and rank" in capsys.readouterr().err
    assert taken(parts) == 2
    expected, actual = checkpoint_tensors(whole, 4), checkpoint_tensors(parts, 4)
    assert expected.keys() == actual.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]
    assert not different, different
    assert train_here("tokenizer", arguments(place, "tokenizer", parts, AUTO, "--fresh")) == 0
    assert taken(parts) == 8, "a run that starts over takes what fits"
    afresh = checkpoint_tensors(parts, 4)
    assert any(not torch.equal(afresh[name], tensor) for name, tensor in expected.items()), "the statistics differ"


@pytest.mark.slow
def test_two_ranks_agree(place, tmp_path):
    result = run_ranks(2, SCRIPTS["transformer"], *arguments(place, "transformer", tmp_path / "run", AUTO,
                                                             "engine.kind=fsdp"))  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("auto takes 4, 1 a step and rank") == 1 and taken(tmp_path / "run") == 4


def test_what_fits_nowhere_writes_nothing(place, tmp_path, capsys):
    wrong = arguments(place, "transformer", tmp_path / "run", AUTO, "model.width=65536", "model.depth=20")
    assert train_here("transformer", wrong) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "transformer.yaml: training.micro_batch: one image at a time needs" in error
    assert not (tmp_path / "run").exists()
