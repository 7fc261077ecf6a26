"""Runs and what is kept of them for comparisons: config, curves and where they come from."""

import json
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibq.config import ConfigError, UserError, config_to_dict, parse_config
from ibq.config_yaml import read_layers, unwrap
from ibq.files import read_lines, write_text

# Settings that leave the curves as they are, but for rounding and luck; a key stands for all below it.
FREE = ("output", "seed", "device", "usage_alarm", "engine", "heartbeat", "checkpoint", "log",
        "data.train", "data.validation", "data.validation_every", "data.tokenizer", "data.allow_other_tokenizer",
        "data.workers", "data.in_memory", "data.max_bad_fraction", "data.retries", "data.cache_folder",
        "data.cache_gib", "data.unindexed", "data.streams", "data.shuffle_window",
        "training.log_every", "training.validate_every", "training.max_bad_steps",
        "model.gradient_checkpointing", "model.checkpoint_selective",
        "loss.perceptual.weights", "loss.perceptual.sha256")  # fmt: skip
# Settings that may differ, but change the curves a little or from some step on: it is said.
SAID = ("precision", "statistics", "training.max_steps", "training.epochs", "training.micro_batch",
        "training.validation_images", "schedule.warmup_steps", "codebook_start.warmup_steps",
        "loss.gan.start_step")  # fmt: skip
# Places on the machine of a run: a reference only says that there is one.
PLACES = ("output", "data.train", "data.validation", "data.tokenizer", "data.cache_folder", "loss.perceptual.weights",
          "start_from", "start_from.place")  # fmt: skip
GROUPS = "optimizer.groups"  # one setting: its keys are patterns, which have dots of their own
SOURCES = "data.sources"  # a list, whose items have places
SAMPLES = "samples an epoch"  # stands for the data, whose name says little
ABSENT = "-"
LEFT_OUT = re.compile(r"seconds/|images_per_second|tokens_per_second|peak_memory_gib|data/bad_samples|bad_steps")
MOST_ROWS, DIGITS = 120, 5  # of a reference

Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run, or a reference, which is a run made small; `config` has every setting under its dotted name."""

    name: str
    config: Mapping[str, Any]
    rows: Rows
    origin: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.config["seed"]

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """[(step, value)], without what is not finite."""
        found = [(row["step"], float(row[metric])) for row in self.rows if metric in row]
        return [(step, value) for step, value in found if math.isfinite(value)]

    def metrics(self) -> list[str]:
        """The names of its curves."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name not in ("step", "data/epoch")))


def read_run(folder: Path) -> TrainedRun:
    """A run from its folder; UserError where there is none, or has logged nothing yet."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder}: has no config.yaml; give the folder of a run, its `output`")
    (layer,) = read_layers(file)
    config = _flat_config(unwrap(layer), str(file))
    rows = read_lines(folder / "metrics.jsonl")
    if not any("loss/total" in row for row in rows):
        raise UserError(f"{folder / 'metrics.jsonl'}: no loss is logged yet; wait for `training.log_every` steps")
    return TrainedRun(name=folder.name, config=config | _samples(config, rows), rows=rows, origin=_origin(folder))


def _origin(folder: Path) -> dict[str, Any]:
    """Where a run comes from, as its last start says, and the processor if that was this machine."""
    from ibq.training import provenance

    starts = read_lines(folder / provenance.FILE)
    if not starts:
        return {}
    kept = ("time", "revision", "edited", "torch", "device", "ranks")
    here = {"cpu": provenance.origin("")["cpu"]} if starts[-1].get("host") == platform.node() else {}
    return {key: starts[-1].get(key) for key in kept} | here


def read_references(folders: Sequence[Path]) -> list[TrainedRun]:
    """All references of these folders; UserError for one that cannot be read, or where there is none."""
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--references: {folder} is no folder; make it by `--add NAME`, or leave it out")
        found += [_read_reference(file) for file in sorted(folder.glob("*.json"))]
    return found


def _read_reference(file: Path) -> TrainedRun:
    try:
        said = json.loads(file.read_text())
        config, rows = _flat_config(said["config"], str(file)), said["rows"]
        return TrainedRun(name=said["name"], config=config | _samples(config, rows), rows=rows, origin=said["origin"])
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is no reference ({type(error).__name__}: {error}); take it out of there") from error


def add_reference(run: TrainedRun, name: str, folder: Path, others: Sequence[TrainedRun]) -> Path:
    """Keep a run as a reference of that name, whose others must have the same config; the file."""
    file = folder / f"{name}.seed-{run.seed}.json"
    if not re.fullmatch(r"[\w.=-]+", name):
        raise UserError(f"--add: {name!r} is no name for a file; take letters, digits, '_', '-', '.' and '='")
    if file.exists():
        raise UserError(f"--add: {file} is there already; remove it, or give another name")
    for other in others:
        if other.name == name and (differing := differences(run, other)):
            raise UserError(f"--add: the runs of {name} have another config: {shown(differing)}; give another name")
    config = {key: _without_places(key, value) for key, value in run.config.items() if key != SAMPLES}
    said = {"name": name, "origin": dict(run.origin), "config": _nested(config)}
    lines = ",\n  ".join(json.dumps(row) for row in thinned(run.rows))
    try:
        write_text(file, f'{json.dumps(said)[:-1]}, "rows": [\n  {lines}\n]}}\n')
    except OSError as error:
        raise UserError(f"--references: {folder} cannot be written ({error}); give another folder") from error
    return file


def _without_places(key: str, value: Any) -> Any:
    """A setting as a reference has it."""
    if key == SOURCES and value:
        return [source | {name: ABSENT for name in ("train", "validation") if source.get(name)} for source in value]
    return ABSENT if key in PLACES and value else value


def thinned(rows: Rows) -> list[dict[str, float]]:
    """At most so many rows of training, and of validations, with few digits and without what a machine decides."""
    kept = []
    for validation in (False, True):
        some = [row for row in rows if any(name.startswith("validation/") for name in row) == validation]
        every = math.ceil(len(some) / MOST_ROWS) or 1
        kept += some[::-1][::every]
    kept = [{name: value for name, value in row.items() if not LEFT_OUT.match(name)} for row in kept]
    rounded = ({name: _rounded(value) for name, value in row.items()} for row in kept if len(row) > 1)
    return sorted(rounded, key=lambda row: row["step"])


def _rounded(value: float | str) -> float | str:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


# --- Configs ---


def _flat_config(mapping: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Every setting under its dotted name, new ones of this version with their defaults."""
    from ibq.training.ar_config import ARRunConfig
    from ibq.training.tokenizer_config import TokenizerRunConfig

    kind = TokenizerRunConfig if "loss" in mapping else ARRunConfig
    return dict(_leaves(config_to_dict(parse_config(kind, mapping, source))))


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and above + key != GROUPS:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in leaves.items():
        *above, name = key.split(".")
        inner = tree
        for part in above:
            inner = inner.setdefault(part, {})
        inner[name] = value
    return tree


