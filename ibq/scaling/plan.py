"""Which layouts a run could use on given GPUs, what each needs, and which to take."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ibq.config import UserError
from ibq.engine.configs import EngineConfig, FsdpEngineConfig, LocalEngineConfig, ModelSize, ZeroEngineConfig
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import TransformerConfig
from ibq.scaling.hardware import GIB, Gpu
from ibq.scaling.heads import inner_config
from ibq.scaling.layouts import Layout, Training, rules
from ibq.scaling.memory import Memory, Network, peak_memory
from ibq.scaling.networks import TokenizerLosses, frozen_tokenizer, tokenizer_network, transformer_network
from ibq.scaling.tokenizer import decoder_flops, tokenizer_flops, tokenizer_parts
from ibq.scaling.tokenizer_losses import (
    discriminator_flops,
    discriminator_layers,
    feature_layers,
    gram_flops,
    perceptual_flops,
    perceptual_layers,
)
from ibq.scaling.traffic import Traffic, exposed_seconds, parameter_traffic, tensor_traffic
from ibq.scaling.transformer import (
    EXACT,
    Flops,
    model_size,
    transformer_flops,
    transformer_weights,
    unsplit_flops,
)

LARGEST = 2**16  # micro-batch that is looked at


class Stage(ABC):
    """What the planner must know of a stage."""

    config: TransformerConfig | TokenizerConfig
    num_tokens: int  # per image, of the largest where there are several shapes: time and memory are those of it alone
    measured_mfu: float  # share of a GPU's dense bf16 rate; of one H100: see tools/lib/bench/README.md

    @property
    def common_tokens(self) -> int:
        """What sequence parallelism must divide."""
        return self.num_tokens

    @abstractmethod
    def parameters(self) -> dict[str, int]:
        """Parameters by part."""

    @abstractmethod
    def flops(self) -> dict[str, Flops]:
        """FLOPs of one image by part."""

    @abstractmethod
    def network(self, layout: Layout, training: Training) -> Network:
        """What a micro-batch puts on a GPU."""

    def tensor_bytes(self, layout: Layout, training: Training) -> float:
        """Bytes of activations that tensor parallelism sends per rank and step."""
        return 0.0

    def rank_flops(self, layout: Layout) -> float:
        """FLOPs of a rank for one image, recomputed ones too."""
        return sum(part.textbook + part.recomputed for part in self.flops().values())

    def tensor_sizes(self) -> dict[str, int]:
        """What tensor parallelism must divide; empty where it cannot be used."""
        return {}

    def size(self) -> ModelSize:
        """What ZeRO's sizes follow from; UserError where it cannot be used."""
        raise UserError("engine.kind: zero is for transformers; use local or fsdp for a tokenizer")


@dataclass(frozen=True)
class TransformerStage(Stage):
    """Training of a transformer on codes, or on images through a frozen tokenizer."""

    config: TransformerConfig
    tokenizer: TokenizerConfig | None = None
    measured_mfu = 0.34

    @property
    def num_tokens(self) -> int:
        """Codes of an image."""
        return self.config.num_tokens

    @property
    def common_tokens(self) -> int:
        """See `Stage`."""
        return self.config.common_tokens

    def parameters(self) -> dict[str, int]:
        """See `Stage`."""
        weights = transformer_weights(self.config)
        names = {"embeddings": "embeddings", "head_norm": "final norm", "head": "head", "shared": "shared norms' layer"}
        found = {f"{self.config.depth} blocks": self.config.depth * weights["block"].count}
        if (inner := inner_config(self.config)) is not None:
            found[f"{inner.depth} inner blocks"] = inner.depth * weights["inner"].count
        return found | {text: weights[name].count for name, text in names.items() if weights[name].count}

    def flops(self) -> dict[str, Flops]:
        """See `Stage`."""
        return {"transformer": transformer_flops(self.config)}

    def network(self, layout: Layout, training: Training) -> Network:
        """See `Stage`."""
        network = transformer_network(self.config, layout, training)
        if self.tokenizer is None:
            return network
        return replace(network, extra=network.extra + frozen_tokenizer(self.tokenizer, training))

    def tensor_bytes(self, layout: Layout, training: Training) -> float:
        """See `Stage`."""
        return tensor_traffic(self.config, layout, training)

    def rank_flops(self, layout: Layout) -> float:
        """See `Stage`."""
        flops, whole = transformer_flops(self.config), unsplit_flops(self.config, layout.tensor)
        return (flops.textbook + flops.recomputed - whole) / layout.tensor + whole

    def tensor_sizes(self) -> dict[str, int]:
        """See `Stage`."""
        if not self.config.is_plain:
            return {}
        return {"heads": self.config.num_heads, "key and value heads": self.config.num_kv_heads}

    def size(self) -> ModelSize:
        """See `Stage`."""
        return model_size(self.config)


