"""Checkpoints as tables of tensors: reading them, taking parts out of them, and naming whatever does not fit."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

FIRST_STAGE, TRANSFORMER = "first_stage_model.", "transformer."  # the two parts of the reference's AR checkpoints


def read_state(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: its `state_dict`, or the file itself where it is a plain table of tensors.

    Nothing is unpickled but tensors and plain containers. Raises ValueError where that is not enough.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path}: cannot be read as tensors only ({str(error).splitlines()[0]}); "
            "save its `state_dict` alone in an environment that you trust with the file"
        ) from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: has no table of tensors; expected a checkpoint with a `state_dict`")
    return dict(state)


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


def count_numbered(tensors: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern` finds in the names; 0 where it finds none."""
    numbers = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


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
