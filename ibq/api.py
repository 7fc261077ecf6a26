"""Loading trained models and generating images: what `import ibq` offers."""

import json
import numbers
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ibq.config import ConfigError, UserError, load_config, parse_config
from ibq.config_yaml import one_line
from ibq.decoding import Decoder
from ibq.editing import Edit
from ibq.engine.state_files import StateReader, index_file
from ibq.interop.families import SUFFIXES, read_published
from ibq.interop.published import Hints, ModelConfig
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.ops.backend import image_format
from ibq.pixels import codes_of, pixels_of
from ibq.sampler import SamplerConfig
from ibq.sampling import sample_blocks, settled_for

Weights = Literal["ema", "raw"]
CONFIGS = {Tokenizer: TokenizerConfig, Transformer: TransformerConfig}
MODEL_PLACES = (
    "a run folder, its `best` folder, a checkpoint folder, a .safetensors file, or a published .ckpt or .pt file"
)


class NoModelError(UserError):
    """A file of weights that does not say which model they are of."""


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A model's configuration and tensors, and the file or folder that holds them."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]  # as in its state_dict; those of a checkpoint are read when they are asked for
    source: Path


def load_tokenizer(path: str | Path, *, weights: Weights = "ema", device: torch.device | str = "auto") -> Tokenizer:
    """A tokenizer for use (eval mode) from one of MODEL_PLACES; UserError if there is none.

    `weights` chooses between the averaged and the raw weights of a checkpoint or a published file; a run's best ones
    are the averaged.
    """
    if is_published(path):
        return _ready_published(Tokenizer, path, weights, device)
    return _load(Tokenizer, path, device, weights)


def load_transformer(
    path: str | Path,
    *,
    config: TransformerConfig | None = None,
    weights: Weights = "ema",
    device: torch.device | str = "auto",
) -> Transformer:
    """A transformer for use (eval mode) from one of MODEL_PLACES; UserError if there is none.

    A `.ckpt` does not say its number of heads: without `config` the paper's rule (heads of 64 dimensions, 16 x 16
    tokens) is taken. `weights` as in `load_tokenizer`.
    """
    if is_published(path):
        return _ready_published(Transformer, path, "ema", device, config)
    if config is not None:
        raise UserError(f"{path}: has a config of its own; give `config` only with a published .ckpt file")
    return _load(Transformer, path, device, weights)


def pretrained_folder(path: str | Path) -> Path:
    """The folder with model.safetensors and config.yaml that `path` (it, or a run folder) means; UserError if none."""
    path = Path(path)
    for folder in (path / "best", path):
        if (folder / "model.safetensors").exists():
            return folder
    raise UserError(f"no model at {str(path)!r}: give {MODEL_PLACES}")


def trained_on(path: str | Path) -> str | None:
    """The hash of the tokenizer whose codes a transformer was trained on, where its run tells."""
    return _info(path, "tokenizer")


def same_codes_as(path: str | Path) -> str | None:
    """The hash of the tokenizer whose codes are those of a tokenizer of which since then only the decoder was trained.

    Where its run tells: `codes` in ibq/training/post_training.py.
    """
    return _info(path, "codes_of")


def _info(path: str | Path, name: str) -> str | None:
    """What a run has written beside its best weights, or an export into its file; None for what neither tells."""
    path = Path(path)
    if path.is_file():
        try:
            return read_metadata(path)[0].get(name)
        except UserError:  # a file of another kind
            return None
    if any((path / index_file(kind.__name__.lower())).exists() for kind in CONFIGS):
        path = path.absolute().parents[1]  # of a checkpoint its run tells
    try:
        return json.loads((pretrained_folder(path) / "info.json").read_text()).get(name)
    except (UserError, OSError, ValueError, AttributeError):
        return None


def is_published(path: str | Path) -> bool:
    """Whether this is a file of the form that other implementations publish."""
    return Path(path).is_file() and Path(path).suffix in SUFFIXES


