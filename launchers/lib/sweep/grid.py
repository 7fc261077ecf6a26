"""What a sweep file says: which runs there are, with which settings, and the commands of each."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ibq.config import ConfigError, UserError, require_least
from ibq.config_yaml import config_error, parse_yaml, read_layers, unwrap
from ibq.models.transformer import TransformerConfig
from launchers.lib.executor import code_path
from launchers.lib.run_config import check_run, is_training_script, load_run
from launchers.lib.sweep.rules import ScalingConfig, scaling_runs

PICTURES = "pictures"  # a folder beside the runs' folders
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """How trained tokenizers are measured (tools/evaluate.py)."""

    kind: Literal["reconstruction"] = "reconstruction"
    validation: str | None = None  # place of the images that are reconstructed; null: the runs' validation images
    usage: str | None = None  # place over which codes are counted, the larger the better; null: the training images
    pictures: int = 8  # reconstructions that are shown of every run

    def __post_init__(self):
        if not 1 <= self.pictures <= 24:
            raise ValueError(f"pictures: must lie in [1, 24], got {self.pictures}; 8 fill a row")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How trained transformers are measured: images are drawn (tools/sample.py) and judged (tools/evaluate.py).

    Or tokenizers: by how they decode what a `transformer` draws, whose codes they all have; or by reconstructions.
    """

    tokenizer: str | None = None  # whose codes the runs' transformers have learned
    transformer: str | None = None  # that draws for the runs' tokenizers
    reconstructions: bool = False  # nothing is drawn: those of the validation images are judged; give one of the three
    images: str  # labelled real images that a classifier learns from
    validation: str | None = None  # the same to test it on; null: every tenth of them
    total: int | None = None  # images that are drawn, equally many of every class
    sampler: tuple[str, ...] = ()  # options of tools/sample.py, such as [--guidance-scale, "1.5"]
    classifier_steps: int = 250  # of its training

    def __post_init__(self):
        require_least(self, total=2, classifier_steps=1)
        if (self.tokenizer is not None) + (self.transformer is not None) + self.reconstructions != 1:
            raise ValueError(
                "tokenizer: give it where the runs are transformers, or `transformer` or `reconstructions` where they "
                "are not"
            )
        if (self.total is None) != self.reconstructions or (self.sampler and self.reconstructions):
            raise ValueError("total: give it, and perhaps `sampler`, where images are drawn, and only there")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep: one script and base config, and what differs from run to run."""

    name: str
    title: str = ""  # of the page
    about: str = ""  # a sentence or two for the page
    script: str = "ibq/train_tokenizer.py"
    base: str  # config of all runs
    overrides: tuple[str, ...] = ()  # key.path=value, common to all runs
    # Give `runs`, each with its settings, or `grid`, of which every combination is a run, or `scaling`, whose rules
    # make the runs of several sizes and token budgets.
    runs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    scaling: ScalingConfig | None = None
    seeds: tuple[int, ...] = ()  # each run is trained with each of these; tables show means and their intervals
    output: str | None = None  # null: runs/NAME
    evaluation: ReconstructionConfig | None = field(default_factory=ReconstructionConfig)  # of tokenizers; null: none
    generation: GenerationConfig | None = None  # of transformers, or of tokenizers too; null: none

    def __post_init__(self):
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} cannot name a folder; use letters, digits and . _ + = , -")
        if bool(self.runs) + bool(self.grid) + bool(self.scaling) != 1:
            raise ValueError(
                "runs: give either `runs` ({NAME: [key=value, ...]}) or `grid` ({key: [value, ...]}) or `scaling`"
            )
        for name in self.runs:
            if not _NAME.fullmatch(name) or name == PICTURES:
                raise ValueError(f"runs: {name!r} cannot name a run's folder; use letters, digits and . _ + = , -")
        if self.generation is not None:
            if self.evaluation is not None and self.generation.tokenizer is not None:
                raise ValueError(
                    "evaluation: is of tokenizers, and `generation` of transformers; set `evaluation: null`"
                )
            if self.evaluation is None and self.generation.reconstructions:
                raise ValueError("evaluation: makes the reconstructions that `generation` judges; leave it in")
        if self.seeds and self.scaling:
            raise ValueError("seeds: a scaling law is fitted to single runs; leave out either")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds, default=0) < 0:
            raise ValueError(f"seeds: must be different numbers from 0, got {list(self.seeds)}")
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid: {key} has no values; write {key}: [value, ...]")

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.output or f"runs/{self.name}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the project's commands that a run consists of."""

    name: str
    command: tuple[str, ...]  # without the interpreter
    models: tuple[str, ...] = ()  # places of those that it uses and the run does not make


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a sweep."""

    name: str
    group: str  # the name in tables: with `seeds` that of all runs that differ in nothing else
    folder: Path
    overrides: tuple[str, ...]  # what makes it different from the others, but for the seed
    settings: dict[str, Any]  # all that its config says, by dotted key; to see whether that has changed
    parts: tuple[Part, ...]
    held_out: bool = False  # of the fit of a scaling law


def runs_of(config: SweepConfig, source: str) -> list[Run]:
    """The runs of a sweep in order; ConfigError for settings that cannot be read, or that no run could start with."""
    if not Path(code_path(config.script)).is_file():
        raise config_error(source, "script", f"{config.script} does not exist; give a path from the project's folder")
    try:
        base = [unwrap(layer) for layer in read_layers(Path(code_path(config.base)))]
    except ConfigError as error:
        raise config_error(source, "base", str(error)) from error
    common = _overrides_layer(config.overrides, f"{source}: overrides")
    named, held_out = _named_runs(config, source)
    runs = []
    # All runs with one seed before the next: what is done at any time compares all of them.
    for seed, (group, overrides) in itertools.product(config.seeds or (None,), named.items()):
        name, seeded = (group, ()) if seed is None else (f"{group}.seed-{seed}", (f"seed={seed}",))
        own = _overrides_layer((*overrides, *seeded), f"{source}: runs.{group}")
        if seeded and "seed" in {**common, **_overrides_layer(overrides, source)}:
            raise config_error(source, "seeds", f"run {group} has a seed of its own; leave out either")
        tree: Any = {}
        for layer in (*base, common, own):
            tree = _laid_over(tree, layer)
        settings = _flat(tree)
        settings.pop("output", None)  # each run has its own
        folder = config.folder / name
        train = ("--config", config.base, *config.overrides, *overrides, *seeded, f"output={folder}")
        _check(config.script, train, f"{source}: run {name}")
        parts = (Part(name="train", command=(config.script, *train)),)
        if config.evaluation is not None:
            parts += _evaluations(config, folder, settings, source)
        if config.generation is not None:
            parts += _generation(config.generation, folder, settings)
        runs.append(Run(name=name, group=group, folder=folder, overrides=tuple(overrides), settings=settings,
                        parts=parts, held_out=name in held_out))  # fmt: skip
    return runs


def _named_runs(config: SweepConfig, source: str) -> tuple[dict[str, tuple[str, ...]], set[str]]:
    """The runs' settings by name, and which runs are held out of a fit."""
    if config.scaling is None:
        return dict(config.runs) or _grid_runs(config.grid), set()
    if not is_training_script(config.script):
        raise config_error(source, "scaling", f"its rules are for ibq/train_ar.py, not for {config.script}")
    try:
        base = load_run(config.script, ("--config", config.base, *config.overrides))
    except (ConfigError, UserError) as error:
        raise config_error(source, "base", str(error)) from error
    if not isinstance(base.model, TransformerConfig):
        raise config_error(source, "scaling", f"its rules are for ibq/train_ar.py, not for {config.script}")
    try:
        runs = scaling_runs(config.scaling, base.model, base.training.micro_batch)
    except ValueError as error:
        raise config_error(source, f"scaling.{error}", "") from error
    return {run.name: run.overrides for run in runs}, {run.name for run in runs if run.held_out}


