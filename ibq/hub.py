"""Models in folders and repositories of the Hugging Face Hub: weights, configuration and model card.

model.safetensors    weights; its metadata holds kind and configuration, as in files of tools/convert.py
config.json          the same kind and configuration, for readers and for the Hub
README.md            the model card
"""

import contextlib
import json
import tempfile
from pathlib import Path

import torch
from torch import nn

from ibq.api import load_tokenizer, load_transformer, read_metadata
from ibq.config import UserError
from ibq.engine.state_files import describe
from ibq.files import sync_folder, write_text
from ibq.model_card import CardFacts, model_card
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer
from ibq.tensor_file import write_tensors

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
LOADERS = {"Tokenizer": load_tokenizer, "Transformer": load_transformer}
KEPT = ("weights", "source", "source_sha256", "family", "step", "epoch", "checkpoint")  # of a file's metadata


def save_pretrained(model: nn.Module, folder: str | Path, facts: CardFacts | None = None) -> Path:
    """Write a Tokenizer or Transformer with its model card to a folder; other files there are left alone.

    UserError for a model of another kind, for a record of an evaluation with other weights, or a full disk.
    """
    folder, facts = Path(folder), facts or CardFacts()
    if not isinstance(model, Tokenizer | Transformer):
        raise UserError(f"a {type(model).__name__} cannot be saved; give a Tokenizer or a Transformer")
    described = describe(model)
    metadata = {"format": "pt", "model": json.dumps(described)}
    metadata |= {name: facts.origin[name] for name in KEPT if name in facts.origin}
    card = model_card(model, facts)  # before anything is written: it may refuse a record
    temporary = folder / f".tmp-{WEIGHTS}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(temporary, model.state_dict(), metadata)
        temporary.replace(folder / WEIGHTS)
        sync_folder(folder)
        write_text(folder / CONFIG, json.dumps({"library_name": "ibq", **described}, indent=1))
        write_text(folder / CARD, card)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); make room or give another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return folder


def from_pretrained(
    repository_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    device: torch.device | str = "auto",
) -> nn.Module:
    """The Tokenizer or Transformer (eval mode) of a folder, or of a repository of the Hub, which is downloaded once.

    `revision` is a branch, tag or commit of the repository; a commit keeps what is loaded from changing. UserError
    where there is none.
    """
    folder = Path(repository_or_folder)
    if not folder.is_dir():
        folder = downloaded(str(repository_or_folder), revision, token)
    return load_file(folder / WEIGHTS, device)[0]


def load_file(path: Path, device: torch.device | str) -> tuple[nn.Module, dict[str, str]]:
    """The Tokenizer or Transformer of a .safetensors file, and the file's metadata; UserError for another file."""
    origin, model = read_metadata(path)
    if model["kind"] not in LOADERS:
        raise UserError(f"{path}: holds a {model['kind']}, which is no model of this project; give another")
    return LOADERS[model["kind"]](path, device=device), origin


def push_to_hub(
    model: nn.Module,
    repository: str,
    facts: CardFacts | None = None,
    *,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload a model with its card to a repository, which is made where it is missing; the commit's address.

    UserError as in `save_pretrained`, and where the Hub cannot be reached or refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        return push_folder(save_pretrained(model, folder, facts), repository, private=private, token=token)


def push_folder(folder: str | Path, repository: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload the files of `save_pretrained` in one commit, and nothing else of the folder; the commit's address."""
    from huggingface_hub import HfApi

    folder = Path(folder)
    missing = [name for name in (WEIGHTS, CONFIG, CARD) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: has no {missing[0]}; write the folder with save_pretrained first")
    api = HfApi(token=token, library_name="ibq")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            folder_path=str(folder),
            repo_id=repository,
            allow_patterns=[WEIGHTS, CONFIG, CARD],
            commit_message="Weights, configuration and model card",
        )
    except Exception as error:
        raise _explained(repository, error, "log in with `hf auth login`, with a token that may write") from error
    return commit.commit_url


def downloaded(repository: str, revision: str | None = None, token: str | None = None) -> Path:
    """The files of a repository of this project's form in the Hub's cache; UserError where there is none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository, revision=revision, token=token, allow_patterns=[WEIGHTS, CONFIG, CARD], library_name="ibq"
            )
        )
    except Exception as error:
        raise _explained(repository, error, "give a folder, or the name of a repository that you may read") from error


def downloaded_file(repository: str, file: str) -> Path:
    """A file of a repository in the Hub's cache, downloaded once; UserError where there is none."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, library_name="ibq"))
    except Exception as error:
        raise _explained(f"{repository}/{file}", error, "give a file, or one that you may read") from error


def _explained(repository: str, error: Exception, remedy: str) -> UserError:
    """What the Hub's client raises, by whatever library it talks through, is the user's to solve."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UserError(
        f"{repository}: {type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}; {remedy}"
    )
