"""DeepSpeed's ZeRO stages and offloads against a plain loop of PyTorch: step by step, state, faults, bad input."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import pytest
import torch
from support import ROOT, needs
from support.processes import run_ranks, run_script
from support.training import largest_difference, make_workplace, scalars, train_here

from ibq.config import ConfigError, UserError
from ibq.engine import zero_shortcuts
from ibq.engine.base import EngineSettings, OptimizerConfig
from ibq.engine.configs import ModelSize, ZeroEngineConfig
from ibq.engine.zero import ZeroEngine
from ibq.engine.zero_setup import model_size
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.scaling.transformer import model_size as planned_size

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
from workers import zero_worker as worker

# Relative tolerances; that of weights is of the largest value of each tensor.
LOSS, NORM, WEIGHTS = 1e-5, 1e-4, 1e-5
SGD = {"kind": "sgd", "clip_norm": 0.3}
ADAM = worker.ADAMW | {"kind": "adam", "eps": 1e-2}
TWO = {"accumulation": 2}
BF16 = {"precision": "bf16"}
LARGE = {"vocab_size": 8192}  # halves of two tensors are just large enough for DeepSpeed to put them on NVMe
STAGES = {f"stage {stage}": {"stage": stage} for stage in range(4)}
CPU = {f"stage {stage}, cpu": {"stage": stage, "offload_optimizer": "cpu"} for stage in (1, 2, 3)}
WEIGHTS_ON_CPU = {
    "weights cpu": {"offload_parameters": "cpu"},
    "both cpu": {"offload_optimizer": "cpu", "offload_parameters": "cpu"},
}
COMPILED = {"stage": 3, "compile": True}
# Frozen: before all that is trained, in between, and both of a kind; "*.weight" is told apart by its place.
GROUPS = worker.ADAMW | {
    "groups": {"tok_emb.*": "frozen", "blocks.0.*": "frozen", "blocks.1.feed_forward.w?.*": "frozen", "head.*": 0.5}
}
NVME = {
    "nvme": {"offload_optimizer": "nvme"},
    "nvme, weights cpu": {"offload_optimizer": "nvme", "offload_parameters": "cpu"},
    "nvme, weights nvme": {"offload_optimizer": "nvme", "offload_parameters": "nvme"},
    "cpu, weights nvme": {"offload_optimizer": "cpu", "offload_parameters": "nvme"},
}
SMALL_GROUPS = {"sub_group_size": 262_144}


def list_jobs() -> dict[str, dict]:
    """Name -> job. Those of one name before ":" share their reference; "NAME > OTHER" goes on with what NAME left."""
    plain = STAGES | CPU | WEIGHTS_ON_CPU
    jobs = {f"adamw: {name}": {"engine": engine} for name, engine in plain.items()}
    jobs |= {f"adamw nvme: {name}": {"engine": engine, "model": LARGE} for name, engine in NVME.items()}
    jobs |= {f"sgd: {name}": {"engine": engine, "optimizer": SGD, "settings": TWO} for name, engine in STAGES.items()}
    jobs |= {f"adam: {name}": {"engine": e, "optimizer": ADAM, "settings": TWO} for name, e in (STAGES | CPU).items()}
    odd = STAGES | {name: CPU[name] for name in ("stage 2, cpu", "stage 3, cpu")}
    jobs |= {f"odd: {name}": {"engine": e, "odd": 1, "settings": TWO} for name, e in odd.items()}
    jobs["odd nvme: nvme"] = {"engine": NVME["nvme"], "odd": 300_000, "settings": TWO}
    jobs["adam nvme: nvme"] = {"engine": NVME["nvme"], "optimizer": ADAM, "settings": TWO, "model": LARGE}
    for kind in ("gradient_checkpointing", "checkpoint_selective"):
        model = {"gradient_checkpointing": True, kind: True}
        for stage in (2, 3):
            jobs[f"adamw: {kind}, stage {stage}"] = {"engine": {"stage": stage}, "model": model}
        jobs[f"adamw: {kind}, compiled"] = {"engine": COMPILED, "model": model}
    compiled = STAGES | {"stage 3, both cpu": WEIGHTS_ON_CPU["both cpu"]}
    jobs |= {f"adamw: compiled, {name}": {"engine": e | {"compile": True}} for name, e in compiled.items()}
    for name in ("stage 3", "compiled, stage 3"):
        jobs[f"adamw: {name}, holds"] = jobs[f"adamw: {name}"] | {"holds": True, "model": {"depth": 6}}
    jobs["adamw: compiled twice"] = jobs["adamw: compiled, stage 3"] | {"settings": TWO}
    for name in ("stage 1", "stage 2", "stage 2, cpu", "stage 3", "stage 3, cpu"):
        jobs[f"adamw: discards, {name}"] = jobs[f"adamw: {name}"] | {"discards": True, "settings": TWO}
    jobs["adamw nvme: discards"] = jobs["adamw nvme: nvme"] | {"discards": True, "settings": TWO}
    weights_on_nvme = {name: NVME[name] for name in ("nvme", "nvme, weights nvme")}
    for layouts, kind, model in ((plain, "groups", {}), (weights_on_nvme, "groups nvme", LARGE)):
        jobs |= {f"{kind}: {name}": {"engine": e, "optimizer": GROUPS, "model": model} for name, e in layouts.items()}
    jobs["groups: compiled, stage 3"] = {"engine": COMPILED, "optimizer": GROUPS}
    for fault in ("scale", "alone"):
        jobs[f"adamw: fault {fault}"] = {"engine": {"stage": 3}, "fault": fault}
    return jobs | fault_jobs() | resume_jobs() | bf16_jobs()


def fault_jobs() -> dict[str, dict]:
    """A loss or a gradient that is not a number in step 2 of rank 1."""
    jobs = {}
    for fault in ("nan", "nan gradient"):
        for name, engine in (STAGES | CPU).items():
            jobs[f"skip: {fault}, {name}"] = {"engine": engine, "settings": TWO, "fault": fault}
        jobs[f"skip nvme: {fault}"] = {"engine": NVME["nvme"], "settings": TWO, "fault": fault, "model": LARGE}
    return jobs


def resume_jobs() -> dict[str, dict]:
    """Three steps, then two more in another layout."""
    first = {"stage 0": STAGES, "stage 1": STAGES, "stage 2, cpu": CPU, "stage 3": STAGES}
    jobs = {f"first {name}": {"engine": layouts[name], "steps": 3} for name, layouts in first.items()}
    jobs["first nvme"] = {"engine": NVME["nvme"], "steps": 3, "model": LARGE}
    for name, other in {
        "stage 0": "stage 1",
        "stage 1": "stage 3",
        "stage 2, cpu": "stage 2",
        "stage 3": "stage 0",
    }.items():
        jobs[f"adamw: {name} > {other}"] = {"engine": STAGES[other], "load": f"first {name}", "steps": 2}
    jobs["adamw: stage 3 > both cpu"] = {"engine": WEIGHTS_ON_CPU["both cpu"], "load": "first stage 3", "steps": 2}
    onward = {"stage 1, cpu": CPU["stage 1, cpu"], "nvme": NVME["nvme"], "weights nvme": NVME["nvme, weights nvme"]}
    for name, engine in onward.items():
        jobs[f"adamw nvme: nvme > {name}"] = {"engine": engine, "load": "first nvme", "steps": 2, "model": LARGE}
    for name, engine, model in (
        ("stage 3", STAGES["stage 3"], {}),
        ("weights nvme", NVME["nvme, weights nvme"], LARGE),
    ):
        first = "groups: stage 0" if not model else "groups nvme: nvme"
        job = {"engine": engine, "optimizer": GROUPS, "model": model, "load": first, "steps": 0}
        jobs[f"{first} > {name}"] = job
    jobs["adamw: fault moments lost"] = jobs["adamw: stage 1 > stage 3"] | {"parts": ("weight", "ema")}
    jobs["adamw: fault average lost"] = jobs["adamw: stage 1 > stage 3"] | {"parts": ("weight", "moment1", "moment2")}
    return jobs


def bf16_jobs() -> dict[str, dict]:
    """Started only, and five steps."""
    jobs = {}
    for name, engine in (STAGES | CPU | NVME).items():
        if name not in ("nvme, weights cpu", "cpu, weights nvme"):
            job = {"engine": engine, "settings": BF16, "model": LARGE if "nvme" in name else {}}
            jobs[f"bf16: {name}"] = job
        if name in ("stage 1", "stage 2", "stage 3", "nvme, weights nvme"):
            jobs[f"bf16: groups, {name}"] = job | {"optimizer": GROUPS}
    for name in ("stage 1", "stage 2", "stage 3", "nvme"):
        jobs[f"bf16 start: {name}"] = jobs[f"bf16: {name}"] | {"steps": 0}
    sums = {"settings": BF16 | TWO, "steps": 2, "odd": 1}
    jobs |= {f"bf16 sums: {name}": {"engine": e, **sums} for name, e in (STAGES | CPU).items() if name != "stage 0"}
    jobs["bf16: stage 3"] |= {"counts": True}
    jobs["bf16: compiled, stage 3"] = jobs["bf16: stage 3"] | {"engine": COMPILED}
    for stage in (1, 2, 3):
        engine = {"stage": stage, "reduce_dtype": "bf16"}
        jobs[f"bf16: reduced in it, stage {stage}"] = {"engine": engine, "settings": BF16}
        jobs[f"bf16: discards, stage {stage}"] = jobs[f"bf16: stage {stage}"] | {
            "discards": True,
            "settings": BF16 | TWO,
        }
        jobs[f"bf16 reduced: stage {stage}"] = {"engine": engine, **sums}
        jobs[f"bf16 skip: stage {stage}"] = {"engine": engine, "settings": BF16, "fault": "nan"}
    return jobs


JOBS = list_jobs()


def launch(folder: Path, names, run=run_script) -> subprocess.CompletedProcess:
    jobs = []
    for name in names:
        engine = JOBS[name]["engine"]
        if "nvme" in engine.values():
            engine = engine | SMALL_GROUPS | {"nvme_path": str(folder / "disk")}
        jobs.append(JOBS[name] | {"name": name, "engine": engine})
    (folder / "disk").mkdir()
    torch.save(jobs, folder / "jobs.pt")
    return run("tests/workers/zero_worker.py", folder / "jobs.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with what all jobs left, each done by two processes."""
    needs.require(*needs.NVME)
    folder = tmp_path_factory.mktemp("zero")
    result = launch(folder, JOBS, partial(run_ranks, 2))
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "stderr").write_text(result.stdout + result.stderr)
    return folder


