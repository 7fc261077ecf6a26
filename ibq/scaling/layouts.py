"""Layouts: how a network lies on many GPUs, what an element costs there, and what is sent.

Let P be the parameters, n the ranks that share one copy of the state ("shard"), t those that share each matrix
("tensor"), d = GPUs / t the ranks that see different data, m the micro-batches a rank makes per step. Each rank sends,
by rings (a reduce-scatter or all-gather of S bytes sends S (n - 1) / n, an all-reduce twice that):

- DDP: an all-reduce of the float32 gradients, once a step: 2 (d - 1) / d 4 P.
- ZeRO-1: a reduce-scatter of the float32 gradients once a step (with bf16 an all-reduce) and an all-gather of the new
  weights. ZeRO-2: the reduce-scatter in every micro-batch. ZeRO-3: two all-gathers of the weights and a reduce-scatter
  of the gradients in every micro-batch.
- FSDP2: in every micro-batch all-gathers of the blocks for the forward and for the backward pass, one of the rest (its
  weights stay), and once a step (or in every micro-batch) a reduce-scatter of the float32 gradients; hybrid: within a
  group of n ranks, and an all-reduce of each rank's 1 / n between the groups.
- Tensor parallelism, in every micro-batch: an all-reduce of [tokens, C] after each of the two parts of a block and in
  the backward pass before each, after the embedding, and before the head; with full checkpointing the forward ones
  twice. Sequence parallelism sends as much, as reduce-scatters and all-gathers.
"""

import math
from dataclasses import dataclass
from typing import Literal

from ibq.engine.configs import ZeroEngineConfig
from ibq.scaling.memory import Rules
from ibq.scaling.transformer import Device, Numerics

ALLREDUCE = 500_000_000  # elements that DeepSpeed reduces at a time in stage 1 with bf16
Target = Literal["none", "cpu", "nvme"]
Precision = Literal["fp32", "bf16"]
BYTES = {"fp32": 4.0, "bf16": 2.0}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One engine with its settings, on so many GPUs."""

    kind: Literal["local", "zero", "fsdp"]
    gpus: int
    gpus_per_node: int = 8
    stage: int = 0  # of ZeRO
    offload_optimizer: Target = "none"  # for FSDP: of everything that is sharded
    offload_parameters: Target = "none"
    shard_ranks: int | None = None  # of FSDP: ranks that share one copy; None: all
    tensor: int = 1
    sequence: bool = False
    reduces_each: bool = False  # FSDP's gradients, in every micro-batch instead of once a step
    reshards: bool = True  # FSDP's blocks are gathered for each of their passes
    reduce_dtype: Precision = "fp32"  # in which ZeRO averages gradients
    bucket: int = 0  # elements of ZeRO's buckets of gradients
    gather: int = 0  # elements that ZeRO gathers at a time, or ahead of their use
    live: int = 0  # elements that ZeRO-3 keeps gathered
    sub_group: int = 0  # elements that ZeRO-3 updates at a time

    @property
    def shard(self) -> int:
        """Ranks that share one copy of what the layout shards."""
        if self.kind == "local" or (self.kind == "zero" and self.stage == 0):
            return 1
        return self.shard_ranks or self.data

    @property
    def data(self) -> int:
        """Ranks that see different data."""
        return self.gpus // self.tensor

    @property
    def copies(self) -> int:
        """Groups that each hold all of the state."""
        return self.data // self.shard

    @property
    def name(self) -> str:
        """What a reader calls it."""
        if self.kind == "local":
            return "one process" if self.gpus == 1 else "DDP"
        if self.kind == "zero":
            return f"ZeRO-{self.stage}{self._offloaded()}"
        words = ["FSDP2 hybrid" if self.copies > 1 else "FSDP2"]
        if self.tensor > 1:
            words.append(f"x tensor {self.tensor}" + (" + sequence" if self.sequence else ""))
        if self.offload_optimizer != "none":
            words.append("on cpu")
        return " ".join(words)

    def _offloaded(self) -> str:
        optimizer, weights = self.offload_optimizer, self.offload_parameters
        if optimizer == weights:
            return "" if weights == "none" else f", optimizer + weights on {weights}"
        parts = [
            f"{what} on {where}" for what, where in (("optimizer", optimizer), ("weights", weights)) if where != "none"
        ]
        return f", {', '.join(parts)}"


@dataclass(frozen=True, kw_only=True)
class Training:
    """What of a run's settings matters for its size."""

    precision: Precision
    micro_batch: int
    batch_size: int
    moments: int = 8  # bytes an element of the optimizer's state: 0 for plain SGD
    ema: bool = True
    device: Device = "cuda"

    def accumulation(self, layout: Layout) -> int:
        """Micro-batches a rank makes per step."""
        return self.batch_size // (self.micro_batch * layout.data)


