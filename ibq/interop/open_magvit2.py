"""Checkpoints of Open-MAGVIT2 (arXiv 2409.04410; SEED-Voken's code), read and written.

A tokenizer's file holds `encoder.*` and `decoder.*`, and what `lightning_tokenizer` describes. Lookup-free codes have
no codebook, so the quantizer has no tensors. An AR checkpoint holds `transformer.*` and, under `first_stage_model.*`,
its tokenizer.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ibq.interop.lightning_tokenizer import Implementation, Weights, rest_of
from ibq.interop.open_magvit2_transformer import (
    published_transformer_config,
    reference_name,
    transformer_config_from_reference,
    transformer_of,
    transformer_state,
)
from ibq.interop.published import Hints, Published, require_config, require_settings
from ibq.interop.reference_tensors import FIRST_STAGE, TRANSFORMER, argument, encoder_sizes, read_state, shape_of
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.quantizers import LFQConfig

LEVELS = "quantizer.levels"  # a constant of our quantizer
RESOLUTIONS = {4: 128, 5: 256}  # pixels that the published tokenizers of so many levels were trained at


def read(path: str | Path, weights: Weights = "ema", hints: Hints = Hints()) -> list[Published]:  # noqa: B008 (frozen)
    """All models of a checkpoint: a tokenizer, or a transformer with or without its tokenizer.

    ValueError that names every missing, unexpected or wrongly shaped tensor.
    """
    state, source, found = read_state(path), str(path), []
    in_it = {Transformer: any(name.startswith(TRANSFORMER) for name in state)}
    in_it[Tokenizer] = not in_it[Transformer] or any(name.startswith(FIRST_STAGE) for name in state)
    if hints.arguments is not None and not in_it[Transformer]:
        raise ValueError(f"{path}: the shapes of a tokenizer's tensors say all; leave the configuration out")
    if in_it[Transformer] and hints.kind is not Tokenizer:
        found.append(_transformer_of(state, source, hints))
    if not found or (hints.kind is None and in_it[Tokenizer]):
        found.append(_tokenizer_of(state, source, weights, hints))
    return found


def _transformer_of(state: dict[str, Tensor], source: str, hints: Hints) -> Published:
    tensors = transformer_of(state, source)
    if hints.arguments is not None:
        parts = argument(hints.arguments, "transformer_config")
        config = transformer_config_from_reference(argument(parts, "params", "transformer_config."))
    else:
        config = hints.transformer or published_transformer_config(tensors)
    require_config(config, tensors, source, reference_name)
    return Published(config=config, tensors=tensors, weights="raw")


def _tokenizer_of(state: dict[str, Tensor], source: str, weights: Weights, hints: Hints) -> Published:
    parts = IMPLEMENTATION.split(state, source)
    chosen = parts.chosen(weights, source)
    config = infer_config(chosen, hints.resolution)
    tensors = chosen | {LEVELS: torch.full((config.quantizer.dim,), 2.0)}
    require_config(config, tensors, source)
    rest = {} if parts.from_ar_checkpoint else rest_of(state, parts.plain, weights)
    return Published(config=config, tensors=tensors, weights=weights, rest=rest)


def write_transformer(
    config: TransformerConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: tuple[TokenizerConfig, Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """The `state_dict` of its AR checkpoint, with its tokenizer where one is given."""
    state = {}
    if tokenizer is not None:
        require_settings(tokenizer[0], IMPLEMENTATION.fixed, IMPLEMENTATION.title)
        named = IMPLEMENTATION.reference_names(tokenizer[1])
        state = {FIRST_STAGE + name: value for name, value in named.items()}
    return state | transformer_state(config, tensors)


def infer_config(tensors: Mapping[str, Tensor], resolution: int | None = None) -> TokenizerConfig:
    """The configuration that the shapes of a tokenizer's weights imply; ValueError naming a tensor that is missing."""
    sizes = encoder_sizes(tensors, lambda name: shape_of(tensors, name, 4))
    return TokenizerConfig(
        network="open_magvit2",
        **sizes,
        resolution=resolution or RESOLUTIONS.get(len(sizes["channel_multipliers"]), 256),
        attention_resolutions=(),
        quantizer=LFQConfig(dim=sizes["latent_channels"]),
    )


IMPLEMENTATION = Implementation(
    title="Open-MAGVIT2",
    fixed={"network": "open_magvit2", "norm_groups": 32, "quantizer.kind": "lfq"},
    prefixes=("encoder.", "decoder."),
    infer_config=infer_config,
    reference_names=lambda tensors: {name: value for name, value in tensors.items() if name != LEVELS},
)
write_tokenizer, write_tokenizer_with_rest = IMPLEMENTATION.write, IMPLEMENTATION.write_with_rest
