"""The JSON files that tools/evaluate.py writes: what they begin with, and reading them back."""

import json
from collections.abc import Mapping
from pathlib import Path

from ibq.config import UserError

FORMAT = 1
COMMANDS = ("reconstruction", "generation")
REMEDY = "give a file that tools/evaluate.py has written with --json"


def read_record(path: Path) -> dict:
    """The record of an evaluation; UserError for another file. Its parts are still to be checked."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); {REMEDY}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("command") not in COMMANDS:
        raise UserError(f"{path}: not the record of an evaluation; {REMEDY}")
    return record


def require_figures(path: Path, record: dict) -> None:
    """UserError for a record without tables of figures and of what they depend on."""
    if not isinstance(record.get("metrics"), dict) or not isinstance(record.get("inputs"), dict):
        raise UserError(f"{path}: `metrics` and `inputs` are missing; {REMEDY}")


def leaves(figures: Mapping, separator: str = ": ") -> dict[str, object]:
    """Nested figures as one table, with names of the whole way."""
    found = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= {f"{name}{separator}{inner}": leaf for inner, leaf in leaves(value, separator).items()}
        else:
            found[name] = value
    return found
