"""The checkpoint format: a folder per step, written beside its place, flushed, and renamed when whole.

    step-00001000/
        manifest.json            size and SHA-256 of every other file: what tells a whole checkpoint from a damaged one
        state.json               step, position in the data, updates of each engine, best score
        NAME.safetensors         one per engine: weight/PARAMETER, ema/PARAMETER, moment1/PARAMETER, moment2/PARAMETER
        rank-0.safetensors       what each rank keeps for itself: buffers, moving averages, the running log interval

Only tensors and JSON: nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ibq import dist
from ibq.config import UserError
from ibq.data.index import sha256_of
from ibq.engine.base import PARTS, Engine, ParameterState
from ibq.files import fresh_folder, recover_folder, replace_folder, sync_folder, write_text
from ibq.progress import say

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
OWN = "own/"  # tensors under this name are for the very rank that wrote them, not for those of a larger world
START_OVER = "use --fresh to start over"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, how many are kept, and what happens if one can't be written."""

    save_every: int = 5_000  # steps
    keep: int = 2  # the last so many, and the one of the best validation
    on_error: Literal["continue", "stop"] = "continue"  # when the disk is full, say
    signal: Literal["USR1", "USR2", "none"] = "USR2"  # besides TERM and INT: save once and exit

    def __post_init__(self):
        for name in ("save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")


@dataclass(kw_only=True)
class TrainingState:
    """What a checkpoint says about the run beside the tensors."""

    step: int = 0  # steps done
    best_score: float | None = None
    best_step: int | None = None
    bad_steps: int = 0  # skipped so far
    bad_samples: dict[str, int] = field(default_factory=dict)  # replaced so far, by epoch
    validation_pending: bool = False  # stopped between a step and its validation
    position: int = 0  # samples taken from the data
    order: dict = field(default_factory=dict)  # what the data's order depends on


class CheckpointError(Exception):
    """A checkpoint could not be written; the ones before it are as they were."""


class DamagedError(Exception):
    """A checkpoint is not what was written."""


# --- Writing ---


def save_checkpoint(
    folder: Path,
    engines: Mapping[str, Engine],
    rank_tensors: Mapping[str, Tensor],
    state: TrainingState,
    keep: int,
) -> None:
    """Write one checkpoint under `folder`, then remove all but the last `keep` and the best; every rank calls it.

    Raises CheckpointError on every rank if any of them cannot write.
    """
    target = _path(folder, state.step)
    temporary = target.with_name(f".tmp-{target.name}")
    _together(temporary, lambda: dist.is_main() and fresh_folder(target))
    _together(temporary, lambda: _write_parts(temporary, engines, rank_tensors, state))
    _together(temporary, lambda: dist.is_main() and _finish(temporary, target))
    if dist.is_main():
        best = None if state.best_step is None else _path(folder, state.best_step)
        for old in _list(folder)[:-keep]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def _together(temporary: Path, action) -> None:
    """Do something on every rank; if it fails anywhere, all give up and the unfinished folder goes."""
    problem = ""
    try:
        action()
    except (OSError, SafetensorError) as error:
        problem = str(error) or type(error).__name__
    if not dist.largest(int(bool(problem))):
        return
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(dist.gather_texts(problem)) if text]
    if dist.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
    raise CheckpointError(problems[0].removeprefix("rank 0: ") if dist.world_size() == 1 else "; ".join(problems))


def _write_parts(temporary: Path, engines: Mapping[str, Engine], rank_tensors, state: TrainingState) -> None:
    if rank_tensors:
        _save(rank_tensors, temporary / f"rank-{dist.rank()}.safetensors")
    if dist.is_main():
        for name, engine in engines.items():
            _save(_engine_tensors(engine), temporary / f"{name}.safetensors")
        updates = {name: engine.steps for name, engine in engines.items()}
        write_text(temporary / STATE, json.dumps({"format": FORMAT, **asdict(state), "updates": updates}, indent=1))


