"""torch.compile of a module's units, the same parts whose weights an engine that shards gathers at a time.

Not of the whole module: the gradients of a unit are there, and can be sent to other ranks, when its own backward pass
is done, and units that are alike are compiled once.
"""

import contextlib
import warnings
from contextlib import AbstractContextManager

import torch
from torch import nn

from ibq.ops.backend import missing_for_compile, require_compile

# That PyTorch may make of one function before it gives up: shapes of the levels, with gradients and without, for each
# shape of images.
VARIANTS = 1_024


def units_of(module: nn.Module) -> list[nn.Module]:
    """What the module offers as `units()`; nothing if it offers none."""
    return module.units() if hasattr(module, "units") else []


def compile_units(
    module: nn.Module, setting: bool | None, device: torch.device, *, without_hooks: bool = False
) -> bool:
    """Compile the module's units at their first use, for the shapes that they meet; whether that will be.

    `setting` None: on a GPU where it can, if its units are of one kind or two, so that it takes seconds and not
    minutes. UserError where there is no compiler. `without_hooks`: of the units' own hooks nothing is compiled, and
    they run around it.
    """
    if setting is None:
        setting = device.type == "cuda" and not missing_for_compile("cuda") and _kinds(units_of(module)) in (1, 2)
    if setting:
        require_compile(device.type, "engine.compile", "set engine.compile=false")
    units = units_of(module) if setting else []
    if units:
        for limit in ("recompile_limit", "accumulated_recompile_limit"):
            setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), VARIANTS))
        # A rotary table is complex; all that is compiled of it is to read it as pairs of real numbers.
        warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
    for unit in units:
        if without_hooks:
            unit.forward = torch.compile(unit.forward, dynamic=False)
        else:
            unit.compile(dynamic=False)
    return bool(units)


def uncompiled(applies: bool) -> AbstractContextManager:
    """Within this context compiled modules run as they are written, if it `applies`."""
    return torch.compiler.set_stance("force_eager") if applies else contextlib.nullcontext()


def _kinds(units: list[nn.Module]) -> int:
    """How many of them differ, and so would be compiled each by itself."""
    return len({tuple((name, p.shape) for name, p in unit.named_parameters()) for unit in units})