def numerics(layout: Layout, training: Training) -> Numerics:
    """How an engine computes.

    bf16 is autocast over float32 weights under DDP (and ZeRO-0): the residual stream stays float32. FSDP2 casts the
    blocks' weights and inputs to bf16 and leaves the rest to autocast; ZeRO computes in bf16 throughout.
    """
    device = training.device
    if training.precision == "fp32":
        return Numerics(stream=4, compute=4, root=4, device=device)
    if layout.kind == "local" or (layout.kind == "zero" and layout.stage == 0):
        return Numerics(stream=4, compute=2, root=4, casts=True, device=device)
    if layout.kind == "fsdp":
        return Numerics(stream=2, compute=2, root=4, device=device)
    return Numerics(stream=2, compute=2, root=2, device=device)


def rules(layout: Layout, training: Training) -> Rules:
    """What an element of the parameters costs on a GPU."""
    moments, ema = float(training.moments), 4.0 if training.ema else 0.0
    bf16 = training.precision == "bf16"
    match layout.kind:
        case "local":
            # DDP copies the gradients into buckets of its own.
            buckets = 4.0 if layout.gpus > 1 else 0.0
            return Rules(weights=4, optimizer=moments, ema=ema, gradient=4, cast=2.0 * bf16, buckets=buckets)
        case "fsdp":
            whole = training.accumulation(layout) > 1 and not layout.reduces_each
            return _fsdp(layout, moments, ema, 2.0 if bf16 else 4.0, whole=whole)
        case "zero":
            return _zero(layout, training, moments, ema)


def _fsdp(layout: Layout, moments: float, ema: float, compute: float, *, whole: bool) -> Rules:
    """Float32 shards; a block is gathered into a buffer and copied out of it, the next one's buffer fills meanwhile.

    Its gradients come whole, in the computation's dtype, and are copied to a float32 buffer to be reduced, which is
    freed when the next block's are; `whole`: until the last micro-batch they are summed up in float32 first. Without
    resharding gathered weights stay.
    """
    n = layout.shard
    here = 0.0 if layout.offload_optimizer != "none" else 1.0
    stay = {} if layout.reshards else {"gathered": 0.0, "ahead": 0.0, "live": compute, "live_elements": math.inf}
    return Rules(
        weights=here * 4 / n,
        optimizer=here * moments / n,
        ema=here * ema / n,
        gradient=4.0 if whole else here * 4 / n,
        passing=compute + 4,
        root_gathered=4,
        root_passing=4,
        **({"gathered": compute, "ahead": compute} | stay),
    )


def _zero(layout: Layout, training: Training, moments: float, ema: float) -> Rules:
    """Weights in the computation's dtype beside sharded float32 masters (also where they are float32 themselves).

    Stage 1 keeps all gradients until the update, in bf16 also float32 sums of them, which it copies to be reduced; from
    stage 2 on a rank keeps its part of them, and whole ones only until a bucket is full. A bucket is laid out for the
    reduction, and before that copied if gradients are reduced in another dtype. Stage 3 frees a gathered weight after
    its unit, but without compilation autograd saves the weight of a matrix product as a view of the same memory, which
    so stays until the backward pass: only recomputed blocks give theirs up. One rank has its weights at all times.
    """
    n, stage, elements = layout.shard, layout.stage, {"bucket_elements": float(layout.bucket)}
    compute = BYTES[training.precision]
    if stage == 0:
        cast = 2.0 if compute == 2 else 0.0
        return Rules(weights=4, optimizer=moments, ema=ema, gradient=4, cast=cast, bucket=4.0, **elements)
    engine = _engine(layout)
    averaged, kept = (BYTES[name] for name in engine.gradients_in(training.precision, training.accumulation(layout), n))
    state = 0.0 if layout.offload_optimizer != "none" else 1.0
    part = state * 4 / n  # of masters, and of anything else in float32
    common = {"optimizer": state * moments / n, "ema": state * ema / n}
    if stage == 1 and compute == 2:
        gradients = {"gradient": 4 + compute, "gradients_stay": True, "at_end": 4, "at_end_bytes": 4.0 * ALLREDUCE}
        return Rules(weights=compute + part, **gradients, **common)
    if stage == 1:
        return Rules(weights=compute + part, gradient=4, update=part, bucket=4.0, **elements, **common)
    if stage == 2:
        gradients = {"gradient": part, "bucket": averaged + compute, **elements}
        return Rules(weights=compute + part, update=part, **gradients, **common)
    own = 0.0 if layout.offload_parameters != "none" else compute / n
    gathered = {"held": compute, "live": compute, "live_elements": layout.live + layout.gather}
    return Rules(
        weights=own + part,
        gradient=state * kept / n,
        gradients_stay=True,
        bucket=compute + averaged + (averaged if averaged != compute else 0.0),
        update_bytes=state * layout.sub_group * (4.0 if kept == 4 else 4.0 + kept),
        **({} if engine.keeps_weights(n) else gathered),
        **elements,
        **common,
    )


def _engine(layout: Layout) -> ZeroEngineConfig:
    """The settings of a layout of ZeRO that say how it works."""
    return ZeroEngineConfig(
        stage=layout.stage,
        offload_optimizer=layout.offload_optimizer,
        offload_parameters=layout.offload_parameters,
        nvme_path="any",
        reduce_dtype=layout.reduce_dtype,
    )
