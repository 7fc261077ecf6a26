"""Seconds and memory of the IBQ quantizer without the tables of tokens x codes, against the textbook form with them.

Both forms run forward and backward (a sum over the latents + quantization loss + 0.05 x entropy loss) on the same
float32 inputs, each in its own process. `extra_peak_gib` is what a process needs at most beyond the inputs and the two
gradients that every form must return. The textbook form runs twice: as a plain script would, and with denormal numbers
flushed to zero as this project's entry points have it (on some CPUs they slow a softmax's tails down several times).
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ibq.ops import index_backprop as lean
from ibq.ops import textbook
from ibq.progress import progress_bar, say
from ibq.reports.charts import new_figure, save_png
from ibq.training.staging import available_bytes
from tools.lib.bench.options import add_device, check
from tools.lib.bench.process import GIB, exponent, extra_peak_gib, median_seconds, product_rate, run_apart

FORMS = {"ours": lean.index_backprop, "textbook": textbook.index_backprop}
MISSING = {"seconds": None, "extra_peak_gib": None}
TABLES = 9  # of tokens x codes that the textbook form holds at once, about
PRODUCTS = 5  # of tokens x codes x dim that ours needs: logits twice, three in the backward pass
BETA, TEMPERATURE, ENTROPY_WEIGHT = 0.25, 0.01, 0.05
SLOW_SECONDS = 20.0  # a first call that takes longer is not repeated
CODES_OF_PICTURE, IMAGES_OF_PICTURE = (1_024, 4_096, 16_384, 65_536, 262_144), (1, 2, 4, 8, 16, 32)
LARGEST_OF_PICTURE = 2**26  # tokens x codes: seconds on two CPU cores for the textbook form


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--codes", type=int, default=16_384, metavar="K", help="size of the codebook (default: %(default)s)")
    add("--dim", type=int, default=256, metavar="D", help="dimensions of a code (default: %(default)s)")
    add("--images", type=int, default=4, metavar="B", help="images in the batch (default: %(default)s)")
    add("--tokens", type=int, default=256, metavar="T", help="tokens an image (default: %(default)s)")
    add("--repeats", type=int, default=3, help="calls whose median counts (default: %(default)s)")
    add_device(parser, "cpu")
    add("--no-picture", action="store_true", help="only this size, no growth over codes and images")


def measure(arguments: argparse.Namespace) -> dict:
    """Both forms at the size asked for, and their growth over codes and images for the picture."""
    check(arguments, codes=1, dim=1, images=1, tokens=1, repeats=1)
    sizes = [] if arguments.no_picture else sizes_of_picture(arguments.codes, arguments.images)
    with progress_bar("quantizer", 4 + len(sizes), "measurement") as progress:
        rate = _step(progress, run_apart(rate_of_products, dim=arguments.dim, device=arguments.device))[
            "flop_per_second"
        ]
        figures = compare(arguments, lambda found: _step(progress, found))
        flop = PRODUCTS * 2 * arguments.images * arguments.tokens * arguments.codes * arguments.dim
        figures["ours"]["gemm_share"] = flop / figures["ours"]["seconds"] / rate
        growth = list(_grow(arguments, sizes, progress))
    figures |= {"growth": growth, "exponents": exponents(growth)} if growth else {}
    names = ("codes", "dim", "images", "tokens", "repeats", "device")
    settings = {name: getattr(arguments, name) for name in names}
    figures |= {"settings": settings, "matrix_product_gflop_per_second": rate / 1e9, "threads": torch.get_num_threads()}
    if growth and arguments.json:
        figures["picture"] = str(draw(figures, arguments.json.with_suffix(".png")))
    return figures


def compare(arguments: argparse.Namespace, step: Callable[[dict], dict]) -> dict:
    """Figures of both forms and their ratios; those of a textbook form that does not fit are None."""
    size = {"codes": arguments.codes, "dim": arguments.dim, "tokens": arguments.images * arguments.tokens}
    common = size | {"repeats": arguments.repeats, "device": arguments.device}
    ours = step(run_apart(run_form, form="ours", flush=True, **common))
    plain = flushed = MISSING
    needed = TABLES * 4 * size["tokens"] * size["codes"] / GIB
    if needed < free_gib(arguments.device):
        plain = step(run_apart(run_form, form="textbook", flush=False, **common))
        flushed = step(run_apart(run_form, form="textbook", flush=True, **common))
    else:
        say(f"note: the textbook form would need about {needed:.0f} GiB here; left out")
    return {
        "ours": ours,
        "textbook": plain | {"seconds_flushed": flushed["seconds"]},
        "ratio": {
            "speedup": _ratio(plain["seconds"], ours["seconds"]),
            "speedup_flushed": _ratio(flushed["seconds"], ours["seconds"]),
            "memory": _ratio(plain["extra_peak_gib"], ours["extra_peak_gib"]),
        },
    }


def sizes_of_picture(codes: int, images: int) -> list[tuple[int, int]]:
    """(codes, images) of the picture: one grows while the other is as asked for, as far as time allows."""
    grid = [(other, images) for other in CODES_OF_PICTURE] + [(codes, other) for other in IMAGES_OF_PICTURE]
    return sorted({(k, b) for k, b in grid if k * b * 256 <= LARGEST_OF_PICTURE})


def _grow(arguments: argparse.Namespace, sizes: Sequence[tuple[int, int]], progress) -> Iterator[dict]:
    for codes, images in sizes:
        size = {"codes": codes, "dim": arguments.dim, "tokens": images * arguments.tokens}
        found = {
            form: run_apart(run_form, form=form, flush=True, repeats=1, device=arguments.device, **size)
            for form in FORMS
        }
        progress.update()
        yield {"codes": codes, "images": images} | found


def exponents(growth: Sequence[dict]) -> dict[str, float]:
    """How our seconds grow with tokens x codes: the slope of the logarithms (1: linearly), by least squares.

    Only of sizes that take a tenth of a second and more: below, calls and caches count.
    """
    points = [(row["codes"] * row["images"], row["ours"]["seconds"]) for row in growth]
    points = [(size, seconds) for size, seconds in points if seconds >= 0.1]
    if len({size for size, _ in points}) < 2:
        return {}
    return {"seconds_over_tokens_times_codes": exponent(*zip(*points, strict=True))}


def table(figures: dict) -> str:
    """The figures for people."""
    ours, plain, ratio = figures["ours"], figures["textbook"], figures["ratio"]
    rows = [
        ("seconds", ours["seconds"], plain["seconds"], ratio["speedup"]),
        ("seconds, denormals flushed in both", ours["seconds"], plain["seconds_flushed"], ratio["speedup_flushed"]),
        ("extra peak memory in GiB", ours["extra_peak_gib"], plain["extra_peak_gib"], ratio["memory"]),
    ]
    lines = [f"{'':36s} {'ours':>10s} {'textbook':>10s} {'ratio':>8s}"]
    lines += [f"{name:36s} {_cell(a):>10s} {_cell(b):>10s} {_cell(r, 1):>8s}" for name, a, b, r in rows]
    rate = figures["matrix_product_gflop_per_second"]
    lines.append(f"{ours['gemm_share']:.0%} of this machine's float32 matrix-product rate, {rate:.0f} GFLOP/s")
    for slope in figures.get("exponents", {}).values():
        lines.append(f"seconds grow with (tokens x codes) ^ {slope:.2f}")
    if "picture" in figures:
        lines.append(f"picture: {figures['picture']}")
    return "\n".join(lines)


def draw(figures: dict, path: Path) -> Path:
    """Seconds and memory over codes and images, both forms, as a PNG file."""
    settings = figures["settings"]
    fixed = {"codes": ("images", settings["images"]), "images": ("codes", settings["codes"])}
    names = {"seconds": "seconds, forward + backward", "extra_peak_gib": "extra peak memory, GiB"}
    canvas = new_figure(10, 7, dpi=110, layout="constrained")
    for row, (quantity, label) in zip(canvas.subplots(2, 2), names.items(), strict=True):
        for axis, (over, (held, value)) in zip(row, fixed.items(), strict=True):
            points = sorted((r for r in figures["growth"] if r[held] == value), key=lambda r: r[over])
            for form, style in (("textbook", "s--"), ("ours", "o-")):
                found = [(r[over], r[form][quantity]) for r in points if r[form][quantity] is not None]
                axis.plot(*zip(*found, strict=True), style, label=form) if found else None
            axis.set(xscale="log", yscale="log", xlabel=over, ylabel=label, title=f"{value:,} {held}")
            axis.set_xticks([r[over] for r in points], [f"{r[over]:,}" for r in points], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend()
    return save_png(canvas, path)


# --- In a process of its own --------------------------------------------------------------------


def run_form(form: str, codes: int, dim: int, tokens: int, repeats: int, device: str, flush: bool) -> dict:
    """Median seconds of forward + backward, and the memory that it needs beyond inputs and gradients."""
    torch.set_flush_denormal(flush)
    torch.manual_seed(0)
    z, codebook, upstream = (torch.randn(rows, dim).to(device) for rows in (tokens, codes, tokens))
    z, codebook = z.requires_grad_(), codebook.requires_grad_()
    _pass(FORMS[form], z[:16], codebook[:64], upstream[:16])  # loads what a first call loads

    def call() -> tuple[Tensor, ...]:
        return _pass(FORMS[form], z, codebook, upstream)

    start = time.perf_counter()
    memory = extra_peak_gib(call, device) - (z.numel() + codebook.numel()) * z.element_size() / GIB
    seconds = time.perf_counter() - start
    if seconds < SLOW_SECONDS:
        seconds = median_seconds(call, repeats, device)
    return {"seconds": seconds, "extra_peak_gib": memory}


def rate_of_products(dim: int, device: str) -> dict:
    """The machine's float32 matrix-product rate, at the shapes in use and at a large square."""
    torch.set_flush_denormal(True)
    return {"flop_per_second": product_rate(torch.float32, [(4_096, dim, 256), (2_048,) * 3], device)}


def _pass(form: Callable, z: Tensor, codebook: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    out = form(z, codebook, beta=BETA, temperature=TEMPERATURE)
    entropy = out.sample_entropy - out.batch_entropy
    loss = (out.latents * upstream).sum() + out.quantization_loss + ENTROPY_WEIGHT * entropy
    return torch.autograd.grad(loss, (z, codebook))


def free_gib(device: str) -> float:
    """Memory that a process can have."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / GIB
    return available_bytes() / GIB


def _step(progress, found: dict) -> dict:
    progress.update()
    return found


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / max(other, 1e-9)


def _cell(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
