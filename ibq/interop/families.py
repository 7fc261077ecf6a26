"""Which published family a file is of, and who reads it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ibq.interop import llamagen, open_magvit2, seed_voken
from ibq.interop.lightning_tokenizer import Weights
from ibq.interop.open_magvit2_transformer import is_open_magvit2
from ibq.interop.published import Hints, Published
from ibq.interop.reference_tensors import read_file, table_of, wrapper_of
from ibq.progress import say

SUFFIXES = {".ckpt", ".pt", ".pth"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Files that one public implementation writes."""

    title: str
    home: str
    license: str | None  # of its weights, where its repository states one
    read: Callable[[str | Path, Weights, Hints], list[Published]]


SEED_VOKEN = "https://github.com/TencentARC/SEED-Voken"
FAMILIES = {
    "seed-voken": Family(title="IBQ (SEED-Voken)", home=SEED_VOKEN, license=None, read=seed_voken.read),
    "open-magvit2": Family(title="Open-MAGVIT2 (SEED-Voken)", home=SEED_VOKEN, license=None, read=open_magvit2.read),
    "llamagen": Family(
        title="LlamaGen", home="https://github.com/FoundationVision/LlamaGen", license="mit", read=llamagen.read
    ),
}


def family_of(names: Iterable[str]) -> str:
    """The family whose names these are; what no other family knows is left to SEED-Voken's reader to refuse."""
    names = [name.removeprefix("first_stage_model.") for name in names]
    if any(name.startswith(("encoder.conv_blocks.", "decoder.conv_blocks.", "layers.")) for name in names):
        return "llamagen"
    if any(name.startswith(("encoder.mid_block.", "decoder.adaptive.")) or is_open_magvit2(name) for name in names):
        return "open-magvit2"
    return "seed-voken"


def read_published(
    path: str | Path,
    family: str | None = None,
    weights: Weights = "ema",
    hints: Hints = Hints(),  # noqa: B008 (frozen)
) -> list[Published]:
    """All models of a published file; the family is recognised, and must be `family` where one is given.

    Raises ValueError that names the file and what is wrong with it.
    """
    file = read_file(path)
    table = table_of(file, path, "ema", "model", "state_dict")
    if wrapper := wrapper_of(next((file[key] for key in ("ema", "model", "state_dict") if key in file), file)):
        say(f"note: {path}: the names of its weights begin with {wrapper}, which is taken off")
    found = family_of(table)
    if family is not None and family != found:
        raise ValueError(f"{path}: has the names of {FAMILIES[found].title}; import it as {found}")
    models = FAMILIES[found].read(path, weights, hints)
    if hints.kind is not None and not any(model.kind is hints.kind for model in models):
        raise ValueError(
            f"{path}: holds no {hints.kind.__name__}; {FAMILIES[found].title} gives a {models[0].kind.__name__}"
        )
    return models
