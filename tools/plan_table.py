"""How a plan is shown: tables for people, JSON for programs."""

import json
import math
from collections.abc import Sequence

from ibq.scaling.hardware import CPU_ADAM_ELEMENTS, DISK_BYTES, GIB, HOST_BYTES
from ibq.scaling.layouts import Layout, Training, numerics
from ibq.scaling.memory import KINDS
from ibq.scaling.plan import Machine, Row, Stage, tensor_divisors

NAME = 36  # columns


def as_text(
    *,
    stage: Stage,
    training: Training,
    machine: Machine,
    rows: Sequence[Row],
    own: Layout,
    steps: int,
    best: Row | None,
    source: str,
) -> str:
    """All tables, and the recommendation."""
    gpu = machine.gpu
    head = (
        f"{source}: {machine.gpus} x {gpu.name} ({gpu.memory_gib:g} GiB, {gpu.flops / 1e12:g} TFLOP/s), "
        f"{training.precision}, batch {training.batch_size}, {steps:,} steps"
    )
    parts = [
        head,
        _sizes(stage),
        _memory_table(rows, own, training),
        _speed_table(rows, own, training, stage, machine, steps),
        _notes(stage, training, machine),
        recommendation(best, rows, own, machine),
    ]
    return "\n\n".join(parts)


def _sizes(stage: Stage) -> str:
    """Parameters and FLOPs."""
    parameters = stage.parameters()
    trained = sum(count for name, count in parameters.items() if "frozen" not in name)
    lines = [f"{'parameters':{NAME}s} {trained:>15,d}"]
    lines += [f"  {name:{NAME - 2}s} {count:>15,d}" for name, count in parameters.items()]
    lines += ["", f"{'GFLOP per image':{NAME}s} {'forward':>12s} {'backward':>12s} {'recomputed':>12s}"]
    for name, flops in stage.flops().items():
        figures = (flops.forward, flops.backward, flops.recomputed)
        lines.append(f"  {name:{NAME - 2}s} " + " ".join(f"{figure / 1e9:12,.2f}" for figure in figures))
    forward, both, again = flops_per_image(stage)
    tokens = stage.tokens
    lines.append(
        f"GFLOP per token ({tokens} an image): forward {forward / tokens / 1e9:,.3f}, with backward "
        f"{both / tokens / 1e9:,.3f}, recomputed {again / tokens / 1e9:,.3f} more"
    )
    return "\n".join(lines)


def flops_per_image(stage: Stage) -> tuple[int, int, int]:
    """FLOPs forward, forward and backward, and recomputed, of everything that a step computes for an image."""
    parts = stage.flops().values()
    return (
        sum(part.forward for part in parts),
        sum(part.textbook for part in parts),
        sum(part.recomputed for part in parts),
    )


def _label(row: Row, own: Layout) -> str:
    return f"{'*' if row.layout == own else ' '} {row.layout.name}"


def _memory_table(rows: Sequence[Row], own: Layout, training: Training) -> str:
    title = f"GiB per GPU, micro-batch {training.micro_batch}"
    names = ("weights", "gradients", "optimizer", "EMA", "activations", "head", "buffers", "total")
    widths = [max(len(name), 7) for name in names]
    lines = [f"{title:{NAME}s} " + " ".join(f"{name:>{w}s}" for name, w in zip(names, widths, strict=True))]
    for row in rows:
        figures = [row.memory.kinds[kind] for kind in KINDS] + [row.memory.total]
        cells = " ".join(f"{figure / GIB:{w}.2f}" for figure, w in zip(figures, widths, strict=True))
        lines.append(f"{_label(row, own):{NAME}s} {cells}")
    return "\n".join(lines)


def _speed_table(
    rows: Sequence[Row], own: Layout, training: Training, stage: Stage, machine: Machine, steps: int
) -> str:
    names = ("fits up to", "micro-batch", "sent GiB", "to host GiB", "s per step", "tokens/s", "days")
    widths = [max(len(name), 8) for name in names]
    title = "largest micro-batch that divides"
    lines = [f"{title:{NAME}s} " + " ".join(f"{name:>{w}s}" for name, w in zip(names, widths, strict=True))]
    for row in rows:
        if row.traffic is None:
            cells = [f"{'no':>{widths[0]}s}"]
        else:
            values = (
                f"{row.largest}",
                f"{row.micro_batch}",
                f"{row.traffic.sent / GIB:,.1f}",
                f"{(row.traffic.host + row.traffic.disk) / GIB:,.1f}",
                f"{row.seconds:.3g}",
                f"{tokens_per_second(row, stage, training):,.0f}",
                f"{days(row, steps):,.1f}",
            )
            cells = [f"{value:>{w}s}" for value, w in zip(values, widths, strict=True)]
        lines.append(f"{_label(row, own):{NAME}s} " + " ".join(cells))
    return "\n".join(lines)


def tokens_per_second(row: Row, stage: Stage, training: Training) -> float:
    """Of all GPUs together."""
    return training.batch_size * stage.tokens / row.seconds


def days(row: Row, steps: int) -> float:
    """Of the whole run."""
    return row.seconds * steps / 86400


