"""The checkpoint format: a folder per step, written beside its place and renamed when whole.

    step-00001000/
        state.json               step, updates of each engine, best score, format version
        NAME.safetensors         one per engine: weight/PARAMETER, ema/PARAMETER, moment1/PARAMETER, moment2/PARAMETER
        rank-0.safetensors       what each rank keeps for itself: buffers and moving averages

Only tensors and JSON: nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ibq import dist
from ibq.config import UserError
from ibq.engine.base import PARTS, Engine, ParameterState
from ibq.files import fresh_folder, replace_folder, write_text

FORMAT = 1
NO_INFO = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a checkpoint says about the run beside the tensors."""

    step: int  # steps done
    best_score: float | None = None
    bad_steps: int = 0  # skipped so far


def save_checkpoint(
    folder: Path,
    engines: Mapping[str, Engine],
    rank_tensors: Mapping[str, Tensor],
    state: TrainingState,
    keep: int,
) -> Path:
    """Write one checkpoint under `folder`, then remove all but the last `keep`; every rank calls it."""
    target = folder / f"step-{state.step:08d}"
    temporary = target.with_name(f".tmp-{target.name}")
    if dist.is_main():
        temporary = fresh_folder(target)
    dist.barrier()
    if rank_tensors:
        _save(rank_tensors, temporary / f"rank-{dist.rank()}.safetensors")
    if dist.is_main():
        for name, engine in engines.items():
            _save(_engine_tensors(engine), temporary / f"{name}.safetensors")
        info = {
            "format": FORMAT,
            "step": state.step,
            "best_score": state.best_score,
            "bad_steps": state.bad_steps,
            "updates": {name: engine.steps for name, engine in engines.items()},
        }
        write_text(temporary / "state.json", json.dumps(info, indent=1))
    dist.barrier()
    if dist.is_main():
        replace_folder(temporary, target)
        for old in _list(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def _engine_tensors(engine: Engine) -> dict[str, Tensor]:
    tensors = {}
    for name, state in engine.named_state():
        for part in PARTS:
            if (tensor := getattr(state, part)) is not None:
                tensors[f"{part}/{name}"] = tensor
    return tensors


def load_checkpoint(path: Path, engines: Mapping[str, Engine]) -> tuple[TrainingState, dict[str, Tensor]]:
    """Restore the engines from a checkpoint; returns the state and this rank's own tensors."""
    try:
        info = json.loads((path / "state.json").read_text())
        if info["format"] != FORMAT:
            raise UserError(f"{path}: checkpoint format {info['format']}, not {FORMAT}; use --fresh to start over")
        for name, engine in engines.items():
            with safe_open(path / f"{name}.safetensors", "pt") as file:
                names = set(file.keys())
                expected = {f"weight/{parameter}" for parameter, _ in engine.named_state()}
                if expected != {key for key in names if key.startswith("weight/")}:
                    raise UserError(f"{path}: holds another model than the config describes; use --fresh to start over")

                def read(parameter: str, file=file, names=names) -> ParameterState:
                    keys = {part: f"{part}/{parameter}" for part in PARTS}
                    return ParameterState(
                        **{part: file.get_tensor(key) if key in names else None for part, key in keys.items()}
                    )

                engine.load_named_state(read, info["updates"][name])
        files = (path / f"rank-{rank}.safetensors" for rank in (dist.rank(), 0))
        own = next((file for file in files if file.exists()), None)
        rank_tensors = {} if own is None else load_file(own)
        state = TrainingState(step=info["step"], best_score=info["best_score"], bad_steps=info["bad_steps"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: not a checkpoint of this run ({reason}); use --fresh to start over") from error
    return state, rank_tensors


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    checkpoints = _list(folder)
    return checkpoints[-1] if checkpoints else None


def _list(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name))


def save_pretrained(
    folder: Path, config_text: str, tensors: Mapping[str, Tensor], info: Mapping = MappingProxyType({})
):
    """Write a model for use, whole or not at all.

    `model.safetensors`, the `config.yaml` that rebuilds it, and `info.json`: where the weights come from.
    """
    temporary = fresh_folder(folder)
    _save(tensors, temporary / "model.safetensors")
    write_text(temporary / "config.yaml", config_text)
    write_text(temporary / "info.json", json.dumps(dict(info), indent=1))
    replace_folder(temporary, folder)


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
