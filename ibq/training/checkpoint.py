"""The checkpoint format: a folder per step, written beside its place, flushed, and renamed when whole.

    step-00001000/
        manifest.json            size and SHA-256 of every other file: what tells a whole checkpoint from a damaged one
        state.json               step, position in the data, updates of each engine, best score
        NAME.index.json, NAME-*.safetensors    of each engine; see `ibq/engine/state_files.py`
        rank-0.safetensors       what each rank keeps for itself: buffers, moving averages, the running log interval

All ranks write at once, each what it holds, and a run may go on with any engine and any number of ranks. Only tensors
and JSON: nothing is ever unpickled.
"""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ibq import dist
from ibq.config import UserError, dump_config, require_least
from ibq.data.index import sha256_of
from ibq.engine.base import Engine
from ibq.engine.state_files import (
    StateReader,
    buffers_file,
    copied,
    describe,
    index_file,
    owned_pieces,
    rank_file,
    stored_parts,
    untrained,
    write_index,
    write_model,
    write_pieces,
)
from ibq.files import fresh_folder, recover_folder, replace_folder, sync_folder, write_text
from ibq.progress import say
from ibq.tensor_file import write_tensors
from ibq.training.staging import Staging, available_bytes

FORMAT = 3
MANIFEST, STATE = "manifest.json", "state.json"
RECEIPT = "receipt-"  # what a rank has written, until rank 0 has put it all together
OWN = "own/"  # tensors under this name are for the very rank that wrote them, not for those of a larger world
START_OVER = "use --fresh to start over"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, how many are kept, and what happens if one can't be written."""

    save_every: int = 5_000  # steps
    keep: int = 2  # the last so many, and the one of the best validation
    on_error: Literal["continue", "stop"] = "continue"  # when the disk is full, say
    # Write while training goes on, from a copy of what a rank holds, in the CPU's memory; by default on a GPU, if half
    # of the free memory holds the copies.
    asynchronous: bool | None = None
    signal: Literal["USR1", "USR2", "none"] = "USR2"  # besides TERM, INT and HUP: save once and exit

    def __post_init__(self):
        require_least(self, save_every=1, keep=1)


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


