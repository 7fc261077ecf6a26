"""How a plan is shown: tables for people, JSON for programs."""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ibq.scaling.hardware import CPU_ADAM_ELEMENTS, DISK_BYTES, GIB, HOST_BYTES, PRICED, Gpu
from ibq.scaling.layouts import Layout, Training, numerics
from ibq.scaling.memory import KINDS
from ibq.scaling.plan import Machine, Row, Stage, recommend, tensor_divisors

NAME, WIDTH = 36, 118  # columns of a layout's name, and of everything


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A plan and what it is of."""

    source: str  # the config file
    stage: Stage
    training: Training
    machine: Machine
    rows: Sequence[Row]
    own: Layout  # the config's
    steps: int
    priced: bool  # whether the user gave a price

    @property
    def best(self) -> Row | None:
        """What is recommended."""
        return recommend(self.rows)

    def days(self, row: Row) -> float:
        """Of the whole run."""
        return row.seconds * self.steps / 86400

    def tokens_per_second(self, row: Row) -> float:
        """Of all GPUs together."""
        return self.training.batch_size * self.stage.num_tokens / row.seconds


def as_text(answer: Answer) -> str:
    """All tables, and the recommendation."""
    machine, training = answer.machine, answer.training
    gpu = machine.gpu
    head = (
        f"{answer.source}: {machine.gpus} x {gpu.name} ({gpu.memory_gib:g} GiB, {gpu.flops / 1e12:g} TFLOP/s), "
        f"{training.precision}, batch {training.batch_size}, {answer.steps:,} steps"
    )
    tables = [_memory_table(answer), _speed_table(answer)]
    return "\n\n".join([head, _sizes(answer.stage), *tables, _notes(answer), recommendation(answer)])


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
    tokens = stage.num_tokens
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


def _memory_table(answer: Answer) -> str:
    names = ("weights", "gradients", "optimizer", "EMA", "activations", "head", "buffers", "total")
    cells = [
        [f"{figure / GIB:.2f}" for figure in (*(row.memory.kinds[kind] for kind in KINDS), row.memory.total)]
        for row in answer.rows
    ]
    return _table(f"GiB per GPU, micro-batch {answer.training.micro_batch}", names, 7, answer, cells)


def _speed_table(answer: Answer) -> str:
    names = ("fits up to", "micro-batch", "sent GiB", "to host GiB", "s per step", "tokens/s", "days")
    return _table("largest micro-batch that divides", names, 8, answer, [_speed(answer, row) for row in answer.rows])


def _speed(answer: Answer, row: Row) -> list[str]:
    if row.traffic is None:
        return ["no"]
    sent, host = row.traffic.sent, row.traffic.host + row.traffic.disk
    rates = (f"{row.seconds:.3g}", f"{answer.tokens_per_second(row):,.0f}", f"{answer.days(row):,.1f}")
    return [f"{row.largest}", f"{row.micro_batch}", f"{sent / GIB:,.1f}", f"{host / GIB:,.1f}", *rates]


def _table(title: str, names: Sequence[str], least: int, answer: Answer, cells: Sequence[Sequence[str]]) -> str:
    """A line for every layout, the config's own marked; columns as wide as their names, or so many characters."""
    labels = [f"{'*' if row.layout == answer.own else ' '} {row.layout.name}" for row in answer.rows]
    lines = []
    for label, texts in zip((title, *labels), (names, *cells), strict=True):
        figures = (text.rjust(max(len(name), least)) for text, name in zip(texts, names, strict=False))
        lines.append(f"{label:{NAME}s} {' '.join(figures)}")
    return "\n".join(lines)


def _notes(answer: Answer) -> str:
    stage, machine = answer.stage, answer.machine
    gpu = machine.gpu
    paragraphs = [
        f"Assumed: {machine.mfu:.0%} of the GPU's rate for all FLOPs (--mfu); {machine.reserve / GIB:g} GiB left free "
        f"(--reserve-gib); {gpu.node_bytes / 1e9:g} GB/s per GPU within a machine of {machine.gpus_per_node}, "
        f"{gpu.network_bytes / 1e9:g} GB/s between machines, {HOST_BYTES / 1e9:g} GB/s to host memory; "
        f"{DISK_BYTES / 1e9:g} GB/s of a machine's disks; {CPU_ADAM_ELEMENTS / 1e9:g} billion parameters a second "
        "updated by its processors. Sent: per GPU and step.",
        "CUDA keeps dropout masks as bytes; the CPU keeps them in the dtype of what they mask. CUDA's autocast computes"
        " the tokenizer's norms in float32, the CPU's in bf16. Attention and the head save the same on both.",
    ]
    shown = [answer.own, *(row.layout for row in answer.rows)]
    if zero := next((layout for layout in shown if layout.kind == "zero" and layout.stage == 3), None):
        paragraphs.append(_zero_note(zero))
    if sizes := stage.tensor_sizes():
        paragraphs.append(_tensor_note(sizes, tensor_divisors(stage, machine)))
    return "\n".join(textwrap.fill(paragraph, WIDTH) for paragraph in paragraphs)


def _zero_note(layout: Layout) -> str:
    return (
        f"{layout.name} reduces gradients of {layout.bucket:,} elements at a time in {layout.reduce_dtype}, gathers "
        f"weights of {layout.gather:,} ahead of their use and holds {layout.live:,} at most, and updates "
        f"{layout.sub_group:,} of a rank's elements at a time."
    )


