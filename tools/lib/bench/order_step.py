"""What random orders cost a training step: a model in random orders beside the same in raster order, step by step.

Both stay in one process, and every round has a step of each, in turns first: what else the machine does at the time
meets both. All images of the first are in random order, the most that it costs; orders are drawn within the step. On
the CPU there are also the seconds that the process itself was at work, in which what others do shows less.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

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
TITLES = {"seconds": "seconds a step", "cpu_seconds": "seconds at work"}


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

    def step(order: str) -> tuple[float, float]:
        at_work = time.process_time()
        seconds = seconds_of(lambda: float(trainers[order].step(*batch)), arguments.device)
        return seconds, time.process_time() - at_work

    for order in 2 * ORDERS:  # compiles, and makes the optimizer's moments
        step(order)
    clocks = ("seconds", "cpu_seconds") if arguments.device == "cpu" else ("seconds",)
    found: dict[str, dict[str, list[float]]] = {clock: {order: [] for order in ORDERS} for clock in clocks}
    with progress_bar(arguments.name, arguments.rounds, "round") as progress:
        for number in range(arguments.rounds):
            for order in ORDERS if number % 2 else ORDERS[::-1]:
                for clock, seconds in zip(clocks, step(order), strict=False):
                    found[clock][order].append(seconds)
            progress.update()
    settings = {name: getattr(arguments, name) for name in ("config", "depth", "batch", "rounds", "compile", "device")}
    return {clock: compared(own) for clock, own in found.items()} | settings | {"threads": torch.get_num_threads()}


def compared(seconds: dict[str, list[float]]) -> dict:
    """Of both orders the best and the median, and the ratios of the rounds."""
    ratios = [random / raster for raster, random in zip(seconds["raster"], seconds["random"], strict=True)]
    figures = {order: {"best": min(own), "median": median(own), "all": own} for order, own in seconds.items()}
    return figures | {"ratio": {"median": median(ratios), "mean": fmean(ratios), "interval": interval(ratios)}}


def table(figures: dict) -> str:
    """The figures for people."""
    lines = [f"{Path(figures['config']).stem}, {figures['batch']} images, {figures['rounds']} rounds"]
    for clock in TITLES:
        if clock not in figures:
            continue
        own = figures[clock]
        lines.append(f"{TITLES[clock]:32s} {'best':>8s} {'median':>8s}")
        lines += [f"{order:32s} {own[order]['best']:8.3f} {own[order]['median']:8.3f}" for order in ORDERS]
        ratio = own["ratio"]
        text = f"median {ratio['median']:.3f}, mean {ratio['mean']:.3f} ± {ratio['interval']:.3f} (95%)"
        lines.append(f"{'random over raster':32s} {text}")
    return "\n".join(lines)
