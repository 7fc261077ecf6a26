"""Trains a tiny transformer with ZeRO engines, several jobs in one process of a launcher (or alone).

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/workers/zero_worker.py jobs.pt

jobs.pt: a list of dicts, see `Job`. Rank r leaves NAME.r.pt: losses (mean over ranks) and norms, validation losses, its
part of the final state, and how many graphs were compiled so far after each step.
"""

import contextlib
import gc
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ibq import dist
from ibq.engine.base import PARTS, EngineSettings, GroupHyper, OptimizerConfig, ParameterState
from ibq.engine.blueprint import Blueprint
from ibq.engine.compilation import units_of
from ibq.engine.configs import ZeroEngineConfig
from ibq.engine.pieces import place, take
from ibq.engine.zero import ZeroEngine
from ibq.engine.zero_setup import load_deepspeed
from ibq.initial import Initial
from ibq.models.transformer import Transformer, TransformerConfig

VOCABULARY, CLASSES, SIDE = 64, 10, 4
MODEL = {
    "vocab_size": VOCABULARY,
    "num_classes": CLASSES,
    "tokens_per_side": SIDE,
    "depth": 2,
    "heads": 2,
    "width": 64,
    "adaln_gamma_init": 1.0,  # blocks that do something from the start
    **dict.fromkeys(("residual_dropout", "ffn_dropout", "token_dropout", "class_dropout"), 0.0),
}
GLOBAL_BATCH = 8
HYPER = {"decay": GroupHyper(learning_rate=0.2, weight_decay=0.1), "no_decay": GroupHyper(learning_rate=0.1)}
ADAMW = {"kind": "adamw", "betas": (0.9, 0.95), "eps": 1e-3, "clip_norm": 0.3}
EMA = {"ema_decay": 0.7, "ema_warmup": False}


@dataclass(kw_only=True)
class Job:
    """One training run, with the weights of `model` and the engine's settings laid over those above."""

    name: str
    engine: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=lambda: dict(ADAMW))
    settings: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    odd: int = 0  # another module, with numbers of elements that ranks cannot share equally, and so many rows to spare
    steps: int = 5
    # What goes wrong: "scale" (gradients too large), "alone" (rank 1 has other data), and in step 2 on rank 1 "nan"
    # (the loss) or "nan gradient" (of a finite loss).
    fault: str | None = None
    load: str | None = None  # go on from the state that this job left
    parts: tuple = PARTS  # what is loaded of it
    discards: bool = False  # a micro-batch before every step, which is then discarded
    holds: bool = False  # look at what a forward pass holds, at the end
    counts: bool = False  # count what the last step of the optimizer does


class Poison(torch.autograd.Function):
    """The identity with a gradient that is not a number."""

    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, gradient):
        return gradient * float("nan")


class Odd(nn.Module):
    """Parameters of 35, 21, 3 and 1 elements; codes of the transformer's kind in, losses out.

    One more has a gradient in every third micro-batch, if these are numbered `turn` = step + number in the step.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.table = nn.Embedding(5, 7)
        self.first = nn.Linear(7, 3)
        self.last = nn.Linear(3, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.spare = nn.Parameter(torch.ones(rows, 3))
        self.turn = 0

    def initial_value(self, name, shape):
        return Initial(std=0.5)

    def forward(self, codes, classes):
        hidden = torch.tanh(self.first(self.table(codes % 5)))
        if self.turn % 3 == 0:
            hidden = hidden * self.spare[0]
        return ((self.last(hidden)[..., 0] * self.scale - (classes % 3)[:, None]) ** 2).float()


def blueprint(job: Job) -> Blueprint:
    if job.odd:
        return Blueprint(name="odd", build=lambda: Odd(job.odd), seed=3)
    return Blueprint(name="transformer", build=lambda: Transformer(TransformerConfig(**MODEL | job.model)), seed=3)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    codes = torch.randint(VOCABULARY, (GLOBAL_BATCH, SIDE**2), generator=generator)
    return codes, torch.randint(CLASSES, (GLOBAL_BATCH,), generator=generator)


def micro_batches(step: int, count: int):
    """This rank's part of each of `count` parts of the global batch."""
    codes, classes = batch(step)
    for part in zip(codes.chunk(count), classes.chunk(count), strict=True):
        yield [tensor.chunk(dist.world_size())[dist.rank()] for tensor in part]


