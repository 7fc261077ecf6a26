"""A tiny transformer with its matrices split over ranks, several jobs in one process of a launcher.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/workers/tensor_parallel_worker.py jobs.pt

jobs.pt: {name: fields of a `Job`}. Rank r leaves jobs.pt.r, {name: what it found}.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ibq import dist
from ibq.engine import tensor_parallel as module
from ibq.engine.base import PARTS, Engine, EngineSettings, GroupHyper, OptimizerConfig
from ibq.engine.blueprint import Blueprint
from ibq.engine.configs import FsdpEngineConfig
from ibq.engine.fsdp import FsdpEngine
from ibq.engine.pieces import Piece, Spans, whole
from ibq.initial import Initial
from ibq.models.code_order import draw_orders
from ibq.models.transformer import Transformer, TransformerConfig

MODEL = {
    "vocab_size": 52,
    "num_classes": 6,
    "tokens_per_side": 4,
    "depth": 2,
    "heads": 4,
    "width": 32,
    **dict.fromkeys(("residual_dropout", "ffn_dropout", "token_dropout", "class_dropout"), 0.0),
}
BATCH, STEPS = 8, 3
HYPER = {"decay": GroupHyper(learning_rate=0.02, weight_decay=0.1), "no_decay": GroupHyper(learning_rate=0.01)}
ADAMW = {"kind": "adamw", "betas": (0.9, 0.95), "eps": 1e-2, "clip_norm": 0.5}


@dataclass(kw_only=True)
class Job:
    """ "module": one backward pass; "engine": `STEPS` steps; "dropout": random numbers; `fault`: see `plant`."""

    kind: str
    tensor: int = 2
    sequence: bool = False
    model: dict = field(default_factory=dict)
    engine: dict = field(default_factory=dict)
    precision: str = "fp32"
    accumulation: int = 1
    fault: str | None = None


class Strong(Transformer):
    """With weights of a size that makes every part matter: fresh gates and a fresh head are next to nothing."""

    def initial_value(self, name, shape):
        std = 0.5 if len(shape) < 2 or "emb" in name else 0.8 * shape[-1] ** -0.5
        return Initial(mean=0.3 if len(shape) < 2 else 0.0, std=std)


def blueprint(job: Job) -> Blueprint:
    config = TransformerConfig(**MODEL | job.model)
    return Blueprint(name="transformer", build=lambda: Strong(config), seed=5)


def batch(job: Job, step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, classes and the weight of each token's loss."""
    generator = torch.Generator().manual_seed(step)
    model = MODEL | job.model
    codes = torch.randint(model["vocab_size"], (BATCH, model["tokens_per_side"] ** 2), generator=generator)
    classes = torch.randint(model["num_classes"], (BATCH,), generator=generator)
    return codes, classes, torch.rand(codes.shape, generator=generator)


# --- One backward pass ---


def backward(job: Job, model: Transformer) -> dict:
    codes, classes, weights = batch(job)
    torch.manual_seed(3)
    order = draw_orders(codes, 0.7 if model.config.order == "random" else 0.0)
    nll = model(codes, classes, order)
    (nll * weights).sum().backward()
    with torch.no_grad():
        logits = model.logits(codes, classes, order)
    return {"nll": nll.detach(), "logits": logits}


