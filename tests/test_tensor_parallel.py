"""Matrices split over ranks against one process: losses, gradients, training, random numbers, bad numbers."""

import sys
from pathlib import Path

import pytest
import torch
from training_support import ROOT, make_workplace, run_script, train_here

from ibq.config import UserError
from ibq.engine.local import LocalEngine
from ibq.engine.shard import Runs, Shard, take
from ibq.engine.tensor_parallel import check_tensor_parallel, partial_gradients, tensor_shard
from ibq.ops import linear_cross_entropy as ops

sys.path.insert(0, str(Path(__file__).parent / "workers"))
import tensor_parallel_worker as worker  # noqa: E402

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
GROUPED, SHARED, ODD_ROWS = {"kv_heads": 2}, {"shared_adaln": True}, {"vocab_size": 50}
ALL = {"gradient_checkpointing": True}
CHEAP = ALL | {"checkpoint_selective": True}
HYBRID, OFFLOAD = {"shard": "hybrid", "shard_ranks": 1}, {"offload": "cpu"}
TOLERANCE = 1e-5  # of the loss; of the largest element of each tensor


def list_jobs() -> dict[int, dict[str, dict]]:
    """Processes -> name -> fields of a job."""
    models = {"plain": {}, "grouped": GROUPED, "shared": SHARED, "all": ALL, "cheap": CHEAP | GROUPED | SHARED}
    jobs: dict[int, dict] = {2: {}, 4: {}}
    for sequence in (False, True):
        suffix = ", sequence" if sequence else ""
        for name, model in models.items():
            jobs[2][f"module {name}{suffix}"] = {"kind": "module", "model": model, "sequence": sequence}
        jobs[2][f"dropout{suffix}"] = {"kind": "dropout", "sequence": sequence}
        jobs[2][f"engine{suffix}"] = {"kind": "engine", "model": CHEAP, "sequence": sequence, "accumulation": 2}
        jobs[2][f"bf16{suffix}"] = {"kind": "engine", "model": ALL, "sequence": sequence, "precision": "bf16"}
        four = {"tensor": 4, "sequence": sequence}
        jobs[4][f"module tensor 4{suffix}"] = {"kind": "module", **four}
        jobs[4][f"engine tensor 4{suffix}"] = {"kind": "engine", "model": CHEAP | SHARED, **four}
        jobs[4][f"engine 2 x 2{suffix}"] = {"kind": "engine", "model": ODD_ROWS | ALL | GROUPED, "sequence": sequence}
    jobs[4]["engine 2 x 2 hybrid"] = {"kind": "engine", "engine": HYBRID, "model": SHARED, "sequence": True}
    jobs[4]["engine 2 x 2 offload"] = {"kind": "engine", "engine": OFFLOAD, "model": ODD_ROWS}
    return jobs


FAULTS = {
    "fault: head order": {"kind": "module", "fault": "head order"},
    "fault: sum of the head dropped": {"kind": "module", "fault": "sum of the head dropped"},
    "fault: sum of the inputs dropped": {"kind": "module", "fault": "sum of the inputs dropped"},
    "fault: norms not summed": {"kind": "module", "sequence": True, "fault": "norms not summed"},
    "fault: modulation not summed": {"kind": "module", "sequence": True, "fault": "modulation not summed"},
    "fault: condition not summed": {
        "kind": "module", "sequence": True, "model": SHARED, "fault": "sum of the head dropped"
    },
    "fault: engine head order": {"kind": "engine", "fault": "head order"},
    "fault: engine scale": {"kind": "engine", "fault": "scale"},
}  # fmt: skip
JOBS = list_jobs()
JOBS[2] |= FAULTS


@pytest.fixture(scope="module", params=sorted(JOBS))
def ranks(request, tmp_path_factory):
    """(processes, name -> what each rank found)."""
    path = tmp_path_factory.mktemp("tensor_parallel") / "jobs.pt"
    torch.save(JOBS[request.param], path)
    result = run_script(*LAUNCH, str(request.param), "tests/workers/tensor_parallel_worker.py", str(path), timeout=200)
    assert result.returncode == 0, result.stderr[-4000:]
    found = [torch.load(f"{path}.{rank}") for rank in range(request.param)]
    return {name: [rank[name] for rank in found] for name in JOBS[request.param]}


class References:
    """What one process finds, made once for all jobs that differ in the layout alone."""

    def __init__(self):
        self._made = {}

    def __call__(self, job: worker.Job) -> dict:
        key = (job.kind, job.accumulation, job.precision, tuple(job.model.items()))
        if key not in self._made:
            make = self._module if job.kind == "module" else self._engine
            plain = {"kind": job.kind, "accumulation": job.accumulation, "precision": job.precision}
            self._made[key] = make(worker.Job(model=job.model, **plain))
        return self._made[key]

    def _module(self, job: worker.Job) -> dict:
        model = worker.blueprint(job).whole()
        found = worker.backward(job, model)
        return found | {"whole": {name: {"gradient": p.grad} for name, p in model.named_parameters()}}

    def _engine(self, job: worker.Job) -> dict:
        found = worker.steps(job, LocalEngine(worker.blueprint(job), worker.settings(job)))
        return found | {"whole": {name: values for name, (_, values) in found["parts"].items()}}


@pytest.fixture(scope="module")
def references():
    return References()


def rebuilt(shard: dict) -> Shard:
    return Shard(shard["shape"], tuple(Runs(**runs) for runs in shard["runs"]), shard["owner"])


def differences(found: dict, expected: dict) -> dict[str, float]:
    """Name -> relative difference: of numbers, and of each rank's elements of every tensor."""
    result = {}
    for name in expected.keys() - {"whole", "parts"}:
        ours, theirs = (torch.as_tensor(x[name], dtype=torch.float64) for x in (found, expected))
        result[name] = float((ours - theirs).abs().max() / theirs.abs().max())
    for name, whole in expected["whole"].items():
        shard, values = found["parts"][name]
        assert values.keys() == whole.keys()
        for part, tensor in whole.items():
            wanted = take(tensor, rebuilt(shard))
            distance = (values[part] - wanted).abs().amax() if wanted.numel() else 0.0
            result[f"{part} {name}"] = float(distance / tensor.abs().max())
    return result


def compare(job: dict, ranks: list[dict], references: References) -> float:
    """The largest difference; that of gradients that vanish in theory is not one."""
    expected = references(worker.Job(**job))
    return max(max(differences(rank, expected).values()) for rank in ranks)