# --- The reference: one process, the global batch, float32 ---

REFERENCES: dict[str, dict] = {}


def reference(name: str) -> dict:
    """Rows of (loss, norm), final state and validation losses of a plain loop that a job must equal."""
    spec = {key: value for key, value in JOBS[name].items() if key in ("optimizer", "odd", "model")}
    spec["skip"] = name.startswith("skip")
    key = repr(sorted(spec.items()))
    if key not in REFERENCES:
        skip = spec.pop("skip")
        REFERENCES[key] = plain_loop(worker.Job(name=name, **spec), skip)
    return REFERENCES[key]


def plain_loop(job: worker.Job, skip: bool) -> dict:
    module = worker.blueprint(job).whole()
    groups, wanted = [], job.optimizer.get("groups", {})
    for name, parameter in module.named_parameters():
        hyper = worker.HYPER["decay" if parameter.dim() >= 2 else "no_decay"]
        factor = next((factor for pattern, factor in wanted.items() if fnmatchcase(name, pattern)), 1.0)
        if factor == "frozen":
            parameter.requires_grad_(False)
        else:
            rate, decay = factor * hyper.learning_rate, hyper.weight_decay
            groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    settings = {"betas": job.optimizer["betas"], "eps": job.optimizer["eps"]} if "betas" in job.optimizer else {}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[job.optimizer["kind"]]
    optimizer = kind(groups, **settings)
    average = {name: p.detach().clone() for name, p in trained.items()}
    rows, parts = [], 2 if job.odd else 1  # as many micro-batches as the engine where it matters
    for step in range(5):
        optimizer.zero_grad()
        total = 0.0
        for number, part in enumerate(zip(*(t.chunk(parts) for t in worker.batch(step)), strict=True)):
            module.turn = step + number
            loss = module(*part).mean() / parts
            loss.backward()
            total += loss.item()
        for parameter in trained.values():
            if parameter.grad is None:  # none is zero: the parameter still decays
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.stack([p.grad.double().norm() for p in trained.values()]).norm().float()
        rows.append((total, norm.item()))
        if skip and step == 2:
            continue
        torch.nn.utils.clip_grads_with_norm_(trained.values(), job.optimizer["clip_norm"], norm)
        optimizer.step()
        for name, parameter in trained.items():
            average[name].lerp_(parameter.detach(), 1 - worker.EMA["ema_decay"])
    module.eval()
    weights = {name: p.detach() for name, p in module.named_parameters()}
    with torch.no_grad():
        raw = module(*worker.batch(1000)).mean().item()
        averaged = torch.func.functional_call(module, average, worker.batch(1000)).mean().item()
    return {"rows": rows, "state": {"weight": weights, "ema": average}, "raw": raw, "averaged": averaged}


