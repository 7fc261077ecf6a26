"""Starting a run from weights: what is checked before anything is written, what is loaded, what is kept of it."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibq import dist
from ibq.config import config_to_dict
from ibq.engine.base import Engine, ParameterState
from ibq.engine.pieces import Piece, take
from ibq.files import write_text
from ibq.progress import say
from ibq.training.checkpoint import weights_hash
from ibq.training.start_from.config import StartConfig
from ibq.training.start_from.fit import Beginning, Fit, Row
from ibq.training.start_from.places import Source
from ibq.training.task import Task

FILE = "first_weights.json"


class Start:
    """Where a run begins: from weights, or with new ones. `open_fit` reads the place and checks it against the config.

    A run that goes on from its own checkpoint reads no place.
    """

    def __init__(self, config: StartConfig | None, open_fit: Callable[[StartConfig], tuple[Source, Fit]]):
        self.config, self._open = config, open_fit
        self._found: tuple[Source, Fit] | None = None
        self.origin: dict[str, Any] = {}  # what is said of it beside the run's weights

    def check(self) -> None:
        """Read the place; UserError where the run cannot start from it."""
        if self.config is not None and self._found is None:
            self._found = self._open(self.config)

    def begin(self, task: Task, folder: Path, device: torch.device) -> None:
        """Give the modules their first weights; rank 0 says which, and writes it down in the run's folder."""
        if self.config is None:
            if dist.is_main():
                (folder / FILE).unlink(missing_ok=True)
            return
        self.check()
        source, fit = self._found
        for name, beginning in fit.engines.items():
            load(task.engines[name], beginning, device)
        task.load_rank_tensors(task.rank_tensors() | fit.rank_tensors)
        sha256 = dist.on_main(lambda: weights_hash(source.tensors))
        self.origin = {"start_from": {"place": self.config.place, "weights_sha256": sha256}}
        if source.codes_of is not None:
            self.origin["start_from"]["codes_of"] = source.codes_of
        if dist.is_main():
            say(f"start_from: {source.place}, weights of SHA-256 {sha256[:16]}...:\n{table(fit.rows)}")
            record = {**self.origin["start_from"], "file": str(source.place), "config": config_to_dict(self.config)}
            write_text(folder / FILE, json.dumps(record | {"table": fit.table()}, indent=1) + "\n")
        self._found = None  # and with it what has been read

    def go_on(self, folder: Path) -> None:
        """The run goes on from its checkpoint: say so if its config names another start than it has had."""
        record = {}
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((folder / FILE).read_text())
        self._found = None
        if record:
            kept = ("place", "weights_sha256", "codes_of")
            self.origin = {"start_from": {name: record[name] for name in kept if name in record}}
        now = None if self.config is None else config_to_dict(self.config)
        if record.get("config") != now and dist.is_main():
            began = f"from {record['place']}" if record else "with new weights"
            other = "is not given" if now is None else f"is {now['place']}"
            if record and now and record["place"] == now["place"]:
                other = "has other options"
            say(f"note: start_from {other}, but this run began {began} and goes on; use --fresh to start over")


def table(rows: list[Row]) -> str:
    """One line for each part."""
    width = max(len(row.part) for row in rows)
    lines = (f"  {row.part:{width}}  {row.became:5}  {_count(row):12}  {row.note}".rstrip() for row in rows)
    return "\n".join(lines)


def _count(row: Row) -> str:
    return "" if not row.tensors else f"{row.tensors:,} tensor{'s' if row.tensors > 1 else ''}"


@torch.no_grad()
def load(engine: Engine, beginning: Beginning, device: torch.device) -> None:
    """Give an engine's module its first weights, and its average the same; every rank calls it.

    What is made of others' weights is computed on `device`.
    """
    values = beginning.make(device)
    initial: dict[str, Tensor] = {}
    for name, state in engine.named_state():  # to the end on every rank: an engine may need all of them
        if name not in beginning.taken and (name not in values or values[name].new is not None):
            initial[name] = state.weight.detach().float().cpu().reshape(-1).clone()
    missing = (beginning.taken | values.keys()) - engine.pieces().keys()
    # A rank of ZeRO may hold no element of a parameter, but then it has an empty piece of it.
    assert not missing, f"weights that the engine does not load: {sorted(missing)}"
    moments = beginning.moments

    def read(name: str, piece: Piece) -> ParameterState:
        if name not in beginning.taken:
            return ParameterState(weight=_mixed(values, initial, name, piece))
        weight = take(beginning.read(name), piece).float()
        if moments is None:
            return ParameterState(weight=weight)
        first, second = (take(moment, piece).float() for moment in moments.of(name))
        return ParameterState(weight=weight, moment1=first, moment2=second)

    engine.load_named_state(read, 0 if moments is None else moments.steps)


def _mixed(values: Mapping, initial: Mapping[str, Tensor], name: str, piece: Piece) -> Tensor:
    """The elements of a piece of a parameter that is made, with its initial ones where it has no others."""
    if name not in values:
        return initial[name]
    made = take(values[name].weight, piece)
    if values[name].new is None:
        return made
    return torch.where(take(values[name].new, piece), initial[name], made)
