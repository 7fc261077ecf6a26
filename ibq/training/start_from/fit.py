"""What every parameter of a run begins with: taken from a source, made from it, or new; and the table that says so."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ibq import dist
from ibq.config import UserError
from ibq.interop.lightning_tokenizer import infer_discriminator_config
from ibq.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.ops.codebook import directions, resized_codebook
from ibq.training.start_from.config import TokenizerStartConfig, TransformerStartConfig
from ibq.training.start_from.differences import RESOLUTIONS, SIZES, require_allowed
from ibq.training.start_from.places import Moments, Source

Became = Literal["taken", "made", "new", "left"]
CODEBOOK, CLASSES, TARGETS = "quantizer.codebook", "class_emb.weight", "target_emb.weight"
NOT_THERE = "not at this place; of a run, its checkpoints hold it"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one part; `made`: from what the place holds, but not as it is."""

    part: str
    became: Became
    tensors: int = 0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Value:
    """The first weights of a parameter, in its shape; where the mask `new` says so, its initial ones stay."""

    weight: Tensor
    new: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What one module begins with. `read` gives the values of `taken`; all ranks ask for `made` at once."""

    taken: frozenset[str]  # parameters that are as at the place
    read: Callable[[str], Tensor]
    make: Callable[[torch.device], dict[str, Value]] = lambda _device: {}
    moments: Moments | None = None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the modules of a run begin with; every other tensor keeps its initial values."""

    engines: dict[str, Beginning]
    rank_tensors: dict[str, Tensor] = field(default_factory=dict)  # as in the task's `rank_tensors`
    rows: list[Row]

    def table(self) -> list[dict[str, Any]]:
        """The rows, for JSON."""
        return [asdict(row) for row in self.rows]


def _meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _rows_of(module: nn.Module, source: Source, made: Mapping[str, str], new: Mapping[str, str]) -> list[Row]:
    """One row for each part of a module's parameters."""
    parts: dict[tuple, int] = {}
    for name, _ in module.named_parameters():
        became, note = ("made", made[name]) if name in made else ("new", new[name]) if name in new else ("taken", "")
        key = (CODEBOOK if name == CODEBOOK else name.split(".")[0], became, note)
        parts[key] = parts.get(key, 0) + 1
    rows = [Row(part=part, became=became, tensors=count, note=note) for (part, became, note), count in parts.items()]
    return rows + [Row(part=part, became="left", tensors=count) for part, count in source.rest.items()]


# --- Transformers ---


def fit_transformer(source: Source, config: Any, start: TransformerStartConfig, data_tokenizer: str | None) -> Fit:
    """How a source becomes the transformer of a run's `config`; UserError for a difference that is not allowed.

    `data_tokenizer`: the hash of the tokenizer that the run's codes are of, None where any will do.
    """
    module = _meta(lambda: Transformer(config.model))
    differ = require_allowed(source, module, start)
    if None not in (data_tokenizer, source.tokenizer) and data_tokenizer != source.tokenizer:
        raise UserError(
            f"{source.place}: tok_emb.weight is of codes of another tokenizer than data.train; encode the images with "
            "the one that it was trained on, or set data.allow_other_tokenizer=true"
        )
    names, made = [name for name, _ in module.named_parameters()], {}
    if start.classes == "new":
        made = {CLASSES: f"{config.model.num_classes} new classes; that of no class is kept"}
    if config.model.order == "random" and source.config.positions != config.model.positions:
        made[TARGETS] = "those of the rows and columns that are there"
    rows = _rows_of(module, source, made, {})
    if differ.keys() & {*RESOLUTIONS}:
        there, here = (
            " and ".join(f"{rows} x {columns}" for rows, columns in model.code_grids)
            for model in (source.config, config.model)
        )
        rows.append(Row(part="rotary tables", became="new", note=f"{there} tokens become {here}"))

    def make(_device: torch.device) -> dict[str, Value]:
        values = {CLASSES: _new_classes, TARGETS: _other_positions}
        return {name: values[name](source, config.model) for name in made}

    beginning = Beginning(taken=frozenset(names) - made.keys(), read=source.tensors.__getitem__, make=make)
    return Fit(engines={"transformer": beginning}, rows=rows)