def relative(actual: float, expected: float) -> float:
    return abs(actual - expected) / max(abs(expected), 1e-6) if math.isfinite(actual) else math.inf


def outcome(runs: Path, name: str) -> dict:
    return torch.load(runs / f"{name}.0.pt", weights_only=False)


def deviations(runs: Path, name: str, world: int = 2) -> dict[str, float]:
    """Largest relative differences from the reference; a skipped step has no norm."""
    found, expected = outcome(runs, name), reference(name)
    rows = expected["rows"][len(expected["rows"]) - len(found["rows"]) :]
    pairs = list(zip(found["rows"], rows, strict=True))
    state = worker.assemble(runs, name, world)
    return {
        "loss": max((relative(ours[0], theirs[0]) for ours, theirs in pairs), default=0.0),
        "norm": max((relative(ours[1], theirs[1]) for ours, theirs in pairs if not ours[2]), default=0.0),
        "validation": max(relative(found[part], expected[part]) for part in ("raw", "averaged")),
        **{part: largest_difference(state[part], expected["state"][part], floor=1e-2) for part in ("weight", "ema")},
    }


def equal(deviation: dict[str, float]) -> bool:
    limits = {"loss": LOSS, "norm": NORM, "validation": LOSS, "weight": WEIGHTS, "ema": WEIGHTS}
    return all(deviation[name] <= limit for name, limit in limits.items())


