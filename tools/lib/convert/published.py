"""Published checkpoints: taken over as this project's files, and written in the form of other implementations."""

import argparse
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import yaml
from ibq.api import read_metadata, read_tensors
from ibq.config import UserError, parse_config
from ibq.data.index import sha256_of
from ibq.engine.state_files import StateReader, index_file
from ibq.interop import llamagen, open_magvit2, seed_voken
from ibq.interop.families import FAMILIES, SUFFIXES, read_published
from ibq.interop.published import Hints, ModelConfig, Published
from ibq.interop.reference_tensors import DAMAGED, DOWNLOAD_AGAIN, damaged_record, read_file
from ibq.models.discriminator import PatchDiscriminator
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.progress import say
from ibq.tensor_file import TensorFile
from tools.lib.options import check_least

CONFIGS = {"Tokenizer": TokenizerConfig, "Transformer": TransformerConfig}
LIGHTNING_VERSION = "2.2.0"  # Lightning wants to know which of its versions has written a file
KEPT_FACTS = {"epoch": "epoch", "step": "global_step"}  # ours <- the published file's

# --- Import ---


def add_import_options(parser: argparse.ArgumentParser) -> None:
    """Of `import`."""
    add = parser.add_argument
    add("family", choices=FAMILIES, help="whose file it is")
    add("file", type=Path, help="the published .ckpt or .pt file")
    add("output", type=Path, help="the .safetensors file to write; a tokenizer beside a transformer: *.tokenizer.*")
    add("--weights", choices=("ema", "raw"), default="ema", help="of a tokenizer: averaged (default) or raw weights")
    add("--config", type=Path, help="the reference's YAML file, where the shapes of the tensors do not say all")
    add("--resolution", type=int, help="pixels along a side of the images that a tokenizer is for (default: published)")
    add("--rest", type=Path, help="write what is not used of a tokenizer's file to this .safetensors file")


def import_published(arguments: argparse.Namespace) -> None:
    """Take over what a published file holds."""
    require_suffix(arguments.output, {".safetensors"})
    if arguments.rest is not None:
        require_suffix(arguments.rest, {".safetensors"})
    check_least(arguments, resolution=1)
    if not arguments.file.is_file():
        raise UserError(f"{arguments.file}: no such file; give the file that was downloaded")
    hints = Hints(resolution=arguments.resolution, arguments=reference_arguments(arguments.config))
    try:
        if record := damaged_record(arguments.file):
            raise ValueError(f"{arguments.file}: {DAMAGED} ({record} has another checksum); {DOWNLOAD_AGAIN}")
        models = read_published(arguments.file, arguments.family, arguments.weights, hints)
        facts = facts_of(arguments.file, arguments.family)
    except ValueError as error:
        raise UserError(str(error)) from error
    if arguments.rest is not None and not any(model.rest for model in models):
        raise UserError(f"{arguments.file}: leaves no rest; leave --rest out")
    for model in models:
        write_published(output_of(arguments.output, model, models), model, facts)
        if arguments.rest is not None and model.rest:
            write_safetensors(arguments.rest, model.rest, facts)


def output_of(output: Path, model: Published, models: list[Published]) -> Path:
    """Where a model goes: a tokenizer beside a transformer has a name of its own."""
    second = model.kind is Tokenizer and len(models) > 1
    return output.with_suffix(".tokenizer.safetensors") if second else output


def reference_arguments(path: Path | None) -> Mapping[str, Any] | None:
    """The model arguments in one of the reference's YAML files."""
    if path is None:
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return found["model"]["init_args"]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable YAML file ({error}); give one of the reference's configs") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: has no model.init_args; give one of the reference's configs") from error


def facts_of(path: Path, family: str) -> dict[str, str]:
    """Where the weights come from: name and hash of the file, and what it says of its training."""
    checkpoint = read_file(path)
    facts = {"source": path.name, "source_sha256": sha256_of(path), "family": family}
    found = {ours: checkpoint.get(theirs) for ours, theirs in KEPT_FACTS.items()}
    return facts | {name: str(value) for name, value in found.items() if type(value) is int}


