"""A run in random orders: its annealing, going on in the middle of it, and validation in raster order."""

import numpy as np
import pytest
import torch
from support.training import SIDE, checkpoint_tensors, dying_at, make_workplace, scalars, train_here

import ibq
from ibq.models.code_order import draw_orders
from ibq.training.ar_task import ARTask

SETTINGS = [
    *("model.order=random", "order_annealing={unit: steps, start: 2, end: 7}", "training.max_steps=8"),
    *("model.class_dropout=0.1", "model.token_dropout=0.1", "training.micro_batch=4"),
    *(
        "checkpoint.save_every=5",
        "training.validate_every=5",
        "model.adaln_gamma_init=1",
        "optimizer.learning_rate=0.1",
    ),
]
SHARES = [1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`whole`, an undisturbed run, and `cut`, one that died after its checkpoint in the middle of the annealing."""
    folder = make_workplace(tmp_path_factory.mktemp("order"))
    argv = ["--config", str(folder / "transformer.yaml"), *SETTINGS]
    assert train_here("transformer", [*argv, f"output={folder / 'whole'}"]) == 0
    with dying_at(ARTask, 6):
        train_here("transformer", [*argv, f"output={folder / 'cut'}"])
    assert train_here("transformer", [*argv, f"output={folder / 'cut'}"]) == 0
    return folder


def test_the_share_is_a_function_of_the_step(place):
    found = scalars(place / "whole")["random_share"]
    assert [found[step + 1] for step in range(8)] == pytest.approx(SHARES)


def test_a_run_goes_on_bit_by_bit_in_the_middle_of_annealing(place):
    whole, cut = (checkpoint_tensors(place / name, 8) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    ours, theirs = (scalars(place / name)["loss/total"] for name in ("whole", "cut"))
    assert {step: theirs[step] for step in (6, 7, 8)} == {step: ours[step] for step in (6, 7, 8)}


@torch.no_grad()
def test_validation_is_of_raster_order(place):
    """By the averaged weights of its step, and not what another order would give."""
    model = ibq.load_transformer(place / "whole/checkpoints/step-00000005", device="cpu")
    codes, labels = (torch.from_numpy(np.load(place / f"data/codes/{name}-00000.npy")) for name in ("codes", "labels"))
    codes, labels = codes.long().view(-1, SIDE, SIDE), labels.long()
    logged = scalars(place / "whole")["validation/nll"][5]
    assert model(codes, labels).mean().item() == pytest.approx(logged, rel=1e-5)
    torch.manual_seed(0)
    assert model(codes, labels, draw_orders(codes, 1.0)).mean().item() != pytest.approx(logged, rel=1e-5)
