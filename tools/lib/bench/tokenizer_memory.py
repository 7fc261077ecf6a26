"""Activation memory and seconds of the tokenizer's forward and backward pass, with and without recomputed ResBlocks."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from ibq.config import load_section
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.progress import progress_bar
from tools.lib.bench.options import add_device, check
from tools.lib.bench.process import extra_peak_gib, median_seconds, run_apart

FORMS = ("kept", "recomputed", "selective")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--config", default="yaml/tokenizer_262144.yaml", help="the tokenizer (default: %(default)s)")
    add("--batch", type=int, default=1, help="images (default: %(default)s)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: under autocast (default: %(default)s)")
    add_device(parser, "cpu")
    add("--repeats", type=int, default=3, help="timed passes of each form (default: %(default)s)")


def measure(arguments: argparse.Namespace) -> dict:
    """Each form in a process of its own."""
    check(arguments, batch=1, repeats=1)
    settings = {name: getattr(arguments, name) for name in ("config", "batch", "precision", "device", "repeats")}
    load_section(TokenizerConfig, arguments.config, "model")  # errors before the wait
    figures: dict = {}
    with progress_bar("tokenizer-memory", len(FORMS), "run") as progress:
        for form in FORMS:
            figures[form] = run_apart(measure_form, form=form, **settings)
            progress.update()
    kept, recomputed, selective = (figures[form] for form in FORMS)
    return figures | {
        "ratio": _ratio(recomputed, kept),
        "ratio_selective": _ratio(selective, kept),
        **settings,
        "threads": kept["threads"],
    }


def _ratio(form: dict, kept: dict) -> dict[str, float]:
    return {"memory": form["activation_gib"] / kept["activation_gib"], "time": form["seconds"] / kept["seconds"]}


def table(figures: dict) -> str:
    """The figures for people."""
    name = f"{Path(figures['config']).stem}, batch {figures['batch']}, {figures['precision']}"
    lines = [f"{name:40s} {'kept':>10s} {'recomputed':>11s} {'ratio':>7s} {'selective':>11s} {'ratio':>7s}"]
    for text, key, part in (("activations GiB", "activation_gib", "memory"), ("seconds", "seconds", "time")):
        kept, recomputed, selective = (figures[form][key] for form in FORMS)
        ratios = figures["ratio"][part], figures["ratio_selective"][part]
        lines.append(f"{text:40s} {kept:10.3f} {recomputed:11.3f} {ratios[0]:7.2f} {selective:11.3f} {ratios[1]:7.2f}")
    return "\n".join(lines)


# --- In a process of its own ---


def measure_form(*, form: str, config: str, batch: int, precision: str, device: str, repeats: int) -> dict[str, float]:
    """Seconds of a forward and backward pass, and what it needs beyond weights and gradients."""
    torch.set_flush_denormal(True)  # as training does
    torch.manual_seed(0)
    recomputation = {"gradient_checkpointing": form != "kept", "checkpoint_selective": form == "selective"}
    tokenizer = Tokenizer(replace(load_section(TokenizerConfig, config, "model"), **recomputation)).to(device)
    side = tokenizer.config.resolution
    images = torch.rand(batch, tokenizer.config.in_channels, side, side, device=device) * 2 - 1

    def step() -> None:
        for parameter in tokenizer.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()  # the memory stays: what a pass needs besides is counted
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            out = tokenizer(images)
        loss = (out.reconstruction.float() - images).abs().mean() + sum(out.losses.values())
        loss.backward()

    seconds = median_seconds(step, repeats, device)
    return {
        "seconds": seconds,
        "activation_gib": extra_peak_gib(step, device),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "threads": torch.get_num_threads(),
    }
