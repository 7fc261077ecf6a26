"""One step of every engine in one process, which is all that a quick check has time for: they begin alike."""

import json

import pytest
from support import needs
from support.processes import run_ranks
from support.training import make_workplace, scalars

ENGINES = {
    "local": ["engine.kind=local"],
    "fsdp": ["engine.kind=fsdp"],
    **{f"zero-{stage}": ["engine.kind=zero", f"engine.stage={stage}"] for stage in range(4)},
}
ALL = ["training.max_steps=1", "training.validate_every=null", "checkpoint.save_every=1"]


def wanted_by(engine: str) -> tuple[str, ...]:
    """What DeepSpeed compiles its collectives with."""
    return ("g++",) if engine.startswith("zero") else ()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with the run of each engine, all by one process of a job."""
    folder = make_workplace(tmp_path_factory.mktemp("one_step"))
    config = ["--config", str(folder / "transformer.yaml"), *ALL]
    jobs = [
        {"stage": "transformer", "argv": [*config, f"output={folder / name}", *engine]}
        for name, engine in ENGINES.items()
        if not needs.missing(*wanted_by(name))
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = run_ranks(1, "tests/workers/train_worker.py", folder / "jobs.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((folder / "jobs.json.0").read_text()) == [0] * len(jobs), done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.needs(*wanted_by(name))) for name in ENGINES])
def test_a_step(runs, name):
    found, expected = scalars(runs / name), scalars(runs / "local")
    for series in ("loss/total", "gradient_norm/transformer"):
        assert found[series] == pytest.approx(expected[series], rel=1e-5), series
    assert (runs / name / "checkpoints" / "step-00000001").is_dir()
