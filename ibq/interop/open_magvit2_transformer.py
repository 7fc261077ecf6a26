"""Open-MAGVIT2's transformers (arXiv 2409.04410), read and written: the AR half of `open_magvit2`.

Plain norms, and sub-codes by an inner transformer. Names and shapes follow its public code: `spatial_blocks` are the
outer blocks and `factorized_blocks` the inner ones, `pre_emb` and `post_emb` the tables of the first and the second
sub-code, of a code's first and last bits, and `head.0`, `head.1` what predicts them.
"""

import math
import re
from collections.abc import Mapping
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
    shape_of,
    take,
)
from ibq.interop.seed_voken_transformer import PUBLISHED_HEAD, PUBLISHED_TOKENS_PER_SIDE, require_transformer
from ibq.models.heads import FactorisedHeadConfig
from ibq.models.transformer import TransformerConfig

KV_CACHE = re.compile(r"(spatial|factorized)_blocks\.\d+\.attention\.kv_cache\.[kv]_cache")
NAMES = {  # ours -> theirs: whole names, or what they begin with
    "tok_emb.tables.0.": "pre_emb.",
    "tok_emb.tables.1.": "post_emb.",
    "class_emb.": "class_emb.embedding_table.",
    "blocks.": "spatial_blocks.",
    "inner.blocks.": "factorized_blocks.",
    "head_nm.rmsnorm.": "norm.",
    "head.parts.": "head.",
}
# What its code fixes and ours has options for.
FIXED = {"head.kind": "factorised", "adaln": False, "rope_base": 10000.0, "grids": None, "order": "raster"}
ARGUMENTS = {"class_num": "num_classes", "spatial_n_layer": "depth", "n_head": "heads", "dim": "width"}
ARGUMENTS |= {"n_kv_head": "kv_heads", "cond_dim": "condition_dim", "token_drop": "token_dropout"}
ARGUMENTS |= {"resid_dropout_p": "residual_dropout", "ffn_dropout_p": "ffn_dropout"}
IGNORED = ("vocab_size", "block_size", "factorized_n_layer", "factorized_bits", "token_factorization")


def is_open_magvit2(name: str) -> bool:
    """Whether a tensor's name in an AR checkpoint is of such a transformer."""
    return name.removeprefix(TRANSFORMER).startswith(("spatial_blocks.", "factorized_blocks.", "pre_emb.", "post_emb."))


def transformer_of(state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Transformer weights of an AR checkpoint's tensors, named for `Transformer.load_state_dict(strict=True)`.

    The tokenizer in it is left to others, and key/value caches that sampling left behind are dropped. Raises
    ValueError that names every missing, unexpected or wrongly shaped tensor.
    """
    theirs = {name: value for name, value in take(state, TRANSFORMER).items() if not KV_CACHE.fullmatch(name)}
    unexpected = [name for name in state if not name.startswith((TRANSFORMER, FIRST_STAGE))]
    ours = {our_name(name): value for name, value in theirs.items()}
    require_transformer(ours, _config_of_shapes, reference_name, path, unexpected)
    return ours


def transformer_state(config: TransformerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's part of its checkpoint; ValueError where its code has no such model."""
    require_settings(config, FIXED, "Open-MAGVIT2")
    sizes = config.digits
    if len(sizes) != 2 or any(size.bit_count() != 1 for size in sizes):
        raise ValueError(f"head.sub_codes: {[*sizes]} does not fit Open-MAGVIT2, which has two, each of some bits")
    return {reference_name(name): value for name, value in tensors.items()}


def transformer_config_from_reference(arguments: Mapping[str, Any]) -> TransformerConfig:
    """Our configuration for its transformer's arguments (`transformer_config.params` of its AR YAML files).

    Their `vocab_size` means nothing: it is 512 in the published files, and no tensor has its size. Raises ValueError
    naming an argument that is unknown, missing or asks for something that this implementation does not have.
    """
    tokens, bits = argument(arguments, "block_size"), argument(arguments, "factorized_bits")
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"block_size: {tokens} is not a square, as the reference's codes are")
    for required in ("spatial_n_layer", "n_head", "dim"):
        argument(arguments, required)
    if not arguments.get("token_factorization", False):
        raise ValueError("token_factorization: must be true; its code has no other head")
    reject_unknown(arguments, {*ARGUMENTS, *IGNORED}, "", "transformer")
    given = {ours: arguments[theirs] for theirs, ours in ARGUMENTS.items() if theirs in arguments}
    # Defaults of its code that differ from ours.
    given = {"residual_dropout": 0.0, **given}
    return TransformerConfig(
        vocab_size=2 ** sum(bits),
        tokens_per_side=math.isqrt(tokens),
        adaln=False,
        head=FactorisedHeadConfig(
            sub_codes=tuple(2**count for count in bits), layers=arguments.get("factorized_n_layer", 2)
        ),
        **given,
    )


def published_transformer_config(tensors: Mapping[str, Tensor]) -> TransformerConfig:
    """The configuration of a published transformer with these weights, named as from `transformer_of`.

    What shapes do not show is that of its YAML files: heads of 64 channels, 16 x 16 tokens.
    """
    return replace(_config_of_shapes(tensors, PUBLISHED_HEAD), tokens_per_side=PUBLISHED_TOKENS_PER_SIDE)


def _config_of_shapes(tensors: Mapping[str, Tensor], head_dim: int) -> TransformerConfig:
    """A configuration with these shapes; they show neither the size of the heads nor the number of tokens."""

    def shape(name: str) -> torch.Size:
        return shape_of(tensors, name, 2, reference_name(name))

    (first, width), second = shape("tok_emb.tables.0.weight"), shape("tok_emb.tables.1.weight")[0]
    kv_width = (shape("blocks.0.attention.wqkv.weight")[0] - width) // 2
    if width % head_dim or kv_width % head_dim:
        raise ValueError(f"its width {width} is not made of heads of {head_dim} channels; give its configuration")
    return TransformerConfig(
        vocab_size=first * second,
        num_classes=shape("class_emb.weight")[0] - 1,
        tokens_per_side=1,
        depth=count_numbered(tensors, r"blocks\.(\d+)\."),
        width=width,
        heads=width // head_dim,
        kv_heads=kv_width // head_dim,
        adaln=False,
        head=FactorisedHeadConfig(
            sub_codes=(first, second), layers=max(1, count_numbered(tensors, r"inner\.blocks\.(\d+)\."))
        ),
    )


def reference_name(name: str) -> str:
    """Its name, in a checkpoint, of one of our transformer's tensors."""
    ours = next((prefix for prefix in NAMES if name.startswith(prefix)), "")
    return TRANSFORMER + NAMES.get(ours, "") + name.removeprefix(ours)


def our_name(name: str) -> str:
    """Our name of one of its transformer's tensors, given without the prefix; one that is unknown stays."""
    for ours, theirs in NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
