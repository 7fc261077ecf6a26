"""Memory of a step of training on one GPU: what lies there in each phase of the step, and in the fullest.

Everything that grows with the parameters is bytes per element (`Rules`, one set an engine); everything that grows with
the batch comes from the tables of saved tensors. A step is walked through: the end of the forward pass, the head's
backward pass, that of every block, the end of the backward pass, the update. The fullest phase is the peak.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

KINDS = ("weights", "gradients", "optimizer", "ema", "activations", "head", "buffers")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Bytes an element of the parameters costs on this rank."""

    weights: float  # at all times, with masters
    optimizer: float  # moments
    ema: float
    gradient: float  # once its backward pass is over
    gathered: float = 0.0  # a block in use
    ahead: float = 0.0  # the block that is gathered while another is in use
    passing: float = 0.0  # gradients of a block between backward pass and reduction
    root_gathered: float = 0.0  # parameters outside the blocks, for the whole step
    root_passing: float = 0.0  # their gradients, until the end of the backward pass
    cast: float = 0.0  # autocast's copy of a product's weight
    buckets: float = 0.0  # at all times
    gradients_stay: bool = False  # their memory is never given back
    held: float = 0.0  # weights of products that autograd holds gathered until their backward pass
    live: float = 0.0  # other weights that stay gathered for a while, at most so many:
    live_elements: float = 0.0
    at_end: float = 0.0  # at the end of the backward pass
    at_end_bytes: float = 0.0  # at most so many
    update: float = 0.0  # during the update
    update_bytes: float = 0.0  # at most so many
    fixed: float = 0.0  # bytes at all times, whatever the size of the model
    bucket: float = 0.0  # bytes of gradients on their way, at most


@dataclass(frozen=True, kw_only=True)
class Block:
    """Elements and bytes of one block on this rank."""

    elements: float
    products: float  # of them, weights of matrix products
    kept: float  # bytes between forward and backward pass
    saved: float  # bytes once all that its backward pass needs is there
    working: float  # bytes of temporaries in its backward pass
    recomputed: bool = False


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network on this rank, for one micro-batch."""

    blocks: Sequence[Block]
    root: float  # elements outside the blocks
    root_late: float  # of them, those whose gradient comes at the end of the backward pass
    root_products: float = 0.0  # of them, weights that autocast copies
    root_saved: float = 0.0  # bytes saved outside the blocks
    head_saved: float = 0.0
    head_forward: float = 0.0  # bytes of temporaries in the head's forward pass
    head_backward: float = 0.0
    extra: float = 0.0  # bytes of other networks, at all times

    @property
    def elements(self) -> float:
        """All parameters on this rank, before sharding."""
        return self.root + sum(block.elements for block in self.blocks)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by kind in the fullest phase."""

    phase: str
    kinds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Bytes of all kinds."""
        return sum(self.kinds.values())


def peak_memory(network: Network, rules: Rules, *, accumulated: bool) -> Memory:
    """The fullest phase of a step; `accumulated`: gradients of earlier micro-batches are there from the start."""
    return max(step_phases(network, rules, accumulated=accumulated), key=lambda memory: memory.total)


def step_phases(network: Network, rules: Rules, *, accumulated: bool) -> Iterator[Memory]:
    """Every phase of a step in order."""
    kept = sum(block.kept for block in network.blocks)
    casts = rules.cast * (network.root_products + sum(block.products for block in network.blocks))
    kept_casts = rules.cast * (
        network.root_products + sum(block.products for block in network.blocks if not block.recomputed)
    )
    done = 0.0  # elements whose gradients are there

    def phase(name: str, **kinds: float) -> Memory:
        base = _static(network, rules)
        base["gradients"] = rules.gradient * (network.elements if accumulated or rules.gradients_stay else done)
        for kind, size in kinds.items():
            base[kind] += size
        return Memory(phase=name, kinds=base)

    gathered_root = rules.root_gathered * network.root
    # What autograd holds is part of what is live.
    held = rules.held * sum(block.products for block in network.blocks if not block.recomputed)
    held_at_head = held + rules.held * (network.root - network.root_late)
    live = rules.live * min(network.elements, rules.live_elements)
    passing = min(rules.bucket, 8 * network.elements)
    saved = network.root_saved + kept
    widest = max((block.working for block in network.blocks), default=0.0)
    last = network.blocks[-1].elements if network.blocks else 0.0
    yield phase(
        "forward pass",
        weights=gathered_root + max(held_at_head, live) + (rules.gathered + rules.ahead) * last,
        activations=saved + (widest if casts > kept_casts else 0.0),
        head=network.head_saved + network.head_forward,
        buffers=casts,
    )
    late = network.root_late
    done += network.root - late
    yield phase(
        "backward pass of the head",
        weights=gathered_root + max(held_at_head, live) + rules.ahead * last,
        activations=saved,
        head=network.head_saved + network.head_backward,
        buffers=kept_casts + passing + rules.root_passing * (network.root - late),
    )
    for number in reversed(range(len(network.blocks))):
        block = network.blocks[number]
        ahead = network.blocks[number - 1].elements if number else 0.0
        behind = network.blocks[number + 1].elements if number + 1 < len(network.blocks) else 0.0
        cast = rules.cast * block.products if block.recomputed else 0.0
        yield phase(
            f"backward pass of block {number}",
            weights=gathered_root + max(held, live) + rules.gathered * block.elements + rules.ahead * ahead,
            activations=saved - block.kept + block.saved + block.working,
            buffers=kept_casts + cast + rules.passing * max(block.elements, behind)
            + passing + rules.root_passing * (network.root - late),
        )  # fmt: skip
        done += block.elements  # they came one by one: its activations were going by then
        saved -= block.kept
        if not block.recomputed:
            kept_casts -= rules.cast * block.products
            held -= rules.held * block.products
    done += late
    at_end = passing + 2 * rules.root_passing * network.root
    at_end += min(rules.at_end * network.elements, rules.at_end_bytes)
    yield phase("end of the backward pass", weights=gathered_root + live, buffers=at_end)
    at_update = rules.update * network.elements + min(rules.update_bytes, 4 * network.elements)
    yield phase("update", weights=rules.root_gathered * network.root, buffers=at_update)


def _static(network: Network, rules: Rules) -> dict[str, float]:
    kinds = dict.fromkeys(KINDS, 0.0)
    kinds["weights"] = rules.weights * network.elements
    kinds["optimizer"] = rules.optimizer * network.elements
    kinds["ema"] = rules.ema * network.elements
    kinds["buffers"] = rules.buckets * network.elements + rules.fixed + network.extra
    return kinds
