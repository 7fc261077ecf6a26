"""Seconds and memory of the transformer's head and loss, against the textbook form with the table of logits."""

import argparse
import os
import platform
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq.ops.linear_cross_entropy import linear_cross_entropy
from ibq.progress import progress_bar
from tools.lib.bench.process import extra_peak_gib, median_seconds, product_rate, run_apart

FORMS = ("ours", "textbook")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRODUCTS = 4  # of tokens x codes x dim: logits, logits again in the backward pass, and two gradients
CALLS = 3  # timed in each process


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--codes", type=int, default=16_384, help="vocabulary V (default: %(default)s)")
    add("--dim", type=int, default=1_024, help="width of the hidden states C (default: %(default)s)")
    add("--tokens", type=int, default=2_048, help="tokens N of one batch (default: %(default)s)")
    add("--precision", choices=DTYPES, default="fp32", help="bf16: under autocast (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--repeats", type=int, default=3, help="rounds, in each of which both forms run once, in fresh processes")


def measure(arguments: argparse.Namespace) -> dict:
    """Both forms once a round, in turn, so that a machine that slows down slows both; ratios within a round."""
    settings = {name: getattr(arguments, name) for name in ("codes", "dim", "tokens", "precision", "device")}
    rounds = []
    with progress_bar("head-loss", arguments.repeats * len(FORMS), "run") as progress:
        for number in range(arguments.repeats):
            rounds.append({})
            for form in FORMS if number % 2 == 0 else FORMS[::-1]:
                rounds[-1][form] = run_apart(measure_form, form=form, **settings)
                progress.update()
    return figures_of(rounds, arguments)


def figures_of(rounds: list[dict[str, dict[str, float]]], arguments: argparse.Namespace) -> dict:
    """Medians over the rounds, and ratios that are medians of two figures of the same round."""

    def median(form: str, name: str) -> float:
        return statistics.median(one[form][name] for one in rounds)

    def ratio(name: str) -> float:
        return statistics.median(one["textbook"][name] / one["ours"][name] for one in rounds)

    flop = PRODUCTS * 2 * arguments.tokens * arguments.codes * arguments.dim
    shares = [flop / one["ours"]["product_rate"] / one["ours"]["seconds"] for one in rounds]
    figures = {form: {name: median(form, name) for name in ("seconds", "extra_peak_gib")} for form in FORMS}
    figures["ours"]["gemm_share"] = statistics.median(shares)
    return figures | {
        "ratio": {"speedup": ratio("seconds"), "memory": ratio("extra_peak_gib")},
        "matrix_product_gflop_per_second": median("ours", "product_rate") / 1e9,
        "loss_difference": max(abs(one["ours"]["nll"] - one["textbook"]["nll"]) for one in rounds),
        "rounds": rounds,
        **{name: getattr(arguments, name) for name in ("codes", "dim", "tokens", "precision", "device", "repeats")},
        "threads": rounds[0]["ours"]["threads"],
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def table(figures: dict) -> str:
    """The figures for people."""
    ours, plain, ratio = figures["ours"], figures["textbook"], figures["ratio"]
    size = f"{figures['tokens']:,} tokens x {figures['codes']:,} codes x {figures['dim']:,}, {figures['precision']}"
    lines = [f"{size:44s} {'ours':>10s} {'textbook':>10s} {'ratio':>7s}"]
    for text, name, key in (("seconds", "seconds", "speedup"), ("extra peak GiB", "extra_peak_gib", "memory")):
        lines.append(f"{text:44s} {ours[name]:10.3f} {plain[name]:10.3f} {ratio[key]:7.2f}")
    lines.append(f"{ours['gemm_share']:.0%} of this machine's matrix-product rate")
    return "\n".join(lines)


# --- In a fresh process ---


def textbook(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Head and loss as most codes have them."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def measure_form(*, form: str, codes: int, dim: int, tokens: int, precision: str, device: str) -> dict[str, float]:
    """Seconds and extra memory of one forward and backward pass, its mean loss, and the machine's speed right then."""
    torch.set_flush_denormal(True)  # as training does
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(codes, dim, generator=generator) * (2 / dim**0.5)).to(device).requires_grad_()
    targets = torch.randint(codes, (tokens,), generator=generator).to(device)
    loss = linear_cross_entropy if form == "ours" else textbook
    found = {}

    def step() -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(device, DTYPES[precision], enabled=precision == "bf16"):
            nll = loss(hidden, weight, targets).mean()
        nll.backward()
        found["nll"] = nll.detach()

    seconds = median_seconds(step, CALLS, device)
    hidden.grad = weight.grad = None
    peak = extra_peak_gib(step, device)
    shapes = [(2048, dim, 512), (4096, dim, 2048), (2048, 2048, 2048)]
    rate = product_rate(DTYPES[precision], shapes, device) if form == "ours" else 0.0
    return {
        "seconds": seconds,
        "extra_peak_gib": peak,
        "nll": float(found["nll"]),
        "product_rate": rate,
        "threads": torch.get_num_threads(),
    }
