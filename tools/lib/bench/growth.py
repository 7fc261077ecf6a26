"""How the time of a training step grows over each size of a model, beside the growth of its counted FLOPs.

The transformer's axes are depth, width, tokens an image and codes, each around a small base model; the last axis is the
codebook of the tokenizer's index backpropagation, forward and backward over fixed tokens. An exponent is the slope of
the logarithms by least squares over the measured points: `measured` of the seconds, `expected` of the FLOPs at exactly
those sizes (ibq.scaling: recomputed ones too, for the quantizer those of the textbook form). Parts that do not grow
with a size, as the head does not with the depth, keep both below the power of the leading term. A measured exponent
below the expected one says that small sizes do not use the machine as well as large ones.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ibq.engine.configs import LocalEngineConfig
from ibq.models.transformer import TransformerConfig
from ibq.ops.index_backprop import index_backprop
from ibq.progress import progress_bar
from ibq.quantizers import IBQConfig
from ibq.reports.charts import new_figure, save_png
from ibq.scaling.tokenizer import quantizer_flops
from ibq.scaling.transformer import Flops, transformer_flops
from ibq.training.run import set_up_torch
from tools.lib.bench.options import add_device, check
from tools.lib.bench.process import exponent, run_apart, seconds_of
from tools.lib.bench.trainer import Trainer, step_on_one_batch

BASE = {"depth": 4, "width": 256, "tokens_per_side": 16, "vocab_size": 1_024, "num_classes": 100}
HEAD_CHANNELS = 64  # of a head, as in the published family
IMAGES = 4  # of a step
QUANTIZED, DIM = 512, 256  # tokens and their dimension on the quantizer's axis
WARM_UP = 2  # steps that are not timed


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One size and the values that it takes."""

    label: str
    few: tuple[int, ...]
    more: tuple[int, ...]  # with --points all, besides those
    key: str | None = None  # of the model's config; None: the quantizer's codebook

    def sizes(self, points: str) -> list[int]:
        """The values to measure, in order."""
        return sorted({*self.few, *(self.more if points == "all" else ())})

    def shown(self, size: int) -> int:
        """A value as it is shown and fitted."""
        return size**2 if self.key == "tokens_per_side" else size