class Counts(TorchDispatchMode):
    """How often each operator of PyTorch is called within this context."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def train_step(engine: ZeroEngine, job: Job, step: int, counts=None) -> tuple[float, float, bool]:
    """(loss, gradient norm, skipped)."""
    total, count = torch.zeros(()), engine.settings.accumulation
    faulty = step == 2 and dist.rank() == 1
    for number, (codes, classes) in enumerate(micro_batches(step, count)):
        if job.fault == "alone" and dist.rank() == 1:
            codes = codes.flip(1)
        engine.module.turn = step + number
        with engine.micro_batch():
            loss = engine(codes, classes).mean()
            total += loss.detach().float() / count
            if job.fault == "scale":
                loss = loss * 1.01
            if job.fault == "nan" and faulty and number == 0:
                loss = loss * float("nan")
            if job.fault == "nan gradient" and faulty and number == 0:
                loss = Poison.apply(loss)
            engine.backward(loss)
    with counts or contextlib.nullcontext():
        result = engine.step(HYPER)
    return float(dist.all_reduce_mean(total)), float(result.gradient_norm), result.skipped


def saved_state(engine: ZeroEngine) -> dict:
    """{parameter: (piece, {part: values})}."""
    pieces, found = engine.pieces(), {}
    for name, state in engine.named_state():
        found[name] = (pieces[name], {part: t.clone() for part in PARTS if (t := getattr(state, part)) is not None})
    assert list(found) == list(pieces)
    for name, (_, parts) in found.items():
        assert tuple(parts) == (("weight",) if name in engine.frozen else engine.state_parts()), name
    return found


def assemble(folder: Path, name: str, world: int) -> dict[str, dict[str, torch.Tensor]]:
    """{part: {parameter: whole tensor}} of the state that a job left; every element must be owned exactly once."""
    result, covered = {}, {}
    for rank in range(world):
        for parameter, (piece, parts) in torch.load(folder / f"{name}.{rank}.pt", weights_only=False)["state"].items():
            if not piece.owner:
                continue
            count = covered.setdefault(parameter, torch.zeros(piece.shape))
            once = torch.zeros(piece.shape)
            place(once, piece, torch.ones(piece.numel))
            count += once
            for part, values in parts.items():
                whole = result.setdefault(part, {}).setdefault(parameter, torch.zeros(piece.shape))
                place(whole, piece, values.float())
    assert all(bool((count == 1).all()) for count in covered.values())
    return result


def load(engine: ZeroEngine, folder: Path, job: Job) -> None:
    whole = assemble(folder, job.load, dist.world_size())
    steps = torch.load(folder / f"{job.load}.0.pt", weights_only=False)["steps"]

    def reader(parameter, piece):
        parts = [part for part in job.parts if parameter in whole.get(part, {})]
        return ParameterState(**{part: take(whole[part][parameter], piece) for part in parts})

    engine.load_named_state(reader, steps)


@torch.no_grad()
def validation_loss(engine: ZeroEngine) -> float:
    engine.module.eval()
    loss = engine(*batch(1000)).mean()
    engine.module.train()
    return float(loss)


def hooked_layers(module: nn.Module) -> int:
    """Modules that DeepSpeed gathers by themselves, within what the engine gathers as a whole."""
    inner = [part for unit in units_of(module) for part in unit.modules() if part is not unit]
    return sum(bool(part._forward_pre_hooks) for part in inner)


def held_weights(engine: ZeroEngine) -> int:
    """Gathered weights of the first unit that are in memory when a forward pass is over."""
    first, gathered = units_of(engine.module)[0], []

    def note(*_) -> None:
        gathered.extend(parameter.untyped_storage()._weak_ref() for parameter in first.parameters())

    hook = first.register_forward_pre_hook(note)
    loss = engine(*next(micro_batches(600, engine.settings.accumulation))).mean()
    hook.remove()
    held = sum(not torch.UntypedStorage._expired(storage) for storage in gathered)
    engine.backward(loss)
    engine.discard()
    return held


def run(job: Job, folder: Path) -> None:
    settings = EngineSettings(
        optimizer=OptimizerConfig(**job.optimizer), device=torch.device("cpu"), **EMA | job.settings
    )
    engine = ZeroEngine(ZeroEngineConfig(**job.engine), blueprint(job), settings)
    if job.load is not None:
        load(engine, folder, job)
    first, rows, graphs, counts = engine.steps, [], [], None
    for step in range(first, first + job.steps):
        if job.discards:
            engine.backward(engine(*next(micro_batches(500, 2))).mean())
            engine.discard()
        counts = Counts() if job.counts else None
        rows.append(train_step(engine, job, step, counts))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    with engine.averaged():
        averaged = validation_loss(engine)
    result = {"rows": rows, "steps": engine.steps, "averaged": averaged, "raw": validation_loss(engine)}
    result |= {"graphs": graphs, "hooked": hooked_layers(engine.module)}
    result["counts"] = counts and counts.calls
    result["held"] = held_weights(engine) if job.holds else None
    torch.save(result | {"state": saved_state(engine)}, folder / f"{job.name}.{dist.rank()}.pt")
    engine.close()
    dist.barrier()


def main() -> None:
    jobs = Path(sys.argv[1])
    dist.setup("cpu")
    torch.set_flush_denormal(True)
    backend = load_deepspeed(torch.device("cpu")).comm.comm.cdb
    assert backend.shm_comm_op is None, "DeepSpeed has compiled collectives that no training uses"
    for job in torch.load(jobs, weights_only=False):
        gc.freeze()  # DeepSpeed collects garbage time and again: what is loaded and compiled by now is none
        run(Job(**job), jobs.parent)
    dist.shutdown()


if __name__ == "__main__":
    main()