def _check(script: str, arguments: Sequence[str], name: str) -> None:
    """ConfigError, which names the run, unless its whole config can be read and its sizes fit together."""
    if not is_training_script(script):
        return
    try:
        check_run(load_run(script, arguments))
    except (ConfigError, UserError) as error:
        raise config_error(name, "", str(error)) from error


def _grid_runs(grid: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, ...]]:
    """Every combination of the values: {"num_codes=1024": ("model.quantizer.num_codes=1024",), ...}."""
    short = _short_names(list(grid))
    runs = {}
    for values in itertools.product(*grid.values()):
        texts = [_value_text(value) for value in values]
        named = zip(short, texts, strict=True)
        name = ",".join(f"{key}={re.sub(r'[^A-Za-z0-9._+-]+', '-', text).strip('-')}" for key, text in named)
        runs[name] = tuple(f"{key}={text}" for key, text in zip(grid, texts, strict=True))
    return runs


def _short_names(keys: Sequence[str]) -> list[str]:
    """The shortest ends of dotted keys that still tell them apart."""
    for length in itertools.count(1):
        short = [".".join(key.split(".")[-length:]) for key in keys]
        if len(set(short)) == len(short):
            return short
    raise AssertionError("keys of a mapping differ")


def _value_text(value: Any) -> str:
    """A value as it is written after `key=`."""
    if isinstance(value, str) and unwrap(parse_yaml(value, lambda line: "grid")) == value:
        return value
    return json.dumps(value)


