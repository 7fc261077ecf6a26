"""Full weights of a training checkpoint: exported to one file, and read from where they are."""

import json
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.processes import run_script
from support.training import checkpoint_tensors, make_workplace, train_here

import ibq
from ibq.api import trained_on
from ibq.config import UserError
from ibq.tensor_file import TensorFile

STAGES = ("transformer", "tokenizer")
LOAD = {"transformer": ibq.load_transformer, "tokenizer": ibq.load_tokenizer}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = make_workplace(tmp_path_factory.mktemp("convert"))
    for stage in STAGES:
        argv = ["--config", str(place / f"{stage}.yaml"), f"output={place / stage}"]
        argv += ["model.quantizer={kind: fsq, levels: [8, 4]}"] if stage == "tokenizer" else []  # which has a buffer
        assert train_here(stage, argv) == 0
    return place


def export(*arguments) -> str:
    done = run_script("tools/convert.py", "export", *map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize("stage", STAGES)
def test_export_writes_what_the_checkpoint_holds(runs, tmp_path, stage, weights):
    out = tmp_path / "model.safetensors"
    export(runs / stage, out, "--weights", weights)  # a run folder means its last checkpoint
    part = {"ema": "ema", "raw": "weight"}[weights]
    prefix = f"{stage}/{part}/"
    tensors = checkpoint_tensors(runs / stage, 4)
    expected = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    found = load_file(out)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    state = LOAD[stage](runs / stage, device="cpu").state_dict()
    assert found.keys() == state.keys()
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["model"])["kind"] == stage.title()
    assert trained_on(out) == trained_on(runs / stage) and (trained_on(out) is None) == (stage == "tokenizer")
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("stage", STAGES)
def test_all_places_give_the_same_model(runs, tmp_path, stage):
    checkpoint = runs / stage / "checkpoints" / "step-00000004"
    export(checkpoint, tmp_path / "x.safetensors")
    export(checkpoint, tmp_path / "raw.safetensors", "--weights", "raw")
    load = LOAD[stage]
    averaged = [load(place, device="cpu") for place in (checkpoint, tmp_path / "x.safetensors")]
    raw = [load(checkpoint, weights="raw", device="cpu"), load(tmp_path / "raw.safetensors", device="cpu")]
    for one, other in (averaged, raw):
        assert one.config == other.config
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())
    assert any(not torch.equal(t, raw[0].state_dict()[n]) for n, t in averaged[0].state_dict().items())


def test_what_cannot_be_exported(runs, tmp_path):
    checkpoint = runs / "transformer" / "checkpoints" / "step-00000004"
    for arguments, said in (
        ((tmp_path / "nothing", tmp_path / "x.safetensors"), "no checkpoint there"),
        ((checkpoint, tmp_path / "x.bin"), "ends with .safetensors"),
    ):
        done = run_script("tools/convert.py", "export", *map(str, arguments))
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    with pytest.raises(UserError, match="holds a Transformer, not a Tokenizer"):
        export(checkpoint, tmp_path / "x.safetensors")
        ibq.load_tokenizer(tmp_path / "x.safetensors")
    damaged = tmp_path / "step-00000004"
    damaged.mkdir()
    for file in checkpoint.iterdir():
        data = bytearray(file.read_bytes())
        if file.name == "transformer-0000.safetensors":
            data[-1] ^= 1
        (damaged / file.name).write_bytes(data)
    done = run_script("tools/convert.py", "export", str(damaged), str(tmp_path / "y.safetensors"))
    assert done.returncode == 2 and "is not what was written" in done.stderr
    assert not (tmp_path / "y.safetensors").exists()


def test_a_file_is_written_one_tensor_at_a_time(tmp_path):
    """Python's own allocations, which a header is made of, and never the tensors twice."""
    shape, names = (256, 1024), [f"t{number}" for number in range(8)]
    file = TensorFile(tmp_path / "x.safetensors", dict.fromkeys(names, (torch.float32, shape)))
    one = torch.ones(shape)
    tracemalloc.start()
    for name in names:
        file.write(name, one)
    file.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < one.nbytes, peak