@pytest.mark.parametrize("name", [n for n in JOBS if not n.startswith(("bf16", "first")) and "fault" not in n])
def test_equal_to_a_plain_loop(runs, name):
    deviation = deviations(runs, name)
    assert equal(deviation), deviation
    assert [row[2] for row in outcome(runs, name)["rows"]] == [
        name.startswith("skip") and step == 2 for step in range(len(outcome(runs, name)["rows"]))
    ]


def frozen(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern, factor in GROUPS["groups"].items() if factor == "frozen")


@pytest.mark.parametrize("name", [n for n in JOBS if "groups" in n])
def test_what_is_frozen_stays_bit_by_bit(runs, name):
    state, whole = worker.assemble(runs, name, 2), initial_weights(name)
    assert sum(map(frozen, whole)) > 10
    for tensor, value in whole.items():
        assert torch.equal(state["weight"][tensor], value) == frozen(tensor), tensor
        assert [tensor in state[part] for part in ("moment1", "moment2", "ema")] == [not frozen(tensor)] * 3


@pytest.mark.parametrize("name", [n for n in JOBS if "fault" in n])
def test_a_planted_difference_is_noticed(runs, name):
    deviation = deviations(runs, name)
    assert not equal(deviation), deviation


def initial_weights(name: str) -> dict[str, torch.Tensor]:
    spec = {key: value for key, value in JOBS[name].items() if key in ("odd", "model")}
    return {n: p.detach() for n, p in worker.blueprint(worker.Job(name=name, **spec)).whole().named_parameters()}