def _finish(temporary: Path, target: Path) -> None:
    """Add the manifest and put the checkpoint in its place."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(temporary.iterdir())
    }
    write_text(temporary / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
    sync_folder(temporary)
    replace_folder(temporary, target)


def _engine_tensors(engine: Engine) -> dict[str, Tensor]:
    tensors = {}
    for name, state in engine.named_state():
        for part in PARTS:
            if (tensor := getattr(state, part)) is not None:
                tensors[f"{part}/{name}"] = tensor
    return tensors


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# --- Reading ---


def find_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint, or None where there is none; every rank calls it.

    A damaged one is named and set aside as `damaged-step-...`, and the one before it is taken. UserError if all are
    damaged: they stay as they are.
    """
    answer = _search(folder) if dist.is_main() else ""
    answer = dist.text_from_main(answer)
    if answer.startswith("error: "):
        raise UserError(answer.removeprefix("error: "))
    return folder / answer if answer else None


def _search(folder: Path) -> str:
    """The name of the checkpoint to take, "" for none, or "error: ..."."""
    _clean_up(folder)
    damaged: list[tuple[Path, str]] = []
    for path in reversed(_list(folder)):
        try:
            verify_checkpoint(path)
        except DamagedError as error:
            damaged.append((path, str(error)))
            continue
        for bad, reason in damaged:
            aside = bad.with_name(f"damaged-{bad.name}")
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
            say(f"{bad}: {reason}; set aside as {aside.name}, going on from {path.name}")
        return path.name
    if damaged:
        path, reason = damaged[0]
        return f"error: {path}: {reason}, and there is no whole checkpoint before it; {START_OVER}"
    return ""


def _clean_up(folder: Path) -> None:
    """Leftovers of a run that was killed while it saved."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(".old-"):
                recover_folder(path.with_name(path.name.removeprefix(".old-")))
            if path.name.startswith((".old-", ".tmp-")):
                shutil.rmtree(path, ignore_errors=True)


def verify_checkpoint(path: Path) -> None:
    """DamagedError, naming the file, unless a checkpoint holds what was written."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} is missing or damaged ({str(error) or type(error).__name__})") from error
    for name, (size, sha256) in expected.items():
        file = path / name
        if not file.is_file():
            raise DamagedError(f"{name} is missing")
        if file.stat().st_size != size:
            raise DamagedError(f"{name} has {file.stat().st_size:,} bytes instead of {size:,}")
        if sha256_of(file) != sha256:
            raise DamagedError(f"{name} is not what was written (its SHA-256 differs)")
    if extra := {file.name for file in path.iterdir()} - {MANIFEST, *expected}:
        raise DamagedError(f"{sorted(extra)[0]} is not in the manifest")


def load_checkpoint(path: Path, engines: Mapping[str, Engine]) -> tuple[TrainingState, dict[str, Tensor]]:
    """Restore the engines from a whole checkpoint; returns the state and this rank's own tensors.

    UserError if it belongs to another model or comes from another version.
    """
    try:
        info = json.loads((path / STATE).read_text())
        if info.pop("format") != FORMAT:
            raise UserError(f"{path}: written by another version; {START_OVER}")
        updates = info.pop("updates")
        for name, engine in engines.items():
            with safe_open(path / f"{name}.safetensors", "pt") as file:
                _load_engine(engine, file, updates[name], path)
        rank_tensors = _rank_tensors(path)
        state = TrainingState(**info)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: not a checkpoint of this run ({reason}); {START_OVER}") from error
    return state, rank_tensors


def _load_engine(engine: Engine, file, updates: int, path: Path) -> None:
    names = set(file.keys())
    expected = {f"weight/{parameter}" for parameter, _ in engine.named_state()}
    if expected != {key for key in names if key.startswith("weight/")}:
        raise UserError(f"{path}: holds another model than the config describes; {START_OVER}")

    def read(parameter: str) -> ParameterState:
        keys = {part: f"{part}/{parameter}" for part in PARTS}
        return ParameterState(**{part: file.get_tensor(key) if key in names else None for part, key in keys.items()})

    engine.load_named_state(read, updates)


def _rank_tensors(path: Path) -> dict[str, Tensor]:
    """What this rank kept; where there were fewer ranks, what rank 0 kept for all."""
    own = path / f"rank-{dist.rank()}.safetensors"
    if own.exists():
        return load_file(own)
    first = path / "rank-0.safetensors"
    tensors = load_file(first) if first.exists() else {}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(OWN)}


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _list(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


# --- Models for use ---


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
