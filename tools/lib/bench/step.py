"""What benches of training steps share: forms in processes of their own, the best step with its parts, the table."""

import argparse
import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ibq.config import load_section
from ibq.engine.configs import EngineConfig, LocalEngineConfig
from ibq.progress import progress_bar
from ibq.training.metrics import Stopwatch
from ibq.training.run import set_up_torch
from tools.lib.bench.options import add_device, check
from tools.lib.bench.process import GIB, extra_peak_gib, median_seconds, product_rate, run_apart, seconds_of

FORMS = ("ours", "plain")


BANDWIDTH_FLOATS = 2**26  # that are copied to measure the memory's bandwidth
Shape = tuple[int, int, int]  # rows, inner dimension and columns of a matrix product
COMPILE = {"auto": None, "true": True, "false": False}


def add_options(parser: argparse.ArgumentParser, *, config: str, batch: int, steps: int, compiled: str) -> None:
    """The options of such a bench, with its defaults."""
    add = parser.add_argument
    add("--config", default=config, help="config of a run (default: %(default)s)")
    add("--batch", type=int, default=batch, help="images (default: %(default)s)")
    help_steps = "timed steps of each form, of which the best counts (default: %(default)s)"
    add("--steps", type=int, default=steps, help=help_steps)
    help_compile = "engine.compile of ours; auto: as the config or its default says (default: %(default)s)"
    add("--compile", choices=COMPILE, default=compiled, help=help_compile)
    add_device(parser)


def set_up(form: str) -> None:
    """The process as this project's commands have it, or as a plain script would, with denormals flushed in both."""
    if form == "ours":
        set_up_torch(training=True)
    else:
        torch.set_flush_denormal(True)
        torch.backends.cudnn.benchmark = True


def engine_config(config: str, compile: str) -> LocalEngineConfig:
    """How one process runs the config: compiled or not, as the option or its engine says."""
    if compile != "auto":
        return LocalEngineConfig(compile=COMPILE[compile])
    chosen = load_section(EngineConfig, config, "engine", default=LocalEngineConfig())
    return LocalEngineConfig(compile=getattr(chosen, "compile", None))


def measure_forms(
    arguments: argparse.Namespace, measure_form: Callable[..., dict], measure_rates: Callable[..., dict]
) -> dict:
    """Each form in a process of its own, their ratios, the machine's own rates, and what the figures depend on."""
    check(arguments, batch=1, steps=1)
    settings = {name: getattr(arguments, name) for name in ("config", "batch", "steps", "compile", "device")}
    figures: dict = {}
    with progress_bar(arguments.name, len(FORMS) + 1, "run") as progress:
        for form in FORMS:
            figures[form] = run_apart(measure_form, form=form, **settings)
            progress.update()
        rates = run_apart(measure_rates, **{name: settings[name] for name in ("config", "batch", "device")})
        progress.update()
    ours, plain = (figures[form] for form in FORMS)
    return figures | {
        "ratio": {"speedup": plain["seconds"] / ours["seconds"], "memory": ours["peak_gib"] / plain["peak_gib"]},
        **settings,
        "threads": ours["threads"],
        "rates": rates,
    }


def time_module(module: nn.Module, stopwatch: Stopwatch, name: str) -> None:
    """Measure a module's forward pass as a part of its own, within the part around it."""
    running = contextlib.ExitStack()
    module.register_forward_pre_hook(lambda *_: running.enter_context(stopwatch.part(name)))
    module.register_forward_hook(lambda *_: running.close())


def time_steps(step: Callable[[], float], stopwatch: Stopwatch, held_bytes: int, steps: int, device: str) -> dict:
    """The best of so many steps and its parts, and the memory at its most; two steps before are not counted.

    `step` gives its loss; `held_bytes` are there before a step.
    """
    losses = [step()]
    peak = extra_peak_gib(lambda: losses.append(step()), device)  # the second step: moments exist
    stopwatch.means(1)
    best, parts = float("inf"), {}
    for _ in range(steps):
        seconds = seconds_of(lambda: losses.append(step()), device)
        own = stopwatch.means(1)
        if seconds < best:
            best, parts = seconds, {name.removeprefix("seconds/"): value for name, value in own.items()}
    peak_gib = peak + held_bytes / GIB
    return {"seconds": best, "parts": parts, "peak_gib": peak_gib, "losses": losses, "threads": torch.get_num_threads()}


def machine_rates(bf16: Sequence[Shape], fp32: Sequence[Shape], device: str) -> dict[str, float]:
    """The machine's own limits: FLOP/s of matrix products of these shapes, bytes/s of copies in memory (both ways)."""
    source = torch.ones(BANDWIDTH_FLOATS, device=device)
    target = torch.empty_like(source)
    return {
        "bf16": product_rate(torch.bfloat16, bf16, device),
        "fp32": product_rate(torch.float32, fp32, device),
        "bytes_per_second": 2 * 4 * BANDWIDTH_FLOATS / median_seconds(lambda: target.copy_(source), 9, device),
    }


def table(figures: Mapping, rows: Mapping[str, str]) -> str:
    """Both forms side by side: `rows` (text -> name of a figure), the parts of the step, and the machine's rates."""
    ours, plain, ratio = figures["ours"], figures["plain"], figures["ratio"]
    name = f"{Path(figures['config']).stem}, {figures['batch']} images"
    lines = [f"{name:40s} {'ours':>10s} {'plain':>10s} {'ratio':>7s}"]
    values = {text: (ours[key], plain[key]) for text, key in rows.items()}
    values |= {f"  seconds in {part}": (ours["parts"][part], plain["parts"][part]) for part in ours["parts"]}
    for text, (one, other) in values.items():
        lines.append(f"{text:40s} {one:10.3f} {other:10.3f} {one / max(other, 1e-9):7.2f}")
    lines.append(f"{ratio['speedup']:.2f} times the plain form's speed at {ratio['memory']:.2f} of its memory")
    rates = figures["rates"]
    lines.append(
        f"matrix products: {rates['bf16'] / 1e9:,.0f} GFLOP/s in bf16, {rates['fp32'] / 1e9:,.0f} in fp32; memory is "
        f"copied at {rates['bytes_per_second'] / 1e9:.1f} GB/s"
    )
    return "\n".join(lines)
