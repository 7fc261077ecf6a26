"""Every engine trains as one process does, and goes on from what any other has saved; by the real entry scripts."""

import json
import shutil

import pytest
import torch
from support import needs
from support.processes import run_ranks
from support.training import checkpoint_tensors, largest_difference, make_workplace, scalars, train_here

from ibq.data.index import sha256_of

pytestmark = pytest.mark.slow
LOSS, NORM, WEIGHTS = 1e-5, 1e-4, 1e-5  # relative; that of weights is of the largest value of each tensor
STEPS = 5

# Name: (processes, settings of the engine).
ENGINES = {
    "one process": (1, ()),
    "DDP": (2, ()),
    "FSDP2": (2, ("engine.kind=fsdp",)),
    "FSDP2, reduced in each": (2, ("engine.kind=fsdp", "engine.reduce=each")),
    "FSDP2, kept gathered": (2, ("engine.kind=fsdp", "engine.reshard=false")),
    "FSDP2 with offload": (2, ("engine.kind=fsdp", "engine.offload=cpu")),
    "FSDP2 of one process": (1, ("engine.kind=fsdp",)),
    "hybrid": (4, ("engine.kind=fsdp", "engine.shard=hybrid", "engine.shard_ranks=2")),
    "FSDP2 x tensor": (4, ("engine.kind=fsdp", "engine.tensor_parallel=2")),
    "FSDP2 x sequence": (4, ("engine.kind=fsdp", "engine.tensor_parallel=2", "engine.sequence_parallel=true")),
    "ZeRO-1": (2, ("engine.kind=zero", "engine.stage=1")),
    "ZeRO-2": (2, ("engine.kind=zero", "engine.stage=2")),
    "ZeRO-3": (2, ("engine.kind=zero", "engine.stage=3")),
    "ZeRO-3, compiled": (2, ("engine.kind=zero", "engine.stage=3", "engine.compile=true")),
    "ZeRO-3 with offload": (
        2,
        ("engine.kind=zero", "engine.stage=3", "engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"),
    ),
    "ZeRO-3 with NVMe": (1, ("engine.kind=zero", "engine.offload_optimizer=nvme", "engine.nvme_path=NVME")),
}
NEEDS = {"ZeRO-3, compiled": ("g++",), "ZeRO-3 with offload": ("g++",), "ZeRO-3 with NVMe": needs.NVME}
ELASTIC = ("one process", "DDP", "FSDP2", "FSDP2 x tensor", "ZeRO-2", "ZeRO-3", "ZeRO-3 with NVMe")
VARIANTS = {
    "adamw": (),
    "sgd": ("optimizer.kind=sgd", "optimizer.learning_rate=1.0"),
    "recomputed": ("model.gradient_checkpointing=true", "schedule.end_weight_decay=0.2", "optimizer.clip_norm=0.05"),
    "selective": ("model.gradient_checkpointing=true", "model.checkpoint_selective=true"),
    # Frozen: before all that is trained, and in between.
    "groups": (
        "optimizer.groups={tok_emb.*: frozen, blocks.0.*: frozen, blocks.1.feed_forward.w2.*: frozen, head.*: 0.5}",
    ),
}
NOT_FOR = {("ZeRO-3 with NVMe", "sgd")}  # refused: DeepSpeed has no SGD that swaps
FAULTS = {
    "a dropped reduction": ("FSDP2", {"kind": "unreduced"}),
    "a wrong scale": ("FSDP2", {"kind": "scale", "factor": 1.001}),
    "a wrong scale under DDP": ("DDP", {"kind": "scale", "factor": 1.001}),
}
LONG = (f"training.max_steps={2 * STEPS}", f"checkpoint.save_every={STEPS}", "checkpoint.keep=10")
QUIET = ("training.validate_every=null", "ema_decay=0.9")


def micro_batch(name: str, accumulated: bool) -> str:
    """The global batch is 8."""
    processes, settings = ENGINES[name]
    shares = processes // 2 if any("tensor_parallel" in setting for setting in settings) else processes
    return f"training.micro_batch={8 // shares // (2 if accumulated else 1)}"


