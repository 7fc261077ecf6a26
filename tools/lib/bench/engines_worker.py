"""One rank of the bench of engines: builds an engine, times its steps, and records a trace of one.

python -m torch.distributed.run --standalone --nproc_per_node 2 tools/lib/bench/engines_worker.py SETTINGS_JSON FOLDER

Writes FOLDER/RANK.json. The settings are those that `tools/lib/bench/engines.py` makes.
"""

import dataclasses
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
from torch.profiler import ProfilerActivity, profile

from ibq import dist
from ibq.config import exit_on_user_error, parse_config
from ibq.engine.configs import EngineConfig
from ibq.models.transformer import TransformerConfig
from ibq.training.run import set_up_torch
from tools.lib.bench import step as bench_step
from tools.lib.bench.engines_trace import Communication, communication
from tools.lib.bench.process import GIB, held_gib
from tools.lib.bench.trainer import Trainer, step_on_one_batch

TINY = {"vocab_size": 64, "num_classes": 4, "tokens_per_side": 4, "depth": 1, "heads": 1, "width": 64}


def load_libraries(engine: EngineConfig, device: torch.device) -> None:
    """Make a step with the smallest of models: what the first one loads for good is not the engine's memory."""
    model = TransformerConfig(**TINY)
    trainer = Trainer(engine, model, device)
    step_on_one_batch(trainer, model, 1, device)()
    trainer.engine.close()
    del trainer
    gc.collect()


def measure(settings: dict, device: torch.device) -> dict:
    """This rank's figures."""
    engine, name = parse_config(EngineConfig, settings["engine"]), str(device)
    model = parse_config(TransformerConfig, settings["model"])
    load_libraries(engine, device)
    before = held_gib(name)
    trainer = Trainer(engine, model, device)
    step = step_on_one_batch(trainer, model, settings["images"], device)
    first = step()  # after which moments exist
    held = int((held_gib(name) - before) * GIB)
    figures = bench_step.time_steps(step, trainer.stopwatch, held, settings["steps"], name)
    figures["parts"].pop("tokenizer", None)  # codes need none
    figures["losses"] = [first, *figures["losses"]]
    if settings["trace"]:
        figures["communication"] = dataclasses.asdict(trace_step(step, Path(settings["trace"]), device))
    trainer.engine.close()
    return figures


def trace_step(step: Callable[[], float], path: Path, device: torch.device) -> Communication:
    """Record one step into PATH_rankN.json.gz; what it says of communication."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    dist.barrier()
    with profile(activities=activities) as recorded:
        step()
    file = path.with_name(f"{path.name}_rank{dist.rank()}.json.gz")
    recorded.export_chrome_trace(str(file))
    return communication(file)


def main() -> None:
    """Measure as the command line says, and write the figures."""
    settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    if settings["device"] == "cpu":
        torch.set_num_threads(1)  # two processes share the machine
    set_up_torch(training=True)
    device = dist.setup(settings["device"])
    figures = measure(settings, device)
    (folder / f"{dist.rank()}.json").write_text(json.dumps(figures))
    dist.shutdown()


if __name__ == "__main__":
    exit_on_user_error(main)