def _overrides_layer(overrides: Sequence[str], origin: str) -> dict[str, Any]:
    """key.path=value texts as one tree."""
    layer: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise config_error(origin, text, "this is no setting; write key.path=value")
        if names == ["output"]:
            raise config_error(origin, text, "every run gets a folder of its own; set the sweep's `output` instead")
        tree: Any = unwrap(parse_yaml(value, lambda line: origin, key.strip()))
        for name in reversed(names):
            tree = {name: tree}
        layer = _laid_over(layer, tree)
    return layer


def _laid_over(old: Any, new: Any) -> Any:
    """`new` over `old`, as the config loader does it: settings of another `kind` do not carry over."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if "kind" in old and "kind" in new and old["kind"] != new["kind"]:
        return new
    return {**old, **{key: _laid_over(old.get(key), value) for key, value in new.items()}}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            settings |= _flat(value, f"{prefix}{key}.")
        else:
            settings[f"{prefix}{key}"] = value
    return settings


def _evaluations(sweep: SweepConfig, folder: Path, settings: Mapping, source: str) -> tuple[Part, ...]:
    """The commands that measure a trained tokenizer."""
    config, generation = sweep.evaluation, sweep.generation
    training, validation = settings.get("data.train"), settings.get("data.validation")
    every = str(settings.get("data.validation_every", 10))
    places = {
        "reconstruction": _place(config.validation, validation, training, ("--split", "validation"), every),
        "usage": _place(config.usage, training if validation else None, training, ("--split", "train"), every),
    }
    parts = []
    for name, place in places.items():
        if place is None:
            key = "validation" if name == "reconstruction" else "usage"
            raise config_error(source, f"evaluation.{key}", "the base config names no single place; name one here")
        files = ("--json", str(folder / f"{name}.json"))
        if name == "reconstruction":
            files += ("--npz", str(folder / f"{name}.npz"))
            files += ("--samples", _samples(folder)) if generation is not None and generation.reconstructions else ()
        device = ("--device", str(settings["device"])) if "device" in settings else ()
        command = ("tools/evaluate.py", "reconstruction", "--tokenizer", str(folder))
        parts.append(Part(name=name, command=(*command, *place, "--workers", "0", *device, *files)))
    return tuple(parts)


def _samples(folder: Path) -> str:
    """The images of a run that are judged."""
    return str(folder / "samples" / "samples.npz")


def _generation(config: GenerationConfig, folder: Path, settings: Mapping) -> tuple[Part, ...]:
    """The commands that draw with a trained transformer, or for a trained tokenizer, and measure what is drawn."""
    device = ("--device", str(settings["device"])) if "device" in settings else ()
    models = ("--tokenizer", config.tokenizer or str(folder), "--transformer", config.transformer or str(folder))
    drawn = ("--total", str(config.total), "--files", "none", "--output", str(folder / "samples"))
    real = ("--classifier", config.images)
    real += () if config.validation is None else ("--classifier-validation", config.validation)
    real += ("--classifier-steps", str(config.classifier_steps))
    judged = ("--samples", _samples(folder), *real, "--json", str(folder / "generation.json"))
    given = tuple(place for place in (config.tokenizer, config.transformer) if place is not None)
    command = ("tools/sample.py", *models, *config.sampler, *device, *drawn)
    sample = Part(name="sample", command=command, models=given)
    judge = Part(name="generation", command=("tools/evaluate.py", "generation", *device, *judged))
    return (judge,) if config.reconstructions else (sample, judge)


def _place(
    given: str | None, own: str | None, training: str | None, split: tuple[str, ...], every: str
) -> tuple[str, ...] | None:
    """Options for the images: the place that is given, the config's own, or a part of the training images."""
    if given or own:
        return ("--images", given or own)
    return ("--images", training, *split, "--validation-every", every) if training else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which settings have another value than before, each as `key: old -> new`."""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key}: {json.dumps(before.get(key))} -> {json.dumps(now.get(key))}" for key in changed]
