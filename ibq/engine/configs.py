"""What configs say of the engines, which are not read before they are needed: their libraries take a second."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ibq.config import UserError, require_least
from ibq.meeting import number

Target = Literal["none", "cpu", "nvme"]
PERSISTENT = 100_000  # parameters of at most so many elements stay gathered in stage 3 (DeepSpeed's default)


@dataclass(frozen=True, kw_only=True)
class LocalEngineConfig:
    """Whole weights on every rank; DDP averages the gradients when a launcher starts several."""

    kind: Literal["local"] = "local"
    compile: bool | None = None  # torch.compile of every block; by default the transformer's on a GPU


@dataclass(frozen=True, kw_only=True)
class FsdpEngineConfig:
    """Sharding by FSDP2; `hybrid` keeps one copy of the model on every `shard_ranks` ranks (by default a machine)."""

    kind: Literal["fsdp"] = "fsdp"
    shard: Literal["full", "hybrid"] = "full"
    shard_ranks: int | None = None  # of hybrid: ranks that share one copy
    offload: Literal["none", "cpu"] = "none"  # of shards, gradients and optimizer
    tensor_parallel: int = 1  # ranks that share each matrix
    sequence_parallel: bool = False  # they also share the tokens between the matrices
    compile: bool | None = None  # as in `LocalEngineConfig`
    # Gradients are summed over the ranks in the last micro-batch of a step, or in each: that is less memory by the
    # whole gradients in float32, and as many times the traffic.
    reduce: Literal["last", "each"] = "last"
    # Gathered weights are freed after a block's forward pass, and gathered again for its backward pass; by default
    # wherever several ranks share a copy.
    reshard: bool | None = None

    def __post_init__(self):
        require_least(self, tensor_parallel=1)
        if self.reduce not in ("last", "each"):
            raise ValueError(f"reduce: {self.reduce!r} is not possible; choose last or each")
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel: needs tensor_parallel of at least 2")
        if self.shard_ranks is not None and self.shard == "full":
            raise ValueError("shard_ranks: is for shard: hybrid; leave it out")
        require_least(self, shard_ranks=1)

    def reshards(self, shard_ranks: int) -> bool:
        """Whether gathered weights are freed between a block's two passes."""
        return shard_ranks > 1 if self.reshard is None else self.reshard

    def mesh_sizes(self, world_size: int) -> tuple[int, int, int]:
        """(replicate, shard, tensor) ranks; UserError where the numbers do not divide."""
        if world_size % self.tensor_parallel:
            raise UserError(
                f"engine.tensor_parallel: {self.tensor_parallel} does not divide the {world_size} processes; "
                "start a multiple of it"
            )
        ranks = world_size // self.tensor_parallel
        if self.shard == "full":
            return 1, ranks, self.tensor_parallel
        share = self.shard_ranks or max(1, number("LOCAL_WORLD_SIZE", str(ranks)) // self.tensor_parallel)
        if ranks % share:
            raise UserError(
                f"engine.shard_ranks: {share} ranks a copy do not divide the {ranks} that see different data; "
                "choose a divisor"
            )
        return ranks // share, share, self.tensor_parallel


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What of a module decides how much of it ZeRO gathers and reduces at a time; elements."""

    total: int
    unit: int  # the largest of its `units()`, or its largest parameter where it has none
    largest: int  # its largest parameter


@dataclass(frozen=True, kw_only=True)
class ZeroSizes:
    """The sizes of `ZeroEngineConfig` for one model, and what stage 3 keeps; elements."""

    reduce_bucket_size: int
    allgather_bucket_size: int
    prefetch_bucket_size: int
    max_live_parameters: int
    sub_group_size: int
    reuse_distance: int  # weights stay gathered if they are used again after so many others
    persistent: int  # parameters of at most so many elements stay gathered


@dataclass(frozen=True, kw_only=True)
class ZeroEngineConfig:
    """Sharded training by DeepSpeed; sizes count elements, not bytes, and follow from the model where not given.

    In stage 3 a unit of the model (a transformer's block) is gathered as a whole, one ahead of the other, and compiled
    as in the other engines; weights on NVMe are gathered layer by layer, and not compiled.

    With the optimizer on NVMe, its state and the average are files in a folder of this process under `nvme_path`, 16
    bytes per element of its partition; a step reads and writes them once. Weights on NVMe are read for every use.
    """

    kind: Literal["zero"] = "zero"
    stage: Literal[0, 1, 2, 3] = 3
    offload_optimizer: Target = "none"
    offload_parameters: Target = "none"
    nvme_path: str | None = None
    compile: bool | None = None  # as in `LocalEngineConfig`
    # In which precision gradients are averaged over the ranks; micro-batches are summed up in float32 either way.
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    # Stage 3: what is updated (and in memory) at a time; by default an eighth of a rank's elements, but at least a
    # unit, and on NVMe a unit or the largest parameter.
    sub_group_size: int | None = None
    reduce_bucket_size: int | None = None  # gradients reduced at a time; by default those of a unit
    allgather_bucket_size: int | None = None  # stages 1, 2: weights gathered at a time; by default a unit
    prefetch_bucket_size: int | None = None  # stage 3: weights gathered ahead of their use; by default 1.5 units
    # Stage 3: weights gathered at a time; by default 3 units and the largest parameter.
    max_live_parameters: int | None = None
    parameter_buffers: int = 8  # weights from NVMe that are in memory at a time, each as large as the largest
    deepspeed: dict[str, Any] = field(default_factory=dict)  # raw DeepSpeed keys, laid over what is built from these

    def __post_init__(self):
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"stage: {self.stage} is not a ZeRO stage; choose 0, 1, 2 or 3")
        for name in ("offload_optimizer", "offload_parameters"):
            if getattr(self, name) not in ("none", "cpu", "nvme"):
                raise ValueError(f"{name}: {getattr(self, name)} is not possible; choose none, cpu or nvme")
        if self.offload_parameters != "none" and self.stage != 3:
            raise ValueError(f"offload_parameters: needs stage 3, not {self.stage}; set stage to 3, or use none")
        if self.offload_optimizer == "nvme" and self.stage != 3:
            raise ValueError(f"offload_optimizer: nvme needs stage 3, not {self.stage}; set stage to 3, or use cpu")
        if self.offload_optimizer == "cpu" and self.stage == 0:
            raise ValueError("offload_optimizer: stage 0 has nothing to offload; set stage to 1, 2 or 3, or use none")
        if self.uses_nvme and not self.nvme_path:
            raise ValueError("nvme_path: missing; name a folder on the NVMe disk, or offload to cpu")
        if self.reduce_dtype not in ("fp32", "bf16"):
            raise ValueError(f"reduce_dtype: {self.reduce_dtype!r} is not possible; choose fp32 or bf16")
        if self.compile and self.offload_parameters == "nvme":
            raise ValueError("compile: not with offload_parameters: nvme; leave it out, or keep the weights on cpu")
        for name in ("sub_group_size", "reduce_bucket_size", "allgather_bucket_size", "parameter_buffers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: {value} is not positive; leave it out for the default")
        if self.allgather_bucket_size is not None and self.allgather_bucket_size % 2:
            raise ValueError(f"allgather_bucket_size: DeepSpeed wants an even number, not {self.allgather_bucket_size}")

    @property
    def uses_nvme(self) -> bool:
        """Whether anything is kept on NVMe."""
        return "nvme" in (self.offload_optimizer, self.offload_parameters)

    @property
    def whole_units(self) -> bool:
        """Whether stage 3 gathers whole units; what comes from NVMe occupies a buffer for as long as it is gathered."""
        return self.stage == 3 and self.offload_parameters != "nvme"

    @property
    def fills_late(self) -> bool:
        """Whether the module's weights get their initial values from the masters; files would be written twice."""
        return self.stage == 3 and not self.uses_nvme

    def keeps_weights(self, ranks: int) -> bool:
        """Whether weights stay gathered: one rank copies nothing for it, but DeepSpeed would wait at each gathering."""
        return self.stage == 3 and ranks == 1 and self.offload_parameters == "none"

    def sizes(self, model: ModelSize, ranks: int) -> ZeroSizes:
        """The sizes for a model on so many ranks: those given, and for the rest what serves its units."""
        unit, even = model.unit, model.unit + model.unit % 2  # DeepSpeed wants even buckets
        on_nvme = self.offload_optimizer == "nvme"
        derived = {
            "reduce_bucket_size": even,
            "allgather_bucket_size": even,
            "prefetch_bucket_size": -(-3 * unit // 2),
            "max_live_parameters": 3 * unit + model.largest,
            "sub_group_size": max(unit, model.largest if on_nvme else model.total // ranks // 8),
        }
        given = {name: value for name in derived if (value := getattr(self, name)) is not None}
        # A unit is gathered with its small parameters, and apart from units there are few: each one that stays gathered
        # is gathered by a collective of its own after every step, which the device is waited for.
        persistent = 0 if self.whole_units else PERSISTENT
        if self.keeps_weights(ranks):
            persistent = model.total
        return ZeroSizes(**derived | given, reuse_distance=unit, persistent=persistent)

    def gradients_in(self, precision: str, accumulation: int, ranks: int) -> tuple[str, str]:
        """(the precision in which gradients are averaged, that in which a rank keeps its part until the update).

        In stage 3 one rank has nothing to average, and of one micro-batch there is nothing to sum up: then they stay
        as they come from the backward pass.
        """
        bf16 = precision == "bf16" and self.stage == 3
        averaged = "bf16" if bf16 and ranks == 1 else self.reduce_dtype
        alone = bf16 and averaged == "bf16" and accumulation == 1 and self.offload_optimizer == "none"
        return averaged, "bf16" if alone else "fp32"


EngineConfig = LocalEngineConfig | FsdpEngineConfig | ZeroEngineConfig


def check_tensor_parallel(ranks: int, *, heads: int, kv_heads: int, tokens: int | None = None) -> None:
    """Raise UserError unless so many ranks can share a transformer: by whole heads, and with `tokens` also these.

    Other layers whose sizes do not divide are not split: each rank has them whole.
    """
    sizes = {"heads": heads, "key and value heads": kv_heads}
    if tokens is not None:
        sizes["tokens (sequence_parallel)"] = tokens
    common = math.gcd(*sizes.values())
    for name, size in sizes.items():
        if size % ranks:
            *others, last = [str(number) for number in range(1, common + 1) if common % number == 0]
            choice = f"{', '.join(others)} or {last}" if others else last
            raise UserError(f"engine.tensor_parallel: {ranks} does not divide the {size} {name}; use {choice}")