CODES, MORE_CODES = (1_024, 4_096, 16_384, 65_536, 262_144), (2_048, 8_192, 32_768, 131_072)
AXES = {
    "depth": Axis(label="depth, blocks", key="depth", few=(2, 4, 8), more=(1, 6, 12, 16)),
    "width": Axis(label="width, channels", key="width", few=(128, 256, 512), more=(192, 384, 768, 1_024)),
    "tokens": Axis(label="tokens an image", key="tokens_per_side", few=(8, 16, 32), more=(12, 24)),
    "vocabulary": Axis(label="codes of the transformer", key="vocab_size", few=CODES, more=MORE_CODES),
    "codebook": Axis(label="codes of the quantizer", few=CODES, more=MORE_CODES),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--points", choices=("few", "all"), default="few", help="of each axis (default: %(default)s)")
    add("--axes", nargs="+", choices=AXES, default=list(AXES), metavar="NAME", help=f"of {', '.join(AXES)}")
    add("--steps", type=int, default=3, help="timed steps of each point, of which the best counts (%(default)s)")
    add("--picture", type=Path, metavar="FILE", help="draw a panel for each axis into this PNG file")
    add_device(parser)


def measure(arguments: argparse.Namespace) -> dict:
    """Each axis in a process of its own, its exponents, and what the figures depend on."""
    check(arguments, steps=1)
    axes: dict[str, dict] = {}
    settings = {name: getattr(arguments, name) for name in ("points", "steps", "device")}
    with progress_bar("growth", len(arguments.axes), "axis") as progress:
        for name in arguments.axes:
            points = run_apart(measure_axis, name=name, **settings)["points"]
            axes[name] = {"points": points} | exponents(points)
            progress.update()
    figures = {
        "axes": axes,
        "base": BASE | {"images": IMAGES},
        "quantizer": {"tokens": QUANTIZED, "dim": DIM},
        **settings,
        "threads": torch.get_num_threads(),
    }
    if arguments.picture is not None:
        figures["picture"] = str(draw(axes, arguments.picture))
    return figures


def exponents(points: Sequence[Mapping]) -> dict[str, float]:
    """The exponents with which seconds and FLOPs grow over the sizes of these points."""
    sizes = [point["size"] for point in points]
    return {
        "measured": exponent(sizes, [point["seconds"] for point in points]),
        "expected": exponent(sizes, [point["flops"] for point in points]),
    }


def table(figures: dict) -> str:
    """The figures for people."""
    lines = [f"{'axis':26s} {'measured':>9s} {'expected':>9s}  seconds a step (GFLOP/s)"]
    for name, axis in figures["axes"].items():
        points = "  ".join(
            f"{point['size']:,}: {point['seconds']:.3f} ({point['flops'] / point['seconds'] / 1e9:.0f})"
            for point in axis["points"]
        )
        lines.append(f"{AXES[name].label:26s} {axis['measured']:9.2f} {axis['expected']:9.2f}  {points}")
    if "picture" in figures:
        lines.append(f"picture: {figures['picture']}")
    return "\n".join(lines)


def draw(axes: Mapping[str, Mapping], path: Path) -> Path:
    """A panel for each axis, measured points and the line of the expected exponent through their middle, as PNG."""
    columns = min(3, len(axes))
    rows = -(-len(axes) // columns)
    canvas = new_figure(4.4 * columns, 3.6 * rows, dpi=110, layout="constrained")
    panels = canvas.subplots(rows, columns, squeeze=False)
    for panel, (name, axis) in zip(panels.flat, axes.items(), strict=False):
        _draw_axis(panel, AXES[name].label, axis)
    for panel in list(panels.flat)[len(axes) :]:
        panel.set_visible(False)
    return save_png(canvas, path)


def _draw_axis(panel, label: str, axis: Mapping) -> None:
    from matplotlib.ticker import LogLocator

    sizes = [point["size"] for point in axis["points"]]
    seconds = [point["seconds"] for point in axis["points"]]
    middle, height = (math.exp(sum(map(math.log, some)) / len(some)) for some in (sizes, seconds))
    line = [height * (size / middle) ** axis["expected"] for size in sizes]
    panel.plot(sizes, line, "--", color="grey", label=f"expected: exponent {axis['expected']:.2f}")
    panel.plot(sizes, seconds, "o", label=f"measured: exponent {axis['measured']:.2f}")
    what = "forward + backward" if label == AXES["codebook"].label else "a step"
    panel.set(xscale="log", yscale="log", xlabel=label, ylabel=f"seconds, {what}", title=f"growth over {label}")
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30 if len(sizes) > 3 else 0)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # most panels span less than two decades
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend()


# --- In a process of its own --------------------------------------------------------------------


def measure_axis(*, name: str, points: str, steps: int, device: str) -> dict:
    """Seconds of a step and its FLOPs at each size of an axis."""
    set_up_torch(training=True)
    return {"points": list(_points(AXES[name], points, steps, device))}


def _points(axis: Axis, points: str, steps: int, device: str) -> Iterator[dict]:
    for size in axis.sizes(points):
        if axis.key is None:
            flops, step = quantizer_flops(IBQConfig(num_codes=size, dim=DIM), QUANTIZED), _quantizer_step(size, device)
        else:
            config = config_of(axis.key, size)
            flops, step = transformer_flops(config), _transformer_step(config, device)
        images = 1 if axis.key is None else IMAGES
        yield {"size": axis.shown(size), "seconds": _best(step, steps, device), "flops": images * counted(flops)}
        del step  # before the next is made


def config_of(key: str, size: int) -> TransformerConfig:
    """The base model with one size changed; heads follow from the width."""
    sizes = BASE | {key: size}
    return TransformerConfig(heads=max(1, sizes["width"] // HEAD_CHANNELS), **sizes)


def counted(flops: Flops) -> int:
    """All FLOPs of an image that a step makes."""
    return flops.textbook + flops.recomputed


def _transformer_step(config: TransformerConfig, device: str) -> Callable[[], object]:
    on = torch.device(device)
    return step_on_one_batch(Trainer(LocalEngineConfig(), config, on), config, IMAGES, on)


def _quantizer_step(codes: int, device: str) -> Callable[[], object]:
    """What the IBQ quantizer of a tokenizer does, and its gradients."""
    config = IBQConfig(num_codes=codes, dim=DIM)
    generator = torch.Generator().manual_seed(0)
    z, codebook, upstream = (
        torch.randn(rows, DIM, generator=generator).to(device) for rows in (QUANTIZED, codes, QUANTIZED)
    )
    z, codebook = z.requires_grad_(), codebook.requires_grad_()

    def step() -> object:
        out = index_backprop(z, codebook, beta=config.beta, temperature=config.entropy_temperature)
        entropy = out.sample_entropy - out.batch_entropy
        loss = (out.latents * upstream).sum() + out.quantization_loss + 0.05 * entropy
        return torch.autograd.grad(loss, (z, codebook))

    return step


def _best(step: Callable[[], object], steps: int, device: str) -> float:
    """The shortest of so many steps, in seconds, after some that are not timed."""
    for _ in range(WARM_UP):
        step()
    return min(seconds_of(step, device) for _ in range(steps))
