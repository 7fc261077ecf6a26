"""One step of every engine in one process, which is all that a quick check has time for: they begin alike."""

import json

import pytest
from support.processes import run_ranks
from support.training import checkpoint_tensors, largest_difference, make_workplace, scalars

ENGINES = {
    "local": ["engine.kind=local"],
    "fsdp": ["engine.kind=fsdp"],
    **{f"zero-{stage}": ["engine.kind=zero", f"engine.stage={stage}"] for stage in range(4)},
}
ORDERS = {"raster": 1, "random": 2}  # steps: at the first nothing before the head has a gradient
ALL = ["training.validate_every=null", "checkpoint.save_every=1"]


def order_of(order: str) -> list[str]:
    return [f"model.order={order}", f"training.max_steps={ORDERS[order]}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with the run of each engine, all by one process of a job."""
    folder = make_workplace(tmp_path_factory.mktemp("one_step"))
    config = ["--config", str(folder / "transformer.yaml"), *ALL]
    jobs = [
        {"stage": "transformer", "argv": [*config, f"output={folder / order / name}", *engine, *order_of(order)]}
        for name, engine in ENGINES.items()
        for order in ORDERS
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = run_ranks(1, "tests/workers/train_worker.py", folder / "jobs.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((folder / "jobs.json.0").read_text()) == [0] * len(jobs), done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ENGINES)
def test_a_step(runs, name, order):
    found, expected = scalars(runs / order / name), scalars(runs / order / "local")
    for series in ("loss/total", "gradient_norm/transformer"):
        assert found[series] == pytest.approx(expected[series], rel=1e-5), series
    weights, wanted = (checkpoint_tensors(runs / order / run, ORDERS[order]) for run in (name, "local"))
    assert largest_difference(weights, wanted, floor=1e-2) < 1e-5
    assert ("transformer/weight/target_emb.weight" in weights) == ("random_share" in found) == (order == "random")
