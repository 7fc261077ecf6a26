"""A training step with every head of the transformer beside each other: parameters, seconds, memory, tokens/s.

One model, one batch of random codes, and of the config only `model.vocab_size` and `model.head` change. What the heads
make of the same codes, in bits an image, is trained and not timed: yaml/ablations/heads.yaml.
"""

import argparse
import statistics

import torch

from ibq.config import UserError, load_section
from ibq.models.transformer import TransformerConfig
from ibq.progress import progress_bar
from ibq.scaling.transformer import transformer_flops, transformer_parameters
from tools.lib.bench import step as bench_step
from tools.lib.bench.options import check
from tools.lib.bench.process import run_apart
from tools.lib.bench.trainer import Trainer, random_batch

HEADS = ("plain", "factorised", "bits", "masked_bits")
MEASURED = ("seconds", "peak_gib")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    bench_step.add_options(parser, config="yaml/b.yaml", batch=4, steps=4, compiled="auto")
    parser.add_argument("--codes", type=int, default=262_144, help="vocabulary, a power of two (default: %(default)s)")
    help_rounds = "in each of which every head runs once, in a process of its own (default: %(default)s)"
    parser.add_argument("--rounds", type=int, default=3, help=help_rounds)


def model_of(config: str, codes: int, head: str) -> TransformerConfig:
    """The config's transformer with so many codes and a head; UserError where they do not fit."""
    try:
        return load_section(TransformerConfig, config, "model", [f"vocab_size={codes}", f"head={{kind: {head}}}"])
    except ValueError as error:
        raise UserError(f"--codes: {error}") from error


def measure(arguments: argparse.Namespace) -> dict:
    """Each head once a round, in turn, so that a machine that slows down slows all; ratios within a round."""
    check(arguments, batch=1, steps=1, rounds=1, codes=4)
    names = ("config", "codes", "batch", "steps", "compile", "device")
    settings = {name: getattr(arguments, name) for name in names}
    models = {head: model_of(arguments.config, arguments.codes, head) for head in HEADS}
    rounds: list[dict[str, dict]] = []
    with progress_bar("heads", arguments.rounds * len(HEADS), "run") as progress:
        for number in range(arguments.rounds):
            rounds.append({})
            for head in HEADS[:: 1 if number % 2 == 0 else -1]:
                rounds[-1][head] = run_apart(measure_head, head=head, **settings)
                progress.update()
    return {"heads": {head: _figures(rounds, head, models[head]) for head in HEADS}, "rounds": rounds, **settings}


def _figures(rounds: list[dict[str, dict]], head: str, model: TransformerConfig) -> dict:
    """Medians over the rounds, and of the ratios to the plain head."""
    tokens = rounds[0][head]["tokens"]
    found = {name: statistics.median(one[head][name] for one in rounds) for name in MEASURED}
    ratios = {f"{name}_of_plain": [one[head][name] / one["plain"][name] for one in rounds] for name in MEASURED}
    return {
        "parameters": transformer_parameters(model),
        "flops_per_token": transformer_flops(model).textbook / model.num_tokens,
        **found,
        "tokens_per_second": tokens / found["seconds"],
        **{name: statistics.median(values) for name, values in ratios.items()},
    }


def table(figures: dict) -> str:
    """The figures for people."""
    size = f"{figures['codes']:,} codes, {figures['batch']} images"
    columns = f"{'s a step':>9s} {'tokens/s':>10s} {'peak GiB':>9s} {'speed':>7s} {'memory':>7s}"
    lines = [f"{size:28s} {'parameters':>14s} {columns}"]
    for head, found in figures["heads"].items():
        lines.append(
            f"{head:28s} {found['parameters']:14,} {found['seconds']:9.3f} {found['tokens_per_second']:10,.0f} "
            f"{found['peak_gib']:9.2f} {1 / found['seconds_of_plain']:7.2f} {found['peak_gib_of_plain']:7.2f}"
        )
    return "\n".join([*lines, "speed and memory: over those of the plain head, medians of the rounds"])


# --- In a process of its own ---


def measure_head(*, head: str, config: str, codes: int, batch: int, steps: int, compile: str, device: str) -> dict:
    """The best of some steps with a head, its parts, and the memory at its most."""
    bench_step.set_up("ours")
    model = model_of(config, codes, head)
    trainer = Trainer(bench_step.engine_config(config, compile), model, torch.device(device))
    inputs = [part.to(device) for part in random_batch(model, batch, seed=0)]
    weights = 4 * sum(parameter.numel() for parameter in trainer.module.parameters())

    def step() -> float:
        return float(trainer.step(*inputs))

    held = 3 * weights  # before a step: also both moments
    found = bench_step.time_steps(step, trainer.stopwatch, held, steps, device)
    return {**found, "tokens": batch * model.num_tokens}
