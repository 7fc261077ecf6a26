"""Checkpoints and configurations of the papers' public implementation (SEED-Voken), read and written.

A tokenizer checkpoint holds `encoder.*`, `decoder.*`, `quantize.embedding.weight`, `quant_conv.*`,
`post_quant_conv.*`, and what `lightning_tokenizer` describes. An AR checkpoint holds `transformer.*` and, under
`first_stage_model.*`, its tokenizer with the averaged values.

Reading is strict: every tensor of a file is used, or recognised as not needed, or named in an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibq.interop.lightning_tokenizer import Implementation, Weights, rest_of
from ibq.interop.published import Hints, Published, require_config, require_settings
from ibq.interop.reference_tensors import (
    FIRST_STAGE,
    TRANSFORMER,
    argument,
    encoder_sizes,
    read_state,
    reject_unknown,
    shape_of,
)
from ibq.interop.seed_voken_transformer import (
    published_transformer_config,
    reference_transformer_name,
    transformer_config_from_reference,
    transformer_of,
    transformer_state,
)
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer
from ibq.quantizers import IBQConfig

CODEBOOK = "quantizer.codebook"
REFERENCE_CODEBOOK = "quantize.embedding.weight"
RESOLUTION = 256  # pixels: of all published tokenizers

# What the reference's model arguments say about training only; nothing of it describes the tokenizer.
TRAINING_ARGUMENTS = (
    *("lossconfig", "learning_rate", "resume_lr", "lr_drop_epoch", "lr_drop_rate", "use_ema", "stage"),
    *("ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor", "remap", "sane_index_shape"),
    *("scheduler_type", "warmup_epochs", "min_learning_rate", "gradient_clip_val", "lr_drop_iter"),
    *("wp", "wp0", "wpe", "wp_iter", "max_iter", "sche_type", "use_shared_epoch"),
)

# --- Reading ------------------------------------------------------------------------------------------------


def read(path: str | Path, weights: Weights = "ema", hints: Hints = Hints()) -> list[Published]:  # noqa: B008 (frozen)
    """All models of a checkpoint: a tokenizer, or a transformer with or without its tokenizer.

    A transformer has one set of weights. Raises ValueError that names every missing, unexpected or wrongly shaped
    tensor.
    """
    state, source, found = read_state(path), str(path), []
    in_it = {Transformer: any(name.startswith(TRANSFORMER) for name in state)}
    in_it[Tokenizer] = not in_it[Transformer] or any(name.startswith(FIRST_STAGE) for name in state)
    if hints.kind is Transformer or (hints.kind is None and in_it[Transformer]):
        found.append(_transformer_of(state, source, hints))
    if hints.kind is Tokenizer or (hints.kind is None and in_it[Tokenizer]):
        found.append(_tokenizer_of(state, source, weights, hints))
    return found


def _transformer_of(state: dict[str, Tensor], source: str, hints: Hints) -> Published:
    tensors = transformer_of(state, source)
    arguments = _stage_arguments(hints, "transformer_config")
    if arguments is not None:
        config = transformer_config_from_reference(arguments)
    else:
        config = hints.transformer or published_transformer_config(tensors)
    require_config(config, tensors, source, reference_transformer_name)
    return Published(config=config, tensors=tensors, weights="raw")


def _tokenizer_of(state: dict[str, Tensor], source: str, weights: Weights, hints: Hints) -> Published:
    parts = IMPLEMENTATION.split(state, source)
    tensors = _our_names(parts.chosen(weights, source))
    arguments = _stage_arguments(hints, "first_stage_config")
    if arguments is not None:
        config = tokenizer_config_from_reference(arguments)
    else:
        config = infer_tokenizer_config(tensors, hints.resolution or RESOLUTION)
    require_config(config, tensors, source, _reference_name)
    rest = {} if parts.from_ar_checkpoint else rest_of(state, parts.plain, weights)
    return Published(config=config, tensors=tensors, weights=weights, rest=rest)


def _stage_arguments(hints: Hints, stage: str) -> Mapping[str, Any] | None:
    """The arguments of one model, from those of the AR stage, which has two, or from those of that model alone."""
    arguments = hints.arguments
    if arguments is not None and "transformer_config" in arguments:
        return argument(argument(arguments, stage), "params", f"{stage}.")
    return arguments


def infer_tokenizer_config(tensors: Mapping[str, Tensor], resolution: int = 256) -> TokenizerConfig:
    """The configuration that the shapes of a tokenizer's weights (our names) imply.

    `resolution` is the nominal image side, in pixels, that attention levels refer to. Settings that shapes do
    not show get their defaults. Raises ValueError naming a tensor that is needed and missing.
    """

    def shape(name: str, dimensions: int = 4) -> torch.Size:
        return shape_of(tensors, name, dimensions, _reference_name(name))

    sizes = encoder_sizes(tensors, shape)
    levels = range(len(sizes["channel_multipliers"]))
    attention = [level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in tensors]
    num_codes, dim = shape(CODEBOOK, 2)
    return TokenizerConfig(
        **sizes,
        resolution=resolution,
        attention_resolutions=tuple(resolution // 2**level for level in attention),
        quantizer=IBQConfig(num_codes=num_codes, dim=dim),
    )


def tokenizer_config_from_reference(arguments: Mapping[str, Any]) -> TokenizerConfig:
    """Our configuration for the reference's model arguments (`model.init_args` of its YAML files).

    Training-only arguments are left out. Raises ValueError naming an argument that is unknown, missing or
    asks for something that this implementation does not have.
    """
    network = dict(argument(arguments, "ddconfig"))
    known = {
        "ddconfig",
        "n_embed",
        "embed_dim",
        "beta",
        "entropy_temperature",
        "use_entropy_loss",
        "l2_normalize",
        "cosine_similarity",
    }
    known |= {"sample_minimization_weight", "batch_maximization_weight"} | set(TRAINING_ARGUMENTS)
    reject_unknown(arguments, known, "", "tokenizer")
    config = TokenizerConfig(
        resolution=argument(network, "resolution", "ddconfig."),
        in_channels=argument(network, "in_channels", "ddconfig."),
        channels=argument(network, "ch", "ddconfig."),
        channel_multipliers=tuple(argument(network, "ch_mult", "ddconfig.")),
        res_blocks=argument(network, "num_res_blocks", "ddconfig."),
        attention_resolutions=tuple(argument(network, "attn_resolutions", "ddconfig.")),
        latent_channels=argument(network, "z_channels", "ddconfig."),
        dropout=network.get("dropout", 0.0),
        quantizer=_quantizer_config_from_reference(arguments),
    )
    used = {"resolution", "in_channels", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels"}
    reject_unknown(network, used | {"dropout", "double_z", "out_ch"}, "ddconfig.", "tokenizer")
    if network.get("double_z", False):
        raise ValueError(
            "ddconfig.double_z: true is for variational encoders, which are not supported; set it to false"
        )
    if network.get("out_ch", config.in_channels) != config.in_channels:
        raise ValueError("ddconfig.out_ch: must equal in_channels; the decoder returns images like the encoder's")
    return config


def _quantizer_config_from_reference(arguments: Mapping[str, Any]) -> IBQConfig:
    if arguments.get("l2_normalize", False):
        raise ValueError("l2_normalize: true is not supported; only checkpoints with false can be read")
    if arguments.get("cosine_similarity", False):
        raise ValueError("cosine_similarity: true is not supported; only checkpoints with false can be read")
    entropy = bool(arguments.get("use_entropy_loss", True))
    defaults = IBQConfig()
    return IBQConfig(
        num_codes=argument(arguments, "n_embed"),
        dim=argument(arguments, "embed_dim"),
        beta=arguments.get("beta", defaults.beta),
        entropy_temperature=arguments.get("entropy_temperature", defaults.entropy_temperature),
        sample_entropy_weight=arguments.get("sample_minimization_weight", 1.0) if entropy else 0.0,
        batch_entropy_weight=arguments.get("batch_maximization_weight", 1.0) if entropy else 0.0,
    )


# --- Writing ------------------------------------------------------------------------------------------------


def write_transformer(
    config: Any, tensors: Mapping[str, Tensor], tokenizer: tuple[TokenizerConfig, Mapping[str, Tensor]] | None = None
) -> dict[str, Tensor]:
    """The `state_dict` of the reference's AR checkpoint, with its tokenizer where one is given."""
    state = {}
    if tokenizer is not None:
        require_settings(tokenizer[0], IMPLEMENTATION.fixed, IMPLEMENTATION.title)
        state = {FIRST_STAGE + name: value for name, value in _reference_names(tokenizer[1]).items()}
    return state | transformer_state(config, tensors)


# --- Names --------------------------------------------------------------------------------------------------


def _reference_name(name: str) -> str:
    return REFERENCE_CODEBOOK if name == CODEBOOK else name


def _reference_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_reference_name(name): value for name, value in tensors.items()}


def _our_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {CODEBOOK if name == REFERENCE_CODEBOOK else name: value for name, value in tensors.items()}


IMPLEMENTATION = Implementation(
    title="SEED-Voken",
    # What its code fixes and ours has options for.
    fixed={"network": "vqgan", "norm_groups": 32, "quantizer.projector": None}
    | {"quantizer.kind": "ibq", "quantizer.l2_normalize": False},
    prefixes=("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv."),
    infer_config=lambda tensors: infer_tokenizer_config(_our_names(tensors)),
    reference_names=_reference_names,
)
write_tokenizer, write_tokenizer_with_rest = IMPLEMENTATION.write, IMPLEMENTATION.write_with_rest