def _ready_published(
    kind: type[nn.Module], path: str | Path, weights: Weights, device, config: TransformerConfig | None = None
) -> nn.Module:
    """The model of a kind in a published file of any family."""
    try:
        found = read_published(path, weights=weights, hints=Hints(kind=kind, transformer=config))
    except ValueError as error:
        raise UserError(f"not a published checkpoint of this kind: {one_line(error)}") from error
    # Copied: the file may change or go away while the model is in use.
    state = {name: tensor.clone() for name, tensor in found[0].tensors.items()}
    return _ready(kind, FoundModel(config=found[0].config, tensors=state, source=Path(path)), device)


def _load(kind: type[nn.Module], path: str | Path, device, weights: Weights) -> nn.Module:
    return _ready(kind, find_model(kind, path, weights), device)


def find_model(kind: type[nn.Module], path: str | Path, weights: Weights = "ema") -> FoundModel:
    """The Tokenizer or Transformer, not yet built, at one of this project's own MODEL_PLACES; UserError if none."""
    path = Path(path)
    if (path / index_file(kind.__name__.lower())).exists():
        return _from_checkpoint(kind, path, weights)
    if weights != "ema":
        raise UserError(f"{path}: holds one set of weights; raw ones are in a run's checkpoints: give such a folder")
    if path.is_file() and path.suffix == ".safetensors":
        return _from_file(kind, path)
    folder = pretrained_folder(path)
    if not (folder / "config.yaml").exists():  # a folder for the Hub, whose file says all
        try:
            return _from_file(kind, folder / "model.safetensors")
        except NoModelError as error:
            raise UserError(
                f"{folder}: has no config.yaml, and model.safetensors does not say what it holds; copy config.yaml "
                "from the run's `best` folder"
            ) from error
    try:
        config = load_config(CONFIGS[kind], folder / "config.yaml")
    except ConfigError as error:
        raise UserError(f"not a model of this kind: {_of_another_kind(kind, folder) or error}") from error
    return FoundModel(config=config, tensors=read_tensors(folder / "model.safetensors"), source=folder)


def _of_another_kind(kind: type[nn.Module], folder: Path) -> str:
    """What to say of a folder with a model of the other kind; "" for any other."""
    (other,) = CONFIGS.keys() - {kind}
    try:
        load_config(CONFIGS[other], folder / "config.yaml")
    except ConfigError:
        return ""
    return f"{folder / 'config.yaml'} is of a {other.__name__}; give the folder of a {kind.__name__}"


