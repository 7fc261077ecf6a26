"""The rules by which a sweep over model sizes and token budgets sets batch, learning rate and steps of each run.

D tokens, T tokens an image, C channels (width) of the transformer; every rule gives, from the values of a base run,

    width         C = width_per_depth x depth, heads = depth              (IBQ, arXiv 2412.02692)
    batch         B = base (D / at_tokens)^exponent, in images            (Step Law, arXiv 2503.04715: B ~ D^0.571)
    learning rate base (C / at_width)^width_exponent (B / batch base)^batch_exponent
                  (-1: muP, arXiv 2203.03466; 0.5: the square-root rule of Adam, arXiv 2205.10343)
    steps         D / (B T), of which warmup_share warm up.

The exponents were found at sizes of large language models; the sweep file can change all of them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ibq.config import require_least
from ibq.data.order import MicroBatch
from ibq.models.transformer import TransformerConfig
from ibq.reports.figures import short_number
from ibq.scaling.transformer import transformer_flops, transformer_parameters


@dataclass(frozen=True, kw_only=True)
class BatchRule:
    """Images in the global batch, by the budget's tokens."""

    base: int = 32  # images
    at_tokens: float = 1e6  # the budget to which `base` belongs
    exponent: float = 0.571
    multiple_of: int = 4  # the batch is rounded to a multiple, at least one

    def __post_init__(self):
        for name in ("base", "at_tokens", "multiple_of"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be positive, got {getattr(self, name)}")

    def batch_size(self, tokens: float) -> int:
        """The batch of a run over so many tokens."""
        batch = self.base * (tokens / self.at_tokens) ** self.exponent
        return max(round(batch / self.multiple_of), 1) * self.multiple_of


@dataclass(frozen=True, kw_only=True)
class RateRule:
    """The peak learning rate, by width and batch."""

    base: float = 2e-3
    at_width: int = 256  # `base` belongs to this width and to the base of the batch rule
    width_exponent: float = -1.0
    batch_exponent: float = 0.5

    def __post_init__(self):
        for name in ("base", "at_width"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be positive, got {getattr(self, name)}")

    def learning_rate(self, width: int, batch_ratio: float) -> float:
        """The rate for a width and a batch of so many times the base, to four digits."""
        rate = self.base * (width / self.at_width) ** self.width_exponent * batch_ratio**self.batch_exponent
        return float(f"{rate:.4g}")


@dataclass(frozen=True, kw_only=True)
class ScalingRules:
    """How the settings of a run follow from its depth and its tokens."""

    width_per_depth: int = 64
    batch_size: BatchRule = field(default_factory=BatchRule)
    learning_rate: RateRule = field(default_factory=RateRule)
    warmup_share: float = 0.1  # of the steps
    validations: int = 4  # in equal distances, the last at the end

    def __post_init__(self):
        require_least(self, width_per_depth=1, validations=1)
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share: must lie in [0, 1), got {self.warmup_share}; it is a share of the steps")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Transformers of several depths, each trained over several token budgets."""

    depths: tuple[int, ...]
    tokens: tuple[float, ...] = ()  # budgets; give either these ...
    tokens_per_parameter: tuple[float, ...] = ()  # ... or these, which grow with the model
    held_out: tuple[int, ...] = ()  # depths that tools/fit_scaling.py predicts instead of fitting
    max_flops: float | None = None  # runs that cost more are left out
    rules: ScalingRules = field(default_factory=ScalingRules)

    def __post_init__(self):
        if not self.depths or min(self.depths) < 1 or len(set(self.depths)) < len(self.depths):
            raise ValueError(f"depths: must be different whole numbers from 1, got {list(self.depths)}")
        if bool(self.tokens) == bool(self.tokens_per_parameter):
            raise ValueError("tokens: give either `tokens: [...]` or `tokens_per_parameter: [...]`")
        for name in ("tokens", "tokens_per_parameter"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or not all(0 < value < math.inf for value in values):
                raise ValueError(f"{name}: must be different positive numbers, got {list(values)}")
        for depth in self.held_out:
            if depth not in self.depths:
                raise ValueError(f"held_out: {depth} is not among the depths {list(self.depths)}")


@dataclass(frozen=True, kw_only=True)
class ScalingRun:
    """One run that the rules give."""

    name: str
    model: TransformerConfig
    batch_size: int
    micro_batch: MicroBatch
    learning_rate: float
    steps: int
    warmup_steps: int
    validate_every: int
    held_out: bool

    @property
    def flops(self) -> int:
        """What its training costs."""
        return transformer_flops(self.model).textbook * self.batch_size * self.steps

    @property
    def overrides(self) -> tuple[str, ...]:
        """Its settings, as the training script takes them."""
        model = self.model
        return (
            f"model.depth={model.depth}",
            f"model.width={model.model_width}",
            f"model.heads={model.num_heads}",
            f"training.batch_size={self.batch_size}",
            f"training.micro_batch={self.micro_batch}",
            f"training.max_steps={self.steps}",
            f"training.validate_every={self.validate_every}",
            f"optimizer.learning_rate={self.learning_rate:g}",
            "optimizer.scale_learning_rate=false",
            f"schedule.warmup_steps={self.warmup_steps}",
        )


def scaling_runs(config: ScalingConfig, model: TransformerConfig, micro_batch: MicroBatch) -> list[ScalingRun]:
    """The runs of all depths and budgets, the longest first, so that the sweep does not end with a long one alone.

    `model` gives what all runs share, such as the vocabulary; micro-batches are the largest divisors of the batches up
    to `micro_batch`, or each run's own if it is "auto". ValueError, which begins with the key, where the model cannot
    be, or where no run is left.
    """
    runs = sorted(_all_runs(config, model, micro_batch), key=lambda run: -run.flops)
    left = [run for run in runs if config.max_flops is None or run.flops <= config.max_flops]
    if not left:
        raise ValueError(f"max_flops: all runs cost more, the cheapest {runs[-1].flops:.3g}; raise it or leave it out")
    if len({run.name for run in left}) < len(left):
        raise ValueError("tokens: two budgets have the same name to four digits; make them differ more")
    return left


def _all_runs(config: ScalingConfig, model: TransformerConfig, micro_batch: MicroBatch) -> Iterator[ScalingRun]:
    rules = config.rules
    for depth in config.depths:
        try:
            sized = replace(model, depth=depth, width=rules.width_per_depth * depth, heads=depth)
        except ValueError as error:
            raise ValueError(f"rules.width_per_depth: depth {depth}: {error}") from error
        count = transformer_parameters(sized)
        budgets = [(short_number(tokens), tokens) for tokens in config.tokens]
        budgets += [(f"{ratio:.4g}x", ratio * count) for ratio in config.tokens_per_parameter]
        for name, tokens in budgets:
            yield _run(f"d{depth}-{name}", sized, tokens, micro_batch, rules, held_out=depth in config.held_out)


def _run(
    name: str, model: TransformerConfig, tokens: float, micro_batch: MicroBatch, rules: ScalingRules, *, held_out: bool
) -> ScalingRun:
    batch = rules.batch_size.batch_size(tokens)
    steps = max(round(tokens / (batch * model.num_tokens)), 1)
    if micro_batch != "auto":
        micro_batch = max(size for size in range(1, min(micro_batch, batch) + 1) if batch % size == 0)
    return ScalingRun(
        name=name,
        model=model,
        batch_size=batch,
        micro_batch=micro_batch,
        learning_rate=rules.learning_rate.learning_rate(model.model_width, batch / rules.batch_size.base),
        steps=steps,
        warmup_steps=round(rules.warmup_share * steps),
        validate_every=math.ceil(steps / rules.validations),
        held_out=held_out,
    )
