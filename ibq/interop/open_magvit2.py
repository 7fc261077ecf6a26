"""Checkpoints of Open-MAGVIT2's tokenizers (arXiv 2409.04410; SEED-Voken's code), read and written.

A file holds `encoder.*` and `decoder.*`, and what `lightning_tokenizer` describes. Lookup-free codes have no codebook,
so the quantizer has no tensors. Their transformers predict the two halves of a code one after the other, by a second
transformer inside the first: such files do not fit this project's transformer and are refused.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ibq.interop.lightning_tokenizer import Implementation, Weights, rest_of
from ibq.interop.published import Hints, Published, require_config
from ibq.interop.reference_tensors import TRANSFORMER, encoder_sizes, read_state, shape_of
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.quantizers import LFQConfig

LEVELS = "quantizer.levels"  # a constant of our quantizer
RESOLUTIONS = {4: 128, 5: 256}  # pixels that the published tokenizers of so many levels were trained at


def read(path: str | Path, weights: Weights = "ema", hints: Hints = Hints()) -> list[Published]:  # noqa: B008 (frozen)
    """The tokenizer of a checkpoint. ValueError that names every missing, unexpected or wrongly shaped tensor."""
    if hints.arguments is not None:
        raise ValueError(f"{path}: the shapes of Open-MAGVIT2's tensors say all; leave the configuration out")
    state, source = read_state(path), str(path)
    if any(name.startswith(TRANSFORMER) for name in state):
        raise ValueError(
            f"{source}: is a transformer of factorized codes, which does not fit this project's transformer; "
            "give a tokenizer's file"
        )
    parts = IMPLEMENTATION.split(state, source)
    chosen = parts.chosen(weights, source)
    config = infer_config(chosen, hints.resolution)
    tensors = chosen | {LEVELS: torch.full((config.quantizer.dim,), 2.0)}
    require_config(config, tensors, source)
    return [Published(config=config, tensors=tensors, weights=weights, rest=rest_of(state, parts.plain, weights))]


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
