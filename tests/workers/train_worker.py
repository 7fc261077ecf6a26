"""Runs several training jobs in one process of a launcher (or alone), some with a planted fault.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/workers/train_worker.py jobs.json

jobs.json: a list of {"stage", "argv", "fault"}; exit codes go to jobs.json.RANK, numbers of reduce-scatters
to reductions-jobs-RANK.json. Faults, by the engine of the stage:
    {"kind": "nan", "steps": [1, 2], "rank": 1, "engine": "tokenizer"}   its loss is NaN at these steps on this rank
    {"kind": "scale", "factor": 1.01}                                     all gradients are too large by a factor
    {"kind": "unreduced"}                                                 FSDP2's ranks keep their own gradients
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as torch_dist
from support.training import train_here

from ibq import dist
from ibq.engine.local import TorchEngine
from ibq.training import loop

REDUCE_SCATTER = "reduce_scatter_single" if hasattr(torch_dist, "reduce_scatter_single") else "reduce_scatter_tensor"
reduce_scatter = getattr(torch_dist, REDUCE_SCATTER)
reductions: list[int] = []  # reduce-scatters of each job
backward, seed_step = TorchEngine.backward, loop.seed_step


def counted(*arguments, **keywords):
    reductions[-1] += 1
    return reduce_scatter(*arguments, **keywords)


def plant(fault: dict | None) -> None:
    """Make the engines misbehave, or not."""
    state = {"step": -1}

    def note_step(seed: int, step: int) -> None:
        state["step"] = step
        seed_step(seed, step)

    def keep_own(output, input, *_, **__):
        output.copy_(input.chunk(dist.world_size())[dist.rank()])

    def faulty(engine: TorchEngine, loss: torch.Tensor) -> None:
        of_engine = fault.get("engine", "").lower() in type(engine.module).__name__.lower()
        if fault["kind"] == "unreduced":
            return backward(engine, loss)
        if fault["kind"] == "scale":
            loss = loss * fault["factor"]
        elif of_engine and state["step"] in fault["steps"] and dist.rank() == fault.get("rank", dist.rank()):
            loss = loss * float(fault.get("value", "nan"))
        backward(engine, loss)

    loop.seed_step = note_step
    TorchEngine.backward = faulty if fault else backward
    unreduced = fault is not None and fault["kind"] == "unreduced"
    setattr(torch_dist, REDUCE_SCATTER, keep_own if unreduced else counted)


def main() -> None:
    jobs = Path(sys.argv[1])
    dist.setup("cpu")
    shutdown, dist.shutdown = dist.shutdown, lambda: None
    codes = []
    for job in json.loads(jobs.read_text()):
        reductions.append(0)
        plant(job.get("fault"))
        codes.append(train_here(job["stage"], job["argv"]))
        dist.barrier()
    Path(f"{jobs}.{dist.rank()}").write_text(json.dumps(codes))
    jobs.with_name(f"reductions-{jobs.stem}-{dist.rank()}.json").write_text(json.dumps(reductions))
    shutdown()


if __name__ == "__main__":
    main()
