"""Matrices split over ranks against one process: losses, gradients, training, random numbers, bad numbers."""

from pathlib import Path

import pytest
import torch
from support.processes import run_ranks
from support.training import make_workplace, train_here
from workers import tensor_parallel_worker as worker

from ibq.config import UserError
from ibq.engine.configs import check_tensor_parallel
from ibq.engine.local import LocalEngine
from ibq.engine.pieces import Piece, Spans, place, take
from ibq.engine.tensor_parallel import (
    apply_tensor_parallel,
    partial_gradients,
    tensor_piece,
)
from ibq.ops import linear_cross_entropy as ops

GROUPED, SHARED, ODD_ROWS = {"kv_heads": 2}, {"shared_adaln": True}, {"vocab_size": 50}
ALL = {"gradient_checkpointing": True}
CHEAP = ALL | {"checkpoint_selective": True}
HYBRID, OFFLOAD = {"shard": "hybrid", "shard_ranks": 1}, {"offload": "cpu"}
TOLERANCE = 1e-5  # of the loss; of the largest element of each tensor


def list_jobs() -> dict[int, dict[str, dict]]:
    """Processes -> name -> fields of a job."""
    models = {"plain": {}, "grouped": GROUPED, "shared": SHARED, "all": ALL, "cheap": CHEAP | GROUPED | SHARED}
    models["random"] = {"order": "random"}
    jobs: dict[int, dict] = {2: {}, 3: {}, 4: {}}
    # Neither 50 codes nor 256 hidden channels divide by 3: these layers stay whole.
    three = {"heads": 3, "kv_heads": 3, "width": 48, "vocab_size": 50}
    jobs[3]["engine of three"] = {"kind": "engine", "model": three, "tensor": 3}
    jobs[3]["module of three"] = {"kind": "module", "model": three | SHARED, "tensor": 3}
    for sequence in (False, True):
        suffix = ", sequence" if sequence else ""
        for name, model in models.items():
            jobs[2][f"module {name}{suffix}"] = {"kind": "module", "model": model, "sequence": sequence}
        jobs[2][f"dropout{suffix}"] = {"kind": "dropout", "sequence": sequence}
        jobs[2][f"engine{suffix}"] = {"kind": "engine", "model": CHEAP, "sequence": sequence, "accumulation": 2}
        odd = {"vocab_size": 51}
        jobs[2][f"engine odd{suffix}"] = {"kind": "engine", "model": odd, "sequence": sequence}
        jobs[2][f"bf16{suffix}"] = {"kind": "engine", "model": ALL, "sequence": sequence, "precision": "bf16"}
        four = {"tensor": 4, "sequence": sequence}
        jobs[4][f"module tensor 4{suffix}"] = {"kind": "module", **four}
        jobs[4][f"engine tensor 4{suffix}"] = {"kind": "engine", "model": CHEAP | SHARED, **four}
        jobs[4][f"engine 2 x 2{suffix}"] = {"kind": "engine", "model": ODD_ROWS | ALL | GROUPED, "sequence": sequence}
    jobs[4]["engine 2 x 2 hybrid"] = {"kind": "engine", "engine": HYBRID, "model": SHARED, "sequence": True}
    jobs[4]["engine 2 x 2 offload"] = {"kind": "engine", "engine": OFFLOAD, "model": ODD_ROWS}
    return jobs


NORMS, HEAD = "norms not summed", "sum of the head dropped"  # the latter also of a modulation made outside the blocks
FAULTS = {
    "head order": {"kind": "module"},
    HEAD: {"kind": "module"},
    "sum of the inputs dropped": {"kind": "module"},
    NORMS: {"kind": "module", "sequence": True},
    "modulation not summed": {"kind": "module", "sequence": True},
    "engine, head order": {"kind": "engine", "fault": "head order"},
    "engine, column order": {"kind": "engine", "fault": "column order"},
    "engine, norms": {"kind": "engine", "sequence": True, "fault": NORMS},
    "engine, scale": {"kind": "engine", "fault": "scale"},
}
for suffix, sequence in (("", False), (", sequence", True)):
    FAULTS[f"bf16{suffix}, head order"] = {
        "kind": "engine", "model": ALL, "sequence": sequence, "precision": "bf16", "fault": "head order"
    }  # fmt: skip
JOBS = list_jobs()
JOBS[2] |= {f"fault: {name}": {"fault": name} | job for name, job in FAULTS.items()}


class Launches:
    """What each rank of so many processes found, by the job's name; started when it is first wanted."""

    def __init__(self, folder: Path):
        self._folder, self._found = folder, {}

    def __call__(self, processes: int) -> dict[str, list[dict]]:
        if processes not in self._found:
            path = self._folder / f"{processes}.pt"
            torch.save(JOBS[processes], path)
            result = run_ranks(processes, "tests/workers/tensor_parallel_worker.py", path)
            assert result.returncode == 0, result.stderr[-4000:]
            ranks = [torch.load(f"{path}.{rank}") for rank in range(processes)]
            self._found[processes] = {name: [rank[name] for rank in ranks] for name in JOBS[processes]}
        return self._found[processes]


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    return Launches(tmp_path_factory.mktemp("tensor_parallel"))


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


