"""What random orders cost a training step: a model in random orders beside the same in raster order, step by step.

Both stay in one process, and every round has a step of each, in turns first: what else the machine does at the time
meets both. All images of the first are in random order, the most that it costs; orders are drawn within the step.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from ibq.config import load_section
from ibq.models.transformer import TransformerConfig
from ibq.progress import progress_bar
from ibq.reports.seeds import interval
from ibq.training.run import set_up_torch
from tools.lib.bench.options import add_device, check
from tools.lib.bench.process import seconds_of
from tools.lib.bench.step import COMPILE, engine_config
from tools.lib.bench.trainer import Trainer, random_batch

ORDERS = ("raster", "random")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--config", default="yaml/b_random_order.yaml", help="config of a run (default: %(default)s)")
    add("--depth", type=int, help="blocks (default: the config's); what a block costs is the same for any number")
    add("--batch", type=int, default=4, help="images (default: %(default)s)")
    add("--rounds", type=int, default=20, help="of a step of each (default: %(default)s)")
    add("--compile", choices=COMPILE, default="auto", help="engine.compile; auto: as the config says (default)")
    add_device(parser)


def measure(arguments: argparse.Namespace) -> dict:
    """Seconds of both, and the ratio of every round."""
    check(arguments, batch=1, rounds=2, depth=1)
    set_up_torch(training=True)
    device = torch.device(arguments.device)
    model = load_section(TransformerConfig, arguments.config, "model")
    if arguments.depth is not None:
        heads, width = model.num_heads, model.model_width
        model = replace(model, depth=arguments.depth, heads=heads, width=width, kv_heads=model.num_kv_heads)
    engine = engine_config(arguments.config, arguments.compile)
    trainers = {order: Trainer(engine, replace(model, order=order), device) for order in ORDERS}
    batch = [part.to(device) for part in random_batch(model, arguments.batch, seed=0)]

    def step(order: str) -> float:
        return seconds_of(lambda: float(trainers[order].step(*batch)), arguments.device)

    for order in 2 * ORDERS:  # compiles, and makes the optimizer's moments
        step(order)
    seconds: dict[str, list[float]] = {order: [] for order in ORDERS}
    with progress_bar(arguments.name, arguments.rounds, "round") as progress:
        for number in range(arguments.rounds):
            for order in ORDERS if number % 2 else ORDERS[::-1]:
                seconds[order].append(step(order))
            progress.update()
    ratios = [random / raster for raster, random in zip(seconds["raster"], seconds["random"], strict=True)]
    settings = {name: getattr(arguments, name) for name in ("config", "depth", "batch", "rounds", "compile", "device")}
    return {
        "seconds": {order: {"best": min(own), "median": median(own), "all": own} for order, own in seconds.items()},
        "ratio": {"median": median(ratios), "mean": sum(ratios) / len(ratios), "interval": interval(ratios)},
        **settings,
        "threads": torch.get_num_threads(),
    }


def table(figures: dict) -> str:
    """The figures for people."""
    name = f"{Path(figures['config']).stem}, {figures['batch']} images, seconds a step"
    lines = [f"{name:48s} {'best':>8s} {'median':>8s}"]
    lines += [f"{order:48s} {own['best']:8.3f} {own['median']:8.3f}" for order, own in figures["seconds"].items()]
    ratio = figures["ratio"]
    return "\n".join(lines) + (
        f"\nrandom over raster, {figures['rounds']} rounds: median {ratio['median']:.3f}, "
        f"mean {ratio['mean']:.3f} ± {ratio['interval']:.3f} (95%)"
    )