def _new_classes(source: Source, model: TransformerConfig) -> Value:
    new = torch.ones(model.num_classes + 1, model.model_width, dtype=torch.bool)
    new[-1] = False
    none = source.tensors[CLASSES][-1:].float()
    return Value(weight=none.expand(len(new), -1), new=new)


def _other_positions(source: Source, model: TransformerConfig) -> Value:
    """The embedding of a row and column is the one that it has there."""
    (rows, columns), there = model.positions, source.config.positions
    height, width = min(rows, there[0]), min(columns, there[1])
    found = source.tensors[TARGETS].float().unflatten(0, there)
    weight, new = torch.zeros(rows, columns, found.shape[-1]), torch.ones(rows, columns, found.shape[-1])
    weight[:height, :width], new[:height, :width] = found[:height, :width], 0
    return Value(weight=weight.flatten(0, 1), new=new.flatten(0, 1).bool())


# --- Tokenizers ---


def fit_tokenizer(source: Source, config: Any, start: TokenizerStartConfig) -> Fit:
    """How a source becomes the tokenizer, and its discriminator, of a run's `config`; UserError as above."""
    module = _meta(lambda: Tokenizer(config.model))
    differ = require_allowed(source, module, start)
    made, new = _of_another_codebook(module, source, start, differ)
    names = [name for name, _ in module.named_parameters()]
    rows = _rows_of(module, source, made, new)
    if "model.resolution" in differ:
        there, here = differ["model.resolution"]
        rows.append(Row(part="resolution", became="new", note=f"{there} pixels become {here}"))
    beginning = Beginning(
        taken=frozenset(names) - made.keys() - new.keys(),
        read=source.tensors.__getitem__,
        make=lambda device: _made_of_codes(source, module, start, device) if made else {},
        moments=source.moments.get("tokenizer") if "optimizer" in start.also else None,
    )
    engines, rank_tensors = {"tokenizer": beginning}, {}
    discriminator, reason = _discriminator(source, config, start)
    if discriminator is not None:
        engines["discriminator"] = discriminator
        trained = discriminator.taken
        rank_tensors = {f"discriminator/{n}": t for n, t in source.discriminator.items() if n not in trained}
        if "lecam" in start.also:
            rank_tensors |= {f"lecam/{name}": tensor for name, tensor in source.lecam.items()}
    rows += _other_rows(source, config, start, engines, reason)
    return Fit(engines=engines, rank_tensors=rank_tensors, rows=rows)


def _of_another_codebook(module: nn.Module, source: Source, start, differ: Mapping) -> tuple[dict, dict]:
    """({parameter: how it is made}, {parameter: why it is new}) where the codebook is not that of the source."""
    around = [name for name, _ in module.named_parameters() if name.startswith(("quant_conv.", "post_quant_conv."))]
    around = [name for name in around if name != "post_quant_conv.bias"]
    turned = around if "model.quantizer.dim" in differ else []
    if start.codebook == "new":
        codes = [name for name, _ in module.named_parameters() if name.startswith("quantizer.")]
        return {}, dict.fromkeys((*codes, *turned), "start_from.codebook=new")
    if not differ.keys() & {*SIZES}:
        return {}, {}
    (codes, dim), (new_codes, new_dim) = (
        (quantizer.num_codes, quantizer.dim) for quantizer in (source.config.quantizer, module.config.quantizer)
    )
    how = f"{codes:,} codes x {dim} become {new_codes:,} x {new_dim} ({start.codebook})"
    return {CODEBOOK: how} | dict.fromkeys(turned, f"{dim} channels become {new_dim}"), {}


