"""Reading checkpoints and configurations of the papers' public implementation (SEED-Voken).

A tokenizer checkpoint holds `encoder.*`, `decoder.*`, `quantize.embedding.weight`, `quant_conv.*`,
`post_quant_conv.*`, the frozen LPIPS network and the discriminator under `loss.*`, and under `model_ema.*`
one average per trainable parameter, its name with all dots removed. An AR checkpoint holds `transformer.*`
and, under `first_stage_model.*`, its tokenizer with the averaged values.

Reading is strict: every tensor of a file is used, or recognised as not needed, or named in an error.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ibq.interop.reference_tensors import (
    FIRST_STAGE,
    TRANSFORMER,
    argument,
    count_numbered,
    read_state,
    reject_unknown,
    require_same_tensors,
    take,
)
from ibq.interop.seed_voken_transformer import (
    published_transformer_config,
    read_transformer,
    transformer_config_from_reference,
)
from ibq.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from ibq.models.tokenizer import Tokenizer, TokenizerConfig
from ibq.quantizers import IBQConfig

__all__ = [
    "infer_discriminator_config",
    "infer_tokenizer_config",
    "published_transformer_config",
    "read_discriminator",
    "read_tokenizer",
    "read_transformer",
    "tokenizer_config_from_reference",
    "transformer_config_from_reference",
]

Weights = Literal["ema", "raw"]

CODEBOOK = "quantizer.codebook"
REFERENCE_CODEBOOK = "quantize.embedding.weight"
TOKENIZER_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
DISCRIMINATOR = "loss.discriminator."
EMA = "model_ema."
EMA_BOOKKEEPING = ("decay", "num_updates")
BATCHNORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
FROZEN_LPIPS = re.compile(
    r"loss\.perceptual_loss\."
    r"(scaling_layer\.(shift|scale)|net\.slice\d+\.\d+\.(weight|bias)|lin\d+\.model\.1\.weight)"
)

# What the reference's model arguments say about training only; nothing of it describes the tokenizer.
TRAINING_ARGUMENTS = (
    *("lossconfig", "learning_rate", "resume_lr", "lr_drop_epoch", "lr_drop_rate", "use_ema", "stage"),
    *("ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor", "remap", "sane_index_shape"),
    *("scheduler_type", "warmup_epochs", "min_learning_rate"),
)


# --- Reading ------------------------------------------------------------------------------------------------


def read_tokenizer(path: str | Path, weights: Weights = "ema") -> dict[str, Tensor]:
    """Tokenizer weights of a reference checkpoint, named for `Tokenizer.load_state_dict(strict=True)`.

    `weights`: "ema" for the averaged values (what the papers evaluate), "raw" for the trained ones. An AR
    checkpoint has only the averaged ones. Without a configuration at hand, `infer_tokenizer_config` gives it.
    Raises ValueError that names every missing, unexpected or wrongly shaped tensor.
    """
    parts = _split_tokenizer(read_state(path), str(path))
    if weights == "raw":
        if parts.from_ar_checkpoint:
            raise ValueError(f"{path}: an AR checkpoint has its tokenizer's averaged values only; use weights='ema'")
        return _our_names(parts.plain)
    if parts.from_ar_checkpoint:
        return _our_names(parts.plain)
    _require_shadows(parts, str(path))
    return _our_names({name: parts.shadows[_without_dots(name)] for name in parts.plain})


def read_discriminator(path: str | Path, weights: Weights = "raw") -> dict[str, Tensor]:
    """Discriminator weights of a checkpoint for `PatchDiscriminator.load_state_dict(strict=True)`.

    With "ema" the parameters are the averaged ones; the BatchNorm statistics exist only once, for both.
    Raises ValueError where the checkpoint has no discriminator, and like `read_tokenizer`.
    """
    parts = _split_tokenizer(read_state(path), str(path))
    if not parts.discriminator:
        raise ValueError(f"{path}: has no discriminator ({DISCRIMINATOR}*); use a tokenizer checkpoint from training")
    if weights == "raw":
        return dict(parts.discriminator)
    _require_shadows(parts, str(path))
    return {
        name: value if _is_buffer(name) else parts.shadows[_without_dots(DISCRIMINATOR + name)]
        for name, value in parts.discriminator.items()
    }


def infer_tokenizer_config(tensors: Mapping[str, Tensor], resolution: int = 256) -> TokenizerConfig:
    """The configuration that the shapes of a tokenizer's weights imply, names as from `read_tokenizer`.

    `resolution` is the nominal image side, in pixels, that attention levels refer to. Settings that shapes do
    not show get their defaults. Raises ValueError naming a tensor that is needed and missing.
    """

    def shape(name: str) -> torch.Size:
        if name not in tensors:
            raise ValueError(f"missing tensors: {_reference_name(name)}")
        return tensors[name].shape

    channels, in_channels = shape("encoder.conv_in.weight")[:2]
    levels = count_numbered(tensors, r"encoder\.down\.(\d+)\.block\.")
    attention = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in tensors]
    num_codes, dim = shape(CODEBOOK)[:2]
    return TokenizerConfig(
        resolution=resolution,
        in_channels=in_channels,
        channels=channels,
        channel_multipliers=tuple(
            shape(f"encoder.down.{i}.block.0.conv1.weight")[0] // channels for i in range(levels)
        ),
        res_blocks=count_numbered(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        attention_resolutions=tuple(resolution // 2**i for i in attention),
        latent_channels=shape("encoder.conv_out.weight")[0],
        quantizer=IBQConfig(num_codes=num_codes, dim=dim),
    )


def infer_discriminator_config(tensors: Mapping[str, Tensor]) -> DiscriminatorConfig:
    """The configuration that a discriminator's weights imply, names as from `read_discriminator`."""
    if "main.0.weight" not in tensors:
        raise ValueError(f"missing tensors: {DISCRIMINATOR}main.0.weight")
    # `main`: a convolution and its activation; `layers` times convolution, norm, activation; a convolution.
    last = count_numbered(tensors, r"main\.(\d+)\.") - 1
    return DiscriminatorConfig(channels=tensors["main.0.weight"].shape[0], layers=max(1, (last - 2) // 3))


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


# --- Sorting and checking a checkpoint's tensors ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _TokenizerParts:
    plain: dict[str, Tensor]  # the tokenizer, the reference's names
    discriminator: dict[str, Tensor]  # empty without a discriminator
    shadows: dict[str, Tensor]  # averages, names without dots; empty without EMA
    from_ar_checkpoint: bool


def _split_tokenizer(state: dict[str, Tensor], source: str) -> _TokenizerParts:
    """Sort a checkpoint's tensors into parts and check that each part is complete."""
    from_ar_checkpoint = any(name.startswith(FIRST_STAGE) for name in state)
    if from_ar_checkpoint:
        unexpected = [name for name in state if not name.startswith((FIRST_STAGE, TRANSFORMER))]
        state = take(state, FIRST_STAGE)
        unexpected += [FIRST_STAGE + name for name in state if not name.startswith(TOKENIZER_PARTS)]
    else:
        groups = (*TOKENIZER_PARTS, DISCRIMINATOR, EMA)
        unexpected = [n for n in state if not n.startswith(groups) and not FROZEN_LPIPS.fullmatch(n)]
    parts = _TokenizerParts(
        plain={name: value for name, value in state.items() if name.startswith(TOKENIZER_PARTS)},
        discriminator=take(state, DISCRIMINATOR),
        shadows={n: value for n, value in take(state, EMA).items() if n not in EMA_BOOKKEEPING},
        from_ar_checkpoint=from_ar_checkpoint,
    )
    _check_parts(parts, unexpected, source)
    return parts


def _check_parts(parts: _TokenizerParts, unexpected: list[str], source: str) -> None:
    if not parts.plain:
        raise ValueError(f"{source}: has no tokenizer ({', '.join(part + '*' for part in TOKENIZER_PARTS)})")
    try:
        expected = _expected_shapes(parts)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    discriminator = {DISCRIMINATOR + name: value for name, value in parts.discriminator.items()}
    found = {name: tuple(value.shape) for name, value in (parts.plain | discriminator).items()}
    if parts.shadows:
        trainable = [name for name in expected if not _is_buffer(name)]
        expected |= {EMA + _without_dots(name): expected[name] for name in trainable}
        found |= {EMA + name: tuple(value.shape) for name, value in parts.shadows.items()}
    require_same_tensors(found, expected, source, unexpected)


def _expected_shapes(parts: _TokenizerParts) -> dict[str, tuple[int, ...]]:
    """Shape per name (the reference's) that a complete checkpoint of this size has."""
    with torch.device("meta"):
        tokenizer = Tokenizer(infer_tokenizer_config(_our_names(parts.plain)))
        shapes = {_reference_name(name): tuple(value.shape) for name, value in tokenizer.state_dict().items()}
        if parts.discriminator:
            discriminator = PatchDiscriminator(infer_discriminator_config(parts.discriminator))
            shapes |= {DISCRIMINATOR + n: tuple(v.shape) for n, v in discriminator.state_dict().items()}
    return shapes


def _require_shadows(parts: _TokenizerParts, source: str) -> None:
    if not parts.shadows:
        raise ValueError(f"{source}: has no averaged weights ({EMA}*); use weights='raw'")


def _is_buffer(name: str) -> bool:
    return name.endswith(BATCHNORM_BUFFERS)


def _without_dots(name: str) -> str:
    return name.replace(".", "")


def _reference_name(name: str) -> str:
    return REFERENCE_CODEBOOK if name == CODEBOOK else name


def _our_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {CODEBOOK if name == REFERENCE_CODEBOOK else name: value for name, value in tensors.items()}