@pytest.mark.parametrize(
    "name", ["adamw: stage 3", "adamw nvme: nvme", "sgd: stage 3", "adam: stage 3", "odd: stage 3"]
)
def test_the_reference_moves(name):
    """Else equality would prove little."""
    expected, start = reference(name), initial_weights(name)
    for tensor, value in expected["state"]["weight"].items():
        change = float((value - start[tensor]).abs().max() / value.abs().max())
        assert change > 20 * WEIGHTS or value.dim() < 2, (tensor, change)
    assert relative(expected["averaged"], expected["raw"]) > 10 * LOSS
    clip = JOBS[name].get("optimizer", worker.ADAMW)["clip_norm"]
    assert any(norm > clip for _, norm in expected["rows"])


def test_files_on_nvme_are_gone(runs):
    assert list((runs / "disk").iterdir()) == []


def test_quiet(runs):
    """Neither process says anything about what is as it should be."""
    # PyTorch warns once of selective recomputation within what it compiles, over several lines.
    known = ("OMP_NUM_THREADS", "torch/_logging/_internal.py")
    lines = [line for line in (runs / "stderr").read_text().splitlines() if not any(text in line for text in known)]
    assert not [line for line in lines if line.strip(" *")], lines[:20]


# --- bf16 ---


@pytest.mark.parametrize("name", [n for n in JOBS if n.startswith("bf16: ")])
def test_bf16_trains(runs, name):
    check_bf16(runs, name)


def check_bf16(runs: Path, name: str) -> None:
    found = outcome(runs, name)["rows"]
    expected = reference(name)["rows"]
    for (loss, norm, skipped), (reference_loss, reference_norm) in zip(found, expected, strict=True):
        assert not skipped
        assert relative(loss, reference_loss) < 0.02
        assert relative(norm, reference_norm) < 0.1


@pytest.mark.parametrize("name", [n for n in JOBS if n.startswith("bf16 start")])
def test_masters_in_bf16_start_exact(runs, name):
    state, whole = worker.assemble(runs, name, 2), initial_weights(name)
    rounded = 0
    for part in ("weight", "ema"):
        assert state[part].keys() == whole.keys()
        for tensor, value in whole.items():
            assert torch.equal(state[part][tensor], value), (part, tensor)
            rounded += not torch.equal(value.bfloat16().float(), value)
    assert rounded > 10  # a master that came by way of bfloat16 would have been noticed
    assert set(state) == {"weight", "ema"}


@pytest.mark.parametrize("name", [n for n in JOBS if n.startswith("bf16 sums")])
def test_gradients_in_bf16_are_summed_in_float32(runs, name):
    """Else stages, which round at different times, would differ by more than the order of a sum does.

    Nor does any miss a parameter that has a gradient in some micro-batches alone.
    """
    found, expected = (worker.assemble(runs, n, 2)["moment1"] for n in (name, "bf16 sums: stage 2"))
    rounded = {tensor: value.bfloat16().float() for tensor, value in expected.items()}
    for tensor, value in expected.items():
        assert largest_difference({tensor: found[tensor]}, {tensor: value}) < 1e-5, tensor
    assert largest_difference(rounded, expected) > 1e-4


@pytest.mark.parametrize("name", [n for n in JOBS if n.startswith("bf16 reduced")])
def test_gradients_can_be_reduced_in_bf16(runs, name):
    found, expected = (worker.assemble(runs, n, 2)["moment1"] for n in (name, "bf16 sums: stage 2"))
    assert 1e-4 < largest_difference(found, expected) < 2e-2


@pytest.mark.parametrize("name", [n for n in JOBS if n.startswith("bf16 skip")])
def test_bf16_skips_a_loss_that_is_not_a_number(runs, name):
    assert [row[2] for row in outcome(runs, name)["rows"]] == [step == 2 for step in range(5)]