def _notes(stage: Stage, training: Training, machine: Machine) -> str:
    lines = [
        f"Assumed: {machine.mfu:.0%} of the GPU's rate for all FLOPs (--mfu), {machine.reserve / GIB:g} GiB left free "
        "(--reserve-gib),",
        f"{machine.gpu.node_bytes / 1e9:g} GB/s within a machine of {machine.gpus_per_node}, "
        f"{machine.gpu.network_bytes / 1e9:g} GB/s between machines, {HOST_BYTES / 1e9:g} GB/s to host memory,",
        f"{DISK_BYTES / 1e9:g} GB/s of a machine's disks, {CPU_ADAM_ELEMENTS / 1e9:g} G elements/s updated by its "
        "processors. Sent: per GPU and step.",
        "Dropout masks are bytes, as on CUDA; on the CPU they are as large as what they mask, and the tokenizer's "
        "norms stay in bf16.",
    ]
    if sizes := stage.tensor_sizes():
        heads = sizes["heads"]
        divisors = [str(number) for number in range(2, heads) if heads % number == 0]
        common = math.gcd(*sizes.values())
        allowed = [str(number) for number in range(2, common + 1) if common % number == 0]
        used = [str(number) for number in tensor_divisors(stage, machine)]
        others = ", ".join(f"{size:,} {name}" for name, size in sizes.items() if name != "heads")
        lines.append(
            f"Tensor parallelism: the {heads} heads divide by {', '.join(divisors) or 'nothing'}; with {others}: by "
            f"{', '.join(allowed) or 'nothing'}; shown: {', '.join(used) or 'none'} (within a machine)."
        )
    return "\n".join(lines)


def recommendation(best: Row | None, rows: Sequence[Row], own: Layout, machine: Machine) -> str:
    """One sentence: what to take and why."""
    if best is None:
        least = min(rows, key=lambda row: row.memory.total)
        return (
            f"Recommended: none. Even {least.layout.name} needs more than the {machine.usable / GIB:.1f} GiB of a GPU; "
            "take more or larger GPUs, or recompute (model.gradient_checkpointing=true)."
        )
    simpler = [row for row in rows[: rows.index(best)] if not row.fits]
    if simpler:
        why = f"the simplest layout that fits, {simpler[-1].layout.name} does not"
    else:
        why = "the simplest layout fits"
    slower = [row for row in rows if row.fits and row is not best]
    fastest = min(slower, key=lambda row: row.seconds, default=None)
    if fastest is not None and fastest.seconds < best.seconds:
        why += f", and none is more than {best.seconds / fastest.seconds - 1:.0%} faster"
    elif fastest is not None:
        why += f", and it is {fastest.seconds / best.seconds - 1:.0%} faster than the next ({fastest.layout.name})"
    return f"Recommended: {best.layout.name} with training.micro_batch={best.micro_batch}: {why}.\n  {settings(best)}"


def settings(row: Row) -> str:
    """The settings that make a run use this layout."""
    layout = row.layout
    items = [f"engine.kind={layout.kind}"]
    if layout.kind == "zero":
        items.append(f"engine.stage={layout.stage}")
        for name in ("offload_optimizer", "offload_parameters"):
            if getattr(layout, name) != "none":
                items.append(f"engine.{name}={getattr(layout, name)}")
    if layout.kind == "fsdp":
        items += ["engine.shard=hybrid"] if layout.copies > 1 else []
        items += [f"engine.offload={layout.offload_optimizer}"] if layout.offload_optimizer != "none" else []
        items += [f"engine.tensor_parallel={layout.tensor}"] if layout.tensor > 1 else []
        items += ["engine.sequence_parallel=true"] if layout.sequence else []
    return " ".join([*items, f"training.micro_batch={row.micro_batch}"])


def as_json(
    *,
    stage: Stage,
    training: Training,
    machine: Machine,
    rows: Sequence[Row],
    own: Layout,
    steps: int,
    best: Row | None,
) -> str:
    """Everything; memory and traffic in bytes."""
    forward, both, again = flops_per_image(stage)
    content = {
        "parameters": stage.parameters(),
        "flops_per_image": {
            name: {"forward": part.forward, "backward": part.backward, "recomputed": part.recomputed}
            for name, part in stage.flops().items()
        },
        "flops_per_token": {
            "forward": forward / stage.tokens,
            "forward_and_backward": both / stage.tokens,
            "recomputed": again / stage.tokens,
        },
        "tokens_per_image": stage.tokens,
        "training": vars(training),
        "machine": {**vars(machine), "gpu": vars(machine.gpu), "usable_bytes": machine.usable},
        "steps": steps,
        "layouts": [_row_json(row, stage, training, steps, own) for row in rows],
        "recommended": None if best is None else {"name": best.layout.name, "settings": settings(best)},
    }
    return json.dumps(content, indent=1) + "\n"


def _row_json(row: Row, stage: Stage, training: Training, steps: int, own: Layout) -> dict:
    values = numerics(row.layout, training)
    result = {
        "name": row.layout.name,
        "own": row.layout == own,
        "layout": vars(row.layout),
        "activation_bytes": {"stream": values.stream, "products": values.compute, "ends": values.root},
        "memory_bytes": {**row.memory.kinds, "total": row.memory.total},
        "fullest_phase": row.memory.phase,
        "largest_micro_batch": row.largest,
        "micro_batch": row.micro_batch,
    }
    if row.traffic is None:
        return result
    rates = {"tokens_per_second": tokens_per_second(row, stage, training), "days": days(row, steps)}
    return result | {"traffic": vars(row.traffic), "seconds_per_step": row.seconds} | rates
