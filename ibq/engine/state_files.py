"""The engines' part of a checkpoint: every rank writes the elements that it owns, any layout can read them.

    NAME-0003.safetensors      rank 3's elements of PARAMETER, as weight/PARAMETER, moment1/..., moment2/..., ema/...
    NAME-buffers.safetensors   what else the model's state holds
    NAME.index.json            shape of every parameter, which file holds which of its elements, and the model's config

A rank that holds whole parameters writes them in their shape, else as a flat list of elements. Of a parameter that is
frozen there is the weight alone: it is read as the average too, and moments are read as zeros.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ibq.config import config_to_dict
from ibq.engine.base import PARTS, Engine, ParameterState
from ibq.engine.pieces import Piece, Spans, overlaps, whole
from ibq.files import write_text
from ibq.tensor_file import StoredTensors, TensorFile

Files = dict[str, dict]  # name -> {"bytes", "sha256"}
Places = dict[str, dict]  # parameter -> {"shape", "file", "runs"}; "runs" are the spans of its piece


class MissingPartError(ValueError):
    """A checkpoint does not hold what was asked of it."""


def rank_file(engine: str, rank: int) -> str:
    """Name of a rank's file."""
    return f"{engine}-{rank:04d}.safetensors"


def buffers_file(engine: str) -> str:
    """Name of the file of what is not trained."""
    return f"{engine}-buffers.safetensors"


def index_file(engine: str) -> str:
    """Name of the file that says where everything is."""
    return f"{engine}.index.json"


# --- Writing ---


def owned_pieces(engine: Engine) -> dict[str, Piece]:
    """What this rank writes."""
    return {name: piece for name, piece in engine.pieces().items() if piece.owner and piece.numel}


def stored_parts(name: str, parts: tuple[str, ...], frozen: Collection[str]) -> tuple[str, ...]:
    """Which of an engine's parts are written of a parameter."""
    return ("weight",) if name in frozen else parts


def stored_shape(piece: Piece) -> tuple[int, ...]:
    """The shape of a piece in its file."""
    return piece.shape if piece.is_whole else (piece.numel,)


def write_pieces(
    path: Path,
    pieces: Mapping[str, Piece],
    parts: tuple[str, ...],
    states: Iterator[tuple[str, ParameterState]],
    frozen: Collection[str] = (),
) -> tuple[Files, Places]:
    """Write the elements of `pieces` from an engine's states, one parameter after the other.

    The states are exhausted also where nothing of them is written, as an engine may need all ranks for them.
    """
    layout = {
        f"{part}/{name}": (torch.float32, stored_shape(piece))
        for name, piece in pieces.items()
        for part in stored_parts(name, parts, frozen)
    }
    file = TensorFile(path, layout) if layout else None
    for name, state in states:
        if name in pieces:
            for part in stored_parts(name, parts, frozen):
                file.write(f"{part}/{name}", getattr(state, part))
    if file is None:
        return {}, {}
    size, sha256 = file.close()
    places = {
        name: {
            "shape": list(piece.shape),
            "file": path.name,
            "runs": [[spans.start, spans.length, spans.count, spans.stride] for spans in piece.spans],
            "frozen": name in frozen,
        }
        for name, piece in pieces.items()
    }
    return {path.name: {"bytes": size, "sha256": sha256}}, places


def copied(
    pieces: Mapping[str, Piece],
    parts: tuple[str, ...],
    states: Iterator[tuple[str, ParameterState]],
    frozen: Collection[str],
    memory: Tensor,
) -> list[tuple[str, ParameterState]]:
    """The states of `pieces`, copied into `memory` of the CPU: what the next steps change is as it was.

    From a GPU they are there when it has been synchronized.
    """
    copies, end = [], 0
    for name, state in states:
        if name in pieces:
            found, numel = {}, pieces[name].numel
            for part in stored_parts(name, parts, frozen):
                found[part] = memory[end : end + numel]
                found[part].copy_(getattr(state, part).detach().reshape(-1), non_blocking=True)
                end += numel
            copies.append((name, ParameterState(**found)))
    return copies


def write_index(path: Path, all_places: list[Places], parts: tuple[str, ...], model: dict) -> None:
    """Write where everything is, from what each rank has written; `model` describes the module (`describe`)."""
    parameters: dict[str, dict] = {}
    for places in all_places:
        for name, place in places.items():
            entry = parameters.setdefault(name, {"shape": place["shape"], "frozen": place["frozen"], "pieces": []})
            entry["pieces"].append({"file": place["file"], "runs": place["runs"]})
    write_text(path, json.dumps({"parts": list(parts), "model": model, "parameters": parameters}))


