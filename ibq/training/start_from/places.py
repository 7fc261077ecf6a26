"""What there is at a place that a run may start from: a model's weights, and what else its training has left there."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ibq.api import find_model, is_published, same_codes_as, trained_on
from ibq.config import UserError
from ibq.config_yaml import one_line
from ibq.engine.state_files import StateReader, index_file
from ibq.hub import downloaded, downloaded_file
from ibq.interop.catalogue import CATALOGUE
from ibq.interop.families import SUFFIXES, read_published
from ibq.interop.lightning_tokenizer import DISCRIMINATOR, EMA, is_buffer, optimizer_states
from ibq.interop.published import ModelConfig, Published
from ibq.interop.reference_tensors import DAMAGED, DOWNLOAD_AGAIN, damaged_record, read_file, require_same_tensors, take
from ibq.models.tokenizer import Tokenizer
from ibq.training.checkpoint import STATE, DamagedError, verify_checkpoint, weights_hash
from ibq.training.start_from.config import StartConfig

HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")
# In which order the published program hands a tokenizer's parts to its optimizer.
PARTS = ("encoder.", "decoder.", "quantizer.codebook", "quant_conv.", "post_quant_conv.")
WITHOUT_OPTIMIZER = "start_from.also=[discriminator, lecam]"


@dataclass(frozen=True, kw_only=True)
class Moments:
    """The state of one module's optimizer after `steps` updates."""

    steps: int
    of: Callable[[str], tuple[Tensor, Tensor]]  # a parameter's first and second moment, in its shape


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to start from; tensors under the names of this project, mostly on the disk until they are used."""

    place: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    discriminator: Mapping[str, Tensor] = field(default_factory=dict)  # with its batch statistics
    lecam: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)  # by engine
    rest: Mapping[str, int] = field(default_factory=dict)  # what else is there: number of tensors
    tokenizer: str | None = None  # of a transformer: the hash of the tokenizer whose codes it knows, if that is known
    codes_of: str | None = None  # of a tokenizer: the same of an earlier one whose codes it has


def open_place(kind: type[nn.Module], start: StartConfig) -> Source:
    """The Tokenizer or Transformer at a place. UserError, naming the file, for one that does not hold it whole."""
    path = local_place(start.place)
    source = _published(kind, path, start) if is_published(path) else _own(kind, path, start)
    with torch.device("meta"):
        expected = _shapes(kind(source.config).state_dict())
    try:
        require_same_tensors(source.shapes, expected, str(source.place))
    except ValueError as error:
        raise UserError(f"{error}; write the file again, or give another") from error
    return source


def local_place(place: str) -> Path:
    """Where a place is on this machine; one of the Hub is downloaded once."""
    path, hub = Path(place), HUB_NAME.fullmatch(place)
    if path.exists() or hub is None or Path(path.parts[0]).exists():
        return path
    repository, file = hub.groups()
    if file is None:  # a published one has its name in the catalogue; one of this project has always the same files
        files = sorted({entry.file for entry in CATALOGUE.values() if entry.repository == repository})
        if len(files) > 1:
            raise UserError(f"{place}: holds several models; give one of {', '.join(f'{place}/{f}' for f in files)}")
        file = next(iter(files), None)
    try:
        return downloaded(repository) if file is None else downloaded_file(repository, file)
    except UserError as error:
        raise UserError(f"{place}: no such file or folder, and on the Hub: {error}") from error


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# --- Files of others ---


def _published(kind: type[nn.Module], path: Path, start: StartConfig) -> Source:
    try:
        if record := damaged_record(path):
            raise ValueError(f"{path}: {DAMAGED} ({record} has another checksum); {DOWNLOAD_AGAIN}")
        models = read_published(path, weights=start.weights if kind is Tokenizer else "ema")
    except ValueError as error:
        raise UserError(f"not a published checkpoint to start from: {one_line(error)}") from error
    model = next((model for model in models if model.kind is kind), None)
    if model is None:
        raise UserError(
            f"{path}: holds no {kind.__name__} but a {models[0].kind.__name__}; give a {kind.__name__}'s file"
        )
    others = [other for other in models if other is not model]
    rest = {other.kind.__name__.lower(): len(other.tensors) for other in others}
    hashes = [weights_hash(other.tensors) for other in others if other.kind is Tokenizer]
    source = {"place": path, "config": model.config, "tensors": model.tensors, "shapes": _shapes(model.tensors)}
    if kind is not Tokenizer:
        return Source(**source, rest=rest, tokenizer=next(iter(hashes), None))
    return Source(**source, **_lightning_parts(path, model, "optimizer" in start.also), rest=rest | _rest_of(model))


def _lightning_parts(path: Path, model: Published, with_optimizer: bool) -> dict:
    """The discriminator and the optimizers of a tokenizer's file."""
    discriminator = take(model.rest, DISCRIMINATOR)
    trained = [
        {name: model.tensors[name] for part in PARTS for name in model.tensors if name.startswith(part)},
        {name: tensor for name, tensor in discriminator.items() if not is_buffer(name)},
    ]
    try:
        states = optimizer_states(read_file(path), trained) if with_optimizer else []
    except ValueError as error:
        raise UserError(f"{path}: {error}; leave it out: {WITHOUT_OPTIMIZER}") from error
    moments = {
        name: Moments(steps=state.steps, of=state.moments.__getitem__)
        for name, state in zip(("tokenizer", "discriminator"), states, strict=False)
    }
    return {"discriminator": discriminator, "moments": moments}