def _made_of_codes(source: Source, module: nn.Module, start, device: torch.device) -> dict[str, Value]:
    """The codebook, and the convolutions around it, of another size; the same on every rank."""
    codes, quantizer = source.tensors[CODEBOOK].float().to(device), module.quantizer
    basis = dist.from_main(directions(codes, quantizer.dim).contiguous())
    resized = resized_codebook(codes, quantizer.num_codes, start.codebook, spherical=quantizer.spherical)
    codebook = dist.from_main((resized @ basis).contiguous())
    basis, values = basis.cpu(), {CODEBOOK: Value(weight=codebook.cpu())}
    if basis.shape[0] == basis.shape[1]:
        return values
    new = torch.arange(basis.shape[1]) >= basis.shape[0]  # channels that the source does not have
    inner, outer = (source.tensors[f"{name}.weight"].float() for name in ("quant_conv", "post_quant_conv"))
    turned = {
        "quant_conv.weight": (basis.t() @ inner.flatten(1))[:, :, None, None],
        "quant_conv.bias": basis.t() @ source.tensors["quant_conv.bias"].float(),
        "post_quant_conv.weight": (outer.flatten(1) @ basis)[:, :, None, None],
    }
    for name, weight in turned.items():
        mask = new[None, :, None, None] if name.startswith("post") else new.view(-1, *[1] * (weight.dim() - 1))
        values[name] = Value(weight=weight, new=mask.expand_as(weight))
    return values


def _discriminator(source: Source, config: Any, start: TokenizerStartConfig) -> tuple[Beginning | None, str]:
    """What the discriminator begins with; None and why, where it is new."""
    tensors, gan = source.discriminator, config.loss.gan
    if not gan.enabled:
        return None, "loss.gan.enabled is false"
    if not tensors:
        return None, NOT_THERE
    if "discriminator" not in start.also:
        return None, "not in start_from.also"
    if not isinstance(gan.discriminator, PatchDiscriminatorConfig):
        return None, f"loss.gan.discriminator.kind is {gan.discriminator.kind}"
    if any(name.startswith("heads.") for name in tensors):
        return None, "it is of another kind, on frozen features"
    if not any(name.startswith("main.") for name in tensors):
        return None, "it is of another kind, with blurred downsampling"
    there, here = infer_discriminator_config(tensors), gan.discriminator
    for name in ("channels", "layers"):
        if getattr(there, name) != getattr(here, name):
            raise UserError(
                f"{source.place}: discriminator main.0.weight {[*tensors['main.0.weight'].shape]}: "
                f"loss.gan.discriminator.{name} is {getattr(there, name)} there and {getattr(here, name)} here; set "
                "it so, or leave the discriminator out: start_from.also=[]"
            )
    names = [name for name, _ in _meta(lambda: PatchDiscriminator(here)).named_parameters()]
    moments = source.moments.get("discriminator") if "optimizer" in start.also else None
    return Beginning(taken=frozenset(names), read=tensors.__getitem__, moments=moments), ""


def _other_rows(source: Source, config: Any, start, engines: Mapping[str, Beginning], reason: str) -> Iterable[Row]:
    """Of the discriminator, LeCAM's averages and the optimizers."""
    taken = "discriminator" in engines
    if taken or source.discriminator or config.loss.gan.enabled:
        became = "taken" if taken else "left" if source.discriminator else "new"
        yield Row(part="discriminator", became=became, tensors=len(source.discriminator), note=reason)
    if source.lecam or config.loss.gan.enabled:
        use = taken and "lecam" in start.also
        became = "new" if not source.lecam else "taken" if use else "left"
        yield Row(
            part="LeCAM's averages", became=became, tensors=len(source.lecam), note="" if source.lecam else NOT_THERE
        )
    for name in ("tokenizer", "discriminator") if "optimizer" in start.also else ():
        if name in engines or name in source.moments:
            there = name in source.moments
            note = f"{source.moments[name].steps:,} updates" if there else NOT_THERE
            became = "new" if not there else "taken" if name in engines else "left"
            yield Row(part=f"optimizer of the {name}", became=became, note=note)
    if "optimizer" not in start.also:
        yield Row(part="optimizers", became="new", note="not in start_from.also")