@dataclass(frozen=True)
class TokenizerStage(Stage):
    """Training of a tokenizer against LPIPS and a discriminator."""

    config: TokenizerConfig
    losses: TokenizerLosses
    measured_mfu = 0.1

    @property
    def num_tokens(self) -> int:
        """Codes of an image."""
        return self.config.tokens_per_side**2

    def parameters(self) -> dict[str, int]:
        """See `Stage`."""
        found = dict.fromkeys(("encoder", "quantizer", "decoder"), 0)
        for part in tokenizer_parts(self.config, EXACT):
            found[part.name.split(".")[0]] += part.parameters
        side = self.config.resolution
        if self.losses.discriminator is not None:
            layers = discriminator_layers(self.losses.discriminator, side, EXACT)
            found["discriminator"] = sum(layer.parameters for layer in layers)
            if frozen := feature_layers(self.losses.discriminator, EXACT):
                found["features (frozen)"] = sum(layer.parameters for layer in frozen)
        if self.losses.perceptual:
            found["LPIPS (frozen)"] = sum(layer.parameters for layer in perceptual_layers(side, EXACT))
        return found

    def flops(self) -> dict[str, Flops]:
        """See `Stage`."""
        found = {"tokenizer": tokenizer_flops(self.config)}
        if self.losses.discriminator is not None:
            found["discriminator"] = discriminator_flops(self.losses.discriminator, self.config.resolution)
        if self.losses.perceptual:
            found["LPIPS"] = perceptual_flops(self.config.resolution)
        if self.losses.gram is not None:
            found["Gram"] = gram_flops(self.losses.gram, self.losses.discriminator, self.config.resolution)
        return found

    def network(self, layout: Layout, training: Training) -> Network:
        """See `Stage`."""
        return tokenizer_network(self.config, self.losses, layout, training)


