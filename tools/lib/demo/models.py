"""The models behind the page of tools/demo.py, and the names of their classes."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ibq.api import load_tokenizer, load_transformer
from ibq.config import ConfigError, UserError
from ibq.config_yaml import parse_yaml, unwrap
from ibq.data.codes import META_FILE
from ibq.data.shards import CLASSES_FILE, class_names, parse_classes
from ibq.data.storage import is_url
from ibq.decoding import Decoder, settle
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer
from ibq.sampler import SamplerConfig
from ibq.sampling import decoder_for
from ibq.training.checkpoint import weights_hash
from tools.lib import ROOT
from tools.lib.options import device_of, settings_of
from tools.sample import check_pair

QUICKSTART = Path("runs/quickstart")
ROWS = 16  # images of one sheet, on a GPU too


class Models:
    """What the page works with; without a transformer it only reconstructs."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        transformer: Transformer | None,
        *,
        names: list[str] | None,
        paths: tuple[str, str | None],
        defaults: SamplerConfig,
    ):
        self.tokenizer, self.transformer = tokenizer, transformer
        self.names = names  # of the classes, where they are known
        self.paths = paths  # tokenizer and transformer as they were given
        self.defaults = defaults  # of what the page does not ask for
        self._decoder: Decoder | None = None

    def autocast(self) -> torch.autocast:
        """The precision of the tokenizer, as a context; the same as in tools/sample.py."""
        device = next(self.tokenizer.parameters()).device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.defaults.precision != "fp32")

    def decoder(self, sampler: SamplerConfig) -> Decoder:
        """What draws with these settings; made again where guidance is switched on or off, which changes its rows."""
        if self._decoder is None or self._decoder.rows != sampler.rows:
            self._decoder = None  # two would not fit where one just does
            self._decoder = decoder_for(self.transformer, sampler)
        return self._decoder


def open_models(arguments: argparse.Namespace) -> Models:
    """Load what the options name, or what the quickstart has made; UserError that says what to do otherwise."""
    defaults = settings_of(SamplerConfig, arguments)
    if defaults.rows_per_block == "auto":
        defaults = replace(defaults, rows_per_block=ROWS)
    device, paths = device_of(arguments), places(arguments)
    defaults = settle(defaults, None, device)
    tokenizer = load_tokenizer(paths[0], device=device)
    if tokenizer.config.in_channels != 3:
        raise UserError(f"{paths[0]}: takes images of {tokenizer.config.in_channels} channels; the page has RGB ones")
    transformer = names = None
    if paths[1] is not None:
        transformer = load_transformer(paths[1], device=device)
        pair = argparse.Namespace(tokenizer=paths[0], transformer=paths[1])
        check_pair(pair, tokenizer, transformer, weights_hash(tokenizer.state_dict()))
        names = names_of(paths[1], transformer.config.num_classes, arguments.class_names)
    return Models(tokenizer, transformer, names=names, paths=paths, defaults=defaults)


def places(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """Tokenizer and transformer that the options mean: with neither, those of the quickstart."""
    if arguments.tokenizer is not None:
        return arguments.tokenizer, arguments.transformer
    if arguments.transformer is not None:
        raise UserError("--transformer: its codes are no pictures yet; add --tokenizer, the one that it was trained on")
    folders = [
        folder if folder.exists() else ROOT / folder
        for folder in (QUICKSTART / "tokenizer", QUICKSTART / "transformer")
    ]
    if not (folders[0] / "best").exists():
        raise UserError(
            f"no model in {QUICKSTART}: make one with `bash tools/quickstart.sh`, or give --tokenizer and --transformer"
        )
    return str(folders[0]), str(folders[1]) if (folders[1] / "best").exists() else None


# --- Names of classes ---


def names_of(transformer: str, count: int, file: Path | None = None) -> list[str] | None:
    """The names of a transformer's `count` classes: of `file`, or of what it was trained on; None if unknown.

    UserError for a `file` that is none or has another number of names.
    """
    if file is not None:
        try:
            names = parse_classes(file.read_bytes(), f"--class-names {file}")
        except OSError as error:
            raise UserError(f"--class-names {file}: cannot be read ({error.strerror})") from error
        if len(names) != count:
            raise UserError(f"--class-names {file}: has {len(names)} names, the transformer {count} classes")
        return names
    for names in _found_names(Path(transformer)):
        if len(names) == count and names != [str(i) for i in range(count)]:
            return names
    return None


def _found_names(transformer: Path) -> Iterator[list[str]]:
    """Lists of names, the nearest first: a classes.json beside the weights or the run, and those of its data."""
    start = transformer if transformer.is_dir() else transformer.parent
    for folder in (start, *start.resolve().parents[:2]):  # a run, its `best` folder, or one of its `checkpoints`
        try:
            if (folder / CLASSES_FILE).exists():
                yield parse_classes((folder / CLASSES_FILE).read_bytes(), CLASSES_FILE)
            if (folder / "config.yaml").exists():
                yield _names_of_data(folder / "config.yaml")
        except (OSError, ValueError, TypeError, KeyError, ConfigError, UserError):
            continue  # names are a courtesy: numbers will do


def _names_of_data(config: Path) -> list[str]:
    """Names that the training data of a run have; nothing is fetched for them."""
    data = unwrap(parse_yaml(config.read_text(), lambda line: str(config)))["data"]
    place = data["train"] or data["sources"][0]["train"]
    if is_url(place):
        return []
    place = place if Path(place).parent.exists() else str(ROOT / place)
    if data["kind"] == "codes":
        return [str(name) for name in json.loads((Path(place) / META_FILE).read_text())["classes"]]
    return class_names(place, 0)