class CheckpointWriter:
    """Writes checkpoints under `folder`; every rank calls the same methods.

    `asynchronous` copies the state and writes it while training goes on: `poll` between the steps puts a checkpoint in
    its place when all ranks have written their part. Methods return whether a checkpoint has come into its place, and
    raise CheckpointError on every rank if any of them cannot write.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, device: torch.device):
        self.folder, self.config, self.device = folder, config, device
        self.asynchronous = config.asynchronous  # None until the first engines are seen
        self._staging = Staging(device)
        self._pending: _Pending | None = None

    def prepare(self, engines: Mapping[str, Engine]) -> None:
        """Decide how to write, and begin to take the memory for it: when the optimizers have made their steps."""
        numel = copied_numel(engines)
        if self.asynchronous is None:
            self.asynchronous = self.device.type == "cuda" and self._holds_copies(4 * numel)
        if self.asynchronous:
            self._staging.prepare(numel)

    def _holds_copies(self, size: int) -> bool:
        """Whether half of the machines' free memory holds what their ranks copy, `size` bytes on this one."""
        need, free = size * dist.local_world_size(), available_bytes()
        short = bool(dist.largest(int(2 * need > free)))
        if short and dist.is_main():
            need, free = (f"{value / 2**30:.1f} GiB" for value in (need, free))
            say(f"note: training will wait for its checkpoints: copies would take {need} of the {free} that are free")
        return not short

    def save(self, engines: Mapping[str, Engine], rank_tensors: Mapping[str, Tensor], state: TrainingState) -> None:
        """Begin a checkpoint; an earlier one must be done (`wait`)."""
        assert self._pending is None
        if self.asynchronous is None:
            self.prepare(engines)
        target = step_folder(self.folder, state.step)
        temporary = target.with_name(f".tmp-{target.name}")
        together(temporary, lambda: dist.is_main() and fresh_folder(target))
        staging = self._staging if self.asynchronous else None
        write = _writer_of_parts(temporary, engines, rank_tensors, staging)
        summary = json.dumps({"format": FORMAT, **asdict(state), "updates": {n: e.steps for n, e in engines.items()}})
        self._pending = _Pending(temporary, target, write, engines, summary, state.best_step)
        if self.asynchronous:
            self._pending.start()

    def poll(self) -> bool:
        """Finish the checkpoint that is being written, if every rank is ready."""
        return self._pending is not None and not dist.largest(int(self._pending.is_busy())) and self.wait()

    def wait(self) -> bool:
        """Finish the checkpoint that is being written, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return False
        try:
            together(pending.temporary, pending.write)
        finally:
            self._staging.give_back()
        together(pending.temporary, lambda: dist.is_main() and pending.finish())
        if dist.is_main():
            best = None if pending.best_step is None else step_folder(self.folder, pending.best_step)
            for old in checkpoints_in(self.folder)[: -self.config.keep]:
                if old != best:
                    shutil.rmtree(old, ignore_errors=True)
        dist.barrier()
        return True


class _Pending:
    """One checkpoint on its way to the disk."""

    def __init__(self, temporary: Path, target: Path, write, engines: Mapping[str, Engine], summary: str, best_step):
        self.temporary, self.target, self.best_step = temporary, target, best_step
        self._write, self._summary = write, summary
        self._engines = {name: (engine.state_parts(), describe(engine.module)) for name, engine in engines.items()}
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None

    def start(self) -> None:
        """Write in the background."""
        self._thread = threading.Thread(target=self._guarded, name="checkpoint", daemon=True)
        self._thread.start()

    def _guarded(self) -> None:
        try:
            self._write()
        except Exception as error:
            self._problem = error

    def is_busy(self) -> bool:
        """Whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    def write(self) -> None:
        """Write this rank's part, or wait until it is written."""
        if self._thread is None:
            self._write()
            return
        self._thread.join()
        if self._problem is not None:
            raise self._problem

    def finish(self) -> None:
        """On rank 0: add index, state and manifest, and put the checkpoint in its place."""
        receipts = [json.loads(path.read_text()) for path in sorted(self.temporary.glob(f"{RECEIPT}*"))]
        for name, (parts, model) in self._engines.items():
            places = [receipt["pieces"][name] for receipt in receipts]
            write_index(self.temporary / index_file(name), places, parts, model)
        write_text(self.temporary / STATE, self._summary)
        for path in self.temporary.glob(f"{RECEIPT}*"):
            path.unlink()
        files = {name: entry for receipt in receipts for name, entry in receipt["files"].items()}
        for name in (STATE, *(index_file(engine) for engine in self._engines)):
            path = self.temporary / name
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        write_text(self.temporary / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
        sync_folder(self.temporary)
        replace_folder(self.temporary, self.target)


def copied_numel(engines: Mapping[str, Engine]) -> int:
    """Elements of this rank's part of a checkpoint."""
    return sum(
        len(stored_parts(name, engine.state_parts(), engine.frozen)) * piece.numel
        for engine in engines.values()
        for name, piece in owned_pieces(engine).items()
    )


def _writer_of_parts(temporary: Path, engines: Mapping[str, Engine], rank_tensors, staging: Staging | None):
    """A function that writes this rank's part of a checkpoint; with `staging` the state as it is now."""
    rank = dist.rank()
    to_write = {}
    memory = None if staging is None else staging.take(copied_numel(engines))
    for name, engine in engines.items():
        pieces, parts = owned_pieces(engine), engine.state_parts()
        states = None
        if memory is not None:
            own, memory = memory.split([numel := copied_numel({name: engine}), memory.numel() - numel])
            states = copied(pieces, parts, engine.named_state(), engine.frozen, own)
        to_write[name] = (pieces, parts, engine, states)
    if staging is not None and staging.device.type == "cuda":
        torch.cuda.synchronize(staging.device)  # before the next step changes what is copied from
    own = {f"rank-{rank}.safetensors": {name: tensor.detach().cpu().clone() for name, tensor in rank_tensors.items()}}
    if dist.is_main():
        own |= {buffers_file(name): untrained(engine) for name, engine in engines.items()}

    def write() -> None:
        receipt: dict = {"files": {}, "pieces": {}}
        for name, (pieces, parts, engine, states) in to_write.items():
            path = temporary / rank_file(name, rank)
            states = engine.named_state() if states is None else iter(states)
            files, receipt["pieces"][name] = write_pieces(path, pieces, parts, states, engine.frozen)
            receipt["files"] |= files
        for name, tensors in own.items():
            if tensors:
                size, sha256 = write_tensors(temporary / name, tensors)
                receipt["files"][name] = {"bytes": size, "sha256": sha256}
        write_text(temporary / f"{RECEIPT}{rank:04d}.json", json.dumps(receipt))

    return write


def together(temporary: Path, action) -> None:
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


# --- Reading ---


def find_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint, or None where there is none; every rank calls it.

    A damaged one is named and set aside as `damaged-step-...`, and the one before it is taken. UserError if all are
    damaged: they stay as they are.
    """
    if dist.is_main():
        _clean_up(folder)
    names = json.loads(dist.text_from_main(json.dumps([path.name for path in reversed(checkpoints_in(folder))])))
    damaged: list[tuple[Path, str]] = []
    for name in names:
        if reason := _damage(folder / name):
            damaged.append((folder / name, reason))
            continue
        if dist.is_main():
            _set_aside(damaged, name)
        dist.barrier()
        return folder / name
    if damaged:
        path, reason = damaged[0]
        raise UserError(f"{path}: {reason}, and there is no whole checkpoint before it; {START_OVER}")
    return None


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint, "" if nothing; each rank looks at its share of the files."""
    problem = ""
    try:
        verify_checkpoint(path, dist.rank(), dist.world_size())
    except DamagedError as error:
        problem = str(error)
    return next((text for text in dist.gather_texts(problem) if text), "")


def _set_aside(damaged: list[tuple[Path, str]], name: str) -> None:
    for bad, reason in damaged:
        aside = bad.with_name(f"damaged-{bad.name}")
        shutil.rmtree(aside, ignore_errors=True)
        bad.rename(aside)
        say(f"{bad}: {reason}; set aside as {aside.name}, going on from {name}")


def _clean_up(folder: Path) -> None:
    """Leftovers of a run that was killed while it saved."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(".old-"):
                recover_folder(path.with_name(path.name.removeprefix(".old-")))
            if path.name.startswith((".old-", ".tmp-")):
                shutil.rmtree(path, ignore_errors=True)


def verify_checkpoint(path: Path, share: int = 0, shares: int = 1) -> None:
    """DamagedError, naming the file, unless a checkpoint holds what was written; of `shares` of its files one."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} is missing or damaged ({str(error) or type(error).__name__})") from error
    for name, (size, sha256) in list(expected.items())[share::shares]:
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
            reader = StateReader(path, name)
            if reader.shapes != {parameter: piece.shape for parameter, piece in engine.pieces().items()}:
                raise UserError(f"{path}: holds another model than the config describes; {START_OVER}")
            engine.load_named_state(reader, updates[name])
            if (thawed := reader.frozen - engine.frozen) and dist.is_main():
                say(f"{path}: {len(thawed)} parameters of the {name} were frozen; from here their moments start anew")
        rank_tensors = _rank_tensors(path)
        state = TrainingState(**info)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: not a checkpoint of this run ({reason}); {START_OVER}") from error
    return state, rank_tensors


