"""Transformers of the papers' public implementation (SEED-Voken), read and written: the AR half of `seed_voken`."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ibq.interop.published import require_settings
from ibq.interop.reference_tensors import (
    FIRST_STAGE,
    TRANSFORMER,
    argument,
    count_numbered,
    reject_unknown,
    require_same_tensors,
    shape_of,
    take,
)
from ibq.models.transformer import Transformer, TransformerConfig

CLASS_TABLE, REFERENCE_CLASS_TABLE = "class_emb.weight", "class_emb.embedding_table.weight"
KV_CACHE = re.compile(r"blocks\.\d+\.attention\.kv_cache\.[kv]_cache")
# The reference's transformer arguments and ours.
TRANSFORMER_ARGUMENTS = {
    **{"vocab_size": "vocab_size", "class_num": "num_classes", "n_layer": "depth", "n_head": "heads"},
    **{"n_embd": "width", "n_kv_head": "kv_heads", "cond_dim": "condition_dim", "shared_aln": "shared_adaln"},
    **{"resid_dropout_p": "residual_dropout", "ffn_dropout_p": "ffn_dropout", "token_drop": "token_dropout"},
    **{"alng": "adaln_gamma_init"},
}
# What its code fixes and ours has options for.
FIXED = {"head.kind": "plain", "adaln": True, "rope_base": 10000.0, "grids": None, "order": "raster"}
SMALLEST_HEAD = 4  # channels: whatever the heads are, their size divides by it
PUBLISHED_HEAD, PUBLISHED_TOKENS_PER_SIDE = 64, 16


def transformer_of(state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Transformer weights of an AR checkpoint's tensors, named for `Transformer.load_state_dict(strict=True)`.

    The tokenizer that the checkpoint also holds is left to others, key/value caches that sampling left behind are
    dropped. Raises ValueError that names every missing, unexpected or wrongly shaped tensor.
    """
    tensors = {n: v for n, v in take(state, TRANSFORMER).items() if not KV_CACHE.fullmatch(n)}
    unexpected = [name for name in state if not name.startswith((TRANSFORMER, FIRST_STAGE))]
    if not tensors:
        raise ValueError(f"{path}: has no transformer ({TRANSFORMER}*); use a checkpoint of the AR stage")
    ours = {CLASS_TABLE if name == REFERENCE_CLASS_TABLE else name: value for name, value in tensors.items()}
    require_transformer(ours, _config_of_shapes, reference_transformer_name, path, unexpected)
    return ours


def require_transformer(
    ours: Mapping[str, Tensor],
    config_of_shapes: Callable[[Mapping[str, Tensor], int], TransformerConfig],
    reference_name: Callable[[str], str],
    path: str,
    unexpected: Sequence[str],
) -> None:
    """ValueError, by the reference's names, unless tensors of our names are all of the transformer of their shapes."""
    try:
        with torch.device("meta"):
            expected = Transformer(config_of_shapes(ours, SMALLEST_HEAD)).state_dict()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    found, shapes = (
        {reference_name(name): tuple(value.shape) for name, value in tensors.items()} for tensors in (ours, expected)
    )
    require_same_tensors(found, shapes, path, unexpected)


def transformer_state(config: TransformerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's part of the reference's checkpoint; ValueError where its code has no such model."""
    require_settings(config, FIXED, "SEED-Voken")
    return {reference_transformer_name(name): value for name, value in tensors.items()}


def transformer_config_from_reference(arguments: Mapping[str, Any]) -> TransformerConfig:
    """Our configuration for the reference's transformer arguments (`stage_config` of its AR YAML files).

    Raises ValueError naming an argument that is unknown, missing or asks for something that this
    implementation does not have.
    """
    tokens = argument(arguments, "block_size")
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"block_size: {tokens} is not a square, as the reference's codes are")
    if arguments.get("drop_path_rate", 0.0):
        raise ValueError("drop_path_rate: stochastic depth is not supported; set it to 0")
    given = {ours: arguments[theirs] for theirs, ours in TRANSFORMER_ARGUMENTS.items() if theirs in arguments}
    for required in ("vocab_size", "n_layer", "n_head", "n_embd", "class_num"):
        argument(arguments, required)
    reject_unknown(arguments, {*TRANSFORMER_ARGUMENTS, "block_size", "drop_path_rate"}, "", "transformer")
    return TransformerConfig(tokens_per_side=math.isqrt(tokens), **given)


def published_transformer_config(tensors: Mapping[str, Tensor]) -> TransformerConfig:
    """The configuration of a published transformer with these weights, named as from `transformer_of`.

    What shapes do not show is taken from the paper: heads of 64 channels, 16 x 16 tokens. ValueError where the
    weights cannot be of such a model.
    """
    config = _config_of_shapes(tensors, head_dim=PUBLISHED_HEAD)
    return replace(config, tokens_per_side=PUBLISHED_TOKENS_PER_SIDE)


def _config_of_shapes(tensors: Mapping[str, Tensor], head_dim: int) -> TransformerConfig:
    """A configuration with these shapes; they show neither the size of the heads nor the number of tokens."""

    def shape(name: str) -> torch.Size:
        return shape_of(tensors, name, 2, reference_transformer_name(name))

    vocab_size, width = shape("tok_emb.weight")
    kv_width = (shape("blocks.0.attention.wqkv.weight")[0] - width) // 2
    if width % head_dim or kv_width % head_dim:
        raise ValueError(f"its width {width} is not made of heads of {head_dim} channels; give its configuration")
    return TransformerConfig(
        vocab_size=vocab_size,
        num_classes=shape(CLASS_TABLE)[0] - 1,
        tokens_per_side=1,
        depth=count_numbered(tensors, r"blocks\.(\d+)\."),
        width=width,
        heads=width // head_dim,
        kv_heads=kv_width // head_dim,
        shared_adaln="shared_ada_lin.1.weight" in tensors,
    )


def reference_transformer_name(name: str) -> str:
    """The reference's name of one of our transformer's tensors."""
    return TRANSFORMER + (REFERENCE_CLASS_TABLE if name == CLASS_TABLE else name)
