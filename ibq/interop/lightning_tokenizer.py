"""The parts of a tokenizer's checkpoint from the papers' public implementation (SEED-Voken, a Lightning program).

IBQ's and Open-MAGVIT2's tokenizers share the form: the network's own tensors, the frozen LPIPS network and the
discriminator under `loss.*`, and under `model_ema.*` one average per trainable parameter, its name with all dots
removed. The AR stage holds a tokenizer under `first_stage_model.*`, with the averaged values under plain names.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ibq.interop.published import require_settings
from ibq.interop.reference_tensors import (
    FIRST_STAGE,
    TRANSFORMER,
    count_numbered,
    listing,
    require_same_tensors,
    shape_of,
    take,
)
from ibq.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig

Weights = Literal["ema", "raw"]
Shapes = dict[str, tuple[int, ...]]

DISCRIMINATOR = "loss.discriminator."
EMA = "model_ema."
EMA_BOOKKEEPING = {"decay": torch.tensor(0.999), "num_updates": torch.tensor(-1, dtype=torch.int32)}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", ".kernel")  # of discriminators: have no averages
FROZEN_LPIPS = re.compile(
    r"loss\.perceptual_loss\."
    r"(scaling_layer\.(shift|scale)|net\.slice\d+\.\d+\.(weight|bias)|lin\d+\.model\.1\.weight)"
)


@dataclass(frozen=True, kw_only=True)
class TokenizerParts:
    """A checkpoint's tensors, sorted; each part is complete, or empty."""

    plain: dict[str, Tensor]  # the tokenizer, the reference's names
    discriminator: dict[str, Tensor]  # names without the prefix
    averages: dict[str, Tensor]  # averages, names without dots
    from_ar_checkpoint: bool

    def chosen(self, weights: Weights, source: str) -> dict[str, Tensor]:
        """The raw or the averaged tokenizer, the reference's names; ValueError where there is none."""
        if self.from_ar_checkpoint and weights == "raw":
            raise ValueError(f"{source}: an AR checkpoint has the averaged values only; use weights='ema'")
        if self.from_ar_checkpoint or weights == "raw":
            return dict(self.plain)
        if not self.averages:
            raise ValueError(f"{source}: has no averaged weights ({EMA}*); use weights='raw'")
        return {name: self.averages[without_dots(name)] for name in self.plain}


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One of the programs that write such files: what its tokenizers are, and how it names their tensors."""

    title: str
    fixed: Mapping[str, object]  # settings of which its code has one
    prefixes: tuple[str, ...]  # of the names of a tokenizer's own tensors
    infer_config: Callable[[Mapping[str, Tensor]], TokenizerConfig]  # from tensors under its names
    reference_names: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # our tensors under its names

    def split(self, state: dict[str, Tensor], source: str) -> TokenizerParts:
        """Sort a checkpoint's tensors into parts and check that each part is complete.

        Raises ValueError that names every missing, unexpected or wrongly shaped tensor.
        """
        from_ar_checkpoint = any(name.startswith(FIRST_STAGE) for name in state)
        if from_ar_checkpoint:
            unexpected = [name for name in state if not name.startswith((FIRST_STAGE, TRANSFORMER))]
            state = take(state, FIRST_STAGE)
            unexpected += [FIRST_STAGE + name for name in state if not name.startswith(self.prefixes)]
        else:
            groups = (*self.prefixes, DISCRIMINATOR, EMA)
            unexpected = [n for n in state if not n.startswith(groups) and not FROZEN_LPIPS.fullmatch(n)]
        parts = TokenizerParts(
            plain={name: value for name, value in state.items() if name.startswith(self.prefixes)},
            discriminator=take(state, DISCRIMINATOR),
            averages={n: value for n, value in take(state, EMA).items() if n not in EMA_BOOKKEEPING},
            from_ar_checkpoint=from_ar_checkpoint,
        )
        if not parts.plain:
            raise ValueError(f"{source}: has no tokenizer ({', '.join(prefix + '*' for prefix in self.prefixes)})")
        _check_parts(parts, unexpected, source, self._network_shapes)
        return parts

    def _network_shapes(self, plain: Mapping[str, Tensor]) -> Shapes:
        with torch.device("meta"):
            tokenizer = Tokenizer(self.infer_config(plain))
        return {name: tuple(value.shape) for name, value in self.reference_names(tokenizer.state_dict()).items()}

    def write(
        self,
        config: TokenizerConfig,
        raw: Mapping[str, Tensor],
        averaged: Mapping[str, Tensor],
        discriminator: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The `state_dict` of a checkpoint of a tokenizer, from both sets of weights under our names.

        This project keeps no averages of a discriminator: those written are its raw weights. LPIPS is left out; the
        reference loads it from elsewhere. ValueError where the program has no such tokenizer.
        """
        require_settings(config, self.fixed, self.title)
        raw, averaged = self.reference_names(raw), self.reference_names(averaged)
        networks = ("encoder.", "decoder.")
        state = {name: value for name, value in raw.items() if name.startswith(networks)}
        state |= {DISCRIMINATOR + name: value for name, value in (discriminator or {}).items()}
        state |= {name: value for name, value in raw.items() if not name.startswith(networks)}
        averages = {name: averaged.get(name, state[name]) for name in state if not is_buffer(name)}
        state |= {EMA + name: value for name, value in EMA_BOOKKEEPING.items()}
        return state | {EMA + without_dots(name): value for name, value in averages.items()}

    def write_with_rest(
        self, config: TokenizerConfig, tensors: Mapping[str, Tensor], weights: Weights, rest: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The `state_dict` that `tensors` and `rest` were read from. ValueError where they are not of one file."""
        require_settings(config, self.fixed, self.title)
        state = dict(rest) | {slot(n, weights): value for n, value in self.reference_names(tensors).items()}
        self.split(state, "checkpoint and rest")
        return state


# --- What is complete ---------------------------------------------------------------------------------------


def _check_parts(parts: TokenizerParts, unexpected: list[str], source: str, network) -> None:
    try:
        expected = dict(network(parts.plain))
        if parts.discriminator:
            expected |= {DISCRIMINATOR + n: shape for n, shape in discriminator_shapes(parts.discriminator).items()}
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    discriminator = {DISCRIMINATOR + name: value for name, value in parts.discriminator.items()}
    found = {name: tuple(value.shape) for name, value in (parts.plain | discriminator).items()}
    if parts.averages:
        trainable = [name for name in expected if not is_buffer(name)]
        expected |= {EMA + without_dots(name): expected[name] for name in trainable}
        found |= {EMA + name: tuple(value.shape) for name, value in parts.averages.items()}
    require_same_tensors(found, expected, source, unexpected)


def discriminator_shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Names and shapes of the complete discriminator that these tensors belong to, without the prefix."""
    if any(name.startswith("block_in.") for name in tensors):
        return _blurring_discriminator_shapes(tensors)
    with torch.device("meta"):
        state = PatchDiscriminator(infer_discriminator_config(tensors)).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def infer_discriminator_config(tensors: Mapping[str, Tensor]) -> PatchDiscriminatorConfig:
    """The configuration of the patch discriminator that these weights imply."""
    channels = shape_of(tensors, "main.0.weight", 4, f"{DISCRIMINATOR}main.0.weight")[0]
    # `main`: a convolution and its activation; `layers` times convolution, norm, activation; a convolution.
    last = count_numbered(tensors, r"main\.(\d+)\.") - 1
    return PatchDiscriminatorConfig(channels=channels, layers=max(1, (last - 2) // 3))


def _blurring_discriminator_shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Those of the discriminator with blurred downsampling that text-to-image tokenizers were trained against.

    It is recognised, so that nothing in a file goes unnoticed, and left behind.
    """
    channels = shape_of(tensors, "block_in.0.weight", 4, f"{DISCRIMINATOR}block_in.0.weight")[0]
    shapes: Shapes = {"block_in.0.weight": (channels, 3, 5, 5), "block_in.0.bias": (channels,)}
    blurs = any(re.fullmatch(r"blocks\.\d+\.1\.kernel", name) for name in tensors)
    width = channels
    for i in range(count_numbered(tensors, r"blocks\.(\d+)\.")):
        previous, width = width, channels * 2**i
        shapes |= {f"blocks.{i}.0.weight": (width, previous, 3, 3), f"blocks.{i}.0.bias": (width,)}
        shapes |= {f"blocks.{i}.2.weight": (width,), f"blocks.{i}.2.bias": (width,)}
        if blurs:
            kernel = tensors.get(f"blocks.{i}.1.kernel")
            shapes[f"blocks.{i}.1.kernel"] = (1, 1, 4, 4) if kernel is None else tuple(kernel.shape)
    shapes |= {"to_logits.0.weight": (width, width, 1, 1), "to_logits.0.bias": (width,)}
    return shapes | {"to_logits.2.weight": (1, width, 5, 5), "to_logits.2.bias": (1,)}


# --- Optimizers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AdamState:
    """What Adam keeps after `steps` updates: parameter -> (first moment, second moment)."""

    steps: int
    moments: dict[str, tuple[Tensor, Tensor]]


def optimizer_states(checkpoint: Mapping[str, Any], networks: Sequence[Mapping[str, Tensor]]) -> list[AdamState]:
    """What Lightning keeps of the optimizer of each network, whose parameters are given in the program's order.

    None of them where the file keeps no optimizers. ValueError where they are not those of these networks.
    """
    states, found = checkpoint.get("optimizer_states") or [], []
    for number, (network, state) in enumerate(zip(networks, states, strict=False)):
        where = f"optimizer_states[{number}]"
        try:
            moments = {
                name: (state["state"][place]["exp_avg"], state["state"][place]["exp_avg_sq"])
                for place, name in enumerate(network)
            }
            steps = int(state["state"][0]["step"])
            fits = len(moments) == len(state["state"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{where}: is not Adam's of {len(network)} parameters ({error!r})") from error
        wrong = [n for n, pair in moments.items() if any(part.shape != network[n].shape for part in pair)]
        if wrong or not fits:
            raise ValueError(f"{where}: is of other parameters than the file's{': ' if wrong else ''}{listing(wrong)}")
        found.append(AdamState(steps=steps, moments=moments))
    return found


# --- Names --------------------------------------------------------------------------------------------------


def rest_of(state: Mapping[str, Tensor], used: Iterable[str], weights: Weights) -> dict[str, Tensor]:
    """The tensors of a checkpoint besides one set of weights, which has the reference's names `used`."""
    taken = {slot(name, weights) for name in used}
    return {name: value for name, value in state.items() if name not in taken}


def slot(name: str, weights: Weights) -> str:
    """Where a checkpoint keeps the raw or the averaged values of a parameter."""
    return EMA + without_dots(name) if weights == "ema" else name


def is_buffer(name: str) -> bool:
    """Whether a tensor is not trained, and so has no average."""
    return name.endswith(BUFFERS)


def without_dots(name: str) -> str:
    """How a parameter is called among the averages."""
    return name.replace(".", "")