def write_published(output: Path, model: Published, facts: Mapping[str, str]) -> None:
    """Write a model as one file, one tensor in memory at a time."""
    metadata = {"model": json.dumps(model.describe()), "weights": model.weights, **facts}
    size = write_safetensors(output, model.tensors, metadata)
    count = sum(tensor.numel() for tensor in model.tensors.values())
    say(f"{output}: {model.kind.__name__}, {count:,} numbers, {size / 2**30:.2f} GiB, {model.weights} weights")


def write_safetensors(output: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write a file whole or not at all, floating-point numbers in float32; its bytes."""
    layout = {n: (torch.float32 if t.is_floating_point() else t.dtype, tuple(t.shape)) for n, t in tensors.items()}

    def write(path: Path) -> None:
        file = TensorFile(path, layout, metadata)
        for name, tensor in tensors.items():
            file.write(name, tensor)
        file.close()

    whole(output, write)
    return output.stat().st_size


# --- Export ---


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to write in another form, with as many sets of weights as there are."""

    config: ModelConfig
    sets: dict[str, dict[str, Tensor]]  # "raw", "ema" or both
    discriminator: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)  # "step", "epoch"

    def chosen(self, weights: str) -> dict[str, Tensor]:
        """A set of weights, or the only one."""
        return self.sets.get(weights) or next(iter(self.sets.values()))


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Of `export`, beyond its own."""
    add = parser.add_argument
    add("--format", choices=FAMILIES, help="write the checkpoint of another implementation, instead of .safetensors")
    add("--tokenizer", type=Path, help="the tokenizer that an AR checkpoint also holds")
    add("--rest", type=Path, help="what `import --rest` has kept of the file that the checkpoint was imported from")


def export_published(checkpoint: Path, arguments: argparse.Namespace, find: Callable[[Path], Path]) -> None:
    """Write a checkpoint or an exported file in the form of another implementation."""
    require_suffix(arguments.output, SUFFIXES)
    source = source_of(checkpoint, arguments.weights, find)
    tokenizer = None if arguments.tokenizer is None else source_of(arguments.tokenizer, "ema", find)
    rest = None if arguments.rest is None else read_tensors(arguments.rest)
    try:
        table = checkpoint_of(source, tokenizer, rest, arguments)
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    whole(arguments.output, lambda path: torch.save(table, path))
    say(f"{arguments.output}: {arguments.format}, {arguments.output.stat().st_size / 2**30:.2f} GiB")


def checkpoint_of(source: Source, tokenizer: Source | None, rest, arguments: argparse.Namespace) -> dict:
    """What torch.save gets; ValueError for what does not fit."""
    config, weights = source.config, next(iter(source.sets))
    one_set = source.chosen(arguments.weights)
    raw, averaged = source.chosen("raw"), source.chosen("ema")
    writers = {"seed-voken": seed_voken.write_transformer, "open-magvit2": open_magvit2.write_transformer}
    if tokenizer is not None and not (arguments.format in writers and isinstance(config, TransformerConfig)):
        raise ValueError("is not a transformer for seed-voken or open-magvit2; leave --tokenizer out")
    if rest is not None and (len(source.sets) > 1 or not isinstance(config, TokenizerConfig)):
        raise ValueError("is not a tokenizer from `import --rest`; leave --rest out")
    if isinstance(config, TransformerConfig):
        if arguments.format not in writers:
            raise ValueError(f"a transformer of this project does not fit {FAMILIES[arguments.format].title}")
        pair = None if tokenizer is None else (tokenizer.config, tokenizer.chosen("ema"))
        return lightning(writers[arguments.format](config, one_set, pair), source.facts)
    match arguments.format:
        case "llamagen":
            if rest is not None:
                raise ValueError("LlamaGen's files leave no rest; leave --rest out")
            tables = {"raw": "model", "ema": "ema"} if len(source.sets) > 1 else {weights: "model"}
            return {key: llamagen.write_tokenizer(config, source.sets[name]) for name, key in tables.items()}
        case "open-magvit2":
            family = open_magvit2
        case _:
            family = seed_voken
    if rest is not None:
        return lightning(family.write_tokenizer_with_rest(config, one_set, weights, rest), source.facts)
    return lightning(family.write_tokenizer(config, raw, averaged, source.discriminator), source.facts)


def lightning(state: dict[str, Tensor], facts: Mapping[str, str]) -> dict:
    """A checkpoint in Lightning's form."""
    numbers = {theirs: int(facts.get(ours, 0)) for ours, theirs in KEPT_FACTS.items()}
    return {**numbers, "pytorch-lightning_version": LIGHTNING_VERSION, "state_dict": state}


