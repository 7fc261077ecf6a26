"""What of a module is trained, and how fast: `OptimizerConfig.groups`, the same under every engine."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ibq.config import UserError
from ibq.engine.base import OptimizerConfig

KEY = "optimizer.groups"


def freeze(module: nn.Module, config: OptimizerConfig) -> frozenset[str]:
    """Take gradients from the parameters that the config freezes, in place, before an engine wraps them; their names.

    UserError for a pattern that decides nothing, and where nothing is left to train.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    deciding = {name: pattern for name in names if (pattern := _pattern(name, config)) is not None}
    for pattern in config.groups:
        if pattern not in deciding.values():
            raise UserError(_useless(pattern, names, type(module).__name__))
    frozen = frozenset(name for name, pattern in deciding.items() if config.groups[pattern] == "frozen")
    if frozen and len(frozen) == len(names):
        raise UserError(f"{KEY}: everything is frozen; leave something to train")
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    return frozen


def _pattern(name: str, config: OptimizerConfig) -> str | None:
    """The pattern that decides about a parameter."""
    return next((pattern for pattern in config.groups if fnmatchcase(name, pattern)), None)


def _useless(pattern: str, names: list[str], module: str) -> str:
    if any(fnmatchcase(name, pattern) for name in names):
        return f"{KEY}: {pattern} comes after patterns that match all of its parameters; write it before them"
    parts = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)}
    choices = [*names, *(f"{part}.*" for part in sorted(parts))]
    near = difflib.get_close_matches(pattern, choices, cutoff=0.0)
    return f"{KEY}: {pattern} matches no parameter of the {module}; the nearest are {', '.join(near)}"


def optimizer_groups(trained: Iterable[tuple[str, Tensor, bool]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """An optimizer's groups of (name of a parameter, tensor, whether it decays), those without a tensor left out."""
    groups: dict[tuple[str, float], list[Tensor]] = {}
    for name, tensor, decays in trained:
        pattern = _pattern(name, config)
        factor = 1.0 if pattern is None else config.groups[pattern]
        groups.setdefault(("decay" if decays else "no_decay", factor), []).append(tensor)
    return [{"params": groups[key], "name": key[0], "factor": key[1]} for key in sorted(groups)]