@dataclass(frozen=True)
class DecoderStage(TokenizerStage):
    """Training of a tokenizer's decoder alone; the rest makes codes. A transformer that draws some is not counted."""

    def flops(self) -> dict[str, Flops]:
        """See `Stage`."""
        return super().flops() | {"tokenizer": decoder_flops(self.config)}

    def network(self, layout: Layout, training: Training) -> Network:
        """See `Stage`."""
        network = tokenizer_network(self.config, self.losses, layout, training, trained="decoder")
        frozen = frozen_tokenizer(self.config, training, decoder=False)
        return replace(network, extra=network.extra + frozen)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPUs, and what is assumed of them."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int = 8
    reserve: float = 4 * GIB  # bytes a GPU: CUDA's context, collectives' buffers, fragmentation
    mfu: float = 0.34  # share of the GPU's dense bf16 rate that all FLOPs run at, recomputed ones too

    @property
    def usable(self) -> float:
        """Bytes a GPU that a run can fill."""
        return self.gpu.memory - self.reserve


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout."""

    layout: Layout
    memory: Memory  # with the micro-batch of the config
    largest: int  # micro-batch that fits, 0 if none does
    micro_batch: int  # the largest that fits and divides the batch, 0 if none
    traffic: Traffic | None  # with that
    seconds: float  # per step, infinite where nothing fits

    @property
    def fits(self) -> bool:
        """Whether the run can be made this way with some micro-batch."""
        return self.micro_batch > 0


def layouts(stage: Stage, machine: Machine) -> Iterator[Layout]:
    """Every layout worth a look, the simplest first; on one GPU there is nothing to shard, only to offload."""
    common = {"gpus": machine.gpus, "gpus_per_node": machine.gpus_per_node}
    several = machine.gpus > 1
    yield Layout(kind="local", **common)
    if isinstance(stage, TransformerStage):  # DeepSpeed is for them
        if several:
            yield from (zero_layout(ZeroEngineConfig(stage=number), stage, machine) for number in (1, 2, 3))
        for optimizer, parameters in (("cpu", "none"), ("cpu", "cpu"), ("nvme", "none"), ("nvme", "nvme")):
            moved = {"offload_optimizer": optimizer, "offload_parameters": parameters}
            yield zero_layout(ZeroEngineConfig(nvme_path="any", **moved), stage, machine)
    if several:
        yield Layout(kind="fsdp", **common)
    if machine.gpus > machine.gpus_per_node and machine.gpus % machine.gpus_per_node == 0:
        yield Layout(kind="fsdp", shard_ranks=machine.gpus_per_node, **common)
    yield Layout(kind="fsdp", offload_optimizer="cpu", **common)
    for tensor in tensor_divisors(stage, machine):
        yield Layout(kind="fsdp", tensor=tensor, **common)
        if stage.common_tokens % tensor == 0:
            yield Layout(kind="fsdp", tensor=tensor, sequence=True, **common)


def layout_of(engine: EngineConfig, stage: Stage, machine: Machine) -> Layout:
    """The layout of a config's engine on these GPUs; UserError where it cannot be used or the numbers do not divide."""
    common = {"gpus": machine.gpus, "gpus_per_node": machine.gpus_per_node}
    match engine:
        case LocalEngineConfig():
            return Layout(kind="local", **common)
        case ZeroEngineConfig():
            return zero_layout(engine, stage, machine)
        case FsdpEngineConfig():
            ranks = None
            if engine.shard == "hybrid":
                on_node = min(machine.gpus, machine.gpus_per_node)
                explicit = replace(engine, shard_ranks=engine.shard_ranks or max(1, on_node // engine.tensor_parallel))
                ranks = explicit.mesh_sizes(machine.gpus)[1]
            else:
                engine.mesh_sizes(machine.gpus)
            share = ranks or machine.gpus // engine.tensor_parallel
            return Layout(
                kind="fsdp",
                shard_ranks=ranks,
                offload_optimizer=engine.offload,
                tensor=engine.tensor_parallel,
                sequence=engine.sequence_parallel,
                reduces_each=engine.reduce == "each",
                reshards=engine.reshards(share),
                **common,
            )


def zero_layout(engine: ZeroEngineConfig, stage: Stage, machine: Machine) -> Layout:
    """The layout of DeepSpeed's ZeRO with its sizes for what is trained; UserError for a tokenizer."""
    sizes = engine.sizes(stage.size(), machine.gpus)
    return Layout(
        kind="zero",
        gpus=machine.gpus,
        gpus_per_node=machine.gpus_per_node,
        stage=engine.stage,
        offload_optimizer=engine.offload_optimizer,
        offload_parameters=engine.offload_parameters,
        reduce_dtype=engine.reduce_dtype,
        bucket=sizes.reduce_bucket_size,
        gather=sizes.prefetch_bucket_size if engine.stage == 3 else sizes.allgather_bucket_size,
        live=sizes.max_live_parameters,
        sub_group=sizes.sub_group_size,
    )


def tensor_divisors(stage: Stage, machine: Machine) -> list[int]:
    """Numbers of ranks that can share each matrix within a machine."""
    if not (sizes := stage.tensor_sizes()):
        return []
    common = math.gcd(*sizes.values(), machine.gpus)
    limit = min(machine.gpus_per_node, machine.gpus)
    return [number for number in range(2, limit + 1) if common % number == 0 and limit % number == 0]


@lru_cache(maxsize=2**14)
def memory(stage: Stage, layout: Layout, training: Training) -> Memory:
    """What a rank needs in the fullest phase of a step."""
    network = stage.network(layout, training)
    return peak_memory(network, rules(layout, training), accumulated=training.accumulation(layout) > 1)


def plan(stage: Stage, training: Training, machine: Machine, choices: Sequence[Layout]) -> list[Row]:
    """The figures of every layout."""
    return [_row(stage, layout, training, machine) for layout in choices]


def _row(stage: Stage, layout: Layout, training: Training, machine: Machine) -> Row:
    found = memory(stage, layout, training)
    micro_batch = micro_batch_within(stage, layout, training, machine.usable)
    largest = max(_largest(stage, layout, training, machine.usable), micro_batch)
    if not micro_batch:
        return Row(layout=layout, memory=found, largest=0, micro_batch=0, traffic=None, seconds=math.inf)
    traffic, seconds = step_cost(stage, layout, replace(training, micro_batch=micro_batch), machine)
    return Row(layout=layout, memory=found, largest=largest, micro_batch=micro_batch, traffic=traffic, seconds=seconds)


def step_cost(stage: Stage, layout: Layout, chosen: Training, machine: Machine) -> tuple[Traffic, float]:
    """(what a rank sends, seconds) of a step."""
    traffic = parameter_traffic(stage.network(layout, chosen), layout, chosen)
    traffic = replace(traffic, tensor=stage.tensor_bytes(layout, chosen))
    flops = chosen.batch_size / layout.data * stage.rank_flops(layout)  # of a rank in one step
    compute = flops / (machine.gpu.flops * machine.mfu)
    return traffic, compute + exposed_seconds(traffic, layout, machine.gpu, compute)


def bytes_needed(stage: Stage, layout: Layout, training: Training, rows: int) -> float:
    """Bytes of a micro-batch of so many; with accumulation, unless it is all that a rank has of a batch."""
    batch = rows * layout.data * (1 if rows >= training.batch_size // layout.data else 2)
    return memory(stage, layout, replace(training, micro_batch=rows, batch_size=batch)).total


def micro_batch_within(stage: Stage, layout: Layout, training: Training, usable: float) -> int:
    """The largest micro-batch that needs no more than `usable` bytes and divides a rank's share of a batch; 0: none."""
    share = training.batch_size // layout.data
    sizes = (size for size in range(share, 0, -1) if share % size == 0)
    return next((size for size in sizes if bytes_needed(stage, layout, training, size) <= usable), 0)


def _largest(stage: Stage, layout: Layout, training: Training, usable: float) -> int:
    """The largest micro-batch that fits, up to LARGEST; memory grows with the micro-batch."""
    low, high = 0, LARGEST + 1  # fits; does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = bytes_needed(stage, layout, training, middle) <= usable
        low, high = (middle, high) if fits else (low, middle)
    return low


def recommend(rows: Sequence[Row]) -> Row | None:
    """The fastest layout that fits; of those within 2% of it the simplest, which comes first."""
    fitting = [row for row in rows if row.fits]
    if not fitting:
        return None
    best = min(row.seconds for row in fitting)
    return next(row for row in fitting if row.seconds <= 1.02 * best)