def check_counts(runs: Path) -> None:
    """Of the last step of the optimizer."""
    counts = outcome(runs, "bf16: stage 3")["counts"]
    assert counts["_fused_adamw_"] > 1, counts  # one of each sub-group
    # The host waits for a GPU where it reads a number and where it writes one: to see whether the norm is finite, and
    # not for every sub-group.
    assert counts["_local_scalar_dense"] + counts["lift_fresh"] == 1, counts
    # Nor are gradients scaled, or copied together.
    assert counts["mul_"] == 0 and counts["cat"] < 3, counts


def test_a_step_waits_once(runs):
    check_counts(runs)


def test_deepspeed_has_what_is_replaced_in_it():
    """Else its longer ways would be back without a word."""
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    for name in (*zero_shortcuts.STEP, zero_shortcuts.SCATTER, "_partition_all_parameters"):
        assert callable(getattr(stage3.DeepSpeedZeroOptimizer_Stage3, name)), name
    ours, theirs = ([torch.arange(12.0)[:7], torch.ones(5), torch.ones(1)] for _ in range(2))
    flat, expected = zero_shortcuts.flatten(ours), stage3.defragment(theirs)
    assert torch.equal(flat, expected)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other) and one.data_ptr() - flat.data_ptr() == other.data_ptr() - expected.data_ptr()


# --- Units: gathered as a whole, and compiled once ---


@pytest.mark.parametrize("name", [n for n in JOBS if "compiled" in n])
def test_nothing_is_compiled_after_the_first_step(runs, name):
    graphs = outcome(runs, name)["graphs"]
    assert graphs[0] > 0 and graphs == [graphs[0]] * len(graphs)


def test_blocks_are_gathered_as_a_whole(runs):
    """But for weights on NVMe, each of which takes a buffer of its own."""
    assert outcome(runs, "adamw: stage 3")["hooked"] == outcome(runs, "adamw: compiled, stage 3")["hooked"] == 0
    assert outcome(runs, "adamw nvme: nvme, weights nvme")["hooked"] > 0


def test_compiled_blocks_give_their_weights_back(runs):
    """Without compilation autograd holds views of them until the backward pass."""
    assert outcome(runs, "adamw: compiled, stage 3, holds")["held"] == 0
    assert outcome(runs, "adamw: stage 3, holds")["held"] > 0


# --- Without a launcher ---


@pytest.mark.needs(*needs.NVME)
def test_one_process_without_a_launcher(tmp_path):
    names = ["adamw: stage 1", "adamw: stage 3", "adamw: compiled, stage 3", "adamw: weights cpu", "adamw nvme: nvme"]
    result = launch(tmp_path, [*names, "bf16: stage 3"])
    assert result.returncode == 0, result.stderr[-3000:]
    for name in names:
        deviation = deviations(tmp_path, name, world=1)
        assert equal(deviation), deviation
    check_bf16(tmp_path, "bf16: stage 3")
    check_counts(tmp_path)


@pytest.mark.needs(*needs.NVME)
def test_the_entry_script_leaves_nothing_on_nvme(tmp_path):
    """Several processes of a launcher end without the interpreter's clean-up."""
    make_workplace(tmp_path)
    disk = tmp_path / "disk"
    disk.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ibq/train_ar.py"]
    size = [
        "model.width=256",
        "model.heads=4",
        "training.micro_batch=4",
        "training.max_steps=2",
    ]  # large enough for NVMe
    engine = ["engine.kind=zero", "engine.offload_optimizer=nvme", f"engine.nvme_path={disk}"]
    result = run_script(
        *launcher,
        "--config",
        str(tmp_path / "transformer.yaml"),
        f"output={tmp_path / 'run'}",
        *size,
        *engine,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert set(scalars(tmp_path / "run")["loss/total"]) == {1, 2}
    assert list(disk.iterdir()) == []


def test_tokenizers_refuse_it(tmp_path):
    make_workplace(tmp_path)
    config = str(tmp_path / "tokenizer.yaml")
    with pytest.raises(ConfigError, match=r"tokenizer\.yaml: engine\.kind: zero is for the transformer"):
        train_here("tokenizer", ["--config", config, f"output={tmp_path / 'run'}", "engine.kind=zero"])
    assert not (tmp_path / "run").exists()


def test_importing_the_engines_does_not_need_deepspeed():
    code = "import sys; sys.modules['deepspeed'] = None; import ibq.engine.build, ibq.engine.zero"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


# --- Bad input ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stage": 4}, "stage: 4"),
        ({"stage": 2, "offload_parameters": "cpu"}, "offload_parameters: needs stage 3"),
        ({"stage": 2, "offload_optimizer": "nvme", "nvme_path": "x"}, "offload_optimizer: nvme needs stage 3"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer: stage 0"),
        ({"stage": 1, "allgather_bucket_size": 333}, "allgather_bucket_size: DeepSpeed wants an even number"),
        ({"offload_optimizer": "disk"}, "offload_optimizer: disk"),
        ({"offload_optimizer": "nvme"}, "nvme_path: missing"),
        ({"sub_group_size": 0}, "sub_group_size: 0"),
        ({"reduce_dtype": "fp16"}, "reduce_dtype: 'fp16' is not possible"),
        ({"compile": True, "offload_parameters": "nvme", "nvme_path": "x"}, "compile: not with offload_parameters"),
    ],
)
def test_impossible_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        ZeroEngineConfig(**settings)


