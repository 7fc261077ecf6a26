"""Stage 2: train a class-conditional autoregressive transformer on a tokenizer's codes.

deepspeed ibq/train_ar.py --config yaml/xxl.yaml
torchrun --nproc-per-node 8 ibq/train_ar.py --config yaml/b.yaml data.train=codes/train
"""

import gc
import sys
from pathlib import Path

# A script's own folder comes first on sys.path; there `ibq/` would hide other packages, and `ibq` itself be missing.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    gc.disable()  # until all is imported, which stays: looking for garbage in it took a fifth of the start

from collections.abc import Sequence
from functools import partial

import torch

from ibq import dist
from ibq.api import load_tokenizer, same_codes_as
from ibq.config import UserError, exit_on_user_error
from ibq.data.codes import CodeDataConfig
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Grid, Transformer, TransformerConfig
from ibq.training.ar_config import ARRunConfig
from ibq.training.ar_task import ARTask
from ibq.training.checkpoint import weights_hash
from ibq.training.post_training import codes_hash
from ibq.training.run import Command, naming
from ibq.training.run_data import RunData, code_data, image_data
from ibq.training.start_from.config import TransformerStartConfig
from ibq.training.start_from.fit import Fit, fit_transformer
from ibq.training.start_from.places import Source, open_place

EXAMPLE = "torchrun --nproc-per-node 8 ibq/train_ar.py --config yaml/b.yaml data.train=codes/train"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; the exit code."""
    with Command.begin(ARRunConfig, __doc__.splitlines()[0], EXAMPLE, argv) as command:
        share_model(command.config)
        with command.part("data"), naming(command.source):
            data, tokenizer = open_data(command.config, command.device)
        command.bind(data, None if tokenizer is None else tokenizer.config)
        start = command.start(partial(open_fit, command.config, data))
        with command.part("engine"):
            task = build_task(command, data, tokenizer)
        command.check_schedule(task.hyper)
        return command.train(task, data, title="transformer", start=start)


def build_task(command: Command, data: RunData, tokenizer: Tokenizer | None) -> ARTask:
    """Network, engine and the task that trains it."""
    config: ARRunConfig = command.config
    steps_per_epoch = data.steps_per_epoch
    total_steps = config.training.total_steps(steps_per_epoch)
    peak = config.optimizer.peak_learning_rate(config.training.batch_size)
    random_share = partial(
        config.order_annealing.random_share, steps_per_epoch=steps_per_epoch, total_steps=total_steps
    )
    return ARTask(
        command.engine(
            "transformer",
            lambda: Transformer(config.model),
            data,
            config.engine,
            optimizer=config.optimizer,
            ema_decay=config.ema_decay,
        ),
        tokenizer=tokenizer,
        random_share=random_share if config.model.order == "random" else None,
        hyper=lambda step: config.schedule.hyper(
            step,
            peak=peak,
            weight_decay=config.optimizer.weight_decay,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
        ),
    )


def open_fit(config: ARRunConfig, data: RunData, start: TransformerStartConfig) -> tuple[Source, Fit]:
    """The weights at the place of `start_from`, and how they become those of the run."""
    source = open_place(Transformer, start)
    codes_of = None if config.data.allow_other_tokenizer else data.provenance.get("tokenizer")
    return source, fit_transformer(source, config, start, codes_of)


def share_model(config: ARRunConfig) -> None:
    """Say how many ranks share each matrix, and so their data; UserError where the model's sizes do not allow it."""
    ranks = config.sharing_ranks()
    if ranks > 1:
        config.engine.mesh_sizes(dist.world_size())
    dist.share_data(ranks)


def open_data(config: ARRunConfig, device: torch.device) -> tuple[RunData, Tokenizer | None]:
    """(data, frozen tokenizer or None), checked against the model."""
    data, tokenizer = (_open_codes if isinstance(config.data, CodeDataConfig) else _open_images)(config, device)
    if data.validation_classes != data.classes[: len(data.validation_classes)]:
        raise UserError(
            "data.validation: its classes are not those of data.train; give every class a folder with images in both"
        )
    return data, tokenizer


def _open_codes(config: ARRunConfig, _device: torch.device) -> tuple[RunData, None]:
    data = code_data(config.data, config.seed, config.training.batch_size)
    metas = [part.meta for part in (*data.stream.sets, *data.validation_sets)]
    for num_codes in {meta.num_codes for meta in metas}:
        _check_model(config, num_codes=num_codes, grids=[meta.grid for meta in metas], classes=data.classes)
    if config.data.tokenizer is not None and not config.data.allow_other_tokenizer:
        with naming("data.tokenizer"):
            own = weights_hash(load_tokenizer(config.data.tokenizer, device="cpu").state_dict())
        if data.provenance["tokenizer"] not in (own, same_codes_as(config.data.tokenizer)):
            raise UserError(
                "data.train: made with another tokenizer than data.tokenizer; encode the images again with it, or set "
                "data.allow_other_tokenizer=true"
            )
    return data, None


def _open_images(config: ARRunConfig, device: torch.device) -> tuple[RunData, Tokenizer]:
    with naming("data.tokenizer"):
        tokenizer = load_tokenizer(config.data.tokenizer, device=device)
    grid = _grid_of_images(config.model, tokenizer)
    height, width = (side * tokenizer.downsampling for side in grid)
    data = image_data(config.data, (height, width), config.seed)
    _check_model(config, num_codes=tokenizer.quantizer.num_codes, grids=[grid], classes=data.classes)
    data.provenance = {"tokenizer": codes_hash(config.data.tokenizer, tokenizer)}
    data.allow_other = config.data.allow_other_tokenizer
    return data, tokenizer


def _grid_of_images(model: TransformerConfig, tokenizer: Tokenizer) -> Grid:
    """The codes that images are to have: those of the tokenizer's own resolution, unless the model names a grid."""
    if model.grids is None:
        return (tokenizer.tokens_per_side, tokenizer.tokens_per_side)
    if len(model.grids) > 1:
        raise UserError(
            "model.grids: images are cut to one shape as they are read; for several, write codes with "
            "tools/encode_shards.py --size, and give data.kind=codes and data.sources"
        )
    return model.grids[0]


def _check_model(config: ARRunConfig, *, num_codes: int, grids: Sequence[Grid], classes: Sequence[str]) -> None:
    """UserError unless the model is made for such data."""
    model, grids = config.model, [*dict.fromkeys(grids)]  # each once
    if not classes:
        raise UserError("data.sources: their classes differ; a transformer wants one numbering of classes for all")
    found = {"vocab_size": num_codes, "num_classes": len(classes)}
    if model.grids is None and len(grids) == 1 and grids[0][0] == grids[0][1]:
        found["tokens_per_side"] = grids[0][0]
    elif set(model.code_grids) != set(grids):
        wanted = str([list(grid) for grid in grids]).replace(" ", "")
        known = ", ".join(f"{height} x {width}" for height, width in model.code_grids)
        shown = ", ".join(f"{height} x {width}" for height, width in grids)
        raise UserError(f"model.grids: is {known} but the data has {shown}; set model.grids={wanted}")
    for name, value in found.items():
        if getattr(model, name) != value:
            raise UserError(f"model.{name}: is {getattr(model, name)} but the data has {value}; set it so")


if __name__ == "__main__":
    exit_on_user_error(main)
