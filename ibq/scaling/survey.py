"""What a run would take on machines of several kinds: engine, micro-batch and recomputation that fit, and its time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ibq.scaling.layouts import Layout, Training
from ibq.scaling.plan import Machine, Stage, bytes_needed, layouts, micro_batch_within, step_cost

LEAST = 4  # images at a time, as the paper's tokenizers have; fewer only where nothing else fits


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The fastest way that fits, or, with a micro-batch of 0, the one that is nearest to fitting."""

    machine: Machine
    stage: Stage  # with its recomputation
    layout: Layout
    micro_batch: int
    needed: float  # bytes a GPU, of a single image where nothing fits
    seconds: float = 0.0  # a step

    @property
    def fits(self) -> bool:
        """Whether the run can be made."""
        return self.micro_batch > 0

    @property
    def recomputation(self) -> str:
        """What the backward pass makes again, as a reader calls it."""
        config = self.stage.config
        if not config.gradient_checkpointing:
            return "nothing"
        return "what is cheap" if config.checkpoint_selective else "all"


def recomputations(stage: Stage) -> Iterator[Stage]:
    """A stage that recomputes nothing, what is cheap, and all: the fastest first, the one of least memory last."""
    for name in ("none", "selective", "full"):
        own = {"gradient_checkpointing": name != "none", "checkpoint_selective": name == "selective"}
        if hasattr(stage.config, "checkpoint_every"):
            own["checkpoint_every"] = 1
        yield replace(stage, config=replace(stage.config, **own))


def propose(stage: Stage, training: Training, machine: Machine) -> Proposal | None:
    """What to take on these GPUs; None where the batch does not divide by them.

    The fastest of all layouts and recomputations, of those within 2% of it the simplest, which comes first. That a
    smaller micro-batch runs at a lower rate is not counted, hence LEAST.
    """
    if training.batch_size % machine.gpus:
        return None
    ways = [
        (one, layout)
        for one in recomputations(stage)
        for layout in layouts(one, machine)
        if training.batch_size % layout.data == 0
    ]
    fitting = [found for way in ways if (found := _proposal(*way, training, machine)) is not None]
    if not fitting:
        return _nearest(ways, training, machine)
    large = [found for found in fitting if found.micro_batch >= min(LEAST, training.batch_size // found.layout.data)]
    best = min(found.seconds for found in large or fitting)
    return next(found for found in large or fitting if found.seconds <= 1.02 * best)


def _proposal(stage: Stage, layout: Layout, training: Training, machine: Machine) -> Proposal | None:
    rows = micro_batch_within(stage, layout, training, machine.usable)
    if not rows:
        return None
    _, seconds = step_cost(stage, layout, replace(training, micro_batch=rows), machine)
    needed = bytes_needed(stage, layout, training, rows)
    return Proposal(machine=machine, stage=stage, layout=layout, micro_batch=rows, needed=needed, seconds=seconds)


def _nearest(ways: Sequence[tuple[Stage, Layout]], training: Training, machine: Machine) -> Proposal:
    found = [
        Proposal(
            machine=machine, stage=one, layout=layout, micro_batch=0, needed=bytes_needed(one, layout, training, 1)
        )
        for one, layout in ways
    ]
    return min(found, key=lambda proposal: proposal.needed)