class Runner:
    """Collects runs, and starts them together: one job for each number of processes."""

    def __init__(self, folder):
        self.folder, self.jobs = folder, {}
        self.reductions: dict[str, int] = {}  # reduce-scatters of each run

    def add(self, name: str, engine: str, overrides, fault=None, accumulated=False) -> None:
        processes, settings = ENGINES[engine]
        if needs.missing(*NEEDS.get(engine, ())):
            return
        (self.folder / "nvme").mkdir(exist_ok=True)
        settings = [setting.replace("NVME", str(self.folder / "nvme")) for setting in settings]
        argv = ["--config", str(self.folder / "transformer.yaml"), f"output={self.folder / name}"]
        argv += [*QUIET, micro_batch(engine, accumulated), *settings, *overrides]
        self.jobs.setdefault(processes, []).append({"stage": "transformer", "argv": argv, "fault": fault, "name": name})

    def start(self) -> None:
        jobs, self.jobs = self.jobs, {}
        for processes, some in sorted(jobs.items()):
            file = self.folder / f"jobs-{processes}.json"
            file.write_text(json.dumps(some))
            result = run_ranks(processes, "tests/workers/train_worker.py", file)
            assert result.returncode == 0, result.stderr[-4000:]
            for rank in range(processes):
                assert json.loads((self.folder / f"{file.name}.{rank}").read_text()) == [0] * len(some), result.stderr
            counts = json.loads((self.folder / f"reductions-{file.stem}-0.json").read_text())
            self.reductions |= {job["name"]: count for job, count in zip(some, counts, strict=True)}


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(make_workplace(tmp_path_factory.mktemp("engines")))


def relative(actual: float, expected: float) -> float:
    return abs(actual - expected) / max(abs(expected), 1e-6)


def deviation(found, expected, step: int) -> dict[str, float]:
    """The largest relative differences of losses, norms and tensors between two runs."""
    ours, theirs = scalars(found), scalars(expected)
    result = {}
    for name, key in (("loss", "loss/total"), ("norm", "gradient_norm/transformer")):
        assert ours[key].keys() == theirs[key].keys()
        result[name] = max(relative(ours[key][at], value) for at, value in theirs[key].items())
    tensors = [
        {n: t for n, t in checkpoint_tensors(folder, step).items() if not n.startswith("rank-")}
        for folder in (found, expected)
    ]
    result["tensors"] = largest_difference(*tensors, floor=1e-2)  # weights, moments and averages
    return result


def equal(found: dict[str, float]) -> bool:
    return found["loss"] <= LOSS and found["norm"] <= NORM and found["tensors"] <= WEIGHTS


# --- Equality ---


@pytest.fixture(scope="module")
def equality(runner):
    """The runs NAME of each engine and variant, and those with a planted fault."""
    overrides = (f"training.max_steps={STEPS}", f"checkpoint.save_every={STEPS}")
    for variant, settings in VARIANTS.items():
        for engine in ENGINES:
            if (engine, variant) not in NOT_FOR:
                accumulated = variant == "recomputed"
                runner.add(f"equal/{engine}/{variant}", engine, [*overrides, *settings], accumulated=accumulated)
    for name, (engine, fault) in FAULTS.items():
        runner.add(f"equal/{name}", engine, overrides, fault)
    runner.start()
    return runner.folder / "equal"


def engine_param(*values: str):
    """Parameters of a test that name engines."""
    return pytest.param(*values, marks=[pytest.mark.needs(*NEEDS[name]) for name in values if name in NEEDS])


PAIRS = [(e, v) for e in ENGINES for v in VARIANTS if e != "one process" and (e, v) not in NOT_FOR]


@pytest.mark.parametrize(("engine", "variant"), [engine_param(*pair) for pair in PAIRS])
def test_an_engine_trains_as_one_process(equality, engine, variant):
    found = deviation(equality / engine / variant, equality / "one process" / variant, STEPS)
    assert equal(found), found


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(equality, name):
    found = deviation(equality / name, equality / "one process" / "adamw", STEPS)
    assert not equal(found), found


def test_gradients_are_reduced_once_a_step_or_in_every_micro_batch(equality, runner):
    """Of two blocks and what is around them; with two micro-batches a step."""
    once, each = (runner.reductions[f"equal/{name}/recomputed"] for name in ("FSDP2", "FSDP2, reduced in each"))
    assert (once, each) == (3 * STEPS, 2 * 3 * STEPS)