def run_module(job: Job) -> dict:
    model = blueprint(job).whole()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    mesh = init_device_mesh("cpu", (dist.world_size() // job.tensor, job.tensor), mesh_dim_names=("shard", "tensor"))
    mesh = mesh["tensor"]
    module.apply_tensor_parallel(model, mesh, sequence_parallel=job.sequence)
    found = backward(job, model)
    summed = module.partial_gradients(model, mesh.size()) if job.sequence else set()
    found["parts"] = {}
    for name, parameter in model.named_parameters():
        piece, gradient = whole(shapes[name]), parameter.grad
        if isinstance(parameter, DTensor):
            piece = module.tensor_piece(model, name, shapes[name], mesh.get_local_rank(), mesh.size())
            gradient = gradient.redistribute(placements=parameter.placements).to_local()
        if name in summed:
            torch_dist.all_reduce(gradient, group=mesh.get_group())
        found["parts"][name] = (asdict(piece), {"gradient": gradient.flatten()})
    return found


def run_dropout(job: Job) -> dict:
    """Masks of the first feed-forward part, the generator after it all, gradients with and without recomputing."""
    mesh = init_device_mesh("cpu", (dist.world_size(),), mesh_dim_names=("tensor",))
    found = {}
    for recompute in (False, True):
        changed = {"gradient_checkpointing": recompute, "ffn_dropout": 0.5, "residual_dropout": 0.2}
        model = blueprint(Job(kind="module", model=job.model | changed)).whole()
        module.apply_tensor_parallel(model, mesh, sequence_parallel=job.sequence)
        masks = []
        model.blocks[0].feed_forward.register_forward_hook(lambda _m, _a, x, masks=masks: masks.append(x == 0))
        torch.manual_seed(3)
        found["nll"] = backward(job, model)["nll"]
        found["mask"], found["state"] = masks[0], torch.get_rng_state()
        gradients = [parameter.grad for parameter in model.parameters()]
        gradients = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        found[f"gradients {recompute}"] = torch.cat([g.flatten() for g in gradients])
    return found


# --- Three steps ---


def steps(job: Job, engine: Engine) -> dict:
    losses, norms = [], []
    for step in range(STEPS):
        codes, classes, _ = batch(job, step)
        total = 0.0
        for some in zip(codes.chunk(job.accumulation), classes.chunk(job.accumulation), strict=True):
            own = [tensor.chunk(dist.data_world_size())[dist.data_rank()] for tensor in some]
            with engine.micro_batch():
                loss = engine(*own).mean()
                engine.backward(loss * (1.01 if job.fault == "scale" else 1))
            total += loss.detach() / job.accumulation
        norms.append(float(engine.step(HYPER).gradient_norm))
        losses.append(float(dist.all_reduce_mean(total)))
    pieces = engine.pieces()
    parts = {
        name: (asdict(pieces[name]), {p: t.flatten().clone() for p in PARTS if (t := getattr(state, p)) is not None})
        for name, state in engine.named_state()
    }
    with engine.averaged(), torch.no_grad():
        codes, classes, _ = batch(job, STEPS)
        averaged = float(engine(codes, classes).mean())
    return {"losses": losses, "norms": norms, "averaged": averaged, "parts": parts}


def settings(job: Job) -> EngineSettings:
    return EngineSettings(
        optimizer=OptimizerConfig(**ADAMW),
        device=torch.device("cpu"),
        precision=job.precision,
        accumulation=job.accumulation,
        ema_decay=0.7,
    )


def run_engine(job: Job) -> dict:
    config = FsdpEngineConfig(tensor_parallel=job.tensor, sequence_parallel=job.sequence, **job.engine)
    dist.share_data(job.tensor)
    return steps(job, FsdpEngine(config, blueprint(job), settings(job)))


# --- Faults ---


def rows_without_heads(model, name, shape, rank, size):
    if not name.endswith("wqkv.weight"):
        return tensor_piece(model, name, shape, rank, size)
    share = shape[0] * shape[1] // size
    return Piece(shape, (Spans(rank * share, share),))


def columns_as_rows(model, name, shape, rank, size):
    if not name.endswith("wo.weight"):
        return tensor_piece(model, name, shape, rank, size)
    share = shape[0] * shape[1] // size
    return Piece(shape, (Spans(rank * share, share),))


tensor_piece = module.tensor_piece
FAULTS = {
    "head order": {"tensor_piece": rows_without_heads},
    "column order": {"tensor_piece": columns_as_rows},
    "sum of the head dropped": {"_summed_gradient": lambda x, mesh: x},
    "sum of the inputs dropped": {
        "_whole_input": lambda mesh, between, _module, args: (
            DTensor.from_local(args[0].detach() * 0.5 + args[0] * 0.5, mesh, [between]).redistribute(
                placements=[module.Replicate()]
            ),
            *args[1:],
        )
    },
    "norms not summed": {"partial_gradients": lambda model, ranks: set()},
    "modulation not summed": {"_local_output": lambda between, _module, _args, output: output.to_local()},
}


def plant(fault: str | None) -> None:
    """Replace a function of the module, or put the right ones back."""
    for name, function in ORIGINALS.items():
        setattr(module, name, function)
    for name, function in FAULTS.get(fault, {}).items():
        setattr(module, name, function)
    fsdp = sys.modules[FsdpEngine.__module__]
    fsdp.tensor_piece, fsdp.partial_gradients = module.tensor_piece, module.partial_gradients


ORIGINALS = {name: getattr(module, name) for changes in FAULTS.values() for name in changes}


def main() -> None:
    path = Path(sys.argv[1])
    dist.setup("cpu")
    found = {}
    for name, fields in torch.load(path).items():
        job = Job(**fields)
        plant(job.fault)
        found[name] = {"module": run_module, "engine": run_engine, "dropout": run_dropout}[job.kind](job)
    torch.save(found, f"{path}.{dist.rank()}")
    dist.shutdown()


if __name__ == "__main__":
    main()