def rebuilt(piece: dict) -> Piece:
    return Piece(piece["shape"], tuple(Spans(**spans) for spans in piece["spans"]), piece["owner"])


def differences(found: dict, expected: dict) -> dict[str, float]:
    """Name -> relative difference: of numbers, and of each rank's elements of every tensor."""
    result = {}
    for name in expected.keys() - {"whole", "parts"}:
        ours, theirs = (torch.as_tensor(x[name], dtype=torch.float64) for x in (found, expected))
        result[name] = float((ours - theirs).abs().max() / theirs.abs().max())
    for name, whole in expected["whole"].items():
        piece, values = found["parts"][name]
        assert values.keys() == whole.keys()
        for part, tensor in whole.items():
            wanted = take(tensor, rebuilt(piece))
            distance = (values[part] - wanted).abs().amax() if wanted.numel() else 0.0
            result[f"{part} {name}"] = float(distance / tensor.abs().max())
    return result


def compare(job: dict, ranks: list[dict], references: References) -> float:
    """The largest difference of any rank from one process."""
    expected = references(worker.Job(**job))
    return max(max(differences(rank, expected).values()) for rank in ranks)


# --- Equal to one process ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "name"),
    [(n, name) for n, jobs in JOBS.items() for name in jobs if name.startswith(("module", "engine"))],
)
def test_equals_one_process(launches, references, processes, name):
    assert compare(JOBS[processes][name], launches(processes)[name], references) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in JOBS[2] if name.startswith("fault")])
def test_faults_are_noticed(launches, references, name):
    assert compare(JOBS[2][name], launches(2)[name], references) > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", ", sequence"])
def test_bf16_is_near_one_process(launches, references, suffix):
    def distance(name: str) -> float:
        expected = references(worker.Job(**JOBS[2][name] | {"fault": None}))
        found = [differences(rank, expected) for rank in launches(2)[name]]
        return max(value for rank in found for key, value in rank.items() if key.startswith(("weight", "losses")))

    assert distance(f"bf16{suffix}") < 0.02
    assert distance(f"fault: bf16{suffix}, head order") > 0.04


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in JOBS[4] if name.startswith("engine")])
def test_every_element_has_one_owner(launches, name):
    ranks = launches(4)[name]
    for parameter, (first, _) in ranks[0]["parts"].items():
        seen = torch.zeros(first["shape"])
        for rank in ranks:
            piece = rebuilt(rank["parts"][parameter][0])
            if piece.owner:
                place(seen, piece, take(seen, piece) + 1)
        assert bool((seen == 1).all()), parameter


# --- Random numbers ---


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", ", sequence"])
def test_dropout(launches, suffix):
    first, second = launches(2)[f"dropout{suffix}"]
    assert torch.equal(first["state"], second["state"])  # outside the blocks all draw the same
    assert torch.equal(first["nll"], second["nll"])
    same = float((first["mask"] == second["mask"]).float().mean())
    assert abs(same - 0.5) < 0.05 if suffix else same == 1.0
    for found in (first, second):
        assert torch.equal(found["gradients True"], found["gradients False"])


# --- Numbers that do not fit ---


SIZES = {"heads": 30, "kv_heads": 30}


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (4, {}, "4 does not divide the 30 heads; use 1, 2, 3, 5, 6, 10, 15 or 30"),
        (2, {"kv_heads": 15}, "2 does not divide the 15 key and value heads; use 1"),
        (2, {"tokens": 225}, "2 does not divide the 225 tokens"),
    ],
)
def test_numbers_that_do_not_fit(ranks, changes, message):
    with pytest.raises(UserError, match=rf"^engine\.tensor_parallel: {message}"):
        check_tensor_parallel(ranks, **SIZES | changes)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 6, 10, 15])
def test_numbers_that_fit(ranks):
    check_tensor_parallel(ranks, **SIZES)


def test_the_entry_script_checks_the_numbers_first(tmp_path, capsys):
    make_workplace(tmp_path)
    argv = ["--config", str(tmp_path / "transformer.yaml"), f"output={tmp_path / 'run'}", "engine.kind=fsdp"]
    assert train_here("transformer", [*argv, "engine.tensor_parallel=3"]) == 2
    assert "engine.tensor_parallel: 3 does not divide the 2 heads; use 1 or 2" in capsys.readouterr().err
    assert train_here("transformer", [*argv, "engine.tensor_parallel=2"]) == 2
    assert "engine.tensor_parallel: 2 does not divide the 1 processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_module_without_a_plan_cannot_be_split():
    with pytest.raises(UserError, match=r"^engine\.tensor_parallel: a Linear cannot be split; set it to 1"):
        apply_tensor_parallel(torch.nn.Linear(2, 2), None, sequence_parallel=False)


# --- Which elements a rank holds ---