def source_of(path: Path, weights: str, find: Callable[[Path], Path]) -> Source:
    """The model of a .safetensors file with one set of weights, or of a checkpoint of a run."""
    return source_of_file(path) if path.suffix == ".safetensors" else source_of_checkpoint(find(path), weights)


def source_of_file(path: Path) -> Source:
    """From a file of `import` or `export`."""
    metadata, model = read_metadata(path)
    if model["kind"] not in CONFIGS:
        raise UserError(f"{path}: holds a {model['kind']}, which is no model of this project; give another")
    config = parse_config(CONFIGS[model["kind"]], model["config"], str(path))
    facts = {name: metadata[name] for name in KEPT_FACTS if name in metadata}
    if metadata.get("checkpoint", "").startswith("step-"):  # from `export`
        facts["step"] = metadata["checkpoint"].removeprefix("step-")
    return Source(config=config, sets={metadata.get("weights", "ema"): read_tensors(path)}, facts=facts)


def source_of_checkpoint(folder: Path, weights: str) -> Source:
    """From a run's checkpoint: a tokenizer with all that there is, a transformer with one set of weights."""
    is_tokenizer = (folder / index_file("tokenizer")).exists()
    if not is_tokenizer and not (folder / index_file("transformer")).exists():
        raise UserError(f"{folder}: holds no transformer or tokenizer; give a checkpoint of a run")
    reader = StateReader(folder, "tokenizer" if is_tokenizer else "transformer")
    kind = Tokenizer if is_tokenizer else Transformer
    parts = {"raw": "weight", "ema": "ema"} if is_tokenizer else {weights: "ema" if weights == "ema" else "weight"}
    parts = {name: part for name, part in parts.items() if part in reader.parts}
    if weights not in parts:
        raise UserError(f"{folder}: its run kept no averaged weights; give --weights raw")
    sets = {name: {n: reader.full(part, n) for n in reader.shapes} | reader.untrained() for name, part in parts.items()}
    discriminator = {}
    if is_tokenizer and (folder / index_file("discriminator")).exists():
        other = StateReader(folder, "discriminator")
        if other.model["kind"] == PatchDiscriminator.__name__:  # no published format has another
            discriminator = {n: other.full("weight", n) for n in other.shapes} | other.untrained()
    step = json.loads((folder / "state.json").read_text())["step"]
    config = parse_config(CONFIGS[kind.__name__], reader.model["config"], str(folder))
    return Source(config=config, sets=sets, discriminator=discriminator, facts={"step": str(step)})


# --- Files ---


def require_suffix(path: Path, suffixes: set[str]) -> None:
    """UserError for a name that says another form."""
    if path.suffix not in suffixes:
        raise UserError(f"{path}: give a name that ends with {' or '.join(sorted(suffixes))}")


def whole(output: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file that then takes its place; UserError where it cannot be written."""
    temporary = output.with_name(f".tmp-{output.name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(output)
    except (OSError, RuntimeError) as error:  # torch.save says a full disk by the latter
        raise UserError(f"{output}: cannot be written ({error}); make room or give another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
