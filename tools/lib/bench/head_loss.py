"""Seconds, memory and error of the transformer's head and loss: ours, the textbook form, and PyTorch's own.

The textbook form holds the table of logits. PyTorch's `linear_cross_entropy` goes over pieces of the tokens: `pytorch`
gives the loss of every token, as ours does; `pytorch, mean` one number, with the gradients already in the forward pass.
Errors are those of few tokens against float64: the largest of a loss in nats, and of the gradients their norm over that
of the gradient.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq.ops.linear_cross_entropy import linear_cross_entropy
from ibq.progress import progress_bar
from tools.lib.bench.options import add_device, check
from tools.lib.bench.process import extra_peak_gib, median_seconds, product_rate, run_apart

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRODUCTS = 4  # of tokens x codes x dim: logits, logits again in the backward pass, and two gradients
CALLS, LARGE_FLOP = 3, 5e11  # timed in each process; of large sizes only one
PIECE = 256  # tokens of a piece of PyTorch's own form; by default it takes few, where codes are many
EXACT_TOKENS = 64  # whose loss and gradients are compared with float64
EXACT_CODES = 8_192  # at once, in float64
MEASURED = ("seconds", "extra_peak_gib")
ERRORS = ("loss_error", "hidden_error", "weight_error")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--codes", type=int, default=16_384, help="vocabulary V (default: %(default)s)")
    add("--dim", type=int, default=1_024, help="width of the hidden states C (default: %(default)s)")
    add("--tokens", type=int, default=2_048, help="tokens N of one batch (default: %(default)s)")
    add("--precision", choices=DTYPES, default="fp32", help="bf16: under autocast (default: %(default)s)")
    add_device(parser, "cpu")
    add("--repeats", type=int, default=3, help="rounds, in each of which every form runs once, in a process of its own")


def measure(arguments: argparse.Namespace) -> dict:
    """Each form once a round, in turn, so that a machine that slows down slows all; ratios within a round."""
    check(arguments, codes=1, dim=1, tokens=1, repeats=1)
    settings = {name: getattr(arguments, name) for name in ("codes", "dim", "tokens", "precision", "device")}
    rounds = []
    with progress_bar("head-loss", arguments.repeats * len(FORMS), "run") as progress:
        for number in range(arguments.repeats):
            rounds.append({})
            for form in list(FORMS)[:: 1 if number % 2 == 0 else -1]:
                rounds[-1][form] = run_apart(measure_form, form=form, **settings)
                progress.update()
    return figures_of(rounds, arguments)


def figures_of(rounds: list[dict[str, dict]], arguments: argparse.Namespace) -> dict:
    """Medians over the rounds, and ratios that are medians of two figures of the same round.

    A form that cannot be had has nothing but the reason, `problem`. `ours_over` gives median, least and largest.
    """
    forms = {form: _medians([one[form] for one in rounds]) for form in FORMS}
    flop = PRODUCTS * 2 * arguments.tokens * arguments.codes * arguments.dim
    shares = [flop / one["ours"]["product_rate"] / one["ours"]["seconds"] for one in rounds]
    forms["ours"]["gemm_share"] = statistics.median(shares)
    ours_over = {
        form: {name: _spread([one["ours"][name] / one[form][name] for one in rounds]) for name in MEASURED}
        for form, found in forms.items()
        if form != "ours" and "problem" not in found
    }
    textbook = [{name: one["textbook"][name] / one["ours"][name] for name in MEASURED} for one in rounds]
    return forms | {
        "ratio": {
            "speedup": statistics.median(one["seconds"] for one in textbook),
            "memory": statistics.median(one["extra_peak_gib"] for one in textbook),
        },
        "ours_over": ours_over,
        "matrix_product_gflop_per_second": statistics.median(one["ours"]["product_rate"] for one in rounds) / 1e9,
        "loss_difference": max(abs(one["ours"]["nll"] - one["textbook"]["nll"]) for one in rounds),
        "rounds": rounds,
        **{name: getattr(arguments, name) for name in ("codes", "dim", "tokens", "precision", "device", "repeats")},
        "threads": rounds[0]["ours"]["threads"],
    }


def _medians(found: list[dict]) -> dict:
    problem = next((one["problem"] for one in found if "problem" in one), None)
    if problem is not None:
        return {"problem": problem}
    return {name: statistics.median(one[name] for one in found) for name in (*MEASURED, *ERRORS)}


def _spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def table(figures: dict) -> str:
    """The figures for people."""
    size = f"{figures['tokens']:,} tokens x {figures['codes']:,} codes x {figures['dim']:,}, {figures['precision']}"
    lines = [f"{size:44s} {'seconds':>9s} {'extra GiB':>10s}   errors of loss, d hidden, d weight"]
    for form in FORMS:
        found = figures[form]
        if "problem" in found:
            lines.append(f"{form:44s} {found['problem']}")
            continue
        errors = "  ".join(f"{found[name]:.1e}" for name in ERRORS)
        lines.append(f"{form:44s} {found['seconds']:9.3f} {found['extra_peak_gib']:10.3f}   {errors}")
    for form, ratio in figures["ours_over"].items():
        texts = [f"{ratio[name][0]:.2f} ({ratio[name][1]:.2f} to {ratio[name][2]:.2f})" for name in MEASURED]
        lines.append(f"ours over {form}: {texts[0]} of its seconds, {texts[1]} of its memory")
    lines.append(f"{figures['ours']['gemm_share']:.0%} of this machine's matrix-product rate")
    return "\n".join(lines)


# --- In a process of its own ---


def textbook(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Head and loss as most codes have them."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def pytorch(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
    """PyTorch's own without the table of logits, which does not look at autocast."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    pieces = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=PIECE, chunking_method=None)
    return F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=pieces)