def _tensor_note(sizes: dict[str, int], shown: Sequence[int]) -> str:
    said = ", ".join(f"{size:,} {name}" for name, size in sizes.items())
    return (
        f"Tensor parallelism: the {said} divide by {_numbers(math.gcd(*sizes.values()))}; shown: "
        f"{', '.join(str(number) for number in shown) or 'none'} (what divides a machine too). Where the hidden "
        "channels or the codes do not divide, every rank has these layers whole."
    )


def _numbers(whole: int) -> str:
    """Its divisors between 1 and itself, and itself where there is no other."""
    found = [str(number) for number in range(2, whole) if whole % number == 0]
    return ", ".join(found) or (str(whole) if whole > 1 else "nothing")


def recommendation(answer: Answer) -> str:
    """One sentence: what to take and why."""
    best, rows = answer.best, answer.rows
    if best is None:
        least = min(rows, key=lambda row: row.memory.total)
        return (
            f"Recommended: none. Even {least.layout.name} needs more than the {answer.machine.usable / GIB:.1f} GiB "
            "of a GPU; take more or larger GPUs, or recompute (model.gradient_checkpointing=true)."
        )
    simpler = rows[: rows.index(best)]
    too_large = [row.layout.name for row in simpler if not row.fits]
    if too_large:
        why = f"{too_large[-1]} does not fit"
    else:
        why = "it is the simplest and fits" if not simpler else "it fits, and simpler layouts are slower"
    others = [row for row in rows if row.fits and row is not best]
    if others:
        rival = min(others, key=lambda row: row.seconds)
        gain = rival.seconds / best.seconds - 1
        same = f"no other layout that fits is faster by more than 2% (next: {rival.layout.name})"
        why += f", and {same if gain < 0.02 else f'it is {gain:.0%} faster than the next ({rival.layout.name})'}"
    sentence = f"Recommended: {best.layout.name} with micro-batch {best.micro_batch}: {why}."
    cost, days = money(answer.machine, answer.days(best)), answer.days(best)
    paid = f"It costs {'?' if cost is None else f'{cost:,.0f}'} USD: {days:,.1f} days of {answer.machine.gpus} GPUs. "
    paid += price_note([answer.machine.gpu], answer.priced)
    return f"{textwrap.fill(sentence, WIDTH)}\n  {settings(best)}\n{textwrap.fill(paid, WIDTH)}"


def money(machine: Machine, days: float) -> float | None:
    """USD for so many days of all GPUs; None where their price is not known."""
    return None if machine.gpu.price is None else days * 24 * machine.gpus * machine.gpu.price


def price_note(kinds: Sequence[Gpu], given: bool) -> str:
    """What the money rests on."""
    unique = {gpu.name: gpu for gpu in kinds}.values()
    prices = ", ".join(f"{gpu.name} {'? (give --price)' if gpu.price is None else f'{gpu.price:g}'}" for gpu in unique)
    source = "By --price; what it does not name is assumed" if given else "Assumed, not yours (--price)"
    return f"USD per GPU hour: {prices}. {source}: list prices of {PRICED}, which differ by a factor of 3."


def settings(row: Row) -> str:
    """The settings that make a run use this layout."""
    return engine_settings(row.layout, row.micro_batch)


def engine_settings(layout: Layout, micro_batch: int) -> str:
    """The settings of a layout and a micro-batch."""
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
    return " ".join([*items, f"training.micro_batch={micro_batch}"])


def as_json(answer: Answer) -> str:
    """Everything; memory and traffic in bytes."""
    stage, machine, best = answer.stage, answer.machine, answer.best
    forward, both, again = flops_per_image(stage)
    content = {
        "parameters": stage.parameters(),
        "flops_per_image": {name: vars(part) for name, part in stage.flops().items()},
        "flops_per_token": {
            "forward": forward / stage.num_tokens,
            "forward_and_backward": both / stage.num_tokens,
            "recomputed": again / stage.num_tokens,
        },
        "tokens_per_image": stage.num_tokens,
        "training": vars(answer.training),
        "machine": {**vars(machine), "gpu": vars(machine.gpu), "usable_bytes": machine.usable},
        "steps": answer.steps,
        "layouts": [_row_json(row, answer) for row in answer.rows],
        "recommended": None
        if best is None
        else {"name": best.layout.name, "settings": settings(best), "usd": money(machine, answer.days(best))},
    }
    return json.dumps(content, indent=1) + "\n"


def _row_json(row: Row, answer: Answer) -> dict:
    values = numerics(row.layout, answer.training)
    result = {
        "name": row.layout.name,
        "own": row.layout == answer.own,
        "layout": vars(row.layout),
        "activation_bytes": {"stream": values.stream, "products": values.compute, "ends": values.root},
        "memory_bytes": {**row.memory.kinds, "total": row.memory.total},
        "fullest_phase": row.memory.phase,
        "largest_micro_batch": row.largest,
        "micro_batch": row.micro_batch,
    }
    if row.traffic is None:
        return result
    rates = {"tokens_per_second": answer.tokens_per_second(row), "days": answer.days(row)}
    return result | {"traffic": vars(row.traffic), "seconds_per_step": row.seconds} | rates
