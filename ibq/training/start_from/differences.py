"""How the model of a file and that of a config differ: every setting that weights depend on, and what may differ."""

from dataclasses import fields
from typing import Any

from torch import nn

from ibq.config import UserError
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import TransformerConfig
from ibq.training.start_from.config import StartConfig, TokenizerStartConfig
from ibq.training.start_from.places import Source

# Settings of a quantizer that say how it is trained, not what its codes mean.
TRAINING_ONLY = {"beta", "beta_weighs", "entropy_temperature", "entropy_group", "selection_temperature", "logits"}
TRAINING_ONLY |= {"sample_entropy_weight", "batch_entropy_weight", "init", "init_scale"}
SIZES = ("model.quantizer.num_codes", "model.quantizer.dim")
RESOLUTIONS = ("model.resolution", "model.grids", "model.tokens_per_side")
Settings = dict[str, Any]  # key in a run's config -> value


def settings_of(config: TokenizerConfig | TransformerConfig) -> Settings:
    """Every setting on which a model's tensors, or what they mean, depend."""
    if isinstance(config, TransformerConfig):
        names = {"width": "model_width", "heads": "num_heads", "kv_heads": "num_kv_heads"}
        same = ("vocab_size", "num_classes", "depth", "adaln", "shared_adaln", "rope_base", "order", "grids")
        names |= dict(zip(same, same, strict=True))
        found = {f"model.{name}": getattr(config, attribute) for name, attribute in names.items()}
        found |= {f"model.head.{name.name}": getattr(config.head, name.name) for name in fields(config.head)}
        if config.head.kind == "factorised":
            found["model.head.sub_codes"] = config.digits
        return found | {"model.tokens_per_side": None if config.grids else config.tokens_per_side}
    same = ("network", "in_channels", "channels", "channel_multipliers", "res_blocks", "latent_channels", "norm_groups")
    found = {f"model.{name}": getattr(config, name) for name in (*same, "resolution")}
    levels = range(len(config.channel_multipliers))
    # By level, counted from the full resolution: at another size of images they are at other resolutions.
    found["model.attention_resolutions"] = tuple(level for level in levels if config.has_attention(level))
    quantizer = config.quantizer
    names = [name.name for name in fields(quantizer) if name.name not in TRAINING_ONLY | {"num_codes", "dim"}]
    found |= {f"model.quantizer.{name}": getattr(quantizer, name) for name in names}
    return found | {"model.quantizer.num_codes": quantizer.num_codes, "model.quantizer.dim": quantizer.dim}


def differences(theirs: Settings, ours: Settings) -> dict[str, tuple[Any, Any]]:
    """Key -> (the file's value, the config's) of what differs; None where a kind has no such setting."""
    keys = [*theirs, *(key for key in ours if key not in theirs)]
    pairs = {key: (theirs.get(key), ours.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def allowed(start: StartConfig, key: str) -> bool:
    """Whether a difference in this setting has been allowed."""
    if key in RESOLUTIONS:
        return start.resolution == "other"
    if key == "model.num_classes":
        return start.classes == "new"
    if key in SIZES:
        return start.codebook != "same"
    return key.startswith("model.quantizer.") and start.codebook == "new"


def require_allowed(source: Source, module: nn.Module, start: StartConfig) -> dict[str, tuple[Any, Any]]:
    """The differences between a source and a module on the meta device; UserError for one that is not allowed."""
    found = differences(settings_of(source.config), settings_of(module.config))
    for key, values in found.items():
        if not allowed(start, key):
            raise UserError(_refusal(source, module, key, values))
    if isinstance(start, TokenizerStartConfig) and start.codebook in ("rows", "kmeans"):
        _require_codes(source, module, start)
    return found


def _require_codes(source: Source, module: nn.Module, start: TokenizerStartConfig) -> None:
    """UserError unless the codebook of the config can be made from that of the source."""
    quantizer, there = module.quantizer, source.config.quantizer
    new = "set start_from.codebook=new"
    if not quantizer.learned_codebook:
        raise UserError(f"{source.place}: codes of kind {there.kind} have no trained codebook to resize; {new}")
    if quantizer.projector is not None and (there.num_codes, there.dim) != (quantizer.num_codes, quantizer.dim):
        raise UserError(
            f"{source.place}: quantizer.projector makes the codes of quantizer.codebook; it cannot be resized: {new}"
        )
    if start.codebook == "kmeans" and quantizer.num_codes > there.num_codes:
        raise UserError(
            f"{source.place}: quantizer.codebook has {there.num_codes:,} codes, too few for {quantizer.num_codes:,} "
            "centres; set start_from.codebook=rows"
        )


def _refusal(source: Source, module: nn.Module, key: str, values: tuple[Any, Any]) -> str:
    """The line that says what differs, at which tensor it shows, and what to do."""
    if key == "model.attention_resolutions":
        sides = (module.config.resolution // 2**level for level in values[0])
        there, here = (f"at levels {list(levels)}" for levels in values)
        remedy = f"set {key}=[{','.join(map(str, sides))}]"
    else:
        there, here = (_written(value) for value in values)
        remedy = _remedy(key, there)
    tensor = _first_of_another_shape(source, module, key)
    return f"{source.place}: {tensor}{key} is {there} there and {here} here; {remedy}"


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(_written, value))}]"
    return "unset" if value is None else str(value)


def _remedy(key: str, there: str) -> str:
    as_there = f"set {key}={'null' if there == 'unset' else there}"
    if key in SIZES:
        return f"{as_there}, or start_from.codebook=rows, kmeans or new"
    if key.startswith("model.quantizer."):
        return f"{as_there}, or start_from.codebook=new"
    if key in RESOLUTIONS:
        return f"{as_there}, or start_from.resolution=other"
    if key == "model.num_classes":
        return f"{as_there}, or start_from.classes=new"
    if key == "model.vocab_size":
        return f"its codes are of another tokenizer: give data of the one that it was trained on, and {as_there}"
    return f"{as_there}: there is no other network that these weights fit"


# Where a setting shows first, so that the line names the very tensor that somebody sees in the file.
SHOWS = {
    **{"model.channels": "decoder.conv_out.weight", "model.latent_channels": "decoder.conv_in.weight"},
    **{"model.quantizer.num_codes": "quantizer.codebook", "model.quantizer.dim": "quantizer.codebook"},
    **{"model.vocab_size": "tok_emb.weight", "model.num_classes": "class_emb.weight", "model.width": "tok_emb.weight"},
}


def _first_of_another_shape(source: Source, module: nn.Module, key: str) -> str:
    """The tensor at which a setting shows, with both shapes; nothing for one that shapes do not show."""
    wanted = SHOWS.get(key)
    if key in RESOLUTIONS or (key.startswith("model.quantizer.") and wanted is None):
        return ""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in [wanted] if wanted in source.shapes else {**expected, **source.shapes}:
        there, here = source.shapes.get(name), expected.get(name)
        if there != here:
            found = "is not there" if there is None else f"is {[*there]}"
            return f"{name} {found}{'' if here is None else f' instead of {[*here]}'}: "
    return ""