def pytorch_mean(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same where nobody asks for the losses of single tokens."""
    return pytorch(hidden, weight, targets, "mean")


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": linear_cross_entropy,
    "textbook": textbook,
    "pytorch": pytorch,
    "pytorch, mean": pytorch_mean,
}


def measure_form(*, form: str, codes: int, dim: int, tokens: int, precision: str, device: str) -> dict:
    """Seconds and extra memory of one forward and backward pass, its mean loss, and the machine's speed right then."""
    torch.set_flush_denormal(True)  # as training does
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(codes, dim, generator=generator) * (2 / dim**0.5)).to(device).requires_grad_()
    targets = torch.randint(codes, (tokens,), generator=generator).to(device)
    found = {}

    def step(count: int = tokens) -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(device, DTYPES[precision], enabled=precision == "bf16"):
            nll = FORMS[form](hidden[:count], weight, targets[:count])
        nll.mean().backward()
        found["nll"] = nll.detach()

    calls = CALLS if PRODUCTS * 2 * tokens * codes * dim < LARGE_FLOP else 1
    try:
        seconds = median_seconds(step, calls, device)
    except (AttributeError, RuntimeError, NotImplementedError) as error:  # this PyTorch, type or device has it not
        return {"problem": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    nll = float(found["nll"].mean())
    hidden.grad = weight.grad = None
    peak = extra_peak_gib(step, device)
    step(EXACT_TOKENS)
    errors = errors_of(found["nll"], hidden, weight, targets)
    shapes = [(2048, dim, 512), (4096, dim, 2048), (2048, 2048, 2048)]
    rate = product_rate(DTYPES[precision], shapes, device) if form == "ours" else 0.0
    return {
        "seconds": seconds,
        "extra_peak_gib": peak,
        "nll": nll,
        **errors,
        "product_rate": rate,
        "threads": torch.get_num_threads(),
    }


@torch.no_grad()
def errors_of(nll: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, float]:
    """How far losses [n] or their mean [], and the mean's gradients, are from float64, for the first n tokens."""
    count = min(EXACT_TOKENS, len(hidden))
    some, wanted = hidden[:count].double(), targets[:count]
    log_sum = torch.stack([(some @ part.T).logsumexp(1) for _, part in _parts(weight)]).logsumexp(0)
    losses = log_sum - (some * weight[wanted].double()).sum(1)
    grad_hidden = torch.zeros_like(some)
    squares = torch.zeros(2, dtype=torch.float64, device=hidden.device)  # of the error, and of the gradient
    for first, part in _parts(weight):
        gradient = (some @ part.T - log_sum[:, None]).exp()  # [n, codes]
        inside = (wanted >= first) & (wanted < first + len(part))
        gradient[inside, wanted[inside] - first] -= 1
        gradient /= count
        grad_hidden += gradient @ part
        grad_weight = gradient.T @ some
        error = weight.grad[first : first + len(part)] - grad_weight
        squares += torch.stack([error.square().sum(), grad_weight.square().sum()])
    expected = losses if nll.dim() else losses.mean()
    return {
        "loss_error": float((nll - expected).abs().max()),
        "hidden_error": float((hidden.grad[:count] - grad_hidden).norm() / grad_hidden.norm()),
        "weight_error": float((squares[0] / squares[1]).sqrt()),
    }


def _parts(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first code, some rows of the weight in float64)."""
    for first in range(0, len(weight), EXACT_CODES):
        yield first, weight[first : first + EXACT_CODES].double()