def _from_checkpoint(kind: type[nn.Module], path: Path, weights: Weights) -> FoundModel:
    """That of a training run's checkpoint, in whatever layout it was written."""
    try:
        reader = StateReader(path, kind.__name__.lower())
        part = "ema" if weights == "ema" and "ema" in reader.parts else "weight"
        config = parse_config(CONFIGS[kind], reader.model["config"], str(path))
        return FoundModel(config=config, tensors=CheckpointTensors(path, reader, part), source=path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: a damaged checkpoint ({error}); take another")


class CheckpointTensors(Mapping):
    """One part of all parameters of a checkpoint, each read when it is asked for, and what is not trained."""

    def __init__(self, path: Path, reader: StateReader, part: str):
        self._path, self._reader, self._part = path, reader, part
        self.shapes, self.untrained = reader.shapes, reader.untrained()

    def __getitem__(self, name: str) -> Tensor:
        if name in self.untrained:
            return self.untrained[name]
        try:
            return self._reader.full(self._part, name)
        except (OSError, SafetensorError, ValueError) as error:
            raise _damaged(self._path, error) from error

    def __iter__(self) -> Iterator[str]:
        return iter((*self.shapes, *self.untrained))

    def __len__(self) -> int:
        return len(self.shapes) + len(self.untrained)


def _from_file(kind: type[nn.Module], path: Path) -> FoundModel:
    """That of a file that `tools/convert.py` has written."""
    _, model = read_metadata(path)
    if model["kind"] != kind.__name__:
        raise UserError(f"{path}: holds a {model['kind']}, not a {kind.__name__}")
    config = parse_config(CONFIGS[kind], model["config"], str(path))
    return FoundModel(config=config, tensors=read_tensors(path), source=path)


def read_metadata(path: Path) -> tuple[dict[str, str], dict]:
    """The metadata of a .safetensors file, and the model's `kind` and `config` in it; UserError for another file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if "model" not in metadata:
            raise NoModelError(
                f"{path}: does not say which model it holds; give the folder with its config.yaml, or write it again "
                "by tools/convert.py"
            )
        model = json.loads(metadata["model"])
        if not isinstance(model, dict) or not {"kind", "config"} <= model.keys():
            raise ValueError("`model` is not a table of kind and config")
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a model of this project ({error}); write it again by tools/convert.py") from error
    return metadata, model


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; UserError where it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it or write it again") from error


def _ready(kind: type[nn.Module], found: FoundModel, device) -> nn.Module:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = kind(found.config)
    try:
        model.load_state_dict({**found.tensors}, strict=True, assign=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise UserError(f"{found.source}: the weights do not fit config.yaml: {reason}") from error
    model.to(device, memory_format=image_format(device) if kind is Tokenizer else torch.preserve_format)
    return model.eval().requires_grad_(False)


def generate(
    tokenizer: Tokenizer,
    transformer: Transformer | Decoder,
    classes: Sequence[int],
    *,
    seed: int | Sequence[int] = 0,
    keep: Tensor | None = None,
    codes: Tensor | None = None,
    images: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings,
) -> Tensor:
    """One uint8 image [3, H, W] per entry of `classes`: [N, 3, H, W], on the CPU.

    Image i is drawn with seed `seed` + i, or with `seed`[i], and depends on (weights, class, that seed, settings)
    alone, on a given device. `settings` are those of `ibq.sampler.SamplerConfig`: guidance_scale, temperature, top_k,
    top_p, precision, grid=(rows, columns of codes), ...; on a GPU it draws in bf16 and large blocks unless they say
    otherwise. `progress` is called with (images done, images).

    With `keep`, a bool mask [h, w] of codes, only codes where it is False are drawn, to fit the others and the class
    (inpainting). What is kept are `codes` [h, w] for all, or [N, h, w] for each image, or those of `images`, uint8
    [3, H, W] or [N, 3, H, W]. Any mask will do for a model that was trained with order: random, for others one whose
    kept codes are the first in raster order. See `ibq/editing.py`.
    Raises ValueError for classes, settings or masks out of range.
    """
    edit = _edit_of(tokenizer, keep, codes, images)
    config = SamplerConfig(**settings)
    config = config if edit is None else edit.fitted(config, transformer.config, len(classes))
    config = settled_for(transformer, config)
    seeds = [seed + i for i in range(len(classes))] if isinstance(seed, numbers.Integral) else seed
    size = [side * tokenizer.downsampling for side in config.grid]
    found, done = torch.empty(len(classes), tokenizer.config.in_channels, *size, dtype=torch.uint8), 0
    for block in pixels_of(sample_blocks(transformer, classes, seeds, config, edit), tokenizer, config.precision):
        found[done : done + len(block)] = torch.from_numpy(block).permute(0, 3, 1, 2)
        done += len(block)
        if progress is not None:
            progress(done, len(classes))
    return found


def _edit_of(tokenizer: Tokenizer, keep: Tensor | None, codes: Tensor | None, images: Tensor | None) -> Edit | None:
    """What the arguments of `generate` mean."""
    if (codes is None) + (images is None) != (2 if keep is None else 1):
        raise ValueError("keep: goes with either `codes` or `images`, of which the part is kept; give both or neither")
    if keep is None:
        return None
    if codes is None:
        if images.dtype != torch.uint8 or images.ndim not in (3, 4):
            shape = list(images.shape)
            raise ValueError(f"images: {shape} of {images.dtype}; give uint8 pixels [3, H, W] or [N, 3, H, W]")
        codes = codes_of(tokenizer, images.reshape(-1, *images.shape[-3:]))
        codes = codes if images.ndim == 4 else codes[0]
    return Edit(codes=codes, keep=keep)
