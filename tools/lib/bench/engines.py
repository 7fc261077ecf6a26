"""Step time and peak memory of each engine for one transformer on some processes: DDP, FSDP2, ZeRO's three stages.

Every engine trains the same weights on the same data in processes of its own that torchrun starts: on the CPU (gloo,
one thread a process), or on GPUs where there are as many. The default model is a small one of the published family
(width = 64 x depth), with a codebook small enough that blocks are most of it, as in the large ones. `peak_gib` is what
the fuller rank holds at most in its third step beyond what it held before the engine was built: on the CPU resident
memory, so with pages that the allocator keeps and the collectives' buffers. `expected` is what the plan says of it for
tensors alone, and of weights, gradients and moments alone. `seconds` is the best timed step, after three that are not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ibq.config import UserError, config_to_dict, load_section, parse_config
from ibq.engine.configs import EngineConfig
from ibq.models.transformer import TransformerConfig
from ibq.progress import progress_bar
from ibq.scaling.hardware import GPUS
from ibq.scaling.layouts import Training, rules
from ibq.scaling.plan import Machine, TransformerStage, layout_of, memory
from ibq.scaling.transformer import transformer_parameters
from tools.lib import ROOT
from tools.lib.bench.options import add_device, check
from tools.lib.bench.process import GIB

RANKS = 2
MODEL = ("model.depth=8", "model.vocab_size=4096")
STAGES = {"zero-1": 1, "zero-2": 2, "zero-3": 3}
TITLES = {"ddp": "DDP", "fsdp2": "FSDP2"} | {name: f"ZeRO-{stage}" for name, stage in STAGES.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--config", default="yaml/b.yaml", help="config of a run, whose model counts (default: %(default)s)")
    help_set = f"settings of the model over the file's (default: {' '.join(MODEL)})"
    add("--set", nargs="*", default=list(MODEL), metavar="key=value", dest="overrides", help=help_set)
    add("--batch", type=int, default=4, help="images of a step, of all processes (default: %(default)s)")
    add("--steps", type=int, default=4, help="timed steps, of which the best counts (default: %(default)s)")
    add("--engines", nargs="+", choices=TITLES, default=list(TITLES), metavar="NAME", help=f"of {', '.join(TITLES)}")
    add("--trace", type=Path, metavar="FOLDER", help="write a profiler's trace of a step of each rank here")
    add("--ranks", type=int, default=RANKS, help="processes, each with a GPU of its own there (default: %(default)s)")
    add_device(parser, gpus=RANKS)


def measure(arguments: argparse.Namespace) -> dict:
    """Each engine by itself, its ratios to DDP, and what the figures depend on."""
    _check(arguments)
    model = model_of(arguments.config, arguments.overrides)
    engines: dict[str, dict] = {}
    with progress_bar("engines", len(arguments.engines), "engine") as progress:
        for name in arguments.engines:
            ranks = run_ranks(name, model, arguments)
            engines[name] = summary(ranks) | {"expected": expected(name, model, arguments)}
            progress.update()
    names = ("config", "overrides", "batch", "steps", "device")
    return {
        "engines": engines,
        "ratio": ratios(engines),
        "parameters": transformer_parameters(model),
        "ranks": arguments.ranks,
        **{name: getattr(arguments, name) for name in names},
    }


def model_of(config: str, overrides: Sequence[str]) -> TransformerConfig:
    """The model of a run's config; UserError for settings of anything else."""
    for override in overrides:
        if not override.startswith("model."):
            raise UserError(f"--set {override}: only the model counts here; give model.key=value")
    return load_section(TransformerConfig, config, "model", [text.removeprefix("model.") for text in overrides])


def engine_of(name: str) -> dict:
    """The section `engine` of a run's config."""
    match name:
        case "ddp":
            return {"kind": "local"}
        case "fsdp2":
            return {"kind": "fsdp"}
    return {"kind": "zero", "stage": STAGES[name]}


def expected(name: str, model: TransformerConfig, arguments: argparse.Namespace) -> dict[str, float]:
    """GiB of a rank by the plan: of weights, gradients and moments, and of all tensors in the fullest moment."""
    machine = Machine(
        gpu=GPUS["h100"], gpus=arguments.ranks, gpus_per_node=arguments.ranks
    )  # of which only the number counts here
    stage = TransformerStage(model)
    layout = layout_of(parse_config(EngineConfig, engine_of(name)), stage, machine)
    training = Training(
        precision="bf16",
        micro_batch=arguments.batch // arguments.ranks,
        batch_size=arguments.batch,
        ema=False,
        device=arguments.device,
    )
    costs = rules(layout, training)
    state = (costs.weights + costs.gradient + costs.optimizer) * transformer_parameters(model)
    peak = memory(stage, layout, training).total
    return {"state_gib": state / GIB, "peak_gib": peak / GIB}


