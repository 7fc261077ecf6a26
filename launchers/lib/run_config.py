"""The typed config of a training script's command line, for launchers that check a run before they start it."""

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ibq.config import UserError
from ibq.data.order import Batching, share_of_rank
from launchers.lib import ROOT
from launchers.lib.executor import in_code

# The training scripts, by their path in the project, and where the class of the config is that each reads.
CONFIG_CLASSES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "ibq/train_tokenizer.py": ("ibq.training.tokenizer_config", "TokenizerRunConfig"),
        "ibq/train_ar.py": ("ibq.training.ar_config", "ARRunConfig"),
    }
)


def is_training_script(script: str) -> bool:
    """Whether a path names one of the project's training scripts, whose configs can be read."""
    return _in_project(script) in CONFIG_CLASSES


def config_class(script: str) -> type:
    """The config class of a training script, given by its path in the project, whatever the current folder is.

    UserError for a path that names no training script.
    """
    name = _in_project(script)
    if name not in CONFIG_CLASSES:
        raise UserError(f"{script}: is no training script; take {' or '.join(CONFIG_CLASSES)}")
    module, kind = CONFIG_CLASSES[name]
    return getattr(importlib.import_module(module), kind)


def load_run(script: str, argv: Sequence[str]) -> Any:
    """The config that a training script reads from its arguments `--config FILE [key=value ...]`.

    The file's path is relative to the current folder, as for the script itself. Raises ConfigError or UserError.
    """
    from ibq.training.run import parse_arguments  # reads PyTorch, for which a launcher's --help should not wait

    kind, said = config_class(script), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            _, *own = in_code((script, *argv))
            arguments = parse_arguments(kind, f"What {script} reads.", f"python {script} --config FILE", own)
    except SystemExit as end:
        if not end.code:  # --help has been answered
            raise
        problem = said.getvalue().strip().rpartition("error: ")[2]
        raise UserError(f"{script}: {problem}; write --config FILE key=value ...") from end
    return arguments.config


def check_run(config: Any, ranks: int = 1) -> None:
    """What a run on so many ranks would find wrong at its start, as far as that needs no data.

    Raises UserError that begins with the setting.
    """
    shared = getattr(config.engine, "tensor_parallel", 1)  # ranks that see the same data
    if shared > 1 and hasattr(config, "sharing_ranks"):  # of a transformer; other models are refused by their engine
        config.sharing_ranks()
        if ranks > 1:
            config.engine.mesh_sizes(ranks)
    training, of_data = config.training, max(ranks // shared, 1)
    try:
        own = share_of_rank(training.batch_size, of_data) if training.micro_batch == "auto" else training.micro_batch
        Batching(batch_size=training.batch_size, micro_batch=own, streams=config.data.streams, world_size=of_data)
    except ValueError as error:
        section = "data" if str(error).startswith("streams:") else "training"
        raise UserError(f"{section}.{error}") from error
    start = getattr(config, "codebook_start", None)
    if start is not None and training.max_steps is not None and start.warmup_steps >= training.max_steps:
        raise UserError(
            f"codebook_start.warmup_steps: {start.warmup_steps} must be below the run's {training.max_steps} steps"
        )


def _in_project(script: str) -> str:
    """A script's path relative to the project's folder, where it lies in that."""
    path = (ROOT / Path(script)).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else script
