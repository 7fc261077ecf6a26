"""Checkpoints as tables of tensors: reading them, taking parts out of them, and naming whatever does not fit."""

import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

DAMAGED = "is damaged, or no file of torch.save"
DOWNLOAD_AGAIN = "download it again and compare its SHA-256 with the publisher's"
WRAPPERS = ("module.", "_orig_mod.", "model.")
FIRST_STAGE, TRANSFORMER = "first_stage_model.", "transformer."  # the two parts of the reference's AR checkpoints


def read_file(path: str | Path) -> Mapping[str, Any]:
    """A file of `torch.save` as plain containers of tensors, which stay on the disk until they are used.

    Nothing is unpickled but tensors and plain containers. Raises ValueError that names the file and the remedy.
    """
    try:
        found = _load(path)
    except UnpicklingError as error:
        raise ValueError(_unsafe_or_damaged(path, str(error))) from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened ({error.strerror or error}); check the path") from error
    except Exception as error:  # damage shows in many ways: bad archives, bad numbers, names that are not there
        raise ValueError(f"{path}: {DAMAGED} ({_first_line(error)}); {DOWNLOAD_AGAIN}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: has no table of tensors; expected a checkpoint with a `state_dict`")
    return found


def _load(path: str | Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles of other programs, which are then refused anyway
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # a file in the form before PyTorch 1.6


def table_of(checkpoint: Mapping[str, Any], path: str | Path, *keys: str) -> dict[str, Tensor]:
    """The first table of tensors under one of the keys, or the file itself if it is one; ValueError without any."""
    state = next((checkpoint[key] for key in keys if key in checkpoint), checkpoint)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path}: has no table of tensors; expected a checkpoint with {' or '.join(f'`{k}`' for k in keys)}"
        )
    wrapper = wrapper_of(state)
    return {name.removeprefix(wrapper).replace("._orig_mod.", "."): value for name, value in state.items()}


def wrapper_of(names: Iterable[str]) -> str:
    """What DDP (`module.`), torch.compile (`_orig_mod.`) or a Lightning module (`model.`) has put before all names."""
    names, found = [*names], ""
    while names and (prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in names)), "")):
        names, found = [name.removeprefix(prefix) for name in names], found + prefix
    return found


def read_state(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: its `state_dict`, or the file itself where it is a plain table of tensors.

    Raises ValueError like `read_file`.
    """
    return table_of(read_file(path), path, "state_dict")


def damaged_record(path: str | Path) -> str | None:
    """The first record of a checkpoint whose bytes do not have the checksum that the file gives for them.

    Mapped into memory, a file is not checked. Files may be written with no checksums at all: nothing is said of one in
    which none is right.
    """
    if not zipfile.is_zipfile(path):
        return None
    wrong, right = [], 0
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            try:
                with archive.open(name) as record:
                    while record.read(1 << 22):
                        pass
                right += 1
            except zipfile.BadZipFile:
                wrong.append(name)
    return wrong[0] if wrong and right else None


def _unsafe_or_damaged(path: str | Path, reason: str) -> str:
    """What to say of a pickle that is refused."""
    if unsafe := re.search(r"GLOBAL ([\w.]+)", reason):
        return (
            f"{path}: cannot be read as tensors only: {unsafe[1]} in it may run code; ask for a file of tensors, or "
            "save its `state_dict` alone in an environment that you trust with it"
        )
    # Only what the unpickler itself says: around it PyTorch advises to switch the safety off.
    reason = reason.split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].strip()
    return f"{path}: {DAMAGED} ({_first_line(reason)}); {DOWNLOAD_AGAIN}"


def _first_line(error: object) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def require_same_tensors(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    source: str,
    unexpected: Iterable[str] = (),
) -> None:
    """Raise ValueError naming what is missing, unexpected (with `unexpected`) or wrongly shaped."""
    wrong = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = {
        "missing tensors": [name for name in expected if name not in found],
        "unexpected tensors": [*unexpected, *(name for name in found if name not in expected)],
        "wrong shapes": wrong,
    }
    lines = [f"{problem}: {listing(names)}" for problem, names in problems.items() if names]
    if lines:
        raise ValueError(f"{source}: {'; '.join(lines)}")


def take(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with `prefix`, under their names without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def listing(names: list[str], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def shape_of(tensors: Mapping[str, Tensor], name: str, dimensions: int, shown: str | None = None) -> torch.Size:
    """The shape of a tensor that a configuration is read from; ValueError, under the name `shown`, if it cannot be."""
    if name not in tensors:
        raise ValueError(f"missing tensors: {shown or name}")
    shape = tensors[name].shape
    if len(shape) != dimensions:
        raise ValueError(f"wrong shapes: {shown or name} {list(shape)} instead of one of {dimensions} dimensions")
    return shape


def count_numbered(tensors: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern` finds in the names; 0 where it finds none."""
    numbers = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def encoder_sizes(tensors: Iterable[str], shape: Callable[[str], torch.Size]) -> dict[str, Any]:
    """What the shapes of an encoder's weights (our names) say of a `TokenizerConfig`."""
    channels, in_channels = shape("encoder.conv_in.weight")[:2]
    levels = count_numbered(tensors, r"encoder\.down\.(\d+)\.block\.")
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    return {
        "in_channels": in_channels,
        "channels": channels,
        "channel_multipliers": tuple(width // channels for width in widths),
        "res_blocks": count_numbered(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shape("encoder.conv_out.weight")[0],
    }


def argument(arguments: Mapping[str, Any], key: str, where: str = "") -> Any:
    """An argument of the reference's model; ValueError where it is missing. `where` is its path in the YAML file."""
    if key not in arguments:
        raise ValueError(f"{where}{key}: is missing; give the reference's complete model arguments")
    return arguments[key]


def reject_unknown(arguments: Mapping[str, Any], known: Iterable[str], where: str, model: str) -> None:
    """ValueError for an argument of the reference's model that is not among the known ones."""
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ValueError(f"{where}{unknown[0]}: is not an argument of the reference's {model} that can be converted")
