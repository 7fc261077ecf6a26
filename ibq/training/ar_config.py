"""Everything that the config of a transformer run says: stage 2."""

from dataclasses import dataclass, field
from typing import Literal

from ibq.config import UserError
from ibq.data.codes import CodeDataConfig
from ibq.data.shards import ImageDataConfig
from ibq.engine.base import OptimizerConfig
from ibq.engine.configs import EngineConfig, LocalEngineConfig, check_tensor_parallel
from ibq.engine.heartbeat import HeartbeatConfig
from ibq.models.transformer import TransformerConfig
from ibq.training.checkpoint import CheckpointConfig
from ibq.training.loop import TrainingConfig
from ibq.training.run import check_seed_and_average
from ibq.training.schedule import ARScheduleConfig, OrderAnnealingConfig
from ibq.training.start_from.config import TransformerStartConfig, settled
from ibq.training.writers import LogConfig


@dataclass(frozen=True, kw_only=True)
class TokenizedImagesConfig(ImageDataConfig):
    """Images that a frozen tokenizer turns into codes at every step."""

    kind: Literal["images"] = "images"
    tokenizer: str  # what ibq.load_tokenizer reads
    allow_other_tokenizer: bool = False  # go on with another tokenizer than the run began with

    def __post_init__(self):
        super().__post_init__()
        if self.buckets:
            raise ValueError("buckets: for tokenizers alone; encode the pictures, and train on the codes (kind: codes)")


@dataclass(frozen=True, kw_only=True)
class ARRunConfig:
    """Everything about one transformer run."""

    output: str = "runs/ar"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    ema_decay: float | None = 0.9999  # null keeps no average: saves memory, and validates the raw weights
    ema_warmup: bool = False  # average over fewer steps at first: for short runs
    data: CodeDataConfig | TokenizedImagesConfig
    model: TransformerConfig = field(default_factory=TransformerConfig)
    start_from: str | TransformerStartConfig | None = None  # a place with weights, alone or with options
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            kind="adamw", betas=(0.9, 0.95), weight_decay=0.05, clip_norm=1.0, scale_learning_rate=True
        )
    )
    schedule: ARScheduleConfig = field(default_factory=ARScheduleConfig)
    order_annealing: OrderAnnealingConfig = field(default_factory=OrderAnnealingConfig)  # of model.order: random
    training: TrainingConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=LocalEngineConfig)
    heartbeat: HeartbeatConfig = field(default_factory=HeartbeatConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        check_seed_and_average(self.seed, self.ema_decay)

    @property
    def start(self) -> TransformerStartConfig | None:
        """`start_from` with all its options; None for new weights."""
        return settled(self.start_from, TransformerStartConfig)

    def sharing_ranks(self) -> int:
        """How many ranks share each matrix, and so see the same data; UserError where the model cannot be split so."""
        ranks, model = getattr(self.engine, "tensor_parallel", 1), self.model
        if ranks > 1:
            if not model.is_plain:
                raise UserError(
                    "engine.tensor_parallel: ranks share no matrices of plain norms and of heads but the plain one; "
                    "set it to 1, and shard by engine.kind=fsdp or zero"
                )
            tokens = model.common_tokens if self.engine.sequence_parallel else None
            check_tensor_parallel(ranks, heads=model.num_heads, kv_heads=model.num_kv_heads, tokens=tokens)
        return ranks
