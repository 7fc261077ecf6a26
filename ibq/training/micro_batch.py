"""`training.micro_batch: auto`: the largest micro-batch that the device holds and that divides a rank's share.

Memory is the plan's (`ibq.scaling`). A GPU gives all that it has but the plan's 4 GiB of reserve; on CPUs a rank gives
half of its share of what is free, and what is offloaded to main memory counts there too. A run that goes on takes the
number of its last start, which its folder's config.yaml holds, as long as the device can hold it at all.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ibq import dist
from ibq.config import ConfigError, UserError, load_section
from ibq.data.order import share_of_rank
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import TransformerConfig
from ibq.progress import say
from ibq.scaling.hardware import GIB, Gpu
from ibq.scaling.layouts import Layout, Training
from ibq.scaling.networks import TokenizerLosses
from ibq.scaling.plan import (
    DecoderStage,
    Machine,
    Stage,
    TokenizerStage,
    TransformerStage,
    bytes_needed,
    layout_of,
    micro_batch_within,
)
from ibq.scaling.survey import recomputations
from ibq.scaling.transformer import Device
from ibq.training.checkpoint import checkpoints_in
from ibq.training.loop import TrainingConfig
from ibq.training.staging import available_bytes

KEY = "training.micro_batch"


def stage_of(config: Any, tokenizer: TokenizerConfig | None = None) -> Stage:
    """What the config of a run trains, for the planner; `tokenizer`: the frozen one that turns images into codes."""
    match config.model:
        case TransformerConfig():
            return TransformerStage(config.model, tokenizer)
        case TokenizerConfig():
            gan, perceptual = config.loss.gan, config.loss.perceptual
            discriminator = gan.discriminator if gan.enabled else None
            gram = config.loss.gram.features if config.loss.gram.weight else None
            losses = TokenizerLosses(discriminator=discriminator, perceptual=perceptual.weight > 0, gram=gram)
            return (TokenizerStage if config.codes is None else DecoderStage)(config.model, losses)


def at_largest_bucket(stage: Stage, config: Any) -> Stage:
    """A tokenizer's stage at a square of as many pixels as its largest bucket has, attention at the same levels."""
    if not isinstance(stage, TokenizerStage) or not config.data.buckets:
        return stage
    model, pixels = stage.config, max(height * width for height, width in config.data.buckets)
    side = math.ceil(math.sqrt(pixels) / model.downsampling) * model.downsampling
    levels = [level for level in range(len(model.channel_multipliers)) if model.has_attention(level)]
    attention = tuple(side // 2**level for level in levels)
    return replace(stage, config=replace(model, resolution=side, attention_resolutions=attention))


def training_of(config: Any, micro_batch: int, device: Device = "cuda") -> Training:
    """What of a run's settings matters for its size."""
    return Training(
        precision=config.precision,
        micro_batch=micro_batch,
        batch_size=config.training.batch_size,
        moments=0 if config.optimizer.kind == "sgd" else 8,
        ema=config.ema_decay is not None,
        device=device,
    )


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory of one rank; bytes."""

    held: float  # that the device can hold
    used: float  # of which a new run may use so much
    on: str

    @classmethod
    def of(cls, device: torch.device, ranks_of_machine: int) -> "Room":
        """The room of a rank on its device."""
        if device.type == "cuda":
            whole = torch.cuda.get_device_properties(device).total_memory
            return cls(held=whole, used=whole - Machine.reserve, on="of this GPU")
        free = available_bytes() / ranks_of_machine
        if not math.isfinite(free):
            raise UserError(f"{KEY}: this system does not tell how much memory is free; give a number instead of auto")
        return cls(held=free, used=free / 2, on="of free memory that a rank may use")


def resolve_micro_batch(config: Any, device: torch.device, *, fresh: bool, tokenizer: TokenizerConfig | None) -> int:
    """The micro-batch of a run, the same on every rank, which all call it; where it is `auto` rank 0 says it.

    `fresh`: an earlier run in the folder is of no account. ValueError where the ranks cannot share the batch; UserError
    where not even one image fits, or where the network is one that cannot be planned.
    """
    given = config.training.micro_batch
    if given != "auto":
        return given
    share = share_of_rank(config.training.batch_size, dist.data_world_size())
    room = Room.of(device, dist.local_world_size())
    with _named():
        stage = at_largest_bucket(stage_of(config, tokenizer), config)
        layout = _layout(config, stage, device)
        training = training_of(config, 1, device.type)
        fits = micro_batch_within(stage, layout, training, room.used)
        smallest = -dist.largest(-fits)  # of all ranks
        before = 0 if fresh else number_before(config.output)
        kept = before and share % before == 0 and bytes_needed(stage, layout, training, before) <= room.held
        kept = -dist.largest(-int(bool(kept)))
        chosen = before if kept else smallest
        if not chosen:
            raise UserError(f"{KEY}: {_too_large(stage, layout, training, room)}")
        needed = bytes_needed(stage, layout, training, chosen)
    limit = room.held if kept else room.used
    changed = f", instead of {before} before, which no longer fits or divides" if before and not kept else ""
    if dist.is_main():
        say(
            f"{KEY}: auto takes {chosen}{' as before' if kept else changed}, {share // chosen} a step and rank: "
            f"{needed / GIB:.1f} of the {limit / GIB:.1f} GiB {room.on}"
            + _larger(stage, layout, training, room, chosen)
        )
    return chosen


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """What the planner cannot do names the key and the way out."""
    try:
        yield
    except UserError as error:
        if "cannot be planned" not in str(error):
            raise
        raise UserError(f"{KEY}: auto: {error}; give a number") from error


def number_before(output: str) -> int:
    """The micro-batch of the run that its last checkpoint belongs to, as rank 0 finds it; 0 where there is none."""
    folder, found = Path(output), 0
    if dist.is_main() and checkpoints_in(folder / "checkpoints"):
        with contextlib.suppress(ConfigError):
            number = load_section(TrainingConfig, folder / "config.yaml", "training").micro_batch
            found = number if number != "auto" else 0
    return int(dist.text_from_main(str(found)))


def _layout(config: Any, stage: Stage, device: torch.device) -> Layout:
    rates = dict.fromkeys(("memory_gib", "flops", "node_bytes", "network_bytes"), math.nan)  # memory alone counts
    here = Machine(gpu=Gpu(name="", **rates), gpus=dist.world_size(), gpus_per_node=dist.local_world_size())
    layout = layout_of(config.engine, stage, here)
    if device.type == "cpu":
        moved = ("offload_optimizer", "offload_parameters")
        layout = replace(layout, **{name: "none" for name in moved if getattr(layout, name) == "cpu"})
    return layout


def _larger(stage: Stage, layout: Layout, training: Training, room: Room, chosen: int) -> str:
    """What recomputation would allow, where only one image fits at a time."""
    share = training.batch_size // layout.data
    if chosen > 1 or share == 1:
        return ""
    sizes = [(micro_batch_within(one, layout, training, room.used), one) for one in recomputations(stage)]
    size, best = max(sizes, key=lambda found: found[0])
    return f"; {_settings(best)} would allow {size}" if size > chosen else ""


def _too_large(stage: Stage, layout: Layout, training: Training, room: Room) -> str:
    """Why nothing fits, and what to change."""
    needed = bytes_needed(stage, layout, training, 1)
    problem = f"one image at a time needs {needed / GIB:.1f} of the {room.used / GIB:.1f} GiB {room.on}"
    for one in recomputations(stage):
        less = bytes_needed(one, layout, training, 1)
        if less <= room.used:
            return f"{problem}; set {_settings(one)} ({less / GIB:.1f} GiB)"
    return f"{problem}; tools/plan.py names engines that fit, or take more or larger devices"


def _settings(stage: Stage) -> str:
    selective = " model.checkpoint_selective=true" if stage.config.checkpoint_selective else ""
    return f"model.gradient_checkpointing=true{selective}"