def run_ranks(name: str, model: TransformerConfig, arguments: argparse.Namespace) -> list[dict]:
    """The figures of each rank of one engine; RuntimeError with the error output if a rank fails."""
    trace = None
    if arguments.trace is not None:
        arguments.trace.mkdir(parents=True, exist_ok=True)
        trace = str(arguments.trace.resolve() / name)
    settings = {
        "engine": engine_of(name),
        "model": config_to_dict(model),
        "images": arguments.batch // arguments.ranks,
        "steps": arguments.steps,
        "device": arguments.device,
        "trace": trace,
    }
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arguments.ranks)]
        worker = [str(ROOT / "tools/lib/bench/engines_worker.py"), json.dumps(settings), folder]
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if arguments.device == "cpu" else {})
        command = [sys.executable, *launcher, *worker]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
            if said:
                raise UserError(said[0])
            raise RuntimeError(f"{name} ended with exit code {done.returncode}:\n{done.stderr.strip()}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(arguments.ranks)]


def summary(ranks: Sequence[dict]) -> dict:
    """Figures of an engine: time of the slower rank, memory of the fuller, the mean loss and communication."""
    slower = max(ranks, key=lambda rank: rank["seconds"])
    peaks = [rank["peak_gib"] for rank in ranks]
    found = {
        "seconds": slower["seconds"],
        "parts": slower["parts"],
        "peak_gib": max(peaks),
        "peak_gib_of_ranks": peaks,
        "losses": [statistics.fmean(losses) for losses in zip(*(rank["losses"] for rank in ranks), strict=True)],
        "threads": slower["threads"],
    }
    if "communication" in slower:
        sent = [rank["communication"] for rank in ranks]
        seconds = sum(rank["seconds"] for rank in sent)
        beside = sum(rank["seconds"] * rank["overlap"] for rank in sent)
        found["communication"] = {
            "seconds": seconds / len(sent),
            "overlap": beside / seconds if seconds else 0.0,
            "collectives": sent[0]["collectives"],
        }
    return found


def ratios(engines: Mapping[str, Mapping]) -> dict[str, dict[str, float]]:
    """Time and memory of each engine over those of DDP; empty without it."""
    if "ddp" not in engines:
        return {}
    base = engines["ddp"]
    return {
        name: {"seconds": own["seconds"] / base["seconds"], "memory": own["peak_gib"] / base["peak_gib"]}
        for name, own in engines.items()
    }


def table(figures: dict) -> str:
    """The figures for people."""
    engines, size = figures["engines"], f"{figures['parameters'] / 1e6:.1f}M parameters, {figures['batch']} images"
    parts = list(next(iter(engines.values()))["parts"])
    traced = any("communication" in own for own in engines.values())
    titles = ["s a step", *parts, "peak GiB", "by plan", "state", *(["comm. s", "overlap"] if traced else []), "loss"]
    lines = [f"{size:34s}" + "".join(f"{title:>10s}" for title in titles)]
    for name, own in engines.items():
        plan = own["expected"]
        values = [own["seconds"], *own["parts"].values(), own["peak_gib"], plan["peak_gib"], plan["state_gib"]]
        values += [own["communication"]["seconds"], own["communication"]["overlap"]] if traced else []
        lines.append(f"{TITLES[name]:34s}" + "".join(f"{value:10.3f}" for value in [*values, own["losses"][-1]]))
    for name, ratio in figures["ratio"].items():
        if name != "ddp":
            lines.append(f"{TITLES[name]}: {ratio['seconds']:.2f} of DDP's time, {ratio['memory']:.2f} of its memory")
    return "\n".join(lines)


def _check(arguments: argparse.Namespace) -> None:
    check(arguments, gpus=arguments.ranks, steps=1, ranks=1)
    if arguments.batch < arguments.ranks or arguments.batch % arguments.ranks:
        raise UserError(f"--batch: must be a multiple of the {arguments.ranks} processes, got {arguments.batch}")