def test_sizes_follow_from_the_model():
    """Those given count; a block fits into every bucket; and one rank keeps its weights, unless they are offloaded."""
    model = ModelSize(total=1000, unit=101, largest=150)
    sizes = ZeroEngineConfig().sizes(model, 4)
    assert (sizes.reduce_bucket_size, sizes.allgather_bucket_size) == (102, 102)
    assert (sizes.prefetch_bucket_size, sizes.max_live_parameters, sizes.sub_group_size) == (152, 453, 101)
    assert (sizes.persistent, ZeroEngineConfig(offload_optimizer="cpu").sizes(model, 1).persistent) == (0, 1000)
    assert ZeroEngineConfig(offload_parameters="cpu").sizes(model, 1).persistent == 0
    assert ZeroEngineConfig(offload_optimizer="nvme", nvme_path="x").sizes(model, 4).sub_group_size == 150
    assert ZeroEngineConfig(sub_group_size=7, max_live_parameters=0).sizes(model, 4) == replace(
        sizes, sub_group_size=7, max_live_parameters=0
    )


def test_sizes_of_a_module():
    with torch.device("meta"):
        module = Transformer(TransformerConfig(depth=3, width=96, heads=3, num_classes=7))
    assert model_size(module) == planned_size(module.config)
    with torch.device("meta"):
        assert model_size(torch.nn.Linear(3, 5)) == ModelSize(total=20, unit=15, largest=15)


def test_precision_of_gradients():
    """What need not be summed up stays as it comes."""
    plain, narrow = ZeroEngineConfig(), ZeroEngineConfig(reduce_dtype="bf16")
    assert plain.gradients_in("bf16", 1, 2) == plain.gradients_in("fp32", 1, 1) == ("fp32", "fp32")
    assert plain.gradients_in("bf16", 1, 1) == narrow.gradients_in("bf16", 1, 2) == ("bf16", "bf16")
    assert plain.gradients_in("bf16", 2, 1) == narrow.gradients_in("bf16", 2, 2) == ("bf16", "fp32")
    assert ZeroEngineConfig(offload_optimizer="cpu").gradients_in("bf16", 1, 1) == ("bf16", "fp32")
    assert ZeroEngineConfig(stage=2, reduce_dtype="bf16").gradients_in("bf16", 1, 2) == ("bf16", "fp32")


def build(config: ZeroEngineConfig, **optimizer) -> ZeroEngine:
    settings = EngineSettings(
        optimizer=OptimizerConfig(**worker.ADAMW | optimizer), device=torch.device("cpu"), ema_decay=0.9
    )
    return ZeroEngine(config, worker.blueprint(worker.Job(name="x")), settings)


def nvme(path) -> ZeroEngineConfig:
    return ZeroEngineConfig(offload_optimizer="nvme", nvme_path=str(path))