def _samples(config: Mapping[str, Any], rows: Rows) -> dict[str, int]:
    """How many samples the run has trained on, from how fast its epochs went by."""
    counts = [row["step"] * config["training.batch_size"] / row["data/epoch"] for row in rows if row.get("data/epoch")]
    return {SAMPLES: round(counts[-1])} if counts else {}


def differences(run: TrainedRun, reference: TrainedRun, said: bool = False) -> dict[str, tuple[Any, Any]]:
    """{key: (the run's, the reference's)} of settings that matter; with `said` of those that may differ."""
    found = {}
    for key in run.config | reference.config:
        one, other = (some.config.get(key) for some in (run, reference))
        group = SAID if _below(key, SAID) else None if _below(key, FREE) else ()
        if group == (SAID if said else ()) and not _equal(key, one, other):
            found[key] = one, other
    return found


def _below(key: str, keys: Sequence[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def _equal(key: str, one: Any, other: Any) -> bool:
    """Of a count of samples, 0.1% may be the rounding of a reference; of a place, a reference says only that it is."""
    if key in PLACES and ABSENT in (one, other):
        return bool(one) == bool(other)
    if key == SOURCES:
        return _without_places(key, one) == _without_places(key, other)
    if key == GROUPS and one and other:
        return [*one.items()] == [*other.items()]  # the first pattern that matches counts
    if key == SAMPLES and one and other:
        return math.isclose(one, other, rel_tol=1e-3)
    return one == other


def shown(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Settings with both values."""
    return ", ".join(f"{key}={one} (there {other})" for key, (one, other) in differing.items())


# --- Which to compare with ---


def choose(run: TrainedRun, references: Sequence[TrainedRun], name: str | None) -> list[TrainedRun]:
    """Those of the run's config, or of a name; UserError that says what differs where there is none."""
    if not references:
        raise UserError("--references: there are none yet; make one by `--add NAME`")
    if name is not None:
        if found := [one for one in references if one.name == name]:
            return found
        names = ", ".join(sorted({one.name for one in references}))
        raise UserError(f"--reference: there is no {name!r}; there are {names}")

    def distance(reference: TrainedRun) -> tuple:
        lengths = [some.rows[-1]["step"] for some in (run, reference)]
        far = 0.0 if not differences(run, reference, said=True) else abs(math.log(lengths[0] / lengths[1]))
        return len(differences(run, reference)), len(differences(run, reference, said=True)), far

    distances = [distance(one) for one in references]
    nearest = min(distances)
    found = [one for one, far in zip(references, distances, strict=True) if far == nearest]
    if nearest[0]:
        raise UserError(
            f"{run.name}: no reference has its config; the nearest, {found[0].name}, differs in "
            f"{shown(differences(run, found[0]))}; `--reference {found[0].name}` compares all the same, "
            "`--add NAME` makes this run a reference"
        )
    return found
