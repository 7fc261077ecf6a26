"""Which weights a run starts from, and which differences between them and its config are allowed."""

from dataclasses import dataclass
from typing import Literal

from ibq.api import Weights

Resolution = Literal["same", "other"]
Codebook = Literal["same", "rows", "kmeans", "new"]
Also = Literal["discriminator", "lecam", "optimizer"]


@dataclass(frozen=True, kw_only=True)
class TokenizerStartConfig:
    """The weights that a tokenizer run starts from; its place alone allows no difference to the config."""

    place: str  # what ibq.load_tokenizer reads, or a repository of the Hub: OWNER/NAME or OWNER/NAME/FILE
    weights: Weights = "ema"  # averaged ones, where the place holds both
    resolution: Resolution = "same"  # other: images of another size
    # For another codebook. rows: the first codes stay, more than there are become near copies; kmeans: fewer, as the
    # centres of the old ones; both keep other dimensions as near to the old as can be. new: drawn anew.
    codebook: Codebook = "same"
    also: tuple[Also, ...] = ("discriminator", "lecam", "optimizer")  # taken where the place holds them


@dataclass(frozen=True, kw_only=True)
class TransformerStartConfig:
    """The weights that a transformer run starts from; its place alone allows no difference to the config."""

    place: str  # what ibq.load_transformer reads, or a repository of the Hub: OWNER/NAME or OWNER/NAME/FILE
    weights: Weights = "ema"  # averaged ones, where the place holds both
    resolution: Resolution = "same"  # other: another number of tokens, whose rotary tables follow
    classes: Literal["same", "new"] = "same"  # new: new embeddings of classes, but for that of no class


StartConfig = TokenizerStartConfig | TransformerStartConfig


def settled(start: str | StartConfig | None, kind: type[StartConfig]) -> StartConfig | None:
    """The config of a `start_from`, of which a place alone may be written."""
    return kind(place=start) if isinstance(start, str) else start