def test_nvme_folders_that_do_not_serve(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"engine\.nvme_path: no folder"):
        build(nvme(tmp_path / "missing"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"engine\.nvme_path: .* is not writable"):
        build(nvme(tmp_path))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"engine\.offload_optimizer: nvme needs adam"):
        build(nvme(tmp_path), kind="sgd")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space(tmp_path, monkeypatch):
    """16 bytes per element, of all processes of the machine."""
    from ibq.engine import zero_setup

    numel = sum(p.numel() for p in worker.blueprint(worker.Job(name="x")).whole().parameters())
    usage = type(zero_setup.shutil.disk_usage(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    settings = EngineSettings(optimizer=OptimizerConfig(), device=torch.device("cpu"), ema_decay=0.9)
    for free, fits in ((3 * 16 * numel, True), (3 * 16 * numel - 1, False)):
        monkeypatch.setattr(zero_setup.shutil, "disk_usage", lambda _, free=free: usage(free, 0, free))
        if fits:
            zero_setup.check_nvme(nvme(tmp_path), settings, numel)
        else:
            with pytest.raises(UserError, match=r"engine\.nvme_path: .* GiB free, but the 3 processes"):
                zero_setup.check_nvme(nvme(tmp_path), settings, numel)


def test_missing_software(tmp_path, monkeypatch):
    from ibq.engine import zero_setup

    builders = pytest.importorskip("deepspeed.ops.op_builder")
    monkeypatch.setattr(builders.AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(UserError, match="install libaio-dev"):
        zero_setup.build_operators(nvme(tmp_path), OptimizerConfig())
    monkeypatch.setattr(builders.CPUAdamBuilder, "load", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"could not compile the CPU optimizer .*install ninja"):
        zero_setup.build_operators(ZeroEngineConfig(offload_optimizer="cpu"), OptimizerConfig())
    monkeypatch.setattr(zero_setup.shutil, "which", lambda _: None)
    with pytest.raises(
        UserError, match=r"needs libaio and a C\+\+ compiler; install libaio-dev \(libaio-devel\) and g\+\+"
    ):
        zero_setup.build_operators(nvme(tmp_path), OptimizerConfig())
    with pytest.raises(UserError, match=r"could not compile the CPU optimizer \(no C\+\+ compiler was found\)"):
        zero_setup.build_operators(ZeroEngineConfig(offload_optimizer="cpu"), OptimizerConfig())
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"engine\.kind: zero needs DeepSpeed"):
        zero_setup.load_deepspeed(torch.device("cpu"))


def test_ninja_is_that_of_the_environment_also_if_it_is_not_activated(tmp_path, monkeypatch):
    from ibq.engine.zero_setup import prefer_own_ninja

    for place in ("environment/bin", "system"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "ninja").touch(mode=0o755)
    for known in ("system", "nowhere"):
        monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
        monkeypatch.setenv("PATH", str(tmp_path / known))
        for _ in range(2):
            prefer_own_ninja()
            assert os.environ["PATH"] == f"{tmp_path}/environment/bin:{tmp_path}/{known}"
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    for other in ("base_prefix", "prefix"):  # no environment, and one without a ninja
        monkeypatch.setattr(sys, other, str(tmp_path / ("environment" if other == "base_prefix" else "other")))
        prefer_own_ninja()
        assert os.environ["PATH"] == str(tmp_path / "system")


def test_folders_of_dead_processes_are_swept_away(tmp_path):
    from ibq.engine.zero_setup import PREFIX, NvmeFolder

    code = (
        "import os, sys; from ibq.engine.zero_setup import NvmeFolder\n"
        "folder = NvmeFolder(sys.argv[1]); (folder.path / 'x').write_text('x'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    (tmp_path / f"{PREFIX}otherhost-1.lock").touch()  # another host's: its locks cannot be seen from here
    assert len(list(tmp_path.iterdir())) == 3
    first = NvmeFolder(str(tmp_path))
    second = NvmeFolder(str(tmp_path))
    assert {p.suffix for p in tmp_path.iterdir()} == {"", ".lock"}
    assert first.path.is_dir() and second.path.is_dir() and len(list(tmp_path.iterdir())) == 5
    first.remove()
    second.remove()
    assert [p.name for p in tmp_path.iterdir()] == [f"{PREFIX}otherhost-1.lock"]