def describe(module: nn.Module) -> dict:
    """What a checkpoint says of a module beside its tensors: its class and its config."""
    config = getattr(module, "config", None)
    return {"kind": type(module).__name__, "config": config_to_dict(config) if is_dataclass(config) else None}


def untrained(engine: Engine) -> dict[str, Tensor]:
    """The tensors of a module's state that no optimizer changes, copied to the CPU."""
    trained = set(engine.pieces())
    return {n: t.detach().cpu().clone() for n, t in engine.module.state_dict().items() if n not in trained}


# --- Reading ---


class StateReader:
    """Reads any part of any parameter from the files of any layout; see `ibq.engine.base.Reader`."""

    def __init__(self, folder: Path, engine: str):
        self._folder, self._engine = folder, engine
        index = json.loads((folder / index_file(engine)).read_text())
        self.parts: tuple[str, ...] = tuple(part for part in PARTS if part in index["parts"])
        self.model: dict = index["model"]  # see `describe`
        self._entries: dict[str, dict] = index["parameters"]
        self._files: dict[str, StoredTensors] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        return {name: tuple(entry["shape"]) for name, entry in self._entries.items()}

    @property
    def frozen(self) -> set[str]:
        """The parameters that were not trained."""
        return {name for name, entry in self._entries.items() if entry.get("frozen")}

    def __call__(self, name: str, piece: Piece) -> ParameterState:
        """A part of a parameter, flat on the CPU."""
        found = self._find(name, piece)
        return ParameterState(**{part: self._read(part, name, piece, found) for part in self.parts})

    def untrained(self) -> dict[str, Tensor]:
        """The tensors that are not trained."""
        path = self._folder / buffers_file(self._engine)
        return load_file(path) if path.exists() else {}

    def full(self, part: str, name: str) -> Tensor:
        """All of one part of a parameter, in its shape."""
        shape = tuple(self._entries[name]["shape"])
        return self.read(part, name, whole(shape)).view(shape)

    def read(self, part: str, name: str, piece: Piece) -> Tensor:
        """The elements [numel] of a piece. MissingPartError if not all of them are in the files."""
        return self._read(part, name, piece, self._find(name, piece))

    def _find(self, name: str, piece: Piece) -> list[tuple[str, list[tuple[int, int, int]]]]:
        """(file, its overlaps with the piece) of every file that holds some of it."""
        if name not in self._entries or tuple(self._entries[name]["shape"]) != piece.shape:
            raise MissingPartError(f"{name} with shape {list(piece.shape)} is not in it")
        found = [
            (stored["file"], list(overlaps(piece.spans, [Spans(*numbers) for numbers in stored["runs"]])))
            for stored in self._entries[name]["pieces"]
        ]
        found = [(file, places) for file, places in found if places]
        count = sum(length for _, places in found for _, _, length in places)
        if count != piece.numel:
            raise MissingPartError(f"{name}: {count:,} of {piece.numel:,} elements are in it")
        return found

    def _read(self, part: str, name: str, piece: Piece, found) -> Tensor:
        if self._entries[name].get("frozen"):
            if part not in ("weight", "ema"):
                return torch.zeros(piece.numel)
            part = "weight"
        result = torch.empty(piece.numel)
        for file, places in found:
            first = min(place for _, place, _ in places)
            end = max(place + length for _, place, length in places)
            values = self._stored(file).elements(f"{part}/{name}", first, end)
            for target, place, length in places:
                result[target : target + length] = values[place - first : place - first + length]
        return result

    def _stored(self, file: str) -> StoredTensors:
        """One of the files; its header is read once, which takes longer than most tensors of it."""
        if file not in self._files:
            self._files[file] = StoredTensors(self._folder / file)
        return self._files[file]


def write_model(path: Path, reader: StateReader, part: str, metadata: Mapping[str, str] | None = None) -> None:
    """Write one part of all parameters, and what is not trained, as one file, never holding it whole."""
    rest = reader.untrained()
    layout = {name: (torch.float32, shape) for name, shape in reader.shapes.items()}
    layout |= {name: (tensor.dtype, tensor.shape) for name, tensor in rest.items()}
    file = TensorFile(path, layout, metadata)
    for name in layout:
        file.write(name, rest[name] if name in rest else reader.full(part, name))
    file.close()
