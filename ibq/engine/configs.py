"""What configs say of the engines, which are not read before they are needed: their libraries take a second."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ibq.config import UserError, require_least
from ibq.meeting import number

Target = Literal["none", "cpu", "nvme"]


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
class ZeroEngineConfig:
    """Sharded training by DeepSpeed; sizes count elements, not bytes.

    With the optimizer on NVMe, its state and the average are files in a folder of this process under `nvme_path`, 16
    bytes per element of its partition; a step reads and writes them once. Weights on NVMe are read for every use.
    """

    kind: Literal["zero"] = "zero"
    stage: Literal[0, 1, 2, 3] = 3
    offload_optimizer: Target = "none"
    offload_parameters: Target = "none"
    nvme_path: str | None = None
    sub_group_size: int = 50_000_000  # stage 3: what is updated (and in memory) at a time, and the largest parameter
    reduce_bucket_size: int = 50_000_000  # gradients reduced at a time
    allgather_bucket_size: int = 50_000_000  # stages 1, 2: weights gathered at a time
    prefetch_bucket_size: int = 50_000_000  # stage 3: weights gathered ahead of their use
    max_live_parameters: int = 200_000_000  # stage 3: weights gathered at a time
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
        for name in ("sub_group_size", "reduce_bucket_size", "allgather_bucket_size", "parameter_buffers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not positive; leave it out for the default")
        if self.allgather_bucket_size % 2:
            raise ValueError(f"allgather_bucket_size: DeepSpeed wants an even number, not {self.allgather_bucket_size}")

    @property
    def uses_nvme(self) -> bool:
        """Whether anything is kept on NVMe."""
        return "nvme" in (self.offload_optimizer, self.offload_parameters)


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
