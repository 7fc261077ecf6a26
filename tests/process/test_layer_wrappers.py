"""Layers under what other people's code wraps its models in: DDP, FSDP2, torch.compile."""

import pytest
import torch
from safetensors.torch import load_file
from support.layers import LAYERS, Model, batches, train
from support.processes import run_ranks
from torch import Tensor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    path = tmp_path_factory.mktemp("ranks") / "result"
    result = run_ranks(2, "tests/workers/layer_worker.py", path)
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(f"{path}.safetensors")


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", LAYERS)
def test_two_ranks_train_as_one(of_two_ranks: dict[str, Tensor], wrapper: str, name: str):
    model = Model(name).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model)
    expected = model.state_dict()
    expected["codes"] = model.quantizer.encode(batches()[0][..., :4])
    start = f"{wrapper}/{name}/"
    found = {key.removeprefix(start): value for key, value in of_two_ranks.items() if key.startswith(start)}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-9, atol=1e-12), key
    trained = [key for key, _ in model.named_parameters()]
    assert all(not torch.equal(before[key], expected[key]) for key in trained)


@pytest.mark.needs("g++")
@pytest.mark.parametrize("name", ["ibq", "lfq"])
def test_compiled_as_one_graph(name: str):
    plain, compiled = Model(name).double(), Model(name).double()
    train(plain)
    train(torch.compile(compiled, fullgraph=True))
    for key, value in plain.state_dict().items():
        assert torch.allclose(compiled.state_dict()[key], value, rtol=1e-9, atol=1e-12), key
