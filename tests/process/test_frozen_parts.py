"""A tokenizer of which the decoder alone is trained, by the entry script; and that goes on with other groups."""

import pytest
import torch
from support.training import checkpoint_tensors, make_workplace, scalars, train_here

DECODER = "optimizer.groups={encoder.*: frozen, quant*: frozen}"
ADAPTIVE = "loss.gan.adaptive=true"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Four steps of the decoder, in the folder "run"."""
    folder = make_workplace(tmp_path_factory.mktemp("frozen"))
    assert train(folder, DECODER, ADAPTIVE) == 0
    return folder


def train(folder, *settings: str, output="run") -> int:
    return train_here("tokenizer", ["--config", str(folder / "tokenizer.yaml"), f"output={folder / output}", *settings])


def is_frozen(name: str) -> bool:
    return name.startswith(("encoder.", "quant"))


def weights(tensors: dict, part="weight") -> dict[str, torch.Tensor]:
    """The tokenizer's, but for biases of keys: softmax does not see them, and their gradients are rounding errors."""
    start = f"tokenizer/{part}/"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start) and not n.endswith(".k.bias")}


def test_what_is_frozen_stays_bit_by_bit(workplace):
    before, after = (checkpoint_tensors(workplace / "run", step) for step in (2, 4))
    start, averages, moments = weights(before), weights(after, "ema"), weights(after, "moment2")
    for name, tensor in weights(after).items():
        assert torch.equal(tensor, start[name]) == torch.equal(tensor, averages[name]) == is_frozen(name), name
        assert moments[name].any() != is_frozen(name), name
    trained = [n for n, t in after.items() if n.startswith("discriminator/weight") and not torch.equal(t, before[n])]
    assert len(trained) > 3


def test_the_adaptive_weight_is_that_of_the_last_layer(workplace):
    assert all(weight > 0 for weight in scalars(workplace / "run")["gan/weight"].values())


def test_a_run_goes_on_with_other_groups(workplace, capfd):
    """What was frozen begins with moments of zero; what is newly frozen stays, and its average is its weight."""
    before = checkpoint_tensors(workplace / "run", 4)
    frozen = sum(name.startswith("tokenizer/weight/") and is_frozen(name.split("/")[2]) for name in before)
    assert train(workplace, "optimizer.groups={decoder.*: frozen}", "training.max_steps=6") == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "were frozen" in line]
    assert len(said) == 1 and f"{frozen} parameters of the tokenizer were frozen" in said[0]
    start, after = weights(before), checkpoint_tensors(workplace / "run", 6)
    averages = weights(after, "ema")
    for name, tensor in weights(after).items():
        assert torch.equal(tensor, start[name]) == torch.equal(tensor, averages[name]) == name.startswith("decoder.")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("optimizer.groups={encodr.*: frozen}",), "tokenizer.yaml: optimizer.groups: encodr.* matches no parameter"),
        (("optimizer.groups={decoder.*: frozen}", ADAPTIVE), "optimizer.groups: the tokenizer's last layer is frozen"),
    ],
)
def test_bad_groups(workplace, capfd, settings, words):
    assert train(workplace, *settings, output="other") == 2
    error = capfd.readouterr().err
    assert words in error and error.count("error:") == 1
    assert not (workplace / "other").exists()