def _rest_of(model: Published) -> dict[str, int]:
    names = [name for name in model.rest if not name.startswith(DISCRIMINATOR)]
    averages = sum(name.startswith(EMA) for name in names)
    lpips = sum(name.startswith("loss.perceptual_loss.") for name in names)
    other = "raw weights" if model.weights == "ema" else "other tensors"
    found = {"averages": averages, "LPIPS": lpips, other: len(names) - averages - lpips}
    return {name: count for name, count in found.items() if count}


# --- Own ones ---


def _own(kind: type[nn.Module], path: Path, start: StartConfig) -> Source:
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(f"{path}: not a file of weights; give one that ends with {', '.join(sorted(SUFFIXES))}, ...")
    name = kind.__name__.lower()
    if (path / STATE).exists():
        try:
            verify_checkpoint(path)
        except DamagedError as error:
            raise UserError(f"{path}: {error}; give another checkpoint") from error
        if not (path / index_file(name)).exists():
            raise UserError(f"{path}: holds no {kind.__name__}; give a checkpoint of such a run")
    found = find_model(kind, path, start.weights)
    shapes = getattr(found.tensors, "shapes", None)
    shapes = _shapes(found.tensors) if shapes is None else {**shapes, **_shapes(found.tensors.untrained)}
    source = {"place": found.source, "config": found.config, "tensors": found.tensors, "shapes": shapes}
    if kind is not Tokenizer:
        return Source(**source, tokenizer=known_tokenizer(path))
    parts = _checkpoint_parts(path) if (path / STATE).exists() else {}
    return Source(**source, **parts, codes_of=same_codes_as(path))


def known_tokenizer(path: Path) -> str | None:
    """The hash of the tokenizer whose codes an own transformer was trained on, if its place tells."""
    if (path / STATE).exists():
        return json.loads((path / STATE).read_text())["order"].get("tokenizer")
    return trained_on(path)


def _checkpoint_parts(path: Path) -> dict:
    """The discriminator, LeCAM's averages and the optimizers of a tokenizer run's checkpoint."""
    try:
        updates = json.loads((path / STATE).read_text())["updates"]
        readers = {name: StateReader(path, name) for name in updates}
        kept = load_file(path / "rank-0.safetensors")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: a damaged checkpoint ({error}); give another") from error
    moments = {
        name: Moments(steps=updates[name], of=lambda n, reader=reader: _moments_of(reader, n))
        for name, reader in readers.items()
        if "moment1" in reader.parts
    }
    if "discriminator" not in readers:
        return {"moments": moments}
    reader = readers["discriminator"]
    weights = {name: reader.full("weight", name) for name in reader.shapes}
    return {
        "discriminator": weights | take(kept, "discriminator/"),
        "lecam": take(kept, "lecam/"),
        "moments": moments,
    }


def _moments_of(reader: StateReader, name: str) -> tuple[Tensor, Tensor]:
    return reader.full("moment1", name), reader.full("moment2", name)