def _rank_tensors(path: Path) -> dict[str, Tensor]:
    """What this rank kept; where there were fewer ranks, what rank 0 kept for all."""
    own = path / f"rank-{dist.rank()}.safetensors"
    if own.exists():
        return load_file(own)
    first = path / "rank-0.safetensors"
    tensors = load_file(first) if first.exists() else {}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(OWN)}


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, under the folder of all."""
    return folder / f"step-{step:08d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints that are in their place, the last one at the end."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


# --- Models for use ---


def save_pretrained(folder: Path, engine: Engine, info: Mapping = MappingProxyType({})) -> None:
    """Write an engine's averaged weights (raw ones where it keeps no average) for use, whole or not at all.

    `model.safetensors`, the `config.yaml` that rebuilds it, and `info.json`: where the weights come from. Every rank
    calls it: each writes what it holds, and rank 0 puts the pieces together, one parameter at a time. CheckpointError
    on every rank if one cannot write.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    part = "ema" if "ema" in engine.state_parts() else "weight"
    together(temporary, lambda: dist.is_main() and fresh_folder(folder))
    pieces = owned_pieces(engine)
    receipts: list = []
    together(
        temporary,
        lambda: receipts.append(
            write_pieces(
                temporary / rank_file("pieces", dist.rank()), pieces, (part,), engine.named_state(), engine.frozen
            )[1]
        ),
    )
    all_places = [json.loads(text) for text in dist.gather_texts(json.dumps(receipts[0]))]
    together(temporary, lambda: dist.is_main() and _finish_model(temporary, folder, engine, part, all_places, info))


def _finish_model(temporary: Path, folder: Path, engine: Engine, part: str, all_places, info: Mapping) -> None:
    write_index(temporary / index_file("pieces"), all_places, (part,), describe(engine.module))
    if rest := untrained(engine):
        write_tensors(temporary / buffers_file("pieces"), rest)
    reader = StateReader(temporary, "pieces")
    write_model(temporary / "model.safetensors", reader, part)
    for path in temporary.glob("pieces*"):
        path.unlink()
    write_text(temporary / "config.yaml", dump_config(engine.module.config))
    write_text(temporary / "info.json", json.dumps(dict(info), indent=1))
    replace_folder(temporary, folder)


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
