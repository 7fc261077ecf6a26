"""A model as a folder for the Hugging Face Hub, and its upload."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from torch import nn

from ibq.api import load_tokenizer, load_transformer, pretrained_folder
from ibq.config import UserError
from ibq.engine.state_files import index_file
from ibq.hub import CARD, LOADERS, load_file, push_folder, save_pretrained
from ibq.model_card import CardFacts
from ibq.progress import say


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of `hub`."""
    add = parser.add_argument
    add("model", type=Path, help="a .safetensors file, a step-... folder, or a run folder: its best weights")
    add("folder", type=Path, help="the folder to write")
    add("--name", help="title of the model card")
    add("--data", help="what the model was trained on, for the card")
    add("--license", help="identifier of the Hub: mit, apache-2.0, ... (default: the publisher's, where it is known)")
    add("--tokenizer-name", help="of a transformer: the repository or name of its tokenizer, for the card")
    add("--evaluation", type=Path, nargs="+", default=[], help="JSON files of tools/evaluate.py about these weights")
    add("--push", metavar="USER/NAME", help="also upload the folder to this repository of the Hub")
    add("--private", action="store_true", help="--push: make the repository private")


def write_folder(arguments: argparse.Namespace, find: Callable[[Path], Path]) -> None:
    """Write the folder, and upload it where that is asked for."""
    if arguments.private and not arguments.push:
        raise UserError("--private: is about --push; give both")
    model, origin = load(arguments.model, find)
    facts = CardFacts(
        name=arguments.name,
        data=arguments.data,
        license=arguments.license,
        tokenizer=arguments.tokenizer_name,
        origin=origin,
        evaluations=arguments.evaluation,
    )
    save_pretrained(model, arguments.folder, facts)
    say(f"{arguments.folder}: weights, config and {CARD}; read the card before others do")
    if arguments.push:
        say(push_folder(arguments.folder, arguments.push, private=arguments.private))


def load(path: Path, find: Callable[[Path], Path]) -> tuple[nn.Module, dict[str, str]]:
    """A model on the CPU, and what its file says of where it comes from; a run folder means its best weights."""
    if path.suffix == ".safetensors":
        return load_file(path, "cpu")
    if (path / "manifest.json").exists():
        checkpoint = find(path)
        kind = "Tokenizer" if (checkpoint / index_file("tokenizer")).exists() else "Transformer"
        return LOADERS[kind](checkpoint, device="cpu"), {"checkpoint": checkpoint.name, "weights": "ema"}
    folder = pretrained_folder(path)  # as tools/evaluate.py understands it: figures are of these weights
    return _load_best(folder), _origin_of_best(folder)


def _load_best(folder: Path) -> nn.Module:
    """The model of a `best` folder, whose config.yaml does not say which kind it is."""
    try:
        return load_tokenizer(folder, device="cpu")
    except UserError as error:
        try:
            return load_transformer(folder, device="cpu")
        except UserError:
            raise error from None


def _origin_of_best(folder: Path) -> dict[str, str]:
    origin = {"weights": "ema"}
    try:
        step = json.loads((folder / "info.json").read_text()).get("step")
    except (OSError, ValueError, AttributeError):
        step = None
    return origin | ({"step": str(step)} if isinstance(step, int) else {})
