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
    bucket: float = 0.0  # of gradients on their way, at most so many:
    bucket_elements: float = 0.0


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
    whole = accumulated or rules.gradients_stay

    def phase(name: str, done: float, kinds: dict[str, float]) -> Memory:
        base = _static(network, rules)
        base["gradients"] = rules.gradient * (network.elements if whole else done)
        return Memory(phase=name, kinds={kind: size + kinds.get(kind, 0.0) for kind, size in base.items()})

    yield phase("forward pass", 0.0, _forward(network, rules))
    done = network.root - network.root_late
    yield phase("backward pass of the head", done, _head(network, rules))
    for number in reversed(range(len(network.blocks))):
        # The block's own gradients come one by one, while its activations go.
        yield phase(f"backward pass of block {number}", done, _block(network, rules, number))
        done += network.blocks[number].elements
    yield phase("end of the backward pass", network.elements, _end(network, rules))
    buffers = rules.update * network.elements + min(rules.update_bytes, 4 * network.elements)
    kinds = {"weights": rules.root_gathered * network.root, "buffers": buffers}
    yield phase("update", network.elements, kinds)


def _static(network: Network, rules: Rules) -> dict[str, float]:
    """What is there at all times."""
    kinds = dict.fromkeys(KINDS, 0.0)
    kinds["weights"] = rules.weights * network.elements
    kinds["optimizer"] = rules.optimizer * network.elements
    kinds["ema"] = rules.ema * network.elements
    kinds["buffers"] = rules.buckets * network.elements + network.extra
    return kinds


def _waiting(network: Network, blocks: int) -> float:
    """Elements of product weights, in the first so many blocks, that are saved for their backward pass."""
    return sum(block.products for block in network.blocks[:blocks] if not block.recomputed)


def _gathered(network: Network, rules: Rules, waiting: float) -> float:
    """Bytes of gathered weights outside the block in use; what autograd holds is part of what is live."""
    live = rules.live * min(network.elements, rules.live_elements)
    return rules.root_gathered * network.root + max(rules.held * waiting, live)


def _passing(network: Network, rules: Rules) -> float:
    """Bytes of gradients before they are reduced."""
    return _bucket(network, rules) + rules.root_passing * (network.root - network.root_late)


def _bucket(network: Network, rules: Rules) -> float:
    return rules.bucket * min(rules.bucket_elements, network.elements)


def _forward(network: Network, rules: Rules) -> dict[str, float]:
    """The end of the forward pass. Autocast remembers every copy until then, also for blocks that are recomputed."""
    last = network.blocks[-1].elements if network.blocks else 0.0
    recomputed = rules.cast and any(block.recomputed for block in network.blocks)
    widest = max((block.working for block in network.blocks), default=0.0) if recomputed else 0.0
    head = network.root - network.root_late
    gathered = _gathered(network, rules, _waiting(network, len(network.blocks)) + head)
    return {
        "weights": gathered + (rules.gathered + rules.ahead) * last,
        "activations": network.root_saved + sum(block.kept for block in network.blocks) + widest,
        "head": network.head_saved + network.head_forward,
        "buffers": rules.cast * (network.root_products + sum(block.products for block in network.blocks)),
    }


def _head(network: Network, rules: Rules) -> dict[str, float]:
    """The head's backward pass."""
    last = network.blocks[-1].elements if network.blocks else 0.0
    waiting = _waiting(network, len(network.blocks))
    head = network.root - network.root_late
    return {
        "weights": _gathered(network, rules, waiting + head) + rules.ahead * last,
        "activations": network.root_saved + sum(block.kept for block in network.blocks),
        "head": network.head_saved + network.head_backward,
        "buffers": rules.cast * (network.root_products + waiting) + _passing(network, rules),
    }


def _block(network: Network, rules: Rules, number: int) -> dict[str, float]:
    """A block's backward pass, once it is recomputed if it has to be."""
    blocks, block = network.blocks, network.blocks[number]
    ahead = blocks[number - 1].elements if number else 0.0
    behind = blocks[number + 1].elements if number + 1 < len(blocks) else 0.0
    waiting = _waiting(network, number + 1)
    cast = network.root_products + waiting + (block.products if block.recomputed else 0.0)
    gathered = _gathered(network, rules, waiting)
    return {
        "weights": gathered + rules.gathered * block.elements + rules.ahead * ahead,
        "activations": network.root_saved + sum(other.kept for other in blocks[:number]) + block.saved + block.working,
        "buffers": rules.cast * cast + rules.passing * max(block.elements, behind) + _passing(network, rules),
    }


def _end(network: Network, rules: Rules) -> dict[str, float]:
    """The last gradients, of what is outside the blocks, are reduced."""
    reduced = 2 * rules.root_passing * network.root + min(rules.at_end * network.elements, rules.at_end_bytes)
    return {"weights": _gathered(network, rules, 0.0), "buffers": _bucket(network, rules) + reduced}