def test_shards_follow_the_plan():
    job = worker.Job(kind="module", model=GROUPED)  # 4 query heads, 2 of keys and of values, 8 channels each
    model = worker.blueprint(job).skeleton()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def elements(name: str, rank: int) -> torch.Tensor:
        whole = torch.arange(model.get_parameter(name).numel()).view(shapes[name])
        return take(whole, tensor_piece(model, name, shapes[name], rank, 2))

    every = {name: torch.arange(parameter.numel()).view(shapes[name]) for name, parameter in model.named_parameters()}
    rows = [*range(16, 32), *range(40, 48), *range(56, 64)]  # the last two query heads, the last of keys and of values
    wanted = {
        "blocks.1.attention.wqkv.weight": lambda x: x[rows],
        "blocks.1.attention.wo.weight": lambda x: x[:, 16:],
        "blocks.0.feed_forward.w1.weight": lambda x: x[128:],
        "blocks.0.feed_forward.w2.weight": lambda x: x[:, 128:],
        "blocks.0.ada_lin.1.bias": lambda x: x[96:],
        "tok_emb.weight": lambda x: x[26:],
        "head.weight": lambda x: x[26:],
    }
    for name, choose in wanted.items():
        assert torch.equal(elements(name, 1), choose(every[name]).flatten()), name


def test_partial_gradients_are_those_of_whole_parameters_in_the_blocks():
    model = worker.blueprint(worker.Job(kind="module", model=SHARED)).skeleton()
    kinds = ("attention_norm.weight", "ffn_norm.weight", "ada_gss")
    assert partial_gradients(model, 2) == {f"blocks.{number}.{kind}" for number in (0, 1) for kind in kinds}


# --- The loss of a split vocabulary, its parts one after the other in this process ---


def split_loss(hidden, weight, targets, parts, upstream, shifted=0):
    """nll of every part, gradients of hidden (summed over the parts) and weight; fault: parts in another order."""
    weights = [part.clone().requires_grad_() for part in weight.chunk(parts)]
    starts = [len(weights[0]) * number for number in range(parts)]

    def statistics(part, start):
        nll, log_sum = ops._operator(hidden, part, targets, hidden.dtype, "auto", start, len(weight))
        return torch.cat([nll[None], log_sum])

    gathered = torch.stack([statistics(part.detach(), start) for part, start in zip(weights, starts, strict=True)])
    hidden = hidden.clone().requires_grad_()
    found = [
        ops.split_linear_cross_entropy(
            hidden, part, targets, first_code=start, num_codes=len(weight), gather=lambda _: gathered.roll(shifted, 0)
        )
        for part, start in zip(weights, starts, strict=True)
    ]
    torch.stack(found).mul(upstream).sum().backward()
    return found, hidden.grad, torch.cat([part.grad for part in weights])


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 3000.0])  # the last: exponentials of differences overflow
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_split_loss_equals_the_whole(parts, scale):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(60, 8, generator=generator), torch.randn(100, 8, generator=generator)
    hidden *= scale
    targets = torch.randint(100, (60,), generator=generator)
    targets[::2] = (hidden[::2] @ weight.t()).argmax(dim=1)  # small losses, where digits are easily lost
    upstream = torch.rand(60, generator=generator)
    found, grad_hidden, grad_weight = split_loss(hidden, weight, targets, parts, upstream)
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    exact = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    (exact * upstream).sum().backward()
    exact.detach_()
    plain = ops.linear_cross_entropy(hidden.detach().float(), weight.detach().float(), targets)
    limit = 2 * float((plain - exact).abs().max()) + 1e-6
    for nll in found:
        assert torch.equal(nll, found[0])
        assert float((nll.detach() - exact).abs().max()) <= limit
    for gradient, wanted in ((grad_hidden, hidden.grad), (grad_weight, weight.grad)):
        assert float((gradient - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_parts_in_another_order_are_noticed():
    hidden, weight, targets = (
        torch.arange(3.0)[:, None] + 1,
        torch.tensor([[0.0], [1.0], [2.0], [5.0]]),
        torch.arange(3),
    )
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    right, wrong = (split_loss(hidden, weight, targets, 2, torch.ones(3), shifted)[0][0] for shifted in (0, 1))
    torch.testing.assert_close(right.detach(), wanted)
    assert float((wrong - wanted).detach().abs().max()) > 0.5


def test_split_loss_keeps_small_losses():
    """The target's logit is 300 and the others' far below: the loss is the small share of the other part."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[300.0], [0.0], [283.0], [0.0]])
    found, _, _ = split_loss(hidden, weight, torch.tensor([0]), 2, torch.ones(1))
    torch.testing.assert_close(found[0], torch.tensor([-17.0]).exp(), rtol=1e-5, atol=0)


def test_split_loss_checks_the_targets_of_all_parts():
    with pytest.raises(ValueError, match="targets: values 4 to 4 outside 0 to 3"):
        split_loss(torch.ones(1, 1), torch.ones(4, 1), torch.tensor([4]), 2, torch.ones(1))