def test_the_variants_differ(equality):
    """Optimizer, clipping and weight decay have an effect that the comparison would notice."""
    plain = scalars(equality / "one process" / "adamw")["loss/total"]
    for variant in ("sgd", "recomputed", "groups"):
        losses = scalars(equality / "one process" / variant)["loss/total"]
        assert relative(losses[STEPS], plain[STEPS]) > LOSS, variant


# --- Elastic checkpoints ---


@pytest.fixture(scope="module")
def elastic(runner):
    """Uninterrupted runs whole/ENGINE, and continued ones ENGINE -> ENGINE."""
    for engine in ELASTIC:
        runner.add(f"whole/{engine}", engine, LONG)
    runner.start()
    for saver in ELASTIC:
        saved = runner.folder / "whole" / saver / "checkpoints" / f"step-{STEPS:08d}"
        for engine in ELASTIC if saved.exists() else ():
            name = f"{saver} -> {engine}"
            shutil.copytree(saved, runner.folder / name / "checkpoints" / saved.name)
            runner.add(name, engine, LONG)
    runner.start()
    return runner.folder


@pytest.mark.parametrize("engine", [*map(engine_param, ELASTIC)])
@pytest.mark.parametrize("saver", [*map(engine_param, ELASTIC)])
def test_a_run_goes_on_under_another_engine(elastic, saver, engine):
    continued, whole = elastic / f"{saver} -> {engine}", elastic / "whole" / saver
    losses, expected = (scalars(folder)["loss/total"] for folder in (continued, whole))
    assert sorted(losses) == list(range(STEPS + 1, 2 * STEPS + 1))
    assert max(relative(loss, expected[step]) for step, loss in losses.items()) <= LOSS
    tensors = [
        {n: t for n, t in checkpoint_tensors(folder, 2 * STEPS).items() if not n.startswith("rank-")}
        for folder in (continued, whole)
    ]
    assert largest_difference(*tensors, floor=1e-2) <= WEIGHTS


# --- Other groups ---


@pytest.fixture(scope="module")
def thawed(equality, runner):
    """Runs with groups that go on without: NAME > ENGINE, one of the two being one process."""
    for saver, engine in {(engine, "one process") for engine in ELASTIC} | {("one process", e) for e in ELASTIC}:
        saved = equality / saver / "groups" / "checkpoints" / f"step-{STEPS:08d}"
        if saved.exists():
            name = f"thawed/{saver} > {engine}"
            shutil.copytree(saved, runner.folder / name / "checkpoints" / saved.name)
            runner.add(name, engine, LONG)
    runner.start()
    return runner.folder / "thawed"


@pytest.mark.parametrize("engine", [*map(engine_param, ELASTIC)])
def test_a_run_goes_on_with_other_groups(equality, thawed, engine):
    """What was frozen is trained from there on, with the same moments under every engine."""
    expected = thawed / "one process > one process"
    for found in (thawed / f"{engine} > one process", thawed / f"one process > {engine}"):
        difference = deviation(found, expected, 2 * STEPS)
        assert equal(difference), difference
    before = checkpoint_tensors(equality / "one process" / "groups", STEPS)
    after = checkpoint_tensors(expected, 2 * STEPS)
    for part in ("weight", "ema", "moment1"):
        name = f"transformer/{part}/blocks.0.attention.wqkv.weight"
        assert not torch.equal(before[name], after[name])


def test_lost_moments_would_be_noticed(elastic, tmp_path):
    """The control: the same checkpoint without its moments leads to other losses."""
    saved = elastic / "whole/one process/checkpoints" / f"step-{STEPS:08d}"
    folder = tmp_path / "run"
    shutil.copytree(saved, folder / "checkpoints" / saved.name)
    index = folder / "checkpoints" / saved.name / "transformer.index.json"
    content = json.loads(index.read_text())
    content["parts"] = ["weight", "ema"]
    index.write_text(json.dumps(content))
    manifest = index.with_name("manifest.json")
    files = json.loads(manifest.read_text())
    del files["files"][index.name]
    files["files"] |= described(index)
    manifest.write_text(json.dumps(files))
    argv = ["--config", str(elastic / "transformer.yaml"), f"output={folder}", *QUIET, "training.micro_batch=8", *LONG]
    assert train_here("transformer", argv) == 0
    losses, expected = (scalars(run)["loss/total"] for run in (folder, elastic / "whole/one process"))
    assert max(relative(loss, expected[step]) for step, loss in losses.items()) > LOSS


def described(path):
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}}
